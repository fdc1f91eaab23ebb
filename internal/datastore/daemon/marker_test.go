package daemon

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// An old copy of a storage directory does not start: neither one from before a stop, nor one
// from before a kill; the newer one does, and so does a new one in its place.
func TestOldCopyIsRefused(t *testing.T) {
	dir := newDir(t)
	marker := filepath.Join(t.TempDir(), "marker")
	cfg := func() *Config {
		c := config(dir)
		c.marker, c.snapRevision = marker, "x2"
		return c
	}
	write := func(p *process, n int) {
		t.Helper()
		for i := range n {
			if _, err := p.client.Put(t.Context(), fmt.Sprintf("/registry/k%d", i), strings.Repeat("v", 100)); err != nil {
				t.Fatal(err)
			}
		}
	}
	p := startConfig(t, cfg())
	write(p, 20)
	p.stop()
	saved := filepath.Join(t.TempDir(), "old")
	if err := os.CopyFS(saved, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	p = startConfig(t, cfg())
	write(p, 20)
	p.stop()
	newer := dir + ".newer"
	if err := os.Rename(dir, newer); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(saved, dir); err != nil {
		t.Fatal(err)
	}
	err := Run(t.Context(), cfg(), "", slog.New(slog.DiscardHandler), nil)
	if err == nil || !strings.Contains(err.Error(), "is an old copy") || !strings.Contains(err.Error(), "under revision x2") || !strings.Contains(err.Error(), marker) {
		t.Fatalf("an old copy: %v", err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(newer, dir); err != nil {
		t.Fatal(err)
	}
	p = startConfig(t, cfg())
	write(p, 1)
	p.stop()
	// A directory that starts over, as after leaving a cluster, is no old copy.
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if err := os.RemoveAll(filepath.Join(dir, f.Name())); err != nil {
			t.Fatal(err)
		}
	}
	writeKeyPair(t, dir, "node")
	writeFile(t, filepath.Join(dir, "init.yaml"), []byte("Address: "+freeAddress(t)+"\n"))
	p = startConfig(t, cfg())
	write(p, 1)
	p.stop()
}
