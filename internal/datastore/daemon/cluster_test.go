package daemon

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"microk8s/internal/datastore/member"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"

	"github.com/canonical/go-dqlite/v3/client"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// testMember is a daemon of a cluster, as a process of its own.
type testMember struct {
	dir, address string
	cmd          *exec.Cmd
	client       *clientv3.Client
	args         []string
	log          string // of all its lives
	env          []string
}

// testCluster is several daemons on loopback addresses.
type testCluster struct {
	t       *testing.T
	network string // 127.x.y: the members' addresses are in it
	members []*testMember
}

var networks struct {
	sync.Mutex
	n int
}

// newCluster starts n members, one after the other, and waits for their roles.
func newCluster(t *testing.T, n int, args ...string) *testCluster {
	t.Helper()
	networks.Lock()
	networks.n++
	c := &testCluster{t: t, network: fmt.Sprintf("127.%d.%d", 1+os.Getpid()%250, networks.n)}
	networks.Unlock()
	for range n {
		c.join(args...)
	}
	if n > 1 {
		c.waitRoles(min(n, 3))
	}
	return c
}

// join adds a member and waits until it serves.
func (c *testCluster) join(args ...string) *testMember {
	c.t.Helper()
	m := c.prepare(args...)
	c.start(m)
	return m
}

// prepare makes the directory of a further member.
func (c *testCluster) prepare(args ...string) *testMember {
	c.t.Helper()
	n := len(c.members)
	m := &testMember{dir: c.t.TempDir(), address: fmt.Sprintf("%s.%d:19001", c.network, n+1), args: args}
	init := "Address: " + m.address + "\n"
	if n == 0 {
		writeKeyPair(c.t, m.dir, "node")
	} else {
		for _, f := range []string{storedir.CertFile, storedir.KeyFile} {
			data, err := os.ReadFile(filepath.Join(c.members[0].dir, f))
			if err != nil {
				c.t.Fatal(err)
			}
			writeFile(c.t, filepath.Join(m.dir, f), data)
		}
		var list []string
		for _, o := range c.members {
			list = append(list, o.address)
		}
		init += "Cluster: [" + strings.Join(list, ", ") + "]\n"
	}
	writeFile(c.t, filepath.Join(m.dir, "init.yaml"), []byte(init))
	m.log = filepath.Join(c.t.TempDir(), "log")
	m.env = append(os.Environ(), "TEST_K8S_DQLITE=1")
	c.t.Cleanup(func() {
		if m.cmd != nil {
			if c.t.Failed() {
				m.cmd.Process.Signal(syscall.SIGABRT) // says what it is doing
			} else {
				m.cmd.Process.Kill()
			}
			m.cmd.Wait()
		}
		if text, err := os.ReadFile(m.log); err == nil && c.t.Failed() {
			if dir := os.Getenv("TEST_LOGS"); dir != "" {
				os.WriteFile(filepath.Join(dir, strings.TrimSuffix(m.address, ":19001")), text, 0o600)
			}
			c.t.Logf("end of the log of %s:\n%s", m.address, text[max(0, len(text)-20000):])
		}
	})
	c.members = append(c.members, m)
	return m
}

// launch starts a member's process.
func (c *testCluster) launch(m *testMember) {
	socket := filepath.Join(m.dir, "kine.sock:12379")
	os.Remove(socket)
	cmd := exec.Command(os.Args[0], append([]string{"--storage-dir", m.dir, "--listen", "unix://" + socket}, m.args...)...)
	cmd.Env, cmd.SysProcAttr = m.env, &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	log, err := os.OpenFile(m.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		c.t.Error(err)
		return
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		c.t.Error(err)
		return
	}
	m.cmd = cmd
}

func (c *testCluster) start(m *testMember) {
	c.t.Helper()
	c.launch(m)
	c.serves(m)
}

// serves waits until a member serves, and connects to it.
func (c *testCluster) serves(m *testMember) {
	c.t.Helper()
	socket := filepath.Join(m.dir, "kine.sock:12379")
	within(c.t, "the daemon at "+m.address+" serves", func() bool {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			return false
		}
		conn.Close()
		return true
	})
	if m.client == nil {
		m.client = dial(c.t, "unix://"+socket)
	}
}

