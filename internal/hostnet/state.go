package hostnet

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"microk8s/internal/hostwatch"
	"microk8s/internal/snapenv"
)

// State is all that the pod network wants on this host, besides accept rules ([Firewall]) and what kube-proxy
// writes. [State.Owner] puts it there and keeps it.
type State struct {
	Cluster []netip.Prefix // pod addresses of the whole cluster, at most one range per family
	Node    []netip.Prefix // of this node
	Hairpin bool           // see [Rules]
	MTU     int            // of pods, bridge and tunnels
	Uplink  int            // index of the interface to other nodes

	// Tunnels are those of VXLAN; where there are none, Peers are reached by routes (host-gw).
	Tunnels []TunnelState
	Peers   []Peer
}

// Keeper keeps a state that changes. Its methods may be called from any goroutine.
type Keeper struct {
	env   snapenv.Env
	state func() State

	mu    sync.Mutex
	links map[int]bool // the interfaces of which something is wanted
}

// NewKeeper returns a keeper of what state returns at each look. state must not block.
func NewKeeper(env snapenv.Env, state func() State) *Keeper {
	return &Keeper{env: env, state: state, links: map[int]bool{}}
}

// Owner keeps the state in place. It touches what has the pod network's names and addresses, and nothing else.
func (k *Keeper) Owner() hostwatch.Owner {
	return hostwatch.Owner{Name: "pod network", Concerns: k.concerns, Sync: k.sync}
}

// Sync puts the state in place now. It is safe beside the owner's.
func (k *Keeper) Sync(ctx context.Context) error {
	_, err := k.sync(ctx)
	return err
}

func (k *Keeper) concerns(c hostwatch.Change) bool {
	switch c.Kind {
	case hostwatch.Link:
		return c.Name == Bridge || c.Name == Tunnel || c.Name == Tunnel6 || strings.HasPrefix(c.Name, "veth") || k.ours(c.Link)
	case hostwatch.Address, hostwatch.Neighbor:
		return k.ours(c.Link)
	case hostwatch.Route:
		return k.ours(c.Link)
	case hostwatch.Setting:
		return true
	}
	return c.Nftables() && (c.Table == Table || c.Table == hostPortsTable && c.Deleted && c.Kind != hostwatch.Element)
}

func (k *Keeper) ours(index int) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.links[index]
}

// sync compares everything with the state and puts back what differs.
func (k *Keeper) sync(ctx context.Context) ([]string, error) {
	s := k.state()
	c := &changes{}
	if did, err := Forwarding(s.Cluster); err != nil || did {
		c.try(err, "forwarding between interfaces")
	}
	BridgeFiltered()
	rules := Rules{Cluster: s.Cluster, Node: s.Node, Hairpin: s.Hairpin}
	if did, err := rules.Ensure(); err != nil || did {
		c.try(err, "table %s", Table)
	}
	for _, t := range s.Tunnels {
		c.ensureTunnel(t, s.MTU, s.Cluster)
	}
	if len(s.Tunnels) == 0 {
		var routes []netlink.Route
		for _, p := range s.Peers {
			routes = append(routes, netlink.Route{LinkIndex: s.Uplink, Dst: toIPNet(p.Subnet), Gw: p.Node.AsSlice()})
		}
		c.ensureRoutes(nil, routes, s.Cluster)
	}
	c.ensureBridge(k.env, &s)
	k.remember(s)
	c.ensureHostPorts(ctx, k.env)
	return c.done, errors.Join(c.errs...)
}

// remember notes which interfaces events are about.
func (k *Keeper) remember(s State) {
	links := map[int]bool{s.Uplink: true}
	for _, name := range []string{Bridge, Tunnel, Tunnel6} {
		if i, err := net.InterfaceByName(name); err == nil {
			links[i.Index] = true
		}
	}
	k.mu.Lock()
	k.links = links
	k.mu.Unlock()
}

// ServiceRoutesOwner keeps the routes of [ServiceRoutes].
func ServiceRoutesOwner(services []netip.Prefix, address netip.Addr) hostwatch.Owner {
	return hostwatch.Owner{
		Name: "routes to Services",
		// A default route may come or go, and the address move to another interface.
		Concerns: func(c hostwatch.Change) bool {
			return c.Kind == hostwatch.Address || c.Kind == hostwatch.Link && c.Family == unix.AF_UNSPEC || c.Kind == hostwatch.Route && c.Deleted
		},
		Sync: func(context.Context) ([]string, error) { return ServiceRoutes(services, address) },
	}
}
