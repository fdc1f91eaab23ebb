package network

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/flannel-io/flannel/pkg/lease"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"microk8s/internal/hostnet"
	"microk8s/internal/snapenv"
)

var cluster4 = []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}

// TestMain lets the test program be one node: Run starts goroutines, and those are in another
// network namespace only if their whole process is.
func TestMain(m *testing.M) {
	if os.Getenv("NETWORK_TEST_CHECK") != "" {
		os.Exit(checkMain())
	}
	if os.Getenv("NETWORK_TEST_NODE") != "" {
		os.Exit(nodeMain())
	}
	os.Exit(m.Run())
}

// nodeMain runs the pod network of one node until it is told to end; "ready" on stdout says
// that pods can be started.
func nodeMain() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	client, err := kubernetes.NewForConfig(&rest.Config{Host: "http://api", Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", os.Getenv("NETWORK_TEST_API"))
	}})
	if err == nil {
		err = Run(ctx, Options{
			Env: snapenv.Under(os.Getenv("NETWORK_TEST_ROOT")), Client: client, NodeName: os.Getenv("NETWORK_TEST_NODE"),
			ClusterCIDR: "10.1.0.0/16", Backend: os.Getenv("NETWORK_TEST_BACKEND"),
			EndSandbox: func(_ context.Context, id string) error {
				f, err := os.OpenFile(filepath.Join(os.Getenv("NETWORK_TEST_ROOT"), "ended"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
				if err != nil {
					return err
				}
				defer f.Close()
				_, err = fmt.Fprintln(f, id)
				return err
			},
			Ready: func() { fmt.Println("ready") }, Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
		})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// machine is one host of a test: a network namespace, a directory, and the node's process.
type machine struct {
	t       *testing.T
	name    string
	ns      netns.NsHandle
	env     snapenv.Env
	api     string
	backend string

	cmd   *exec.Cmd
	ready chan struct{}
	log   strings.Builder
}

// in runs f on a thread of the machine's namespace that ends with f.
func (m *machine) in(f func()) {
	m.t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := netns.Set(m.ns)
		if err == nil {
			f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) start() {
	m.t.Helper()
	m.cmd = exec.Command("/proc/self/exe")
	m.cmd.Env = append(os.Environ(), "NETWORK_TEST_NODE="+m.name, "NETWORK_TEST_ROOT="+m.env.Host, "NETWORK_TEST_API="+m.api, "NETWORK_TEST_BACKEND="+m.backend)
	m.cmd.Stderr = &m.log
	out, err := m.cmd.StdoutPipe()
	if err != nil {
		m.t.Fatal(err)
	}
	// On a thread of the namespace, so that the process is in it; not one that ends, since
	// the process is told to die with it.
	m.in(func() { err = m.cmd.Start() })
	if err != nil {
		m.t.Fatal(err)
	}
	m.ready = make(chan struct{})
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			if s.Text() == "ready" {
				close(m.ready)
			}
		}
	}()
}

func (m *machine) awaitReady() {
	m.t.Helper()
	select {
	case <-m.ready:
	case <-time.After(60 * time.Second):
		m.stop()
		m.t.Fatalf("%s does not become ready\n%s", m.name, m.log.String())
	}
}

func (m *machine) stop() {
	if m.cmd == nil {
		return
	}
	m.t.Helper()
	m.cmd.Process.Signal(syscall.SIGTERM)
	if err := m.cmd.Wait(); err != nil {
		m.t.Errorf("%s ended with %v\n%s", m.name, err, m.log.String())
	}
	m.cmd = nil
}

// newCluster makes two machines on one wire, without default routes.
func newCluster(t *testing.T, backend string) (*fakeAPI, *machine, *machine) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	dir := t.TempDir()
	api := filepath.Join(dir, "api.sock")
	f := newFakeAPI(t, api)
	two := [2]*machine{}
	for i := range two {
		m := &machine{t: t, name: fmt.Sprintf("node%d", i), env: snapenv.Under(filepath.Join(dir, fmt.Sprint(i))), api: api, backend: backend}
		done := make(chan error)
		go func() {
			runtime.LockOSThread()
			var err error
			m.ns, err = netns.New()
			done <- err
		}()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			m.stop()
			m.ns.Close()
		})
		two[i] = m
	}
	a, b := two[0], two[1]
	a.in(func() {
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(b.ns)}); err != nil {
			t.Error(err)
		}
	})
	for i, m := range two {
		m.in(func() {
			m.up("lo", "")
			m.up("eth0", fmt.Sprintf("192.0.2.%d/24", i+1))
		})
	}
	return f, a, b
}

