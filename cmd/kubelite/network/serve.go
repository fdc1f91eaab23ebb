package network

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/flannel-io/flannel/pkg/backend"
	_ "github.com/flannel-io/flannel/pkg/backend/hostgw" // registers "host-gw"
	_ "github.com/flannel-io/flannel/pkg/backend/vxlan"  // registers "vxlan"
	"github.com/flannel-io/flannel/pkg/lease"
	"github.com/flannel-io/flannel/pkg/subnet"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"microk8s/internal/filewatch"
	"microk8s/internal/hostnet"
)

const tunnelName = hostnet.Tunnel

// ground is what one run of the network stands on; when it changes, the run ends.
type ground struct {
	subnets  []netip.Prefix // of this node, one per family of the cluster CIDR
	external backend.ExternalInterface
}

// serve waits until this node has pod subnets and an address, sets the network up, and keeps
// it until ctx ends or something it stands on changes; the error says what.
func (n *node) serve(parent context.Context) error {
	ctx, cancel := context.WithCancelCause(parent)
	defer cancel(nil)

	changes, stop := n.changes()
	defer stop()
	g, err := n.awaitGround(ctx, changes)
	if err != nil {
		return err
	}
	config, err := n.flannelConfig(g)
	if err != nil {
		return err
	}
	mgr := &subnets{node: n, config: config, own: g.subnets, lost: cancel}
	be, err := backend.NewManager(ctx, mgr, &g.external).GetBackend(n.Backend)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	network, err := be.RegisterNetwork(ctx, &wg, config)
	if err != nil {
		return fmt.Errorf("cannot set up %s on %s: %w", n.Backend, g.external.IfaceName, err)
	}
	mgr.mu.Lock()
	mgr.running = true
	mgr.mu.Unlock()

	mtu := network.MTU()
	if n.MTU != 0 {
		mtu = n.MTU
	}
	keeper := hostnet.NewKeeper(n.Env, func() hostnet.State { return n.wanted(g, mtu) })
	if err := keeper.Sync(ctx); err != nil {
		return err
	}
	l := network.Lease()
	if err := subnet.WriteSubnetFile(hostnet.SubnetEnv(n.Env), config, true, l.Subnet, l.IPv6Subnet, mtu); err != nil {
		return fmt.Errorf("cannot write %s: %w", hostnet.SubnetEnv(n.Env), err)
	}
	if n.Policies != nil {
		if err := n.Policies.SetSubnets(ctx, g.subnets); err != nil { // before a pod can have such an address
			return err
		}
	}
	n.replacePods(ctx, g.subnets)
	if err := hostnet.WriteConflist(n.Env, g.subnets, mtu); err != nil {
		return err
	}
	n.Log.Info("the pod network is up", "subnets", fmt.Sprint(g.subnets), "backend", n.Backend,
		"interface", g.external.IfaceName, "address", fmt.Sprint(g.external.ExtAddr), "mtu", mtu)
	if n.Ready != nil {
		n.Ready()
		n.Ready = nil
	}

	ended := make(chan struct{})
	go func() {
		defer close(ended)
		network.Run(ctx)
	}()
	kept := n.Watch.Register(ctx, keeper.Owner())
	checked := make(chan struct{})
	go func() {
		defer close(checked)
		n.checkWays(ctx, g, mtu)
	}()
	written := make(chan struct{})
	go func() {
		defer close(written)
		n.keepConflist(ctx, g.subnets, mtu)
	}()
	err = n.watchGround(ctx, changes, g, mgr)
	kept.Close()
	cancel(err)
	<-written
	<-checked // its socket is free for the next run
	select {
	case <-ended:
	case <-time.After(2 * time.Second):
		// Flannel may wait forever to hand over an event that nobody takes any more. What it
		// still holds is of no use; a new run starts from the nodes as they are.
	}
	return err
}

// keepConflist writes the CNI configuration again when somebody changes or removes it, until ctx ends: without it no pod starts. Where
// a CNI of the user's own comes beside it, the next start decides.
func (n *node) keepConflist(ctx context.Context, subnets []netip.Prefix, mtu int) {
	path := hostnet.Conflist(n.Env)
	match, folders := filewatch.Files(path)
	changed, err := filewatch.Watch(ctx, filewatch.Options{Settle: 200 * time.Millisecond, Match: match}, folders...)
	if err != nil {
		n.Log.Warn("a CNI configuration that is removed comes back with the next start", "err", err)
		return
	}
	for range changed {
		before, _ := os.ReadFile(path)
		if _, err := os.Stat(n.Env.CNIManifest()); err == nil || ctx.Err() != nil {
			continue
		}
		if err := hostnet.WriteConflist(n.Env, subnets, mtu); err != nil {
			n.Log.Warn("cannot put the CNI configuration back", "err", err)
			continue
		}
		if after, err := os.ReadFile(path); err == nil && !bytes.Equal(before, after) {
			n.Log.Info("somebody changed the CNI configuration; it was put back", "file", path)
		}
	}
}

