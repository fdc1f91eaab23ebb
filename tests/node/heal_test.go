package node

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/longtest"
)

// faults are what other programs and people do to a host's network. All that the product needs of it has to come back
// by itself.
var faults = []struct{ name, do string }{
	{"flush ruleset", "nft flush ruleset"}, // systemctl restart nftables
	{"a firewall that is loaded", "printf 'flush ruleset; table inet filter { chain forward { type filter hook forward priority 0; policy drop; }; }' | nft -f -"},
	{"iptables flushed", "iptables -F; iptables -t nat -F; iptables -X"},
	{"kube-proxy's table", "nft delete table ip kube-proxy"},
	{"kube-proxy's rules", "nft flush table ip kube-proxy"},
	{"rules of one Service", `for c in $(nft list table ip kube-proxy | awk '$1 == "chain" && /default\/web\// { print $2 }'); do nft flush chain ip kube-proxy "$c"; done`},
	{"one Service", fmt.Sprintf("nft delete element ip kube-proxy service-nodeports '{ tcp . %d }'", nodePort)},
	{"host ports", "nft delete table ip cni_hostport"},
	{"masquerading", "nft delete table ip microk8s-pods"},
	{"route to Services", "ip route flush proto 109"}, // a host of the lab has no default route
	{"bridge down", "ip link set cni0 down"},
	{"bridge without its address", "ip addr flush dev cni0"},
	{"bridge with another address", "ip addr flush dev cni0; ip addr add 10.1.77.1/24 dev cni0"},
	{"bridge deleted", "ip link del cni0"},
	{"uplink down and up", "ip link set eth0 down; sleep 1; ip link set eth0 up"},
	{"a smaller MTU", "ip link set eth0 mtu 1400"},
	{"forwarding off", "sysctl -qw net.ipv4.ip_forward=0"},
}

// TestHeal does each of them to a node, and asks every way there is to a pod after each. It belongs to the long run; a
// sample is part of TestNode.
func TestHeal(t *testing.T) {
	longtest.Only(t)
	n := newNode(t, "other")
	n.run(t, "microk8s", "start")
	n.connect(t)
	n.waitReady(t)
	n.deployWeb(t)
	n.testHeal(t, "other", len(faults))
}

// testHeal does some of the faults to a node with the Deployment web; which, the seed says.
func (n *node) testHeal(t *testing.T, otherHost string, count int) {
	seed := uint64(1)
	if text := os.Getenv("MICROK8S_TEST_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("seed %d (MICROK8S_TEST_SEED)", seed)
	n.deployHostPort(t)
	order := rand.New(rand.NewPCG(seed, 0)).Perm(len(faults))
	for i := range order {
		if count == len(faults) {
			order[i] = i
		}
	}
	n.answers(t, otherHost) // before any fault
	for _, i := range order[:count] {
		if !t.Run(faults[i].name, func(t *testing.T) {
			n.run(t, "sh", "-c", faults[i].do)
			began := time.Now()
			n.answers(t, otherHost)
			t.Logf("everything answered again after %s", time.Since(began).Round(100*time.Millisecond))
		}) {
			t.Log(n.tryAll(t, "", "sh", "-c", "nft list ruleset | head -100; ip addr; ip route; tail -30 /var/snap/microk8s/common/var/log/kubelite.log"))
			return
		}
	}
	n.run(t, "ip", "link", "set", "eth0", "mtu", "1500")
	if err := n.client.CoreV1().Pods("default").Delete(context.WithoutCancel(t.Context()), "hostport", metav1.DeleteOptions{}); err != nil {
		t.Error(err)
	}
}

const hostPort = 8085

// deployHostPort starts a pod with a port of the host.
func (n *node) deployHostPort(t *testing.T) {
	t.Helper()
	_, err := n.client.CoreV1().Pods("default").Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "hostport"},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: new(int64),
			Containers: []corev1.Container{{
				Name: "web", Image: webImage, ImagePullPolicy: corev1.PullNever,
				Ports: []corev1.ContainerPort{{ContainerPort: 8080, HostPort: hostPort}},
			}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
}

// answers waits until every way to a pod, and from one, works.
func (n *node) answers(t *testing.T, otherHost string) {
	t.Helper()
	svc, err := n.client.CoreV1().Services("default").Get(t.Context(), "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	clusterIP := "http://" + svc.Spec.ClusterIP
	exec := func(args ...string) (string, error) {
		return n.tryAll(t, "", append([]string{"microk8s", "kubectl", "exec", "hostport", "--", "/web"}, args...)...)
	}
	other, err := n.lab.IP(otherHost)
	if err != nil {
		t.Fatal(err)
	}
	for _, way := range []struct {
		name string
		ask  func() error
	}{
		{"cluster IP from the node", func() error { _, err := n.httpGet(t, n.name, clusterIP); return err }},
		{"node port from another host", func() error {
			_, err := n.httpGet(t, otherHost, fmt.Sprintf("http://%s:%d", n.ip(t), nodePort))
			return err
		}},
		{"host port from another host", func() error {
			_, err := n.httpGet(t, otherHost, fmt.Sprintf("http://%s:%d", n.ip(t), hostPort))
			return err
		}},
		{"cluster IP from a pod", func() error { _, err := exec("wget", clusterIP); return err }},
		{"DNS from a pod", func() error { _, err := exec("lookup", "web.default.svc.cluster.local"); return err }},
		{"another host from a pod", func() error {
			// Nothing listens there, and without masquerading not even that would come back.
			out, err := exec("wget", "http://"+other+":9", "2")
			if err == nil || strings.Contains(out, "refused") {
				return nil
			}
			return fmt.Errorf("%w: %s", err, out)
		}},
	} {
		eventually(t, time.Minute, func() error {
			if err := way.ask(); err != nil {
				return fmt.Errorf("%s: %w", way.name, err)
			}
			return nil
		})
	}
}
