package hostnet

import (
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"microk8s/internal/hostwatch"
	"microk8s/internal/hostwatch/hosttest"
	"microk8s/internal/snapenv"
)

var (
	cluster = netip.MustParsePrefix("10.1.0.0/16")
	podNet  = netip.MustParsePrefix("10.1.5.0/24")
	quietly = slog.New(slog.DiscardHandler)
)

// world is a machine in a network namespace, with a pod on one side and another machine on
// the other. The test's goroutine is in the machine's namespace until the test ends.
type world struct {
	t            *testing.T
	machine      netns.NsHandle
	pod, outside netns.NsHandle
}

const (
	podAddr     = "10.1.5.2"
	outsideAddr = "192.0.2.2"
	machineAddr = "192.0.2.1"
)

// enter puts the test into a network namespace of its own.
func enter(t *testing.T) netns.NsHandle {
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
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ns.Close()
		defer before.Close()
		if err := netns.Set(before); err != nil {
			t.Error(err)
			return // the thread stays locked and ends with the goroutine
		}
		runtime.UnlockOSThread()
	})
	up(t, "lo")
	return ns
}

func up(t *testing.T, name string) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetUp(l)
	}
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, machine: enter(t)}
	// The machine's end towards the pod is called as the real bridge is, since a rule names it.
	w.pod = w.neighbour(Bridge, "10.1.5.1/24", podAddr+"/24", "10.1.5.1")
	w.outside = w.neighbour("eth0", machineAddr+"/24", outsideAddr+"/24", machineAddr)
	if _, err := Forwarding([]netip.Prefix{cluster}); err != nil {
		t.Fatal(err)
	}
	return w
}

// neighbour connects a new namespace to the machine.
func (w *world) neighbour(name, addr, peerAddr, gateway string) netns.NsHandle {
	t := w.t
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(netns.Set(w.machine))
	must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "peer", PeerNamespace: netlink.NsFd(ns)}))
	set := func(name, addr string) {
		t.Helper()
		l, err := netlink.LinkByName(name)
		must(err)
		a, err := netlink.ParseAddr(addr)
		must(err)
		must(netlink.AddrAdd(l, a))
		must(netlink.LinkSetUp(l))
	}
	set(name, addr)
	w.in(ns, func() {
		up(t, "lo")
		set("peer", peerAddr)
		must(netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(gateway)}))
	})
	return ns
}

func (w *world) in(ns netns.NsHandle, f func()) {
	w.t.Helper()
	if err := netns.Set(ns); err != nil {
		w.t.Fatal(err)
	}
	defer func() {
		if err := netns.Set(w.machine); err != nil {
			w.t.Fatal(err)
		}
	}()
	f()
}

// reaches reports whether a datagram from one namespace arrives at addr in another, and from
// which address it seems to come. It gives up late; drops, for the other answer, does so
// early: a packet that was dropped does not come later either.
func (w *world) reaches(from, to netns.NsHandle, addr string) (seen string, ok bool) {
	w.t.Helper()
	return w.send(from, to, addr, 100)
}

func (w *world) drops(from, to netns.NsHandle, addr string) bool {
	w.t.Helper()
	_, ok := w.send(from, to, addr, 5)
	return !ok
}

func (w *world) send(from, to netns.NsHandle, addr string, attempts int) (seen string, ok bool) {
	w.t.Helper()
	var server net.PacketConn
	var client net.Conn
	var err error
	w.in(to, func() { server, err = net.ListenPacket("udp4", addr+":0") })
	if err != nil {
		w.t.Fatal(err)
	}
	defer server.Close()
	w.in(from, func() { client, err = net.Dial("udp4", server.LocalAddr().String()) })
	if err != nil {
		w.t.Fatal(err)
	}
	defer client.Close()
	// A datagram may get lost while addresses are resolved, so several are sent.
	buf := make([]byte, 16)
	for range attempts {
		client.Write([]byte("x")) // refused by a rejecting firewall: the same as dropped
		server.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if _, peer, err := server.ReadFrom(buf); err == nil {
			host, _, _ := net.SplitHostPort(peer.String())
			return host, true
		}
	}
	return "", false
}

func run(t *testing.T, stdin, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
	return string(out)
}

