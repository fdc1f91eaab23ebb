package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"microk8s/tests/lab"
	"microk8s/tests/lab/hoststate"
)

// build is where `make build` leaves its results, from this folder.
const build = "../../build"

// node is one lab host with the product started on it.
type node struct {
	lab    *lab.Lab
	name   string
	config *rest.Config
	client *kubernetes.Clientset
}

// TestNode is the life of one node, told in order; each part goes on from where the one before
// left the node.
func TestNode(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("real nodes are made of namespaces, which needs root")
	}
	if _, err := os.Stat(filepath.Join(build, "snap/bin/kubelite")); err != nil {
		t.Fatalf("%v; run `make build` first", err)
	}
	before := hoststate.Take(t, "node-test")

	l, err := lab.New(lab.Config{Instance: "node-test", Snap: filepath.Join(build, "snap")})
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.WithoutCancel(t.Context())
	if err := l.Down(ctx); err != nil { // of a run that was ended in the middle
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() && os.Getenv("KEEP") != "" {
			t.Logf("kept: build/bin/lab --instance %s ls", l.Instance())
			return
		}
		if err := l.Down(ctx); err != nil {
			t.Error(err)
		}
	})

	n := &node{lab: l, name: "n1"}
	for _, host := range []string{"n1", "other"} {
		if err := l.Up(t.Context(), host, lab.Options{}); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { n.keepLogs(t) })

	step := func(name string, f func(t *testing.T)) {
		t.Helper()
		if !t.Run(name, f) {
			t.FailNow() // what follows stands on this
		}
	}
	var untouched string
	step("start", func(t *testing.T) {
		untouched = n.traces(t)
		n.run(t, "microk8s", "start")
		n.connect(t)
		n.waitReady(t)
	})
	step("version", n.testVersion)
	step("status", n.testStatus)
	step("rights", n.testRights)
	step("network policies are warned about", n.testNetworkPolicyWarning)
	step("deployment", n.deployWeb)
	step("service", func(t *testing.T) { n.testService(t, "other") })
	step("exec, logs, port-forward", n.testExecLogsForward)
	step("host with FORWARD DROP", func(t *testing.T) { n.testForwardDrop(t, "other") })
	step("power loss", n.testPowerLoss)
	step("service after power loss", func(t *testing.T) { n.testService(t, "other") })
	step("stop and start", n.testStopStart)
	step("status while the API server is down", n.testStatusAPIDown)
	step("inspect", n.testInspect)
	step("reset", n.testReset)
	step("remove leaves nothing on the host", func(t *testing.T) {
		n.run(t, "/snap/microk8s/current/bin/microk8s", "hook", "remove")
		if diff := cmp.Diff(untouched, n.traces(t)); diff != "" {
			t.Errorf("the host is not as it was before the first start (-before +after):\n%s", diff)
		}
	})
	step("down leaves nothing", func(t *testing.T) {
		if err := l.Down(ctx); err != nil {
			t.Fatal(err)
		}
		hoststate.Compare(t, before)
	})
}

func (n *node) testVersion(t *testing.T) {
	nodes, err := n.client.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(nodes.Items) != 1 || nodes.Items[0].Status.NodeInfo.KubeletVersion != "v1.37.1" {
		t.Errorf("nodes %v, want one that reports v1.37.1", nodes.Items)
	}
	version, err := n.client.Discovery().ServerVersion()
	if err != nil || version.GitVersion != "v1.37.1" {
		t.Errorf("API server reports %v, %v", version, err)
	}
	out := n.run(t, "microk8s", "version")
	if !strings.HasPrefix(out, "MicroK8s ") {
		t.Errorf("version begins %q", out)
	}
	for _, component := range []string{"kubernetes", "containerd", "runc", "cni-plugins", "flannel", "helm", "dqlite"} {
		if !strings.Contains(out, component) {
			t.Errorf("version does not name %s:\n%s", component, out)
		}
	}
}

func (n *node) testStatus(t *testing.T) {
	n.run(t, "microk8s", "status", "--wait-ready", "--timeout", "60")
	out := n.run(t, "microk8s", "status")
	for _, want := range []string{
		"microk8s is running\n", "high-availability: no\n", "  datastore master nodes: 127.0.0.1:19001\n", "  datastore standby nodes: none\n",
		"addons:\n", "ha-cluster", "not enforced",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("status lacks %q:\n%s", want, out)
		}
	}
	var parsed map[string]any
	if err := json.Unmarshal([]byte(n.run(t, "microk8s", "status", "--format", "json")), &parsed); err != nil {
		t.Errorf("status --format json: %v", err)
	}
}

