package nft

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/knftables"
	"sigs.k8s.io/yaml"

	"microk8s/internal/hostnet"
	"microk8s/internal/longtest"
	"microk8s/internal/netpolicy"
)

// These tests send real packets through the kernel, in network namespaces: a node, its pods and
// the world beside it.

var quietly = slog.New(slog.DiscardHandler)

// world is a node with pods a and b (shop) and c (other), and an outside that has a pod of another
// node and an address of nobody. The test's goroutine is in the node's namespace.
type world struct {
	t     testing.TB
	node  netns.NsHandle
	ends  map[string]netns.NsHandle
	table *Table
}

var (
	addresses = map[string][2]string{
		"node": {"10.1.0.1", "fd01::1"}, "a": {"10.1.0.2", "fd01::2"}, "b": {"10.1.0.3", "fd01::3"}, "c": {"10.1.0.4", "fd01::4"}, "new": {"10.1.0.9", "fd01::9"},
		"remote": {"10.1.1.2", "fd01:0:0:1::2"}, "nobody": {"192.0.2.2", "2001:db8::2"},
	}
	labelsOf = map[string]map[string]string{"a": {"app": "a", "tier": "x"}, "b": {"app": "b", "tier": "x"}, "c": {"app": "c"}, "remote": {"app": "remote", "tier": "x"}}
	spaceOf  = map[string]string{"a": "shop", "b": "shop", "c": "other", "remote": "other"}
)

func newWorld(t testing.TB) *world {
	t.Helper()
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	runtime.LockOSThread()
	before, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, ends: map[string]netns.NsHandle{}}
	w.node, err = netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, ns := range w.ends {
			ns.Close()
		}
		w.node.Close()
		defer before.Close()
		if err := netns.Set(before); err != nil {
			t.Error(err)
			return // the thread stays locked and ends with the goroutine
		}
		runtime.UnlockOSThread()
	})
	sh(t, "ip link set lo up; sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0")
	sh(t, "ip link add cni0 type bridge; ip link set cni0 up; ip addr add 10.1.0.1/32 dev cni0; ip addr add fd01::1/128 nodad dev cni0")
	for _, name := range []string{"a", "b", "c", "new"} {
		w.attach(name, addresses[name])
	}
	w.attach("outside", addresses["remote"], addresses["nobody"])
	w.ends["remote"], w.ends["nobody"] = w.ends["outside"], w.ends["outside"]
	delete(w.ends, "outside")
	if w.table, err = New(quietly); err != nil {
		t.Fatal(err)
	}
	return w
}

// attach connects a new namespace that has the addresses.
func (w *world) attach(name string, addrs ...[2]string) {
	w.t.Helper()
	ns, err := netns.New()
	if err != nil {
		w.t.Fatal(err)
	}
	w.ends[name] = ns
	sh(w.t, "ip link set lo up; sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0")
	if err := netns.Set(w.node); err != nil {
		w.t.Fatal(err)
	}
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "v" + name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns)}); err != nil {
		w.t.Fatal(err)
	}
	script := "ip link set v" + name + " up; ip addr add 169.254.1.1/32 dev v" + name + "; ip -6 addr add fe80::1/64 nodad dev v" + name + ";"
	inside := "ip link set eth0 up; ip route add 169.254.1.1 dev eth0; ip route add default via 169.254.1.1; ip -6 addr add fe80::2/64 nodad dev eth0; ip -6 route add default via fe80::1 dev eth0;"
	for _, a := range addrs {
		script += fmt.Sprintf("ip route add %s dev v%s; ip -6 route add %s dev v%s;", a[0], name, a[1], name)
		inside += fmt.Sprintf("ip addr add %s/32 dev eth0; ip -6 addr add %s/128 nodad dev eth0;", a[0], a[1])
	}
	sh(w.t, script)
	w.in(ns, func() { sh(w.t, inside) })
}

