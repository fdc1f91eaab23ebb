package cluster

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/longtest"
)

// TestNetworks has two nodes on two networks, joined over the second: the first node changes to it. Then the
// ways between them are closed and opened, the worker gets another address, and another pod subnet.
func TestNetworks(t *testing.T) {
	longtest.Only(t)
	c := newCluster(t, "n1", "w1")
	hosts := []string{"n1", "w1"}
	step := steps(t)
	step("two networks", func(t *testing.T) {
		c.start(t, "n1")
		for i, h := range hosts {
			c.run(t, h, "ip", "addr", "add", fmt.Sprintf("192.168.50.%d/24", i+1), "dev", "eth0")
		}
	})
	step("the first node is known by the address at which it is joined", func(t *testing.T) {
		c.run(t, "w1", append(c.lineTo(t, "192.168.50.1:"+c.port, "n1"), "--worker", "--node-ip", "192.168.50.2")...)
		c.waitReady(t, "n1", "w1")
		c.wantInternalIP(t, "n1", "192.168.50.1")
		c.wantInternalIP(t, "w1", "192.168.50.2")
		for _, h := range hosts {
			if out := c.run(t, h, "ip", "-d", "link", "show", "flannel.1"); !strings.Contains(out, "local 192.168.50.") {
				t.Errorf("%s: the tunnel is on the other network: %s", h, out)
			}
		}
		eventually(t, time.Minute, func() error {
			s, err := c.client(t, "n1").DiscoveryV1().EndpointSlices("default").Get(t.Context(), "kubernetes", metav1.GetOptions{})
			if err == nil && (len(s.Endpoints) != 1 || s.Endpoints[0].Addresses[0] != "192.168.50.1") {
				err = fmt.Errorf("the API server is at %v", s.Endpoints)
			}
			return err
		})
	})
	step("network check", func(t *testing.T) {
		c.wantWays(t, "n1")
		c.wantWays(t, "w1")
		for _, fault := range []struct{ name, host, rule, code, says string }{
			{"UDP 4789 closed", "w1", "udp dport 4789 drop", "one-way", "UDP port 4789 is closed"},
			{"a smaller MTU", "w1", "udp dport 4789 meta length gt 1380 drop", "mtu", "the MTU is smaller on the way"},
			{"the other kubelet closed", "w1", "tcp dport 10250 ip saddr 192.168.50.1 drop", "port-there", "TCP port 10250 of node w1"},
			{"this API server closed", "n1", "tcp dport 16443 ip saddr 192.168.50.2 drop", "port-here", "TCP port 16443 of this node"},
		} {
			t.Run(fault.name, func(t *testing.T) {
				c.run(t, fault.host, "sh", "-ec", "nft add table inet t; nft 'add chain inet t i { type filter hook prerouting priority -300; }'; nft add rule inet t i "+fault.rule)
				defer c.run(t, fault.host, "nft", "delete", "table", "inet", "t")
				eventually(t, time.Minute, func() error {
					if problems := c.ways(t, "n1"); !slices.ContainsFunc(problems, func(p string) bool { return strings.HasPrefix(p, fault.code+": ") && strings.Contains(p, fault.says) }) {
						return fmt.Errorf("found %q, want %s: %s", problems, fault.code, fault.says)
					}
					return nil
				})
				if fault.code == "one-way" {
					eventually(t, 3*time.Minute, func() error {
						if r := c.status(t, "n1"); !strings.Contains(r.out, fault.says) {
							return fmt.Errorf("status does not say it: %s", r)
						}
						return nil
					})
				}
			})
		}
		c.wantWays(t, "n1")
	})
	step("a worker with another address", func(t *testing.T) {
		c.run(t, "w1", "sh", "-ec", "ip addr del 192.168.50.2/24 dev eth0; ip addr add 192.168.50.22/24 dev eth0; ip route del default; ip route add default via 192.168.50.1 dev eth0")
		c.wantInternalIP(t, "w1", "192.168.50.22")
		c.waitReady(t, "n1", "w1")
		c.testLogs(t, "w1")
		c.wantWays(t, "n1")
	})
	step("a node with another pod subnet", func(t *testing.T) {
		before, err := c.node(t, "n1", "w1")
		if err != nil {
			t.Fatal(err)
		}
		c.run(t, "w1", "microk8s", "stop")
		if err := c.client(t, "n1").CoreV1().Nodes().Delete(t.Context(), "w1", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		// A Node of no machine takes the range that was given back.
		taker := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "taker"}}
		taker.Spec.PodCIDR, taker.Spec.PodCIDRs = before.Spec.PodCIDR, before.Spec.PodCIDRs
		if _, err := c.client(t, "n1").CoreV1().Nodes().Create(t.Context(), taker, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		c.run(t, "w1", "microk8s", "start")
		eventually(t, 3*time.Minute, func() error {
			n, err := c.node(t, "n1", "w1")
			if err == nil && (n.Spec.PodCIDR == "" || n.Spec.PodCIDR == before.Spec.PodCIDR || !isReady(n)) {
				err = fmt.Errorf("w1 has the pod subnet %q, Ready %v", n.Spec.PodCIDR, isReady(n))
			}
			return err
		})
		c.testLogs(t, "w1") // a pod starts
	})
}

// wantInternalIP waits until a node is known by an address.
func (c *cluster) wantInternalIP(t *testing.T, name, want string) {
	t.Helper()
	eventually(t, 2*time.Minute, func() error {
		n, err := c.node(t, "n1", name)
		if err == nil && !slices.Contains(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: want}) {
			err = fmt.Errorf("%s has the addresses %v, want %s", name, n.Status.Addresses, want)
		}
		return err
	})
}

// ways are the problems that a network check finds on a node, as CODE: TEXT.
func (c *cluster) ways(t *testing.T, host string) (problems []string) {
	t.Helper()
	r := c.try(t, host, "microk8s", "network", "check", "-o", "json")
	var doc struct {
		Results []struct {
			Tunnel   bool
			Problems []struct{ Code, What, Do string }
		}
	}
	if err := json.Unmarshal([]byte(r.out), &doc); err != nil {
		return []string{fmt.Sprintf("no document: %s", r)}
	}
	for _, x := range doc.Results {
		for _, p := range x.Problems {
			problems = append(problems, p.Code+": "+p.What)
			if p.Do == "" {
				t.Errorf("no next step for: %s", p.What)
			}
		}
		if len(x.Problems) == 0 && !x.Tunnel {
			problems = append(problems, "neither a tunnel nor a problem")
		}
	}
	if want := min(len(problems), 1); r.code != want {
		t.Errorf("exit code %d with the problems %q", r.code, problems)
	}
	return problems
}

// wantWays waits until a check finds nothing.
func (c *cluster) wantWays(t *testing.T, host string) {
	t.Helper()
	eventually(t, 2*time.Minute, func() error {
		if problems := c.ways(t, host); len(problems) > 0 {
			return fmt.Errorf("%s: %q", host, problems)
		}
		return nil
	})
}

// testLogs starts a pod on a node and reads its log, which goes through the node's kubelet.
func (c *cluster) testLogs(t *testing.T, host string) {
	t.Helper()
	c.loadWebImage(t, host)
	name := fmt.Sprintf("logs-%d", time.Now().UnixNano())
	c.startPod(t, name, host, webImage, corev1.PullNever, "")
	c.waitPod(t, name)
	eventually(t, 2*time.Minute, func() error {
		if r := c.try(t, "n1", "microk8s", "kubectl", "logs", name); r.code != 0 {
			return fmt.Errorf("logs: %s", r)
		}
		return nil
	})
}