// within waits for something that other processes do, and that nothing here announces.
func within(t *testing.T, what string, fn func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !fn() {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (m *testMember) kill(t *testing.T) {
	t.Helper()
	if err := m.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	m.cmd.Wait()
}

// terminate ends a daemon as its service manager does.
func (m *testMember) terminate(t *testing.T) {
	t.Helper()
	if err := m.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := m.cmd.Wait(); err != nil {
		t.Fatalf("the daemon at %s ended with %v", m.address, err)
	}
}

func (m *testMember) list(t *testing.T) []peers.Member {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	got, _ := peers.Members(ctx, m.dir)
	return got
}

// tool runs a command of the program dqlite on a member's directory.
func (c *testCluster) tool(m *testMember, command string) (string, error) {
	file := func(name string) string { return filepath.Join(m.dir, name) }
	cmd := exec.Command(os.Args[0], "-s", "file://"+file("cluster.yaml"), "-c", file(storedir.CertFile), "-k", file(storedir.KeyFile), "k8s", command)
	cmd.Env = append(os.Environ(), "TEST_K8S_DQLITE=tool")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// waitRoles waits until every running member names the same leader and so many voters that are
// online.
func (c *testCluster) waitRoles(voters int) {
	c.t.Helper()
	if voters == 2 {
		voters = 1
	}
	within(c.t, fmt.Sprintf("%d voters and one leader", voters), func() bool {
		leaders := map[string]bool{}
		for _, m := range c.members {
			if m.cmd == nil || m.cmd.ProcessState != nil {
				continue
			}
			n, lead := 0, 0
			for _, p := range m.list(c.t) {
				if p.Role == storedir.Voter && p.Online {
					n++
				}
				if p.Leader {
					lead++
					leaders[p.Address] = true
				}
			}
			if n != voters || lead != 1 {
				return false
			}
		}
		return len(leaders) == 1
	})
}

// leader returns the member that leads.
func (c *testCluster) leader() *testMember {
	c.t.Helper()
	var found *testMember
	within(c.t, "somebody leads", func() bool {
		for _, m := range c.members {
			if m.cmd == nil || m.cmd.ProcessState != nil {
				continue
			}
			for _, p := range m.list(c.t) {
				if p.Self && p.Leader {
					found = m
					return true
				}
			}
		}
		return false
	})
	return found
}

func (c *testCluster) other(than ...*testMember) *testMember {
next:
	for _, m := range c.members {
		for _, o := range than {
			if m == o {
				continue next
			}
		}
		if m.cmd != nil && m.cmd.ProcessState == nil {
			return m
		}
	}
	c.t.Fatal("no other member runs")
	return nil
}

// put writes until it works, and gives the revision.
func (m *testMember) put(t *testing.T, key, value string) int64 {
	t.Helper()
	var rev int64
	within(t, "a write through "+m.address, func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		r, err := m.client.Put(ctx, key, value)
		if err == nil {
			rev = r.Header.Revision
		}
		return err == nil
	})
	return rev
}

func (m *testMember) get(t *testing.T, key string) string {
	t.Helper()
	r, err := m.client.Get(testContext(t), key)
	if err != nil {
		t.Fatalf("reading at %s: %v", m.address, err)
	}
	if len(r.Kvs) == 0 {
		return ""
	}
	return string(r.Kvs[0].Value)
}

func TestThreeMembers(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	// Written anywhere, read everywhere at once.
	for i, m := range c.members {
		key, value := fmt.Sprintf("/k/%d", i), fmt.Sprint(i)
		m.put(t, key, value)
		for _, o := range c.members {
			if got := o.get(t, key); got != value {
				t.Errorf("%s was written through %s and is %q at %s", key, m.address, got, o.address)
			}
		}
	}
	// A watch on one member survives the death of the leader, and loses nothing.
	old := c.leader()
	watcher := c.other(old)
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	w := watcher.client.Watch(ctx, "/w/", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	<-w
	first := watcher.put(t, "/w/1", "before")
	begin := time.Now()
	old.kill(t)
	second := watcher.put(t, "/w/2", "after")
	t.Logf("writes work again after %v", time.Since(begin))
	if second <= first {
		t.Errorf("the revision went from %d to %d", first, second)
	}
	var seen []string
	for len(seen) < 2 {
		r, ok := <-w
		if !ok || r.Err() != nil {
			t.Fatalf("the watch ended: %v", r.Err())
		}
		for _, ev := range r.Events {
			seen = append(seen, string(ev.Kv.Value))
		}
	}
	if seen[0] != "before" {
		t.Errorf("events: %q", seen)
	}
	c.start(old)
	c.waitRoles(3)
	if got := old.get(t, "/w/2"); got != "after" {
		t.Errorf("after its return, it reads %q", got)
	}
}

// A leader that was frozen while another began to lead finds requests waiting when it runs
// again, before it hears of the other. Those that write nothing must not be answered from its
// past either: a compare that fails is a read.
func TestFrozenLeaderAnswersNothingOld(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	for i := range 3 {
		old := c.leader()
		old.put(t, "/k", fmt.Sprint(i, " before"))
		old.cmd.Process.Signal(syscall.SIGSTOP)
		now := c.other(old).put(t, "/k", fmt.Sprint(i, " after"))

		exists := clientv3.Compare(clientv3.ModRevision("/k"), "=", 0)
		asked := map[string]clientv3.Txn{
			"create": old.client.Txn(testContext(t)).If(exists).Then(clientv3.OpPut("/k", "x")),
			"update": old.client.Txn(testContext(t)).If(exists).Then(clientv3.OpPut("/k", "x")).Else(clientv3.OpGet("/k")),
			"read":   old.client.Txn(testContext(t)).Then(clientv3.OpGet("/k")),
		}
		var answers sync.WaitGroup
		for name, txn := range asked {
			answers.Add(1)
			go func() {
				defer answers.Done()
				r, err := txn.Commit()
				if err != nil {
					return // its outcome is not known, which is right
				}
				if r.Header.Revision < now {
					t.Errorf("%s was answered at revision %d, and %d had been acknowledged before", name, r.Header.Revision, now)
				}
			}()
		}
		time.Sleep(100 * time.Millisecond) // the requests wait in the socket; it is frozen and cannot say so
		old.cmd.Process.Signal(syscall.SIGCONT)
		answers.Wait()
		c.waitRoles(3)
	}
}

// roleOf returns what a member says of itself.
func (m *testMember) roleOf(t *testing.T) (role storedir.Role, ok bool) {
	for _, p := range m.list(t) {
		if p.Self {
			return p.Role, true
		}
	}
	return 0, false
}

// With five members two stand by. A voter that dies is replaced, and one that comes back takes
// what is left; a removed member is gone from every list, and refused.
func TestFiveMembers(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 5)
	count := func(role storedir.Role) (n int) {
		for _, p := range c.leader().list(t) {
			if p.Role == role && p.Online {
				n++
			}
		}
		return n
	}
	within(t, "two members stand by", func() bool { return count(storedir.StandBy) == 2 })
	leader := c.leader()
	var voter *testMember
	for _, m := range c.members {
		if r, _ := m.roleOf(t); r == storedir.Voter && m != leader {
			voter = m
		}
	}
	replaced := func(m *testMember) bool {
		for _, p := range c.leader().list(t) {
			if p.Address == m.address && p.Role == storedir.Voter {
				return false
			}
		}
		return count(storedir.Voter) == 3
	}
	voter.kill(t)
	begin := time.Now()
	within(t, "the voter is replaced", func() bool { return replaced(voter) })
	t.Logf("a dead voter was replaced after %v", time.Since(begin))
	c.start(voter)
	within(t, "it stands by", func() bool { r, ok := voter.roleOf(t); return ok && r == storedir.StandBy })

	leader.kill(t)
	begin = time.Now()
	within(t, "the leader is replaced", func() bool { return replaced(leader) })
	t.Logf("a dead leader was replaced after %v", time.Since(begin))

	other := c.leader()
	if err := peers.Remove(testContext(t), other.dir, leader.address); err != nil {
		t.Fatal(err)
	}
	within(t, "it is gone from the lists", func() bool {
		for _, m := range c.members {
			for _, p := range m.list(t) {
				if m != leader && p.Address == leader.address {
					return false
				}
			}
		}
		return true
	})
	// It does not come back by being started.
	c.launch(leader)
	within(t, "it says that it was removed", func() bool {
		text, _ := os.ReadFile(leader.log)
		return strings.Contains(string(text), "was removed from the cluster") || strings.Contains(string(text), "not a member of the datastore")
	})
	other.put(t, "/still", "works")
}

// The voters are in as many failure domains as there are, whoever of them comes and goes.
func TestFailureDomains(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 0)
	domains := map[string]string{} // by address
	for _, domain := range []string{"1", "1", "1", "2", "3"} {
		m := c.prepare()
		writeFile(t, filepath.Join(m.dir, "failure-domain"), []byte(domain+"\n"))
		c.start(m)
		domains[m.address] = domain
	}
	voters := func() (in string, members map[string]*testMember) {
		members = map[string]*testMember{}
		var list []string
		for _, p := range c.leader().list(t) {
			if p.Role != storedir.Voter {
				continue
			}
			list = append(list, domains[p.Address])
			for _, m := range c.members {
				if m.address == p.Address {
					members[domains[p.Address]] = m
				}
			}
		}
		slices.Sort(list)
		return strings.Join(list, " "), members
	}
	wait := func(want string) {
		t.Helper()
		within(t, "the voters are in "+want, func() bool { in, _ := voters(); return in == want })
	}
	wait("1 2 3")
	_, members := voters()
	first := members["1"]
	first.kill(t) // another of its domain takes its place
	within(t, "another of the domain votes", func() bool { in, now := voters(); return in == "1 2 3" && now["1"] != first })
	c.start(first)

	lost := members["2"]
	lost.kill(t) // nobody else is in its domain
	wait("1 1 3")
	c.start(lost)
	wait("1 2 3")
}

// The leader ends when only it knows that the other member votes as well. Neither can lead
// without the other then, so the other has to vote although it does not know that it may.
func TestVoterThatDoesNotKnowYet(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	a := c.leader()
	b := c.other(a)
	a.put(t, "/k", "1")
	var members []client.NodeInfo
	for _, p := range a.list(t) {
		members = append(members, client.NodeInfo{ID: p.ID, Address: p.Address, Role: client.Voter})
	}
	b.kill(t)
	a.kill(t)
	if err := member.Reconfigure(a.dir, members); err != nil {
		t.Fatal(err)
	}
	c.launch(a)
	c.launch(b)
	c.serves(a)
	c.serves(b)
	b.put(t, "/k", "2")
	if got := a.get(t, "/k"); got != "2" {
		t.Errorf("%q is read", got)
	}
}

// Of two members only the leader votes. When it stops, the other goes on alone; when it is
// back, it is the spare.
func TestTwoMembers(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	a := c.leader()
	b := c.other(a)
	within(t, "the second member knows that it is the spare", func() bool { r, ok := b.roleOf(t); return ok && r == storedir.Spare })
	b.put(t, "/k", "1")
	a.terminate(t)
	b.put(t, "/k", "2")
	c.start(a)
	if got := a.get(t, "/k"); got != "2" {
		t.Errorf("the member that came back reads %q", got)
	}
	within(t, "it does not vote", func() bool { r, ok := a.roleOf(t); return ok && r == storedir.Spare })
	// The only voter leaves, while it leads.
	if err := peers.Remove(testContext(t), a.dir, b.address); err != nil {
		t.Fatal(err)
	}
	b.kill(t)
	a.put(t, "/k", "3")
	if got := a.get(t, "/k"); got != "3" {
		t.Errorf("the last member reads %q", got)
	}
	within(t, "one member is left, and votes", func() bool {
		l := a.list(t)
		return len(l) == 1 && l[0].Role == storedir.Voter && l[0].Leader
	})
}

// A stop hands leadership over: writes through others go on without an election.
func TestHandover(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	old := c.leader()
	other := c.other(old)
	other.put(t, "/k", "1")
	old.terminate(t)
	other.put(t, "/k", "2")
	text, err := os.ReadFile(old.log)
	if err != nil || !strings.Contains(string(text), "handing leadership over") || strings.Contains(string(text), "stay with this member") {
		t.Errorf("leadership was not handed over: %v\n%s", err, text)
	}
	// The stand-by took the place of the voter before that one ended, and not after a time.
	voters := 0
	for _, p := range other.list(t) {
		if p.Role == storedir.Voter && p.Address != old.address {
			voters++
		}
	}
	if voters != 3 {
		t.Errorf("%d voters are left", voters)
	}
}

// Leases live on when the leader dies: their keys go, and not too early.
func TestLeaseAcrossFailover(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	old := c.leader()
	other := c.other(old)
	const ttl = 4
	lease, err := other.client.Grant(testContext(t), ttl)
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if _, err := other.client.Put(testContext(t), "/leased", "x", clientv3.WithLease(lease.ID)); err != nil {
		t.Fatal(err)
	}
	w := other.client.Watch(testContext(t), "/leased", clientv3.WithCreatedNotify())
	<-w
	old.kill(t)
	for r := range w {
		if err := r.Err(); err != nil {
			t.Fatal(err)
		}
		for _, ev := range r.Events {
			if ev.Type == clientv3.EventTypeDelete {
				if lived := time.Since(begin); lived < ttl*time.Second {
					t.Errorf("the key lived for %v only", lived)
				}
				return
			}
		}
	}
	t.Fatal("the watch ended")
}

// A node waits for its cluster, says for whom, and joins when it is there. One whose address
// belongs to a member is not added.
func TestJoinWaitsAndIsRefused(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	first := c.members[0]
	first.put(t, "/k", "1")
	first.terminate(t)
	second := c.prepare()
	c.launch(second)
	within(t, "it says whom it asks", func() bool {
		text, _ := os.ReadFile(second.log)
		return strings.Contains(string(text), "cannot join") && strings.Contains(string(text), first.address)
	})
	c.start(first)
	c.serves(second)
	if got := second.get(t, "/k"); got != "1" {
		t.Errorf("the new member reads %q", got)
	}
	second.kill(t)
	again := c.prepare()
	again.address = second.address
	writeFile(t, filepath.Join(again.dir, "init.yaml"), []byte("Address: "+second.address+"\nCluster: ["+first.address+"]\n"))
	c.launch(again)
	within(t, "it is refused", func() bool {
		text, _ := os.ReadFile(again.log)
		return strings.Contains(string(text), "is the address or the id of a member already")
	})
	if n := len(first.list(t)); n != 2 {
		t.Errorf("there are %d members", n)
	}
}

// All members killed at once under load: what was acknowledged is there.
func TestKillAllUnderLoad(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	var mu sync.Mutex
	acked := map[string]int64{}
	ctx, cancel := context.WithCancel(testContext(t))
	enough := make(chan struct{})
	var wg sync.WaitGroup
	for i, m := range c.members {
		for j := range 4 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for k := 0; ; k++ {
					key := fmt.Sprintf("/a/%d-%d-%d", i, j, k)
					r, err := m.client.Put(ctx, key, strings.Repeat("x", 1000))
					if err != nil {
						return
					}
					mu.Lock()
					acked[key] = r.Header.Revision
					if len(acked) == 2000 {
						close(enough)
					}
					mu.Unlock()
				}
			}()
		}
	}
	select {
	case <-enough:
	case <-ctx.Done():
		t.Fatal("too few writes were acknowledged")
	}
	for _, m := range c.members {
		if err := m.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	for _, m := range c.members {
		m.cmd.Wait()
	}
	cancel()
	wg.Wait()
	for _, m := range c.members {
		c.launch(m)
	}
	for _, m := range c.members {
		c.serves(m)
		r, err := m.client.Get(testContext(t), "/a/", clientv3.WithPrefix())
		if err != nil {
			t.Fatal(err)
		}
		stored := map[string]int64{}
		for _, kv := range r.Kvs {
			stored[string(kv.Key)] = kv.ModRevision
		}
		for k, rev := range acked {
			if stored[k] != rev {
				t.Fatalf("%s was acknowledged at %d and is at %d on %s", k, rev, stored[k], m.address)
			}
		}
	}
}

// A member that was taken out while it runs has nothing to hand over: it ends without waiting for a
// leader that would take its role.
func TestRemovedMemberEnds(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	leader := c.leader()
	m := c.other(leader)
	if err := peers.Remove(testContext(t), leader.dir, m.address); err != nil {
		t.Fatal(err)
	}
	said := func(what string) int {
		text, err := os.ReadFile(m.log)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(text), what)
	}
	const stream = `reason="this node is not a member of the datastore"`
	within(t, "it finds out, and does so again and again", func() bool { return said(stream) > 3 })
	m.terminate(t)
	if n := said("was removed from the cluster"); n != 1 {
		t.Errorf("it says %d times that it was removed", n)
	}
	if said("stay with this member") > 0 {
		t.Error("it waited for somebody to take its role")
	}
}
