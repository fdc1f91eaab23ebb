// Package netpolicy says what the NetworkPolicies of a cluster mean for one node: which of its
// pods are isolated, and which addresses and ports each of them may talk to. It is a function of
// what the API server knows (no files, no network, no clock), so that it can be tested against
// other implementations, and so that the enforcer (internal/netpolicy/nft) and the command
// `microk8s network why` cannot disagree.
//
// The rules are those of networking.k8s.io/v1 as its documentation states them: policies only add
// what is allowed; a connection is allowed when the sender's side and the receiver's side both
// allow it, each judged on its own node; policies of the whole cluster (policy.networking.k8s.io/v1beta1)
// judge before them in the Admin tier, and in the Baseline tier where no policy isolates a pod; pods of the host's network are not pods here but the
// node; what a pod's own node sends to it is always allowed, and what a pod sends to itself.
package netpolicy

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
)

// Pod is what policies can see of a pod.
type Pod struct {
	Namespace string            `json:"namespace"`
	Name      string            `json:"name"`
	UID       string            `json:"uid,omitempty"`
	Labels    map[string]string `json:"labels,omitempty"`
	Node      string            `json:"node,omitempty"`
	// HostNetwork is whether the pod uses the node's own network; then it is not a pod for policies.
	HostNetwork bool         `json:"hostNetwork,omitempty"`
	IPs         []netip.Addr `json:"ips,omitempty"`
	Ports       []NamedPort  `json:"ports,omitempty"` // only those with a name
	Created     int64        `json:"created,omitempty"`
}

// Key is "namespace/name".
func (p *Pod) Key() string { return p.Namespace + "/" + p.Name }

// NamedPort is a port of a container that policies may name.
type NamedPort struct {
	Name     string   `json:"name"`
	Protocol Protocol `json:"protocol"`
	Port     uint16   `json:"port"`
}

// Policy is a NetworkPolicy.
type Policy struct {
	Namespace string                         `json:"namespace"`
	Name      string                         `json:"name"`
	Spec      networkingv1.NetworkPolicySpec `json:"spec"`
}

// Key is "namespace/name".
func (p *Policy) Key() string { return p.Namespace + "/" + p.Name }

// Node is a machine of the cluster.
type Node struct {
	Name      string         `json:"name"`
	Addresses []netip.Addr   `json:"addresses,omitempty"`
	PodCIDRs  []netip.Prefix `json:"podCIDRs,omitempty"`
}

// Own returns the addresses at which a node itself is in the pod network: that of the tunnel,
// which is the sender of what the node sends to pods of other nodes, and the gateway of its pods.
func (n *Node) Own() (out []netip.Addr) {
	for _, c := range n.PodCIDRs {
		tunnel := c.Masked().Addr()
		out = append(out, tunnel, tunnel.Next())
	}
	return out
}

// Input is what a model is made of. Nothing in it may be changed after it was given to Compile:
// results are remembered by the pointers.
type Input struct {
	Node       string // the node whose pods are judged
	Namespaces map[string]map[string]string
	Pods       []*Pod // of all nodes; those that have ended are left out
	Policies   []*Policy
	Cluster    []*ClusterPolicy
	Nodes      []*Node
	// Closed are this node's ranges of pod addresses. An address in them that no pod of the input
	// has belongs to a pod that is not known yet: nothing is allowed to or from it.
	Closed []netip.Prefix
}

// Direction is a side of a connection, seen from the pod.
type Direction string

// The two sides.
const (
	Egress  Direction = "egress"
	Ingress Direction = "ingress"
)

// Model is the desired rule set of one node.
type Model struct {
	Closed []netip.Prefix
	Own    []netip.Addr // the node's own addresses, which are not judged as pods
	// Egress and Ingress say for each address of a pod of this node which group judges its
	// connections; the empty name is that of a pod that is not isolated on this side.
	Egress, Ingress map[netip.Addr]string
	Groups          map[string]*Group
}

// Group judges one side of pods for which the same policies hold. What it does not allow is denied.
type Group struct {
	Name      string
	Direction Direction
	Pods      []string // "namespace/name", sorted
	Policies  []string // "namespace/name", sorted
	// Peers are the ports allowed with single addresses, which count before Nets.
	Peers map[netip.Addr]*PortSet
	// Nets are the ports allowed with everybody else: ranges that do not overlap, in their order.
	Nets []Net
	// Tiers are the policies of the whole cluster that judge the pods before or after those of
	// their namespace, by name, in the order in which they do.
	Tiers []string
	rules []*tierRule
}

// Net is a range of addresses of one family, both ends included.
type Net struct {
	From, To netip.Addr
	Ports    *PortSet
}

// Flow is a connection as it is seen after the addresses of Services were translated.
type Flow struct {
	Src, Dst netip.Addr
	Protocol Protocol
	Port     uint16 // of Dst; 0 for protocols without ports
}

