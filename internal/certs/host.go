package certs

import (
	"fmt"
	"net"
	"net/netip"
	"strings"

	"microk8s/internal/args"
	"microk8s/internal/hostinfo"
	"microk8s/internal/snapenv"
)

// Defaults where the argument files say nothing.
const (
	defaultServiceCIDR = "10.152.183.0/24"
	defaultPort        = 16443
)

// Hostname is the machine's name in lower case, which is the node's name.
func Hostname() (string, error) {
	name, err := hostinfo.Hostname()
	return strings.ToLower(name), err
}

// serviceIPs are the first addresses of the configured service CIDRs, which clients in pods use.
func serviceIPs(env snapenv.Env) ([]net.IP, error) {
	text := defaultServiceCIDR
	if f, err := args.Load(env.Args("kube-apiserver"), args.GrammarA); err == nil {
		if v, ok := f.Value("service-cluster-ip-range", env.Lookup); ok {
			text = v
		}
	}
	var ips []net.IP
	for _, cidr := range strings.Split(text, ",") {
		prefix, err := netip.ParsePrefix(strings.TrimSpace(cidr))
		if err != nil {
			return nil, fmt.Errorf("cannot use --service-cluster-ip-range=%s in %s: %w", text, env.Args("kube-apiserver"), err)
		}
		ips = append(ips, prefix.Masked().Addr().Next().AsSlice())
	}
	return ips, nil
}

// securePort is where the API server listens.
func securePort(env snapenv.Env) int {
	f, err := args.Load(env.Args("kube-apiserver"), args.GrammarA)
	if err != nil {
		return defaultPort
	}
	v, _ := f.Value("secure-port", env.Lookup)
	port := 0
	if _, err := fmt.Sscanf(v, "%d", &port); err != nil || port <= 0 || port > 65535 {
		return defaultPort
	}
	return port
}
