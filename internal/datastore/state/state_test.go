package state

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sort"
	"strconv"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

func putOp(key, value string, lease int64) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: []byte(value), Lease: lease}}}
}

func deleteOp(key, end string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(end)}}}
}

func getOp(key, end string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key), RangeEnd: []byte(end)}}}
}

func modIs(key string, rev int64) *pb.Compare {
	return &pb.Compare{Key: []byte(key), Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: rev}}
}

func stage(t *testing.T, s *State, r *pb.TxnRequest) *pb.TxnResponse {
	t.Helper()
	resp, err := s.Stage(r)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

func TestStagedIsInvisibleUntilCommit(t *testing.T) {
	s := New()
	first := stage(t, s, &pb.TxnRequest{Compare: []*pb.Compare{modIs("a", 0)}, Success: []*pb.RequestOp{putOp("a", "1", 0)}})
	// The second of the group sees the first; readers do not.
	second := stage(t, s, &pb.TxnRequest{Compare: []*pb.Compare{modIs("a", 0)}, Success: []*pb.RequestOp{putOp("a", "2", 0)}, Failure: []*pb.RequestOp{getOp("a", "")}})
	third := stage(t, s, &pb.TxnRequest{Compare: []*pb.Compare{modIs("a", 2)}, Success: []*pb.RequestOp{putOp("a", "3", 0), getOp("a", "b"), deleteOp("b", "")}})
	if !first.Succeeded || second.Succeeded || !third.Succeeded || second.Header.Revision != 2 || third.Header.Revision != 3 {
		t.Fatalf("%v\n%v\n%v", first, second, third)
	}
	if kvs := second.Responses[0].GetResponseRange().Kvs; len(kvs) != 1 || string(kvs[0].Value) != "1" {
		t.Fatalf("the else branch saw %v", kvs)
	}
	if kvs := third.Responses[1].GetResponseRange().Kvs; len(kvs) != 1 || string(kvs[0].Value) != "3" {
		t.Fatalf("the transaction does not see its own write: %v", kvs)
	}
	if r, err := s.Range(&pb.RangeRequest{Key: []byte("a")}); err != nil || r.Count != 0 || r.Header.Revision != FirstRevision {
		t.Fatalf("visible before commit: %v, %v", r, err)
	}
	s.Rollback()
	if s.keys.Len() != 0 || s.Rev() != FirstRevision || len(s.Staged()) != 0 {
		t.Fatal("rollback left something")
	}
	again := stage(t, s, &pb.TxnRequest{Success: []*pb.RequestOp{putOp("a", "4", 0)}})
	s.Commit(time.Time{})
	if again.Header.Revision != 2 || s.Rev() != 2 || s.Keys() != 1 {
		t.Fatalf("after the rollback: %v", again)
	}
}

func TestFailedTransactionLeavesNothing(t *testing.T) {
	s := New()
	stage(t, s, &pb.TxnRequest{Success: []*pb.RequestOp{putOp("a", "1", 0)}})
	if _, err := s.Stage(&pb.TxnRequest{Success: []*pb.RequestOp{putOp("a", "2", 0), putOp("b", "2", 99)}}); !errors.Is(err, ErrLeaseNotFound) {
		t.Fatal(err)
	}
	next := stage(t, s, &pb.TxnRequest{Success: []*pb.RequestOp{putOp("c", "3", 0)}})
	s.Commit(time.Time{})
	if next.Header.Revision != 3 {
		t.Fatalf("revision %d", next.Header.Revision)
	}
	r, err := s.Range(&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte{0}})
	if err != nil || r.Count != 2 || string(r.Kvs[0].Value) != "1" || r.Kvs[0].Version != 1 {
		t.Fatalf("%v, %v", r, err)
	}
}

