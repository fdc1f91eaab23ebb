package hostnet

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
)

// Overlap is a network of the host's that lies in a range of the cluster's: the host would lose its way to it.
type Overlap struct {
	Range   netip.Prefix // of pods or Services
	Network netip.Prefix // the host's
	Link    string       // the interface that leads to it
}

func (o Overlap) String() string {
	return fmt.Sprintf("this host's network %s (%s) overlaps %s", o.Network, o.Link, o.Range)
}

// Overlaps lists the host's addresses and routes that lie in the ranges, one for each range and interface. A wider route
// that holds a whole range, such as that of a VPN to 10.0.0.0/8, is none: the cluster's are narrower and win, which takes
// nothing from the host but those addresses. What the pod network itself put there does not count.
func Overlaps(ranges []netip.Prefix) ([]Overlap, error) {
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("cannot list interfaces: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		switch name := l.Attrs().Name; {
		case name == Bridge || name == Tunnel || name == Tunnel6 || strings.HasPrefix(name, "veth"):
		default:
			names[l.Attrs().Index] = name
		}
	}
	var out []Overlap
	add := func(network netip.Prefix, index int) {
		name, ok := names[index]
		if !ok {
			return
		}
		for _, r := range ranges {
			o := Overlap{r, network.Masked(), name}
			if r.Overlaps(network) && !slices.ContainsFunc(out, func(x Overlap) bool { return x.Range == r && x.Link == name }) {
				out = append(out, o)
			}
		}
	}
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("cannot list addresses: %w", err)
	}
	for _, a := range addrs {
		p, ok := addrPrefix(a)
		if ok && slices.ContainsFunc(ranges, func(r netip.Prefix) bool { return r.Contains(p.Addr()) }) {
			add(p, a.LinkIndex)
		}
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("cannot list routes: %w", err)
	}
	for _, r := range routes {
		p, ok := toPrefix(r.Dst)
		if !ok || r.Protocol == routeOwner || !slices.ContainsFunc(ranges, func(c netip.Prefix) bool { return c.Contains(p.Addr()) && p.Bits() >= c.Bits() }) {
			continue
		}
		// Routes to other nodes' pods (host-gw) lead to a gateway on the node's network.
		if r.Gw != nil && slices.ContainsFunc(ranges, func(c netip.Prefix) bool { return c.Contains(p.Addr()) && p.Bits() > c.Bits() }) && r.Protocol != protocolStatic && r.Protocol != protocolDHCP {
			continue
		}
		add(p, r.LinkIndex)
	}
	return out, nil
}

// Protocols of routes in rtnetlink(7); flannel's routes have boot, as typed ones do.
const (
	protocolStatic = netlink.RouteProtocol(4)
	protocolDHCP   = netlink.RouteProtocol(16)
)
