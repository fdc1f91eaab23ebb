package state

import (
	"bytes"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// Stage evaluates a transaction on top of everything staged, and stages its changes, if it
// has any, with the next revision. Only Header.Revision of the headers is set. An error
// leaves nothing of the transaction staged. The caller has validated the request.
func (s *State) Stage(r *pb.TxnRequest) (*pb.TxnResponse, error) {
	t := txn{s: s, rev: s.stagedRev + 1, first: len(s.staged)}
	resp, err := t.run(r)
	if err == nil && t.sub > MaxChanges {
		err = ErrTooManyRows
	}
	if err != nil {
		s.unstage(t.first)
		return nil, err
	}
	if t.sub > 0 {
		s.stagedRev = t.rev
	}
	setRevision(resp, s.stagedRev)
	return resp, nil
}

// Read evaluates a transaction that changes nothing at the committed revision.
func (s *State) Read(r *pb.TxnRequest) (*pb.TxnResponse, error) {
	t := txn{s: s, rev: s.rev}
	resp, err := t.run(r)
	if err != nil {
		return nil, err
	}
	setRevision(resp, s.rev)
	return resp, nil
}

func setRevision(r *pb.TxnResponse, rev int64) {
	h := &pb.ResponseHeader{Revision: rev}
	r.Header = h
	for _, op := range r.Responses {
		switch o := op.Response.(type) {
		case *pb.ResponseOp_ResponseRange:
			o.ResponseRange.Header = h
		case *pb.ResponseOp_ResponsePut:
			o.ResponsePut.Header = h
		case *pb.ResponseOp_ResponseDeleteRange:
			o.ResponseDeleteRange.Header = h
		case *pb.ResponseOp_ResponseTxn:
			setRevision(o.ResponseTxn, rev)
		}
	}
}

type txn struct {
	s     *State
	rev   int64 // of this transaction's changes, if there are any; reads include them
	first int
	sub   int
}

func (t *txn) run(r *pb.TxnRequest) (*pb.TxnResponse, error) {
	resp := &pb.TxnResponse{Succeeded: true}
	for _, c := range r.Compare {
		if !t.compare(c) {
			resp.Succeeded = false
			break
		}
	}
	ops := r.Success
	if !resp.Succeeded {
		ops = r.Failure
	}
	for _, op := range ops {
		out := &pb.ResponseOp{}
		switch o := op.Request.(type) {
		case *pb.RequestOp_RequestRange:
			rr, err := t.s.rangeAt(o.RequestRange, t.rev, t.latest())
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
			tr, err := t.run(o.RequestTxn)
			if err != nil {
				return nil, err
			}
			out.Response = &pb.ResponseOp_ResponseTxn{ResponseTxn: tr}
		}
		resp.Responses = append(resp.Responses, out)
	}
	return resp, nil
}

// latest is the newest revision that a read inside the transaction may name.
func (t *txn) latest() int64 {
	if t.sub > 0 || t.rev == t.s.rev {
		return t.rev
	}
	return t.rev - 1
}

func (t *txn) put(r *pb.PutRequest) (*pb.PutResponse, error) {
	s := t.s
	prev := s.current(r.Key)
	v := &Version{KV: mvccpb.KeyValue{
		Key: r.Key, Value: r.Value, Lease: r.Lease,
		ModRevision: t.rev, CreateRevision: t.rev, Version: 1,
	}, Sub: t.sub}
	if prev != nil {
		v.KV.CreateRevision = prev.KV.CreateRevision
		v.KV.Version = prev.KV.Version + 1
	}
	if r.IgnoreValue || r.IgnoreLease {
		if prev == nil {
			return nil, ErrKeyNotFound
		}
		if r.IgnoreValue {
			v.KV.Value = prev.KV.Value
		}
		if r.IgnoreLease {
			v.KV.Lease = prev.KV.Lease
		}
	}
	if v.KV.Lease != 0 && s.leases[v.KV.Lease] == nil {
		return nil, ErrLeaseNotFound
	}
	s.staged = append(s.staged, s.push(v))
	t.sub++
	resp := &pb.PutResponse{}
	if r.PrevKv && prev != nil {
		resp.PrevKv = &prev.KV
	}
	return resp, nil
}

func (t *txn) delete(r *pb.DeleteRangeRequest) *pb.DeleteRangeResponse {
	s := t.s
	var victims []*Version
	s.ascend(r.Key, r.RangeEnd, func(e *entry) bool {
		if v := e.at(t.rev); v != nil {
			victims = append(victims, v)
		}
		return true
	})
	resp := &pb.DeleteRangeResponse{Deleted: int64(len(victims))}
	for _, v := range victims {
		s.staged = append(s.staged, s.push(&Version{KV: mvccpb.KeyValue{Key: v.KV.Key, ModRevision: t.rev}, Sub: t.sub}))
		t.sub++
		if r.PrevKv {
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
		return holds(c, e.at(t.rev))
	}
	found, ok := false, true
	t.s.ascend(c.Key, c.RangeEnd, func(e *entry) bool {
		v := e.at(t.rev)
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
	return false
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