func TestCompares(t *testing.T) {
	s := New()
	stage(t, s, &pb.TxnRequest{Success: []*pb.RequestOp{putOp("a", "m", 0)}})
	stage(t, s, &pb.TxnRequest{Success: []*pb.RequestOp{putOp("a", "n", 0)}})
	s.Commit(time.Time{})
	for _, tc := range []struct {
		c    *pb.Compare
		want bool
	}{
		{&pb.Compare{Key: []byte("a"), Target: pb.Compare_VERSION, TargetUnion: &pb.Compare_Version{Version: 2}}, true},
		{&pb.Compare{Key: []byte("a"), Target: pb.Compare_VERSION, Result: pb.Compare_GREATER, TargetUnion: &pb.Compare_Version{Version: 2}}, false},
		{&pb.Compare{Key: []byte("a"), Target: pb.Compare_CREATE, TargetUnion: &pb.Compare_CreateRevision{CreateRevision: 2}}, true},
		{&pb.Compare{Key: []byte("a"), Target: pb.Compare_MOD, Result: pb.Compare_LESS, TargetUnion: &pb.Compare_ModRevision{ModRevision: 4}}, true},
		{&pb.Compare{Key: []byte("a"), Target: pb.Compare_VALUE, Result: pb.Compare_GREATER, TargetUnion: &pb.Compare_Value{Value: []byte("m")}}, true},
		{&pb.Compare{Key: []byte("a"), Target: pb.Compare_VALUE, Result: pb.Compare_NOT_EQUAL, TargetUnion: &pb.Compare_Value{Value: []byte("n")}}, false},
		{&pb.Compare{Key: []byte("a"), Target: pb.Compare_LEASE, TargetUnion: &pb.Compare_Lease{}}, true},
		{&pb.Compare{Key: []byte("x"), Target: pb.Compare_VERSION, TargetUnion: &pb.Compare_Version{}}, true},
		{&pb.Compare{Key: []byte("x"), Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{}}, false},
		{&pb.Compare{Key: []byte("a"), RangeEnd: []byte("z"), Target: pb.Compare_CREATE, Result: pb.Compare_GREATER, TargetUnion: &pb.Compare_CreateRevision{}}, true},
		{&pb.Compare{Key: []byte("b"), RangeEnd: []byte("z"), Target: pb.Compare_CREATE, Result: pb.Compare_GREATER, TargetUnion: &pb.Compare_CreateRevision{}}, false},
	} {
		if r, err := s.Read(&pb.TxnRequest{Compare: []*pb.Compare{tc.c}}); err != nil || r.Succeeded != tc.want {
			t.Errorf("%v: %v, %v", tc.c, r, err)
		}
	}
}

func TestLeaseCountdown(t *testing.T) {
	s := New()
	now := time.Unix(1000, 0)
	if err := s.StageGrant(7, 10); err != nil {
		t.Fatal(err)
	}
	if due, next := s.Expired(now.Add(time.Hour)); len(due) != 0 || !next.IsZero() {
		t.Fatal("a staged lease counts")
	}
	if err := s.StageGrant(7, 10); !errors.Is(err, ErrLeaseExists) {
		t.Fatal(err)
	}
	stage(t, s, &pb.TxnRequest{Success: []*pb.RequestOp{putOp("a", "1", 7), putOp("b", "1", 7)}})
	s.Commit(now)
	if due, next := s.Expired(now.Add(10*time.Second - 1)); len(due) != 0 || !next.Equal(now.Add(10*time.Second)) {
		t.Fatal("early", due, next)
	}
	if due, _ := s.Expired(now.Add(10 * time.Second)); len(due) != 1 {
		t.Fatal("late")
	}
	if n := s.StageExpire(7); n != 2 || len(s.LeaseKeys(7)) != 0 {
		t.Fatal("keys are left")
	}
	s.Rollback()
	if len(s.LeaseKeys(7)) != 2 {
		t.Fatal("rollback did not attach again")
	}
	s.StageExpire(7)
	s.Commit(now)
	s.DropLease(7)
	if s.Keys() != 0 || s.Rev() != 3 || len(s.Leases()) != 0 {
		t.Fatalf("%d keys at %d", s.Keys(), s.Rev())
	}
}

type pair struct {
	value                string
	create, mod, version int64
}

// simple is the state machine as simple as it can be: every state that ever was.
type simple struct {
	rev    int64
	states map[int64]map[string]pair
	events map[int64]map[string]bool // keys changed at a revision; true: deleted
}

func (m *simple) apply(fn func(cur map[string]pair, rev int64) map[string]bool) {
	cur := map[string]pair{}
	for k, v := range m.states[m.rev] {
		cur[k] = v
	}
	if changed := fn(cur, m.rev+1); len(changed) > 0 {
		m.rev++
		m.states[m.rev], m.events[m.rev] = cur, changed
	}
}

func (m *simple) snapshot() *simple {
	c := &simple{rev: m.rev, states: map[int64]map[string]pair{}, events: map[int64]map[string]bool{}}
	for k, v := range m.states {
		c.states[k] = v
	}
	for k, v := range m.events {
		c.events[k] = v
	}
	return c
}

// Random histories with groups, rollbacks, compactions and reloads against the simple model.
func TestAgainstModel(t *testing.T) {
	n := time.Now().UnixNano()
	if v, err := strconv.ParseInt(os.Getenv("MICROK8S_TEST_SEED"), 10, 64); err == nil {
		n = v
	}
	t.Logf("MICROK8S_TEST_SEED=%d", n)
	for i := range 60 {
		history(t, rand.New(rand.NewPCG(uint64(n), uint64(i))))
		if t.Failed() {
			t.Fatalf("in history %d", i)
		}
	}
}

