package cluster

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"microk8s/internal/nodeconfig"
	"microk8s/internal/service"
)

// recoverer is a node whose k8s-dqlite is played by tool.
func (s *site) recoverer(tool func(argv []string) error) *Node {
	n := s.node()
	n.Datastore = func(_ context.Context, argv ...string) ([]byte, error) { return nil, tool(argv) }
	return n
}

// TestRecoverKilledAnywhere kills a recovery before and after each step. Run again it ends with the node
// running, the membership rewritten while nothing ran, and always with the same folder for what there was.
func TestRecoverKilledAnywhere(t *testing.T) {
	for _, name := range Steps()[opRecover] {
		for _, when := range []string{"begin", "end"} {
			t.Run(name+"/"+when, func(t *testing.T) {
				t.Parallel()
				s := newSite(t)
				var saved []string
				tool := func(argv []string) error {
					if states, err := s.services.Status(t.Context()); err != nil || slices.ContainsFunc(states, func(x service.State) bool { return x.Phase == service.Running }) {
						t.Errorf("services run: %+v, %v", states, err)
					}
					if argv[0] != "recover" || !slices.Contains(argv, "--others-are-gone") {
						t.Errorf("%q", argv)
					}
					saved = append(saved, argv[slices.Index(argv, "--saved")+1])
					return nil
				}
				j := s.journal(t)
				if dead, err := dying(j, "recover/"+name+"/"+when, func() error { _, err := s.recoverer(tool).Recover(t.Context(), j, nil); return err }); !dead {
					t.Fatalf("it did not come there: %v", err)
				}
				if found, err := s.recoverer(tool).ResumeRecover(t.Context(), s.journal(t)); !found || err != nil {
					t.Fatalf("%v, %v", found, err)
				}
				if len(saved) == 0 || len(slices.Compact(saved)) != 1 || !strings.Contains(saved[0], ".before-recover-") {
					t.Errorf("%q", saved)
				}
				if r, err := Pending(s.env); r != nil || err != nil || nodeconfig.ReadState(s.env).Changing {
					t.Errorf("pending: %+v, %v", r, err)
				}
			})
		}
	}
}

// TestRecoverFails: a tool that refuses leaves the node running as it was.
func TestRecoverFails(t *testing.T) {
	s := newSite(t)
	n := s.recoverer(func([]string) error { return errors.New("another copy is newer") })
	if _, err := n.Recover(t.Context(), s.journal(t), []string{"/copy"}); err == nil {
		t.Fatal("it did not fail")
	}
	if r, err := Pending(s.env); r != nil || err != nil || nodeconfig.ReadState(s.env).Changing || !s.services.running[service.Datastore] {
		t.Errorf("pending: %+v, %v", r, err)
	}
}
