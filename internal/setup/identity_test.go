package setup

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"microk8s/internal/snapenv"
)

// A story of one node; each line is one start of its services.
func TestIdentity(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	put := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := CheckIdentity(env); err != nil {
		t.Errorf("a node without certificates: %v", err)
	}
	for _, s := range []struct {
		what, revision, ca string
		refused            bool
	}{
		{"first start", "x1", "A", false},
		{"again", "x1", "A", false},
		{"refreshed", "x2", "A", false},
		{"joined", "x2", "B", false},
		{"reverted to before the join", "x1", "A", true},
		{"still", "x1", "A", true},
		{"and back", "x2", "B", false},
		{"refreshed again", "x3", "B", false},
		{"left, with a CA of its own", "x3", "C", false},
		{"reverted to before the leave", "x2", "B", true},
		{"its certificates copied there", "x2", "C", false},
	} {
		env.Revision = s.revision
		put(env.Cert("ca.crt"), s.ca)
		if err := CheckIdentity(env); errors.Is(err, ErrOtherCluster) != s.refused || err != nil && !s.refused {
			t.Fatalf("%s: %v", s.what, err)
		}
	}
	// A worker's own CA is not that of its cluster.
	env.Revision = "x4"
	put(env.Lock(snapenv.LockWorker), "")
	put(env.Cert("ca.remote.crt"), "C")
	put(env.Cert("ca.crt"), "own")
	if err := CheckIdentity(env); err != nil {
		t.Error(err)
	}
	put(env.IdentityFile(), "{")
	if err := CheckIdentity(env); err == nil || errors.Is(err, ErrOtherCluster) {
		t.Errorf("a damaged note: %v", err)
	}
	if err := NoteIdentity(env); err != nil {
		t.Error(err)
	}
	if err := CheckIdentity(env); err != nil {
		t.Error(err)
	}
}
