package netpolicy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/mattfenwick/cyclonus/pkg/matcher"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/yaml"

	"microk8s/internal/longtest"
)

// TestAgainstAnotherImplementation compares random policies in random clusters with what the matcher of
// cyclonus says, from which network-policy-api's policy assistant descends: an evaluator that goes through
// policies rule by rule, written by others from the same documentation. What policies of the whole cluster
// do before and after is walked through rule by rule (walk).
func TestAgainstAnotherImplementation(t *testing.T) {
	var c Compiler // one for all: what it remembers must not show
	flows, stopped := 0, 0
	for seed := range longtest.Of(20000, 2000) {
		r := rand.New(rand.NewPCG(uint64(seed), 7))
		in, policies := randomCluster(r)
		in.Cluster = randomTiers(r)
		theirs := matcher.BuildNetworkPolicies(false, policies)
		models := map[string]*Model{}
		for _, node := range []string{"n1", "n2"} {
			at := in
			at.Node = node
			models[node] = c.Compile(at)
		}
		outside := []netip.Addr{netip.MustParseAddr("203.0.113.5"), netip.MustParseAddr("10.9.0.1"), netip.MustParseAddr("2001:db8::5")}
		for range 60 {
			src, from := randomEnd(r, in, outside)
			dst, to := randomEnd(r, in, outside)
			if src == nil && dst == nil || from == to || from.Is4() != to.Is4() {
				continue
			}
			f := Flow{Src: from, Dst: to, Protocol: []Protocol{TCP, TCP, UDP, SCTP}[r.IntN(4)], Port: []uint16{80, 81, 82, 443, 8080}[r.IntN(5)]}
			got := true
			for _, p := range []*Pod{src, dst} {
				if p != nil {
					got = got && models[p.Node].Verdict(f).Allowed
				}
			}
			traffic := &matcher.Traffic{
				Source: theirEnd(in, src, from), Destination: theirEnd(in, dst, to), ResolvedPort: int(f.Port),
				Protocol: map[Protocol]corev1.Protocol{TCP: corev1.ProtocolTCP, UDP: corev1.ProtocolUDP, SCTP: corev1.ProtocolSCTP}[f.Protocol],
			}
			if dst != nil {
				for _, p := range dst.Ports {
					if p.Port == f.Port && p.Protocol == f.Protocol {
						traffic.ResolvedPortName = p.Name
					}
				}
			}
			said := theirs.IsTrafficAllowed(traffic)
			want := (src == nil || walk(in, Egress, src, dst, to, f, theirSide(said.Egress))) &&
				(dst == nil || walk(in, Ingress, dst, src, from, f, theirSide(said.Ingress)))
			flows++
			if !want {
				stopped++
			}
			if got != want {
				data, _ := yaml.Marshal([]any{in.Cluster, policies})
				t.Fatalf("seed %d: %v → %v %s %d (%s): allowed %v, and the other says %v\nfrom %+v\nto %+v\n%s",
					seed, from, to, f.Protocol, f.Port, traffic.ResolvedPortName, got, want, src, dst, data)
			}
		}
	}
	if stopped < flows/10 || stopped > flows*9/10 {
		t.Errorf("%d of %d flows are stopped: too one-sided to compare anything", stopped, flows)
	}
}

func theirEnd(in Input, p *Pod, ip netip.Addr) *matcher.TrafficPeer {
	end := &matcher.TrafficPeer{IP: ip.String()}
	if p != nil {
		end.Internal = &matcher.InternalPeer{PodLabels: p.Labels, NamespaceLabels: in.Namespaces[p.Namespace], Namespace: p.Namespace}
	}
	return end
}

// randomEnd is a pod with one of its addresses, or an address outside.
func randomEnd(r *rand.Rand, in Input, outside []netip.Addr) (*Pod, netip.Addr) {
	if i := r.IntN(len(in.Pods) + len(outside)); i < len(outside) {
		return nil, outside[i]
	}
	p := in.Pods[r.IntN(len(in.Pods))]
	return p, p.IPs[r.IntN(len(p.IPs))]
}