func (n *node) testNetworkPolicyWarning(t *testing.T) {
	policy := `{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"deny","namespace":"default"},"spec":{"podSelector":{},"policyTypes":["Ingress"]}}`
	eventually(t, time.Minute, func() error { // the policy object takes a moment to be in force
		out, err := n.tryAll(t, policy, "microk8s", "kubectl", "apply", "-f", "-", "--dry-run=server")
		if err == nil && !strings.Contains(out, "Warning:") {
			err = fmt.Errorf("no warning in %q", out)
		}
		return err
	})
}

// testForwardDrop sets the policy that Docker and ufw set and asks from outside again.
func (n *node) testForwardDrop(t *testing.T, otherHost string) {
	n.run(t, "iptables", "-P", "FORWARD", "DROP")
	defer n.run(t, "iptables", "-P", "FORWARD", "ACCEPT")
	n.run(t, "iptables", "-F", "FORWARD") // as a firewall does that is loaded after us
	eventually(t, 90*time.Second, func() error {
		out, err := n.try(t, "iptables", "-S", "FORWARD")
		if err == nil && !strings.Contains(out, "10.1.0.0/16") {
			err = fmt.Errorf("no accept rule for pods:\n%s", out)
		}
		return err
	})
	n.testService(t, otherHost)
}

// testPowerLoss switches the host off like a plug does; the same objects are there afterwards
// and the pods run again.
func (n *node) testPowerLoss(t *testing.T) {
	before, err := n.client.AppsV1().Deployments("default").Get(t.Context(), "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.lab.Kill(t.Context(), n.name); err != nil {
		t.Fatal(err)
	}
	if err := n.lab.Start(t.Context(), n.name); err != nil {
		t.Fatal(err)
	}
	n.waitReady(t)
	after, err := n.client.AppsV1().Deployments("default").Get(t.Context(), "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if after.UID != before.UID || after.CreationTimestamp != before.CreationTimestamp {
		t.Errorf("the Deployment is another one: %s, was %s", after.UID, before.UID)
	}
	n.waitPodsAnswer(t)
}

// waitPodsAnswer returns when both pods can be reached, each by its own address: their objects
// may say Running from before.
func (n *node) waitPodsAnswer(t *testing.T) {
	t.Helper()
	eventually(t, 3*time.Minute, func() error {
		pods, err := n.client.CoreV1().Pods("default").List(t.Context(), metav1.ListOptions{LabelSelector: "app=web"})
		if err != nil {
			return err
		}
		answered := 0
		for _, p := range pods.Items {
			if p.DeletionTimestamp != nil || p.Status.PodIP == "" {
				continue
			}
			got, err := n.httpGet(t, n.name, "http://"+p.Status.PodIP+":8080")
			if err != nil || strings.TrimSpace(got) != p.Name {
				return fmt.Errorf("pod %s answers %q, %w", p.Name, got, err)
			}
			answered++
		}
		if answered != 2 {
			return fmt.Errorf("%d pods answered, want 2", answered)
		}
		return nil
	})
}

func (n *node) testStopStart(t *testing.T) {
	n.run(t, "microk8s", "stop")
	if out := n.run(t, "iptables", "-S", "FORWARD"); strings.Contains(out, "10.1.0.0/16") {
		t.Errorf("the accept rules for pods are still there after stop:\n%s", out)
	}
	if out := n.run(t, "ps", "-eo", "args"); strings.Contains(out, "/web") || strings.Contains(out, "/pause") || strings.Contains(out, "kubelite") || strings.Contains(out, "containerd") {
		t.Errorf("these still run after stop:\n%s", out)
	}
	out, err := n.tryAll(t, "", "microk8s", "kubectl", "get", "nodes")
	if exitCode(err) != 1 || !strings.Contains(out, "microk8s is not running, try microk8s start") {
		t.Errorf("kubectl on a stopped node: %v, %q", err, out)
	}
	if out := n.run(t, "microk8s", "status"); !strings.Contains(out, "microk8s is not running, try microk8s start") {
		t.Errorf("status of a stopped node: %q", out)
	}
	n.run(t, "microk8s", "start")
	n.waitReady(t)
	n.waitPodsAnswer(t)
}

// testStatusAPIDown makes the API server's port unreachable and expects status to say so; how
// fast it does is for the bench.
func (n *node) testStatusAPIDown(t *testing.T) {
	n.run(t, "nft", "add table inet down_test; add chain inet down_test in { type filter hook input priority -100; }; add rule inet down_test in tcp dport 16443 drop")
	defer n.waitReady(t)
	defer n.run(t, "nft", "delete table inet down_test")
	out, err := n.tryAll(t, "", "microk8s", "status")
	if exitCode(err) != 1 || !strings.Contains(out, "microk8s is not running") || !strings.Contains(out, "datastore master nodes: 127.0.0.1:19001") {
		t.Errorf("status with the API unreachable: %v\n%s", err, out)
	}
}

