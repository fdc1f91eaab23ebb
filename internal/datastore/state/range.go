package state

import (
	"bytes"
	"math"
	"sort"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// ascend calls fn for the entries of a range in key order, in etcd's notation: no end means
// the one key, an end of one zero byte everything from key on. fn returns false to stop.
func (s *State) ascend(key, end []byte, fn func(*entry) bool) {
	if len(end) == 0 {
		if e, ok := s.keys.Get(&entry{key: key}); ok {
			fn(e)
		}
		return
	}
	if len(end) == 1 && end[0] == 0 {
		s.keys.AscendGreaterOrEqual(&entry{key: key}, fn)
		return
	}
	if bytes.Compare(key, end) >= 0 {
		return
	}
	s.keys.AscendRange(&entry{key: key}, &entry{key: end}, fn)
}

// Range reads at the request's revision, the committed one if that is 0 or below. Header.Revision
// is the committed revision. The key-value pairs are shared: do not change them.
func (s *State) Range(r *pb.RangeRequest) (*pb.RangeResponse, error) { return s.rangeAt(r, s.rev) }

// rangeAt reads at the request's revision, or at now, the newest one, if it names none.
func (s *State) rangeAt(r *pb.RangeRequest, now int64) (*pb.RangeResponse, error) {
	if r.Revision > now {
		return nil, ErrFutureRev
	}
	rev := now
	if r.Revision > 0 {
		if r.Revision < s.compacted {
			return nil, ErrCompacted
		}
		rev = r.Revision
	}
	resp := &pb.RangeResponse{Header: &pb.ResponseHeader{Revision: now}}
	filtered := r.MinModRevision != 0 || r.MaxModRevision != 0 || r.MinCreateRevision != 0 || r.MaxCreateRevision != 0
	// As in etcd, naming a target other than the key asks for rising order. Without an order the limit
	// comes first: then what is sorted is the first keys and one more.
	sorted := r.SortOrder == pb.RangeRequest_DESCEND || r.SortTarget != pb.RangeRequest_KEY
	most := int64(math.MaxInt64)
	if r.Limit > 0 && r.Limit < most && !filtered && (!sorted || r.SortOrder == pb.RangeRequest_NONE) {
		most = r.Limit + 1
	}
	var kvs []*mvccpb.KeyValue
	s.ascend(r.Key, r.RangeEnd, func(e *entry) bool {
		v := e.at(rev)
		if v == nil {
			return true
		}
		resp.Count++
		if !r.CountOnly && int64(len(kvs)) < most {
			kvs = append(kvs, &v.KV)
		}
		return true
	})
	if r.CountOnly {
		return resp, nil
	}
	if filtered {
		kept := kvs[:0]
		for _, kv := range kvs {
			if r.MinModRevision != 0 && kv.ModRevision < r.MinModRevision ||
				r.MaxModRevision != 0 && kv.ModRevision > r.MaxModRevision ||
				r.MinCreateRevision != 0 && kv.CreateRevision < r.MinCreateRevision ||
				r.MaxCreateRevision != 0 && kv.CreateRevision > r.MaxCreateRevision {
				continue
			}
			kept = append(kept, kv)
		}
		kvs = kept
	}
	if sorted {
		order(kvs, r.SortTarget, r.SortOrder == pb.RangeRequest_DESCEND)
	}
	if r.Limit > 0 && int64(len(kvs)) > r.Limit {
		kvs, resp.More = kvs[:r.Limit], true
	}
	if r.KeysOnly {
		bare := make([]mvccpb.KeyValue, len(kvs))
		for i, kv := range kvs {
			b := &bare[i]
			b.Key, b.CreateRevision, b.ModRevision, b.Version = kv.Key, kv.CreateRevision, kv.ModRevision, kv.Version
			if r.SortTarget == pb.RangeRequest_VALUE {
				b.Lease = kv.Lease // etcd reads the others from its index, which knows no leases
			}
			kvs[i] = b
		}
	}
	resp.Kvs = kvs
	return resp, nil
}

func order(kvs []*mvccpb.KeyValue, target pb.RangeRequest_SortTarget, descend bool) {
	less := func(a, b *mvccpb.KeyValue) bool {
		switch target {
		case pb.RangeRequest_VERSION:
			return a.Version < b.Version
		case pb.RangeRequest_CREATE:
			return a.CreateRevision < b.CreateRevision
		case pb.RangeRequest_MOD:
			return a.ModRevision < b.ModRevision
		case pb.RangeRequest_VALUE:
			return bytes.Compare(a.Value, b.Value) < 0
		}
		return bytes.Compare(a.Key, b.Key) < 0
	}
	// The algorithm and its input are those of etcd, and so is the order of what compares as equal.
	sort.Slice(kvs, func(i, j int) bool {
		if descend {
			return less(kvs[j], kvs[i])
		}
		return less(kvs[i], kvs[j])
	})
}

// Page reads live key-value pairs of a range at rev, in key order from key on, until limit
// pairs (0: no limit) or about maxBytes of them. next is the key to go on from, nil at the end.
func (s *State) Page(key, end []byte, rev, limit int64, maxBytes int, keysOnly bool) (kvs []*mvccpb.KeyValue, next []byte, err error) {
	if rev > s.rev {
		return nil, nil, ErrFutureRev
	}
	if rev < s.compacted {
		return nil, nil, ErrCompacted
	}
	size := 0
	s.ascend(key, end, func(e *entry) bool {
		v := e.at(rev)
		if v == nil {
			return true
		}
		if limit > 0 && int64(len(kvs)) == limit || size >= maxBytes {
			next = e.key
			return false
		}
		kv := &v.KV
		if keysOnly {
			kv = &mvccpb.KeyValue{Key: kv.Key, CreateRevision: kv.CreateRevision, ModRevision: kv.ModRevision, Version: kv.Version}
		}
		kvs = append(kvs, kv)
		size += len(kv.Key) + len(kv.Value) + 32
		return true
	})
	return kvs, next, nil
}