// Decision is what a node does with a flow.
type Decision struct {
	Allowed bool
	// Side is which side of the connection has denied it; empty when allowed.
	Side Direction
	// Group has decided on that side; empty where the pod is not known to the node.
	Group string
}

// Verdict reports what the node of the model does with a flow that comes through it: as the
// rules do, the sender's side is judged first. Flows of other nodes' pods are allowed here, and
// judged there.
func (m *Model) Verdict(f Flow) Decision {
	if f.Src == f.Dst || slices.Contains(m.Own, f.Src) {
		return Decision{Allowed: true}
	}
	for _, side := range []struct {
		direction Direction
		pods      map[netip.Addr]string
		pod, peer netip.Addr
	}{{Egress, m.Egress, f.Src, f.Dst}, {Ingress, m.Ingress, f.Dst, f.Src}} {
		name, known := side.pods[side.pod]
		switch {
		case slices.Contains(m.Own, side.pod):
		case !known && within(m.Closed, side.pod):
			return Decision{Side: side.direction}
		case known && name != "" && !m.Groups[name].Allows(side.peer, f.Protocol, f.Port):
			return Decision{Side: side.direction, Group: name}
		}
	}
	return Decision{Allowed: true}
}

// Allows reports whether the group allows a connection with peer.
func (g *Group) Allows(peer netip.Addr, protocol Protocol, port uint16) bool {
	if ports, ok := g.Peers[peer]; ok {
		return ports.Contains(protocol, port)
	}
	return at(g.Nets, peer).Contains(protocol, port)
}

// at returns the ports of the net that an address is in.
func at(nets []Net, addr netip.Addr) *PortSet {
	i, ok := slices.BinarySearchFunc(nets, addr, func(n Net, a netip.Addr) int {
		switch {
		case n.To.Less(a):
			return -1
		case a.Less(n.From):
			return 1
		}
		return 0
	})
	if !ok {
		return nothing
	}
	return nets[i].Ports
}

func within(prefixes []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}

// Types returns the sides that a policy isolates. The API server writes the default of an empty
// list into each policy; it is the same here for those that were written before it did.
func (p *Policy) Types() (egress, ingress bool) {
	if len(p.Spec.PolicyTypes) == 0 {
		return len(p.Spec.Egress) > 0, true
	}
	return slices.Contains(p.Spec.PolicyTypes, networkingv1.PolicyTypeEgress), slices.Contains(p.Spec.PolicyTypes, networkingv1.PolicyTypeIngress)
}

// PodOf returns what policies see of a pod, nil when it has ended: its addresses may be another's.
func PodOf(p *corev1.Pod) *Pod {
	if p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
		return nil
	}
	out := &Pod{
		Namespace: p.Namespace, Name: p.Name, UID: string(p.UID), Labels: p.Labels, Node: p.Spec.NodeName,
		HostNetwork: p.Spec.HostNetwork, Created: p.CreationTimestamp.Unix(),
	}
	if hash := p.Annotations[corev1.MirrorPodAnnotationKey]; hash != "" {
		out.UID = hash // the UID under which the kubelet runs a static pod
	}
	ips := p.Status.PodIPs
	if len(ips) == 0 && p.Status.PodIP != "" {
		ips = []corev1.PodIP{{IP: p.Status.PodIP}}
	}
	for _, ip := range ips {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			out.IPs = append(out.IPs, a.Unmap())
		}
	}
	ports := func(c *corev1.Container) {
		for _, port := range c.Ports {
			if proto, ok := ProtocolOf(port.Protocol); ok && port.Name != "" {
				out.Ports = append(out.Ports, NamedPort{Name: port.Name, Protocol: proto, Port: uint16(port.ContainerPort)})
			}
		}
	}
	for i := range p.Spec.InitContainers {
		if c := &p.Spec.InitContainers[i]; c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			ports(c)
		}
	}
	for i := range p.Spec.Containers {
		ports(&p.Spec.Containers[i])
	}
	return out
}

// NodeOf returns what policies see of a node.
func NodeOf(n *corev1.Node) *Node {
	out := &Node{Name: n.Name}
	for _, a := range n.Status.Addresses {
		if a.Type != corev1.NodeInternalIP && a.Type != corev1.NodeExternalIP {
			continue
		}
		if addr, err := netip.ParseAddr(a.Address); err == nil {
			out.Addresses = append(out.Addresses, addr.Unmap())
		}
	}
	for _, c := range n.Spec.PodCIDRs {
		if p, err := netip.ParsePrefix(c); err == nil {
			out.PodCIDRs = append(out.PodCIDRs, p.Masked())
		}
	}
	return out
}

// PolicyOf returns the part of a NetworkPolicy that has a meaning.
func PolicyOf(p *networkingv1.NetworkPolicy) *Policy {
	return &Policy{Namespace: p.Namespace, Name: p.Name, Spec: p.Spec}
}
