package daemon

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// image copies the directory of a running daemon: what a crash would leave.
func image(t *testing.T, dir string) string {
	t.Helper()
	to := t.TempDir()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Type().IsRegular() {
			data, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil {
				t.Fatal(err)
			}
			writeFile(t, filepath.Join(to, e.Name()), data)
		}
	}
	return to
}

// move gives an image an address of its own.
func move(t *testing.T, dir string) string {
	t.Helper()
	writeFile(t, filepath.Join(dir, "update.yaml"), []byte("Address: "+freeAddress(t)+"\n"))
	return dir
}

func TestDamageIsNoticed(t *testing.T) {
	t.Parallel()
	p := start(t, newDir(t))
	ctx := testContext(t)
	for i := range 50 {
		if _, err := p.client.Put(ctx, fmt.Sprintf("/d/%d", i), strings.Repeat("v", 500)); err != nil {
			t.Fatal(err)
		}
	}
	p.client.Close()
	whole := start(t, move(t, image(t, p.cfg.StorageDir)))
	if r, err := whole.client.Get(ctx, "/d/", clientv3.WithPrefix(), clientv3.WithCountOnly()); err != nil || r.Count != 50 {
		t.Fatalf("the image of a running daemon: %v, %v", r, err)
	}
	for _, tc := range []struct {
		file   string
		damage func(data []byte) []byte
		names  string
	}{
		{"open-1", func(d []byte) []byte { d[9000] ^= 1; return d }, "open-1"},
		{"open-1", func(d []byte) []byte { clear(d[4096:8192]); return d }, "open-1"},
		{"0000000000000001-0000000000000001", func(d []byte) []byte { d[40] ^= 1; return d }, "0000000000000001-0000000000000001"},
		{"metadata1", func(d []byte) []byte { return d[:8] }, "metadata1"},
		{"metadata1", func(d []byte) []byte { d[16] ^= 64; return d }, "metadata"}, // the term
		{"metadata1", func(d []byte) []byte { d[24] ^= 1; return d }, "metadata"},  // the vote
	} {
		dir := image(t, p.cfg.StorageDir)
		path := filepath.Join(dir, tc.file)
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, path, tc.damage(data))
		before := listing(t, dir)
		err = Run(ctx, config(dir), "", slog.New(slog.DiscardHandler), nil)
		if err == nil || !strings.Contains(err.Error(), tc.names) || !strings.Contains(err.Error(), "backup") {
			t.Errorf("%s: %v", tc.file, err)
		}
		if after := listing(t, dir); after != before {
			t.Errorf("%s: the refused directory was changed:\n%s\n%s", tc.file, before, after)
		}
	}
}

func listing(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s %d %v\n", e.Name(), fi.Size(), fi.ModTime())
	}
	return b.String()
}

// Every byte of a snapshot's data is under its checksum.
func TestDamagedSnapshotIsNoticed(t *testing.T) {
	t.Parallel()
	p := start(t, newDir(t))
	ctx := testContext(t)
	for i := range 1200 { // a snapshot is taken after 512 entries
		if _, err := p.client.Put(ctx, fmt.Sprintf("/d/%d", i), strings.Repeat(fmt.Sprint(i), 20)); err != nil {
			t.Fatal(err)
		}
	}
	p.stop()
	dir := p.cfg.StorageDir
	metas, err := filepath.Glob(filepath.Join(dir, "snapshot-*.meta"))
	if err != nil || len(metas) == 0 {
		t.Fatalf("no snapshot: %v", err)
	}
	path := strings.TrimSuffix(metas[0], ".meta")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(what string) {
		t.Helper()
		err := Run(ctx, config(dir), "", slog.New(slog.DiscardHandler), nil)
		if err == nil || !strings.Contains(err.Error(), filepath.Base(path)) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, at := range []int{0, 5, len(data) / 3, len(data) / 2, len(data) - 2} {
		data[at] ^= 16
		writeFile(t, path, data)
		refused(fmt.Sprintf("byte %d of %d", at, len(data)))
		data[at] ^= 16
	}
	writeFile(t, path, data[:len(data)/2])
	refused("cut")
	writeFile(t, path, data)
	if r, err := start(t, dir).client.Get(ctx, "/d/", clientv3.WithPrefix(), clientv3.WithCountOnly()); err != nil || r.Count != 1200 {
		t.Errorf("whole again: %v, %v", r, err)
	}
}
