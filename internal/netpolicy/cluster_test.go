package netpolicy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/yaml"

	"github.com/mattfenwick/cyclonus/pkg/matcher"
)

// clusterPolicyOf reads the spec of a policy as the API server has it.
func clusterPolicyOf(t *testing.T, name, spec string) *ClusterPolicy {
	t.Helper()
	o := map[string]any{"metadata": map[string]any{"name": name}}
	var fields map[string]any
	if err := yaml.Unmarshal([]byte(spec), &fields); err != nil {
		t.Fatalf("%v in\n%s", err, spec)
	}
	o["spec"] = fields
	p, err := ClusterPolicyOf(&unstructured.Unstructured{Object: o})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestTiers(t *testing.T) {
	const (
		denyAll   = `{podSelector: {}, policyTypes: [Ingress, Egress]}`
		allowAll  = `{podSelector: {}, ingress: [{}], egress: [{}], policyTypes: [Ingress, Egress]}`
		shop      = `subject: {namespaces: {matchLabels: {team: a}}}`
		web       = `subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: web}}}}`
		fromProbe = `from: [{pods: {namespaceSelector: {matchLabels: {team: b}}, podSelector: {matchLabels: {app: probe}}}}]`
		fromAll   = `from: [{namespaces: {}}]`
	)
	for _, tc := range []struct {
		name            string
		policies        string
		cluster         []string
		allowed, denied []string
	}{
		{"deny in front of what the namespace allows", allowAll,
			[]string{`{tier: Admin, priority: 1, ` + shop + `, ingress: [{action: Deny, ` + fromProbe + `}]}`},
			[]string{"client web:80", "world web:80", "web probe:80"}, []string{"probe web:80", "probe db:1"}},
		{"accept in front of what the namespace denies", denyAll,
			[]string{`{tier: Admin, priority: 1, ` + shop + `, ingress: [{action: Accept, ` + fromProbe + `, protocols: [{tcp: {destinationPort: {number: 80}}}]}]}`},
			[]string{"probe web:80"}, []string{"probe web:81", "client web:80"}},
		{"the first rule counts", "",
			[]string{`{tier: Admin, priority: 1, ` + web + `, ingress: [{action: Accept, ` + fromProbe + `}, {action: Deny, ` + fromAll + `}]}`},
			[]string{"probe web:80", "world web:80", "client db:80"}, []string{"client web:80"}},
		{"the lower priority is asked first", "",
			[]string{`{tier: Admin, priority: 20, ` + web + `, ingress: [{action: Deny, ` + fromAll + `}]}`, `{tier: Admin, priority: 10, ` + web + `, ingress: [{action: Accept, ` + fromProbe + `}]}`},
			[]string{"probe web:80"}, []string{"client web:80"}},
		{"pass leaves it to the namespace", `{podSelector: {}, ingress: [{ports: [{port: 80}]}]}`,
			[]string{`{tier: Admin, priority: 1, ` + shop + `, ingress: [{action: Pass, ` + fromProbe + `}]}`, `{tier: Admin, priority: 2, ` + shop + `, ingress: [{action: Deny, ` + fromAll + `}]}`},
			[]string{"probe web:80", "world web:80"}, []string{"probe web:81", "client web:80"}},
		{"the baseline holds where no policy isolates", "",
			[]string{`{tier: Baseline, priority: 1, ` + shop + `, ingress: [{action: Accept, ` + fromProbe + `}, {action: Deny, ` + fromAll + `}]}`},
			[]string{"probe web:80", "world web:80"}, []string{"client web:80", "db web:80"}},
		{"and not where one does", `{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]}`,
			[]string{`{tier: Baseline, priority: 1, ` + shop + `, ingress: [{action: Deny, ` + fromAll + `}]}`},
			[]string{"client web:80", "client web:81"}, []string{"client db:80", "probe web:80"}},
		{"pass in the baseline is the default", "",
			[]string{`{tier: Baseline, priority: 1, ` + shop + `, ingress: [{action: Pass, ` + fromProbe + `}, {action: Deny, ` + fromAll + `}]}`},
			[]string{"probe web:80"}, []string{"client web:80"}},
		{"networks of an egress rule", "",
			[]string{`{tier: Admin, priority: 1, ` + web + `, egress: [{action: Accept, to: [{networks: [10.1.1.0/24]}], protocols: [{tcp: {destinationPort: {range: {start: 80, end: 90}}}}]}, {action: Deny, to: [{networks: [10.0.0.0/8, "::/0"]}]}]}`},
			[]string{"web client:80", "web probe:90", "web world:80", "db n2:80"}, []string{"web client:79", "web client:91", "web client:udp/80", "web db:80", "web n2:80"}},
		{"a deny of one port leaves the others", "",
			[]string{`{tier: Admin, priority: 1, ` + web + `, ingress: [{action: Deny, ` + fromProbe + `, protocols: [{udp: {}}, {tcp: {destinationPort: {number: 80}}}]}]}`},
			[]string{"probe web:81", "probe web:sctp/80", "client web:udp/80"}, []string{"probe web:80", "probe web:udp/53"}},
		{"a policy without rules of a side says nothing about it", "",
			[]string{`{tier: Admin, priority: 1, ` + shop + `, egress: [{action: Deny, to: [{networks: [0.0.0.0/0]}]}]}`},
			[]string{"probe web:80", "world db:80"}, []string{"web probe:80", "db world:1"}},
		{"nodes and pods of a node's network are no pods", "",
			[]string{`{tier: Admin, priority: 1, ` + shop + `, ingress: [{action: Deny, from: [{namespaces: {}}]}]}`},
			[]string{"n2 web:80", "tunnel2 web:80"}, []string{"probe web:80"}},
		{"a subject that is nobody", "",
			[]string{`{tier: Admin, priority: 1, subject: {}, ingress: [{action: Deny, ` + fromAll + `}]}`},
			[]string{"probe web:80"}, nil},
		{"a peer that is nobody", "",
			[]string{`{tier: Admin, priority: 1, ` + shop + `, ingress: [{action: Deny, from: [{}]}]}`},
			[]string{"probe web:80", "world web:80"}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in := tableInput(t, tc.policies)
			for i, spec := range tc.cluster {
				in.Cluster = append(in.Cluster, clusterPolicyOf(t, fmt.Sprintf("c%d", i), spec))
			}
			var c Compiler
			m := c.Compile(in)
			for _, list := range []struct {
				flows []string
				want  bool
			}{{tc.allowed, true}, {tc.denied, false}} {
				for _, s := range list.flows {
					f := flow(t, s)
					if d := m.Verdict(f); d.Allowed != list.want {
						t.Errorf("%s: allowed %v (%+v)", s, d.Allowed, d)
					}
					allowed := true
					for _, side := range c.Explain(in, f) {
						allowed = allowed && (side.Allowed || side.Node != in.Node)
						decided := !side.Isolated || side.OwnNode || len(side.AllowedBy) > 0
						if side.Rule != "" {
							decided = strings.Contains(ruleText(in, side.Rule), "Accept")
						}
						if side.Allowed != decided {
							t.Errorf("%s: explained by %+v", s, side)
						}
					}
					if allowed != list.want {
						t.Errorf("%s: Explain says %+v", s, c.Explain(in, f))
					}
				}
			}
		})
	}
}

