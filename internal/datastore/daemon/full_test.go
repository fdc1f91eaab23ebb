package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"microk8s/internal/datastore/peers"
	"microk8s/internal/longtest"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"
)

// smallDisk moves a storage directory to a file system of its own.
func smallDisk(t *testing.T, dir string) string {
	t.Helper()
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root")
		}
		t.Skip("needs root: it mounts small file systems")
	}
	small := t.TempDir()
	if err := syscall.Mount("tmpfs", small, "tmpfs", 0, "size=96m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(small, syscall.MNT_DETACH) })
	to := filepath.Join(small, "data")
	if err := os.CopyFS(to, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return to
}

// fill leaves so many bytes of a directory's file system to others.
func fill(t *testing.T, dir string, leave int64) (empty func()) {
	t.Helper()
	filler := filepath.Join(filepath.Dir(dir), "filler")
	f, err := os.Create(filler)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	block := make([]byte, 1<<16)
	for {
		var fs unix.Statfs_t
		if err := unix.Statfs(dir, &fs); err != nil {
			t.Fatal(err)
		}
		if leave > 0 && int64(fs.Bavail)*fs.Bsize <= leave {
			break
		}
		if _, err := f.Write(block); errors.Is(err, syscall.ENOSPC) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	return func() {
		if err := os.Remove(filler); err != nil {
			t.Error(err)
		}
	}
}

// bigWrites writes large values and remembers which were acknowledged.
type bigWrites struct {
	t     *testing.T
	mu    sync.Mutex
	n     int
	acked []string
}

func (w *bigWrites) put(c *clientv3.Client) error {
	w.mu.Lock()
	w.n++
	key := fmt.Sprintf("/f/%04d", w.n)
	w.mu.Unlock()
	ctx, cancel := context.WithTimeout(testContext(w.t), 10*time.Second)
	defer cancel()
	_, err := c.Put(ctx, key, strings.Repeat("x", 500<<10))
	if err == nil {
		w.mu.Lock()
		w.acked = append(w.acked, key)
		w.mu.Unlock()
	}
	return err
}

// check reads everything that was acknowledged.
func (w *bigWrites) check(c *clientv3.Client, when string) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(testContext(w.t), 20*time.Second)
	defer cancel()
	got, err := c.Get(ctx, "/f/", clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		w.t.Fatalf("%s: reads fail: %v", when, err)
	}
	have := map[string]bool{}
	for _, kv := range got.Kvs {
		have[string(kv.Key)] = true
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, k := range w.acked {
		if !have[k] {
			w.t.Errorf("%s: %s was acknowledged and is gone", when, k)
		}
	}
}

// untilFull writes until a write is refused for lack of space. What else may fail on the way is
// what a client must expect of a write with an unknown outcome.
func (w *bigWrites) untilFull(c *clientv3.Client) {
	w.t.Helper()
	for range 100 {
		err := w.put(c)
		if err != nil {
			w.t.Logf("a write without space: %v", err)
		}
		if errors.Is(err, rpctypes.ErrNoSpace) {
			return
		}
	}
	w.t.Fatal("no write was refused for lack of space")
}

// On a full disk writes fail cleanly, reads go on, and when there is space again writes work
// without a restart; nothing acknowledged is lost, then or after a restart.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	dir := smallDisk(t, newDir(t))
	p := start(t, dir)
	w := &bigWrites{t: t}
	for range 4 {
		if err := w.put(p.client); err != nil {
			t.Fatal(err)
		}
	}
	empty := fill(t, dir, 0)
	w.untilFull(p.client)
	w.check(p.client, "full")
	empty()
	within(t, "writes work again", func() bool { return w.put(p.client) == nil })
	w.check(p.client, "space again")
	p.stop()
	p = start(t, dir)
	w.check(p.client, "restarted")
}

// smallCluster is a cluster of three members, each with a small disk of its own.
func smallCluster(t *testing.T, args ...string) *testCluster {
	t.Helper()
	c := newCluster(t, 0)
	for range 3 {
		m := c.prepare(args...)
		m.dir = smallDisk(t, m.dir)
		c.start(m)
	}
	c.waitRoles(3)
	// Term and vote are kept in two files by turns, of which the second is made at an election.
	// (What happens when there is no space for it is in TestNodeThatCannotVote.)
	first := c.leader()
	first.terminate(t)
	c.start(first)
	c.waitRoles(3)
	return c
}

// The disks of a three-member cluster fill up: one that follows, the one that leads, all of them.
// As long as a majority has space writes go on; then they are refused, and reads go on. Whoever
// leads has space, if there is such a one. With space again everything works, without a restart.
func TestFullDisksOfMembers(t *testing.T) {
	longtest.Only(t)
	t.Parallel()
	c := smallCluster(t)
	w := &bigWrites{t: t}
	write := func(m *testMember, n int) {
		t.Helper()
		for range n {
			within(t, "a write through "+m.address, func() bool { return w.put(m.client) == nil })
		}
	}
	everywhere := func(when string) {
		t.Helper()
		for _, m := range c.members {
			w.check(m.client, when+", at "+m.address)
		}
	}
	write(c.members[0], 4)

	leader := c.leader()
	follower := c.other(leader)
	empty := fill(t, follower.dir, 0)
	write(leader, 50) // more than what libdqlite has allocated ahead
	everywhere("a follower is full")
	if c.leader() != leader {
		t.Error("leadership has moved because another member's disk is full")
	}
	empty()
	write(follower, 1)
	everywhere("the follower has space again")

	leader = c.leader()
	empty = fill(t, leader.dir, 0)
	within(t, "leadership goes to a member with space", func() bool { return c.leader() != leader })
	write(leader, 5)
	everywhere("the former leader is full")
	empty()
	write(leader, 1)
	everywhere("the former leader has space again")

	var emptied []func()
	for _, m := range c.members {
		emptied = append(emptied, fill(t, m.dir, 0))
	}
	for _, m := range c.members {
		w.untilFull(m.client)
	}
	everywhere("all are full")
	within(t, "every member says that all are full", func() bool {
		for _, m := range c.members {
			list := m.list(t)
			if len(list) != 3 || slices.ContainsFunc(list, func(p peers.Member) bool { return !p.DiskFull }) {
				return false
			}
		}
		return true
	})
	old := c.leader()
	old.kill(t)
	other := c.other(old)
	within(t, "another leads", func() bool { return c.leader() != old })
	w.untilFull(other.client)
	w.check(other.client, "all are full, and the leader is lost")
	for _, e := range emptied {
		e()
	}
	write(other, 5)
	c.start(old)
	c.waitRoles(3)
	everywhere("all have space again")
	for _, m := range c.members {
		text, _ := os.ReadFile(m.log)
		if strings.Contains(string(text), "level=ERROR msg=\"the log") {
			t.Errorf("%s could not open its log", m.address)
		}
	}
}

// With the action handover a leader whose disk runs low gives leadership away, and does not
// keep it when it comes back; when all disks are low it stays, and writes go on.
func TestLowDiskHandsOver(t *testing.T) {
	t.Parallel()
	c := smallCluster(t, "--low-available-storage-action=handover",
		"--watch-storage-available-size-interval=200ms", "--watch-storage-available-size-min-bytes=31457280")
	const low = 20 << 20 // below that, and not full
	first := c.leader()
	first.put(t, "/k", "1")
	empty := fill(t, first.dir, low)
	within(t, "leadership goes to another", func() bool { return c.leader() != first })
	second := c.leader()
	fill(t, second.dir, low)
	within(t, "leadership goes to the third", func() bool { l := c.leader(); return l != first && l != second })
	third := c.leader()
	fill(t, third.dir, low)
	for i := range 10 {
		for _, m := range c.members {
			m.put(t, "/k", fmt.Sprint(i))
		}
	}
	empty()
	within(t, "leadership goes to the only one with space", func() bool { return c.leader() == first })
	if got := third.get(t, "/k"); got != "9" {
		t.Errorf("it reads %q", got)
	}
}

// A node that could not write its vote takes no part any more, and would never say so. Its daemon
// notices, ends with the reason, and is well when it is started again.
func TestNodeThatCannotVote(t *testing.T) {
	longtest.Only(t)
	t.Parallel()
	c := newCluster(t, 3)
	leader := c.leader()
	m := c.other(leader)
	next := c.other(leader, m)
	// The second of the two files does not exist before the first election, and cannot be made.
	second := filepath.Join(m.dir, "metadata2")
	if err := os.Mkdir(second, 0o700); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- m.cmd.Wait() }()
	if out, err := c.tool(leader, ".transfer "+next.address); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	select {
	case err := <-ended:
		if err == nil {
			t.Error("it ended without an error")
		}
	case <-testContext(t).Done():
		t.Fatal("nobody noticed")
	}
	if text, _ := os.ReadFile(m.log); !strings.Contains(string(text), "has dropped out of Raft") {
		t.Error("it did not say why it ended")
	}
	if err := os.Remove(second); err != nil {
		t.Fatal(err)
	}
	c.start(m)
	c.waitRoles(3)
	m.put(t, "/k", "1")
	if c.leader() != next {
		t.Error("leadership has moved once more")
	}
}