func (n *node) testInspect(t *testing.T) {
	out, err := n.tryAll(t, "", "microk8s", "inspect")
	if err != nil {
		t.Fatalf("inspect: %v\n%s", err, out)
	}
	_, path, ok := strings.Cut(out, "Report tarball is at ")
	if !ok {
		t.Fatalf("inspect names no tarball:\n%s", out)
	}
	path = strings.Fields(path)[0]
	list := n.run(t, "tar", "-tzf", path)
	for _, want := range []string{"kubelite", "args/kubelet", "k8s/"} {
		if !strings.Contains(list, want) {
			t.Errorf("the tarball lacks %s:\n%s", want, list)
		}
	}
}

// testReset fills the node with pods that hold volumes, resets it, and expects a fresh one.
func (n *node) testReset(t *testing.T) {
	ns := "shop"
	if _, err := n.client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := n.client.CoreV1().PersistentVolumes().Create(t.Context(), &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: "disk"},
		Spec: corev1.PersistentVolumeSpec{
			Capacity:                      corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Mi")},
			AccessModes:                   []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimRetain,
			StorageClassName:              "by-hand",
			PersistentVolumeSource:        corev1.PersistentVolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/var/snap/microk8s/common/test-disk", Type: ptr(corev1.HostPathDirectoryOrCreate)}},
		},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := n.client.CoreV1().PersistentVolumeClaims(ns).Create(t.Context(), &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Name: "disk"},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes:      []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			StorageClassName: ptr("by-hand"),
			VolumeName:       "disk",
			Resources:        corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Mi")}},
		},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, func() error { // made by a controller, and no pod without it
		_, err := n.client.CoreV1().ServiceAccounts(ns).Get(t.Context(), "default", metav1.GetOptions{})
		return err
	})
	const pods = 8
	for i := range pods {
		if _, err := n.client.CoreV1().Pods(ns).Create(t.Context(), &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("clerk-%d", i)},
			Spec: corev1.PodSpec{
				TerminationGracePeriodSeconds: ptr(int64(1)),
				Containers: []corev1.Container{{
					Name: "web", Image: webImage, ImagePullPolicy: corev1.PullNever,
					VolumeMounts: []corev1.VolumeMount{{Name: "disk", MountPath: "/disk"}},
				}},
				Volumes: []corev1.Volume{{Name: "disk", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "disk"}}}},
			},
		}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, 2*time.Minute, func() error {
		list, err := n.client.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		running := 0
		for _, p := range list.Items {
			if p.Status.Phase == corev1.PodRunning {
				running++
			}
		}
		if running != pods {
			return fmt.Errorf("%d of %d pods run", running, pods)
		}
		return nil
	})

	out, err := n.tryAll(t, "", "microk8s", "reset", "--destroy-storage")
	if err != nil {
		t.Fatalf("reset: %v\n%s", err, out)
	}
	n.waitReady(t)
	if _, err := n.client.CoreV1().Namespaces().Get(t.Context(), ns, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("namespace %s after reset: %v, want not found", ns, err)
	}
	if pvs, err := n.client.CoreV1().PersistentVolumes().List(t.Context(), metav1.ListOptions{}); err != nil || len(pvs.Items) != 0 {
		t.Errorf("persistent volumes after reset: %v, %v", pvs.Items, err)
	}
	if list, err := n.client.AppsV1().Deployments("default").List(t.Context(), metav1.ListOptions{}); err != nil || len(list.Items) != 0 {
		t.Errorf("deployments after reset: %v, %v", list.Items, err)
	}
	if out := n.run(t, "ps", "-eo", "args"); strings.Contains(out, "/web") {
		t.Errorf("containers still run after reset:\n%s", out)
	}
}

// traces lists what an installation may leave on its host: interfaces, routes, firewall rules,
// mounts, cgroups, processes, and files outside of its own data.
func (n *node) traces(t *testing.T) string {
	t.Helper()
	var out strings.Builder
	for _, c := range []string{
		"ip -o link | sed 's/^[0-9]*: //; s/[<@ ].*//' | sort",
		"ip route; ip -6 route show table main | grep -v fe80",
		"nft list ruleset",
		"iptables-legacy-save 2>/dev/null || true",
		"findmnt -rno TARGET | sort",
		"find /sys/fs/cgroup -mindepth 2 -type d | grep -v unified/ | sort",
		"ps -eo comm | grep -vE '^(sh|ps|sort|grep|COMMAND)$' | sort",
		"find /var/lib/kubelet /var/lib/cni /var/lib/calico /etc/cni /opt /run /usr/libexec/kubernetes /etc/sysctl.d /var/log/pods /var/log/containers 2>/dev/null | grep -v ^/run/mount | sort",
	} {
		fmt.Fprintf(&out, "# %s\n%s", c, n.run(t, "sh", "-c", c+"; true"))
	}
	return out.String()
}

