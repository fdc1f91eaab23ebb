package replica

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"microk8s/internal/datastore/state"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/datastore/watch"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	beatEvery  = 500 * time.Millisecond // of an idle Follow stream
	beatLimit  = 2500 * time.Millisecond
	batchBytes = 1 << 20
)

// follow takes over what the daemon with an address commits, until ctx ends or the stream does.
func (r *Replica) follow(ctx context.Context, address string) {
	conn := r.connTo(address)
	if conn == nil {
		// Not in the list yet: the list of the leader itself will name it.
		r.addPeer(address)
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	err := r.followOn(ctx, cancel, conn, address)
	if f := r.following.Swap(nil); f != nil {
		r.turned()
	}
	switch {
	case errors.Is(err, errDiverged):
		r.fail(err)
	case err != nil && ctx.Err() == nil:
		why := fmt.Errorf("cannot follow %s: %s", address, describe(err))
		r.mu.Lock()
		again := r.why == why.Error() // it is tried ten times a second
		r.mu.Unlock()
		r.because(why)
		if !isNotLeading(err) && !again {
			r.log.Info("the stream of the leader ended", "leader", address, "reason", describe(err))
		}
	}
}

func (r *Replica) addPeer(address string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.peers[address] == nil && r.ctx.Err() == nil && address != r.m.Node().Address {
		r.peers[address] = r.newPeer(address)
	}
}

var errDiverged = errors.New("this member's data is not that of the leader; it is read again at the next start")

func (r *Replica) followOn(ctx context.Context, cancel context.CancelFunc, conn *grpc.ClientConn, address string) error {
	q := &followRequest{ID: r.m.Node().ID}
	if r.e.Loaded() {
		q.Rev = r.e.Rev()
		if changes, err := r.e.History(q.Rev); err == nil {
			q.Print = fingerprint(changes, q.Rev)
		}
	}
	watchdog := time.AfterFunc(beatLimit, cancel)
	defer watchdog.Stop()
	stream, err := conn.NewStream(ctx, &serviceDesc.Streams[0], "/"+service+"/Follow", grpc.ForceCodec(codec{}))
	if err == nil {
		err = stream.SendMsg(q)
	}
	if err == nil {
		err = stream.CloseSend()
	}
	if err != nil {
		return err
	}
	var loader *state.Loader
	began := false
	for {
		var b batch
		if err := stream.RecvMsg(&b); err != nil {
			if errors.Is(err, io.EOF) {
				return errors.New("the leader ended the stream")
			}
			if status.Code(err) == codes.DataLoss {
				return fmt.Errorf("%w: %s", errDiverged, describe(err))
			}
			return err
		}
		watchdog.Reset(beatLimit)
		if b.Snapshot {
			if loader == nil {
				compacted := b.Compacted
				if compacted == 0 { // see batch.marshal
					compacted = state.NeverCompacted
				}
				loader = state.NewLoader(compacted)
			}
			for _, v := range b.Versions {
				if err := loader.Add(v); err != nil {
					return fmt.Errorf("the leader's data cannot be used: %w", err)
				}
			}
			if !b.Last {
				continue
			}
			st, _ := loader.Done()
			loader = nil
			if err := r.e.Load(st); err != nil {
				return err
			}
		} else {
			if err := r.e.Apply(b.Versions); err != nil {
				return fmt.Errorf("%w: %w", errDiverged, err)
			}
			if b.Compacted > 0 {
				if err := r.e.ApplyCompaction(b.Compacted); err != nil {
					return fmt.Errorf("%w: cannot compact: %w", errDiverged, err)
				}
			}
		}
		if !began && r.e.Loaded() {
			began = true
			f := &following{address: address, conn: conn, ctx: ctx, writes: forwarding{life: r.ctx}}
			f.writes.call = func(ctx context.Context, q *writeRequest) (*writeAnswer, error) {
				return call[writeAnswer](ctx, conn, "Write", q)
			}
			f.barrier.run = func(ctx context.Context) (int64, error) {
				ctx, cancel := context.WithTimeout(ctx, askLimit)
				defer cancel()
				a, err := call[barrierAnswer](ctx, conn, "Barrier", r.ownVote())
				if err != nil {
					return 0, err
				}
				f.compacted.Store(a.Compacted)
				return a.Rev, nil
			}
			f.latest.run = func(ctx context.Context) (int64, error) {
				ctx, cancel := context.WithTimeout(ctx, askLimit)
				defer cancel()
				a, err := call[barrierAnswer](ctx, conn, "Barrier", &barrierRequest{Unconfirmed: true})
				if err != nil {
					return 0, err
				}
				return a.Rev, nil
			}
			r.following.Store(f)
			r.log.Info("following", "leader", address, "revision", r.e.Rev())
			r.turned()
			r.isReady()
		}
	}
}

// serveFollow sends everything after a revision, as long as this daemon leads.
func (r *Replica) serveFollow(q *followRequest, stream grpc.ServerStream) error {
	ctx := stream.Context()
	turn := r.now()
	if !r.e.Leads() {
		return notLeading
	}
	if !r.isMember(q.ID) {
		r.wake()
		return status.Error(codes.PermissionDenied, "this node is not a member of the datastore")
	}
	wake := make(chan struct{}, 1)
	w, _ := r.e.Hub().Add(watch.Filter{Key: []byte{0}, End: []byte{0}}, 0, func() {
		select {
		case wake <- struct{}{}:
		default:
		}
	})
	defer r.e.Hub().Remove(w)

	// What the follower lacks until the watch begins.
	var missing []*state.Version
	var rev, compacted int64
	whole := false
	err := r.e.View(func(st *state.State) error {
		rev, compacted = st.Rev(), st.Compacted()
		if q.Rev > rev {
			return status.Errorf(codes.Unavailable, "the follower has revision %d already, this member has %d", q.Rev, rev)
		}
		if q.Rev == 0 || q.Rev < compacted {
			whole = true
			missing = st.Versions()
			return nil
		}
		changes, err := st.History(q.Rev)
		if err != nil {
			return err
		}
		if fingerprint(changes, q.Rev) != q.Print {
			return status.Errorf(codes.DataLoss, "revision %d of the follower is not that of the leader", q.Rev)
		}
		for _, c := range changes {
			if c.Rev() > q.Rev {
				missing = append(missing, c.Cur)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := sendAll(stream, missing, rev, compacted, whole); err != nil {
		return err
	}
	beat := time.NewTicker(beatEvery)
	defer beat.Stop()
	for {
		idle := false
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-r.ctx.Done():
			return notLeading
		case <-turn:
			if turn = r.now(); !r.e.Leads() {
				return notLeading
			}
			idle = true // there may have been a compaction
		case <-wake:
		case <-beat.C:
			idle = true
			if !r.isMember(q.ID) {
				return status.Error(codes.PermissionDenied, "this node is no longer a member of the datastore")
			}
		}
		for more := true; more; {
			var changes []state.Change
			// Before the changes: what they do not reach is not yet compacted for the follower.
			compacted := r.e.Compacted()
			changes, rev, more, err = w.Collect(batchBytes)
			if err != nil {
				return status.Error(codes.Unavailable, "the follower is too slow: "+err.Error())
			}
			if len(changes) == 0 && !idle {
				break
			}
			b := &batch{Rev: rev}
			if !more && compacted <= rev {
				b.Compacted = compacted
			}
			for _, c := range changes {
				b.Versions = append(b.Versions, c.Cur)
			}
			if err := stream.SendMsg(b); err != nil {
				return err
			}
		}
	}
}

// sendAll sends versions in messages of whole revisions, at least one.
func sendAll(stream grpc.ServerStream, versions []*state.Version, rev, compacted int64, whole bool) error {
	for {
		n, size := 0, 0
		for n < len(versions) && (size < batchBytes || versions[n].Sub > 0) {
			size += len(versions[n].KV.Key) + len(versions[n].KV.Value) + 40
			n++
		}
		last := n == len(versions)
		b := &batch{Snapshot: whole, Last: last, Rev: rev, Versions: versions[:n]}
		if whole {
			b.Compacted = compacted
		}
		if err := stream.SendMsg(b); err != nil {
			return err
		}
		if versions = versions[n:]; last {
			return nil
		}
	}
}

func (r *Replica) isMember(id uint64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return containsID(r.members, id)
}

func containsID(nodes []storedir.Member, id uint64) bool {
	for _, n := range nodes {
		if n.ID == id {
			return true
		}
	}
	return false
}
