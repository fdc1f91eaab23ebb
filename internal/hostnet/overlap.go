package hostnet

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"

	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
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

// CheckRanges refuses ranges of a node that was never started, where this host's own networks lie in them: later they
// cannot be changed. The error has the three lines with which others are chosen.
func CheckRanges(env snapenv.Env) error {
	for _, sign := range []string{Conflist(env), SubnetEnv(env), env.CNIManifest()} {
		if _, err := os.Stat(sign); err == nil {
			return nil // it has run, or the pods' network is the user's
		}
	}
	config := nodeconfig.Load(env)
	if s := nodeconfig.ReadState(env); s.Clustered || s.Worker || s.Changing {
		return nil // its ranges are the cluster's
	}
	overlaps, err := Overlaps(append(slices.Clone(config.ClusterCIDRs), config.APIServer.ServiceCIDRs...))
	if err != nil || len(overlaps) == 0 {
		return err
	}
	var what []string
	for _, o := range overlaps {
		whose := "the pods' "
		if slices.Contains(config.APIServer.ServiceCIDRs, o.Range) {
			whose = "the Services' "
		}
		what = append(what, fmt.Sprintf("this host's network %s (%s) overlaps %s%s", o.Network, o.Link, whose, o.Range))
	}
	pods, services := freeRange("10.%d.0.0/16", 200), freeRange("10.%d.183.0/24", 153)
	dir := env.ArgsDir()
	return fmt.Errorf(`%s; choose other ranges before the first start:
  sed -i 's#^--cluster-cidr=.*#--cluster-cidr=%s#' %s/kube-controller-manager %s/kube-proxy
  sed -i 's#^--service-cluster-ip-range=.*#--service-cluster-ip-range=%s#; s#^--cluster-dns=.*#--cluster-dns=%s#' %s/kube-apiserver %s/kube-controller-manager %s/kubelet
  microk8s start`,
		strings.Join(what, ", and "), pods, dir, dir, services, dnsOf(services), dir, dir, dir)
}

// freeRange returns the first range of a form, from a number on, that no network of this host touches.
func freeRange(form string, from int) netip.Prefix {
	for i := range 256 {
		p := netip.MustParsePrefix(fmt.Sprintf(form, (from+i)%256))
		if o, err := Overlaps([]netip.Prefix{p}); err == nil && len(o) == 0 {
			return p
		}
	}
	return netip.MustParsePrefix(fmt.Sprintf(form, from))
}

// dnsOf is the tenth address of a range, where the cluster's DNS is.
func dnsOf(services netip.Prefix) netip.Addr {
	a := services.Masked().Addr()
	for range 10 {
		a = a.Next()
	}
	return a
}
