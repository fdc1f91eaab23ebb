package network

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"microk8s/internal/hostnet"
)

// pod connects a pod as the bridge plugin does, and writes down what the CNI library would.
func (m *machine) pod(id, bridgeAddr, addr string) (netnsPath string) {
	m.t.Helper()
	sleeper := exec.Command("sleep", "infinity")
	sleeper.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNET}
	if err := sleeper.Start(); err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { sleeper.Process.Kill(); sleeper.Wait() })
	netnsPath = fmt.Sprintf("/proc/%d/ns/net", sleeper.Process.Pid)
	host := "veth" + id
	m.run("ip", "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", fmt.Sprint(sleeper.Process.Pid))
	m.run("ip", "link", "set", host, "master", hostnet.Bridge, "up", "mtu", "1450")
	m.run("nsenter", "--net="+netnsPath, "sh", "-ec", "ip link set lo up; ip addr add "+addr+" dev eth0; ip link set eth0 mtu 1450 up; ip route add default via "+strings.Split(bridgeAddr, "/")[0])
	data, err := json.Marshal(map[string]any{
		"kind": "cniCacheV1", "containerId": id, "networkName": hostnet.NetworkName, "ifName": "eth0", "netns": netnsPath,
		"result": map[string]any{
			"cniVersion": "1.0.0",
			"interfaces": []any{
				map[string]any{"name": hostnet.Bridge, "mac": "02:00:00:00:10:01"}, map[string]any{"name": host, "mac": "02:00:00:00:10:02"},
				map[string]any{"name": "eth0", "mac": "02:00:00:00:10:03", "sandbox": netnsPath},
			},
			"ips": []any{map[string]any{"address": addr, "interface": 2}},
		},
	})
	file := m.env.HostPath("var/lib/cni/results/" + hostnet.NetworkName + "-" + id + "-eth0")
	if err == nil {
		err = os.MkdirAll(filepath.Dir(file), 0o700)
	}
	if err == nil {
		err = os.WriteFile(file, data, 0o600)
	}
	if err != nil {
		m.t.Fatal(err)
	}
	return netnsPath
}