// ruleset is the firewall of the namespace without counters, nft and legacy.
func ruleset(t *testing.T) string {
	t.Helper()
	out := run(t, "", "nft", "-s", "list", "ruleset")
	if tool, _ := legacyTool(true); tool != "" {
		out += run(t, "", tool, "-S")
	}
	return out
}

func TestFirewallLetsPodsThrough(t *testing.T) {
	policyDrop := `table ip filter { chain FORWARD { type filter hook forward priority filter; policy drop; }; }`
	for _, tc := range []struct {
		name  string
		setup func(t *testing.T)
		input bool // the chain also drops what pods send to the machine
	}{
		{"policy of iptables", func(t *testing.T) { run(t, "", "iptables-nft", "-P", "FORWARD", "DROP") }, false},
		{"policy of legacy iptables", func(t *testing.T) { run(t, "", "iptables-legacy", "-P", "FORWARD", "DROP") }, false},
		{"policy of nft", func(t *testing.T) { run(t, policyDrop, "nft", "-f", "-") }, false},
		{"last rule of iptables", func(t *testing.T) {
			run(t, "", "iptables-nft", "-A", "FORWARD", "-m", "state", "--state", "ESTABLISHED", "-j", "ACCEPT")
			run(t, "", "iptables-nft", "-A", "FORWARD", "-j", "REJECT", "--reject-with", "icmp-host-prohibited")
		}, false},
		{"last rule of legacy iptables", func(t *testing.T) {
			run(t, "", "iptables-legacy", "-A", "FORWARD", "-j", "REJECT", "--reject-with", "icmp-host-prohibited")
		}, false},
		{"chain of a chain", func(t *testing.T) {
			run(t, `table inet fw {
				chain deny { counter reject; }
				chain zone { ip saddr 203.0.113.0/24 accept; goto deny; }
				chain forwarding { type filter hook forward priority filter + 10; policy accept; ct state established accept; jump zone; }
			}`, "nft", "-f", "-")
		}, false},
		{"two chains, as ufw and Docker together", func(t *testing.T) {
			run(t, "", "iptables-nft", "-P", "FORWARD", "DROP")
			run(t, `table inet fw { chain forwarding { type filter hook forward priority filter + 5; policy drop; }; }`, "nft", "-f", "-")
		}, false},
		{"input too, as ufw", func(t *testing.T) {
			run(t, "", "iptables-nft", "-P", "FORWARD", "DROP")
			run(t, "", "iptables-nft", "-P", "INPUT", "DROP")
		}, true},
		{"input of legacy iptables", func(t *testing.T) {
			run(t, "", "iptables-legacy", "-P", "FORWARD", "DROP")
			run(t, "", "iptables-legacy", "-P", "INPUT", "DROP")
		}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			if _, ok := w.reaches(w.pod, w.outside, outsideAddr); !ok {
				t.Fatal("the pod does not reach the outside without any firewall: the test is wrong")
			}
			tc.setup(t)
			before := ruleset(t)
			if !w.drops(w.pod, w.outside, outsideAddr) {
				t.Fatal("the firewall does not drop: the test is wrong")
			}
			f := &Firewall{Cluster: []netip.Prefix{cluster}}
			changed, err := f.Ensure()
			if err != nil {
				t.Fatal(err)
			}
			if len(changed) == 0 {
				t.Error("no chain was changed")
			}
			if _, ok := w.reaches(w.pod, w.outside, outsideAddr); !ok {
				t.Errorf("packets from the pod are dropped\n%s", ruleset(t))
			}
			if _, ok := w.reaches(w.outside, w.pod, podAddr); !ok {
				t.Errorf("packets to the pod are dropped\n%s", ruleset(t))
			}
			if _, ok := w.reaches(w.pod, w.machine, machineAddr); !ok {
				t.Errorf("packets from the pod to its machine are dropped\n%s", ruleset(t))
			}
			if tc.input && !w.drops(w.outside, w.machine, machineAddr) {
				t.Errorf("packets from outside to the machine are accepted\n%s", ruleset(t))
			}

			after := ruleset(t)
			if changed, err := f.Ensure(); err != nil || len(changed) > 0 || ruleset(t) != after {
				t.Errorf("a second time it changed %v (%v)\n%s", changed, err, ruleset(t))
			}
			if err := RemoveAccepts(); err != nil {
				t.Fatal(err)
			}
			if got := ruleset(t); got != before {
				t.Errorf("after removal the firewall is\n%s\nand was\n%s", got, before)
			}
		})
	}
}