// What follows is how the tests talk to a node.

// path is a file of the node's $SNAP_DATA, as seen from here.
func (n *node) path(file string) string {
	return filepath.Join(n.lab.Root(n.name), "var/snap/microk8s/current", file)
}

func (n *node) ip(t *testing.T) string {
	t.Helper()
	ip, err := n.lab.IP(n.name)
	if err != nil {
		t.Fatal(err)
	}
	return ip
}

// connect makes the admin's client, whose connections begin inside the host.
func (n *node) connect(t *testing.T) {
	t.Helper()
	kubeconfig, err := os.ReadFile(n.path("credentials/client.config"))
	if err != nil {
		t.Fatal(err)
	}
	n.config, err = clientcmd.RESTConfigFromKubeConfig(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	n.config.QPS = -1
	n.config.Timeout = 30 * time.Second
	n.config.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		return n.lab.Dial(ctx, n.name, network, address)
	}
	n.client, err = kubernetes.NewForConfig(n.config)
	if err != nil {
		t.Fatal(err)
	}
}

func (n *node) waitReady(t *testing.T) {
	t.Helper()
	eventually(t, 3*time.Minute, func() error {
		got, err := n.client.CoreV1().Nodes().Get(t.Context(), n.name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range got.Status.Conditions {
			if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue && time.Since(c.LastHeartbeatTime.Time) < time.Minute*6 {
				return nil
			}
		}
		return fmt.Errorf("node is not Ready: %v", got.Status.Conditions)
	})
}

func (n *node) loadWebImage(t *testing.T) {
	t.Helper()
	image, err := os.Open(filepath.Join(build, "test-images/web.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	var out bytes.Buffer
	if err := n.lab.Exec(t.Context(), n.name, lab.Command{Args: []string{"microk8s", "ctr", "images", "import", "-"}, Stdin: image, Stdout: &out, Stderr: &out}); err != nil {
		t.Fatalf("cannot import the test image: %v\n%s", err, &out)
	}
}

// httpGet asks from inside the named host.
func (n *node) httpGet(t *testing.T, host, url string) (string, error) {
	t.Helper()
	client := &http.Client{
		Timeout: 5 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true, // each request is balanced anew
			DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				return n.lab.Dial(ctx, host, network, address)
			},
		},
	}
	resp, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	return string(body), err
}

// run gives the standard output of a command in the host, which must succeed.
func (n *node) run(t *testing.T, args ...string) string {
	t.Helper()
	return n.runIn(t, "", args...)
}

func (n *node) runIn(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	var out, errOut bytes.Buffer
	err := n.lab.Exec(t.Context(), n.name, lab.Command{Args: args, Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &errOut})
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(args, " "), err, &out, &errOut)
	}
	return out.String()
}

// try is run for commands that may fail.
func (n *node) try(t *testing.T, args ...string) (string, error) {
	t.Helper()
	return n.lab.Output(t.Context(), n.name, args...)
}

// tryAll gives standard output and error together.
func (n *node) tryAll(t *testing.T, stdin string, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	err := n.lab.Exec(t.Context(), n.name, lab.Command{Args: args, Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &out})
	return out.String(), err
}

// background starts a command that goes on until the returned function ends it.
func (n *node) background(t *testing.T, args ...string) (stop func()) {
	t.Helper()
	var out bytes.Buffer
	cmd, err := n.lab.Spawn(t.Context(), n.name, lab.Command{Args: args, Stdout: &out, Stderr: &out})
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%s:\n%s", strings.Join(args, " "), &out)
		}
	}
}

func exitCode(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return -1
}

// keepLogs leaves the logs of every service in build/test-logs when a test failed.
func (n *node) keepLogs(t *testing.T) {
	if !t.Failed() {
		return
	}
	dir := filepath.Join(build, "test-logs", n.name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Log(err)
		return
	}
	logs, _ := filepath.Glob(filepath.Join(n.lab.Root(n.name), "var/snap/microk8s/common/var/log/*"))
	for _, log := range append(logs, n.lab.LogFile(n.name)) {
		data, err := os.ReadFile(log)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, filepath.Base(log)), data, 0o644)
		}
		if err != nil {
			t.Log(err)
		}
	}
	t.Logf("logs of every service are in build/test-logs/%s", n.name)
}

// eventually calls f until it succeeds or the limit is over; a limit is generous, since it is
// only reached by what is broken.
func eventually(t *testing.T, limit time.Duration, f func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("not within %s: %v", limit, err)
		}
	}
}

func ptr[T any](v T) *T { return &v }