// up gives an interface of the current namespace an address and switches it on.
func (m *machine) up(name, addr string) {
	l, err := netlink.LinkByName(name)
	if err == nil && addr != "" {
		var a *netlink.Addr
		if a, err = netlink.ParseAddr(addr); err == nil {
			err = netlink.AddrReplace(l, a) // the network may have been faster
		}
	}
	if err == nil {
		err = netlink.LinkSetUp(l)
	}
	if err != nil {
		m.t.Errorf("%s: %v", name, err)
	}
}

// bridge stands in for the CNI plugin: the bridge with the gateway's address.
func (m *machine) bridge(addr string) {
	m.in(func() {
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: hostnet.Bridge}}); err != nil {
			m.t.Error(err)
		}
		m.up(hostnet.Bridge, addr)
	})
}

// reach waits until a datagram from one machine arrives at an address of the other.
func reach(t *testing.T, from, to *machine, addr string) {
	t.Helper()
	var server net.PacketConn
	var err error
	to.in(func() { server, err = net.ListenPacket("udp4", addr+":0") })
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	buf := make([]byte, 1)
	for range 200 {
		from.in(func() {
			if c, err := net.Dial("udp4", server.LocalAddr().String()); err == nil {
				c.Write([]byte("x"))
				c.Close()
			}
		})
		server.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if _, _, err := server.ReadFrom(buf); err == nil {
			return
		}
	}
	t.Fatalf("%s does not reach %s on %s\n%s", from.name, addr, to.name, from.log.String())
}

// await waits until a condition holds on a machine.
func (m *machine) await(what string, ok func() bool) {
	m.t.Helper()
	for deadline := time.Now().Add(60 * time.Second); ; {
		var held bool
		m.in(func() { held = ok() })
		if held {
			return
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("%s: no %s\n%s", m.name, what, m.log.String())
		}
		time.Sleep(20 * time.Millisecond) // between looks; the condition is what counts
	}
}

func (m *machine) routes(dst string) bool {
	routes, _ := netlink.RouteList(nil, netlink.FAMILY_V4)
	for _, r := range routes {
		if r.Dst != nil && r.Dst.String() == dst && r.Gw != nil {
			return true
		}
	}
	return false
}

func newNode(name, podCIDR, address string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if podCIDR != "" {
		n.Spec.PodCIDR, n.Spec.PodCIDRs = podCIDR, []string{podCIDR}
	}
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: name}, {Type: corev1.NodeInternalIP, Address: address}}
	return n
}

