package hostnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"microk8s/internal/snapenv"
)

// changes collects what was put back, and what could not be.
type changes struct {
	done []string
	errs []error
}

func (c *changes) did(format string, args ...any) {
	c.done = append(c.done, fmt.Sprintf(format, args...))
}

// try notes the error, or what was done.
func (c *changes) try(err error, format string, args ...any) bool {
	if err != nil {
		c.errs = append(c.errs, fmt.Errorf("cannot put back "+format+": %w", append(args, err)...))
		return false
	}
	c.did(format, args...)
	return true
}

// ensureUp switches a link on.
func (c *changes) ensureUp(l netlink.Link) {
	if l.Attrs().Flags&net.FlagUp == 0 {
		c.try(netlink.LinkSetUp(l), "%s up", l.Attrs().Name)
	}
}

func (c *changes) ensureMTU(l netlink.Link, mtu int) {
	if l.Attrs().MTU != mtu {
		c.try(netlink.LinkSetMTU(l, mtu), "MTU %d of %s", mtu, l.Attrs().Name)
	}
}

// ensureAddresses has a link carry these addresses, and none of the networks beside them. An address of somebody
// else stays, but comes behind the wanted ones: the bridge plugin starts no pod when another one is first.
func (c *changes) ensureAddresses(l netlink.Link, wanted, networks []netip.Prefix) {
	name := l.Attrs().Name
	have, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		c.errs = append(c.errs, fmt.Errorf("cannot list the addresses of %s: %w", name, err))
		return
	}
	var foreign []netlink.Addr // of each family, those in front of the wanted ones
	missing := slices.Clone(wanted)
	for _, a := range have {
		p, ok := addrPrefix(a)
		switch i := slices.Index(missing, p); {
		case !ok || p.Addr().IsLinkLocalUnicast():
		case i >= 0:
			missing = slices.Delete(missing, i, i+1)
		case slices.ContainsFunc(networks, func(n netip.Prefix) bool { return n.Contains(p.Addr()) }):
			c.try(netlink.AddrDel(l, &a), "%s without %s", name, p)
		case p.Addr().Is4() && slices.ContainsFunc(missing, func(m netip.Prefix) bool { return m.Addr().Is4() }):
			foreign = append(foreign, a)
		}
	}
	for _, a := range foreign {
		if err := netlink.AddrDel(l, &a); err != nil {
			c.errs = append(c.errs, fmt.Errorf("cannot move an address of %s: %w", name, err))
		}
	}
	for _, p := range wanted {
		// Again also what is there where foreign ones were in front.
		if slices.Contains(missing, p) {
			c.try(netlink.AddrReplace(l, &netlink.Addr{IPNet: toIPNet(p)}), "address %s of %s", p, name)
		}
	}
	for _, a := range foreign {
		a.Flags &^= unix.IFA_F_SECONDARY
		if err := netlink.AddrReplace(l, &a); err != nil {
			c.errs = append(c.errs, fmt.Errorf("cannot move the address %s of %s: %w", a.IPNet, name, err))
		}
	}
}

func addrPrefix(a netlink.Addr) (netip.Prefix, bool) {
	ip, ok := netip.AddrFromSlice(a.IP)
	bits, _ := a.Mask.Size()
	return netip.PrefixFrom(ip.Unmap(), bits), ok
}

func toIPNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Gateways are the addresses that the bridge has: the first one of each of the node's subnets, as the bridge
// plugin counts.
func Gateways(subnets []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range subnets {
		out = append(out, netip.PrefixFrom(s.Masked().Addr().Next(), s.Bits()))
	}
	return out
}

// ensureBridge puts the bridge in order, with the pods on it. The plugin makes it for the first pod; it is made
// here only when pods are there and it is not.
func (c *changes) ensureBridge(env snapenv.Env, s *State) {
	pods := Pods(env)
	link, err := netlink.LinkByName(Bridge)
	var none netlink.LinkNotFoundError
	switch {
	case errors.As(err, &none):
		if !slices.ContainsFunc(pods, func(p Pod) bool { return linkExists(p.hostEnd) }) {
			return
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = Bridge, s.MTU
		for _, p := range pods { // pods know the gateway by the address that it had
			if mac, err := net.ParseMAC(p.bridgeMAC); err == nil {
				attrs.HardwareAddr = mac
			}
		}
		if !c.try(netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}), "bridge %s", Bridge) {
			return
		}
		_, _ = setSysctl("net/ipv6/conf/"+Bridge+"/accept_ra", "0") // as the plugin does
		if link, err = netlink.LinkByName(Bridge); err != nil {
			c.errs = append(c.errs, err)
			return
		}
	case err != nil:
		c.errs = append(c.errs, fmt.Errorf("cannot find %s: %w", Bridge, err))
		return
	}
	if link.Type() != "bridge" {
		c.errs = append(c.errs, fmt.Errorf("%s is a %s of somebody else; pods need that name for their bridge", Bridge, link.Type()))
		return
	}
	c.ensureAddresses(link, Gateways(s.Node), s.Cluster)
	c.ensureUp(link)
	for _, p := range pods {
		c.ensurePod(p, link, s.MTU)
	}
	c.ensureMTU(link, s.MTU)
}

func linkExists(name string) bool {
	_, err := netlink.LinkByName(name)
	return name != "" && err == nil
}

// ensurePod puts both ends of a pod's link in order, as far as the pod is there.
func (c *changes) ensurePod(p Pod, bridge netlink.Link, mtu int) {
	host, err := netlink.LinkByName(p.hostEnd)
	if p.hostEnd == "" || err != nil || host.Type() != "veth" {
		return
	}
	if host.Attrs().MasterIndex != bridge.Attrs().Index {
		if c.try(netlink.LinkSetMaster(host, bridge), "%s on %s", p.hostEnd, Bridge) {
			_ = netlink.LinkSetHairpin(host, true) // as the configuration wants; only of use to a pod that talks to itself
		}
	}
	c.ensureUp(host)
	if host.Attrs().MTU == mtu {
		return // the pod's end is its own affair: a pod may have changed it
	}
	c.ensureMTU(host, mtu)
	ns, err := netns.GetFromPath(p.netns)
	if errors.Is(err, os.ErrNotExist) {
		return // the pod is going
	}
	if err != nil {
		c.errs = append(c.errs, fmt.Errorf("cannot open the network of the pod behind %s: %w", p.hostEnd, err))
		return
	}
	defer ns.Close()
	inside, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		c.errs = append(c.errs, fmt.Errorf("cannot enter the network of the pod behind %s: %w", p.hostEnd, err))
		return
	}
	defer inside.Close()
	link, err := inside.LinkByName(p.ifName)
	if err == nil && link.Attrs().MTU != mtu {
		err = inside.LinkSetMTU(link, mtu)
	}
	if err != nil {
		c.errs = append(c.errs, fmt.Errorf("cannot set the MTU of %s in the pod behind %s: %w", p.ifName, p.hostEnd, err))
	}
}