// awaitGround waits for the node's subnets and its address.
func (n *node) awaitGround(ctx context.Context, changes <-chan struct{}) (ground, error) {
	said := ""
	for {
		g, err := n.findGround()
		if err == nil {
			return g, nil
		}
		if err.Error() != said {
			n.Log.Info("the pod network waits", "for", err)
			said = err.Error()
		}
		select {
		case <-ctx.Done():
			return g, ctx.Err()
		case <-changes:
		case <-time.After(5 * time.Second): // interfaces may come without a change of the node
		}
	}
}

func (n *node) findGround() (g ground, err error) {
	own := n.own()
	if own == nil {
		return g, fmt.Errorf("the registration of node %s", n.NodeName)
	}
	if g.subnets, err = podCIDRs(own, n.cidrs); err != nil {
		return g, err
	}
	if len(g.subnets) < len(n.cidrs) {
		return g, fmt.Errorf("the pod subnet of node %s, which kube-controller-manager assigns (--allocate-node-cidrs)", n.NodeName)
	}
	for _, c := range n.cidrs {
		v4 := c.Addr().Is4()
		iface, addr, err := n.findInterface(internalIP(own, n.NodeIPs, v4), v4)
		if err != nil {
			return g, err
		}
		if e := &g.external; e.Iface != nil && e.Iface.Index != iface.Index {
			return g, fmt.Errorf("one interface for both families: the node's IPv4 address is on %s, its IPv6 address on %s", e.IfaceName, iface.Name)
		}
		g.external.Iface, g.external.IfaceName = iface, iface.Name
		if v4 {
			g.external.IfaceAddr, g.external.ExtAddr = addr.AsSlice(), addr.AsSlice()
		} else {
			g.external.IfaceV6Addr, g.external.ExtV6Addr = addr.AsSlice(), addr.AsSlice()
		}
	}
	return g, nil
}

// internalIP is the address of a node in one family; a fixed one wins if it is of that family.
func internalIP(own *corev1.Node, fixed []netip.Addr, v4 bool) netip.Addr {
	for _, a := range fixed {
		if a.IsValid() && !a.IsUnspecified() && a.Unmap().Is4() == v4 {
			return a.Unmap()
		}
	}
	for _, a := range own.Status.Addresses {
		if addr, err := netip.ParseAddr(a.Address); err == nil && a.Type == corev1.NodeInternalIP && addr.Is4() == v4 {
			return addr
		}
	}
	return netip.Addr{}
}

// findInterface chooses the interface to other nodes, and the address on it. The machine
// needs no default route.
func (n *node) findInterface(node netip.Addr, v4 bool) (*net.Interface, netip.Addr, error) {
	fam := netlink.FAMILY_V4
	if !v4 {
		fam = netlink.FAMILY_V6
	}
	all, err := netlink.AddrList(nil, fam)
	if err != nil {
		return nil, netip.Addr{}, fmt.Errorf("cannot list addresses: %w", err)
	}
	type candidate struct {
		index int
		addr  netip.Addr
	}
	var global []candidate
	for _, a := range all {
		addr, ok := netip.AddrFromSlice(a.IP)
		if addr = addr.Unmap(); ok && addr.IsGlobalUnicast() && !n.isPodAddress(addr) {
			global = append(global, candidate{a.LinkIndex, addr})
		}
	}
	use := func(c candidate) (*net.Interface, netip.Addr, error) {
		iface, err := net.InterfaceByIndex(c.index)
		return iface, c.addr, err
	}
	on := func(index int) (candidate, bool) {
		for _, c := range global {
			if c.index == index && c.addr == node {
				return c, true
			}
		}
		for _, c := range global {
			if c.index == index {
				return c, true
			}
		}
		return candidate{}, false
	}
	if n.Interface != "" {
		link, err := netlink.LinkByName(n.Interface)
		if err != nil {
			return nil, netip.Addr{}, fmt.Errorf("interface %s: %w", n.Interface, err)
		}
		if c, ok := on(link.Attrs().Index); ok {
			return use(c)
		}
		return nil, netip.Addr{}, fmt.Errorf("an address on interface %s", n.Interface)
	}
	for _, c := range global {
		if c.addr == node {
			return use(c)
		}
	}
	routes, _ := netlink.RouteListFiltered(fam, &netlink.Route{}, netlink.RT_FILTER_DST) // default routes
	for _, r := range routes {
		if c, ok := on(r.LinkIndex); ok {
			return use(c)
		}
	}
	if len(global) == 1 {
		return use(global[0])
	}
	return nil, netip.Addr{}, fmt.Errorf("an address: the node's (%v) is on no interface, there is no default route, and %d other addresses to choose from; set --node-ip in args/kubelet", node, len(global))
}

