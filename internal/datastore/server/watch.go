package server

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"time"

	"microk8s/internal/datastore/state"
	"microk8s/internal/datastore/watch"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
)

// watchMessage is about how large one message of events gets.
const watchMessage = 1 << 20

// clientWatch is one watch of a stream.
type clientWatch struct {
	*watch.Watcher
	id       int64
	start    int64 // the revision that was asked for
	prev     bool
	noPrev   int64 // up to here the versions before are compacted
	progress bool
	fragment bool
	quiet    bool // nothing was sent since the last tick of progress notifications
	ended    bool // by a compaction; it keeps its id until it is cancelled, as in etcd
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

	s.beating.Do(func() { go s.beat() })
	progress := s.progress.wait()
	var leaderless <-chan struct{}
	if wantsLeader(ctx) {
		leaderless = s.leaderless.wait()
	}
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
		case <-progress:
			progress = s.progress.wait()
			err = st.notifyProgress()
		}
		if err != nil {
			return err
		}
	}
}

// signal wakes everybody who waits for it at once: a timer for each stream would wake the program as often as
// there are streams.
type signal struct {
	mu   sync.Mutex
	next chan struct{}
}

// wait returns a channel that the next send closes.
func (s *signal) wait() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.next == nil {
		s.next = make(chan struct{})
	}
	return s.next
}

func (s *signal) send() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.next != nil {
		close(s.next)
		s.next = nil
	}
}

// beat sends the signals for the streams until the server is closed: that progress is due, and that there has
// been no leader for too long.
func (s *Server) beat() {
	progress := time.NewTicker(s.opt.ProgressInterval)
	defer progress.Stop()
	leader := time.NewTicker(s.opt.NoLeaderAfter / 3)
	defer leader.Stop()
	last := time.Now()
	for {
		select {
		case <-s.stop.Done():
			return
		case <-progress.C:
			s.progress.send()
		case <-leader.C:
			switch {
			case s.opt.Backend.HasLeader():
				last = time.Now()
			case time.Since(last) >= s.opt.NoLeaderAfter:
				s.leaderless.send()
				last = time.Now() // streams that come now have as long
			}
		}
	}
}

// wantsLeader reports whether the caller wants the stream to end when there is no leader.
func wantsLeader(ctx context.Context) bool {
	md, _ := metadata.FromIncomingContext(ctx)
	v := md.Get(rpctypes.MetadataRequireLeaderKey)
	return len(v) > 0 && v[0] == rpctypes.MetadataHasLeader
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
		st.s.opt.Engine.Hub().Remove(w.Watcher)
		delete(st.watches, id)
		return st.Send(&pb.WatchResponse{Header: st.s.now(), WatchId: id, Canceled: true})
	case *pb.WatchRequest_ProgressRequest:
		return st.progress()
	}
	return nil
}

func (st *stream) refuse(reason string) error {
	return st.Send(&pb.WatchResponse{Header: st.s.now(), WatchId: -1, Created: true, Canceled: true, CancelReason: reason})
}

