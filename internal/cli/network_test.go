package cli

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/kube/kubetest"
)

func TestNetworkWhy(t *testing.T) {
	api := kubetest.New(t)
	pod := func(namespace, name, node, ip string, labels map[string]string) *corev1.Pod {
		return &corev1.Pod{
			TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}, ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels},
			Spec:   corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Ports: []corev1.ContainerPort{{Name: "sql", ContainerPort: 5432}}}}},
			Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip},
		}
	}
	node := func(name, ip, cidr string) *corev1.Node {
		return &corev1.Node{
			TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDRs: []string{cidr}},
			Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: ip}}},
		}
	}
	api.Set(node("n1", "10.0.0.1", "10.1.0.0/24"), node("n2", "10.0.0.2", "10.1.1.0/24"),
		pod("default", "web", "n1", "10.1.0.2", map[string]string{"app": "web"}), pod("default", "new", "n1", "", nil),
		pod("shop", "db", "n2", "10.1.1.2", map[string]string{"app": "db"}),
		&networkingv1.NetworkPolicy{
			TypeMeta: metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"}, ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "nodes"},
			Spec: networkingv1.NetworkPolicySpec{Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: "10.0.0.1/32"}}}}}},
		},
		&networkingv1.NetworkPolicy{
			TypeMeta: metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"}, ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "deny"},
			Spec: networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{"Ingress"}},
		})
	config, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "c",
		"clusters": []any{map[string]any{"name": "c", "cluster": map[string]any{"server": api.Config().Host}}},
		"contexts": []any{map[string]any{"name": "c", "context": map[string]any{"cluster": "c"}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		args string
		code int
		want []string
	}{
		{"web shop/db:5432", ExitError, []string{"stopped: web (10.1.0.2) to shop/db (10.1.1.2:5432), tcp\n", "  egress of default/web on n1: allowed, no policy isolates the pod\n", "  ingress of shop/db on n2: stopped, none of its policies allows it: shop/deny, shop/nodes\n"}},
		{"node/n1 shop/db:sql", ExitOK, []string{"allowed: node/n1 (10.1.0.0) to shop/db (10.1.1.2:5432)", "allowed by shop/nodes"}},
		{"node/n2 shop/db:9/udp", ExitOK, []string{"from the pod itself or its node"}},
		{"shop/db 203.0.113.9:443", ExitOK, []string{"egress of shop/db on n2: allowed"}},
		{"node/n1 node/n2:443", ExitOK, []string{"neither end is a pod"}},
		{"[2001:db8::1] shop/db:1", ExitError, []string{"there is no pod"}},
		{"2001:db8::1 shop/db:1", ExitError, []string{"no address of the same family"}},
		{"web shop/db", ExitUsage, []string{"shop/db has no port"}},
		{"web shop/db:1/icmp", ExitUsage, []string{"choose from tcp, udp, sctp"}},
		{"web shop/db:nosuch", ExitError, []string{"the pod shop/db has no tcp port nosuch"}},
		{"web 10.0.0.9:0", ExitError, []string{"0 is no port"}},
		{"new shop/db:1", ExitError, []string{"has no address yet", "kubectl get pod -n default new"}},
		{"gone shop/db:1", ExitError, []string{"there is no pod gone in namespace default", "kubectl get pods -n default"}},
		{"node/n9 shop/db:1", ExitError, []string{"there is no node n9"}},
		{"web", ExitUsage, []string{"missing argument TO:PORT"}},
	} {
		a := newApp(t)
		if err := os.MkdirAll(filepath.Dir(a.Env.AdminKubeconfig()), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(a.Env.AdminKubeconfig(), config, 0o600); err != nil {
			t.Fatal(err)
		}
		code := a.Main(t.Context(), append([]string{"microk8s", "network", "why"}, strings.Fields(tc.args)...))
		said := a.out.String() + a.err.String()
		if code != tc.code {
			t.Errorf("%s: code %d, want %d\n%s", tc.args, code, tc.code, said)
		}
		for _, want := range tc.want {
			if !strings.Contains(said, want) {
				t.Errorf("%s: it lacks %q\n%s", tc.args, want, said)
			}
		}
	}
}