// isPodAddress leaves the addresses of our own bridge and tunnel out.
func (n *node) isPodAddress(a netip.Addr) bool {
	return slices.ContainsFunc(n.cidrs, func(c netip.Prefix) bool { return c.Contains(a) })
}

// flannelConfig is the configuration that flannel would read from a file.
func (n *node) flannelConfig(g ground) (*subnet.Config, error) {
	c := &subnet.Config{BackendType: n.Backend}
	for _, cidr := range n.cidrs {
		if cidr.Addr().Is4() {
			c.EnableIPv4, c.Network = true, ip4Net(cidr)
		} else {
			c.EnableIPv6, c.IPv6Network = true, ip6Net(cidr)
		}
	}
	be := map[string]any{"Type": n.Backend}
	if n.Backend == BackendVXLAN {
		be["VNI"], be["Port"] = vxlanNetworkID, vxlanPort
		mtu := g.external.Iface.MTU
		if c.EnableIPv6 {
			mtu -= 20 // an IPv6 header is that much longer, and flannel counts on IPv4
		}
		if n.MTU != 0 {
			mtu = n.MTU + vxlanEncapsulation
		}
		be["MTU"] = mtu
	}
	var err error
	c.Backend, err = json.Marshal(be)
	return c, err
}

// watchGround returns when this run has to end: with the cause of ctx, or because the node's
// subnets, its address, or what it announced to others is no longer as it was.
func (n *node) watchGround(ctx context.Context, changes <-chan struct{}, g ground, mgr *subnets) error {
	// Only the addresses themselves tell when the interface loses its own.
	addresses := make(chan netlink.AddrUpdate, 16)
	if err := netlink.AddrSubscribe(addresses, ctx.Done()); err != nil {
		n.Log.Warn("changes of this machine's addresses are not seen", "err", err)
		addresses = nil
	}
	// Flannel notices by itself that its tunnel has gone, but only when it is not busy
	// trying to write to it, which it does for half a minute.
	links := make(chan netlink.LinkUpdate, 16)
	if err := netlink.LinkSubscribe(links, ctx.Done()); err != nil {
		n.Log.Warn("changes of this machine's interfaces are not seen", "err", err)
		links = nil
	}
	announced := false
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case u, ok := <-links:
			if !ok {
				links = nil
				continue
			}
			if u.Header.Type == unix.RTM_NEWLINK && u.Attrs().Index == g.external.Iface.Index && u.Attrs().MTU != g.external.Iface.MTU {
				return fmt.Errorf("%w: the MTU of %s is now %d", errRestart, u.Attrs().Name, u.Attrs().MTU)
			}
			name := u.Attrs().Name
			if u.Header.Type == unix.RTM_DELLINK && u.Family == unix.AF_UNSPEC && n.Backend == BackendVXLAN && (name == hostnet.Tunnel || name == hostnet.Tunnel6) {
				return fmt.Errorf("%w: the interface %s has vanished", errRestart, name)
			}
			continue
		case <-changes:
		case _, ok := <-addresses:
			if !ok {
				addresses = nil
			}
		}
		own := n.own()
		if own == nil {
			continue // deleted: pods go on, and a new object is announced to when it comes
		}
		now, err := n.findGround()
		switch {
		case err != nil:
			return fmt.Errorf("%w: it lost %w", errRestart, err)
		case !slices.Equal(now.subnets, g.subnets):
			return fmt.Errorf("%w: the node's pod subnets are now %v; pods that run keep their addresses until they are recreated", errRestart, now.subnets)
		case !now.external.ExtAddr.Equal(g.external.ExtAddr) || !now.external.ExtV6Addr.Equal(g.external.ExtV6Addr) || now.external.Iface.Index != g.external.Iface.Index:
			return fmt.Errorf("%w: the node's address is now %v", errRestart, now.external.ExtAddr)
		}
		// The watch lags behind our own patch: only what was seen can be lost.
		if here := announces(own, mgr.announced); here {
			announced = true
		} else if announced {
			return fmt.Errorf("%w: the annotations of node %s are gone", errRestart, n.NodeName)
		}
	}
}

