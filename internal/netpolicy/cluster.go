package netpolicy

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// ClusterPolicies is the resource of policies of the whole cluster, of sigs.k8s.io/network-policy-api v0.3.
var ClusterPolicies = schema.GroupVersionResource{Group: "policy.networking.k8s.io", Version: "v1beta1", Resource: "clusternetworkpolicies"}

// ClusterPolicy is a ClusterNetworkPolicy, with the fields of its standard channel.
type ClusterPolicy struct {
	Name string            `json:"name"`
	Spec ClusterPolicySpec `json:"spec"`
}

// ClusterPolicySpec has the names of the API's fields.
type ClusterPolicySpec struct {
	Tier     Tier          `json:"tier"`
	Priority int32         `json:"priority"` // 0 to 1000; the lower one is asked first
	Subject  ClusterPeer   `json:"subject"`
	Ingress  []ClusterRule `json:"ingress,omitempty"`
	Egress   []ClusterRule `json:"egress,omitempty"`
}

// Tier is when a policy is asked: before those of the namespaces, or where none of them isolates a pod.
type Tier string

// The tiers of policies of the whole cluster.
const (
	Admin    Tier = "Admin"
	Baseline Tier = "Baseline"
)

// Action is what a rule does with what it is about.
type Action string

// The actions. Pass leaves the rest of the tier out.
const (
	Accept Action = "Accept"
	Deny   Action = "Deny"
	Pass   Action = "Pass"
)

// ClusterRule is a rule of one side: of the first that is about a connection, the action counts.
type ClusterRule struct {
	Name      string            `json:"name,omitempty"`
	Action    Action            `json:"action"`
	From      []ClusterPeer     `json:"from,omitempty"` // of an ingress rule
	To        []ClusterPeer     `json:"to,omitempty"`   // of an egress rule
	Protocols []ClusterProtocol `json:"protocols,omitempty"`
}

// ClusterPeer is one of three: all pods of some namespaces, some of their pods, or ranges of addresses.
type ClusterPeer struct {
	Namespaces *metav1.LabelSelector `json:"namespaces,omitempty"`
	Pods       *struct {
		NamespaceSelector metav1.LabelSelector `json:"namespaceSelector"`
		PodSelector       metav1.LabelSelector `json:"podSelector"`
	} `json:"pods,omitempty"`
	Networks []string `json:"networks,omitempty"`
}

// ClusterProtocol is ports of one protocol; without a port all of them.
type ClusterProtocol struct {
	TCP  *ClusterPort `json:"tcp,omitempty"`
	UDP  *ClusterPort `json:"udp,omitempty"`
	SCTP *ClusterPort `json:"sctp,omitempty"`
}

// ClusterPort is a port, or a range of them with both ends.
type ClusterPort struct {
	DestinationPort *struct {
		Number int32 `json:"number,omitempty"`
		Range  *struct {
			Start int32 `json:"start"`
			End   int32 `json:"end"`
		} `json:"range,omitempty"`
	} `json:"destinationPort,omitempty"`
}

// ClusterPolicyOf reads a ClusterNetworkPolicy. The error is of an object that the API server's
// schema would not let in.
func ClusterPolicyOf(o *unstructured.Unstructured) (*ClusterPolicy, error) {
	spec, _, _ := unstructured.NestedMap(o.Object, "spec") // none is an empty one
	out := &ClusterPolicy{Name: o.GetName()}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(spec, &out.Spec); err != nil {
		return nil, fmt.Errorf("cannot read the ClusterNetworkPolicy %s: %w", o.GetName(), err)
	}
	return out, nil
}

// clusterPolicy is a ClusterPolicy with its selectors parsed.
type clusterPolicy struct {
	*ClusterPolicy
	subject         *peer
	egress, ingress []*tierRule
}

func (p *clusterPolicy) side(d Direction) []*tierRule {
	if d == Ingress {
		return p.ingress
	}
	return p.egress
}

// tierRule is one rule of one side.
type tierRule struct {
	policy   *ClusterPolicy
	number   int // in the policy, from 1
	name     string
	action   Action
	peers    []*peer
	networks []netip.Prefix
	ports    *PortSet
}

// String is how people find the rule.
func (r *tierRule) String() string {
	if r.name != "" {
		return fmt.Sprintf("%s, rule %d (%s)", r.policy.Name, r.number, r.name)
	}
	return fmt.Sprintf("%s, rule %d", r.policy.Name, r.number)
}

