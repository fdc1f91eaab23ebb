package hostnet

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TunnelState is what a tunnel has to be like. It is flannel that makes it and adds nodes to it; this is for
// what somebody else took away since.
type TunnelState struct {
	Name    string           // [Tunnel] or [Tunnel6]
	MAC     net.HardwareAddr // as it is announced to the other nodes; nil leaves it alone
	Address netip.Prefix     // of the tunnel itself
	Peers   []Peer
}

// Peer is another node.
type Peer struct {
	Subnet netip.Prefix // its pods
	Node   netip.Addr   // the node itself
	MAC    net.HardwareAddr
}

// ensureTunnel puts the link of a tunnel and everything that leads through it in order. A tunnel that is not
// there is left to flannel.
func (c *changes) ensureTunnel(t TunnelState, mtu int, cluster []netip.Prefix) {
	link, err := netlink.LinkByName(t.Name)
	if err != nil {
		if none := (netlink.LinkNotFoundError{}); !errors.As(err, &none) {
			c.errs = append(c.errs, fmt.Errorf("cannot find %s: %w", t.Name, err))
		}
		return
	}
	if len(t.MAC) > 0 && !bytes.Equal(link.Attrs().HardwareAddr, t.MAC) {
		c.try(netlink.LinkSetHardwareAddr(link, t.MAC), "hardware address %s of %s", t.MAC, t.Name)
	}
	c.ensureMTU(link, mtu)
	c.ensureAddresses(link, []netip.Prefix{t.Address}, cluster)
	c.ensureUp(link)
	c.ensureNeighbors(link, t.Peers)
	routes := make([]netlink.Route, 0, len(t.Peers))
	for _, p := range t.Peers {
		r := netlink.Route{LinkIndex: link.Attrs().Index, Scope: unix.RT_SCOPE_UNIVERSE, Dst: toIPNet(p.Subnet), Gw: p.Subnet.Addr().AsSlice()}
		r.SetFlag(netlink.FLAG_ONLINK)
		routes = append(routes, r)
	}
	c.ensureRoutes(link, routes, cluster)
}

// ensureNeighbors has the tunnel know each peer: the hardware address behind the first address of its subnet, and
// the node behind the hardware address.
func (c *changes) ensureNeighbors(link netlink.Link, peers []Peer) {
	index, name := link.Attrs().Index, link.Attrs().Name
	var list []netlink.Neigh
	for _, family := range []int{unix.AF_INET, unix.AF_INET6, unix.AF_BRIDGE} {
		part, err := netlink.NeighList(index, family)
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			c.errs = append(c.errs, fmt.Errorf("cannot list the neighbours on %s: %w", name, err))
			return
		}
		list = append(list, part...)
	}
	has := func(bridge bool, ip netip.Addr, mac net.HardwareAddr) bool {
		return slices.ContainsFunc(list, func(n netlink.Neigh) bool {
			return (n.Family == unix.AF_BRIDGE) == bridge && n.LinkIndex == index && n.State&netlink.NUD_PERMANENT != 0 &&
				n.IP.Equal(ip.AsSlice()) && bytes.Equal(n.HardwareAddr, mac)
		})
	}
	for _, p := range peers {
		if gw := p.Subnet.Addr(); !has(false, gw, p.MAC) {
			c.try(netlink.NeighSet(&netlink.Neigh{
				LinkIndex: index, State: netlink.NUD_PERMANENT, Type: unix.RTN_UNICAST, IP: gw.AsSlice(), HardwareAddr: p.MAC,
			}), "neighbour %s on %s", gw, name)
		}
		if !has(true, p.Node, p.MAC) {
			// Replaces one with another node behind the same hardware address.
			c.try(netlink.NeighSet(&netlink.Neigh{
				LinkIndex: index, State: netlink.NUD_PERMANENT, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, IP: p.Node.AsSlice(), HardwareAddr: p.MAC,
			}), "forwarding entry %s of %s", p.Node, name)
		}
	}
}

// ensureRoutes has these routes through a link, and no other ones with a gateway to pods of the cluster. link nil looks at
// all links, and removes nothing.
func (c *changes) ensureRoutes(link netlink.Link, wanted []netlink.Route, cluster []netip.Prefix) {
	have, err := netlink.RouteList(link, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		c.errs = append(c.errs, fmt.Errorf("cannot list routes: %w", err))
		return
	}
	for _, w := range wanted {
		if !slices.ContainsFunc(have, func(r netlink.Route) bool { return sameRoute(r, w) }) {
			c.try(netlink.RouteReplace(&w), "route %s", w.Dst)
		}
	}
	if link == nil {
		return
	}
	for _, r := range have {
		dst, ok := toPrefix(r.Dst)
		if !ok || r.Gw == nil || !slices.ContainsFunc(cluster, func(n netip.Prefix) bool { return n.Contains(dst.Addr()) && dst.Bits() > n.Bits() }) {
			continue
		}
		if !slices.ContainsFunc(wanted, func(w netlink.Route) bool { return sameRoute(r, w) }) {
			c.try(netlink.RouteDel(&r), "no route %s through %s", dst, link.Attrs().Name)
		}
	}
}

func sameRoute(a, b netlink.Route) bool {
	x, ok := toPrefix(a.Dst)
	y, too := toPrefix(b.Dst)
	return ok && too && x == y && a.Gw.Equal(b.Gw) && a.LinkIndex == b.LinkIndex
}
