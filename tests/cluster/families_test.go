package cluster

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"

	"microk8s/internal/longtest"
	"microk8s/tests/lab"
)

// launch puts a launch configuration where the first start of a host takes it from.
func (c *cluster) launch(t *testing.T, host, text string) {
	t.Helper()
	if err := os.WriteFile(c.lab.Root(host)+"/var/snap/microk8s/common/.microk8s.yaml", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// bothFamilies adds IPv6 to what a cluster has anyway.
const bothFamilies = "version: 0.2.0\nextraCNIEnv: {IPv6_SUPPORT: true}\n"

// internalIPs are the addresses by which the cluster knows a node.
func (c *cluster) internalIPs(t *testing.T, at, name string) (out []string) {
	t.Helper()
	n, err := c.node(t, at, name)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range n.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			out = append(out, a.Address)
		}
	}
	return out
}

// bits is the range of one address.
func bits(address string) string {
	return netip.PrefixFrom(netip.MustParseAddr(address), netip.MustParseAddr(address).BitLen()).String()
}

// testFamilies has pods, Services, node ports, host ports and names of each family of the cluster reached from pods and from
// hosts, on the same node and across. All hosts have the test's image.
func (c *cluster) testFamilies(t *testing.T, control string, hosts []string, families int) {
	t.Helper()
	k, labels := c.client(t, control), map[string]string{"app": "families"}
	_, err := k.AppsV1().DaemonSets("default").Create(t.Context(), &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Name: "families"},
		Spec: appsv1.DaemonSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec: corev1.PodSpec{
					TerminationGracePeriodSeconds: new(int64),
					Containers:                    []corev1.Container{{Name: "web", Image: webImage, ImagePullPolicy: corev1.PullNever, Ports: []corev1.ContainerPort{{ContainerPort: 8080, HostPort: 8089}}}},
				},
			},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	svc, err := k.CoreV1().Services("default").Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "families"},
		Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeNodePort, IPFamilyPolicy: ptr.To(corev1.IPFamilyPolicyPreferDualStack), Selector: labels,
			Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(8080), NodePort: 30089}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got := len(svc.Spec.ClusterIPs); got != families {
		t.Fatalf("the Service has the addresses %v, want %d", svc.Spec.ClusterIPs, families)
	}
	pods := map[string]corev1.Pod{} // by node
	eventually(t, 2*time.Minute, func() error {
		list, err := k.CoreV1().Pods("default").List(t.Context(), metav1.ListOptions{LabelSelector: "app=families"})
		if err != nil {
			return err
		}
		for _, p := range list.Items {
			if podReady(&p) {
				pods[p.Spec.NodeName] = p
			}
		}
		if len(pods) != len(hosts) {
			return fmt.Errorf("%d of %d pods are ready", len(pods), len(hosts))
		}
		return nil
	})
	var fromPods, fromHosts []string // URLs
	add := func(host, port string, everywhere bool) {
		url := "http://" + net.JoinHostPort(host, port) + "/"
		fromHosts = append(fromHosts, url)
		if everywhere {
			fromPods = append(fromPods, url)
		}
	}
	for _, p := range pods {
		if got := len(p.Status.PodIPs); got != families {
			t.Fatalf("pod %s has the addresses %v, want %d", p.Name, p.Status.PodIPs, families)
		}
		for _, a := range p.Status.PodIPs {
			add(a.IP, "8080", true)
		}
	}
	for _, a := range svc.Spec.ClusterIPs {
		add(a, "80", true)
	}
	for _, h := range hosts {
		own := c.internalIPs(t, control, h)
		if len(own) != families {
			t.Fatalf("node %s has the addresses %v, want %d", h, own, families)
		}
		for _, a := range own {
			add(a, "30089", false)
			add(a, "8089", false)
		}
	}
	for _, h := range hosts {
		for _, url := range fromHosts {
			eventually(t, time.Minute, func() error {
				if _, err := c.httpGet(h, url); err != nil {
					return fmt.Errorf("from the host %s: %w", h, err)
				}
				return nil
			})
		}
		exec := func(args ...string) result {
			return c.try(t, control, append([]string{"microk8s", "kubectl", "exec", pods[h].Name, "--", "/web"}, args...)...)
		}
		for _, url := range fromPods {
			eventually(t, time.Minute, func() error {
				if r := exec("wget", url); r.code != 0 {
					return fmt.Errorf("from the pod on %s: %s: %s", h, url, r)
				}
				return nil
			})
		}
		eventually(t, time.Minute, func() error {
			r := exec("lookup", "families")
			for _, a := range svc.Spec.ClusterIPs {
				if !slices.Contains(strings.Fields(r.out), a) {
					return fmt.Errorf("the pod on %s finds %s, want %s", h, r, a)
				}
			}
			return nil
		})
		c.wantWays(t, h)
	}
	if err := k.AppsV1().DaemonSets("default").Delete(t.Context(), "families", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := k.CoreV1().Services("default").Delete(t.Context(), "families", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
}

// TestIPv6 has a cluster on hosts without IPv4: three members of the control plane and a worker, joined by the printed lines, with
// what each family has to do, policies, addresses of load balancers and of the API, a loss of the leader, and shares for more nodes than the first range had.
func TestIPv6(t *testing.T) {
	longtest.Only(t)
	c := newClusterOn(t, lab.Options{IPv6: lab.OnlyIPv6}, "n1", "n2", "n3", "w1", "out")
	controlPlane, hosts := []string{"n1", "n2", "n3"}, []string{"n1", "n2", "n3", "w1"}
	step := steps(t)
	step("IPv4 is refused, and IPv6 chosen", func(t *testing.T) {
		r := c.try(t, "n1", "microk8s", "start")
		if r.code != 1 || !strings.Contains(r.err, "this host has no IPv4 address") {
			t.Fatalf("start: %s", r)
		}
		c.run(t, "n1", "sh", "-ec", strings.Split(r.err[strings.Index(r.err, "  sed"):], "\n")[0]+"; echo IPv6_CLUSTER_CIDR=fd01::/120 >>/var/snap/microk8s/current/args/cni-env")
		c.start(t, "n1")
	})
	step("more shares than the first range had", func(t *testing.T) {
		k := c.client(t, "n1")
		before, err := c.node(t, "n1", "n1")
		if err != nil || before.Spec.PodCIDR != "fd01::/120" {
			t.Fatalf("n1 has the share %q (%v)", before.Spec.PodCIDR, err)
		}
		if _, err := k.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "second"}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, time.Minute, func() error {
			list, err := k.CoreV1().Events("").List(t.Context(), metav1.ListOptions{FieldSelector: "reason=CIDRNotAvailable"})
			if err == nil && len(list.Items) == 0 {
				err = fmt.Errorf("no event says that the range is used up")
			}
			return err
		})
		c.run(t, "n1", "sh", "-ec", "sed -i 's|^IPv6_CLUSTER_CIDR=.*|IPv6_CLUSTER_CIDR=fd01::/112|' /var/snap/microk8s/current/args/cni-env; microk8s stop; microk8s start")
		eventually(t, 2*time.Minute, func() error {
			n, err := c.node(t, "n1", "second")
			if err == nil && n.Spec.PodCIDR == "" {
				err = fmt.Errorf("the second node has no share")
			}
			return err
		})
		if after, err := c.node(t, "n1", "n1"); err != nil || after.Spec.PodCIDR != before.Spec.PodCIDR {
			t.Errorf("n1 has the share %q (%v), before %q", after.Spec.PodCIDR, err, before.Spec.PodCIDR)
		}
		if out := c.status(t, "n1").out; strings.Contains(out, "cni-env") {
			t.Errorf("status: %s", out)
		}
		if err := c.client(t, "n1").CoreV1().Nodes().Delete(t.Context(), "second", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	})
	step("join", func(t *testing.T) {
		c.join(t, "n1", "n2")
		c.join(t, "n2", "n3")
		c.join(t, "n3", "w1", "--worker")
		for _, h := range hosts {
			c.waitReady(t, "n1", h)
			c.loadWebImage(t, h)
		}
		c.wantHA(t, "n2", "yes", 3)
	})
	step("pods, Services and ports", func(t *testing.T) { c.testFamilies(t, "n1", hosts, 1) })
	step("ingress", func(t *testing.T) {
		c.run(t, "n1", "microk8s", "enable", "ingress")
		for _, h := range hosts {
			eventually(t, time.Minute, func() error {
				if out := c.run(t, "w1", "curl", "-sS", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}", "http://["+c.ip(t, h)+"]/"); out != "404" {
					return fmt.Errorf("the controller on %s answers %s, want 404: there is no Ingress", h, out)
				}
				return nil
			})
		}
	})
	step("policies", func(t *testing.T) {
		for _, h := range []string{"n1", "w1"} {
			c.startPod(t, "asker-"+h, h, webImage, corev1.PullNever, "")
			c.waitPod(t, "asker-"+h)
		}
		c.testPolicies(t, "n1", "w1")
	})
	step("the tunnel is closed", func(t *testing.T) {
		c.run(t, "w1", "sh", "-ec", "nft add table inet t; nft 'add chain inet t i { type filter hook prerouting priority -300; }'; nft add rule inet t i udp dport 4789 drop")
		eventually(t, time.Minute, func() error {
			if problems := c.ways(t, "n1"); !slices.ContainsFunc(problems, func(p string) bool {
				return strings.HasPrefix(p, "one-way: ") /* w1 is heard */ && strings.Contains(p, c.ip(t, "w1"))
			}) {
				return fmt.Errorf("found %q", problems)
			}
			return nil
		})
		c.run(t, "w1", "nft", "delete", "table", "inet", "t")
		c.wantWays(t, "n1")
	})
	step("addresses of load balancers", func(t *testing.T) {
		c.testPack(t, "n1")
		c.run(t, "n1", "microk8s", "kubectl", "label", "pod", "asker-n1", "asker-w1", "lb=web")
		c.testBalancer(t, "n1", "w1", "out")
	})
	step("an address for the API", func(t *testing.T) {
		c.testAPIAddress(t, "out")
		c.testAPIAddressMoves(t, "out", controlPlane...)
	})
	step("the leader is lost", func(t *testing.T) {
		leader := c.leader(t, controlPlane)
		if err := c.lab.Kill(t.Context(), leader); err != nil {
			t.Fatal(err)
		}
		other := controlPlane[(slices.Index(controlPlane, leader)+1)%3]
		eventually(t, 2*time.Minute, func() error {
			k, err := c.tryClient(other)
			if err == nil {
				_, err = k.CoreV1().ConfigMaps("default").Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{GenerateName: "after-"}}, metav1.CreateOptions{})
			}
			return err
		})
		eventually(t, 2*time.Minute, func() error { // the worker's proxy has found another API server
			if r := c.try(t, "w1", "microk8s", "network", "check", "-o", "json"); !strings.Contains(r.out, `"kind": "NetworkCheck"`) {
				return fmt.Errorf("the worker reaches no API server: %s", r)
			}
			return nil
		})
		if err := c.lab.Start(t.Context(), leader); err != nil {
			t.Fatal(err)
		}
		c.waitReady(t, other, leader)
	})
}
