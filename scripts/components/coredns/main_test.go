package main

import (
	"slices"
	"testing"
)

func TestUpstreams(t *testing.T) {
	own := []string{"10.152.183.10"}
	for _, tc := range []struct {
		name, text string
		use, left  []string
	}{
		{"nothing", "", nil, nil},
		{"only a search list", "search home.arpa\noptions edns0\n", nil, nil},
		{"servers", "# by dhcp\nnameserver 192.0.2.1\nnameserver 2001:db8::1\n", []string{"192.0.2.1", "2001:db8::1"}, nil},
		{"stub of systemd-resolved", "nameserver 127.0.0.53\n", nil, []string{"127.0.0.53"}},
		{"stub beside a server", "nameserver 127.0.0.1\nnameserver 192.0.2.1\n", []string{"192.0.2.1"}, []string{"127.0.0.1"}},
		{"IPv6 loopback", "nameserver ::1\n", nil, []string{"::1"}},
		{"this cluster", "nameserver 10.152.183.10\n", nil, []string{"10.152.183.10"}},
		{"of the host's link", "nameserver fe80::1%eth0\nnameserver 192.0.2.1\n", []string{"192.0.2.1"}, []string{"fe80::1%eth0"}},
		{"without a scope", "nameserver fe80::1\n", nil, []string{"fe80::1"}},
		{"a cloud's", "nameserver 169.254.169.254\n", []string{"169.254.169.254"}, nil},
		{"no address", "nameserver router\nnameserver\n", nil, []string{"router"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			use, left := upstreams(tc.text, own)
			if !slices.Equal(use, tc.use) || !slices.Equal(left, tc.left) {
				t.Errorf("use %q, left %q; want %q and %q", use, left, tc.use, tc.left)
			}
		})
	}
}
