package cluster

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"microk8s/internal/longtest"
)

// TestBGP has a router that speaks BGP by GoBGP, and Services whose addresses two nodes announce to it: which ways it has
// follows the nodes and the pods.
func TestBGP(t *testing.T) {
	longtest.Only(t)
	for _, program := range []string{"gobgp", "gobgpd"} {
		if _, err := os.Stat(filepath.Join(build, "peers", program)); err != nil {
			t.Fatalf("%v; build it with: make build/peers/gobgp.stamp", err)
		}
	}
	c := newCluster(t, "n1", "w1", "router")
	step, last := steps(t), t.Cleanup
	step("two nodes", func(t *testing.T) {
		c.start(t, "n1")
		c.join(t, "n1", "w1", "--worker")
		c.waitReady(t, "n1", "w1")
		for _, h := range []string{"n1", "w1"} {
			c.loadWebImage(t, h)
		}
	})
	step("a router", func(t *testing.T) {
		for _, program := range []string{"gobgp", "gobgpd"} {
			data, err := os.ReadFile(filepath.Join(build, "peers", program))
			if err == nil {
				err = os.WriteFile(filepath.Join(c.lab.Root("router"), "opt", program), data, 0o755)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		config := fmt.Sprintf("[global.config]\nas = 64512\nrouter-id = %q\n", c.ip(t, "router"))
		for _, h := range []string{"n1", "w1"} {
			config += fmt.Sprintf("[[neighbors]]\n[neighbors.config]\nneighbor-address = %q\npeer-as = 64513\n[neighbors.timers.config]\nhold-time = 9\nkeepalive-interval = 3\n", c.ip(t, h))
		}
		if err := os.WriteFile(filepath.Join(c.lab.Root("router"), "etc/gobgpd.toml"), []byte(config), 0o644); err != nil {
			t.Fatal(err)
		}
		c.spawn(t, last, "router", "gobgpd", "/opt/gobgpd", "-f", "/etc/gobgpd.toml", "--api-hosts=127.0.0.1:50051")
	})
	const pool = "198.51.100.16-198.51.100.31" // of no network of the hosts
	step("announcements", func(t *testing.T) {
		path := c.packOf(t, "n1", "metallb")
		c.run(t, "n1", "microk8s", "addons", "import", path)
		c.run(t, "n1", "microk8s", "enable", "metallb", pool, "--bgp")
		objects := fmt.Sprintf(`apiVersion: metallb.io/v1beta2
kind: BGPPeer
metadata: {name: router, namespace: metallb-system}
spec: {myASN: 64513, peerASN: 64512, peerAddress: %s, holdTime: 9s}
---
apiVersion: metallb.io/v1beta1
kind: BGPAdvertisement
metadata: {name: all, namespace: metallb-system}
`, c.ip(t, "router"))
		if err := os.WriteFile(filepath.Join(c.lab.Root("n1"), "root/bgp.yaml"), []byte(objects), 0o644); err != nil {
			t.Fatal(err)
		}
		c.run(t, "n1", "microk8s", "kubectl", "apply", "-f", "/root/bgp.yaml")
	})
	var everywhere, local string
	step("an address is announced by all nodes, and one of local pods by the node of a pod", func(t *testing.T) {
		c.startPod(t, "web-w1", "w1", webImage, corev1.PullNever, "")
		c.run(t, "n1", "microk8s", "kubectl", "label", "pod", "web-w1", "lb=web")
		everywhere = c.balanced(t, "everywhere", corev1.ServiceExternalTrafficPolicyCluster)
		local = c.balanced(t, "local", corev1.ServiceExternalTrafficPolicyLocal)
		c.wantWaysTo(t, everywhere, "n1", "w1")
		c.wantWaysTo(t, local, "w1")
		// Its client's address stays.
		eventually(t, time.Minute, func() error {
			out, err := c.httpGet("router", "http://"+local+"/client")
			if err == nil && !strings.HasPrefix(out, c.ip(t, "router")+":") {
				err = fmt.Errorf("the pod sees %q, want the router", out)
			}
			return err
		})
	})
	step("a node dies", func(t *testing.T) {
		if err := c.lab.Kill(t.Context(), "w1"); err != nil {
			t.Fatal(err)
		}
		died := time.Now()
		c.wantWaysTo(t, everywhere, "n1")
		t.Logf("the router has dropped the ways by a dead node after %s, with a hold time of 9 s", time.Since(died).Round(100*time.Millisecond))
		c.wantWaysTo(t, local)
		if err := c.lab.Start(t.Context(), "w1"); err != nil {
			t.Fatal(err)
		}
		c.wantWaysTo(t, everywhere, "n1", "w1")
		c.wantWaysTo(t, local, "w1")
	})
	step("without the addon nothing is announced", func(t *testing.T) {
		c.run(t, "n1", "microk8s", "disable", "metallb")
		c.wantWaysTo(t, everywhere)
	})
}

// balanced makes a Service of type LoadBalancer for the pods with label lb=web, and returns its address.
func (c *cluster) balanced(t *testing.T, name string, policy corev1.ServiceExternalTrafficPolicy) (address string) {
	t.Helper()
	services := c.client(t, "n1").CoreV1().Services("default")
	_, err := services.Create(t.Context(), &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.ServiceSpec{
		Type: corev1.ServiceTypeLoadBalancer, Selector: map[string]string{"lb": "web"}, ExternalTrafficPolicy: policy,
		Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(8080)}},
	}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, func() error {
		s, err := services.Get(t.Context(), name, metav1.GetOptions{})
		if err == nil && len(s.Status.LoadBalancer.Ingress) == 0 {
			err = fmt.Errorf("%s has no address yet", name)
		}
		if err == nil {
			address = s.Status.LoadBalancer.Ingress[0].IP
		}
		return err
	})
	return address
}

// wantWaysTo waits until the router was told of an address by these nodes and no others, gives the ways to its kernel, and asks.
// GoBGP has no routes of the kernel's without Zebra: the test plays that part.
func (c *cluster) wantWaysTo(t *testing.T, address string, nodes ...string) {
	t.Helper()
	var want []string
	for _, n := range nodes {
		want = append(want, c.ip(t, n))
	}
	slices.Sort(want)
	eventually(t, 2*time.Minute, func() error {
		r := c.try(t, "router", "/opt/gobgp", "-j", "global", "rib", address+"/32")
		var paths []struct {
			Attrs []struct{ NextHop string }
		}
		if r.code == 0 && strings.HasPrefix(strings.TrimSpace(r.out), "[") {
			if err := json.Unmarshal([]byte(r.out), &paths); err != nil {
				return fmt.Errorf("%w: %s", err, r)
			}
		}
		var got []string
		for _, p := range paths {
			for _, a := range p.Attrs {
				if a.NextHop != "" {
					got = append(got, a.NextHop)
				}
			}
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			return fmt.Errorf("the router has the ways %v to %s, want %v: %s", got, address, want, r)
		}
		return nil
	})
	if len(nodes) == 0 {
		return
	}
	route := []string{"ip", "route", "replace", address + "/32"}
	for _, w := range want {
		route = append(route, "nexthop", "via", w)
	}
	c.run(t, "router", route...)
	eventually(t, 2*time.Minute, func() error { // a pod of a dead node counts until the node is not ready
		_, err := c.httpGet("router", "http://"+address+"/")
		return err
	})
}
