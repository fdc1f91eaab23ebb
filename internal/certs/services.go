package certs

import (
	"net"

	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
)

// serviceIPs are the first addresses of the configured service CIDRs, which clients in pods use.
func serviceIPs(env snapenv.Env) ([]net.IP, error) {
	c := nodeconfig.Load(env)
	var ips []net.IP
	for _, prefix := range c.APIServer.ServiceCIDRs {
		ips = append(ips, prefix.Masked().Addr().Next().AsSlice())
	}
	return ips, c.Err(nodeconfig.PartServiceCIDRs)
}
