package replica

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"microk8s/internal/datastore/engine"
	"microk8s/internal/datastore/state"
	"microk8s/internal/datastore/storedir"

	"github.com/canonical/go-dqlite/v3/client"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// retryEvery is how long a call waits for a leader before it looks again by itself.
const retryEvery = 50 * time.Millisecond

// onLeader carries something out where the leader is: here, or there. It is tried again only
// when it is known not to have happened.
func onLeader[T any](r *Replica, ctx context.Context, here func() (T, error), there func(*following) (T, error)) (v T, err error) {
	for {
		turn := r.now()
		if r.e.Leads() {
			v, err = here()
			if !errors.Is(err, engine.ErrNotLeading) {
				return v, err
			}
		} else if f := r.following.Load(); f != nil {
			v, err = there(f)
			if err == nil {
				return v, nil
			}
			if !isNotLeading(err) {
				return v, outcome(ctx, err)
			}
		}
		wait := time.NewTimer(retryEvery)
		select {
		case <-turn:
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return v, ctx.Err()
		}
		wait.Stop()
	}
}

// outcome tells etcd's errors from those of the way there, after which nothing is known.
func outcome(ctx context.Context, err error) error {
	if s, ok := status.FromError(err); ok && strings.HasPrefix(s.Message(), "etcdserver: ") || errors.Is(err, state.ErrLeaseNotFound) {
		return err
	}
	if status.Code(err) == codes.Unimplemented {
		return err // the leader is older than this member
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return engine.ErrUnknown
}

// Txn is part of server.Backend.
func (r *Replica) Txn(ctx context.Context, q *pb.TxnRequest, size int) (*pb.TxnResponse, error) {
	return onLeader(r, ctx,
		func() (*pb.TxnResponse, error) { return r.here().Txn(ctx, q, size) },
		func(f *following) (*pb.TxnResponse, error) { return f.writes.txn(ctx, q, size) })
}

// Compact is part of server.Backend.
func (r *Replica) Compact(ctx context.Context, rev int64) error {
	_, err := onLeader(r, ctx,
		func() (*empty, error) { return nil, r.here().Compact(ctx, rev) },
		func(f *following) (*empty, error) {
			a, err := pb.NewKVClient(f.conn).Compact(ctx, &pb.CompactionRequest{Revision: rev})
			if err == nil {
				err = r.e.WaitRev(ctx, a.Header.GetRevision())
			}
			if err == nil && rev > 0 { // of revision 0 followers hear nothing
				err = r.e.WaitCompacted(ctx, rev)
			}
			return nil, err
		})
	return err
}

// Grant is part of server.Backend.
func (r *Replica) Grant(ctx context.Context, id, ttl int64) (int64, error) {
	return onLeader(r, ctx,
		func() (int64, error) { return r.here().Grant(ctx, id, ttl) },
		func(f *following) (int64, error) {
			a, err := pb.NewLeaseClient(f.conn).LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: id, TTL: ttl})
			if err == nil {
				err = r.e.WaitRev(ctx, a.Header.GetRevision()) // which the answer will name
			}
			return a.GetID(), err
		})
}

// Revoke is part of server.Backend.
func (r *Replica) Revoke(ctx context.Context, id int64) error {
	_, err := onLeader(r, ctx,
		func() (*empty, error) { return nil, r.here().Revoke(ctx, id) },
		func(f *following) (*empty, error) {
			a, err := pb.NewLeaseClient(f.conn).LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: id})
			if err == nil {
				err = r.e.WaitRev(ctx, a.Header.GetRevision())
			}
			return nil, err
		})
	return err
}

// Renew is part of server.Backend.
func (r *Replica) Renew(ctx context.Context, id int64) (int64, error) {
	return onLeader(r, ctx,
		func() (int64, error) { return r.here().Renew(ctx, id) },
		func(f *following) (int64, error) {
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			s, err := pb.NewLeaseClient(f.conn).LeaseKeepAlive(ctx)
			if err != nil {
				return 0, err
			}
			if err := s.Send(&pb.LeaseKeepAliveRequest{ID: id}); err != nil {
				return 0, err
			}
			a, err := s.Recv()
			if err == nil && a.TTL == 0 {
				err = state.ErrLeaseNotFound
			}
			return a.GetTTL(), err
		})
}

// TimeToLive is part of server.Backend.
func (r *Replica) TimeToLive(ctx context.Context, q *pb.LeaseTimeToLiveRequest) (*pb.LeaseTimeToLiveResponse, error) {
	return onLeader(r, ctx,
		func() (*pb.LeaseTimeToLiveResponse, error) { return r.here().TimeToLive(ctx, q) },
		func(f *following) (*pb.LeaseTimeToLiveResponse, error) {
			return pb.NewLeaseClient(f.conn).LeaseTimeToLive(ctx, q)
		})
}