func (st *stream) create(r *pb.WatchCreateRequest) error {
	if len(r.Key) == 0 {
		r.Key = []byte{0} // as in etcd
	}
	if len(r.RangeEnd) == 0 {
		r.RangeEnd = nil
	}
	id := r.WatchId
	switch {
	case r.StartRevision < 0:
		return st.refuse(rpctypes.ErrCompacted.Error())
	case len(r.RangeEnd) > 0 && string(r.RangeEnd) != "\x00" && bytes.Compare(r.Key, r.RangeEnd) >= 0:
		return st.refuse("mvcc: watcher range is empty")
	case id == 0:
		for st.watches[st.nextID] != nil {
			st.nextID++
		}
		id = st.nextID
		st.nextID++
	case st.watches[id] != nil:
		return st.refuse("mvcc: duplicate watch ID provided on the WatchStream")
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
	w := &clientWatch{
		Watcher: watcher, id: id, start: r.StartRevision, prev: r.PrevKv, noPrev: st.s.opt.Engine.Compacted(),
		progress: r.ProgressNotify, fragment: r.Fragment,
	}
	st.watches[id] = w
	if err := st.Send(&pb.WatchResponse{Header: st.s.header(rev), WatchId: id, Created: true}); err != nil {
		return err
	}
	return st.deliver(w)
}

// compacted ends a watch that begins before, or has fallen behind, a compaction. As in etcd, neither
// reason nor revision are sent.
func (st *stream) compacted(w *clientWatch) error {
	st.s.opt.Engine.Hub().Remove(w.Watcher)
	w.ended = true
	return st.Send(&pb.WatchResponse{
		Header: st.s.header(0), WatchId: w.id, Canceled: true, CompactRevision: st.s.opt.Engine.Compacted(),
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
	for !w.ended {
		changes, rev, more, err := w.Collect(watchMessage)
		if errors.Is(err, state.ErrCompacted) {
			return st.compacted(w)
		}
		if err != nil {
			return toGRPC(err)
		}
		if len(changes) > 0 {
			w.quiet = false
			if more {
				rev = changes[len(changes)-1].Rev()
			}
			resp := &pb.WatchResponse{Header: st.s.header(rev), WatchId: w.id, Events: events(changes, w)}
			if err := st.sendEvents(resp, w.fragment); err != nil {
				return err
			}
		}
		if !more {
			return nil
		}
	}
	return nil
}

// sendEvents sends events, in several messages if they are too many for one and the client can put them
// together.
func (st *stream) sendEvents(resp *pb.WatchResponse, fragment bool) error {
	for fragment && len(resp.Events) > 1 && proto.Size(resp) >= maxRequestBytes {
		part := &pb.WatchResponse{Header: resp.Header, WatchId: resp.WatchId, Fragment: true}
		size := 0
		for _, ev := range resp.Events[:len(resp.Events)-1] {
			if size += proto.Size(ev) + 16; len(part.Events) > 0 && size >= maxRequestBytes {
				break
			}
			part.Events = append(part.Events, ev)
		}
		if err := st.Send(part); err != nil {
			return err
		}
		resp.Events = resp.Events[len(part.Events):]
	}
	return st.Send(resp)
}

func events(changes []state.Change, w *clientWatch) []*mvccpb.Event {
	evs := make([]mvccpb.Event, len(changes))
	out := make([]*mvccpb.Event, len(changes))
	for i, c := range changes {
		ev := &evs[i]
		ev.Kv = &c.Cur.KV
		if c.Cur.Deleted() {
			ev.Type = mvccpb.Event_DELETE
		}
		if w.prev && c.Prev != nil && c.Rev() > w.noPrev {
			ev.PrevKv = &c.Prev.KV
		}
		out[i] = ev
	}
	return out
}

// progress answers a progress request: after all events up to the revision that it names, and only if
// there are watches and all of them have begun, and none has been ended by a compaction, as in etcd. That
// need not be confirmed by a majority, as a read is: who asks has got the revision that it waits
// for from a read, and asks again when the answer is older.
func (st *stream) progress() error {
	st.s.opt.Backend.CatchUp(st.Context())
	rev := st.s.opt.Engine.Hub().Rev()
	if err := st.deliverAll(); err != nil || len(st.watches) == 0 {
		return err
	}
	for _, w := range st.watches {
		if w.ended || w.start > rev {
			return nil
		}
	}
	return st.Send(&pb.WatchResponse{Header: st.s.header(rev), WatchId: -1})
}

// notifyProgress tells the watches that asked for it, and had nothing to hear, where they are.
func (st *stream) notifyProgress() error {
	for _, w := range st.watches {
		rev := st.s.opt.Engine.Hub().Rev()
		if !w.progress || w.ended || w.start > rev {
			continue
		}
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
