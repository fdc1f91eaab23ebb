package apiaddress

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

	"microk8s/internal/hostwatch/hosttest"
)

// TestOnAHost puts the address on the interface of its network, with a full-length mask, and takes it off again.
func TestOnAHost(t *testing.T) {
	if !hosttest.Alone(t) {
		return
	}
	la := netlink.NewLinkAttrs()
	la.Name = "lan0"
	l := &netlink.Bridge{LinkAttrs: la}
	if err := errors.Join(netlink.LinkAdd(l), netlink.LinkSetUp(l)); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"10.0.0.1/24", "fd00:64::1/64"} {
		a, err := netlink.ParseAddr(text)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.AddrAdd(l, a); err != nil {
			t.Fatal(err)
		}
	}
	if err := Network(netip.MustParseAddr("10.9.0.1")); !errors.Is(err, ErrElsewhere) {
		t.Errorf("another network: %v", err)
	}
	for _, text := range []string{"10.0.0.9", "fd00:64::9"} {
		addr := netip.MustParseAddr(text)
		for _, want := range []bool{true, false} {
			if added, err := Add(addr); err != nil || added != want {
				t.Errorf("%s: added %v, %v; want %v", addr, added, err, want)
			}
		}
		list, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, a := range list {
			ones, bits := a.Mask.Size()
			if a.IP.String() == text {
				found = ones == bits
			}
		}
		if !found {
			t.Errorf("%s is not there with a full-length mask: %v", addr, list)
		}
		for range 2 {
			if err := Remove(addr); err != nil {
				t.Fatal(err)
			}
		}
		if here, err := Here(addr); err != nil || here {
			t.Errorf("%s: still here %v, %v", addr, here, err)
		}
	}
	own := netip.MustParseAddr("10.0.0.1")
	if err := Remove(own); err != nil {
		t.Fatal(err)
	}
	if here, _ := Here(own); !here {
		t.Error("the host's own address was removed")
	}
}