// Leases is part of server.Backend.
func (r *Replica) Leases(ctx context.Context) (*pb.LeaseLeasesResponse, error) {
	return onLeader(r, ctx,
		func() (*pb.LeaseLeasesResponse, error) { return r.here().Leases(ctx) },
		func(f *following) (*pb.LeaseLeasesResponse, error) {
			return pb.NewLeaseClient(f.conn).LeaseLeases(ctx, &pb.LeaseLeasesRequest{})
		})
}

// Alarm is part of server.Backend.
func (r *Replica) Alarm(ctx context.Context, q *pb.AlarmRequest) (*pb.AlarmResponse, error) {
	return onLeader(r, ctx,
		func() (*pb.AlarmResponse, error) { return r.here().Alarm(ctx, q) },
		func(f *following) (*pb.AlarmResponse, error) {
			a, err := pb.NewMaintenanceClient(f.conn).Alarm(ctx, q)
			if err == nil {
				err = r.e.WaitRev(ctx, a.Header.GetRevision())
			}
			return a, err
		})
}

// HasLeader is part of server.Backend.
func (r *Replica) HasLeader() bool { return r.e.Leads() || r.following.Load() != nil }

// Size is part of server.Backend: the leader's, as it said last.
func (r *Replica) Size() (total, used int64) {
	if r.e.Leads() {
		return r.e.Size()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.peers {
		if p.last.Leads {
			total, used = p.last.Size, p.last.InUse
		}
	}
	return total, used
}

// Barrier is part of server.Backend: when it returns nil, the state has every write that
// anybody acknowledged before the call.
func (r *Replica) Barrier(ctx context.Context) error {
	for {
		turn := r.now()
		if r.e.Leads() {
			if r.confirm(ctx) == nil {
				return nil
			}
		} else if f := r.following.Load(); f != nil {
			if rev, err := f.barrier.wait(ctx, f.ctx); err == nil {
				if err := r.e.WaitRev(ctx, rev); err != nil {
					return err
				}
				// What was compacted cannot be read here either.
				if compacted := f.compacted.Load(); compacted > max(r.e.Compacted(), 0) {
					return r.e.WaitCompacted(ctx, compacted)
				}
				return nil
			}
		}
		wait := time.NewTimer(retryEvery)
		select {
		case <-turn:
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return ctx.Err()
		}
		wait.Stop()
	}
}

// confirm is the leader's half of Barrier.
func (r *Replica) confirm(ctx context.Context) error {
	if r.alone.Load() {
		if !r.e.Leads() {
			return engine.ErrNotLeading
		}
		return nil
	}
	_, err := r.confirms.wait(ctx, r.ctx)
	return err
}

// CatchUp is part of server.Backend.
func (r *Replica) CatchUp(ctx context.Context) {
	f := r.following.Load()
	if f == nil || r.e.Leads() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	if rev, err := f.latest.wait(ctx, f.ctx); err == nil {
		_ = r.e.WaitRev(ctx, rev) // it was a try
	}
}

func (r *Replica) serveBarrier(ctx context.Context, q *barrierRequest) (*barrierAnswer, error) {
	if !r.e.Leads() {
		return nil, notLeading
	}
	if !q.Unconfirmed && !r.confirmedWith(q) && r.confirm(ctx) != nil {
		return nil, notLeading
	}
	return &barrierAnswer{Rev: r.e.Rev(), Compacted: max(r.e.Compacted(), 0)}, nil
}

// confirmedWith confirms without asking others, where the voter that asks and this node are a
// majority.
func (r *Replica) confirmedWith(q *barrierRequest) bool {
	own := r.m.Node().ID
	if q.Voter == 0 || q.Voter == own || q.Leader != own {
		return false
	}
	// Not with the context of the call: a question that is broken off costs a connection.
	ctx, cancel := context.WithTimeout(r.ctx, askLimit)
	defer cancel()
	return r.e.Confirm(ctx, func(ctx context.Context) error {
		members, err := r.m.Cluster(ctx)
		if err == nil && !majority(members, map[uint64]bool{own: true, q.Voter: true}) {
			err = errNoMajority
		}
		return err
	}) == nil
}

// ownVote is a question for a barrier with what the local node says of who leads, if it has a vote.
func (r *Replica) ownVote() *barrierRequest {
	own := r.m.Node().ID
	r.mu.Lock()
	votes := slices.ContainsFunc(r.members, func(n storedir.Member) bool { return n.ID == own && n.Role == storedir.Voter })
	r.mu.Unlock()
	if votes {
		if l := r.m.Leader(); l.ID != 0 {
			return &barrierRequest{Voter: own, Leader: l.ID}
		}
	}
	return &barrierRequest{}
}

var errNoMajority = errors.New("no majority of the voters names this member as the leader")

// askVoters is nil when a majority of the voters, as the local node has them at the call, say after it
// that this node leads. This node counts as having done so: whether it still leads is checked after
// it.
func (r *Replica) askVoters(ctx context.Context) error {
	members, err := r.m.Cluster(ctx)
	if err != nil {
		return err
	}
	own := r.m.Node().ID
	yes := map[uint64]bool{own: true}
	votes := make(chan uint64, len(members)) // the node's id, or 0
	waiting := 0
	round, cancel := context.WithCancel(ctx)
	defer cancel()
	for _, n := range members {
		if n.Role != client.Voter || n.ID == own {
			continue
		}
		conn := r.connTo(n.Address)
		if conn == nil {
			r.wake() // this daemon has not heard of that member yet
			continue
		}
		waiting++
		go func() {
			a, err := call[whoAnswer](round, conn, "Who", &empty{})
			if err != nil || a.LeaderID != own {
				votes <- 0
				return
			}
			votes <- a.ID
		}()
	}
	for !majority(members, yes) {
		if waiting == 0 {
			return errNoMajority
		}
		select {
		case id := <-votes:
			waiting--
			if id != 0 {
				yes[id] = true
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// majority reports whether more than half of the voters are in a set.
func majority(members []client.NodeInfo, set map[uint64]bool) bool {
	voters, in := 0, 0
	for _, n := range members {
		if n.Role == client.Voter {
			voters++
			if set[n.ID] {
				in++
			}
		}
	}
	return in > voters/2
}

// leader is the datastore where this daemon leads: for its own callers, who go to another daemon when it does
// not, and as the Backend of what other daemons forward, which is never forwarded again. Those are told so in
// a status of their own.
type leader struct {
	r      *Replica
	status error // instead of engine.ErrNotLeading
}

func (r *Replica) here() leader { return leader{r, engine.ErrNotLeading} }

func (l leader) refuse(err error) error {
	if errors.Is(err, engine.ErrNotLeading) {
		return l.status
	}
	return err
}

// confirmed is nil if this daemon really leads: one that was deposed must not promise.
func (l leader) confirmed(ctx context.Context) error {
	if l.r.confirm(ctx) != nil {
		return l.status
	}
	return nil
}

func (l leader) Txn(ctx context.Context, q *pb.TxnRequest, size int) (*pb.TxnResponse, error) {
	v, err := l.r.e.Txn(ctx, q, size)
	return v, l.refuse(err)
}
func (l leader) Compact(ctx context.Context, rev int64) error {
	return l.refuse(l.r.e.Compact(ctx, rev))
}
func (l leader) Grant(ctx context.Context, id, ttl int64) (int64, error) {
	v, err := l.r.e.Grant(ctx, id, ttl)
	return v, l.refuse(err)
}
func (l leader) Revoke(ctx context.Context, id int64) error { return l.refuse(l.r.e.Revoke(ctx, id)) }
func (l leader) Renew(ctx context.Context, id int64) (int64, error) {
	if err := l.confirmed(ctx); err != nil {
		return 0, err
	}
	v, err := l.r.e.Renew(id)
	return v.TTL, l.refuse(err)
}
func (l leader) TimeToLive(ctx context.Context, q *pb.LeaseTimeToLiveRequest) (*pb.LeaseTimeToLiveResponse, error) {
	if err := l.confirmed(ctx); err != nil {
		return nil, err
	}
	return l.r.e.TimeToLive(q), nil
}
func (l leader) Leases(ctx context.Context) (*pb.LeaseLeasesResponse, error) {
	if err := l.confirmed(ctx); err != nil {
		return nil, err
	}
	return l.r.e.LeaseList(), nil
}
func (l leader) Alarm(ctx context.Context, q *pb.AlarmRequest) (*pb.AlarmResponse, error) {
	v, err := l.r.e.Alarm(ctx, q)
	return v, l.refuse(err)
}
func (l leader) Barrier(ctx context.Context) error { return l.confirmed(ctx) }
func (l leader) CatchUp(context.Context)           {}
func (l leader) HasLeader() bool                   { return l.r.e.Leads() }
func (l leader) Size() (total, used int64)         { return l.r.e.Size() }
