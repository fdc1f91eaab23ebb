package node

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/tests/lab/hoststate"
)

// TestNode is the life of one node, told in order; each part goes on from where the one before
// left the node.
func TestNode(t *testing.T) {
	n := newNode(t, "other")
	step := n.steps(t)
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
	step("strangers in the host's network", n.testListeners)
	step("pod security", n.testPodSecurity)
	step("files in args/manifests", n.testManifests)
	step("deployment", n.deployWeb)
	step("service", func(t *testing.T) { n.testService(t, "other") })
	step("exec, logs, port-forward", n.testExecLogsForward)
	step("console", n.testConsole)
	step("backups", n.testBackup)
	step("host with FORWARD DROP", func(t *testing.T) { n.testForwardDrop(t, "other") })
	step("faults of the host's network", func(t *testing.T) { n.testHeal(t, "other", 2) })
	step("power loss", n.testPowerLoss)
	step("service after power loss", func(t *testing.T) { n.testService(t, "other") })
	step("stop and start", n.testStopStart)
	step("status while the API server is down", n.testStatusAPIDown)
	step("inspect", n.testInspect)
	step("faults", n.testFaults)
	step("frozen daemons", n.testFrozen)
	step("security", n.testSecurity)
	step("reset", n.testReset)
	step("remove leaves nothing on the host", func(t *testing.T) {
		// What Docker, k3s and Calico would have there stays.
		n.run(t, "sh", "-ec", `mkdir -p /run/containerd/io.containerd.runtime.v2.task/moby/x /var/log/pods/kube-system_x_of-k3s /run/netns
			touch /run/containerd/containerd.sock /var/log/pods/kube-system_x_of-k3s/0.log /run/netns/cni-other; ip link add cali0 type bridge`)
		n.run(t, "/snap/microk8s/current/bin/microk8s", "hook", "remove")
		n.run(t, "sh", "-ec", `rm /run/containerd/containerd.sock /var/log/pods/kube-system_x_of-k3s/0.log /run/netns/cni-other; ip link del cali0
			cd /run; rmdir -p containerd/io.containerd.runtime.v2.task/moby/x; rmdir netns; cd /var/log; rmdir -p pods/kube-system_x_of-k3s`)
		if diff := cmp.Diff(untouched, n.traces(t)); diff != "" {
			t.Errorf("the host is not as it was before the first start (-before +after):\n%s", diff)
		}
	})
	step("down leaves nothing", func(t *testing.T) {
		if err := n.lab.Down(t.Context()); err != nil {
			t.Fatal(err)
		}
		hoststate.Compare(t, n.before)
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
	out := n.run(t, "env", "MICROK8S_STATUS_BUDGET=30s", "microk8s", "status")
	for _, want := range []string{
		"microk8s is running\n", "high-availability: no\n", "  datastore master nodes: 127.0.0.1:19001\n", "  datastore standby nodes: none\n",
		"addons:\n", "ha-cluster",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("status lacks %q:\n%s", want, out)
		}
	}
	var parsed map[string]any
	if err := json.Unmarshal([]byte(n.run(t, "env", "MICROK8S_STATUS_BUDGET=30s", "microk8s", "status", "--format", "json")), &parsed); err != nil {
		t.Errorf("status --format json: %v", err)
	}
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
	// The daemons share one log: a flag of one of them must not stop the others.
	n.run(t, "sh", "-c", "echo --v=1 >> /var/snap/microk8s/current/args/kube-proxy")
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
	if exitCode(err) != 1 || !strings.Contains(out, "microk8s is slow to answer") || !strings.Contains(out, "datastore master nodes: 127.0.0.1:19001") {
		t.Errorf("status with the API unreachable: %v\n%s", err, out)
	}
}

// testSecurity compares a running node with the CIS benchmark.
func (n *node) testSecurity(t *testing.T) {
	out, err := n.tryAll(t, "", "microk8s", "inspect", "--security", "-o", "json")
	var report struct {
		Summary  map[string]int
		Controls []struct{ ID, Title, Status, Found string }
	}
	if jsonErr := json.Unmarshal([]byte(out), &report); jsonErr != nil {
		t.Fatalf("inspect --security: %v, %v\n%s", err, jsonErr, out)
	}
	for _, c := range report.Controls {
		if c.Status == "fail" {
			t.Errorf("%s %s: found %s", c.ID, c.Title, c.Found)
		}
	}
	if report.Summary["pass"] == 0 {
		t.Errorf("nothing passes: %v", report.Summary)
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