func history(t *testing.T, r *rand.Rand) {
	s := New()
	m := &simple{rev: 1, states: map[int64]map[string]pair{1: {}}, events: map[int64]map[string]bool{}}
	log := map[int64]*Version{} // what a log would hold, by a unique id
	id := func(v *Version) int64 { return v.KV.ModRevision<<12 | int64(v.Sub) }
	compacted := int64(NeverCompacted)
	var buried []*Version // dead, but still in the log
	key := func() string { return fmt.Sprintf("k%d", r.IntN(8)) }
	for range 120 {
		switch r.IntN(10) {
		default: // a group of transactions
			before := m.snapshot()
			for range 1 + r.IntN(4) {
				op, k, v := r.IntN(4), key(), fmt.Sprint(r.IntN(1000))
				var cmpRev int64
				if cur, ok := m.states[m.rev][k]; ok && r.IntN(3) > 0 {
					cmpRev = cur.mod
				}
				req := &pb.TxnRequest{}
				ok := true
				if op < 2 {
					req.Compare = []*pb.Compare{modIs(k, cmpRev)}
					ok = m.states[m.rev][k].mod == cmpRev
				}
				switch op {
				case 0, 2:
					k2 := key() + "x"
					req.Success = []*pb.RequestOp{putOp(k, v, 0), putOp(k2, v, 0)}
					if ok {
						m.apply(func(cur map[string]pair, rev int64) map[string]bool {
							for _, k := range []string{k, k2} {
								p := pair{v, rev, rev, 1}
								if old, ok := cur[k]; ok {
									p.create, p.version = old.create, old.version+1
								}
								cur[k] = p
							}
							return map[string]bool{k: false, k2: false}
						})
					}
				case 1:
					req.Success = []*pb.RequestOp{deleteOp(k, "")}
					if ok {
						m.apply(func(cur map[string]pair, _ int64) map[string]bool {
							if _, ok := cur[k]; !ok {
								return nil
							}
							delete(cur, k)
							return map[string]bool{k: true}
						})
					}
				case 3:
					end := "k" + fmt.Sprint(r.IntN(9))
					req.Success = []*pb.RequestOp{deleteOp(k, end)}
					m.apply(func(cur map[string]pair, _ int64) map[string]bool {
						gone := map[string]bool{}
						for x := range cur {
							if x >= k && x < end {
								delete(cur, x)
								gone[x] = true
							}
						}
						return gone
					})
				}
				resp := stage(t, s, req)
				if resp.Succeeded != ok || resp.Header.Revision != m.rev {
					t.Errorf("succeeded %t at %d instead of %t at %d", resp.Succeeded, resp.Header.Revision, ok, m.rev)
				}
			}
			if r.IntN(5) == 0 {
				s.Rollback()
				m = before
			} else {
				for _, c := range s.Commit(time.Time{}) {
					log[id(c.Cur)] = c.Cur
				}
			}
		case 0: // compaction
			to := compacted + 1 + r.Int64N(m.rev+2)
			dead, err := s.Compact(to)
			if (err == nil) != (to <= m.rev) {
				t.Errorf("compaction to %d of %d: %v", to, m.rev, err)
			}
			if err == nil {
				compacted = to
				for _, v := range dead {
					if log[id(v)] == nil {
						t.Errorf("%d was dead before", v.KV.ModRevision)
					}
				}
				// Deleted in this order, but perhaps not yet all when there is a crash.
				buried = append(buried, dead...)
				n := r.IntN(len(buried) + 1)
				for _, v := range buried[:n] {
					delete(log, id(v))
				}
				buried = buried[n:]
			}
		case 1: // restart
			l := NewLoader(compacted)
			var ids []int64
			for i := range log {
				ids = append(ids, i)
			}
			sort.Slice(ids, func(i, j int) bool { return ids[i] < ids[j] })
			for _, i := range ids {
				v := log[i]
				c := &Version{Sub: v.Sub}
				c.KV.Key, c.KV.Value, c.KV.Lease = v.KV.Key, v.KV.Value, v.KV.Lease
				c.KV.CreateRevision, c.KV.ModRevision, c.KV.Version = v.KV.CreateRevision, v.KV.ModRevision, v.KV.Version
				log[i] = c
				if err := l.Add(c); err != nil {
					t.Errorf("loading: %v", err)
				}
			}
			var dead []*Version
			s, dead = l.Done()
			buried = dead
		}
		verify(t, r, s, m, compacted)
		if t.Failed() {
			return
		}
	}
}