// The owner of a firewall must be able to go on using iptables on it, and finds our comment.
func TestIptablesCanListTheRules(t *testing.T) {
	newWorld(t)
	run(t, "", "iptables-nft", "-P", "FORWARD", "DROP")
	run(t, "", "iptables-nft", "-P", "INPUT", "DROP")
	if _, err := (&Firewall{Cluster: []netip.Prefix{cluster}}).Ensure(); err != nil {
		t.Fatal(err)
	}
	got := run(t, "", "iptables-nft", "-S")
	for chain, rules := range map[string][]string{"FORWARD": legacyRules("FORWARD", cluster), "INPUT": legacyRules("INPUT", cluster)} {
		for _, want := range rules {
			if !strings.Contains(got, want+"\n") {
				t.Errorf("chain %s lacks\n%s\nit is\n%s", chain, want, got)
			}
		}
	}
}

// Decisions of the owner about single addresses stay in force.
func TestFirewallKeepsTheOwnersRules(t *testing.T) {
	w := newWorld(t)
	run(t, "", "iptables-nft", "-A", "FORWARD", "-d", outsideAddr, "-j", "DROP")
	run(t, "", "iptables-nft", "-P", "FORWARD", "DROP")
	if _, err := (&Firewall{Cluster: []netip.Prefix{cluster}}).Ensure(); err != nil {
		t.Fatal(err)
	}
	if !w.drops(w.pod, w.outside, outsideAddr) {
		t.Error("a packet passed that the owner of the firewall wants dropped")
	}
	if _, ok := w.reaches(w.outside, w.pod, podAddr); !ok {
		t.Error("other packets are dropped")
	}
}

func TestOpenFirewallIsNotTouched(t *testing.T) {
	newWorld(t)
	run(t, `table ip filter {
		chain FORWARD { type filter hook forward priority filter; policy accept; ip saddr 203.0.113.7 drop; }
		chain INPUT { type filter hook input priority filter; policy accept; }
	}`, "nft", "-f", "-")
	before := ruleset(t)
	changed, err := (&Firewall{Cluster: []netip.Prefix{cluster}}).Ensure()
	if err != nil || len(changed) > 0 || ruleset(t) != before {
		t.Errorf("changed %v (%v)\n%s", changed, err, ruleset(t))
	}
}

// Rules come back when somebody reloads the firewall, without anybody asking.
func TestRulesComeBackAfterAReload(t *testing.T) {
	if !hosttest.Alone(t) {
		return
	}
	reload := func() {
		run(t, `flush ruleset; table inet filter { chain forward { type filter hook forward priority filter; policy drop; }; }`, "nft", "-f", "-")
	}
	reload()
	watch(t, (&Firewall{Cluster: []netip.Prefix{cluster}}).Owner())
	present := func() bool { return strings.Count(ruleset(t), Comment) == 2 }
	await(t, "rules at the start", present)
	reload()
	await(t, "rules after a reload", present)
}

// watch runs a watcher with one owner until the test ends.
func watch(t *testing.T, o hostwatch.Owner) *hostwatch.Registration {
	w := hostwatch.New(quietly)
	ended := make(chan struct{})
	go func() { defer close(ended); w.Run(t.Context()) }()
	r := w.Register(t.Context(), o)
	t.Cleanup(func() { <-ended })
	return r
}

// await fails the test unless a condition becomes true; it, and not the time, is what counts.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not seen: %s\n%s", what, ruleset(t))
		}
	}
}

