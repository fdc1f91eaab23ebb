package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"microk8s/internal/datastore/member"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/longtest"
)

// load writes keys of its own on some members until it is stopped, and knows which were acknowledged.
type load struct {
	acked  sync.Map // key to value; "" where the last write's outcome is not known
	n      atomic.Int64
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

func (c *testCluster) load(on ...*testMember) *load {
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{cancel: cancel}
	for i, m := range on {
		l.wg.Go(func() {
			for k := 0; ctx.Err() == nil; k++ {
				key, value := fmt.Sprintf("/load/%d/%d", i, k%500), strings.Repeat(fmt.Sprint(k), 40)
				call, end := context.WithTimeout(ctx, 5*time.Second)
				_, err := m.client.Put(call, key, value)
				end()
				if err == nil {
					l.acked.Store(key, value)
					l.n.Add(1)
				} else {
					l.acked.Store(key, "")
				}
			}
		})
	}
	return l
}

// stop ends the writing and notes what has to be there.
func (l *load) stop(want map[string]string) {
	l.cancel()
	l.wg.Wait()
	l.acked.Range(func(k, v any) bool {
		if want[k.(string)] = v.(string); v == "" {
			delete(want, k.(string))
		}
		return true
	})
}

// more waits for writes that were acknowledged after now.
func (l *load) more(t *testing.T, n int64) {
	t.Helper()
	from := l.n.Load()
	within(t, "writes are acknowledged", func() bool { return l.n.Load() >= from+n })
}

// has checks that a member has all of it.
func (m *testMember) has(t *testing.T, want map[string]string, what string) {
	t.Helper()
	r, err := m.client.Get(testContext(t), "/load/", clientv3.WithPrefix())
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	got := map[string]string{}
	for _, kv := range r.Kvs {
		got[string(kv.Key)] = string(kv.Value)
	}
	lost := 0
	for k, v := range want {
		if got[k] != v {
			lost++
		}
	}
	if lost > 0 {
		t.Fatalf("%s: %d of %d acknowledged writes are lost", what, lost, len(want))
	}
}

// harm is a way to damage a file.
type harm struct {
	name string
	do   func(data []byte, rnd *rand.Rand) []byte // nil removes it
}

var harms = []harm{
	{"flip", func(d []byte, rnd *rand.Rand) []byte { d[rnd.IntN(len(d))] ^= 1 << rnd.IntN(8); return d }},
	{"early flip", func(d []byte, rnd *rand.Rand) []byte { d[rnd.IntN(min(len(d), 64))] ^= 1 << rnd.IntN(8); return d }},
	{"garbage", func(d []byte, rnd *rand.Rand) []byte {
		from := rnd.IntN(len(d))
		for i := from; i < min(len(d), from+4096); i++ {
			d[i] = byte(rnd.Uint32())
		}
		return d
	}},
	{"zero", func(d []byte, rnd *rand.Rand) []byte {
		from := rnd.IntN(len(d))
		clear(d[from:min(len(d), from+4096)])
		return d
	}},
	{"all zero", func(d []byte, _ *rand.Rand) []byte { clear(d); return d }},
	{"cut", func(d []byte, rnd *rand.Rand) []byte { return d[:rnd.IntN(len(d))] }},
	{"empty", func([]byte, *rand.Rand) []byte { return []byte{} }},
	{"removed", func([]byte, *rand.Rand) []byte { return nil }},
}

// spoil damages some files of a member that does not run, and says what it did. A file of settings that a
// person writes is none that can be fetched from anywhere.
func (m *testMember) spoil(t *testing.T, rnd *rand.Rand) string {
	t.Helper()
	entries, err := os.ReadDir(m.dir)
	if err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, e := range entries {
		if e.Type().IsRegular() && !strings.HasPrefix(e.Name(), ".") && e.Name() != storedir.TuningFile && e.Name() != "dqlite-lock" {
			files = append(files, e.Name())
		}
	}
	var did []string
	for range 1 + rnd.IntN(3) {
		name := files[rnd.IntN(len(files))]
		h := harms[rnd.IntN(len(harms))]
		data, err := os.ReadFile(filepath.Join(m.dir, name))
		if err != nil || len(data) == 0 {
			continue
		}
		did = append(did, h.name+" "+name)
		if data = h.do(bytes.Clone(data), rnd); data == nil {
			err = os.Remove(filepath.Join(m.dir, name))
		} else {
			err = os.WriteFile(filepath.Join(m.dir, name), data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return strings.Join(did, ", ")
}

// Damage of random kinds to random files of one of three members, while clients write: the others go on, nothing
// that was acknowledged is lost, and the member is whole again after its start, with nothing typed. The gate
// draws a sample.
func TestHeals(t *testing.T) {
	t.Parallel()
	withSeeds(t, func(t *testing.T, rnd *rand.Rand) {
		c := newCluster(t, 3)
		l := c.load(c.members...)
		l.more(t, 1300) // a snapshot is taken after 512 entries
		want := map[string]string{}
		l.stop(want)
		for i := range longtest.Of(60, 5) {
			m := c.members[i%3]
			what := ""
			l := c.load(c.other(m), c.other(m, c.other(m)))
			l.more(t, 20)
			m.kill(t)
			what = m.spoil(t, rnd)
			t.Logf("%s: %s", m.address, what)
			l.more(t, 20)
			c.start(m)
			c.waitRoles(3)
			l.stop(want)
			m.has(t, want, what)
		}
	})
}

// damage waits for what a member says of its damage.
func (m *testMember) damage(t *testing.T, state string) (x storedir.Damage) {
	t.Helper()
	within(t, "the damage is noted as "+state, func() bool {
		x, _ = storedir.Dir(m.dir).Damage()
		return x.State == state
	})
	return x
}

// logFiles lists the files of the log of a member.
func logFiles(t *testing.T, dir string) string {
	t.Helper()
	var out []string
	for line := range strings.Lines(listing(t, dir)) {
		if line[0] >= '0' && line[0] <= '9' || strings.HasPrefix(line, "open-") || strings.HasPrefix(line, "snapshot-") || strings.HasPrefix(line, "metadata") {
			out = append(out, line)
		}
	}
	return strings.Join(out, "")
}

// spoilAll damages all files of a kind, so that the member does not do without them.
func (m *testMember) spoilAll(t *testing.T, pattern string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(m.dir, pattern))
	if err != nil || len(files) == 0 {
		t.Fatalf("there is no %s: %v", pattern, err)
	}
	for _, path := range files {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		data[len(data)/2] ^= 1
		writeFile(t, path, data)
	}
}

const snapshotData = "snapshot-*[0-9]"

// A member that runs finds damage by itself, leaves for a moment and comes back with everything, because the
// others can go on without it.
func TestScrubHeals(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, "--check-files-interval=1s")
	for i := range 1300 {
		c.members[0].put(t, fmt.Sprintf("/load/%d", i%100), fmt.Sprint(i))
	}
	m := c.leader()
	m.spoilAll(t, snapshotData)
	x := m.damage(t, storedir.DamageHealed)
	if len(x.Healed) != 1 {
		t.Errorf("%+v", x)
	}
	if _, err := os.Stat(filepath.Join(x.Kept, x.File)); err != nil {
		t.Error(err)
	}
	c.serves(m)
	c.waitRoles(3)
	r, err := m.client.Get(testContext(t), "/load/", clientv3.WithPrefix())
	if err != nil || len(r.Kvs) != 100 || string(r.Kvs[0].Value) != "1200" {
		t.Errorf("%v, %v", r, err)
	}
}

// A member whose others have no leader waits for them, and says so; when they have one it heals.
func TestHealWaitsForTheOthers(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	for i := range 20 {
		c.members[0].put(t, fmt.Sprintf("/r/%d", i), "x")
	}
	for _, m := range c.members {
		m.kill(t)
	}
	m := c.members[2]
	m.spoilAll(t, "metadata[12]")
	c.launch(m)
	c.launch(c.members[0])
	if x := m.damage(t, storedir.DamageWaiting); x.Why == "" {
		t.Errorf("%+v", x)
	}
	c.launch(c.members[1])
	c.serves(m)
	m.damage(t, storedir.DamageHealed)
	if got := m.count(t); got != 20 {
		t.Errorf("%d of 20 keys are there", got)
	}
	c.waitRoles(3)
}

// Alone there is nobody to get the data from. What runs goes on from memory and says what is damaged; it does
// not start again, and nothing is changed.
func TestHealAlone(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, "--check-files-interval=1s")
	m := c.members[0]
	for i := range 1300 {
		m.put(t, fmt.Sprintf("/r/%d", i%100), fmt.Sprint(i))
	}
	m.spoilAll(t, snapshotData)
	if x := m.damage(t, storedir.DamageRunning); !strings.HasPrefix(x.File, "snapshot-") {
		t.Errorf("%+v", x)
	}
	m.put(t, "/r/goes-on", "x")
	m.kill(t)
	before := logFiles(t, m.dir)
	c.launch(m)
	if err := m.cmd.Wait(); err == nil {
		t.Error("it started")
	}
	if x := m.damage(t, storedir.DamageAlone); !strings.HasPrefix(x.File, "snapshot-") || x.What == "" {
		t.Errorf("%+v", x)
	}
	if after := logFiles(t, m.dir); after != before {
		t.Errorf("files before and after:\n%s\n%s", before, after)
	}
}

// A directory that was put back from an older copy, also one as of a stop, by which this member has forgotten what it acknowledged, is
// one that is damaged.
func TestHealsAfterAnOldCopy(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	m := c.prepare()
	common := t.TempDir()
	if err := os.MkdirAll(filepath.Join(common, "var/kubernetes"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(m.dir, filepath.Join(common, "var/kubernetes/backend")); err != nil {
		t.Fatal(err)
	}
	m.env = append(m.env, "SNAP_COMMON="+common)
	c.start(m)
	c.waitRoles(3)
	m.terminate(t)
	old := image(t, m.dir)
	c.start(m)
	c.members[1].kill(t) // what is acknowledged now is on this member
	for i := range 20 {
		m.put(t, fmt.Sprintf("/r/%d", i), "x")
	}
	c.start(c.members[1])
	m.terminate(t)
	entries, err := os.ReadDir(old)
	if err != nil {
		t.Fatal(err)
	}
	now, err := os.ReadDir(m.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range now {
		if e.Type().IsRegular() {
			os.Remove(filepath.Join(m.dir, e.Name()))
		}
	}
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(old, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(m.dir, e.Name()), data)
	}
	c.start(m)
	if x := m.damage(t, storedir.DamageHealed); !strings.Contains(x.What, "old copy") {
		t.Errorf("%+v", x)
	}
	if got := m.count(t); got != 20 {
		t.Errorf("%d of 20 keys are there", got)
	}
	c.waitRoles(3)
}

// A whole machine that was put back from a snapshot has an older marker, too. The other members remember how far its
// member had come, and it takes its data from them.
func TestHealsAfterASnapshotOfTheMachine(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	m := c.leader()
	for i := range 20 {
		m.put(t, fmt.Sprintf("/r/%d", i), "x")
	}
	m.kill(t)
	old := image(t, m.dir)
	c.start(m)
	c.waitRoles(3)
	_, before, _ := member.ProgressOf(old)
	// A vote is forgotten, and a write.
	id := storedirSelf(t, m).ID
	within(t, "the others have seen another term of the member", func() bool {
		_, _ = c.tool(m, ".transfer "+m.address)
		_, _ = c.tool(m, ".transfer "+c.other(m).address)
		return c.seen(t, c.other(m), id).Version > before.Version && c.seen(t, c.other(m, c.other(m)), id).Version > before.Version
	})
	m.kill(t)
	c.other(m).put(t, "/r/later", "x")
	now, err := os.ReadDir(m.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range now {
		os.RemoveAll(filepath.Join(m.dir, e.Name()))
	}
	if err := os.CopyFS(m.dir, os.DirFS(old)); err != nil {
		t.Fatal(err)
	}
	c.start(m)
	if x := m.damage(t, storedir.DamageHealed); !strings.Contains(x.What, "old copy") {
		t.Errorf("%+v", x)
	}
	if got := m.count(t); got != 21 {
		t.Errorf("%d of 21 keys are there", got)
	}
	c.waitRoles(3)
	if again := storedirSelf(t, m).ID; again == id {
		t.Error("it has the ID with which it has voted")
	}
}

// Two of three that were left out of a recovery would be the majority of the cluster that was. When they come back
// they hear of it, and do not start.
func TestLeftOutMembersDoNotGoOn(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	a, b, d := c.members[0], c.members[1], c.members[2]
	a.put(t, "/r/before", "x")
	for _, m := range c.members {
		m.kill(t)
	}
	if out, err := repair(a, "recover", "--others-are-gone"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	c.start(a)
	a.put(t, "/r/after", "x")
	c.launch(b)
	c.launch(d)
	for _, m := range []*testMember{b, d} {
		goesOn := time.AfterFunc(30*time.Second, func() { m.cmd.Process.Kill() })
		if err := m.cmd.Wait(); err == nil || !goesOn.Stop() {
			t.Errorf("it went on, or ended in good order: %v", err)
		}
		text, err := os.ReadFile(m.log)
		if err != nil || !strings.Contains(string(text), "was recovered without this member") || !strings.Contains(string(text), "microk8s leave --force --yes") {
			t.Errorf("%s, %v", text, err)
		}
	}
	if got := a.count(t); got != 2 {
		t.Errorf("%d of 2 keys are there", got)
	}
	if l := a.list(t); len(l) != 1 || !l[0].Leader {
		t.Errorf("the members: %v", l)
	}
}

func storedirSelf(t *testing.T, m *testMember) storedir.Member {
	t.Helper()
	self, err := storedir.Dir(m.dir).Self()
	if err != nil {
		t.Fatal(err)
	}
	return self
}

// seen is how far a member has seen another one, as it has written down.
func (*testCluster) seen(t *testing.T, m *testMember, id uint64) (p member.Progress) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(m.dir, storedir.SeenFile))
	if err != nil {
		return p
	}
	var s member.Seen
	if err := json.Unmarshal(data, &s); err != nil {
		t.Fatal(err)
	}
	return s[id]
}