func sh(t testing.TB, script string) string {
	t.Helper()
	out, err := exec.Command("sh", "-ec", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

func (w *world) in(ns netns.NsHandle, f func()) {
	w.t.Helper()
	if err := netns.Set(ns); err != nil {
		w.t.Fatal(err)
	}
	defer func() {
		if err := netns.Set(w.node); err != nil {
			w.t.Fatal(err)
		}
	}()
	f()
}

// input is the cluster as the API server would have it.
func input(policies ...*netpolicy.Policy) netpolicy.Input {
	in := netpolicy.Input{
		Node: "n1", Policies: policies,
		Namespaces: map[string]map[string]string{"shop": {"name": "shop"}, "other": {"name": "other"}},
		Nodes: []*netpolicy.Node{
			{Name: "n1", PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("fd01::/64")}},
			{Name: "n2", Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.2")}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.1.0/24")}},
		},
		Closed: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("fd01::/64")},
	}
	for _, name := range slices.Sorted(mapKeys(spaceOf)) {
		p := &netpolicy.Pod{Namespace: spaceOf[name], Name: name, Node: "n1", Labels: labelsOf[name]}
		if name == "remote" {
			p.Node = "n2"
		}
		for _, a := range addresses[name] {
			p.IPs = append(p.IPs, netip.MustParseAddr(a))
		}
		p.Ports = []netpolicy.NamedPort{{Name: "echo", Protocol: netpolicy.UDP, Port: 7}, {Name: "web", Protocol: netpolicy.TCP, Port: 80}}
		in.Pods = append(in.Pods, p)
	}
	return in
}

func mapKeys(m map[string]string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

func policy(t *testing.T, namespace, spec string) *netpolicy.Policy {
	t.Helper()
	p := &netpolicy.Policy{Namespace: namespace, Name: fmt.Sprintf("p%x", len(spec))}
	if err := yaml.UnmarshalStrict([]byte(spec), &p.Spec); err != nil {
		t.Fatal(err)
	}
	return p
}

func (w *world) apply(in netpolicy.Input) *netpolicy.Model {
	w.t.Helper()
	m := new(netpolicy.Compiler).Compile(in)
	if _, err := w.table.Apply(w.t.Context(), m); err != nil {
		w.t.Fatal(err)
	}
	return m
}

// probe is a datagram from one end to another.
type probe struct {
	from, to string
	six      bool
	port     uint16
}

func (p probe) addrs() (src, dst netip.Addr) {
	i := 0
	if p.six {
		i = 1
	}
	return netip.MustParseAddr(addresses[p.from][i]), netip.MustParseAddr(addresses[p.to][i])
}

func (p probe) flow() netpolicy.Flow {
	src, dst := p.addrs()
	return netpolicy.Flow{Src: src, Dst: dst, Protocol: netpolicy.UDP, Port: p.port}
}

// arrive sends all probes, each as a new connection, and reports which have arrived.
func (w *world) arrive(probes []probe) []bool {
	w.t.Helper()
	netlink.ConntrackTableFlush(netlink.ConntrackTable)
	servers := map[string]*net.UDPConn{}
	end := func(name string) netns.NsHandle {
		if name == "node" {
			return w.node
		}
		return w.ends[name]
	}
	for _, p := range probes {
		_, dst := p.addrs()
		at := netip.AddrPortFrom(dst, p.port)
		if servers[at.String()] == nil {
			w.in(end(p.to), func() {
				s, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
				if err != nil {
					w.t.Fatal(err)
				}
				s.SetReadBuffer(1 << 20)
				servers[at.String()] = s
			})
		}
	}
	defer func() {
		for _, s := range servers {
			s.Close()
		}
	}()
	send := func(id int, p probe) {
		src, dst := p.addrs()
		w.in(end(p.from), func() {
			c, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(src, 0)), net.UDPAddrFromAddrPort(netip.AddrPortFrom(dst, p.port)))
			if err != nil {
				w.t.Fatal(err)
			}
			defer c.Close()
			fmt.Fprintf(c, "%d", id)
		})
	}
	got := make([]bool, len(probes))
	read := func(wait time.Duration) {
		deadline := time.Now().Add(wait)
		var mu sync.Mutex
		var wg sync.WaitGroup
		for _, s := range servers {
			s.SetReadDeadline(deadline)
			wg.Go(func() {
				buf := make([]byte, 16)
				for {
					n, _, err := s.ReadFromUDP(buf)
					if err != nil {
						return
					}
					var i int
					fmt.Sscan(string(buf[:n]), &i)
					mu.Lock()
					got[i] = true
					mu.Unlock()
				}
			})
		}
		wg.Wait()
	}
	for i, p := range probes {
		send(i, p)
	}
	// Packets between namespaces of one machine arrive while they are sent, except while addresses
	// are resolved: whatever has not arrived is sent once more.
	read(30 * time.Millisecond)
	for i, p := range probes {
		if !got[i] {
			send(i, p)
		}
	}
	read(60 * time.Millisecond)
	return got
}

