package member

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"microk8s/internal/datastore/storedir"
)

// TestRecoverOfASpare: there is nothing to go on with, and nothing is changed.
func TestRecoverOfASpare(t *testing.T) {
	parent := t.TempDir()
	dir := filepath.Join(parent, "backend")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	const info = "Address: 127.0.0.1:1\nID: 7\nRole: 2\n"
	if err := os.WriteFile(filepath.Join(dir, storedir.InfoFile), []byte(info), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Recover(dir, nil, filepath.Join(parent, "saved")); !errors.Is(err, ErrNoData) || !strings.Contains(err.Error(), "microk8s dbctl restore") {
		t.Errorf("%v, want %v", err, ErrNoData)
	}
	entries, err := os.ReadDir(parent)
	text, readErr := os.ReadFile(filepath.Join(dir, storedir.InfoFile))
	if err != nil || readErr != nil || len(entries) != 1 || string(text) != info {
		t.Errorf("left %v, %q, %v, %v", entries, text, err, readErr)
	}
}

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
