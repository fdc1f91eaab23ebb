package nft

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"

	"microk8s/internal/netpolicy"
)

// BenchmarkChange is the time from a change to the rules in the kernel, with many policies of ten rules
// each, on a node with 100 of 200 pods.
func BenchmarkChange(b *testing.B) {
	for _, n := range []int{0, 100, 1000} {
		in := manyPolicies(n)
		b.Run(fmt.Sprintf("policies=%d/change=policy", n), func(b *testing.B) {
			change(b, in, func(in *netpolicy.Input, i int) {
				p := &netpolicy.Policy{Namespace: "ns0", Name: "changing"}
				p.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{Ports: []networkingv1.NetworkPolicyPort{{Port: ptr.To(intstr.FromInt32(int32(1 + i%60000)))}}}}
				in.Policies = append(in.Policies[:n:n], p)
			})
		})
		b.Run(fmt.Sprintf("policies=%d/change=pod", n), func(b *testing.B) {
			change(b, in, func(in *netpolicy.Input, i int) {
				p := *in.Pods[0]
				p.Name, p.Created, p.IPs = fmt.Sprint("new", i), 1000, []netip.Addr{netip.AddrFrom4([4]byte{10, 1, 0, byte(220 + i%20)})}
				in.Pods = append(in.Pods[:200:200], &p)
			})
		})
	}
}

func change(b *testing.B, in netpolicy.Input, alter func(*netpolicy.Input, int)) {
	w := newWorld(b)
	var c netpolicy.Compiler
	apply := func() {
		if _, err := w.table.Apply(b.Context(), c.Compile(in)); err != nil {
			b.Fatal(err)
		}
	}
	apply()
	for i := 0; b.Loop(); i++ {
		alter(&in, i)
		apply()
	}
}

// manyPolicies are spread over ten namespaces: each policy selects the pods of one app of its namespace, and
// each rule allows one app of one namespace on two ports.
func manyPolicies(n int) netpolicy.Input {
	in := netpolicy.Input{Node: "n1", Namespaces: map[string]map[string]string{}, Closed: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24")}}
	for i := range 10 {
		in.Namespaces[fmt.Sprint("ns", i)] = map[string]string{"name": fmt.Sprint("ns", i)}
	}
	for i := range 200 {
		p := &netpolicy.Pod{
			Namespace: fmt.Sprint("ns", i%10), Name: fmt.Sprint("p", i), Node: fmt.Sprint("n", 1+i%2), Labels: map[string]string{"app": fmt.Sprint("app", i/10%4)},
			Created: int64(i), IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 1, byte(i % 2), byte(2 + i)})},
		}
		in.Pods = append(in.Pods, p)
	}
	for i := range n {
		p := &netpolicy.Policy{Namespace: fmt.Sprint("ns", i%10), Name: fmt.Sprint("policy", i)}
		p.Spec.PodSelector.MatchLabels = map[string]string{"app": fmt.Sprint("app", i%4)}
		for j := range 10 {
			p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{
				From: []networkingv1.NetworkPolicyPeer{{
					NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"name": fmt.Sprint("ns", (i+j)%10)}},
					PodSelector:       &metav1.LabelSelector{MatchLabels: map[string]string{"app": fmt.Sprint("app", j%4)}},
				}},
				Ports: []networkingv1.NetworkPolicyPort{{Port: ptr.To(intstr.FromInt32(int32(1000 + i)))}, {Port: ptr.To(intstr.FromInt32(int32(3000 + j)))}},
			})
		}
		in.Policies = append(in.Policies, p)
	}
	return in
}

// BenchmarkNewConnections is what the first packet of a connection costs on its way through the node, from
// a pod to another that as many policies isolate: the last of their rules allows it.
func BenchmarkNewConnections(b *testing.B) {
	for _, n := range []int{-1, 0, 100, 1000} {
		name := fmt.Sprintf("policies=%d", n)
		if n < 0 {
			name = "no table"
		}
		b.Run(name, func(b *testing.B) {
			w := newWorld(b)
			in := manyPolicies(max(n, 0))
			for i, name := range []string{"a", "b"} {
				in.Pods[i].Namespace, in.Pods[i].Node, in.Pods[i].Labels = "ns0", "n1", map[string]string{"app": "app0"}
				in.Pods[i].IPs = []netip.Addr{netip.MustParseAddr(addresses[name][0])}
			}
			if n > 0 {
				all := &netpolicy.Policy{Namespace: "ns0", Name: "zz"}
				all.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{Ports: []networkingv1.NetworkPolicyPort{{Protocol: ptr.To(corev1.ProtocolUDP), Port: ptr.To(intstr.FromInt32(1)), EndPort: ptr.To(int32(65535))}}}}
				in.Policies = append(in.Policies, all)
			}
			if n >= 0 {
				w.apply(in)
			} else { // every node tracks connections, for Services
				sh(b, `nft 'table ip t { chain c { type filter hook forward priority filter; ct state established accept; }; }'`)
			}
			w.in(w.ends["b"], func() {
				sh(b, `nft 'table ip t { chain c { type filter hook prerouting priority raw; udp dport 1-65535 counter drop; }; }'`)
			})
			var from *net.UDPConn
			var err error
			w.in(w.ends["a"], func() { from, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(addresses["a"][0])}) })
			if err != nil {
				b.Fatal(err)
			}
			defer from.Close()
			to := netip.MustParseAddr(addresses["b"][0])
			sent := 0
			for b.Loop() {
				if _, err := from.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(to, uint16(1+sent%65000))); err != nil {
					b.Fatal(err)
				}
				sent++
			}
			w.in(w.ends["b"], func() {
				if out := sh(b, "nft list table ip t"); !strings.Contains(out, fmt.Sprintf("packets %d", sent)) {
					b.Errorf("not all of %d packets came through:\n%s", sent, out)
				}
			})
		})
	}
}
