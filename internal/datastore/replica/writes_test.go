package replica

import (
	"context"
	"errors"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/status"
)

// What comes while calls are under way goes together in the next one, each has its own outcome, and a
// caller waits no longer than it wants. The leader is a fake here.
func TestWritesGoTogether(t *testing.T) {
	started, release := make(chan int, 10), make(chan struct{})
	f := &forwarding{life: t.Context(), call: func(ctx context.Context, q *writeRequest) (*writeAnswer, error) {
		started <- len(q.txns)
		select {
		case <-release:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		a := &writeAnswer{}
		for _, txn := range q.txns {
			if len(txn.Compare) > 0 {
				a.results = append(a.results, writeResult{err: status.Convert(notLeading).Proto()})
			} else {
				a.results = append(a.results, writeResult{resp: &pb.TxnResponse{Succeeded: true}})
			}
		}
		return a, nil
	}}
	const others = 5
	errs := make(chan error, forwardCalls+others)
	send := func(q *pb.TxnRequest) {
		go func() {
			_, err := f.txn(t.Context(), q, 1)
			errs <- err
		}()
	}
	for range forwardCalls {
		send(&pb.TxnRequest{})
		if n := <-started; n != 1 {
			t.Errorf("a call with %d transactions while nothing waited", n)
		}
	}
	for i := range others {
		q := &pb.TxnRequest{}
		if i == 0 {
			q.Compare = []*pb.Compare{{}}
		}
		send(q)
	}
	for waiting := 0; waiting < others; { // they have no other way to say that they wait
		time.Sleep(time.Millisecond)
		f.mu.Lock()
		waiting = len(f.waiting)
		f.mu.Unlock()
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.txn(ctx, &pb.TxnRequest{}, forwardBytes); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller who has gone gets %v", err)
	}
	close(release)
	refused := 0
	for range forwardCalls + others {
		switch err := <-errs; {
		case isNotLeading(err):
			refused++
		case err != nil:
			t.Error(err)
		}
	}
	if n := <-started; n != others+1 || refused != 1 {
		t.Errorf("the next call had %d transactions, %d refused", n, refused)
	}
}