// Two machines, as real as they get without Kubernetes: packets go from one to the pods of
// the other, through what may happen to a node.
func TestTwoNodes(t *testing.T) {
	for _, backend := range []string{BackendVXLAN, BackendHostGW} {
		t.Run(backend, func(t *testing.T) {
			f, a, b := newCluster(t, backend)
			a.start() // before there is a node at all
			f.set(newNode("node0", "", "192.0.2.1"))
			f.set(newNode("node0", "10.1.0.0/24", "192.0.2.1"))
			f.set(newNode("node1", "10.1.1.0/24", "192.0.2.2"))
			b.start()
			a.awaitReady()
			b.awaitReady()
			a.bridge("10.1.0.1/24")
			b.bridge("10.1.1.1/24")
			reach(t, a, b, "10.1.1.1")
			reach(t, b, a, "10.1.0.1")

			if got := f.get("node0").Annotations[annotationPublic]; got != "192.0.2.1" {
				t.Errorf("node0 announces %q", got)
			}
			config, err := os.ReadFile(hostnet.Conflist(a.env))
			wantMTU := map[string]string{BackendVXLAN: `"mtu": 1450`, BackendHostGW: `"mtu": 1500`}[backend]
			if err != nil || !strings.Contains(string(config), `"10.1.0.0/24"`) || !strings.Contains(string(config), wantMTU) {
				t.Errorf("CNI configuration lacks subnet or %s (%v):\n%s", wantMTU, err, config)
			}

			t.Log("a restart of the process leaves the network up meanwhile")
			a.stop()
			reach(t, b, a, "10.1.0.1")
			a.start()
			a.awaitReady()
			reach(t, a, b, "10.1.1.1")

			if backend == BackendVXLAN {
				t.Log("the tunnel is made again when it vanishes")
				a.in(func() {
					if l, err := netlink.LinkByName(hostnet.Tunnel); err != nil || netlink.LinkDel(l) != nil {
						t.Error("cannot delete the tunnel")
					}
				})
				reach(t, a, b, "10.1.1.1")
				reach(t, b, a, "10.1.0.1")
			}

			t.Log("a node that lost its annotations gets them again")
			f.set(newNode("node1", "10.1.1.0/24", "192.0.2.2"))
			b.await("annotations", func() bool { return f.get("node1").Annotations[annotationManaged] == "true" })
			reach(t, a, b, "10.1.1.1")

			t.Log("a node that gets another address announces it")
			b.in(func() { b.up("eth0", "192.0.2.22/24") })
			moved := f.get("node1")
			moved.Status.Addresses[1].Address = "192.0.2.22"
			f.set(moved)
			b.await("new address", func() bool { return f.get("node1").Annotations[annotationPublic] == "192.0.2.22" })
			reach(t, a, b, "10.1.1.1")

			t.Log("a node that claims another's subnet gets none of its packets, and one outside of the cluster stops nothing")
			for i, cidr := range []string{"10.1.1.0/24", "192.168.77.0/24"} {
				thief := newNode(fmt.Sprintf("thief%d", i), cidr, "192.0.2.9")
				thief.CreationTimestamp = metav1.NewTime(time.Unix(int64(time.Hour/time.Second), 0))
				thief.Annotations = maps.Clone(f.get("node1").Annotations)
				thief.Annotations[annotationPublic] = "192.0.2.9"
				f.set(thief)
			}
			f.set(newNode("node2", "10.1.2.0/24", "192.0.2.9")) // seen after both
			node2 := f.get("node2")
			node2.Annotations = maps.Clone(f.get("node1").Annotations)
			node2.Annotations[annotationPublic] = "192.0.2.9"
			node2.Annotations[annotationData] = `{"VNI":1,"VtepMAC":"02:00:00:00:00:99"}`
			f.set(node2)
			if backend == BackendVXLAN {
				a.await("route to node2", func() bool { return a.routes("10.1.2.0/24") })
			}
			reach(t, a, b, "10.1.1.1")
			for _, name := range []string{"thief0", "thief1", "node2"} {
				f.remove(name)
			}

			t.Log("a node that goes is forgotten")
			b.stop()
			f.remove("node1")
			a.await("end of the route to node1", func() bool { return !a.routes("10.1.1.0/24") })

			t.Log("cleanup takes everything away")
			a.stop()
			a.in(func() {
				if err := Cleanup(context.Background(), a.env); err != nil {
					t.Error(err)
				}
				links, _ := netlink.LinkList()
				for _, l := range links {
					if n := l.Attrs().Name; n != "lo" && n != "eth0" && l.Type() != "ifb" {
						t.Errorf("link %s is left", n)
					}
				}
				if out, err := exec.Command("nft", "list", "ruleset").CombinedOutput(); err != nil || len(out) > 0 {
					t.Errorf("rules are left (%v):\n%s", err, out)
				}
			})
		})
	}
}

// With a CNI of the user's own nothing is done, and what was done before is undone.
func TestStandsAside(t *testing.T) {
	_, a, _ := newCluster(t, BackendVXLAN)
	if err := hostnet.WriteConflist(a.env, cluster4, 1450); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(a.env.CNIManifest(), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	a.start()
	a.await("removal of the CNI configuration", func() bool {
		_, err := os.Stat(hostnet.Conflist(a.env))
		return os.IsNotExist(err)
	})
	a.stop()
	a.in(func() {
		if out, err := exec.Command("nft", "list", "ruleset").CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("there are rules (%v):\n%s", err, out)
		}
	})
}

func TestBadOptions(t *testing.T) {
	good := Options{Env: snapenv.Under(t.TempDir()), NodeName: "n", ClusterCIDR: "10.1.0.0/16", Log: slog.New(slog.DiscardHandler)}
	for name, change := range map[string]func(*Options){
		"no node name":    func(o *Options) { o.NodeName = "" },
		"no cluster CIDR": func(o *Options) { o.ClusterCIDR = "" },
		"unknown backend": func(o *Options) { o.Backend = "udp" },
		"absurd MTU":      func(o *Options) { o.MTU = 50 },
		"no credentials":  func(o *Options) { o.Kubeconfig = filepath.Join(t.TempDir(), "missing") },
	} {
		t.Run(name, func(t *testing.T) {
			o := good
			change(&o)
			if err := Run(t.Context(), o); err == nil {
				t.Error("no error")
			}
		})
	}
}