func TestMasquerade(t *testing.T) {
	w := newWorld(t)
	rules := Rules{Cluster: []netip.Prefix{cluster}, Node: []netip.Prefix{podNet}, Hairpin: true}
	for range 2 { // the second time replaces
		if err := rules.Apply(); err != nil {
			t.Fatal(err)
		}
	}
	if seen, ok := w.reaches(w.pod, w.outside, outsideAddr); !ok || seen != machineAddr {
		t.Errorf("the outside sees %q (%v), want the machine's address", seen, ok)
	}
	if seen, ok := w.reaches(w.outside, w.pod, podAddr); !ok || seen != outsideAddr {
		t.Errorf("the pod sees %q (%v), want the sender's own address", seen, ok)
	}
	want := `table ip microk8s-pods {
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr 10.1.0.0/16 ip daddr != 10.1.0.0/16 ip daddr != 224.0.0.0/4 counter masquerade fully-random
		oifname "flannel.1" ip saddr != 10.1.0.0/16 ip daddr 10.1.0.0/16 counter masquerade fully-random
		ip saddr 10.1.5.0/24 ip daddr 10.1.5.0/24 ct status dnat counter masquerade fully-random
	}
}
`
	if got := run(t, "", "nft", "-s", "list", "ruleset"); got != want {
		t.Errorf("the ruleset is\n%s\nwant\n%s", got, want)
	}
}

func TestMasqueradeDualStack(t *testing.T) {
	enter(t)
	six := netip.MustParsePrefix("fd01::/64")
	if err := (Rules{Cluster: []netip.Prefix{cluster, six}}).Apply(); err != nil {
		t.Fatal(err)
	}
	got := run(t, "", "nft", "-s", "list", "table", "ip6", Table)
	for _, want := range []string{
		"ip6 saddr fd01::/64 ip6 daddr != fd01::/64 ip6 daddr != ff00::/8 counter masquerade fully-random",
		`oifname "flannel-v6.1" ip6 saddr != fd01::/64 ip6 daddr fd01::/64 counter masquerade fully-random`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("table lacks %q\n%s", want, got)
		}
	}
}

// Everything the product puts on a host goes; what was there before, and what belongs to
// others, stays.
func TestCleanupLeavesTheHostAsItWas(t *testing.T) {
	enter(t)
	env := snapenv.Under(t.TempDir())
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	run(t, "", "iptables-nft", "-P", "FORWARD", "DROP")
	run(t, `table ip cni_hostport { chain hostports { tcp dport 80 dnat to 172.16.0.9:80; }; }`, "nft", "-f", "-")
	must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "peer"}))
	up(t, "peer")
	eth0, err := netlink.LinkByName("eth0")
	must(err)
	addr, _ := netlink.ParseAddr(machineAddr + "/24")
	must(netlink.AddrAdd(eth0, addr))
	must(netlink.LinkSetUp(eth0))
	must(os.MkdirAll(env.CNIConf(), 0o755))
	must(os.WriteFile(filepath.Join(env.CNIConf(), "99-other.conf"), []byte("{}"), 0o644))
	foreignResult := env.HostPath("var/lib/cni/results/other-1-eth0")
	must(os.MkdirAll(filepath.Dir(foreignResult), 0o755))
	must(os.WriteFile(foreignResult, []byte("{}"), 0o644))
	state := func() string {
		links := run(t, "", "ip", "-o", "-br", "link")
		routes := run(t, "", "ip", "route")
		var files []string
		filepath.WalkDir(env.Host, func(p string, d os.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				files = append(files, p)
			}
			return nil
		})
		return links + routes + run(t, "", "nft", "-s", "list", "ruleset") + strings.Join(files, "\n")
	}
	for deadline := time.Now().Add(30 * time.Second); strings.Contains(state(), "LOWERLAYERDOWN"); { // the kernel says a moment later that a link is up
		if time.Now().After(deadline) {
			t.Fatal("the link does not come up")
		}
		time.Sleep(10 * time.Millisecond)
	}
	before := state()

	// What a node puts on the host.
	cidrs := []netip.Prefix{cluster}
	must(Rules{Cluster: cidrs, Node: []netip.Prefix{podNet}}.Apply())
	_, err = (&Firewall{Cluster: cidrs}).Ensure()
	must(err)
	must(WriteConflist(env, []netip.Prefix{podNet}, 1450))
	must(os.MkdirAll(filepath.Dir(SubnetEnv(env)), 0o755))
	must(os.WriteFile(SubnetEnv(env), []byte("FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.5.1/24\n"), 0o644))
	must(os.MkdirAll(filepath.Join(leasesDir(env), NetworkName), 0o755))
	must(os.WriteFile(filepath.Join(leasesDir(env), NetworkName, podAddr), []byte("id"), 0o644))
	must(os.WriteFile(env.HostPath("var/lib/cni/results/microk8s-1-eth0"), []byte(`{"networkName":"microk8s","netns":"/run/netns/cni-not-there"}`), 0o644))
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: Bridge}}
	must(netlink.LinkAdd(bridge))
	must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "veth1", MasterIndex: bridge.Index}, PeerName: "veth2"}))
	must(netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: Tunnel}, VxlanId: 1, VtepDevIndex: eth0.Attrs().Index, Port: 4789}))
	must(netlink.RouteAdd(&netlink.Route{Dst: &net.IPNet{IP: net.IPv4(10, 1, 9, 0), Mask: net.CIDRMask(24, 32)}, Gw: net.ParseIP(outsideAddr)}))
	run(t, `table ip kube-proxy { chain x { }; }
table ip6 kube-proxy { chain x { }; }`, "nft", "-f", "-")
	if state() == before {
		t.Fatal("nothing was put on the host: the test is wrong")
	}

	for range 2 { // the second time finds nothing
		if err := Cleanup(t.Context(), env); err != nil {
			t.Fatal(err)
		}
		if got := state(); got != before {
			t.Errorf("after cleanup the host is\n%s\n\nand was\n%s", got, before)
		}
	}
}

