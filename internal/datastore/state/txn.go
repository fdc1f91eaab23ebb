package state

import (
	"bytes"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// Stage evaluates a transaction on top of everything staged, and stages its changes, if it
// has any, with the next revision. Only Header.Revision of the headers is set, as in etcd: of an
// operation it is the revision after it, and the header of an inner transaction is empty. An error
// leaves nothing of the transaction staged. The caller has validated the request.
func (s *State) Stage(r *pb.TxnRequest) (*pb.TxnResponse, error) {
	t := txn{s: s, base: s.stagedRev}
	first := len(s.staged)
	resp, err := t.run(r)
	if err == nil && t.sub > MaxChanges {
		err = ErrTooManyRows
	}
	if err != nil {
		s.unstage(first)
		return nil, err
	}
	s.stagedRev = t.rev()
	return resp, nil
}

// Read evaluates a transaction that changes nothing at the committed revision.
func (s *State) Read(r *pb.TxnRequest) (*pb.TxnResponse, error) {
	t := txn{s: s, base: s.rev}
	return t.run(r)
}

// txn is a transaction under evaluation.
type txn struct {
	s    *State
	base int64 // the revision before it
	sub  int   // its changes so far
}

// rev is the revision that reads see: with the changes so far.
func (t *txn) rev() int64 {
	if t.sub > 0 {
		return t.base + 1
	}
	return t.base
}

// branch is what a transaction will do. As in etcd, all compares, those of inner transactions too,
// are decided before the first change, and so is whether an operation is possible.
type branch struct {
	succeeded bool
	ops       []*pb.RequestOp
	inner     []*branch // of the operations that are transactions, in order
}

func (t *txn) run(r *pb.TxnRequest) (*pb.TxnResponse, error) {
	b := t.decide(r)
	if err := t.check(b); err != nil {
		return nil, err
	}
	resp, err := t.execute(b)
	if err != nil {
		return nil, err
	}
	resp.Header.Revision = t.rev()
	return resp, nil
}

func (t *txn) decide(r *pb.TxnRequest) *branch {
	b := &branch{succeeded: true, ops: r.Success}
	for _, c := range r.Compare {
		if !t.compare(c) {
			b.succeeded, b.ops = false, r.Failure
			break
		}
	}
	for _, op := range b.ops {
		if o, ok := op.Request.(*pb.RequestOp_RequestTxn); ok {
			b.inner = append(b.inner, t.decide(o.RequestTxn))
		}
	}
	return b
}

func (t *txn) check(b *branch) error {
	inner := b.inner
	for _, op := range b.ops {
		switch o := op.Request.(type) {
		case *pb.RequestOp_RequestRange:
			switch rev := o.RequestRange.Revision; {
			case rev > t.base:
				return ErrFutureRev
			case rev != 0 && rev < t.s.compacted:
				return ErrCompacted
			}
		case *pb.RequestOp_RequestPut:
			p := o.RequestPut
			if p.Lease != 0 && t.s.leases[p.Lease] == nil {
				return ErrLeaseNotFound
			}
			if (p.IgnoreValue || p.IgnoreLease) && t.s.current(p.Key) == nil {
				return ErrKeyNotFound
			}
		case *pb.RequestOp_RequestTxn:
			if err := t.check(inner[0]); err != nil {
				return err
			}
			inner = inner[1:]
		}
	}
	return nil
}

func (t *txn) execute(b *branch) (*pb.TxnResponse, error) {
	resp := &pb.TxnResponse{Header: &pb.ResponseHeader{}, Succeeded: b.succeeded}
	inner := b.inner
	for _, op := range b.ops {
		out := &pb.ResponseOp{}
		switch o := op.Request.(type) {
		case *pb.RequestOp_RequestRange:
			rr, err := t.s.rangeAt(o.RequestRange, t.rev())
			if err != nil {
				return nil, err
			}
			out.Response = &pb.ResponseOp_ResponseRange{ResponseRange: rr}
		case *pb.RequestOp_RequestPut:
			pr, err := t.put(o.RequestPut)
			if err != nil {
				return nil, err
			}
			out.Response = &pb.ResponseOp_ResponsePut{ResponsePut: pr}
		case *pb.RequestOp_RequestDeleteRange:
			out.Response = &pb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: t.delete(o.RequestDeleteRange)}
		case *pb.RequestOp_RequestTxn:
			tr, err := t.execute(inner[0])
			if err != nil {
				return nil, err
			}
			inner = inner[1:]
			out.Response = &pb.ResponseOp_ResponseTxn{ResponseTxn: tr}
		}
		resp.Responses = append(resp.Responses, out)
	}
	return resp, nil
}