func (w *world) check(m *netpolicy.Model, probes []probe) {
	w.t.Helper()
	for i, ok := range w.arrive(probes) {
		p := probes[i]
		want := p.from == "node" || m.Verdict(p.flow()).Allowed
		if ok != want {
			w.t.Errorf("%s → %s:%d (six %v): arrived %v, want %v", p.from, p.to, p.port, p.six, ok, want)
		}
	}
	if w.t.Failed() {
		w.t.Logf("%s", sh(w.t, "nft list table inet "+hostnet.PolicyTable))
	}
}

// every is all pairs, at two ports, in both families.
func every() (out []probe) {
	names := []string{"node", "a", "b", "c", "remote", "nobody", "new"}
	for _, from := range names {
		for _, to := range names {
			if from == to || (from == "remote" || from == "nobody") && (to == "remote" || to == "nobody") || from == "node" && to == "node" {
				continue
			}
			for _, port := range []uint16{7, 9} {
				out = append(out, probe{from, to, false, port}, probe{from, to, true, port})
			}
		}
	}
	return out
}

func TestPackets(t *testing.T) {
	w := newWorld(t)
	allowed := func(name string, m *netpolicy.Model, from, to string, want bool) {
		t.Helper()
		p := probe{from, to, false, 7}
		if got := m.Verdict(p.flow()).Allowed; got != want {
			t.Errorf("%s: the model says %v for %s → %s", name, got, from, to)
		}
	}
	for _, tc := range []struct {
		name, namespace, spec string
		yes, no               []string
	}{
		{"nothing", "", "", []string{"a b", "remote a", "a node"}, []string{"new a", "remote new"}},
		{"deny all", "shop", `{podSelector: {}, policyTypes: [Ingress, Egress]}`, []string{"c remote"}, []string{"a b", "c a", "a nobody", "a node"}},
		{"from a pod", "shop", `{podSelector: {matchLabels: {app: b}}, ingress: [{from: [{podSelector: {matchLabels: {app: a}}}]}]}`, []string{"a b", "c a"}, []string{"c b", "remote b"}},
		{"from a namespace, named port", "shop", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {name: other}}}], ports: [{port: echo, protocol: UDP}]}]}`, []string{"remote a", "c b"}, []string{"a b"}},
		{"to a block", "shop", `{podSelector: {}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 192.0.2.0/24, except: [192.0.2.128/25]}}]}]}`, []string{"a nobody", "c a"}, []string{"a remote", "a b", "a node"}},
		{"everybody on ports", "shop", `{podSelector: {}, ingress: [{ports: [{port: 7, endPort: 8, protocol: UDP}]}]}`, []string{"nobody a"}, nil},
	} {
		// Not subtests: those are goroutines of their own, on threads of other namespaces.
		in := input()
		if tc.spec != "" {
			in = input(policy(t, tc.namespace, tc.spec))
		}
		m := w.apply(in)
		for _, s := range tc.yes {
			from, to, _ := strings.Cut(s, " ")
			allowed(tc.name, m, from, to, true)
		}
		for _, s := range tc.no {
			from, to, _ := strings.Cut(s, " ")
			allowed(tc.name, m, from, to, false)
		}
		w.check(m, every())
		if t.Failed() {
			t.Fatal(tc.name)
		}
	}
}

// The address of a Service is judged by the pod behind it, whoever translates it.
// ping reports whether an end answers an ICMP echo within a second.
func (w *world) ping(from, to string) (ok bool) {
	w.t.Helper()
	w.in(w.ends[from], func() {
		c, err := icmp.ListenPacket("ip4:icmp", addresses[from][0])
		if err != nil {
			w.t.Fatal(err)
		}
		defer c.Close()
		ask := icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: 7, Seq: 1}}
		data, err := ask.Marshal(nil)
		if err == nil {
			_, err = c.WriteTo(data, &net.IPAddr{IP: net.ParseIP(addresses[to][0])})
		}
		if err != nil {
			w.t.Fatal(err)
		}
		c.SetReadDeadline(time.Now().Add(time.Second))
		buf := make([]byte, 128)
		n, _, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		answer, err := icmp.ParseMessage(1, buf[:n])
		ok = err == nil && answer.Type == ipv4.ICMPTypeEchoReply
	})
	return ok
}

// Policies of the whole cluster deny some ports and leave the others, those of other protocols too.
func TestTiers(t *testing.T) {
	w := newWorld(t)
	in := input(policy(t, "other", `{podSelector: {}, policyTypes: [Ingress]}`))
	deny := &netpolicy.ClusterPolicy{Name: "deny"}
	if err := yaml.UnmarshalStrict([]byte(`{tier: Admin, priority: 1, subject: {namespaces: {}}, ingress: [
		{action: Deny, from: [{namespaces: {matchLabels: {name: shop}}}], protocols: [{udp: {destinationPort: {number: 7}}}]},
		{action: Accept, from: [{pods: {podSelector: {matchLabels: {app: a}}, namespaceSelector: {}}}], protocols: [{udp: {}}]}]}`), &deny.Spec); err != nil {
		t.Fatal(err)
	}
	in.Cluster = append(in.Cluster, deny)
	m := w.apply(in)
	w.check(m, every())
	if !w.ping("b", "a") || w.ping("b", "c") {
		t.Errorf("echo from b: a answers %v, c %v; the policy is about UDP, and that of c's namespace about everything", w.ping("b", "a"), w.ping("b", "c"))
	}
	deny.Spec.Tier = netpolicy.Baseline
	w.check(w.apply(in), every())
}

func TestServiceAddressesAreTranslatedFirst(t *testing.T) {
	w := newWorld(t)
	sh(t, `nft 'table ip kube-proxy { chain p { type nat hook prerouting priority dstnat; ip daddr 10.152.183.7 udp dport 53 dnat to 10.1.0.3:7; }; }'`)
	addresses["service"] = [2]string{"10.152.183.7", "fd02::7"}
	defer delete(addresses, "service")
	reaches := func() bool {
		var server *net.UDPConn
		w.in(w.ends["b"], func() {
			var err error
			if server, err = net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP("10.1.0.3"), Port: 7}); err != nil {
				t.Fatal(err)
			}
		})
		defer server.Close()
		w.in(w.ends["a"], func() {
			c, err := net.Dial("udp", "10.152.183.7:53")
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			for range 3 {
				c.Write([]byte("x"))
			}
		})
		server.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		_, _, err := server.ReadFromUDP(make([]byte, 8))
		return err == nil
	}
	w.apply(input(policy(t, "shop", `{podSelector: {matchLabels: {app: a}}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchLabels: {app: b}}}], ports: [{port: 7, protocol: UDP}]}]}`)))
	if !reaches() {
		t.Error("the pod behind the Service is allowed, and was not reached")
	}
	w.apply(input(policy(t, "shop", `{podSelector: {matchLabels: {app: a}}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 10.152.183.0/24}}]}]}`)))
	if reaches() {
		t.Error("only the Service's address is allowed, and the pod behind it was reached")
	}
}

// A connection that a policy forbids while it runs ends for both ends, whichever of them the policy
// isolates and whichever sends.
func TestRunningConnectionsAreCut(t *testing.T) {
	for _, spec := range []string{
		`{podSelector: {matchLabels: {app: b}}, policyTypes: [Ingress]}`,
		`{podSelector: {matchLabels: {app: a}}, policyTypes: [Egress]}`,
	} {
		w := newWorld(t)
		w.apply(input())
		var listener net.Listener
		var client net.Conn
		var err error
		w.in(w.ends["b"], func() { listener, err = net.Listen("tcp", "10.1.0.3:80") })
		if err != nil {
			t.Fatal(err)
		}
		w.in(w.ends["a"], func() { client, err = net.DialTimeout("tcp", "10.1.0.3:80", 5*time.Second) })
		if err != nil {
			t.Fatal(err)
		}
		server, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		passes := func(from, to net.Conn) bool {
			from.Write([]byte("x"))
			to.SetReadDeadline(time.Now().Add(700 * time.Millisecond))
			_, err := to.Read(make([]byte, 64))
			return err == nil
		}
		if !passes(client, server) || !passes(server, client) {
			t.Fatal("the connection does not work without a policy")
		}
		m := new(netpolicy.Compiler).Compile(input(policy(t, "shop", spec)))
		tightened, err := w.table.Apply(t.Context(), m)
		if err != nil || !tightened {
			t.Fatalf("tightened %v, %v", tightened, err)
		}
		n, err := Cut(m)
		if err != nil || n != 1 {
			t.Errorf("cut %d connections, %v", n, err)
		}
		// The server's end first: what it sends is not judged by either policy.
		if passes(server, client) || passes(client, server) || passes(server, client) {
			t.Errorf("the connection goes on under %s\n%s", spec, sh(t, "nft list table inet "+hostnet.PolicyTable))
		}
		// What is allowed again works again.
		w.apply(input())
		if !passes(client, server) {
			t.Logf("a connection that was cut does not go on: its other end may have given up")
		}
		listener.Close()
		client.Close()
		server.Close()
	}
}

// Cut leaves what is allowed.
func TestAllowedConnectionsStay(t *testing.T) {
	w := newWorld(t)
	in := input(policy(t, "shop", `{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}`))
	m := w.apply(in)
	if got := w.arrive([]probe{{"a", "b", false, 7}, {"node", "b", false, 7}, {"c", "remote", true, 7}}); slices.Contains(got, false) {
		t.Fatal("not all arrive:", got)
	}
	if n, err := Cut(m); n != 0 || err != nil {
		t.Errorf("cut %d, %v", n, err)
	}
}

// The table outlives the process, and the next one leaves it until it knows better.
func TestTableStays(t *testing.T) {
	w := newWorld(t)
	deny := []probe{{"a", "b", false, 7}}
	closed := input().Closed
	if made, err := w.table.Close(t.Context(), closed); err != nil || !made {
		t.Fatal(made, err)
	}
	if w.arrive(deny)[0] {
		t.Error("a pod may talk before anything is known of it")
	}
	if !w.arrive([]probe{{"node", "b", false, 7}})[0] {
		t.Error("the node does not reach its pod")
	}
	w.apply(input())
	if !w.arrive(deny)[0] {
		t.Error("a pod that is known and not isolated may not talk")
	}
	next, err := New(quietly)
	if err != nil {
		t.Fatal(err)
	}
	if made, err := next.Close(t.Context(), closed); err != nil || made {
		t.Fatal(made, err)
	}
	if !w.arrive(deny)[0] {
		t.Error("the next process has closed pods that run")
	}
	if err := next.Restore(t.Context()); err != nil || !w.arrive(deny)[0] {
		t.Error("a process that knows nothing has written the table again", err)
	}
	w.table = next
	m := w.apply(input(policy(t, "shop", `{podSelector: {}, policyTypes: [Ingress]}`)))
	w.check(m, every())
	if err := next.Check(t.Context()); err != nil {
		t.Error(err)
	}
	sh(t, "nft flush ruleset")
	if err := next.Check(t.Context()); !errors.Is(err, ErrNoTable) {
		t.Error("after a flush:", err)
	}
	if err := next.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.check(m, every())
	// Without having noticed, a change repairs.
	sh(t, "nft flush ruleset")
	w.check(w.apply(input(policy(t, "shop", `{podSelector: {}, policyTypes: [Egress]}`))), every())
	if err := next.Remove(t.Context()); err != nil || strings.Contains(sh(t, "nft list ruleset"), "microk8s-policy") {
		t.Error("the table is still there", err)
	}
	if err := next.Remove(t.Context()); err != nil {
		t.Error("removing what is not there:", err)
	}
}

// Long names, and those with every character that Kubernetes allows.
func TestNames(t *testing.T) {
	w := newWorld(t)
	in := input(policy(t, "shop", `{podSelector: {}, policyTypes: [Ingress, Egress], egress: [{to: [{podSelector: {}}]}]}`))
	in.Pods[0].Name = "0." + strings.Repeat("a-b.", 62) + "c"
	in.Pods[0].Created = -1
	w.check(w.apply(in), every())
}

// randomPolicies are small: many ways in which rules can meet, among few pods.
func randomPolicies(r *rand.Rand) (out []*netpolicy.Policy) {
	pick := func(list ...string) string { return list[r.IntN(len(list))] }
	selector := func() *metav1.LabelSelector {
		s := &metav1.LabelSelector{}
		switch r.IntN(4) {
		case 0:
		case 1:
			s.MatchLabels = map[string]string{"tier": "x"}
		case 2:
			s.MatchExpressions = []metav1.LabelSelectorRequirement{{Key: "app", Operator: metav1.LabelSelectorOpNotIn, Values: []string{pick("a", "b", "c", "remote")}}}
		default:
			s.MatchLabels = map[string]string{"app": pick("a", "b", "c", "remote")}
		}
		return s
	}
	peers := func() (out []networkingv1.NetworkPolicyPeer) {
		for range r.IntN(3) {
			p := networkingv1.NetworkPolicyPeer{}
			switch r.IntN(4) {
			case 0:
				p.PodSelector = selector()
			case 1:
				p.NamespaceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"name": pick("shop", "other")}}
			case 2:
				p.NamespaceSelector, p.PodSelector = &metav1.LabelSelector{}, selector()
			default:
				p.IPBlock = &networkingv1.IPBlock{CIDR: pick("0.0.0.0/0", "10.1.0.0/16", "10.1.0.2/31", "192.0.2.0/24", "10.0.0.0/24", "::/0", "fd01::/63", "2001:db8::/32")}
				if p.IPBlock.CIDR == "10.1.0.0/16" {
					p.IPBlock.Except = []string{pick("10.1.0.0/24", "10.1.1.2/32", "10.1.0.3/32")}
				}
			}
			out = append(out, p)
		}
		return out
	}
	ports := func() (out []networkingv1.NetworkPolicyPort) {
		for range r.IntN(3) {
			p := networkingv1.NetworkPolicyPort{Protocol: ptr.To([]corev1.Protocol{"UDP", "UDP", "TCP"}[r.IntN(3)])}
			switch r.IntN(4) {
			case 0:
			case 1:
				p.Port = ptr.To(intstr.FromString(pick("echo", "web")))
			case 2:
				p.Port, p.EndPort = ptr.To(intstr.FromInt32(5)), ptr.To(int32(7+r.IntN(3)))
			default:
				p.Port = ptr.To(intstr.FromInt32(int32(7 + 2*r.IntN(2))))
			}
			out = append(out, p)
		}
		return out
	}
	for i := range r.IntN(5) {
		p := &netpolicy.Policy{Namespace: pick("shop", "shop", "other"), Name: fmt.Sprintf("p%d", i)}
		p.Spec.PodSelector = *selector()
		p.Spec.PolicyTypes = [][]networkingv1.PolicyType{{"Ingress"}, {"Egress"}, {"Ingress", "Egress"}}[r.IntN(3)]
		for range r.IntN(3) {
			p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: peers(), Ports: ports()})
			p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: peers(), Ports: ports()})
		}
		out = append(out, p)
	}
	return out
}

// Random policies follow each other. After each change real packets fare as the model says, and the
// table that was changed by differences is the one that is rewritten.
func TestRandomPolicies(t *testing.T) {
	w := newWorld(t)
	w.table.log = slog.New(failing{t}) // what has to be written again was not understood
	for seed := range longtest.Of(400, 4) {
		r := rand.New(rand.NewPCG(uint64(seed), 1))
		in := input(randomPolicies(r)...)
		if r.IntN(3) == 0 { // a pod goes, or comes back
			in.Pods = slices.Delete(in.Pods, 0, 1)
		}
		m := w.apply(in)
		w.check(m, every())
		changed := tableLines(t)
		if err := w.table.Restore(t.Context()); err != nil {
			t.Fatal(err)
		}
		if anew := tableLines(t); !slices.Equal(changed, anew) {
			t.Errorf("seed %d: the changed table differs from a new one\n%s\nnew:\n%s", seed, strings.Join(changed, "\n"), strings.Join(anew, "\n"))
		}
		if t.Failed() {
			data, _ := yaml.Marshal(in.Policies)
			t.Fatalf("seed %d\n%s", seed, data)
		}
	}
}

// tableLines is the table in an order of its own: nft lists chains and elements as they came.
func tableLines(t *testing.T) []string {
	t.Helper()
	out := sh(t, "nft -s list table inet "+hostnet.PolicyTable)
	out = strings.NewReplacer(" elements = {", "\n", "{", "\n", "}", "\n", ",", "\n", "\t", "").Replace(out)
	lines := strings.Split(out, "\n")
	for i := range lines {
		lines[i] = strings.TrimSpace(lines[i])
	}
	slices.Sort(lines)
	return lines
}

// The rules refer only to what is there, whatever follows what: knftables' fake checks that, and is
// quick enough for many seeds.
func TestTransactionsAreWhole(t *testing.T) {
	fake := knftables.NewFake(knftables.InetFamily, hostnet.PolicyTable)
	table := newTable(fake, slog.New(failing{t}))
	var c netpolicy.Compiler
	for seed := range longtest.Of(2000, 100) {
		r := rand.New(rand.NewPCG(uint64(seed), 2))
		if _, err := table.Apply(t.Context(), c.Compile(input(randomPolicies(r)...))); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
	if _, err := table.Apply(t.Context(), c.Compile(input())); err != nil {
		t.Fatal(err)
	}
	if chains, err := fake.List(context.Background(), "chains"); err != nil || len(chains) != 5 {
		t.Errorf("without policies there are the chains %v, %v", chains, err)
	}
}

// failing fails a test for every line of log.
type failing struct{ t *testing.T }

func (f failing) Enabled(context.Context, slog.Level) bool { return true }
func (f failing) Handle(_ context.Context, r slog.Record) error {
	f.t.Error(r.Message)
	r.Attrs(func(a slog.Attr) bool { f.t.Log(a.Key, a.Value); return true })
	return nil
}
func (f failing) WithAttrs([]slog.Attr) slog.Handler { return f }
func (f failing) WithGroup(string) slog.Handler      { return f }