// TestCleanupBesideAnotherCluster has what k3s or kubeadm make under the names that we use: it stays,
// whether the node has put something there or not, and whatever else of ours goes.
func TestCleanupBesideAnotherCluster(t *testing.T) {
	const theirs = "10.42.0"
	addr := func(l netlink.Link, text string) {
		t.Helper()
		a, err := netlink.ParseAddr(text)
		if err == nil {
			err = netlink.AddrAdd(l, a)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name                              string
		used                              bool // this installation has had a pod network here
		bridge, tunnel, proxy             string
		port                              int
		bridgeStays, tunStays, proxyStays bool
	}{
		{"ours", true, "10.1.5.1/24", "10.1.5.0/32", "10.152.183.1", 4789, false, false, false},
		{"ours, without addresses", true, "", "", "", 4789, false, false, false},
		{"theirs", true, theirs + ".1/24", theirs + ".0/32", "10.43.0.1", 8472, true, true, true},
		{"theirs, at our port", true, theirs + ".1/24", theirs + ".0/32", "10.43.0.1", 4789, true, true, true},
		{"theirs, tunnel without an address", true, theirs + ".1/24", "", "10.43.0.1", 8472, true, true, true},
		{"nothing was ever ours", false, "", "", "10.43.0.1", 8472, true, true, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			enter(t)
			env := snapenv.Under(t.TempDir())
			must := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			if tc.used {
				must(WriteConflist(env, []netip.Prefix{podNet}, 1450))
				must(os.MkdirAll(filepath.Dir(SubnetEnv(env)), 0o755))
				must(os.WriteFile(SubnetEnv(env), []byte("FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.5.1/24\n"), 0o644))
			}
			must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "peer"}))
			eth0, err := netlink.LinkByName("eth0")
			must(err)
			bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: Bridge}}
			must(netlink.LinkAdd(bridge))
			must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "veth1", MasterIndex: bridge.Index}, PeerName: "veth2"}))
			tunnel := &netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: Tunnel}, VxlanId: 1, VtepDevIndex: eth0.Attrs().Index, Port: tc.port}
			must(netlink.LinkAdd(tunnel))
			if tc.bridge != "" {
				addr(bridge, tc.bridge)
			}
			if tc.tunnel != "" {
				addr(tunnel, tc.tunnel)
			}
			elements := ""
			if tc.proxy != "" {
				elements = "elements = { " + tc.proxy + " };"
			}
			run(t, "table ip kube-proxy { set cluster-ips { type ipv4_addr; "+elements+" }; chain x { }; }", "nft", "-f", "-")
			must(Cleanup(t.Context(), env))
			there := func(name string) bool {
				_, err := netlink.LinkByName(name)
				return err == nil
			}
			if there(Bridge) != tc.bridgeStays || there("veth1") != tc.bridgeStays {
				t.Errorf("the bridge is there: %t, its veth: %t", there(Bridge), there("veth1"))
			}
			if there(Tunnel) != tc.tunStays {
				t.Errorf("the tunnel is there: %t", there(Tunnel))
			}
			if stays := strings.Contains(ruleset(t), "kube-proxy"); stays != tc.proxyStays {
				t.Errorf("kube-proxy's table is there: %t", stays)
			}
		})
	}
}