func (t *txn) put(r *pb.PutRequest) (*pb.PutResponse, error) {
	s, rev := t.s, t.base+1
	prev := s.current(r.Key)
	v := &Version{KV: mvccpb.KeyValue{
		Key: r.Key, Value: r.Value, Lease: r.Lease,
		ModRevision: rev, CreateRevision: rev, Version: 1,
	}, Sub: t.sub}
	if prev != nil {
		v.KV.CreateRevision = prev.KV.CreateRevision
		v.KV.Version = prev.KV.Version + 1
	}
	if r.IgnoreValue || r.IgnoreLease {
		if prev == nil { // deleted by an operation before, in a transaction of its own
			return nil, ErrKeyNotFound
		}
		if r.IgnoreValue {
			v.KV.Value = prev.KV.Value
		}
		if r.IgnoreLease {
			v.KV.Lease = prev.KV.Lease
		}
	}
	s.staged = append(s.staged, s.push(v))
	t.sub++
	resp := &pb.PutResponse{Header: &pb.ResponseHeader{Revision: rev}}
	if r.PrevKv && prev != nil {
		resp.PrevKv = &prev.KV
	}
	return resp, nil
}

func (t *txn) delete(r *pb.DeleteRangeRequest) *pb.DeleteRangeResponse {
	s := t.s
	var victims []*Version
	s.ascend(r.Key, r.RangeEnd, func(e *entry) bool {
		if v := e.at(t.rev()); v != nil {
			victims = append(victims, v)
		}
		return true
	})
	for _, v := range victims {
		s.staged = append(s.staged, s.push(&Version{KV: mvccpb.KeyValue{Key: v.KV.Key, ModRevision: t.base + 1}, Sub: t.sub}))
		t.sub++
	}
	resp := &pb.DeleteRangeResponse{Header: &pb.ResponseHeader{Revision: t.rev()}, Deleted: int64(len(victims))}
	if r.PrevKv {
		for _, v := range victims {
			resp.PrevKvs = append(resp.PrevKvs, &v.KV)
		}
	}
	return resp
}

// compare says whether the condition holds; for a range, for every key in it, as in etcd.
func (t *txn) compare(c *pb.Compare) bool {
	if len(c.RangeEnd) == 0 {
		e, ok := t.s.keys.Get(&entry{key: c.Key})
		if !ok {
			return holds(c, nil)
		}
		return holds(c, e.at(t.base))
	}
	found, ok := false, true
	t.s.ascend(c.Key, c.RangeEnd, func(e *entry) bool {
		v := e.at(t.base)
		if v == nil {
			return true
		}
		found = true
		ok = holds(c, v)
		return ok
	})
	if !found {
		return holds(c, nil)
	}
	return ok
}

var noVersion = &Version{}

func holds(c *pb.Compare, v *Version) bool {
	if v == nil {
		if c.Target == pb.Compare_VALUE {
			return false // a key that does not exist has no value, not an empty one
		}
		v = noVersion
	}
	var d int
	switch c.Target {
	case pb.Compare_VALUE:
		d = bytes.Compare(v.KV.Value, c.GetValue())
	case pb.Compare_CREATE:
		d = cmp(v.KV.CreateRevision, c.GetCreateRevision())
	case pb.Compare_MOD:
		d = cmp(v.KV.ModRevision, c.GetModRevision())
	case pb.Compare_VERSION:
		d = cmp(v.KV.Version, c.GetVersion())
	case pb.Compare_LEASE:
		d = cmp(v.KV.Lease, c.GetLease())
	}
	switch c.Result {
	case pb.Compare_EQUAL:
		return d == 0
	case pb.Compare_NOT_EQUAL:
		return d != 0
	case pb.Compare_GREATER:
		return d > 0
	case pb.Compare_LESS:
		return d < 0
	}
	return true // as etcd has it
}

func cmp(a, b int64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}
