package daemon

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// repair runs a command of k8s-dqlite as a process.
func repair(m *testMember, args ...string) (string, error) {
	cmd := exec.Command(os.Args[0], append(args, "--storage-dir", m.dir)...)
	// It leaves /tmp alone, which is in memory on many machines and has no room for a datastore.
	cmd.Env = append(slices.Clone(m.env), "TMPDIR=/nonexistent")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (m *testMember) count(t *testing.T) int64 {
	t.Helper()
	r, err := m.client.Get(testContext(t), "/r/", clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		t.Fatal(err)
	}
	return r.Count
}

// The command makes a member that was stopped fetch everything again.
func TestReseed(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	m := c.members[1]
	for i := range 20 {
		c.members[0].put(t, fmt.Sprintf("/r/%d", i), "x")
	}
	m.kill(t)
	if out, err := repair(m, "reseed"); err != nil || !strings.Contains(out, "The old files are in "+m.dir) {
		t.Fatalf("%v: %s", err, out)
	}
	c.start(m)
	if got := m.count(t); got != 20 {
		t.Errorf("%d of 20 keys are there again", got)
	}
	c.waitRoles(3)
}

func TestReseedIsRefused(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	m := c.members[0]
	if out, err := repair(m, "reseed"); err == nil || !strings.Contains(out, "stop it") {
		t.Errorf("of a running member: %v: %s", err, out)
	}
	m.terminate(t)
	before := listing(t, m.dir)
	if out, err := repair(m, "reseed"); err == nil || !strings.Contains(out, "only member") {
		t.Errorf("of the only member: %v: %s", err, out)
	}
	if after := listing(t, m.dir); after != before {
		t.Errorf("the directory was changed: %s", after)
	}
}

// The majority is lost: one member goes on with its data, and not a staler one.
func TestRecover(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	a, b := c.members[0], c.members[1]
	for i := range 20 {
		a.put(t, fmt.Sprintf("/r/%d", i), "x")
	}
	b.kill(t)
	for i := range 20 {
		a.put(t, fmt.Sprintf("/r/more-%d", i), "x")
	}
	for _, m := range c.members {
		if m != b {
			m.kill(t)
		}
	}
	if out, err := repair(b, "recover", "--others-are-gone", "--compare", a.dir); err == nil || !strings.Contains(out, "another copy is newer") {
		t.Errorf("the staler copy was taken: %v: %s", err, out)
	}
	before := listing(t, a.dir)
	if out, err := repair(a, "recover", "--compare", b.dir); err != nil || !strings.Contains(out, "Nothing was changed") {
		t.Errorf("asked only: %v: %s", err, out)
	}
	if after := listing(t, a.dir); after != before {
		t.Errorf("the directory was changed: %s", after)
	}
	if out, err := repair(a, "recover", "--others-are-gone", "--compare", b.dir); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if saved, _ := filepath.Glob(a.dir + ".before-recover-*"); len(saved) != 1 {
		t.Errorf("saved: %v", saved)
	}
	c.start(a)
	if got := a.count(t); got != 40 {
		t.Errorf("%d of 40 keys are there", got)
	}
	a.put(t, "/r/after", "x")
	if l := a.list(t); len(l) != 1 || !l[0].Leader {
		t.Errorf("the members: %v", l)
	}
}
