package broker

import (
	"net/netip"
	"testing"
)

func TestOtherNetwork(t *testing.T) {
	own := []Interface{netip.MustParsePrefix("10.77.0.11/24"), netip.MustParsePrefix("10.77.0.100/24"), netip.MustParsePrefix("192.168.50.1/24"), netip.MustParsePrefix("fd00::1/64")}
	for _, tc := range []struct {
		known, to string
		want      bool
	}{
		{"10.77.0.11", "192.168.50.1", true},
		{"10.77.0.11", "10.77.0.11", false},
		{"10.77.0.11", "10.77.0.100", false}, // a virtual address of keepalived
		{"10.77.0.11", "fd00::1", false},
		{"203.0.113.9", "192.168.50.1", false}, // known by an address behind a translation
	} {
		if got := otherNetwork(own, []netip.Addr{netip.MustParseAddr(tc.known)}, netip.MustParseAddr(tc.to)); got != tc.want {
			t.Errorf("known by %s, joined at %s: %v, want %v", tc.known, tc.to, got, tc.want)
		}
	}
}
