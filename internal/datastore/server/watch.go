package server

import (
	"context"
	"errors"
	"time"

	"microk8s/internal/datastore/state"
	"microk8s/internal/datastore/watch"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/metadata"
)

// watchMessage is about how large one message of events gets.
const watchMessage = 1 << 20

// clientWatch is one watch of a stream.
type clientWatch struct {
	*watch.Watcher
	id       int64
	prev     bool
	progress bool
	quiet    bool // nothing was sent since the last tick of progress notifications
}

// stream is one Watch call. Only its own goroutine sends.
type stream struct {
	s *Server
	pb.Watch_WatchServer
	watches map[int64]*clientWatch
	nextID  int64
	wake    chan struct{}
}

// Watch is part of the Watch service.
func (s *Server) Watch(ws pb.Watch_WatchServer) error {
	ctx := ws.Context()
	st := &stream{s: s, Watch_WatchServer: ws, watches: map[int64]*clientWatch{}, wake: make(chan struct{}, 1)}
	defer func() {
		for _, w := range st.watches {
			s.opt.Engine.Hub().Remove(w.Watcher)
		}
	}()

	requests := make(chan *pb.WatchRequest)
	received := make(chan error, 1)
	go func() {
		for {
			r, err := ws.Recv()
			if err != nil {
				received <- err
				return
			}
			select {
			case requests <- r:
			case <-ctx.Done():
				received <- ctx.Err()
				return
			}
		}
	}()

	tick := time.NewTicker(s.opt.ProgressInterval)
	defer tick.Stop()
	leaderless := s.leaderless(ctx)
	for {
		var err error
		select {
		case <-ctx.Done():
			return toGRPC(ctx.Err())
		case <-s.stop.Done():
			return rpctypes.ErrGRPCStopped
		case <-leaderless:
			return rpctypes.ErrGRPCNoLeader
		case <-received: //nolint:errcheck // how it ended makes no difference
			return nil // the client is done, or gone
		case r := <-requests:
			err = st.request(r)
		case <-st.wake:
			err = st.deliverAll()
		case <-tick.C:
			err = st.notifyProgress()
		}
		if err != nil {
			return err
		}
	}
}

// leaderless gives a channel that is closed when the stream asked for a leader and there has
// been none for too long.
func (s *Server) leaderless(ctx context.Context) <-chan struct{} {
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get(rpctypes.MetadataRequireLeaderKey); len(v) == 0 || v[0] != rpctypes.MetadataHasLeader {
		return nil
	}
	lost := make(chan struct{})
	go func() {
		t := time.NewTicker(s.opt.NoLeaderAfter / 3)
		defer t.Stop()
		last := time.Now()
		for {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
			}
			if s.opt.Backend.HasLeader() {
				last = time.Now()
			} else if time.Since(last) >= s.opt.NoLeaderAfter {
				close(lost)
				return
			}
		}
	}()
	return lost
}

func (st *stream) poke() {
	select {
	case st.wake <- struct{}{}:
	default:
	}
}

func (st *stream) request(r *pb.WatchRequest) error {
	switch u := r.RequestUnion.(type) {
	case *pb.WatchRequest_CreateRequest:
		return st.create(u.CreateRequest)
	case *pb.WatchRequest_CancelRequest:
		id := u.CancelRequest.WatchId
		w := st.watches[id]
		if w == nil {
			return nil
		}
		st.remove(w)
		return st.Send(&pb.WatchResponse{Header: st.s.now(), WatchId: id, Canceled: true})
	case *pb.WatchRequest_ProgressRequest:
		return st.progress()
	}
	return nil
}

func (st *stream) remove(w *clientWatch) {
	st.s.opt.Engine.Hub().Remove(w.Watcher)
	delete(st.watches, w.id)
}

func (st *stream) refuse(id int64, reason string) error {
	return st.Send(&pb.WatchResponse{Header: st.s.now(), WatchId: id, Created: true, Canceled: true, CancelReason: reason})
}