func TestPodCIDRs(t *testing.T) {
	dual := append(cluster4[:1:1], netip.MustParsePrefix("fd01::/64"))
	for _, tc := range []struct {
		name    string
		node    []string
		cluster []netip.Prefix
		want    string // "" for an error
	}{
		{"none yet", nil, cluster4, "[]"},
		{"one", []string{"10.1.3.0/24"}, cluster4, "[10.1.3.0/24]"},
		{"order of the cluster", []string{"fd01::/80", "10.1.3.0/24"}, dual, "[10.1.3.0/24 fd01::/80]"},
		{"second family not used", []string{"10.1.3.0/24", "fd01::/80"}, cluster4, "[10.1.3.0/24]"},
		{"of another cluster", []string{"10.2.3.0/24"}, cluster4, ""},
		{"bad", []string{"x"}, cluster4, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := &corev1.Node{}
			n.Spec.PodCIDRs = tc.node
			got, err := podCIDRs(n, tc.cluster)
			if (err != nil) != (tc.want == "") || err == nil && fmt.Sprint(got) != tc.want {
				t.Errorf("got %v, %v, want %s", got, err, tc.want)
			}
		})
	}
}

func TestLeaseChanges(t *testing.T) {
	node := func(subnet, public, data string) lease.Lease {
		n := newNode("x", subnet, public)
		n.Annotations = map[string]string{annotationManaged: "true", annotationType: "vxlan", annotationPublic: public, annotationData: data}
		l, ok := leaseOf(n, cluster4)
		if !ok {
			t.Fatal("no lease")
		}
		return l
	}
	type state = map[string]lease.Lease
	one := node("10.1.1.0/24", "192.0.2.1", `{"VNI":1}`)
	for _, tc := range []struct {
		name          string
		before, after state
		want          string
	}{
		{"nothing", state{"a": one}, state{"a": one}, ""},
		{"added", state{}, state{"a": one}, "+10.1.1.0/24 192.0.2.1"},
		{"removed", state{"a": one}, state{}, "-10.1.1.0/24 192.0.2.1"},
		{"moved", state{"a": one}, state{"a": node("10.1.1.0/24", "192.0.2.9", `{"VNI":1}`)}, "-10.1.1.0/24 192.0.2.1 +10.1.1.0/24 192.0.2.9"},
		{"new hardware address", state{"a": one}, state{"a": node("10.1.1.0/24", "192.0.2.1", `{"VNI":2}`)}, "-10.1.1.0/24 192.0.2.1 +10.1.1.0/24 192.0.2.1"},
		{"another node takes the subnet", state{"a": one}, state{"b": node("10.1.1.0/24", "192.0.2.2", `{}`)}, "-10.1.1.0/24 192.0.2.1 +10.1.1.0/24 192.0.2.2"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got []string
			for _, e := range leaseChanges(tc.before, tc.after) {
				sign := map[lease.EventType]string{lease.EventAdded: "+", lease.EventRemoved: "-"}[e.Type]
				got = append(got, sign+e.Lease.Subnet.String()+" "+e.Lease.Attrs.PublicIP.String())
			}
			if strings.Join(got, " ") != tc.want {
				t.Errorf("got %q, want %q", strings.Join(got, " "), tc.want)
			}
		})
	}
}

// Foreign and half-written annotations are no lease, and no panic.
func TestLeaseOfOthers(t *testing.T) {
	for name, a := range map[string]map[string]string{
		"none":            nil,
		"not managed":     {annotationPublic: "192.0.2.1"},
		"without address": {annotationManaged: "true"},
		"bad address":     {annotationManaged: "true", annotationPublic: "x"},
	} {
		n := newNode("x", "10.1.1.0/24", "192.0.2.1")
		n.Annotations = a
		if _, ok := leaseOf(n, cluster4); ok {
			t.Errorf("%s: a lease", name)
		}
	}
}

