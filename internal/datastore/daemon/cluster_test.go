package daemon

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"microk8s/internal/datastore/peers"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// testMember is a daemon of a cluster, as a process of its own.
type testMember struct {
	dir, address string
	cmd          *exec.Cmd
	client       *clientv3.Client
	args         []string
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
		for _, f := range []string{peers.CertFile, peers.KeyFile} {
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
	c.members = append(c.members, m)
	return m
}

func (c *testCluster) launch(m *testMember) {
	c.t.Helper()
	os.Remove(filepath.Join(m.dir, "kine.sock:12379"))
	m.cmd = launch(c.t, m.dir, m.args...)
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
				if p.Role == peers.Voter && p.Online {
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

// leader gives the member that leads.
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
