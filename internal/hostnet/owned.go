package hostnet

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
)

// Names of interfaces and tables are those of flannel, the bridge plugin and kube-proxy, so k3s,
// kubeadm and others have the same ones. Whose a thing is follows from the addresses in it, compared
// with what this installation wrote down before it made it: the CNI configuration and subnet.env for
// pods, the API server's arguments for Services.

// podNetworks are the ranges of the pods, of this node and of the cluster, as far as they are written
// down; nil where the pod network has put nothing on this host.
func podNetworks(env snapenv.Env) []netip.Prefix {
	return append(conflistSubnets(env), clusterNetworks(env)...)
}

// vxlanPort is the tunnel's; flannel's own default, which others use, is 8472.
const vxlanPort = 4789

// ownLink reports whether the bridge or a tunnel is this installation's: its addresses are in the
// networks. One without an address is, where the networks are known and, for a tunnel, the port fits.
func ownLink(l netlink.Link, networks []netip.Prefix) (bool, error) {
	if len(networks) == 0 {
		return false, nil
	}
	addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return false, fmt.Errorf("cannot list the addresses of %s: %w", l.Attrs().Name, err)
	}
	found := false
	for _, a := range addrs {
		ip, ok := netip.AddrFromSlice(a.IP)
		if !ok || ip.IsLinkLocalUnicast() {
			continue
		}
		if slices.ContainsFunc(networks, func(p netip.Prefix) bool { return p.Contains(ip.Unmap()) }) {
			return true, nil
		}
		found = true
	}
	if v, ok := l.(*netlink.Vxlan); ok && v.Port != vxlanPort {
		return false, nil
	}
	return !found, nil
}

// OwnNetwork reports whether an interface has an address in one of the networks.
func OwnNetwork(l netlink.Link, networks []netip.Prefix) bool {
	addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(addrs, func(a netlink.Addr) bool {
		ip, ok := netip.AddrFromSlice(a.IP)
		return ok && slices.ContainsFunc(networks, func(p netip.Prefix) bool { return p.Contains(ip.Unmap()) })
	})
}

// Names that kube-proxy gives in its mode nftables (pkg/proxy/nftables/proxier.go).
const (
	proxyTable = "kube-proxy"
	proxyIPs   = "cluster-ips" // the set of all Services' addresses
)

// removeProxyTables removes kube-proxy's tables, unless one has Services outside of this cluster's range:
// then another cluster's kube-proxy has taken it over. Empty ones translate nothing.
func removeProxyTables(env snapenv.Env) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("cannot open the nftables socket: %w", err)
	}
	tables, err := c.ListTables()
	if err != nil {
		return fmt.Errorf("cannot list the nftables tables: %w", err)
	}
	var ranges []netip.Prefix
	own := map[*nftables.Table]bool{}
	for _, t := range tables {
		if t.Name != proxyTable {
			continue
		}
		if ranges == nil {
			ranges = nodeconfig.Load(env).APIServer.ServiceCIDRs
		}
		own[t] = !servesElsewhere(c, t, ranges)
	}
	return removeTables(func(t *nftables.Table) bool {
		for o, is := range own {
			if o.Name == t.Name && o.Family == t.Family {
				return is
			}
		}
		return false
	})
}

// servesElsewhere reports whether a table of kube-proxy has a Service outside of the ranges.
func servesElsewhere(c *nftables.Conn, t *nftables.Table, ranges []netip.Prefix) bool {
	set, err := c.GetSetByName(t, proxyIPs)
	if err != nil {
		return false // kube-proxy has not come to it
	}
	elements, err := c.GetSetElements(set)
	if err != nil {
		return true // not known to be ours
	}
	for _, e := range elements {
		ip, ok := netip.AddrFromSlice(e.Key)
		if ok && !slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return p.Contains(ip.Unmap()) }) {
			return true
		}
	}
	return false
}
