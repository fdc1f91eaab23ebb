package daemon

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
)

// TestExamine: how far a directory has come is read while its daemon runs, and after; it is not changed,
// nothing is left beside it, and damage is said with what is known all the same.
func TestExamine(t *testing.T) {
	t.Parallel()
	base, err := os.MkdirTemp("", "x") // its sockets have short paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	dir := filepath.Join(base, "backend")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	writeKeyPair(t, dir, "node")
	writeFile(t, filepath.Join(dir, "init.yaml"), []byte("Address: "+freeAddress(t)+"\n"))
	p := start(t, dir)
	for range 50 {
		if _, err := p.client.Put(testContext(t), "/k", "v"); err != nil {
			t.Fatal(err)
		}
	}
	got, err := p.client.Get(testContext(t), "/k")
	if err != nil {
		t.Fatal(err)
	}
	look := func() *peers.Examined {
		t.Helper()
		cmd := NewCommand([]string{"examine", "--storage-dir", dir}, nil, nil)
		var out bytes.Buffer
		cmd.SetOut(&out)
		if err := cmd.ExecuteContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		var x peers.Examined
		if err := json.Unmarshal(out.Bytes(), &x); err != nil {
			t.Fatal(err)
		}
		left, err := os.ReadDir(base)
		if err != nil || len(left) != 1 {
			t.Errorf("left behind: %v, %v", left, err)
		}
		return &x
	}
	self, err := storedir.Dir(dir).Self()
	if err != nil {
		t.Fatal(err)
	}
	running := look()
	if running.Damaged != "" || running.Revision < got.Header.Revision || running.Index == 0 || running.Term == 0 || running.Member.ID != self.ID || len(running.Members) != 1 {
		t.Errorf("%+v, at revision %d", running, got.Header.Revision)
	}
	p.stop()
	stopped := look()
	if stopped.Revision < running.Revision || stopped.Index < running.Index || stopped.Damaged != "" {
		t.Errorf("%+v, before: %+v", stopped, running)
	}
	if again, err := storedir.Dir(dir).Self(); err != nil || again != self {
		t.Errorf("%+v, %v", again, err)
	}
	for _, name := range []string{"metadata1", "metadata2"} {
		if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if x := look(); x.Damaged == "" {
		t.Errorf("%+v", x)
	}
}
