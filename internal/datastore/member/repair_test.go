package member

import (
	"net"
	"strings"
	"testing"

	"microk8s/internal/datastore/storedir"
)

// TestMayReseed: a directory that names a member is not enough to take that member out of the cluster.
func TestMayReseed(t *testing.T) {
	_, here, err := net.ParseCIDR("10.0.0.0/24")
	if err != nil {
		t.Fatal(err)
	}
	here.IP = net.IPv4(10, 0, 0, 3)
	other := storedir.Member{ID: 1, Address: "10.0.0.1:19001"}
	self := storedir.Member{ID: 7, Address: "10.0.0.3:19001"}
	for _, tc := range []struct {
		name  string
		self  storedir.Member
		known []storedir.Member
		says  string // "" when it may
	}{
		{"the member itself", self, []storedir.Member{other, self}, ""},
		{"removed already", self, []storedir.Member{other}, ""},
		{"a host name", storedir.Member{ID: 7, Address: "n3:19001"}, []storedir.Member{other, {ID: 7, Address: "n3:19001"}}, ""},
		{"a copy on another machine", storedir.Member{ID: 8, Address: "10.0.0.4:19001"}, []storedir.Member{other, {ID: 8, Address: "10.0.0.4:19001"}}, "no address of this machine"},
		{"the address is another member's", self, []storedir.Member{other, {ID: 9, Address: self.Address}}, "another member has the address"},
		{"the member has moved", self, []storedir.Member{other, {ID: 7, Address: "10.0.0.5:19001"}}, "old copy"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := mayReseed(tc.self, tc.known, []net.Addr{here})
			if (err == nil) != (tc.says == "") || err != nil && (!strings.Contains(err.Error(), tc.says) || !strings.Contains(err.Error(), "microk8s leave")) {
				t.Errorf("%v, want %q", err, tc.says)
			}
		})
	}
}
