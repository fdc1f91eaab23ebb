package replica

import (
	"context"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/status"
)

// Limits of the transactions that go to the leader in one call, as of a group there.
const (
	forwardJobs  = 256
	forwardBytes = 1 << 20
	// forwardCalls at a time: one is being committed, the next waits for its turn.
	forwardCalls = 2
	// forwardLimit is longer than any caller waits (server's requestTimeout).
	forwardLimit = 10 * time.Second
)

// forwarding sends the transactions of this member's callers to the daemon that leads. What comes
// while calls are under way goes together in the next one: a call for each costs both daemons more than
// to commit it.
type forwarding struct {
	call func(context.Context, *writeRequest) (*writeAnswer, error)
	life context.Context // of this daemon: a leader that is deposed still tells what became of a write

	mu      sync.Mutex
	waiting []*forwarded
	calls   int
}

// forwarded is a transaction on its way.
type forwarded struct {
	q    *pb.TxnRequest
	size int
	done chan struct{}
	resp *pb.TxnResponse
	err  error
}

// txn has one transaction carried out. The error is the leader's, or one of the way there. When
// ctx ends first, it may still be carried out.
func (f *forwarding) txn(ctx context.Context, q *pb.TxnRequest, size int) (*pb.TxnResponse, error) {
	w := &forwarded{q: q, size: size, done: make(chan struct{})}
	f.mu.Lock()
	if f.calls < forwardCalls {
		// What waits is about to be sent: nothing is overtaken for long.
		f.calls++
		f.mu.Unlock()
		f.together(ctx, []*forwarded{w})
		f.mu.Lock()
		if len(f.waiting) > 0 {
			go f.send() // ends with life at the latest
		} else {
			f.calls--
		}
		f.mu.Unlock()
		return w.resp, w.err
	}
	f.waiting = append(f.waiting, w)
	f.mu.Unlock()
	select {
	case <-w.done:
		return w.resp, w.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// send makes calls until nothing waits.
func (f *forwarding) send() {
	for {
		f.mu.Lock()
		n, bytes := 0, 0
		for n < len(f.waiting) && n < forwardJobs && bytes < forwardBytes {
			bytes += f.waiting[n].size
			n++
		}
		group := f.waiting[:n:n]
		f.waiting = f.waiting[n:]
		if n == 0 {
			f.waiting = nil
			f.calls--
			f.mu.Unlock()
			return
		}
		f.mu.Unlock()
		f.together(f.life, group)
	}
}

// together has a group carried out in one call.
func (f *forwarding) together(ctx context.Context, group []*forwarded) {
	ctx, cancel := context.WithTimeout(ctx, forwardLimit)
	defer cancel()
	q := &writeRequest{}
	for _, w := range group {
		q.txns = append(q.txns, w.q)
	}
	a, err := f.call(ctx, q)
	if err == nil && len(a.results) != len(group) {
		err = errWrites
	}
	for i, w := range group {
		if err != nil {
			w.err = err
		} else {
			w.resp, w.err = a.results[i].resp, status.FromProto(a.results[i].err).Err()
		}
		close(w.done)
	}
}

// serveWrite carries out what a follower has forwarded. Each transaction has an outcome of its own.
func (r *Replica) serveWrite(ctx context.Context, q *writeRequest) (*writeAnswer, error) {
	if !r.e.Leads() {
		return nil, notLeading
	}
	a := &writeAnswer{results: make([]writeResult, len(q.txns))}
	one := func(i int) {
		resp, err := r.kv.Txn(ctx, q.txns[i])
		if err != nil {
			a.results[i].err = status.Convert(err).Proto()
		} else {
			a.results[i].resp = resp
		}
	}
	if len(q.txns) == 1 {
		one(0)
		return a, nil
	}
	var wg sync.WaitGroup
	for i := range q.txns {
		wg.Go(func() { one(i) })
	}
	wg.Wait()
	return a, nil
}
