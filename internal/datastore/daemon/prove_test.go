package daemon

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"microk8s/internal/datastore/backup"
)

// TestProve: a backup is restored into a member of its own and compared; what cannot be restored
// whole is no proof, and nothing is left behind.
func TestProve(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "keys")
	w, err := backup.Create(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 500 {
		p := backup.Pair{Key: fmt.Appendf(nil, "/registry/k/%03d", i), Value: bytes.Repeat([]byte{byte(i)}, i)}
		if i%100 == 7 {
			p.TTL = 1 // over before the comparison, if leases were taken as they are
		}
		if err := w.Add(p); err != nil {
			t.Fatal(err)
		}
	}
	// What a restore into a running cluster leaves as it is belongs to the proof all the same.
	if err := w.Add(backup.Pair{Key: []byte(backup.TokensKey), Value: []byte("t")}); err != nil {
		t.Fatal(err)
	}
	m, err := w.Close(77, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	work, err := os.MkdirTemp("", "p") // its sockets have short paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(work) })
	cmd := NewCommand([]string{"prove", "--db-dir", dir, "--work", work}, nil, nil)
	var out bytes.Buffer
	cmd.SetOut(&out)
	if err := cmd.ExecuteContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	var got Proof
	if err := json.Unmarshal(out.Bytes(), &got); err != nil || got.Keys != 501 || got.SHA256 != m.SHA256 || got.Revision != 77 {
		t.Errorf("%s, %v", out.String(), err)
	}
	if left, _ := os.ReadDir(work); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}

	set, err := backup.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "9.data"), []byte("x"), 0o600); err != nil { // after it was opened
		t.Fatal(err)
	}
	if _, err := Prove(t.Context(), set, work); !errors.Is(err, backup.ErrIncomplete) {
		t.Errorf("a backup with another value was proven: %v", err)
	}
	if left, _ := os.ReadDir(work); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}