func (st *stream) create(r *pb.WatchCreateRequest) error {
	if len(r.Key) == 0 {
		r.Key = []byte{0} // as in etcd: everything
	}
	if len(r.RangeEnd) == 0 {
		r.RangeEnd = nil
	}
	id := r.WatchId
	switch {
	case id < 0:
		return st.refuse(-1, "etcdserver: a watch id must not be negative")
	case id == 0:
		for st.watches[st.nextID] != nil {
			st.nextID++
		}
		id = st.nextID
		st.nextID++
	case st.watches[id] != nil:
		return st.refuse(-1, "etcdserver: mvcc: duplicate watch ID provided on the WatchStream")
	}
	f := watch.Filter{Key: r.Key, End: r.RangeEnd}
	for _, x := range r.Filters {
		switch x {
		case pb.WatchCreateRequest_NOPUT:
			f.NoPuts = true
		case pb.WatchCreateRequest_NODELETE:
			f.NoDeletes = true
		}
	}
	watcher, rev := st.s.opt.Engine.Hub().Add(f, r.StartRevision, st.poke)
	w := &clientWatch{Watcher: watcher, id: id, prev: r.PrevKv, progress: r.ProgressNotify}
	st.watches[id] = w
	if err := st.Send(&pb.WatchResponse{Header: st.s.header(rev), WatchId: id, Created: true}); err != nil {
		return err
	}
	// The previous values at the compacted revision itself belong to what was compacted: API
	// servers want to hear so, others may go on from there, as in etcd.
	if compacted := st.s.opt.Engine.Compacted(); r.PrevKv && r.StartRevision > 0 && r.StartRevision <= compacted {
		return st.compacted(w, compacted)
	}
	return st.deliver(w)
}

// compacted ends a watch that begins, or has fallen behind, a compaction.
func (st *stream) compacted(w *clientWatch, rev int64) error {
	st.remove(w)
	return st.Send(&pb.WatchResponse{
		Header: st.s.now(), WatchId: w.id, Canceled: true,
		CompactRevision: rev, CancelReason: state.ErrCompacted.Error(),
	})
}

func (st *stream) deliverAll() error {
	for _, w := range st.watches {
		if err := st.deliver(w); err != nil {
			return err
		}
	}
	return nil
}

// deliver sends everything there is for a watch.
func (st *stream) deliver(w *clientWatch) error {
	for {
		changes, rev, more, err := w.Collect(watchMessage)
		if errors.Is(err, state.ErrCompacted) {
			return st.compacted(w, st.s.opt.Engine.Compacted())
		}
		if err != nil {
			return toGRPC(err)
		}
		if len(changes) > 0 {
			w.quiet = false
			if more {
				rev = changes[len(changes)-1].Rev()
			}
			if err := st.Send(&pb.WatchResponse{Header: st.s.header(rev), WatchId: w.id, Events: events(changes, w.prev)}); err != nil {
				return err
			}
		}
		if !more {
			return nil
		}
	}
}

func events(changes []state.Change, prev bool) []*mvccpb.Event {
	evs := make([]mvccpb.Event, len(changes))
	out := make([]*mvccpb.Event, len(changes))
	for i, c := range changes {
		ev := &evs[i]
		ev.Kv = &c.Cur.KV
		if c.Cur.Deleted() {
			ev.Type = mvccpb.Event_DELETE
		}
		if prev && c.Prev != nil {
			ev.PrevKv = &c.Prev.KV
		}
		out[i] = ev
	}
	return out
}

// progress answers a progress request: after all events up to the revision that it names. That
// need not be confirmed by a majority, as a read is: who asks has got the revision that it waits
// for from a read, and asks again when the answer is older.
func (st *stream) progress() error {
	st.s.opt.Backend.CatchUp(st.Context())
	rev := st.s.opt.Engine.Hub().Rev()
	if err := st.deliverAll(); err != nil {
		return err
	}
	return st.Send(&pb.WatchResponse{Header: st.s.header(rev), WatchId: -1})
}

// notifyProgress tells the watches that asked for it, and had nothing to hear, where they are.
func (st *stream) notifyProgress() error {
	for _, w := range st.watches {
		if !w.progress {
			continue
		}
		rev := st.s.opt.Engine.Hub().Rev()
		if err := st.deliver(w); err != nil {
			return err
		}
		if w.quiet {
			if err := st.Send(&pb.WatchResponse{Header: st.s.header(rev), WatchId: w.id}); err != nil {
				return err
			}
		}
		w.quiet = true
	}
	return nil
}