func TestCleanupRemovesOwnHostPorts(t *testing.T) {
	enter(t)
	env := snapenv.Under(t.TempDir())
	if err := WriteConflist(env, []netip.Prefix{podNet}, 1450); err != nil {
		t.Fatal(err)
	}
	run(t, `table ip cni_hostport { chain hostports { ip daddr 192.0.2.1 tcp dport 80 dnat to 10.1.5.7:80; }; }`, "nft", "-f", "-")
	if err := Cleanup(t.Context(), env); err != nil {
		t.Fatal(err)
	}
	if got := ruleset(t); got != "" {
		t.Errorf("left behind:\n%s", got)
	}
}

func TestPlanLegacy(t *testing.T) {
	wanted := legacyRules("FORWARD", cluster)
	spec := func(head ...string) func(rule string) string {
		return func(rule string) string { return strings.Join(append(head, legacySpec(rule)...), " ") }
	}
	for _, tc := range []struct {
		name    string
		listing []string
		want    []string
	}{
		{"open", []string{"-P FORWARD ACCEPT", "-A FORWARD -s 203.0.113.7/32 -j DROP"}, nil},
		{"closed by policy", []string{"-P FORWARD DROP"}, []string{spec("-A", "FORWARD")(wanted[0]), spec("-A", "FORWARD")(wanted[1])}},
		{"one there", []string{"-P FORWARD DROP", wanted[1]}, []string{spec("-A", "FORWARD")(wanted[0])}},
		{"both there", append([]string{"-P FORWARD DROP"}, wanted...), nil},
		{"closed by a rule", []string{"-P FORWARD ACCEPT", "-A FORWARD -i lo -j ACCEPT", "-A FORWARD -j REJECT --reject-with icmp-host-prohibited"},
			[]string{spec("-I", "FORWARD", "2")(wanted[0]), spec("-I", "FORWARD", "3")(wanted[1])}},
		{"too late", append([]string{"-P FORWARD ACCEPT", "-A FORWARD -j DROP"}, wanted...),
			[]string{spec("-I", "FORWARD", "1")(wanted[0]), spec("-I", "FORWARD", "2")(wanted[1])}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got []string
			for _, args := range planLegacy("FORWARD", tc.listing, wanted) {
				got = append(got, strings.Join(args, " "))
			}
			if strings.Join(got, "\n") != strings.Join(tc.want, "\n") {
				t.Errorf("plan is\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tc.want, "\n"))
			}
		})
	}
}

func TestRuleComment(t *testing.T) {
	for _, tc := range []struct{ data, want string }{
		{"", ""},
		{"\x00\x03hi\x00", "hi"},
		{"\x01\x01x\x00\x03hi\x00", "hi"},
		{"\x00\xffhi", ""}, // says it is longer than it is
		{"\x00", ""},
	} {
		if got := ruleComment([]byte(tc.data)); got != tc.want {
			t.Errorf("ruleComment(%q) = %q, want %q", tc.data, got, tc.want)
		}
	}
}

func TestParseCIDRs(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want int // 0: an error
	}{
		{"10.1.0.0/16", 1}, {"10.1.0.0/16,fd01::/64", 2}, {"10.1.0.0/16, fd01::/64", 2},
		{"", 0}, {"10.1.0.0", 0}, {"10.1.0.0/16,10.2.0.0/16", 0},
	} {
		got, err := ParseCIDRs(tc.in)
		if len(got) != tc.want || (err != nil) != (tc.want == 0) {
			t.Errorf("ParseCIDRs(%q) = %v, %v", tc.in, got, err)
		}
	}
}

func TestConflistRoundTrip(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	want := []netip.Prefix{podNet, netip.MustParsePrefix("fd01::/80")}
	if err := WriteConflist(env, want, 1450); err != nil {
		t.Fatal(err)
	}
	got := conflistSubnets(env)
	if len(got) != 2 || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("subnets are %v, want %v", got, want)
	}
	first, _ := os.Stat(Conflist(env))
	if err := WriteConflist(env, want, 1450); err != nil {
		t.Fatal(err)
	}
	// containerd loads the network again for every change of the directory.
	if second, _ := os.Stat(Conflist(env)); !os.SameFile(first, second) {
		t.Error("an unchanged configuration was written again")
	}
}