// about reports whether an address, of a pod of a class if that is not nil, is meant by the rule.
func (r *tierRule) about(cl *class, ip netip.Addr) bool {
	return within(r.networks, ip) || cl != nil && slices.ContainsFunc(r.peers, func(p *peer) bool { return p.matches(cl) })
}

// clusterPolicies returns the policies of an input in the order in which they are asked.
func (c *Compiler) clusterPolicies(in Input) []*clusterPolicy {
	known := make(map[*ClusterPolicy]*clusterPolicy, len(in.Cluster))
	var out []*clusterPolicy
	for _, p := range in.Cluster {
		compiled := c.cluster[p]
		if compiled == nil {
			compiled = c.compileCluster(p)
		}
		known[p] = compiled
		if compiled.subject == nil {
			continue
		}
		out = append(out, compiled)
		c.matched(compiled.subject) // which forgets classes that are gone
		for _, r := range slices.Concat(compiled.egress, compiled.ingress) {
			for _, q := range r.peers {
				c.matched(q)
			}
		}
	}
	c.cluster = known
	slices.SortFunc(out, func(a, b *clusterPolicy) int {
		return cmp.Or(cmp.Compare(a.Spec.Tier, b.Spec.Tier), cmp.Compare(a.Spec.Priority, b.Spec.Priority), cmp.Compare(a.Name, b.Name))
	})
	return out
}

func (c *Compiler) compileCluster(p *ClusterPolicy) *clusterPolicy {
	out := &clusterPolicy{ClusterPolicy: p, subject: c.clusterPeer(p.Spec.Subject)}
	rules := func(list []ClusterRule, peers func(ClusterRule) []ClusterPeer) (compiled []*tierRule) {
		for i, r := range list {
			t := &tierRule{policy: p, number: i + 1, name: r.Name, action: r.Action, ports: c.clusterPorts(r.Protocols)}
			for _, q := range peers(r) {
				if selector := c.clusterPeer(q); selector != nil {
					t.peers = append(t.peers, selector)
				}
				for _, n := range q.Networks {
					if prefix, err := parsePrefix(n); err == nil {
						t.networks = append(t.networks, prefix)
					}
				}
			}
			compiled = append(compiled, t)
		}
		return compiled
	}
	out.egress = rules(p.Spec.Egress, func(r ClusterRule) []ClusterPeer { return r.To })
	out.ingress = rules(p.Spec.Ingress, func(r ClusterRule) []ClusterPeer { return r.From })
	return out
}

// clusterPeer returns the shared pair of selectors; nil for one that means no pods.
func (c *Compiler) clusterPeer(p ClusterPeer) *peer {
	switch {
	case p.Pods != nil:
		return c.selectors("", &p.Pods.NamespaceSelector, &p.Pods.PodSelector)
	case p.Namespaces != nil:
		return c.selectors("", p.Namespaces, nil)
	}
	return nil
}

func (c *Compiler) clusterPorts(protocols []ClusterProtocol) *PortSet {
	if len(protocols) == 0 {
		return everything
	}
	var out []PortRange
	add := func(protocol Protocol, p *ClusterPort) {
		from, to := int32(0), int32(65535)
		switch {
		case p == nil:
			return
		case p.DestinationPort == nil:
		case p.DestinationPort.Range != nil:
			from, to = p.DestinationPort.Range.Start, p.DestinationPort.Range.End
		default:
			from, to = p.DestinationPort.Number, p.DestinationPort.Number
		}
		if from >= 0 && to <= 65535 && from <= to {
			out = append(out, PortRange{protocol, uint16(from), uint16(to)})
		}
	}
	for _, p := range protocols {
		add(TCP, p.TCP)
		add(UDP, p.UDP)
		add(SCTP, p.SCTP)
	}
	return c.intern(newPortSet(false, out))
}

