package network

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/flannel-io/flannel/pkg/ip"
	"github.com/flannel-io/flannel/pkg/lease"
	"github.com/flannel-io/flannel/pkg/subnet"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
)

// Annotations of a Node in which flannel keeps a node's part of the network. The names and
// their content are flannel's, so that its tools, and nodes that run flannel itself, agree.
const (
	annotationPrefix   = "flannel.alpha.coreos.com/"
	annotationManaged  = annotationPrefix + "kube-subnet-manager"
	annotationType     = annotationPrefix + "backend-type"
	annotationData     = annotationPrefix + "backend-data"
	annotationData6    = annotationPrefix + "backend-v6-data"
	annotationPublic   = annotationPrefix + "public-ip"
	annotationPublic6  = annotationPrefix + "public-ipv6"
	labelControlPlane  = "node.kubernetes.io/microk8s-controlplane"
	vxlanNetworkID     = 1
	vxlanPort          = 4789 // the registered port, and the one upstream documents
	vxlanEncapsulation = 50   // bytes that VXLAN over IPv4 adds to a packet
)

func listNodes(c typedcorev1.NodeInterface) func(context.Context, metav1.ListOptions) (runtime.Object, error) {
	return func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return c.List(ctx, o) }
}

func watchNodes(c typedcorev1.NodeInterface) func(context.Context, metav1.ListOptions) (watch.Interface, error) {
	return func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) { return c.Watch(ctx, o) }
}

// podCIDRs returns the pod subnets of a node that are within the cluster's ranges.
func podCIDRs(n *corev1.Node, cluster []netip.Prefix) ([]netip.Prefix, error) {
	all := n.Spec.PodCIDRs
	if len(all) == 0 && n.Spec.PodCIDR != "" {
		all = []string{n.Spec.PodCIDR}
	}
	var out []netip.Prefix
	for _, c := range cluster {
		for _, s := range all {
			p, err := netip.ParsePrefix(s)
			if err != nil {
				return nil, fmt.Errorf("node %s has the pod CIDR %q: %w", n.Name, s, err)
			}
			if p.Addr().Is4() != c.Addr().Is4() {
				continue
			}
			if p.Bits() < c.Bits() || !c.Contains(p.Addr()) {
				return nil, fmt.Errorf("pod CIDR %s of node %s is outside of the cluster CIDR %s: make --cluster-cidr of kube-controller-manager and kube-proxy the same", p, n.Name, c)
			}
			out = append(out, p.Masked())
		}
	}
	return out, nil
}

// owners decides which node has which part of the network, and returns what is left aside.
//
// Nodes write their own objects, so that two may name the same subnet, or one a subnet that is
// no subnet of this cluster. The node that was there first keeps what it has (creationTimestamp,
// then UID and name); of any other node everything is left aside: a packet must never go to a
// second claimant. A hardware address of the tunnel counts as a subnet does, since the kernel
// sends to one machine for each.
//
// refused maps the name of a node left aside to the reason; a node that has no subnet yet, or
// announces nothing, is in neither map.
func owners(nodes []*corev1.Node, cluster []netip.Prefix) (leases map[string]lease.Lease, refused map[string]error) {
	nodes = slices.Clone(nodes)
	slices.SortFunc(nodes, func(a, b *corev1.Node) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.UID, b.UID), cmp.Compare(a.Name, b.Name))
	})
	leases, refused = map[string]lease.Lease{}, map[string]error{}
	c := claims{subnets: map[netip.Prefix]string{}, macs: map[string]string{}, lengths: map[int]bool{}}
	for _, n := range nodes {
		subnets, err := podCIDRs(n, cluster)
		if err == nil {
			err = c.claim(n.Name, subnets, tunnelMACs(n))
		}
		if err != nil {
			refused[n.Name] = err
			continue
		}
		if l, ok := leaseOf(n, cluster); ok {
			leases[n.Name] = l
		}
	}
	return leases, refused
}

// claims is which node has what.
type claims struct {
	subnets map[netip.Prefix]string
	macs    map[string]string
	lengths map[int]bool // of the subnets
}

// claim notes what a node takes, or returns an error and notes nothing if another has some of it.
func (c *claims) claim(name string, subnets []netip.Prefix, hardware []string) error {
	for _, s := range subnets {
		if owner, ok := c.owner(s); ok {
			return fmt.Errorf("its pod CIDR %s is that of node %s, which was there first", s, owner)
		}
	}
	for _, mac := range hardware {
		if owner, ok := c.macs[mac]; ok {
			return fmt.Errorf("the hardware address (%s) that it announces is that of node %s, which was there first", mac, owner)
		}
	}
	for _, s := range subnets {
		c.subnets[s], c.lengths[s.Bits()] = name, true
	}
	for _, mac := range hardware {
		c.macs[mac] = name
	}
	return nil
}

