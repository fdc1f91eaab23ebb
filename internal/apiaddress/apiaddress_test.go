package apiaddress

import (
	"encoding/hex"
	"net"
	"net/netip"
	"os"
	"testing"

	"microk8s/internal/snapenv"
)

func TestParse(t *testing.T) {
	for text, ok := range map[string]bool{
		"10.64.140.5": true, "fd00::5": true, "::ffff:10.0.0.1": true,
		"": false, "router": false, "127.0.0.1": false, "0.0.0.0": false, "224.0.0.1": false, "fe80::1": false, "fe80::1%eth0": false, "10.0.0.0/8": false,
	} {
		if addr, err := Parse(text); (err == nil) != ok || ok && addr.Is4In6() {
			t.Errorf("%q: %v, %v", text, addr, err)
		}
	}
}

// TestKeep: the copy of the node follows the cluster, and is in the certificates' names once.
func TestKeep(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	if err := os.MkdirAll(env.CertsDir(), 0o755); err != nil {
		t.Fatal(err)
	}
	own := []net.IP{net.IPv4(10, 0, 0, 1)}
	if list, shared := Apart(env, own); len(list) != 1 || len(shared) != 0 {
		t.Errorf("without an address: %v, %v", list, shared)
	}
	addr := netip.MustParseAddr("10.0.0.9")
	for range 2 {
		if err := Keep(env, addr); err != nil {
			t.Fatal(err)
		}
	}
	if got := Read(env); got != addr {
		t.Errorf("kept %v", got)
	}
	for _, host := range [][]net.IP{own, append(own[:1:1], net.IPv4(10, 0, 0, 9))} { // also on the node that has it
		if list, shared := Apart(env, host); len(list) != 1 || !list[0].Equal(own[0]) || len(shared) != 1 || !shared[0].Equal(net.IPv4(10, 0, 0, 9)) {
			t.Errorf("with an address: %v, %v", list, shared)
		}
	}
	for range 2 {
		if err := Keep(env, netip.Addr{}); err != nil {
			t.Fatal(err)
		}
	}
	if got := Read(env); got.IsValid() {
		t.Errorf("after it was removed: %v", got)
	}
}

// TestAnnouncements compares the packets with those of RFC 826 and RFC 4861.
func TestAnnouncements(t *testing.T) {
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 7}
	if got := hex.EncodeToString(arpRequest(mac, netip.MustParseAddr("10.0.0.9"))); got != "0001080006040001"+"020000000007"+"0a000009"+"000000000000"+"0a000009" {
		t.Errorf("the ARP request is %s", got)
	}
	if got := hex.EncodeToString(advertisement(mac, netip.MustParseAddr("fd00::9"))); got != "20000000"+"fd000000000000000000000000000009"+"0201"+"020000000007" {
		t.Errorf("the neighbour advertisement is %s", got)
	}
}
