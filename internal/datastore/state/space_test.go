package state

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

func TestLargest(t *testing.T) {
	s := New()
	for key, n := range map[string]int{
		"/registry/pods/default/a": 100, "/registry/pods/default/b": 100, "/registry/configmaps/x/y": 1000,
		"/registry/example.org/widgets/default/w": 500, "/registry/example.org/gadgets/g": 50, "compact_rev_key": 10, "/registry/health": 1, "/": 1,
	} {
		stage(t, s, &pb.TxnRequest{Success: []*pb.RequestOp{putOp(key, strings.Repeat("v", n), 0)}})
	}
	stage(t, s, &pb.TxnRequest{Success: []*pb.RequestOp{putOp("/registry/pods/default/a", strings.Repeat("v", 100), 0)}})
	s.Commit(time.Time{})
	var got []string
	for _, p := range s.Largest(4) {
		got = append(got, fmt.Sprint(p.Prefix, " ", p.Keys))
	}
	want := []string{"/registry/configmaps/ 1", "/registry/example.org/widgets/ 1", "/registry/pods/ 2", "/registry/example.org/gadgets/ 1"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%q instead of %q", got, want)
	}
}

// Deletions free what they hide when a compaction passes them, and a rollback leaves nothing.
func TestBytes(t *testing.T) {
	s := New()
	put := &pb.TxnRequest{Success: []*pb.RequestOp{putOp("a", strings.Repeat("v", 1000), 0)}}
	stage(t, s, put)
	s.Rollback()
	if s.Bytes() != 0 {
		t.Fatalf("%d bytes after a rollback", s.Bytes())
	}
	for range 3 {
		stage(t, s, put)
	}
	stage(t, s, &pb.TxnRequest{Success: []*pb.RequestOp{deleteOp("a", "")}})
	s.Commit(time.Time{})
	if s.Bytes() < 3000 {
		t.Errorf("%d bytes with three versions", s.Bytes())
	}
	if _, err := s.Compact(4); err != nil || s.Bytes() < 2000 || s.Bytes() > 2500 {
		t.Errorf("%d bytes with the version and the one before, %v", s.Bytes(), err)
	}
	stage(t, s, &pb.TxnRequest{Success: []*pb.RequestOp{putOp("b", "", 0)}})
	s.Commit(time.Time{})
	if _, err := s.Compact(6); err != nil || s.Bytes() > 100 {
		t.Errorf("%d bytes with an empty value, %v", s.Bytes(), err)
	}
	l := NewLoader(s.Compacted())
	for _, v := range s.Versions() {
		if err := l.Add(copyOf(v)); err != nil {
			t.Fatal(err)
		}
	}
	if again, _ := l.Done(); again.Bytes() != s.Bytes() {
		t.Errorf("%d bytes after loading, %d before", again.Bytes(), s.Bytes())
	}
}

func copyOf(v *Version) *Version {
	c := &Version{Sub: v.Sub}
	c.KV.Key, c.KV.Value, c.KV.Lease = v.KV.Key, v.KV.Value, v.KV.Lease
	c.KV.CreateRevision, c.KV.ModRevision, c.KV.Version = v.KV.CreateRevision, v.KV.ModRevision, v.KV.Version
	return c
}