// owner returns who has some of a subnet. Subnets of one family are usually of one size, and
// then this does not depend on the number of nodes.
func (c *claims) owner(s netip.Prefix) (string, bool) {
	for bits := range c.lengths {
		if bits > s.Bits() {
			for other, owner := range c.subnets {
				if s.Overlaps(other) {
					return owner, true
				}
			}
			return "", false
		}
	}
	for bits := range c.lengths {
		if p, err := s.Addr().Prefix(bits); err == nil {
			if owner, ok := c.subnets[p]; ok {
				return owner, true
			}
		}
	}
	return "", false
}

// tunnelMACs returns the hardware addresses that a node announces for its tunnels, each with
// its family in front.
func tunnelMACs(n *corev1.Node) (out []string) {
	for _, annotation := range []string{annotationData, annotationData6} {
		if mac := vtepMAC(n, annotation); mac != "" {
			if parsed, err := net.ParseMAC(mac); err == nil {
				mac = parsed.String()
			}
			out = append(out, strings.TrimPrefix(annotation, annotationPrefix)+" "+mac)
		}
	}
	return out
}

func vtepMAC(n *corev1.Node, annotation string) string {
	var data struct{ VtepMAC string }
	if json.Unmarshal([]byte(n.Annotations[annotation]), &data) != nil {
		return ""
	}
	return data.VtepMAC
}

// leaseOf reads a node's part of the network; ok is false as long as it has none. Whether it
// may have it is decided by [owners].
func leaseOf(n *corev1.Node, cluster []netip.Prefix) (l lease.Lease, ok bool) {
	a := n.Annotations
	if a[annotationManaged] != "true" {
		return l, false
	}
	subnets, err := podCIDRs(n, cluster)
	if err != nil || len(subnets) < len(cluster) {
		return l, false
	}
	l.Attrs.BackendType = a[annotationType]
	for _, s := range subnets {
		if s.Addr().Is4() {
			public, err := ip.ParseIP4(a[annotationPublic])
			if err != nil {
				return l, false
			}
			l.EnableIPv4, l.Subnet = true, ip4Net(s)
			l.Attrs.PublicIP, l.Attrs.BackendData = public, json.RawMessage(a[annotationData])
		} else {
			public, err := ip.ParseIP6(a[annotationPublic6])
			if err != nil {
				return l, false
			}
			l.EnableIPv6, l.IPv6Subnet = true, ip6Net(s)
			l.Attrs.PublicIPv6, l.Attrs.BackendV6Data = public, json.RawMessage(a[annotationData6])
		}
	}
	return l, true
}

func ip4Net(p netip.Prefix) ip.IP4Net {
	return ip.IP4Net{IP: ip.FromIP(p.Addr().AsSlice()), PrefixLen: uint(p.Bits())}
}

func ip6Net(p netip.Prefix) ip.IP6Net {
	return ip.IP6Net{IP: ip.FromIP6(p.Addr().AsSlice()), PrefixLen: uint(p.Bits())}
}

// annotationsFor is what a node announces to the others.
func annotationsFor(a *lease.LeaseAttrs, cluster []netip.Prefix) map[string]string {
	out := map[string]string{annotationManaged: "true", annotationType: a.BackendType}
	for _, c := range cluster {
		if c.Addr().Is4() {
			out[annotationPublic], out[annotationData] = a.PublicIP.String(), rawString(a.BackendData)
		} else if a.PublicIPv6 != nil {
			out[annotationPublic6], out[annotationData6] = a.PublicIPv6.String(), rawString(a.BackendV6Data)
		}
	}
	return out
}

func rawString(m json.RawMessage) string {
	if m == nil {
		return "null"
	}
	return string(m)
}

// errRestart ends a run of the network whose ground has changed: it is set up again.
var errRestart = errors.New("restart")

// subnets is what flannel's backends know of the cluster (their subnet.Manager). Flannel's
// own, on the same annotations, is made to be the only thing in a process: it takes the node's
// name from the environment and its configuration from a file, and polls in seconds for what
// a watch tells at once.
type subnets struct {
	*node
	config *subnet.Config
	own    []netip.Prefix

	// lost ends this run. Flannel asks for the configuration again only when its device has
	// vanished, in order to make a new one; its code for that needs IPv6 to be in use.
	lost func(error)

	mu        sync.Mutex
	running   bool
	announced map[string]string // annotations of this run, nil before they are written
}

var _ subnet.Manager = (*subnets)(nil)

// GetNetworkConfig returns the configuration, and ends this run when asked while running.
func (s *subnets) GetNetworkConfig(context.Context) (*subnet.Config, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running {
		err := fmt.Errorf("%w: the interface %s has vanished", errRestart, tunnelName)
		s.lost(err)
		return nil, err
	}
	return s.config, nil
}

