package certs

import (
	"net"
	"net/netip"
	"slices"

	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
)

// serviceIPs are the first addresses of the configured service CIDRs, which clients in pods use, and the loopback of IPv6 where one is of
// that family.
func serviceIPs(env snapenv.Env) ([]net.IP, error) {
	c := nodeconfig.Load(env)
	var ips []net.IP
	for _, prefix := range c.APIServer.ServiceCIDRs {
		ips = append(ips, prefix.Masked().Addr().Next().AsSlice())
	}
	if slices.ContainsFunc(c.APIServer.ServiceCIDRs, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		ips = append(ips, net.IPv6loopback)
	}
	return ips, c.Err(nodeconfig.PartServiceCIDRs)
}
