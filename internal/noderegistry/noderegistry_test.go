package noderegistry

import (
	"errors"
	"slices"
	"testing"
	"time"

	"microk8s/internal/kube/kubetest"
)

func names(list []Record) (out []string) {
	for _, r := range list {
		out = append(out, r.Name)
	}
	return out
}

func TestRecords(t *testing.T) {
	g := Registry{Core: kubetest.New(t).Core}
	ctx := t.Context()
	if _, err := g.Get(ctx, "w1"); !errors.Is(err, ErrNone) {
		t.Fatalf("a record from nowhere: %v", err)
	}
	since := time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
	want := Record{Name: "w1", Join: "0011", Role: Worker, Since: since, Until: since.Add(10 * time.Minute), Secrets: 2}
	if err := g.Put(ctx, want); err != nil {
		t.Fatal(err)
	}
	got, err := g.Get(ctx, "w1")
	if err != nil {
		t.Fatal(err)
	}
	first := got.UID
	if got.UID = ""; *got != want || !got.Pending() {
		t.Errorf("%+v, want %+v", got, want)
	}
	if added, err := g.Add(ctx, Record{Name: "w1", Role: ControlPlane}); added || err != nil {
		t.Errorf("a record was replaced by Add: %v, %v", added, err)
	}
	if err := g.Change(ctx, "w1", func(r *Record) error { r.Until = time.Time{}; return nil }); err != nil {
		t.Fatal(err)
	}
	if got, err := g.Get(ctx, "w1"); err != nil || got.Pending() || got.UID != first {
		t.Errorf("%+v, %v", got, err)
	}
	if err := g.Change(ctx, "w1", func(r *Record) error { r.Member = 1<<63 + 1; return nil }); err != nil {
		t.Fatal(err)
	}
	if got, err := g.Get(ctx, "w1"); err != nil || got.Member != 0 {
		t.Errorf("a worker is said to have a member of the datastore: %+v, %v", got, err)
	}
	if added, err := g.Add(ctx, Record{Name: "n1", Role: ControlPlane, Member: 1<<63 + 1}); !added || err != nil {
		t.Fatal(added, err)
	}
	list, err := g.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if r := OfMember(list, 1<<63+1); r == nil || r.Name != "n1" || OfMember(list, 0) != nil || OfMember(list, 5) != nil {
		t.Errorf("the node of the member is %+v", r)
	}
	no := errors.New("no")
	if err := g.Change(ctx, "w1", func(r *Record) error { r.Join = "x"; return no }); !errors.Is(err, no) {
		t.Errorf("a refused change: %v", err)
	}
	// The next join of that name is another object, which an older reader does not delete.
	old, err := g.Get(ctx, "w1")
	if err != nil {
		t.Fatal(err)
	}
	want.Join = "0022"
	if err := g.Put(ctx, want); err != nil {
		t.Fatal(err)
	}
	if err := g.DeleteOf(ctx, old); err != nil {
		t.Fatal(err)
	}
	if got, err := g.Get(ctx, "w1"); err != nil || got.Join != "0022" || got.UID == old.UID {
		t.Errorf("%+v, %v", got, err)
	}
	if gone, err := g.Prune(ctx, since.Add(time.Minute)); err != nil || len(gone) > 0 {
		t.Errorf("pruned %v, %v", gone, err)
	}
	if gone, err := g.Prune(ctx, since.Add(time.Hour)); err != nil || !slices.Equal(gone, []string{"w1"}) {
		t.Errorf("pruned %v, %v", gone, err)
	}
	for range 2 {
		if err := g.Delete(ctx, "w1"); err != nil {
			t.Error(err)
		}
	}
	if err := g.Change(ctx, "w1", func(*Record) error { return nil }); !errors.Is(err, ErrNone) {
		t.Errorf("%v", err)
	}
}

// TestAdopt: a cluster of the build before is refreshed node by node. Until its last control-plane
// node is, nodes may come without a record.
func TestAdopt(t *testing.T) {
	g := Registry{Core: kubetest.New(t).Core}
	ctx := t.Context()
	present := func(n1, n2 int, more ...string) []Record {
		out := []Record{{Name: "n1", Role: ControlPlane, Secrets: n1}, {Name: "n2", Role: ControlPlane, Secrets: n2}}
		for _, name := range more {
			out = append(out, Record{Name: name, Role: Worker})
		}
		return out
	}
	speaks := func(name string) {
		t.Helper()
		if err := g.Change(ctx, name, func(r *Record) error { r.Secrets = 2; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if complete, err := g.Adopt(ctx, present(2, 0, "w1")); complete || err != nil {
		t.Fatalf("complete with n2 of the build before: %v, %v", complete, err)
	}
	if complete, err := g.Adopt(ctx, present(2, 0, "w1", "w2")); complete || err != nil { // w2 came through n2
		t.Fatalf("%v, %v", complete, err)
	}
	speaks("n2")
	if complete, err := g.Adopt(ctx, present(2, 2, "w1", "w2")); !complete || err != nil {
		t.Fatalf("%v, %v", complete, err)
	}
	if complete, err := g.Adopt(ctx, present(2, 2, "thief")); !complete || err != nil {
		t.Fatalf("%v, %v", complete, err)
	}
	list, err := g.List(ctx)
	if err != nil || !slices.Equal(names(list), []string{"n1", "n2", "w1", "w2"}) {
		t.Errorf("%v, %v", names(list), err)
	}
}

func TestUnreadable(t *testing.T) {
	b := encode(Record{Name: "x", Role: ControlPlane})
	b.Annotations = map[string]string{annotationRole: "king", annotationUntil: "soon", annotationSecrets: "99", annotationMember: "-1"}
	if r := decode(b); r.Member != 0 || r.Role != Worker || !r.Pending() || r.Secrets != 0 || time.Now().Before(r.Until) {
		t.Errorf("%+v", r)
	}
}