func verify(t *testing.T, r *rand.Rand, s *State, m *simple, compacted int64) {
	t.Helper()
	if s.Rev() != m.rev || s.Compacted() != compacted || s.Keys() != len(m.states[m.rev]) {
		t.Errorf("at %d, compacted %d, %d keys; the model is at %d, %d, %d", s.Rev(), s.Compacted(), s.Keys(), m.rev, compacted, len(m.states[m.rev]))
		return
	}
	rev := 1 + r.Int64N(m.rev+1)
	limit := r.Int64N(5)
	got, err := s.Range(&pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l"), Revision: rev, Limit: limit})
	switch {
	case rev > m.rev:
		if !errors.Is(err, ErrFutureRev) {
			t.Errorf("read of the future: %v", err)
		}
	case rev < compacted:
		if !errors.Is(err, ErrCompacted) {
			t.Errorf("read below the compaction: %v", err)
		}
	case err != nil:
		t.Error(err)
	default:
		want := m.states[rev]
		var keys []string
		for k := range want {
			keys = append(keys, k)
		}
		sort.Strings(keys)
		if got.Count != int64(len(keys)) || got.More != (limit > 0 && int64(len(keys)) > limit) {
			t.Errorf("at %d: count %d, more %t of %d, limit %d", rev, got.Count, got.More, len(keys), limit)
		}
		if limit > 0 && int64(len(keys)) > limit {
			keys = keys[:limit]
		}
		if len(got.Kvs) != len(keys) {
			t.Errorf("at %d: %d pairs instead of %d", rev, len(got.Kvs), len(keys))
			return
		}
		for i, kv := range got.Kvs {
			w := want[keys[i]]
			if string(kv.Key) != keys[i] || (pair{string(kv.Value), kv.CreateRevision, kv.ModRevision, kv.Version}) != w {
				t.Errorf("at %d: %v instead of %s %v", rev, kv, keys[i], w)
			}
		}
	}
	// The history from any readable revision on tells every change once, with what was before.
	from := max(compacted, 2)
	changes, err := s.History(from)
	if err != nil {
		t.Error(err)
	}
	seen := map[int64]map[string]bool{}
	last := int64(0)
	for _, c := range changes {
		rev, k := c.Rev(), string(c.Cur.KV.Key)
		if rev < last {
			t.Errorf("%d after %d", rev, last)
		}
		last = rev
		if seen[rev] == nil {
			seen[rev] = map[string]bool{}
		}
		seen[rev][k] = c.Cur.Deleted()
		before, existed := m.states[rev-1][k]
		if existed != (c.Prev != nil) || existed && !bytes.Equal(c.Prev.KV.Value, []byte(before.value)) {
			t.Errorf("change of %s at %d: previous %v instead of %v", k, rev, c.Prev, before)
		}
	}
	for rev := from; rev <= m.rev; rev++ {
		if fmt.Sprint(seen[rev]) != fmt.Sprint(m.events[rev]) {
			t.Errorf("at %d: changes %v instead of %v", rev, seen[rev], m.events[rev])
		}
	}
}

func TestLoaderNoticesLosses(t *testing.T) {
	v := func(key string, rev, create, version int64, sub int) *Version {
		return &Version{KV: mvccpb.KeyValue{Key: []byte(key), ModRevision: rev, CreateRevision: create, Version: version}, Sub: sub}
	}
	for name, tc := range map[string]struct {
		compacted int64
		versions  []*Version
	}{
		"a revision is missing":        {0, []*Version{v("a", 2, 2, 1, 0), v("a", 4, 2, 2, 0)}},
		"the first is missing":         {0, []*Version{v("a", 3, 3, 1, 0)}},
		"a version is missing":         {0, []*Version{v("a", 2, 2, 1, 0), v("a", 3, 2, 3, 0)}},
		"the creation is missing":      {0, []*Version{v("b", 2, 2, 1, 0), v("a", 3, 2, 2, 0)}},
		"half a transaction":           {0, []*Version{v("a", 2, 2, 1, 1)}},
		"deletion of nothing":          {0, []*Version{v("a", 2, 0, 0, 0)}},
		"out of order":                 {0, []*Version{v("a", 2, 2, 1, 0), v("b", 2, 2, 1, 0)}},
		"missing after the compaction": {5, []*Version{v("a", 3, 2, 2, 0), v("a", 7, 2, 3, 0)}},
	} {
		l := NewLoader(tc.compacted)
		var err error
		for _, v := range tc.versions {
			if err == nil {
				err = l.Add(v)
			}
		}
		if err == nil {
			t.Errorf("%s: not noticed", name)
		}
	}
}