// ruleText returns the action of the rule that people are told: "NAME, rule N".
func ruleText(in Input, rule string) (actions string) {
	name, number, _ := strings.Cut(rule, ", rule ")
	for _, p := range in.Cluster {
		if p.Name != name {
			continue
		}
		for _, list := range [][]ClusterRule{p.Spec.Ingress, p.Spec.Egress} {
			var n int
			if _, err := fmt.Sscan(number, &n); err == nil && n <= len(list) {
				actions += string(list[n-1].Action)
			}
		}
	}
	return actions
}

// walk is a second reading of the API's documentation: rule by rule, connection by connection. own is what
// the policies of the namespace say, nil where none isolates the pod.
func walk(in Input, d Direction, pod, peer *Pod, peerIP netip.Addr, f Flow, own *bool) bool {
	selects := func(s *metav1.LabelSelector, set map[string]string) bool {
		selector, err := metav1.LabelSelectorAsSelector(s)
		return err == nil && selector.Matches(labels.Set(set))
	}
	meant := func(p ClusterPeer, pod *Pod, ip netip.Addr) bool {
		switch {
		case pod != nil && p.Namespaces != nil && selects(p.Namespaces, in.Namespaces[pod.Namespace]):
			return true
		case pod != nil && p.Pods != nil && selects(&p.Pods.NamespaceSelector, in.Namespaces[pod.Namespace]) && selects(&p.Pods.PodSelector, pod.Labels):
			return true
		}
		return slices.ContainsFunc(p.Networks, func(n string) bool { return netip.MustParsePrefix(n).Contains(ip) })
	}
	port := func(list []ClusterProtocol) bool {
		if len(list) == 0 {
			return true
		}
		for _, p := range list {
			for protocol, port := range map[Protocol]*ClusterPort{TCP: p.TCP, UDP: p.UDP, SCTP: p.SCTP} {
				switch {
				case port == nil || protocol != f.Protocol:
				case port.DestinationPort == nil:
					return true
				case port.DestinationPort.Range != nil && int32(f.Port) >= port.DestinationPort.Range.Start && int32(f.Port) <= port.DestinationPort.Range.End:
					return true
				case port.DestinationPort.Range == nil && int32(f.Port) == port.DestinationPort.Number:
					return true
				}
			}
		}
		return false
	}
	policies := slices.Clone(in.Cluster)
	slices.SortStableFunc(policies, func(a, b *ClusterPolicy) int { return int(a.Spec.Priority - b.Spec.Priority) })
	first := func(t Tier) Action {
		for _, p := range policies {
			if p.Spec.Tier != t || !meant(p.Spec.Subject, pod, netip.Addr{}) {
				continue
			}
			rules := p.Spec.Egress
			if d == Ingress {
				rules = p.Spec.Ingress
			}
			for _, r := range rules {
				if port(r.Protocols) && slices.ContainsFunc(slices.Concat(r.From, r.To), func(q ClusterPeer) bool { return meant(q, peer, peerIP) }) {
					return r.Action
				}
			}
		}
		return Pass
	}
	switch a := first(Admin); {
	case a != Pass:
		return a == Accept
	case own != nil:
		return *own
	}
	return first(Baseline) != Deny
}

