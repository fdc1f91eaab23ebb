package network

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"microk8s/internal/netcheck"
)

// checkMain is a check from one machine to another, as the command line does it; it prints the results.
func checkMain() int {
	var c struct{ Self, Peer netcheck.Node }
	if err := json.Unmarshal([]byte(os.Getenv("NETWORK_TEST_CHECK")), &c); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	check := netcheck.Check{Self: c.Self, Peers: []netcheck.Node{c.Peer}, MTU: 1450, Heard: func(netcheck.Node) time.Time {
		if os.Getenv("NETWORK_TEST_HEARD") != "" {
			return time.Now()
		}
		return time.Time{}
	}}
	results, err := check.Run(context.Background())
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(results)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// TestWays closes the way between two nodes as firewalls and networks do, and wants each named.
func TestWays(t *testing.T) {
	f, a, b := newCluster(t, BackendVXLAN)
	f.set(newNode("node0", "10.1.0.0/24", "192.0.2.1"))
	f.set(newNode("node1", "10.1.1.0/24", "192.0.2.2"))
	a.start()
	b.start()
	a.awaitReady()
	b.awaitReady()
	question, err := json.Marshal(map[string]netcheck.Node{
		"Self": {Name: "node0", Address: netip.MustParseAddr("192.0.2.1"), Tunnel: netip.MustParseAddr("10.1.0.0")},
		"Peer": {Name: "node1", Address: netip.MustParseAddr("192.0.2.2"), Tunnel: netip.MustParseAddr("10.1.1.0")},
	})
	if err != nil {
		t.Fatal(err)
	}
	check := func(environ ...string) netcheck.Result {
		t.Helper()
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(append(os.Environ(), "NETWORK_TEST_CHECK="+string(question)), environ...)
		var out, errOut bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errOut
		a.in(func() { err = cmd.Run() })
		var results []netcheck.Result
		if err == nil {
			err = json.Unmarshal(out.Bytes(), &results)
		}
		if err != nil || len(results) != 1 {
			t.Fatalf("%v: %s%s", err, &out, &errOut)
		}
		return results[0]
	}
	a.await("a way without problems", func() bool { r := check(); return r.Tunnel && len(r.Problems) == 0 })
	for _, tc := range []struct{ name, rule, environ, code, says string }{
		{"4789/udp is closed", "udp dport 4789 drop", "", "tunnel", "UDP port 4789 is closed between 192.0.2.1 and 192.0.2.2"},
		{"one way only", "udp dport 4789 drop", "NETWORK_TEST_HEARD=1", "one-way", "none gets from here to node1"},
		{"a smaller MTU on the way", "udp dport 4789 meta length gt 1380 drop", "", "mtu", "packets of pods (1450 bytes) to node node1 get lost, while smaller ones get through (1300 bytes do)"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b.run("nft", "add table inet t")
			defer b.run("nft", "delete table inet t")
			b.run("nft", "add chain inet t i { type filter hook prerouting priority -300; }")
			b.run("sh", "-c", "nft add rule inet t i "+tc.rule)
			r := check(tc.environ)
			if r.Tunnel || len(r.Problems) != 1 || r.Problems[0].Code != tc.code || !strings.Contains(r.Problems[0].What, tc.says) || r.Problems[0].Do == "" {
				t.Errorf("found %+v, want %s: %s", r, tc.code, tc.says)
			}
		})
	}
	t.Run("the node is down", func(t *testing.T) {
		b.run("ip", "link", "set", "eth0", "down")
		defer b.run("ip", "link", "set", "eth0", "up")
		if r := check(); len(r.Problems) != 1 || r.Problems[0].Code != netcheck.Unreachable {
			t.Errorf("found %+v, want %s", r, netcheck.Unreachable)
		}
	})
	a.await("a way without problems again", func() bool { r := check(); return r.Tunnel && len(r.Problems) == 0 })
	a.await("the node's own record", func() bool { return len(netcheck.ReadRecord(a.env, time.Now()).Results) == 1 })
}
