package hostnet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"microk8s/internal/snapenv"
)

// Cleanup removes every trace of networking from the host: what [Remove] removes, and the
// tables of kube-proxy and of the portmap plugin. For reset, remove and leave, when nothing
// of the product runs any more. What another product has under the same name stays (owned.go). It
// does as much as it can, may be called again at any time, and succeeds on a host that has nothing
// of it.
func Cleanup(ctx context.Context, env snapenv.Env) error {
	subnets := conflistSubnets(env) // before the file goes
	errs := []error{Remove(ctx, env)}
	errs = append(errs, removeProxyTables(env))
	errs = append(errs, removeHostPorts(subnets))
	return errors.Join(errs...)
}

// Remove removes the built-in pod network: CNI configuration, namespaces and interfaces of
// its pods, bridge, tunnels, routes, our table, and the accept rules in the host's firewall.
// Pods that still run lose their network. It is idempotent and goes on after errors.
func Remove(ctx context.Context, env snapenv.Env) error {
	var errs []error
	step := func(err error) {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	network, pods := clusterNetworks(env), podNetworks(env)
	step(os.Remove(Conflist(env))) // first, so that no new pod gets an address
	step(removeResults(env))
	step(removeLinks(pods))
	step(removeRoutes(network))
	step(removeServiceRoutes())
	step(removeTables(func(t *nftables.Table) bool { return t.Name == Table || t.Name == PolicyTable }))
	step(RemoveAccepts())
	step(os.RemoveAll(leasesDir(env)))
	os.Remove(filepath.Dir(leasesDir(env))) // stays if others use it
	step(os.RemoveAll(filepath.Dir(SubnetEnv(env))))
	return errors.Join(append(errs, ctx.Err())...)
}

// removeResults goes through what the CNI library remembers of our network's pods, removes
// their network namespaces, which a crash leaves behind, and forgets them.
func removeResults(env snapenv.Env) error {
	dir := resultsDir(env)
	files, _ := filepath.Glob(filepath.Join(dir, NetworkName+"-*"))
	var errs []error
	for _, file := range files {
		var result struct{ NetworkName, NetNS string }
		data, err := os.ReadFile(file)
		if err == nil && json.Unmarshal(data, &result) == nil && result.NetworkName == NetworkName {
			errs = append(errs, removeNamespace(env, result.NetNS))
		}
		errs = append(errs, os.Remove(file))
	}
	os.Remove(dir) // both stay if others use them
	os.Remove(filepath.Dir(dir))
	return errors.Join(errs...)
}

// removeNamespace removes a named network namespace, only where containerd puts them.
func removeNamespace(env snapenv.Env, path string) error {
	under := false
	for _, dir := range []string{"/run/netns", "/var/run/netns", env.ContainerdState()} {
		under = under || strings.HasPrefix(filepath.Clean(path), dir+"/")
	}
	if !under {
		return nil
	}
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("cannot unmount the network namespace %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// removeLinks deletes the tunnels, and the bridge with the host's ends of pods on it, as far as they are
// this installation's.
func removeLinks(networks []netip.Prefix) error {
	var errs []error
	own := func(name, kind string) netlink.Link {
		l, err := netlink.LinkByName(name)
		if err != nil || l.Type() != kind {
			return nil
		}
		is, err := ownLink(l, networks)
		if errs = append(errs, err); !is {
			return nil
		}
		return l
	}
	if bridge := own(Bridge, "bridge"); bridge != nil {
		links, err := netlink.LinkList()
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			errs = append(errs, fmt.Errorf("cannot list interfaces: %w", err))
		}
		for _, l := range links {
			if l.Attrs().MasterIndex == bridge.Attrs().Index && l.Type() == "veth" {
				errs = append(errs, deleteLink(l))
			}
		}
		errs = append(errs, deleteLink(bridge))
	}
	for _, name := range []string{Tunnel, Tunnel6} {
		if l := own(name, "vxlan"); l != nil {
			errs = append(errs, deleteLink(l))
		}
	}
	return errors.Join(errs...)
}

func deleteLink(l netlink.Link) error {
	if err := netlink.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("cannot delete interface %s: %w", l.Attrs().Name, err)
	}
	return nil
}

// clusterNetworks reads the cluster's pod ranges from [SubnetEnv].
func clusterNetworks(env snapenv.Env) []netip.Prefix {
	data, err := os.ReadFile(SubnetEnv(env))
	if err != nil {
		return nil
	}
	var out []netip.Prefix
	for line := range strings.SplitSeq(string(data), "\n") {
		key, value, _ := strings.Cut(line, "=")
		if key == "FLANNEL_NETWORK" || key == "FLANNEL_IPV6_NETWORK" {
			if p, err := netip.ParsePrefix(value); err == nil {
				out = append(out, p)
			}
		}
	}
	return out
}

// removeRoutes deletes gateway routes to other nodes' pods (host-gw). Those through bridge
// and tunnel have gone with them.
func removeRoutes(cluster []netip.Prefix) error {
	var errs []error
	for _, c := range cluster {
		fam := netlink.FAMILY_V4
		if c.Addr().Is6() {
			fam = netlink.FAMILY_V6
		}
		routes, err := netlink.RouteList(nil, fam)
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			errs = append(errs, fmt.Errorf("cannot list routes: %w", err))
		}
		for _, r := range routes {
			dst, ok := toPrefix(r.Dst)
			if ok && r.Gw != nil && dst.Bits() > c.Bits() && c.Contains(dst.Addr()) {
				if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
					errs = append(errs, fmt.Errorf("cannot delete the route to %s: %w", dst, err))
				}
			}
		}
	}
	return errors.Join(errs...)
}

func toPrefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	addr, ok := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(addr.Unmap(), bits), ok
}

func removeTables(match func(*nftables.Table) bool) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("cannot open the nftables socket: %w", err)
	}
	tables, err := c.ListTables()
	if err != nil {
		return fmt.Errorf("cannot list the nftables tables: %w", err)
	}
	n := 0
	for _, t := range tables {
		if match(t) {
			c.DelTable(t)
			n++
		}
	}
	if n == 0 {
		return nil
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("cannot delete nftables tables: %w", err)
	}
	return nil
}

// removeHostPorts removes the portmap plugin's table, unless it also forwards ports to
// addresses that are not ours: the plugin always uses the same name.
func removeHostPorts(subnets []netip.Prefix) error {
	h, err := readHost()
	if err != nil {
		return err
	}
	foreign := false
	for _, c := range h.chains {
		if c.Table.Name != hostPortsTable {
			continue
		}
		rules, err := h.rules(c)
		if err != nil {
			return err
		}
		for _, r := range rules {
			foreign = foreign || forwardsElsewhere(r, subnets)
		}
	}
	if foreign {
		return nil
	}
	return removeTables(func(t *nftables.Table) bool { return t.Name == hostPortsTable })
}

// forwardsElsewhere reports whether a rule rewrites destinations to one outside of subnets.
func forwardsElsewhere(r *nftables.Rule, subnets []netip.Prefix) bool {
	register := map[uint32][]byte{}
	for _, e := range r.Exprs {
		switch e := e.(type) {
		case *expr.Immediate:
			register[e.Register] = e.Data
		case *expr.NAT:
			addr, ok := netip.AddrFromSlice(register[e.RegAddrMin])
			if e.Type != expr.NATTypeDestNAT || !ok {
				continue
			}
			for _, s := range subnets {
				if s.Contains(addr) {
					return false
				}
			}
			return true
		}
	}
	return false
}
