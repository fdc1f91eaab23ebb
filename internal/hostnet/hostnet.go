// Package hostnet is everything the pod network leaves on the host besides flannel's tunnel:
// the masquerading table, the accept rules in the host's own firewall, forwarding, the CNI
// configuration; and the removal of all of it. It speaks netlink itself, so that it needs
// neither nft nor iptables on the machine, and knows nothing of Kubernetes or flannel, so
// that `reset` and the lab can use it without linking either.
//
// Services (kube-proxy) and host ports (the portmap plugin) are programmed by others; only
// [Cleanup] knows their tables, to remove what they leave behind.
package hostnet

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"microk8s/internal/snapenv"
)

// Names that the pod network gives to things on the host.
const (
	Bridge       = "cni0"            // the bridge the pods of a node are on
	Tunnel       = "flannel.1"       // VXLAN device; flannel names it after VNI 1
	Tunnel6      = "flannel-v6.1"    // the same for IPv6
	Table        = "microk8s-pods"   // our nftables table, families ip and ip6
	PolicyTable  = "microk8s-policy" // the table of NetworkPolicies, family inet (internal/netpolicy/nft)
	Comment      = "generated for MicroK8s pods"
	NetworkName  = "microk8s" // of the CNI network; prefix of the CNI library's result files
	ConflistName = "10-microk8s.conflist"
)

// CheckPort is the UDP port at which a node answers the network checks of others (package netcheck), on the
// address of its tunnel.
const CheckPort = 25001

// Conflist is the CNI configuration this package writes.
func Conflist(env snapenv.Env) string { return filepath.Join(env.CNIConf(), ConflistName) }

// SubnetEnv is the file in flannel's own format that says which network is in use, so that
// [Cleanup] and the flannel CNI plugin of other products find it.
func SubnetEnv(env snapenv.Env) string { return filepath.Join(env.RunDir(), "flannel/subnet.env") }

// leasesDir is where the host-local plugin keeps the addresses it gave out. It is below /run,
// which is empty after a boot: so are the pods, and no address of a pod that died with the
// machine stays taken.
func leasesDir(env snapenv.Env) string { return env.HostPath("run/microk8s/cni") }

// ParseCIDRs reads a cluster CIDR as the Kubernetes components take it: one, or one of each
// family with a comma between.
func ParseCIDRs(s string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for part := range strings.SplitSeq(s, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(part))
		if err != nil {
			return nil, fmt.Errorf("cannot read the cluster CIDR %q: %w", s, err)
		}
		for _, other := range out {
			if other.Addr().Is4() == p.Addr().Is4() {
				return nil, fmt.Errorf("cannot use the cluster CIDR %q: two ranges of one family", s)
			}
		}
		out = append(out, p.Masked())
	}
	return out, nil
}

// Forwarding switches IP forwarding on for the families in use. It is not switched off again
// by [Cleanup], because others on the host may have come to need it.
//
// Without care, IPv6 forwarding makes the kernel ignore router advertisements and with them
// lose its default route, so interfaces that accept them keep doing so. changed reports whether something was off.
func Forwarding(cidrs []netip.Prefix) (changed bool, err error) {
	var errs []error
	set := func(name, value string) {
		did, err := setSysctl(name, value)
		changed = changed || did
		errs = append(errs, err)
	}
	for _, c := range cidrs {
		if c.Addr().Is4() {
			set("net/ipv4/ip_forward", "1")
			continue
		}
		paths, _ := filepath.Glob(sysctlPath("net/ipv6/conf/*/accept_ra"))
		for _, path := range paths {
			if v, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(v)) == "1" {
				errs = append(errs, os.WriteFile(path, []byte("2"), 0o644))
			}
		}
		set("net/ipv6/conf/all/forwarding", "1")
	}
	return changed, errors.Join(errs...)
}

// BridgeFiltered makes frames that stay on the bridge pass the firewall, and reports whether
// they do. It needs the module br_netfilter, which a container may not have. Without it the
// answer of a pod to another pod of the same node, reached through a Service, would not be
// translated back; see [Rules].
func BridgeFiltered() bool {
	_, err := setSysctl("net/bridge/bridge-nf-call-iptables", "1")
	_, _ = setSysctl("net/bridge/bridge-nf-call-ip6tables", "1") // only of use with IPv6 pods
	return err == nil
}

func sysctlPath(name string) string { return "/proc/sys/" + name }

// setSysctl writes only what is not so already: /proc/sys may be read-only in a container
// whose host has set everything as needed.
func setSysctl(name, value string) (changed bool, err error) {
	path := sysctlPath(name)
	if old, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(old)) == value {
		return false, nil
	}
	if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
		return false, fmt.Errorf("cannot set %s to %s: %w", strings.ReplaceAll(name, "/", "."), value, err)
	}
	return true, nil
}
