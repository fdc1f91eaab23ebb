package cluster

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// packOf copies the pack of an addon into a host and returns its path there.
func (c *cluster) packOf(t *testing.T, host, addon string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(build, "packs/microk8s-addons-"+addon+"_*.tar"))
	if err != nil || len(found) != 1 {
		t.Fatalf("packs of %s: %v, %v; make addons builds it", addon, found, err)
	}
	data, err := os.ReadFile(found[0])
	if err != nil {
		t.Fatal(err)
	}
	path := "/" + filepath.Base(found[0])
	for name, data := range map[string][]byte{path: data, path + ".cut": data[:len(data)/2]} {
		if err := os.WriteFile(filepath.Join(c.lab.Root(host), name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// testPack imports the pack of metallb on a node that is alone, and enables it: what is wrong changes nothing.
func (c *cluster) testPack(t *testing.T, host string) {
	path := c.packOf(t, host, "metallb")
	pool := c.pool(t, host)
	wrong := func(want string, args ...string) {
		t.Helper()
		if r := c.try(t, host, append([]string{"microk8s"}, args...)...); r.code != 1 || !strings.Contains(r.err, want) {
			t.Errorf("%s: %s, want %q", strings.Join(args, " "), r, want)
		}
	}
	wrong(filepath.Base(path)+", which is not on this node", "enable", "metallb:"+pool)
	wrong("the file is cut off", "addons", "import", path+".cut")
	if out := c.run(t, host, "sh", "-c", "ls /var/snap/microk8s/common/packs 2>/dev/null || true"); strings.TrimSpace(out) != "" {
		t.Errorf("after a damaged pack there is %q", out)
	}
	if out := c.run(t, host, "microk8s", "addons", "import", path); !strings.Contains(out, "Imported microk8s.io/metallb:") {
		t.Errorf("addons import printed %q", out)
	}
	if out := c.run(t, host, "microk8s", "images", "list"); !strings.Contains(out, "microk8s.io/metallb:") {
		t.Errorf("the image is not there:\n%s", out)
	}
	wrong("which is the address of node "+host, "enable", "metallb:"+c.ip(t, host))
	if r := c.try(t, host, "microk8s", "kubectl", "get", "namespace", "metallb-system"); r.code == 0 {
		t.Error("a refused enable has made a namespace")
	}
	c.run(t, host, "microk8s", "enable", "metallb:"+pool)
}

// pool is a range of the hosts' network that nothing has.
func (c *cluster) pool(t *testing.T, host string) string {
	return c.neighbour(t, host, "200") + "-" + c.neighbour(t, host, "220")
}

// testBalancer makes Services of type LoadBalancer for the pods with label lb=web until one has its address on the node at,
// and asks from a host that is no node. It returns that Service's address.
func (c *cluster) testBalancer(t *testing.T, host, at, outside string) string {
	client := c.client(t, host)
	for i := range 16 {
		name := fmt.Sprintf("lb-%d", i)
		service := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeLoadBalancer, Selector: map[string]string{"lb": "web"},
			Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(8080)}},
		}}
		if _, err := client.CoreV1().Services("default").Create(t.Context(), service, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		address, holder := "", ""
		eventually(t, time.Minute, func() error {
			s, err := client.CoreV1().Services("default").Get(t.Context(), name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			if len(s.Status.LoadBalancer.Ingress) == 0 {
				return errors.New("it has no address yet")
			}
			address = s.Status.LoadBalancer.Ingress[0].IP
			holder = strings.TrimSpace(c.run(t, host, "microk8s", "kubectl", "get", "servicel2statuses", "-A",
				"-l", "metallb.io/service-name="+name, "-o", "jsonpath={.items[*].status.node}"))
			if holder == "" {
				return errors.New("nobody answers for it yet")
			}
			return nil
		})
		eventually(t, time.Minute, func() error {
			_, err := c.httpGet(outside, "http://"+net.JoinHostPort(address, "80")+"/")
			return err
		})
		if holder == at {
			return address
		}
	}
	t.Fatalf("none of the addresses is on %s", at)
	return ""
}

// testMoves waits until an address whose node has just died answers again, from another node, and prints after what time.
func (c *cluster) testMoves(t *testing.T, address, outside string) {
	died := time.Now()
	eventually(t, time.Minute, func() error {
		_, err := c.httpGet(outside, "http://"+net.JoinHostPort(address, "80")+"/")
		return err
	})
	t.Logf("the address %s of a dead node answers again after %s", address, time.Since(died).Round(10*time.Millisecond))
}