// What a node writes about itself takes nothing from another: who was there first keeps it.
func TestOwners(t *testing.T) {
	node := func(name string, age int, mac string, cidrs ...string) *corev1.Node {
		n := newNode(name, "", "192.0.2.1")
		n.Spec.PodCIDRs = cidrs
		n.CreationTimestamp = metav1.NewTime(time.Unix(int64(1000-age), 0))
		n.UID = types.UID("uid-" + name)
		n.Annotations = map[string]string{
			annotationManaged: "true", annotationType: "vxlan", annotationPublic: "192.0.2.1", annotationPublic6: "2001:db8::1",
			annotationData: `{"VNI":1,"VtepMAC":"` + mac + `"}`, annotationData6: `{"VNI":1,"VtepMAC":"` + mac + `"}`,
		}
		return n
	}
	dual := append(cluster4[:1:1], netip.MustParsePrefix("fd01::/64"))
	for _, tc := range []struct {
		name    string
		cluster []netip.Prefix
		nodes   []*corev1.Node
		want    string
		refused map[string]string
	}{
		{"each its own", cluster4, []*corev1.Node{node("a", 2, "02:00:00:00:00:0a", "10.1.0.0/24"), node("b", 1, "02:00:00:00:00:0b", "10.1.1.0/24")}, "a b", nil},
		{"the same subnet", cluster4, []*corev1.Node{node("a", 1, "02:00:00:00:00:0a", "10.1.0.0/24"), node("b", 2, "02:00:00:00:00:0b", "10.1.0.0/24")}, "b",
			map[string]string{"a": "that of node b"}},
		{"at the same time", cluster4, []*corev1.Node{node("b", 1, "02:00:00:00:00:0b", "10.1.0.0/24"), node("a", 1, "02:00:00:00:00:0a", "10.1.0.0/24")}, "a",
			map[string]string{"b": "that of node a"}},
		{"around another's", cluster4, []*corev1.Node{node("a", 2, "02:00:00:00:00:0a", "10.1.7.0/24"), node("b", 1, "02:00:00:00:00:0b", "10.1.0.0/17")}, "a",
			map[string]string{"b": "10.1.0.0/17"}},
		{"within another's", cluster4, []*corev1.Node{node("a", 2, "02:00:00:00:00:0a", "10.1.7.0/24"), node("b", 1, "02:00:00:00:00:0b", "10.1.7.128/25")}, "a",
			map[string]string{"b": "10.1.7.128/25"}},
		{"before it announces anything", cluster4, []*corev1.Node{
			{ObjectMeta: metav1.ObjectMeta{Name: "a", CreationTimestamp: metav1.NewTime(time.Unix(1, 0))}, Spec: corev1.NodeSpec{PodCIDRs: []string{"10.1.0.0/24"}}},
			node("b", 1, "02:00:00:00:00:0b", "10.1.0.0/24")}, "", map[string]string{"b": "that of node a"}},
		{"outside of the cluster", cluster4, []*corev1.Node{node("a", 2, "02:00:00:00:00:0a", "192.168.77.0/24"), node("b", 1, "02:00:00:00:00:0b", "10.1.0.0/24")}, "b",
			map[string]string{"a": "outside of the cluster CIDR"}},
		{"the second family", dual, []*corev1.Node{node("a", 2, "02:00:00:00:00:0a", "10.1.0.0/24", "fd01::/80"), node("b", 1, "02:00:00:00:00:0b", "10.1.1.0/24", "fd01::/80")}, "a",
			map[string]string{"b": "fd01::/80"}},
		{"the same hardware address", cluster4, []*corev1.Node{node("a", 2, "02:00:00:00:00:0A", "10.1.0.0/24"), node("b", 1, "02-00-00-00-00-0a", "10.1.1.0/24")}, "a",
			map[string]string{"b": "02:00:00:00:00:0a"}},
		{"refused, it takes nothing else", cluster4, []*corev1.Node{node("a", 3, "02:00:00:00:00:0a", "10.1.0.0/24"), node("b", 2, "02:00:00:00:00:0b", "10.1.0.0/24"), node("c", 1, "02:00:00:00:00:0b", "10.1.1.0/24")}, "a c",
			map[string]string{"b": "that of node a"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			leases, refused := owners(tc.nodes, tc.cluster)
			if got := strings.Join(slices.Sorted(maps.Keys(leases)), " "); got != tc.want {
				t.Errorf("parts of the network: %q, want %q", got, tc.want)
			}
			if len(refused) != len(tc.refused) {
				t.Errorf("left aside: %v, want %v", refused, tc.refused)
			}
			for name, why := range tc.refused {
				if err := refused[name]; err == nil || !strings.Contains(err.Error(), why) {
					t.Errorf("%s is left aside because %v, want %q", name, err, why)
				}
			}
		})
	}
}