func randomCluster(r *rand.Rand) (Input, []*networkingv1.NetworkPolicy) {
	pick := func(list ...string) string { return list[r.IntN(len(list))] }
	in := Input{Namespaces: map[string]map[string]string{}}
	for _, ns := range []string{"x", "y", "z"} {
		in.Namespaces[ns] = map[string]string{"ns": ns, "env": pick("dev", "prod")}
		for i := range 1 + r.IntN(4) {
			p := &Pod{Namespace: ns, Name: fmt.Sprint(i), Node: pick("n1", "n2"), Labels: map[string]string{"app": pick("a", "b", "c")}, Created: int64(r.IntN(5))}
			if r.IntN(2) == 0 {
				p.Labels["tier"] = pick("front", "back")
			}
			n := len(in.Pods) + 2
			p.IPs = append(p.IPs, netip.AddrFrom4([4]byte{10, 1, byte(r.IntN(2)), byte(n)}))
			if r.IntN(3) == 0 {
				p.IPs = append(p.IPs, netip.MustParseAddr(fmt.Sprintf("fd01::%x", n)))
			}
			if r.IntN(3) > 0 {
				p.Ports = append(p.Ports, NamedPort{"web", TCP, []uint16{80, 8080}[r.IntN(2)]})
			}
			if r.IntN(3) == 0 {
				p.Ports = append(p.Ports, NamedPort{"dns", UDP, 81})
			}
			in.Pods = append(in.Pods, p)
		}
	}
	selector := func() *metav1.LabelSelector {
		s := &metav1.LabelSelector{}
		switch r.IntN(6) {
		case 0:
		case 1:
			s.MatchLabels = map[string]string{"app": pick("a", "b", "c")}
		case 2:
			s.MatchLabels = map[string]string{"app": pick("a", "b"), "tier": pick("front", "back")}
		case 3:
			s.MatchExpressions = []metav1.LabelSelectorRequirement{{Key: "tier", Operator: metav1.LabelSelectorOperator(pick("Exists", "DoesNotExist"))}}
		default:
			s.MatchExpressions = []metav1.LabelSelectorRequirement{{Key: "app", Operator: metav1.LabelSelectorOperator(pick("In", "NotIn")), Values: []string{pick("a", "b"), "c"}}}
		}
		return s
	}
	nsSelector := func() *metav1.LabelSelector {
		return []*metav1.LabelSelector{{}, {MatchLabels: map[string]string{"env": pick("dev", "prod")}}, {MatchLabels: map[string]string{"ns": pick("x", "y", "z")}}}[r.IntN(3)]
	}
	peers := func() (out []networkingv1.NetworkPolicyPeer) {
		for range r.IntN(4) {
			p := networkingv1.NetworkPolicyPeer{}
			switch r.IntN(4) {
			case 0:
				p.PodSelector = selector()
			case 1:
				p.NamespaceSelector = nsSelector()
			case 2:
				p.PodSelector, p.NamespaceSelector = selector(), nsSelector()
			default:
				p.IPBlock = &networkingv1.IPBlock{CIDR: pick("0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/24", "10.1.0.4/30", "203.0.113.0/24", "::/0", "fd01::/125")}
				switch p.IPBlock.CIDR {
				case "0.0.0.0/0":
					p.IPBlock.Except = []string{pick("10.0.0.0/8", "10.1.1.0/24", "203.0.113.4/30")}
				case "10.0.0.0/8":
					p.IPBlock.Except = []string{pick("10.1.0.0/24", "10.1.0.4/30"), "10.9.0.0/16"}
				}
			}
			out = append(out, p)
		}
		return out
	}
	ports := func() (out []networkingv1.NetworkPolicyPort) {
		for range r.IntN(3) {
			p := networkingv1.NetworkPolicyPort{Protocol: ptr.To(corev1.Protocol(pick("TCP", "TCP", "UDP", "SCTP")))}
			switch r.IntN(5) {
			case 0:
			case 1:
				p.Port = ptr.To(intstr.FromString(pick("web", "dns", "none")))
			case 2:
				p.Port, p.EndPort = ptr.To(intstr.FromInt32(80)), ptr.To(int32(81+r.IntN(400)))
			default:
				p.Port = ptr.To(intstr.FromInt32([]int32{80, 81, 82, 443, 8080}[r.IntN(5)]))
			}
			out = append(out, p)
		}
		return out
	}
	var policies []*networkingv1.NetworkPolicy
	for i := range r.IntN(8) {
		p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: pick("x", "y", "z"), Name: fmt.Sprintf("p%d", i)}}
		p.Spec.PodSelector = *selector()
		p.Spec.PolicyTypes = [][]networkingv1.PolicyType{{"Ingress"}, {"Egress"}, {"Ingress", "Egress"}}[r.IntN(3)]
		for range r.IntN(4) {
			p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: peers(), Ports: ports()})
			p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: peers(), Ports: ports()})
		}
		policies = append(policies, p)
		in.Policies = append(in.Policies, PolicyOf(p))
	}
	return in, policies
}
