package daemon

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// repair runs a command of k8s-dqlite as a process.
func repair(m *testMember, args ...string) (string, error) {
	cmd := exec.Command(os.Args[0], append(args, "--storage-dir", m.dir)...)
	cmd.Env = m.env
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

// Damage to the files of one of three members, of every kind: it says so and does not start,
// the others go on, and one command and a start make it whole.
func TestReseed(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	n := int64(0)
	write := func(m *testMember, count int) {
		for range count {
			m.put(t, fmt.Sprintf("/r/%d", n), strings.Repeat(fmt.Sprint(n), 50))
			n++
		}
	}
	write(c.members[0], 700) // a snapshot is taken after 512 entries
	for i, tc := range []struct {
		pattern string
		damage  func([]byte) []byte
	}{
		{"open-*", func(d []byte) []byte { d[20] ^= 4; return d }},
		{"0*-0*", func(d []byte) []byte { return d[:len(d)-8] }},
		{"snapshot-*[0-9]", func(d []byte) []byte { clear(d[len(d)/2:]); return d }},
		{"snapshot-*.meta", func(d []byte) []byte { d[10] ^= 1; return d }},
		{"metadata?", func([]byte) []byte { return nil }},
	} {
		m := c.members[i%3]
		m.kill(t)
		other := c.other(m)
		write(other, 20)
		files, err := filepath.Glob(filepath.Join(m.dir, tc.pattern))
		if err != nil || len(files) == 0 {
			t.Logf("%s: the member at %s has none", tc.pattern, m.address)
			c.start(m)
			continue
		}
		for _, f := range files {
			data, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			if strings.HasPrefix(tc.pattern, "open") && len(data) < 64 {
				continue
			}
			writeFile(t, f, tc.damage(data))
		}
		before, _ := os.ReadFile(m.log)
		c.launch(m)
		if err := m.cmd.Wait(); err == nil {
			t.Fatalf("%s: it started", tc.pattern)
		}
		text, _ := os.ReadFile(m.log)
		said := string(text[len(before):])
		if !strings.Contains(said, "damaged") && !strings.Contains(said, "lost") {
			t.Errorf("%s: it did not say what is wrong: %s", tc.pattern, said)
		}
		write(other, 5)
		if out, err := repair(m, "reseed"); err != nil {
			t.Fatalf("%s: %v: %s", tc.pattern, err, out)
		}
		c.start(m)
		if got := m.count(t); got != n {
			t.Errorf("%s: %d of %d keys are there again", tc.pattern, got, n)
		}
		c.waitRoles(3)
	}
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
