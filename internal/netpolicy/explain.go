package netpolicy

import (
	"net/netip"
	"slices"
)

// Side is what one end of a connection says to it, and why.
type Side struct {
	Direction Direction `json:"direction"`
	Pod       string    `json:"pod"`  // "namespace/name"
	Node      string    `json:"node"` // where it is judged
	Allowed   bool      `json:"allowed"`
	// Isolated is whether a policy of its namespace selects the pod for this direction; else everything
	// is allowed that no policy of the whole cluster denies.
	Isolated bool `json:"isolated"`
	// OwnNode is whether the sender is the pod's own node, or the pod itself, which nothing stops.
	OwnNode bool `json:"ownNode,omitempty"`
	// AllowedBy are the policies that allow it, Policies all that isolate the pod: "namespace/name".
	AllowedBy []string `json:"allowedBy"`
	Policies  []string `json:"policies"`
	// Tier is that of the policy of the whole cluster which decides, empty where none does; Rule is
	// its rule: "NAME, rule N (NAME OF THE RULE)".
	Tier Tier   `json:"tier,omitempty"`
	Rule string `json:"rule,omitempty"`
}

// Explain says what each end that is a pod says to a flow. Its answers are those of the models
// that the nodes of the pods have; in.Node is of no meaning here. Ends that are no pods (nodes,
// pods of a node's network, the world outside) are judged nowhere, and have no Side.
func (c *Compiler) Explain(in Input, f Flow) []Side {
	owner := owners(in.Pods)
	sides := []Side{}
	for _, end := range []struct {
		direction Direction
		pod, peer netip.Addr
	}{{Egress, f.Src, f.Dst}, {Ingress, f.Dst, f.Src}} {
		pod := owner[end.pod]
		if pod == nil {
			continue
		}
		at := in
		at.Node = pod.Node
		m := c.Compile(at)
		name := m.Egress[end.pod]
		if end.direction == Ingress {
			name = m.Ingress[end.pod]
		}
		g := m.Groups[name]
		s := Side{Direction: end.direction, Pod: pod.Key(), Node: pod.Node, Allowed: true, AllowedBy: []string{}, Policies: []string{}}
		if g != nil {
			s.Policies, s.Isolated = append(s.Policies, g.Policies...), len(g.Policies) > 0
			for _, p := range in.Policies {
				if !slices.Contains(g.Policies, p.Key()) {
					continue
				}
				if c.group(end.direction, pod, []*policy{c.policies[p]}, at, owner).Allows(end.peer, f.Protocol, f.Port) {
					s.AllowedBy = append(s.AllowedBy, p.Key())
				}
			}
			slices.Sort(s.AllowedBy)
			s.OwnNode = f.Src == f.Dst || slices.Contains(m.Own, f.Src)
			if r := g.decider(c.podClass[owner[end.peer]], end.peer, f.Protocol, f.Port); r != nil && !s.OwnNode {
				s.Tier, s.Rule = r.policy.Spec.Tier, r.String()
			}
			s.Allowed = s.OwnNode || g.Allows(end.peer, f.Protocol, f.Port)
		}
		sides = append(sides, s)
	}
	return sides
}