// applyTiers changes what a group allows by the policies of the whole cluster that judge its pods.
// Rules are in the order in which they are asked.
func (c *Compiler) applyTiers(g *Group, rules []*tierRule, owner map[netip.Addr]*Pod) {
	g.rules = rules
	for _, r := range rules {
		if n := len(g.Tiers); n == 0 || g.Tiers[n-1] != r.policy.Name {
			g.Tiers = append(g.Tiers, r.policy.Name)
		}
	}
	isolated := len(g.Policies) > 0
	nets, peers := g.Nets, g.Peers
	known := map[string]*PortSet{} // by the rules that count, and what the namespace's policies allow
	decide := func(cl *class, ip netip.Addr) *PortSet {
		var own *PortSet
		if isolated {
			own = at(nets, ip)
			if ports, ok := peers[ip]; ok && cl != nil { // else ip is the first of a range
				own = ports
			}
		}
		key := make([]byte, 0, len(rules)+16)
		var asked []*tierRule
		for _, r := range rules {
			about := r.about(cl, ip)
			if about {
				asked = append(asked, r)
				key = append(key, 1)
			} else {
				key = append(key, 0)
			}
		}
		if own != nil {
			key = append(key, own.key...)
		}
		ports := known[string(key)]
		if ports == nil {
			ports = c.intern(tiers(asked, own))
			known[string(key)] = ports
		}
		return ports
	}
	g.Nets = c.tierNets(rules, nets, decide)
	g.Peers = map[netip.Addr]*PortSet{}
	for _, cl := range c.live {
		meant := slices.ContainsFunc(rules, func(r *tierRule) bool {
			return slices.ContainsFunc(r.peers, func(p *peer) bool { return p.matches(cl) })
		})
		for _, q := range cl.pods {
			for _, ip := range q.IPs {
				if _, ok := peers[ip]; owner[ip] != q || !ok && !meant {
					continue
				}
				if ports := decide(cl, ip); ports != at(g.Nets, ip) {
					g.Peers[ip] = ports
				}
			}
		}
	}
}

// tierNets cuts all addresses where what counts for them may change, and decides for each piece.
func (c *Compiler) tierNets(rules []*tierRule, nets []Net, decide func(*class, netip.Addr) *PortSet) (out []Net) {
	starts := []netip.Addr{whole4.from, whole6.from}
	cut := func(from, to netip.Addr) {
		starts = append(starts, from)
		if next := to.Next(); next.IsValid() {
			starts = append(starts, next)
		}
	}
	for _, n := range nets {
		cut(n.From, n.To)
	}
	for _, r := range rules {
		for _, p := range r.networks {
			cut(rangeOf(p).from, rangeOf(p).to)
		}
	}
	slices.SortFunc(starts, netip.Addr.Compare) // those of IPv4 first
	starts = slices.Compact(starts)
	for i, from := range starts {
		to := whole6.to
		if from.Is4() {
			to = whole4.to
		}
		if i+1 < len(starts) && starts[i+1].Is4() == from.Is4() {
			to = starts[i+1].Prev()
		}
		ports, last := decide(nil, from), len(out)-1
		switch {
		case ports.Empty():
		case last >= 0 && out[last].To.Next() == from && out[last].Ports == ports:
			out[last].To = to
		default:
			out = append(out, Net{from, to, ports})
		}
	}
	return out
}

// tiers returns what is allowed after each rule that is about a peer was asked, in their order. Own is
// what the policies of the namespace allow to that peer, nil where none of them isolates the pod.
func tiers(asked []*tierRule, own *PortSet) *PortSet {
	allowed, open := nothing, everything
	ask := func(t Tier) (passed *PortSet) {
		passed = nothing
		for _, r := range asked {
			if r.policy.Spec.Tier != t {
				continue
			}
			meant := both(r.ports, open)
			switch r.action {
			case Accept:
				allowed = either(allowed, meant)
			case Pass:
				passed = either(passed, meant)
			case Deny:
			}
			open = open.without(meant)
		}
		return passed
	}
	open = either(ask(Admin), open)
	if own != nil {
		return either(allowed, both(open, own))
	}
	return either(either(ask(Baseline), open), allowed)
}

func both(a, b *PortSet) *PortSet { return a.without(a.without(b)) }

func either(a, b *PortSet) *PortSet {
	return newPortSet(a.Others || b.Others, slices.Concat(a.ranges(), b.ranges()))
}

// decider returns the rule of the group that decides on a connection with a peer, nil where the policies of
// the namespace do, or the default.
func (g *Group) decider(cl *class, peer netip.Addr, protocol Protocol, port uint16) *tierRule {
	for _, t := range []Tier{Admin, Baseline} {
		if t == Baseline && len(g.Policies) > 0 {
			return nil
		}
		for _, r := range g.rules {
			if r.policy.Spec.Tier != t || !r.about(cl, peer) || !r.ports.Contains(protocol, port) {
				continue
			}
			if r.action == Pass {
				break
			}
			return r
		}
	}
	return nil
}
