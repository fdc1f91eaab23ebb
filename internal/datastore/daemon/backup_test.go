package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"microk8s/internal/cli"
	"microk8s/internal/datastore/backup"
	"microk8s/internal/snapenv"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// migrate runs `k8s-dqlite migrator` in this process.
func migrate(ctx context.Context, args ...string) (said string, err error) {
	cmd := NewCommand(append([]string{"migrator"}, args...), nil, nil)
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	err = cmd.ExecuteContext(ctx)
	return out.String(), err
}

// contents gives all keys that a backup holds, as text.
func contents(t *testing.T, c *clientv3.Client) map[string]string {
	t.Helper()
	r, err := c.Get(testContext(t), "/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]string{}
	for _, kv := range r.Kvs {
		m[string(kv.Key)] = string(kv.Value)
	}
	return m
}

func same(t *testing.T, got, want map[string]string) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%d keys, want %d", len(got), len(want))
	}
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%s is %.20q, want %.20q", k, got[k], v)
		}
	}
}

func TestMigrator(t *testing.T) {
	t.Parallel()
	p := start(t, newDir(t))
	ctx := testContext(t)
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range 160 { // several pages
				if _, err := p.client.Put(ctx, fmt.Sprintf("/registry/%d/%d", w, i), strings.Repeat(string(rune('a'+w)), i)); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	wg.Wait()
	lease, err := p.client.Grant(ctx, 600)
	if err != nil {
		t.Fatal(err)
	}
	for k, opts := range map[string][]clientv3.OpOption{"/registry/leased": {clientv3.WithLease(lease.ID)}, "other": nil} {
		if _, err := p.client.Put(ctx, k, "x", opts...); err != nil {
			t.Fatal(err)
		}
	}
	want := contents(t, p.client)
	dir := filepath.Join(t.TempDir(), "b")
	if said, err := migrate(ctx, "--mode", "backup-dqlite", "--endpoint", p.cfg.Listen, "--db-dir", dir); err != nil {
		t.Fatal(err, said)
	}
	set, err := backup.Open(dir)
	if err != nil || set.Manifest.Keys != len(want) || set.Manifest.Revision != 8*160+4 {
		t.Fatalf("%+v, %v; want %d keys", set, err, len(want))
	}

	// Into another datastore, which has something already.
	q := start(t, newDir(t))
	for k, v := range map[string]string{"/registry/0/1": "wrong", "/registry/0/2": want["/registry/0/2"], "/extra": "e"} {
		if _, err := q.client.Put(ctx, k, v); err != nil {
			t.Fatal(err)
		}
	}
	restore := []string{"--mode", "restore-to-dqlite", "--endpoint", q.cfg.Listen, "--db-dir", dir}
	if said, err := migrate(ctx, restore...); err != nil {
		t.Fatal(err, said)
	}
	got := contents(t, q.client)
	if got["/extra"] != "e" {
		t.Error("what is not in the backup was deleted")
	}
	delete(got, "/extra")
	same(t, got, want)
	leased, err := q.client.Get(ctx, "/registry/leased")
	if err != nil || len(leased.Kvs) != 1 || leased.Kvs[0].Lease == 0 {
		t.Errorf("the lease is lost: %v, %v", leased, err)
	}
	if said, err := migrate(ctx, append(restore, "--prune")...); err != nil || !strings.Contains(said, "deleted=1") || !strings.Contains(said, "written=1 ") {
		t.Errorf("the second restore, which has only one lease to write: %v, %s", err, said)
	}
	same(t, contents(t, q.client), want)

	for name, args := range map[string][]string{
		"mode":                             {"--mode", "backup-all", "--endpoint", q.cfg.Listen, "--db-dir", dir},
		"not empty":                        {"--mode", "backup", "--endpoint", q.cfg.Listen, "--db-dir", dir},
		"db-dir":                           {"--mode", "backup", "--endpoint", q.cfg.Listen},
		"incomplete":                       {"--mode", "restore", "--endpoint", q.cfg.Listen, "--db-dir", t.TempDir()},
		"is it running":                    {"--mode", "restore", "--endpoint", "unix:///nowhere/sock:12379", "--db-dir", dir},
		"--prune and --cluster are for re": {"--mode", "backup", "--endpoint", q.cfg.Listen, "--db-dir", dir, "--prune"},
	} {
		short, cancel := context.WithTimeout(ctx, 3*time.Second)
		if _, err := migrate(short, args...); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
	}
}

// A key that fails makes the restore fail.
func TestRestoreFailsWithAKey(t *testing.T) {
	t.Parallel()
	p := start(t, newDir(t))
	ctx := testContext(t)
	dir := filepath.Join(t.TempDir(), "b")
	w, err := backup.Create(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, pair := range []backup.Pair{{Key: []byte("/a"), Value: []byte("1")}, {Key: []byte("/large"), Value: make([]byte, 4<<20)}, {Key: []byte("/z"), Value: []byte("2")}} {
		if err := w.Add(pair); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Close(1, time.Now()); err != nil {
		t.Fatal(err)
	}
	_, err = migrate(ctx, "--mode", "restore", "--endpoint", p.cfg.Listen, "--db-dir", dir)
	if err == nil || !strings.Contains(err.Error(), "/large") || !strings.Contains(err.Error(), "1 of 3") {
		t.Errorf("%v", err)
	}
	if got := contents(t, p.client); got["/a"] != "1" || got["/z"] != "2" {
		t.Errorf("the others: %q", got)
	}
}

// A backup is of one moment while everything is being written.
func TestBackupIsOfOneRevision(t *testing.T) {
	t.Parallel()
	p := start(t, newDir(t))
	ctx, stop := context.WithCancel(testContext(t))
	defer stop()
	const keys = 1500
	write := func(round int) error { // all keys, in order
		for i := 0; i < keys; i += 100 {
			var ops []clientv3.Op
			for j := i; j < i+100; j++ {
				ops = append(ops, clientv3.OpPut(fmt.Sprintf("/k/%04d", j), fmt.Sprint(round)))
			}
			if _, err := p.client.Txn(ctx).Then(ops...).Commit(); err != nil {
				return err
			}
		}
		return nil
	}
	if err := write(0); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		for round := 1; write(round) == nil; round++ {
		}
	}()
	for range 5 {
		dir := filepath.Join(t.TempDir(), "b")
		if said, err := migrate(testContext(t), "--mode", "backup", "--endpoint", p.cfg.Listen, "--db-dir", dir); err != nil {
			t.Fatal(err, said)
		}
		set, err := backup.Open(dir)
		if err != nil || set.Manifest.Keys != keys+1 {
			t.Fatalf("%v, %v", set, err)
		}
		// Keys of one round, then of the one before.
		drops, last := 0, ""
		for n := range keys {
			pair, err := set.Pair(n)
			if err != nil {
				t.Fatal(err)
			}
			if v := string(pair.Value); v != last {
				drops++
				last = v
			}
		}
		if drops > 2 {
			t.Errorf("the backup is of %d different moments", drops)
		}
	}
	stop()
	wg.Wait()
}

// dbctl runs the real command line against a real daemon; its tool is this test's binary.
type dbctl struct {
	app      *cli.App
	out, err bytes.Buffer
	now      time.Time
}

func (d *dbctl) run(args ...string) int {
	d.out.Reset()
	d.err.Reset()
	return d.app.Main(context.Background(), append([]string{"microk8s", "dbctl"}, args...))
}

func newDbctl(t *testing.T) (*dbctl, *process) {
	t.Helper()
	env := snapenv.Under(t.TempDir())
	dir := env.Backend()
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(newDir(t), dir); err != nil {
		t.Fatal(err)
	}
	p := start(t, dir)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string]string{
		env.Bin("k8s-dqlite"):    "#!/bin/sh\nTEST_K8S_DQLITE=1 exec " + exe + ` "$@"` + "\n",
		env.AdminKubeconfig():    "apiVersion: v1\n",
		env.Lock(snapenv.LockHA): "",
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	d := &dbctl{now: time.Date(2026, 1, 2, 3, 4, 5, 0, time.Local)}
	d.app = &cli.App{Env: env, In: strings.NewReader(""), Out: &d.out, Err: &d.err, Environ: os.Environ(), Group: "microk8s", Now: func() time.Time { return d.now }}
	return d, p
}

func TestDbctl(t *testing.T) {
	t.Parallel()
	d, p := newDbctl(t)
	ctx := testContext(t)
	for i := range 700 {
		if _, err := p.client.Put(ctx, fmt.Sprintf("/registry/k/%d", i), strings.Repeat("v", i)); err != nil {
			t.Fatal(err)
		}
	}
	want := contents(t, p.client)
	dir := t.TempDir()
	if code := d.run("backup", "-o", filepath.Join(dir, "mine.tar.gz")); code != 0 || d.err.Len() > 0 {
		t.Fatalf("%d: %s", code, &d.err)
	}
	file := filepath.Join(dir, "mine.tar.gz")
	if s := d.out.String(); s != "Backing up the datastore\nThe backup is: "+file+"\n" {
		t.Errorf("it says %q", s)
	}
	list, err := exec.Command("tar", "tzf", file).Output() // as upstream would read it
	if err != nil || !strings.Contains(string(list), "\nmine/0.key\n") || strings.Count(string(list), "\n") != 2*701+2 {
		t.Errorf("%v, %.200s", err, list)
	}

	// Everything is lost but for something new.
	if _, err := p.client.Delete(ctx, "/registry/", clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
	if _, err := p.client.Put(ctx, "/registry/new", "n"); err != nil {
		t.Fatal(err)
	}
	renamed := filepath.Join(dir, "other name.tar.gz")
	if err := os.Rename(file, renamed); err != nil {
		t.Fatal(err)
	}
	if code := d.run("restore", renamed); code != 0 || !strings.HasPrefix(d.out.String(), "Restoring from "+renamed+"\nRestored 701 keys\nJoin tokens ") {
		t.Fatalf("%d: %s%s", code, &d.out, &d.err)
	}
	got := contents(t, p.client)
	if got["/registry/new"] != "n" {
		t.Error("what is not in the archive was deleted")
	}
	delete(got, "/registry/new")
	same(t, got, want)
	if code := d.run("restore", "--prune", "--debug", renamed); code != 0 || !strings.Contains(d.err.String(), "deleted=1") {
		t.Fatalf("%d: %s%s", code, &d.out, &d.err)
	}
	same(t, contents(t, p.client), want)

	// A half archive restores nothing.
	data, err := os.ReadFile(renamed)
	if err != nil {
		t.Fatal(err)
	}
	half := filepath.Join(dir, "half.tar.gz")
	writeFile(t, half, data[:len(data)/2])
	if _, err := p.client.Put(ctx, "/registry/k/1", "changed"); err != nil {
		t.Fatal(err)
	}
	if code := d.run("restore", half); code != 4 || !strings.Contains(d.err.String(), "Restore process failed. ") {
		t.Errorf("%d: %s", code, &d.err)
	}
	if code := d.run("restore", filepath.Join(dir, "none")); code != 4 {
		t.Errorf("%d: %s", code, &d.err)
	}
	if got := contents(t, p.client)["/registry/k/1"]; got != "changed" {
		t.Errorf("the half archive was applied: %q", got)
	}

	// From a timer.
	keep := t.TempDir()
	writeFile(t, filepath.Join(keep, "backup-of-mine.tar.gz"), nil)
	for range 4 {
		if code := d.run("backup", "-o", keep, "--keep", "2"); code != 0 {
			t.Fatalf("%d: %s", code, &d.err)
		}
		d.now = d.now.Add(time.Hour)
	}
	kept := strings.Join(names(t, keep), " ")
	if kept != "backup-2026-01-02-05-04-05.tar.gz backup-2026-01-02-06-04-05.tar.gz backup-of-mine.tar.gz" {
		t.Errorf("kept: %s", kept)
	}

	// A datastore that is not there, with its socket left behind: the good archives stay.
	p.stop()
	if code := d.run("backup", "-o", keep, "--keep", "1"); code != 10 || !strings.Contains(d.out.String(), "Please ensure") {
		t.Errorf("%d: %s", code, &d.out)
	}
	writeFile(t, d.app.Env.DatastoreSocket(), nil)
	if code := d.run("backup", "-o", keep, "--keep", "1"); code != 1 || !strings.Contains(d.err.String(), "Backup process failed. ") || strings.Contains(d.out.String(), "The backup is") {
		t.Errorf("%d: %s%s", code, &d.out, &d.err)
	}
	if code := d.run("restore", renamed); code != 2 || !strings.Contains(d.err.String(), "cannot keep a copy") {
		t.Errorf("%d: %s", code, &d.err)
	}
	if code := d.run("restore", "--no-copy", renamed); code != 3 {
		t.Errorf("%d: %s", code, &d.err)
	}
	if now := strings.Join(names(t, keep), " "); now != kept {
		t.Errorf("left: %s", now)
	}
	for _, args := range [][]string{{"frob"}, {"restore"}, {"restore", "a", "b"}, {"backup", "x"}, {"backup", "--prune"}, {"restore", "a", "--keep", "1"}, {"backup", "--keep", "0"}} {
		if code := d.run(args...); code != 2 {
			t.Errorf("%v: %d", args, code)
		}
	}
	if code := d.run(); code != 0 || !strings.Contains(d.out.String(), "Usage:") {
		t.Errorf("%d: %s", code, &d.out)
	}
}

func names(t *testing.T, dir string) (out []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

// The manifest is read by people's scripts too.
func TestManifestKeys(t *testing.T) {
	data, err := json.Marshal(backup.Manifest{Leases: map[int]int64{3: 60}})
	if err != nil || string(data) != `{"revision":0,"keys":0,"sha256":"","created":"0001-01-01T00:00:00Z","leases":{"3":60}}` {
		t.Errorf("%s, %v", data, err)
	}
}