// theirSide is what another implementation says of the policies of namespaces, on one side.
func theirSide(r *matcher.DirectionResult) *bool {
	if len(r.AllowingTargets)+len(r.DenyingTargets) == 0 {
		return nil
	}
	allowed := r.IsAllowed()
	return &allowed
}

// randomTiers makes policies of the whole cluster, with priorities of their own, as a tie is nobody's to break.
func randomTiers(r *rand.Rand) (out []*ClusterPolicy) {
	pick := func(list ...string) string { return list[r.IntN(len(list))] }
	ns := func() *metav1.LabelSelector {
		return []*metav1.LabelSelector{{}, {MatchLabels: map[string]string{"env": pick("dev", "prod")}}, {MatchLabels: map[string]string{"ns": pick("x", "y", "z")}}}[r.IntN(3)]
	}
	peer := func(networks bool) (p ClusterPeer) {
		switch n := r.IntN(4); {
		case n == 0 && networks:
			p.Networks = []string{pick("0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/24", "::/0"), pick("10.1.0.4/30", "203.0.113.0/24", "fd01::/125")}
		case n == 1:
			p.Namespaces = ns()
		default:
			text := fmt.Sprintf(`{pods: {podSelector: {matchLabels: {app: %s}}}}`, pick("a", "b", "c"))
			if err := yaml.Unmarshal([]byte(text), &p); err != nil {
				panic(err)
			}
			p.Pods.NamespaceSelector = *ns()
		}
		return p
	}
	rules := func(d Direction) (out []ClusterRule) {
		for range r.IntN(4) {
			rule := ClusterRule{Action: Action(pick("Accept", "Deny", "Deny", "Pass"))}
			for range 1 + r.IntN(2) {
				if d == Ingress {
					rule.From = append(rule.From, peer(false))
				} else {
					rule.To = append(rule.To, peer(true))
				}
			}
			for range r.IntN(3) {
				var p ClusterProtocol
				text := fmt.Sprintf("{%s: {destinationPort: %s}}", pick("tcp", "tcp", "udp", "sctp"), pick("{number: 80}", "{number: 443}", "{range: {start: 80, end: 82}}", "null"))
				if err := yaml.Unmarshal([]byte(text), &p); err != nil {
					panic(err)
				}
				rule.Protocols = append(rule.Protocols, p)
			}
			out = append(out, rule)
		}
		return out
	}
	for i := range r.IntN(5) {
		p := &ClusterPolicy{Name: fmt.Sprintf("c%d", i)}
		p.Spec = ClusterPolicySpec{Tier: Tier(pick("Admin", "Admin", "Baseline")), Priority: int32(r.IntN(100)*10 + i), Subject: peer(false), Ingress: rules(Ingress), Egress: rules(Egress)}
		out = append(out, p)
	}
	return out
}
