package daemon

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// On a full disk writes fail cleanly, reads go on, and when there is space again writes work
// without a restart; nothing acknowledged is lost, then or after a restart.
func TestFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root")
		}
		t.Skip("needs root: it mounts a small file system")
	}
	t.Parallel()
	small := t.TempDir()
	if err := syscall.Mount("tmpfs", small, "tmpfs", 0, "size=96m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(small, syscall.MNT_DETACH) })
	dir := filepath.Join(small, "data")
	if err := os.Rename(newDir(t), dir); err != nil { // another file system
		if err := os.CopyFS(dir, os.DirFS(newDir(t))); err != nil {
			t.Fatal(err)
		}
	}
	p := start(t, dir)
	ctx := testContext(t)
	acked := map[string]bool{}
	put := func(i int) error {
		key := fmt.Sprintf("/f/%d", i)
		call, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		_, err := p.client.Put(call, key, strings.Repeat("x", 500<<10))
		if err == nil {
			acked[key] = true
		}
		return err
	}
	check := func(when string) {
		t.Helper()
		got, err := p.client.Get(ctx, "/f/", clientv3.WithPrefix(), clientv3.WithKeysOnly())
		if err != nil {
			t.Fatalf("%s: reads fail: %v", when, err)
		}
		have := map[string]bool{}
		for _, kv := range got.Kvs {
			have[string(kv.Key)] = true
		}
		for k := range acked {
			if !have[k] {
				t.Errorf("%s: %s was acknowledged and is gone", when, k)
			}
		}
	}
	for i := range 4 {
		if err := put(i); err != nil {
			t.Fatal(err)
		}
	}
	// Somebody else fills the disk.
	filler := filepath.Join(small, "filler")
	f, err := os.Create(filler)
	if err != nil {
		t.Fatal(err)
	}
	block := make([]byte, 1<<16)
	for err == nil {
		_, err = f.Write(block)
	}
	f.Close()
	var failure error
	for i := 4; i < 60 && failure == nil; i++ { // what dqlite has prepared is used up first
		failure = put(i)
	}
	if failure == nil {
		t.Fatal("writes go on without space")
	}
	t.Logf("a write without space: %v", failure)
	check("full")
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(30 * time.Second)
	for i := 100; ; i++ {
		err := put(i)
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("writes do not work again: %v", err)
		}
	}
	check("space again")
	p.stop()
	p = start(t, dir)
	check("restarted")
}
