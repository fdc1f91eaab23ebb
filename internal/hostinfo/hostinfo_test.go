package hostinfo

import (
	"net"
	"slices"
	"testing"

	"microk8s/internal/hostwatch/hosttest"
)

// TestJoinable has the address of host-access on the loopback interface, and one that other machines reach.
func TestJoinable(t *testing.T) {
	if !hosttest.Alone(t) {
		return
	}
	hosttest.Run(t, "sh", "-ec", "ip addr add 10.0.1.1/32 dev lo label lo:microk8s; ip link add eth0 type bridge; ip link set eth0 up; ip addr add 192.0.2.1/24 dev eth0")
	has := func(list []net.IP, err error, text string) bool {
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(list, func(ip net.IP) bool { return ip.String() == text })
	}
	all, err := Addresses()
	if !has(all, err, "10.0.1.1") || !has(all, err, "192.0.2.1") {
		t.Errorf("addresses %v", all)
	}
	joinable, err := Joinable()
	if has(joinable, err, "10.0.1.1") || !has(joinable, err, "192.0.2.1") {
		t.Errorf("joinable at %v", joinable)
	}
}