// AcquireLease announces this node to the others.
func (s *subnets) AcquireLease(ctx context.Context, attrs *lease.LeaseAttrs) (*lease.Lease, error) {
	want := annotationsFor(attrs, s.cidrs)
	if n := s.node.own(); n == nil || !announces(n, want) {
		patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": want}})
		if err != nil {
			return nil, err
		}
		// The status is what a kubelet's credentials may patch, as the Node authorizer and
		// NodeRestriction see it; annotations come along.
		if _, err := s.Client.CoreV1().Nodes().PatchStatus(ctx, s.NodeName, patch); err != nil {
			return nil, fmt.Errorf("cannot annotate node %s: %w", s.NodeName, err)
		}
	}
	l := &lease.Lease{Attrs: *attrs}
	for _, p := range s.own {
		if p.Addr().Is4() {
			l.EnableIPv4, l.Subnet = true, ip4Net(p)
		} else {
			l.EnableIPv6, l.IPv6Subnet = true, ip6Net(p)
		}
	}
	s.mu.Lock()
	s.announced = want
	s.mu.Unlock()
	return l, nil
}

func announces(n *corev1.Node, want map[string]string) bool {
	for k, v := range want {
		if n.Annotations[k] != v {
			return false
		}
	}
	return true
}

// WatchLeases sends the other nodes' parts, and every change of them, until ctx ends.
func (s *subnets) WatchLeases(ctx context.Context, receiver chan []lease.LeaseWatchResult) error {
	defer close(receiver)
	changes, stop := s.changes()
	defer stop()
	sent := map[string]lease.Lease{}
	warned := map[string]string{}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changes:
		}
		now, refused := owners(s.all(), s.cidrs)
		delete(now, s.NodeName)
		s.warn(refused, warned)
		events := leaseChanges(sent, now)
		sent = now
		if len(events) == 0 {
			continue
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case receiver <- []lease.LeaseWatchResult{{Events: events}}:
		}
	}
}

// warn logs why nodes are left aside, once for each reason. warned is what was said before.
func (s *subnets) warn(refused map[string]error, warned map[string]string) {
	for name := range warned {
		if refused[name] == nil {
			delete(warned, name)
		}
	}
	for name, err := range refused {
		if warned[name] == err.Error() {
			continue
		}
		warned[name] = err.Error()
		s.Log.Warn("pods of a node are not reached: its part of the pod network is left aside", "node", name, "err", err)
	}
}

// leaseChanges lists what turns one state into the other, removals first: a subnet may go
// from one node to another.
func leaseChanges(before, after map[string]lease.Lease) []lease.Event {
	var removed, added []lease.Event
	for name, l := range before {
		if next, ok := after[name]; !ok || !sameLease(l, next) {
			removed = append(removed, lease.Event{Type: lease.EventRemoved, Lease: l})
		}
	}
	for name, l := range after {
		if old, ok := before[name]; !ok || !sameLease(l, old) {
			added = append(added, lease.Event{Type: lease.EventAdded, Lease: l})
		}
	}
	return append(removed, added...)
}

func sameLease(a, b lease.Lease) bool {
	return a.Subnet.Equal(b.Subnet) && a.IPv6Subnet.String() == b.IPv6Subnet.String() &&
		a.Attrs.BackendType == b.Attrs.BackendType && a.Attrs.PublicIP == b.Attrs.PublicIP &&
		fmt.Sprint(a.Attrs.PublicIPv6) == fmt.Sprint(b.Attrs.PublicIPv6) &&
		slices.Equal(a.Attrs.BackendData, b.Attrs.BackendData) && slices.Equal(a.Attrs.BackendV6Data, b.Attrs.BackendV6Data)
}

// GetStoredMacAddresses returns the addresses that this node announced before, for flannel to
// use them again: then the other nodes need not learn new ones.
func (s *subnets) GetStoredMacAddresses(context.Context) (v4, v6 string) {
	n := s.node.own()
	if n == nil {
		return "", ""
	}
	return vtepMAC(n, annotationData), vtepMAC(n, annotationData6)
}

// Name, and the rest of the interface, is used by flannel's own main program only.
func (s *subnets) Name() string { return "node " + s.NodeName }

func (s *subnets) HandleSubnetFile(path string, config *subnet.Config, masq bool, sn ip.IP4Net, sn6 ip.IP6Net, mtu int) error {
	return subnet.WriteSubnetFile(path, config, masq, sn, sn6, mtu)
}

func (s *subnets) RenewLease(context.Context, *lease.Lease) error { return nil }

func (s *subnets) WatchLease(context.Context, ip.IP4Net, ip.IP6Net, chan []lease.LeaseWatchResult) error {
	return errors.ErrUnsupported
}

func (s *subnets) CompleteLease(context.Context, *lease.Lease, *sync.WaitGroup) error { return nil }

func (s *subnets) GetStoredPublicIP(context.Context) (v4, v6 string) { return "", "" }
