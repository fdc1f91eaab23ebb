package replica

import (
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
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

// writeRequest are transactions, each for itself.
type writeRequest struct{ txns []*pb.TxnRequest }

// writeAnswer has their outcomes, in their order.
type writeAnswer struct{ results []writeResult }

// writeResult has one of the two.
type writeResult struct {
	resp *pb.TxnResponse
	err  *spb.Status
}

var errWrites = errors.New("a message with forwarded writes cannot be read")

// What a part of a message is; both messages are such parts one after another, each with its length.
const (
	partTxn byte = iota + 1
	partResponse
	partError
)

func appendPart(out []byte, kind byte, m proto.Message) ([]byte, error) {
	out = append(out, kind)
	out = binary.AppendUvarint(out, uint64(proto.Size(m)))
	return proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(out, m)
}

// parts calls fn for each part of a message, which has forwardJobs at most.
func parts(data []byte, fn func(kind byte, body []byte) error) error {
	for n := 0; len(data) > 0; n++ {
		kind := data[0]
		size, k := binary.Uvarint(data[1:])
		if n == forwardJobs || k <= 0 || size > uint64(len(data)-1-k) {
			return errWrites
		}
		body := data[1+k:]
		if err := fn(kind, body[:size:size]); err != nil {
			return errors.Join(errWrites, err)
		}
		data = body[size:]
	}
	return nil
}

func (q *writeRequest) marshal() (out []byte, err error) {
	for _, t := range q.txns {
		if out, err = appendPart(out, partTxn, t); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (q *writeRequest) unmarshal(data []byte) error {
	return parts(data, func(kind byte, body []byte) error {
		if kind != partTxn {
			return errWrites
		}
		t := new(pb.TxnRequest)
		q.txns = append(q.txns, t)
		return proto.Unmarshal(body, t)
	})
}

func (a *writeAnswer) marshal() (out []byte, err error) {
	for _, r := range a.results {
		if r.err != nil {
			out, err = appendPart(out, partError, r.err)
		} else {
			out, err = appendPart(out, partResponse, r.resp)
		}
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (a *writeAnswer) unmarshal(data []byte) error {
	return parts(data, func(kind byte, body []byte) error {
		var r writeResult
		defer func() { a.results = append(a.results, r) }()
		switch kind {
		case partResponse:
			r.resp = new(pb.TxnResponse)
			return proto.Unmarshal(body, r.resp)
		case partError:
			r.err = new(spb.Status)
			if err := proto.Unmarshal(body, r.err); err != nil {
				return err
			}
			if r.err.Code == int32(codes.OK) {
				return errWrites
			}
			return nil
		}
		return errWrites
	})
}
