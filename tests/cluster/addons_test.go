package cluster

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/tests/lab"
	"microk8s/tests/lab/labtest"
)

// TestAddonsCluster uses addons on a control-plane node and a worker, which was down when most
// of them were enabled.
func TestAddonsCluster(t *testing.T) {
	c := newClusterOn(t, lab.Options{DefaultRoute: true, IPv6: lab.DualIPv6}, "n1", "w1")
	step := steps(t)
	c.launch(t, "n1", bothFamilies)
	if err := c.lab.Up(t.Context(), "resolver", lab.Options{}); err != nil {
		t.Fatal(err)
	}
	const outsideName, outsideAddr = "printer.home.arpa", "192.0.2.77" // known to that host only
	resolver := labtest.Resolver(t, c.lab, "resolver", filepath.Join(build, "components/bin/coredns"), outsideName, outsideAddr)
	c.start(t, "n1")
	// Which the kubelets of nodes that join later tell their pods, too.
	const dnsIP, domain, otherDomain = "10.152.183.20", "corp.test", "other.test"
	c.run(t, "n1", "microk8s", "disable", "dns")
	c.run(t, "n1", "microk8s", "enable", "--no-wait", "dns", resolver, dnsIP, domain)
	// The controller is on n1 then, and its certificate not on the worker.
	step("a pack, before there is a second node", func(t *testing.T) { c.testPack(t, "n1") })
	c.join(t, "n1", "w1", "--worker")
	c.waitReady(t, "n1", "w1")

	step("a second DNS server, on the second node", func(t *testing.T) {
		eventually(t, 2*time.Minute, func() error {
			pods, err := c.client(t, "n1").CoreV1().Pods("kube-system").List(t.Context(), metav1.ListOptions{LabelSelector: "k8s-app=kube-dns"})
			if err != nil {
				return err
			}
			at := map[string]bool{}
			for _, p := range pods.Items {
				if p.DeletionTimestamp == nil && podReady(&p) {
					at[p.Spec.NodeName] = true
				}
			}
			if len(at) != 2 {
				return fmt.Errorf("DNS servers that are ready are on %v", at)
			}
			return nil
		})
	})
	step("images on all nodes", func(t *testing.T) {
		c.copyWebImage(t, "n1", "/web.tar")
		out := c.run(t, "n1", "microk8s", "images", "import", "/web.tar")
		for _, h := range []string{"n1", "w1"} {
			if !strings.Contains(out, "Pushing OCI images to "+c.ip(t, h)+":25000\n") {
				t.Errorf("%s is missing:\n%s", h, out)
			}
			if out := c.run(t, h, "microk8s", "ctr", "images", "ls", "-q"); !strings.Contains(out, webImage) {
				t.Errorf("%s has not got the image:\n%s", h, out)
			}
		}
	})
	step("names resolve on both", func(t *testing.T) {
		for _, h := range []string{"n1", "w1"} {
			c.startPod(t, "asker-"+h, h, webImage, corev1.PullNever, "")
			c.waitPod(t, "asker-"+h)
			out := c.run(t, "n1", "microk8s", "kubectl", "exec", "asker-"+h, "--", "/web", "cat", "/etc/resolv.conf")
			if !strings.Contains(out, "nameserver "+dnsIP+"\n") || !strings.Contains(out, " svc."+domain+" ") {
				t.Errorf("a pod on %s has the resolv.conf\n%s", h, out)
			}
			for name, want := range map[string]string{"kubernetes.default.svc." + domain: "10.152.183.1", outsideName: outsideAddr} {
				eventually(t, 2*time.Minute, func() error {
					r := c.try(t, "n1", "microk8s", "kubectl", "exec", "asker-"+h, "--", "/web", "lookup", name)
					if r.code != 0 || strings.TrimSpace(r.out) != want {
						return fmt.Errorf("%s on %s: %s", name, h, r)
					}
					return nil
				})
			}
		}
	})
	step("both families", func(t *testing.T) { c.testFamilies(t, "n1", []string{"n1", "w1"}, 2) })
	step("network policies", func(t *testing.T) { c.testPolicies(t, "n1", "w1") })
	var moves string // address of a Service for which w1 answers
	step("addresses of load balancers, also by the node that joined after the pack", func(t *testing.T) {
		c.run(t, "n1", "microk8s", "kubectl", "label", "pod", "asker-n1", "asker-w1", "lb=web")
		eventually(t, 3*time.Minute, func() error {
			out := c.run(t, "n1", "microk8s", "kubectl", "get", "daemonset", "-n", "metallb-system", "speaker", "-o", "jsonpath={.status.numberAvailable}")
			if strings.TrimSpace(out) != "2" {
				return fmt.Errorf("speakers on %s of 2 nodes", out)
			}
			return nil
		})
		moves = c.testBalancer(t, "n1", "w1", "resolver")
	})
	step("enable while a node is down", func(t *testing.T) {
		if err := c.lab.Kill(t.Context(), "w1"); err != nil {
			t.Fatal(err)
		}
		c.testMoves(t, moves, "resolver")
		eventually(t, 5*time.Minute, func() error {
			n, err := c.node(t, "n1", "w1")
			if err == nil && isReady(n) {
				err = errors.New("w1 still counts as ready")
			}
			return err
		})
		r := c.try(t, "n1", "microk8s", "enable", "registry")
		if r.code != 0 || !strings.Contains(r.err, "nodes that are not ready get it once they are: w1") {
			t.Errorf("enable registry: %s", r)
		}
		if r := c.try(t, "n1", "microk8s", "images", "import", "/web.tar"); r.code != 1 || !strings.Contains(r.err, "1 of 2 nodes have not imported the images") {
			t.Errorf("images import: %s", r)
		}
		// Its kubelet, too, is told when it is back.
		r = c.try(t, "n1", "microk8s", "enable", "--no-wait", "dns", resolver, dnsIP, otherDomain)
		if r.code != 0 || !strings.Contains(r.err, "Failed to reach node w1: ") || !strings.Contains(r.err, "The change will be applied when the node is reachable again.") {
			t.Errorf("enable dns: %s", r)
		}
		if err := c.lab.Start(t.Context(), "w1"); err != nil {
			t.Fatal(err)
		}
		c.waitReady(t, "n1", "w1")
		eventually(t, 2*time.Minute, func() error {
			out := c.run(t, "w1", "cat", "/var/snap/microk8s/current/args/kubelet")
			if !strings.Contains(out, "--cluster-domain="+otherDomain+"\n") {
				return fmt.Errorf("w1 has the arguments\n%s", out)
			}
			return nil
		})
		c.waitReady(t, "n1", "w1")
		eventually(t, time.Minute, func() error { // a kubelet that was just restarted
			c.try(t, "n1", "microk8s", "kubectl", "delete", "pod", "asker-w1", "--force", "--grace-period=0")
			c.startPod(t, "asker-w1", "w1", webImage, corev1.PullNever, "")
			c.waitPod(t, "asker-w1")
			if out := c.run(t, "n1", "microk8s", "kubectl", "exec", "asker-w1", "--", "/web", "cat", "/etc/resolv.conf"); !strings.Contains(out, " svc."+otherDomain+" ") {
				return fmt.Errorf("a pod on w1 has the resolv.conf\n%s", out)
			}
			return nil
		})
	})
	const name = "localhost:32000/team/app:1"
	step("a pushed image runs on the other node", func(t *testing.T) {
		c.run(t, "n1", "microk8s", "ctr", "images", "tag", webImage, name)
		eventually(t, 2*time.Minute, func() error {
			if r := c.try(t, "n1", "microk8s", "ctr", "images", "push", "--plain-http", name); r.code != 0 {
				return fmt.Errorf("push: %s", r)
			}
			return nil
		})
		c.startPod(t, "app", "w1", name, corev1.PullAlways, "")
		c.waitPod(t, "app")
	})
	step("a volume on the other node", func(t *testing.T) {
		c.runIn(t, "n1", claim, "microk8s", "kubectl", "apply", "-f", "-")
		// By the name of the registry: a kubelet that has pulled an image no longer takes another
		// name of it for one that was brought along.
		c.startPod(t, "writer", "w1", name, corev1.PullIfNotPresent, "data")
		c.waitPod(t, "writer")
		c.run(t, "n1", "microk8s", "kubectl", "exec", "writer", "--", "/web", "write", "/data/file", "kept")
		out := c.run(t, "w1", "sh", "-c", "cat /var/snap/microk8s/common/default-storage/default-data-*/file")
		if strings.TrimSpace(out) != "kept" {
			t.Errorf("w1 has %q", out)
		}
	})
	step("ingress through both nodes", func(t *testing.T) {
		c.run(t, "n1", "microk8s", "kubectl", "expose", "pod", "app", "--port=80", "--target-port=8080", "--selector=app=app")
		c.run(t, "n1", "microk8s", "kubectl", "label", "pod", "app", "app=app")
		c.runIn(t, "n1", everything, "microk8s", "kubectl", "apply", "-f", "-")
		c.run(t, "n1", "microk8s", "enable", "ingress")
		for _, h := range []string{"n1", "w1"} {
			eventually(t, time.Minute, func() error {
				out, err := c.httpGet("n1", "http://"+c.ip(t, h)+"/")
				if err == nil && out != "app" {
					err = fmt.Errorf("%s answers %q", h, out)
				}
				return err
			})
		}
	})
	step("root on the worker, with what its pods have", func(t *testing.T) {
		c.run(t, "n1", "microk8s", "enable", "metrics-server")
		c.run(t, "n1", "microk8s", "enable", "host-access")
		c.testWorkerRoot(t, "n1", "w1", true)
	})
	step("the data of another node stays", func(t *testing.T) {
		out := c.run(t, "n1", "microk8s", "disable", "hostpath-storage:destroy-storage")
		if !strings.Contains(out, "Data of volumes on other nodes is kept: w1 (") {
			t.Errorf("disable printed %q", out)
		}
		c.run(t, "w1", "sh", "-c", "cat /var/snap/microk8s/common/default-storage/default-data-*/file")
	})
}

