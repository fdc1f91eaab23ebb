package hostnet

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// routeOwner marks our route in the routing table: a protocol number of those that
// rtnetlink(7) leaves to programs.
const routeOwner = netlink.RouteProtocol(109)

// ServiceRoutes makes Service addresses reachable from the host itself where it has no
// default route. Such a host answers "network is unreachable" before kube-proxy's rules get
// to translate the address, so a route to the range is enough; where it leads does not
// matter. On a host with a default route, and where ours is there already, nothing is done.
// address is the node's own, of the family it has.
// changed names the routes that were added.
func ServiceRoutes(services []netip.Prefix, address netip.Addr) (changed []string, err error) {
	var errs []error
	for _, service := range services {
		if service.Addr().Is4() != address.Is4() {
			continue
		}
		did, err := serviceRoute(service, address)
		if did {
			changed = append(changed, "route "+service.String())
		}
		errs = append(errs, err)
	}
	return changed, errors.Join(errs...)
}

func serviceRoute(service netip.Prefix, address netip.Addr) (changed bool, err error) {
	family := unix.AF_INET
	if !address.Is4() {
		family = unix.AF_INET6
	}
	routes, err := netlink.RouteList(nil, family)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return false, fmt.Errorf("cannot list routes: %w", err)
	}
	if slices.ContainsFunc(routes, isDefault) {
		return false, nil
	}
	addrs, err := netlink.AddrList(nil, family)
	if err != nil {
		return false, fmt.Errorf("cannot list addresses: %w", err)
	}
	for _, a := range addrs {
		if !a.IP.Equal(address.AsSlice()) {
			continue
		}
		route := netlink.Route{
			LinkIndex: a.LinkIndex,
			Scope:     unix.RT_SCOPE_LINK,
			Dst:       toIPNet(service.Masked()),
			Src:       address.AsSlice(),
			Protocol:  routeOwner,
		}
		if slices.ContainsFunc(routes, func(r netlink.Route) bool {
			return r.Protocol == routeOwner && r.Src.Equal(route.Src) && sameRoute(r, route)
		}) {
			return false, nil
		}
		if err := netlink.RouteReplace(&route); err != nil {
			return false, fmt.Errorf("cannot add a route to the Service addresses %s: %w", service, err)
		}
		return true, nil
	}
	return false, fmt.Errorf("cannot add a route to the Service addresses %s: %s is on no interface", service, address)
}

func isDefault(r netlink.Route) bool { return r.Dst == nil || r.Dst.IP.IsUnspecified() }

// removeServiceRoutes takes away what [ServiceRoutes] added.
func removeServiceRoutes() error {
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Protocol: routeOwner}, netlink.RT_FILTER_PROTOCOL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("cannot list routes: %w", err)
	}
	var errs []error
	for _, r := range routes {
		if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("cannot remove the route to %s: %w", r.Dst, err))
		}
	}
	return errors.Join(errs...)
}
