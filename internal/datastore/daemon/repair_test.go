package daemon

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"microk8s/internal/longtest"
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

// Damage to the files of one of three members, of every kind and in every way that can be noticed
// (docs/datastore.md lists the others): it says so and does not start, the others go on, and one
// command and a start make it whole. The gate draws a sample.
func TestReseed(t *testing.T) {
	t.Parallel()
	type way struct {
		name   string
		damage func([]byte, *rand.Rand) []byte
	}
	flip := func(from, to int) way { // a bit of these bytes; to 0 is the end
		return way{"flip", func(d []byte, rnd *rand.Rand) []byte {
			end := to
			if end == 0 {
				end = len(d)
			}
			d[from+rnd.IntN(end-from)] ^= 1 << rnd.IntN(8)
			return d
		}}
	}
	cut := way{"cut", func(d []byte, rnd *rand.Rand) []byte { return d[:8+rnd.IntN(len(d)-8)] }}
	tear := way{"cut", func(d []byte, rnd *rand.Rand) []byte { // within a batch: their lengths are multiples of 8
		written := len(bytes.TrimRight(d, "\x00"))
		return d[:(8+rnd.IntN(written-8))|1]
	}}
	half := way{"cut", func(d []byte, _ *rand.Rand) []byte { return d[:len(d)/2] }}
	zero := way{"zero", func(d []byte, _ *rand.Rand) []byte { clear(d); return d }}
	type damage struct {
		pattern string
		way
		copied bool // the file comes back from a copy: the log is whole
	}
	var all []damage
	for _, f := range []struct {
		pattern string
		ways    []way
		copied  bool
	}{
		{"open-*", []way{flip(8, 24), tear}, false}, // the first batch, and more follow
		{"0*-0*", []way{flip(0, 0), cut, zero}, false},
		{"snapshot-*[0-9]", []way{flip(0, 0), cut, zero}, false},
		{"snapshot-*.meta", []way{flip(0, 0), cut, zero}, false},
		{"metadata?", []way{flip(16, 32), cut, zero}, false}, // term and vote
		{"metadata.check", []way{flip(0, 0), cut, zero}, true},
		{"info.yaml", []way{half, zero}, true}, // without checksums: not every bit can be noticed
		{"cluster.yaml", []way{zero}, true},
		{"cluster.crt", []way{flip(0, 5), cut, zero}, true},
		{"cluster.key", []way{flip(0, 5), cut, zero}, true},
	} {
		for _, w := range f.ways {
			all = append(all, damage{f.pattern, w, f.copied})
		}
	}
	c := newCluster(t, 3)
	n := int64(0)
	write := func(m *testMember, count int) {
		for range count {
			m.put(t, fmt.Sprintf("/r/%d", n), strings.Repeat(fmt.Sprint(n), 50))
			n++
		}
	}
	write(c.members[0], 700) // a snapshot is taken after 512 entries
	one := func(t *testing.T, m *testMember, tc damage, rnd *rand.Rand) {
		name := tc.pattern + " " + tc.name
		m.kill(t)
		other := c.other(m)
		write(other, 20)
		files, err := filepath.Glob(filepath.Join(m.dir, tc.pattern))
		if err != nil {
			t.Fatal(err)
		}
		copies := map[string][]byte{}
		for _, f := range files {
			data, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			if len(data) == 0 || strings.HasPrefix(tc.pattern, "open") && len(bytes.Trim(data, "\x00")) == 0 {
				continue // prepared, and not used yet
			}
			copies[f] = bytes.Clone(data)
			writeFile(t, f, tc.damage(data, rnd))
		}
		if len(copies) == 0 {
			t.Logf("%s: the member at %s has none", name, m.address)
			c.start(m)
			return
		}
		before, _ := os.ReadFile(m.log)
		c.launch(m)
		serves := time.AfterFunc(30*time.Second, func() { m.cmd.Process.Kill() })
		m.cmd.Wait()
		if !serves.Stop() {
			t.Fatalf("%s: it runs", name)
		}
		text, _ := os.ReadFile(m.log)
		said := string(text[len(before):])
		if file, _, _ := strings.Cut(strings.TrimLeft(tc.pattern, "0*"), "*"); !strings.Contains(said, strings.TrimSuffix(file, "?")) {
			t.Errorf("%s: it did not say what is wrong: %s", name, said)
		}
		write(other, 5)
		if tc.copied {
			for f, data := range copies {
				writeFile(t, f, data)
			}
		} else if out, err := repair(m, "reseed"); err != nil {
			t.Fatalf("%s: %v: %s", name, err, out)
		}
		c.start(m)
		if got := m.count(t); got != n {
			t.Errorf("%s: %d of %d keys are there again", name, got, n)
		}
		c.waitRoles(3)
	}
	withSeeds(t, func(t *testing.T, rnd *rand.Rand) {
		rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		some := all
		if !longtest.Enabled() {
			some = all[:6]
		}
		for i, tc := range some {
			one(t, c.members[i%3], tc, rnd)
		}
	})
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