const claim = `
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data}
spec:
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: 1Mi}}
`

const everything = `
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: app}
spec:
  defaultBackend: {service: {name: app, port: {number: 80}}}
`

// startPod runs a pod of one container on a node, with a claim at /data unless it is "".
func (c *cluster) startPod(t *testing.T, name, host, image string, pull corev1.PullPolicy, claim string) {
	t.Helper()
	grace := int64(1)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			NodeSelector:                  map[string]string{corev1.LabelHostname: host},
			TerminationGracePeriodSeconds: &grace,
			Containers:                    []corev1.Container{{Name: "c", Image: image, ImagePullPolicy: pull}},
		},
	}
	if claim != "" {
		pod.Spec.Volumes = []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim},
		}}}
		pod.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "data", MountPath: "/data"}}
	}
	eventually(t, time.Minute, func() error { // the service account may not be there yet
		_, err := c.client(t, "n1").CoreV1().Pods("default").Create(t.Context(), pod, metav1.CreateOptions{})
		return err
	})
}

func (c *cluster) waitPod(t *testing.T, name string) {
	t.Helper()
	eventually(t, 3*time.Minute, func() error {
		p, err := c.client(t, "n1").CoreV1().Pods("default").Get(t.Context(), name, metav1.GetOptions{})
		if err == nil && !podReady(p) {
			err = fmt.Errorf("pod %s is %s: %+v", name, p.Status.Phase, p.Status.ContainerStatuses)
		}
		return err
	})
}

func podReady(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// copyWebImage puts the archive of the test image into a host.
func (c *cluster) copyWebImage(t *testing.T, host, path string) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(build, "test-images/web.tar"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(c.lab.Root(host), path), data, 0o644); err != nil {
		t.Fatal(err)
	}
}

// runIn is run with a standard input.
func (c *cluster) runIn(t *testing.T, host, stdin string, args ...string) {
	t.Helper()
	var out bytes.Buffer
	if err := c.lab.Exec(t.Context(), host, lab.Command{Args: args, Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &out}); err != nil {
		t.Fatalf("%s: %s: %v\n%s", host, strings.Join(args, " "), err, &out)
	}
}