// inside runs f in the network of a pod, on a thread that ends with it.
func inside(t *testing.T, path string, f func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		ns, err := netns.GetFromPath(path)
		if err == nil {
			defer ns.Close()
			err = netns.Set(ns)
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// run runs a program on the machine and fails the test if it fails.
func (m *machine) run(name string, args ...string) string {
	m.t.Helper()
	var out []byte
	var err error
	m.in(func() { out, err = exec.Command(name, args...).CombinedOutput() })
	if err != nil {
		m.t.Fatalf("%s: %s %s: %v\n%s", m.name, name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// TestHeal does to a node's network what other programs and people do, and wants each thing back: by the state of the
// kernel, and by packets between pods of two nodes.
func TestHeal(t *testing.T) {
	f, a, b := newCluster(t, BackendVXLAN)
	f.set(newNode("node0", "10.1.0.0/24", "192.0.2.1"))
	f.set(newNode("node1", "10.1.1.0/24", "192.0.2.2"))
	for _, m := range []*machine{a, b} {
		m.start()
	}
	a.awaitReady()
	b.awaitReady()
	a.bridge("10.1.0.1/24")
	b.bridge("10.1.1.1/24")
	podA := a.pod("a", "10.1.0.1/24", "10.1.0.2/24")
	podB := b.pod("b", "10.1.1.1/24", "10.1.1.2/24")
	var server net.PacketConn
	inside(t, podB, func() (err error) {
		server, err = net.ListenPacket("udp4", "10.1.1.2:7")
		return err
	})
	defer server.Close()
	go func() { // echo
		buf := make([]byte, 2000)
		for {
			n, from, err := server.ReadFrom(buf)
			if err != nil {
				return
			}
			server.WriteTo(buf[:n], from)
		}
	}()
	ping := func() bool {
		answered := false
		inside(t, podA, func() error {
			c, err := net.Dial("udp4", "10.1.1.2:7")
			if err != nil {
				return nil
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(200 * time.Millisecond))
			c.Write([]byte("x"))
			n, err := c.Read(make([]byte, 10))
			answered = n == 1 && err == nil
			return nil
		})
		return answered
	}
	a.await("answer of the other node's pod before any fault", ping)

	text := func(name string, args ...string) string {
		out, _ := exec.Command(name, args...).CombinedOutput()
		return string(out)
	}
	has := func(want string, name string, args ...string) func() bool {
		return func() bool { return strings.Contains(text(name, args...), want) }
	}
	for _, fault := range []struct {
		name  string
		do    string
		check func() bool // in the machine's network; nil where packets say it
	}{
		{"flush ruleset", "nft flush ruleset", has("masquerade", "nft", "list", "table", "ip", hostnet.Table)},
		{"a table without rules", "nft flush table ip " + hostnet.Table, has("masquerade", "nft", "list", "table", "ip", hostnet.Table)},
		{"one rule less", "nft delete rule ip " + hostnet.Table + " postrouting handle $(nft -a list table ip " + hostnet.Table + " | sed -n 's/.*masquerade.*handle //p' | head -1)",
			has("!= 224.0.0.0/4", "nft", "list", "table", "ip", hostnet.Table)},
		{"routes of the tunnel", "ip route flush dev flannel.1", has("10.1.1.0/24 via 10.1.1.0", "ip", "route")},
		{"a route to somewhere else", "ip route replace 10.1.1.0/24 via 192.0.2.2 dev eth0", has("10.1.1.0/24 via 10.1.1.0 dev flannel.1", "ip", "route")},
		{"neighbours", "ip neigh flush dev flannel.1 nud permanent", has("10.1.1.0 ", "ip", "neigh", "show", "dev", "flannel.1", "nud", "permanent")},
		{"forwarding entries", "bridge fdb flush dev flannel.1", has("dst 192.0.2.2", "bridge", "fdb", "show", "dev", "flannel.1")},
		{"tunnel down and up", "ip link set flannel.1 down; sleep 0.3; ip link set flannel.1 up", has("10.1.1.0/24 via 10.1.1.0", "ip", "route")},
		{"tunnel down", "ip link set flannel.1 down", has("UP", "ip", "link", "show", "flannel.1", "up")},
		{"tunnel deleted", "ip link del flannel.1", has("10.1.1.0/24 via 10.1.1.0", "ip", "route")},
		{"tunnel without its address", "ip addr flush dev flannel.1", has("inet 10.1.0.0/32", "ip", "addr", "show", "flannel.1")},
		{"tunnel with another hardware address", "ip link set flannel.1 down; ip link set flannel.1 address 02:00:00:00:00:77", nil},
		{"uplink down and up", "ip link set eth0 down; sleep 0.3; ip link set eth0 up", nil},
		{"bridge down", "ip link set cni0 down", has("UP", "ip", "link", "show", "cni0", "up")},
		{"bridge without address", "ip addr flush dev cni0", has("inet 10.1.0.1/24", "ip", "addr", "show", "cni0")},
		{"bridge with an address of another subnet", "ip addr flush dev cni0; ip addr add 10.1.7.1/24 dev cni0", func() bool {
			out := text("ip", "addr", "show", "cni0")
			return strings.Contains(out, "10.1.0.1/24") && !strings.Contains(out, "10.1.7.1")
		}},
		{"bridge with an address of the owner", "ip addr flush dev cni0; ip addr add 198.51.100.1/24 dev cni0", func() bool {
			// Ours is first: the bridge plugin refuses otherwise.
			ours, theirs, both := strings.Cut(text("ip", "addr", "show", "cni0"), "10.1.0.1/24")
			return both && !strings.Contains(ours, "198.51.100.1") && strings.Contains(theirs, "198.51.100.1/24")
		}},
		{"bridge deleted", "ip link del cni0", has("master cni0", "ip", "link", "show", "vetha")},
		{"pod off the bridge", "ip link set vetha nomaster", has("master cni0", "ip", "link", "show", "vetha")},
		{"pod's link down", "ip link set vetha down", has("UP", "ip", "link", "show", "vetha", "up")},
		{"forwarding off", "echo 0 >/proc/sys/net/ipv4/ip_forward", has("1", "cat", "/proc/sys/net/ipv4/ip_forward")},
		{"a firewall that drops", "nft 'add table inet f; add chain inet f fw { type filter hook forward priority 0; policy drop; }'", nil},
		{"firewall gone", "nft delete table inet f", nil},
		{"a legacy firewall that drops", "iptables-legacy -P FORWARD DROP", nil},
		{"a legacy firewall that is flushed", "iptables-legacy -F FORWARD", nil},
		{"a legacy firewall gone", "iptables-legacy -P FORWARD ACCEPT", nil},
		{"CNI configuration removed", "rm " + hostnet.Conflist(a.env), has("bridge", "cat", hostnet.Conflist(a.env))},
		{"CNI configuration changed", "echo {} >" + hostnet.Conflist(a.env), has("bridge", "cat", hostnet.Conflist(a.env))},
		{"a smaller MTU", "ip link set eth0 mtu 1400", func() bool {
			return strings.Contains(text("ip", "link", "show", "flannel.1"), "mtu 1350") && strings.Contains(text("ip", "link", "show", "cni0"), "mtu 1350") &&
				strings.Contains(text("ip", "link", "show", "vetha"), "mtu 1350") && strings.Contains(text("nsenter", "--net="+podA, "ip", "link", "show", "eth0"), "mtu 1350")
		}},
		{"a larger MTU", "ip link set eth0 mtu 1500", func() bool {
			return strings.Contains(text("ip", "link", "show", "flannel.1"), "mtu 1450") && strings.Contains(text("nsenter", "--net="+podA, "ip", "link", "show", "eth0"), "mtu 1450")
		}},
	} {
		t.Run(fault.name, func(t *testing.T) {
			a.t = t
			a.run("sh", "-c", fault.do)
			if fault.check != nil {
				a.await("repair", fault.check)
			}
			a.await("answer of the other node's pod", ping)
		})
	}
	a.t = t

	t.Log("what is the owner's stays")
	a.run("ip", "route", "add", "203.0.113.0/24", "dev", "eth0")
	a.run("nft", "add table ip owners")
	a.run("ip", "link", "set", "flannel.1", "down")
	a.await("repair", has("10.1.1.0/24 via 10.1.1.0", "ip", "route"))
	if out := a.run("ip", "route"); !strings.Contains(out, "203.0.113.0/24") {
		t.Errorf("the owner's route went: %s", out)
	}
	if out := a.run("nft", "list", "tables"); !strings.Contains(out, "owners") {
		t.Errorf("the owner's table went: %s", out)
	}

	t.Log("a node that is registered again with another subnet")
	f.remove("node0")
	f.set(newNode("node0", "10.1.9.0/24", "192.0.2.1"))
	a.await("other addresses", func() bool {
		return strings.Contains(text("ip", "addr", "show", "cni0"), "10.1.9.1/24") && !strings.Contains(text("ip", "addr", "show", "cni0"), "10.1.0.1/24") &&
			strings.Contains(text("ip", "addr", "show", "flannel.1"), "10.1.9.0/32")
	})
	reach(t, b, a, "10.1.9.1")
	a.await("end of the old pod's sandbox", func() bool {
		ended, _ := os.ReadFile(filepath.Join(a.env.Host, "ended"))
		return strings.Contains(string(ended), "a\n")
	})
}
