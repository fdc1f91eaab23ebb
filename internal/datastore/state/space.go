package state

import (
	"bytes"
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// etcd's estimates of what a put and a lease cost (server/storage/quota.go).
const (
	putCost   = 256
	GrantCost = 64 // of a lease
)

// Cost is what etcd charges a transaction against its quota before it is evaluated: the puts of the larger
// branch. Those of inner transactions count nothing, as there.
func Cost(r *pb.TxnRequest) int64 {
	branch := func(ops []*pb.RequestOp) (n int64) {
		for _, op := range ops {
			if p := op.GetRequestPut(); p != nil {
				n += int64(putCost + len(p.Key) + len(p.Value))
			}
		}
		return n
	}
	return max(branch(r.Success), branch(r.Failure))
}

// Prefix is what the versions below a prefix take.
type Prefix struct {
	Prefix string `json:"prefix"`
	Keys   int    `json:"keys"`  // live ones
	Bytes  int64  `json:"bytes"` // of all versions, as in State.Bytes
}

// Largest returns the n prefixes that take most, the largest first. A prefix is what Kubernetes keeps the
// objects of one resource under: /registry/pods/, or /registry/example.org/widgets/ for a group.
func (s *State) Largest(n int) []Prefix {
	var all []Prefix
	s.keys.Ascend(func(e *entry) bool {
		// In key order, so that the keys of a prefix come one after the other.
		p := resource(e.key)
		if len(all) == 0 || all[len(all)-1].Prefix != string(p) {
			all = append(all, Prefix{Prefix: string(p)})
		}
		last := &all[len(all)-1]
		if e.at(s.rev) != nil {
			last.Keys++
		}
		for _, v := range e.vers {
			last.Bytes += v.size()
		}
		return true
	})
	slices.SortStableFunc(all, func(a, b Prefix) int { return cmp(b.Bytes, a.Bytes) })
	return all[:min(n, len(all))]
}

// resource is the prefix of a key: two parts, three where the second is a group, which has a dot.
func resource(key []byte) []byte {
	end, parts := 0, 2
	for i := 0; i < parts; i++ {
		start := end
		if start == 0 && len(key) > 0 && key[0] == '/' {
			start = 1
		}
		n := bytes.IndexByte(key[start:], '/')
		if n < 0 {
			if end == 0 {
				return key
			}
			return key[:end]
		}
		if i == 1 && bytes.IndexByte(key[start:start+n], '.') >= 0 {
			parts = 3
		}
		end = start + n + 1
	}
	return key[:end]
}