// wanted is what this node wants on the host, from the nodes as they are now.
func (n *node) wanted(g ground, mtu int) hostnet.State {
	s := hostnet.State{Cluster: n.cidrs, Node: g.subnets, Hairpin: n.hairpin, MTU: mtu, Uplink: g.external.Iface.Index}
	leases, _ := owners(n.all(), n.cidrs)
	own := n.own()
	for _, subnet := range g.subnets {
		v4 := subnet.Addr().Is4()
		t := hostnet.TunnelState{Name: hostnet.Tunnel, Address: netip.PrefixFrom(subnet.Addr(), subnet.Addr().BitLen())}
		if !v4 {
			t.Name = hostnet.Tunnel6
		}
		if own != nil {
			annotation := annotationData
			if !v4 {
				annotation = annotationData6
			}
			t.MAC, _ = net.ParseMAC(vtepMAC(own, annotation))
		}
		for name, l := range leases {
			if name == n.NodeName || l.Attrs.BackendType != n.Backend {
				continue
			}
			p, err := peer(l, v4)
			if err != nil {
				continue // flannel does not take it, either
			}
			if n.Backend == BackendVXLAN {
				t.Peers = append(t.Peers, p)
			} else if g.near(p.Node) {
				s.Peers = append(s.Peers, p)
			}
		}
		if n.Backend == BackendVXLAN {
			s.Tunnels = append(s.Tunnels, t)
		}
	}
	return s
}

// peer reads another node's part of the network in one family.
func peer(l lease.Lease, v4 bool) (p hostnet.Peer, err error) {
	subnet, node, data := l.Subnet.ToIPNet(), l.Attrs.PublicIP.ToIP(), l.Attrs.BackendData
	if !v4 {
		if l.Attrs.PublicIPv6 == nil {
			return p, errors.New("no IPv6 address")
		}
		subnet, node, data = l.IPv6Subnet.ToIPNet(), l.Attrs.PublicIPv6.ToIP(), l.Attrs.BackendV6Data
	}
	addr, ok := netip.AddrFromSlice(subnet.IP)
	to, too := netip.AddrFromSlice(node)
	if !ok || !too {
		return p, errors.New("no address")
	}
	bits, _ := subnet.Mask.Size()
	p.Subnet, p.Node = netip.PrefixFrom(addr.Unmap(), bits), to.Unmap()
	if l.Attrs.BackendType == BackendVXLAN {
		var announced struct{ VtepMAC string }
		if err := json.Unmarshal(data, &announced); err != nil {
			return p, err
		}
		if p.MAC, err = net.ParseMAC(announced.VtepMAC); err != nil {
			return p, err
		}
	}
	return p, nil
}

// near reports whether an address is on a network of the interface to other nodes: only then can it be a gateway.
func (g ground) near(a netip.Addr) bool {
	link, err := netlink.LinkByIndex(g.external.Iface.Index)
	if err != nil {
		return false
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	return err == nil && slices.ContainsFunc(addrs, func(own netlink.Addr) bool { return own.Contains(a.AsSlice()) })
}

// replacePods ends the sandboxes of pods whose addresses are not the node's any more, because it was registered
// again with another subnet: no node routes to them. The kubelet then starts the pods in new ones.
func (n *node) replacePods(ctx context.Context, subnets []netip.Prefix) {
	if n.EndSandbox == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for _, p := range hostnet.Pods(n.Env) {
		if !p.Outside(subnets) {
			continue
		}
		n.Log.Info("a pod gets another address: its own is not in the node's pod subnet any more", "sandbox", p.Sandbox, "subnets", fmt.Sprint(subnets))
		if err := n.EndSandbox(ctx, p.Sandbox); err != nil {
			n.Log.Warn("a pod keeps an address that other nodes do not reach", "sandbox", p.Sandbox, "err", err)
		}
	}
}
