package snap

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// The life of one installation: installed, configured, refreshed, reverted, rebooted, removed
// and installed again, on one machine.
func TestSnap(t *testing.T) {
	prepare(t)
	m := newMachine(t, "n1")
	m.run(t, "useradd", "--create-home", "alice")
	before := m.takeState(t)

	step := func(name string, f func(t *testing.T)) {
		t.Helper()
		if !t.Run(name, f) {
			t.FailNow() // what follows stands on it
		}
	}
	step("install", func(t *testing.T) {
		m.run(t, "bash", "-c", "install -D /mnt/build/test-images/web.tar ~root/snap/microk8s/common/sideload/web.tar")
		m.run(t, "snap", "install", "--dangerous", "--classic", packed(t))
		m.connect(t)
		m.waitReady(t)
		onlyOurs(t, before, m.takeState(t))
	})
	step("services", m.testServices)
	step("commands", m.testCommands)
	step("pod", m.startPod)
	step("settings", m.testSettings)
	step("refresh", m.testRefresh)
	step("failing refresh", func(t *testing.T) { m.testFailingRefresh(t, "post-refresh", "x2") })
	step("revert", m.testRevert)
	step("revert to another CA", m.testOtherCA)
	// Not before: it costs the revision to go back to.
	step("refresh whose configure fails", func(t *testing.T) { m.testFailingRefresh(t, "configure", "x1") })
	step("reboot", m.testReboot)
	step("remove", func(t *testing.T) {
		m.run(t, "snap", "remove", "microk8s")
		m.sameState(t, before)
		if saved := m.run(t, "snap", "saved"); !strings.Contains(saved, "microk8s") {
			t.Errorf("snapd kept no snapshot of what was removed:\n%s", saved)
		}
	})
	step("reinstall and purge", func(t *testing.T) {
		m.run(t, "snap", "install", "--dangerous", "--classic", packed(t))
		m.connect(t)
		m.waitReady(t)
		m.run(t, "snap", "remove", "--purge", "microk8s")
		m.sameState(t, before)
	})
}

// services returns the units of the snap and their states, as systemd has them.
func (m *machine) services(t *testing.T) map[string]string {
	t.Helper()
	states := map[string]string{}
	for line := range strings.Lines(m.run(t, "snap", "services", "microk8s")) {
		if f := strings.Fields(line); len(f) > 2 && f[0] != "Service" {
			states[strings.TrimPrefix(f[0], "microk8s.daemon-")] = f[1] + " " + f[2]
		}
	}
	return states
}

func (m *machine) testServices(t *testing.T) {
	want := map[string]string{
		"containerd": "enabled active", "k8s-dqlite": "enabled active", "cluster-agent": "enabled active", "kubelite": "enabled active",
		"apiserver-proxy": "enabled inactive", // for workers
	}
	got := m.services(t)
	for name, state := range want {
		if got[name] != state {
			t.Errorf("service %s is %q, want %q", name, got[name], state)
		}
	}
	if failed := m.run(t, "systemctl", "list-units", "--failed", "--no-legend", "--plain", "snap.*"); failed != "" {
		t.Errorf("units failed:\n%s", failed)
	}
	for name := range want {
		if out := m.run(t, "journalctl", "--no-pager", "--output=cat", "-t", "microk8s.daemon-"+name); strings.TrimSpace(out) == "" {
			t.Errorf("nothing of %s is in the journal", name)
		}
		if out := m.run(t, "microk8s", "logs", name); strings.TrimSpace(out) == "" {
			t.Errorf("microk8s logs %s is empty", name)
		}
	}
	// A service that ends quickly again and again is not given up.
	m.run(t, "mv", "/var/snap/microk8s/current/args/cluster-agent", "/root/cluster-agent")
	m.run(t, "systemctl", "kill", "-s", "KILL", "snap.microk8s.daemon-cluster-agent")
	eventually(t, time.Minute, func() error {
		n := strings.TrimSpace(m.run(t, "systemctl", "show", "--value", "-p", "NRestarts", "snap.microk8s.daemon-cluster-agent"))
		if len(n) == 1 && n < "6" {
			return fmt.Errorf("started %s times", n)
		}
		return nil
	})
	m.run(t, "mv", "/root/cluster-agent", "/var/snap/microk8s/current/args/cluster-agent")
	eventually(t, time.Minute, func() error {
		if s := m.services(t)["cluster-agent"]; s != "enabled active" {
			return fmt.Errorf("cluster-agent is %s", s)
		}
		return nil
	})
}

func (m *machine) testCommands(t *testing.T) {
	as := func(user, command string) (string, int) {
		return m.try(t, "runuser", "-l", user, "-c", "export MICROK8S_STATUS_BUDGET=5s PATH=$PATH:/snap/bin; "+command)
	}
	for _, tc := range []struct{ command, want string }{
		{"microk8s.kubectl get nodes -o name", "node/n1"},
		{"microk8s kubectl get nodes -o name", "node/n1"},
		{"microk8s version", "revision x1"},
		{"MICROK8S_STATUS_BUDGET=5s microk8s.status", "microk8s is running"},
		{"microk8s.config", "server: https://10.77.0."},
		{"microk8s.helm version --short", "v3."},
		{"microk8s.ctr version", "Server:"},
		{"microk8s.inspect", ""},
	} {
		eventually(t, time.Minute, func() error {
			if out, code := m.try(t, "bash", "-c", tc.command); code != 0 || !strings.Contains(out, tc.want) {
				return fmt.Errorf("%s: exit code %d, without %q:\n%s", tc.command, code, tc.want, out)
			}
			return nil
		})
	}
	// The restarts of the step before are told for a while; how fast it is to be is measured elsewhere.
	eventually(t, 2*time.Minute, func() error {
		if out, _ := m.try(t, "env", "MICROK8S_STATUS_BUDGET=5s", "microk8s", "status"); strings.Contains(out, "problems:") {
			return fmt.Errorf("status has something to complain about:\n%s", out)
		}
		return nil
	})
	if out, code := as("alice", "microk8s kubectl get nodes"); code == 0 || !strings.Contains(out, "Insufficient permissions") {
		t.Errorf("without the group: exit code %d\n%s", code, out)
	}
	m.run(t, "usermod", "-aG", "microk8s", "alice")
	for _, command := range []string{"microk8s kubectl get nodes", "microk8s status", "microk8s.enable --help"} {
		if out, code := as("alice", command); code != 0 {
			t.Errorf("with the group, %s: exit code %d\n%s", command, code, out)
		}
	}
	// What needs root goes through sudo.
	if out, code := as("alice", "microk8s ctr version </dev/null"); code == 0 || !strings.Contains(out, "sudo") {
		t.Errorf("alice may not use sudo: exit code %d\n%s", code, out)
	}
	m.run(t, "bash", "-c", "echo 'alice ALL=(ALL) NOPASSWD:SETENV: ALL' >/etc/sudoers.d/alice")
	for _, command := range []string{"microk8s ctr version", "microk8s stop", "microk8s start"} {
		if out, code := as("alice", command); code != 0 {
			t.Errorf("with sudo, %s: exit code %d\n%s", command, code, out)
		}
	}
	m.run(t, "rm", "/etc/sudoers.d/alice")
	for _, tc := range []struct{ line, word, want string }{
		{"microk8s sta", "sta", "status"},
		{"microk8s.kubectl get namesp", "namesp", "namespaces"},
		{"microk8s.helm inst", "inst", "install"},
	} {
		app := strings.Fields(tc.line)
		argv := append([]string{"snap", "run", "--command=complete", app[0], "9", "9", fmt.Sprint(len(tc.line)), fmt.Sprint(len(app) - 1), " ", tc.line}, app...)
		if out := m.run(t, argv...); !slices.Contains(strings.Fields(out), tc.want) {
			t.Errorf("completion of %q gives %q, want %q", tc.line, out, tc.want)
		}
		m.run(t, "test", "-e", "/var/lib/snapd/desktop/bash-completion/completions/"+app[0])
	}
	m.waitReady(t)
}

// startPod runs a pod that must live on through what comes. Its image was beside the snap when
// that was installed.
func (m *machine) startPod(t *testing.T) {
	_, err := m.client.CoreV1().Pods("default").Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: new(int64),
			Containers:                    []corev1.Container{{Name: "web", Image: "microk8s.test/web:1", ImagePullPolicy: corev1.PullNever}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	m.waitPod(t)
}

// waitPod waits until the pod answers, and gives it.
func (m *machine) waitPod(t *testing.T) *corev1.Pod {
	t.Helper()
	var pod *corev1.Pod
	eventually(t, 2*time.Minute, func() (err error) {
		pod, err = m.client.CoreV1().Pods("default").Get(t.Context(), "web", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if pod.Status.PodIP == "" {
			return fmt.Errorf("pod is %s", pod.Status.Phase)
		}
		return m.get("http://" + pod.Status.PodIP + ":8080")
	})
	return pod
}

func (m *machine) get(url string) error {
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: m.dial, DisableKeepAlives: true}}
	resp, err := client.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, resp.Status)
	}
	return nil
}

// traffic is steady writing to the API: one object after the other, each a new one.
type traffic struct {
	client *kubernetes.Clientset
	stop   context.CancelFunc
	wg     sync.WaitGroup
	mu     sync.Mutex
	acked  []string
	failed int
}

// written says how many objects were written so far.
func (tr *traffic) written() int {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return len(tr.acked)
}

// startTraffic writes until [traffic.check] is called.
func (m *machine) startTraffic(t *testing.T, name string) *traffic {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	tr := &traffic{client: m.client, stop: stop}
	t.Cleanup(stop)
	tr.wg.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			object := fmt.Sprintf("%s-%d", name, i)
			_, err := m.client.CoreV1().ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: object}}, metav1.CreateOptions{})
			tr.mu.Lock()
			if err == nil {
				tr.acked = append(tr.acked, object)
			} else {
				tr.failed++
			}
			tr.mu.Unlock()
			if err != nil {
				select {
				case <-ctx.Done():
				case <-time.After(50 * time.Millisecond):
				}
			}
		}
	})
	return tr
}

// check ends the traffic, once it goes on after what was done meanwhile: all that was
// acknowledged must be there.
func (tr *traffic) check(t *testing.T) {
	t.Helper()
	during := tr.written()
	if during == 0 {
		t.Error("nothing was written before")
	}
	eventually(t, time.Minute, func() error {
		if tr.written() == during {
			return errors.New("nothing can be written any more")
		}
		return nil
	})
	tr.stop()
	tr.wg.Wait()
	list, err := tr.client.CoreV1().ConfigMaps("default").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{}
	for _, c := range list.Items {
		there[c.Name] = true
	}
	for _, name := range tr.acked {
		if !there[name] {
			t.Errorf("%s was acknowledged and is lost", name)
		}
	}
	t.Logf("%d objects written, %d attempts failed", len(tr.acked), tr.failed)
}

func (m *machine) testSettings(t *testing.T) {
	if out := m.run(t, "snap", "set", "microk8s", "config=version: 0.1.0\nextraKubeletArgs:\n  --max-pods: \"99\"\n"); strings.TrimSpace(out) != "" {
		t.Errorf("snap set says %q", out)
	}
	eventually(t, 2*time.Minute, func() error {
		node, err := m.client.CoreV1().Nodes().Get(t.Context(), m.name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if n := node.Status.Capacity.Pods().Value(); n != 99 {
			return fmt.Errorf("the kubelet takes %d pods", n)
		}
		return nil
	})
	out, code := m.try(t, "snap", "set", "microk8s", "config=version: 7.1.0\nextraKubeletArgs:\n  max-pods: [1]\nno such key: 1\n")
	if code == 0 {
		t.Error("a wrong launch configuration was accepted")
	}
	for _, want := range []string{"version is 7.1.0", "line 3: a string is required here", "no such key"} {
		if !strings.Contains(out, want) {
			t.Errorf("the refusal does not say %q:\n%s", want, out)
		}
	}
	if got := m.run(t, "snap", "get", "microk8s", "config"); !strings.Contains(got, "--max-pods") {
		t.Errorf("after a refused setting the one before is %q", got)
	}
}

func (m *machine) testRefresh(t *testing.T) {
	next := m.repack(t, "v1.37.99", nil)
	was := m.waitPod(t)
	before := m.settledState(t)
	tr := m.startTraffic(t, "refresh")
	m.run(t, "snap", "install", "--dangerous", "--classic", next)
	m.connect(t)
	m.waitReady(t)
	tr.check(t)
	if out := m.run(t, "microk8s", "version"); !strings.Contains(out, "v1.37.99 revision x2") {
		t.Errorf("after the refresh: %s", out)
	}
	m.samePod(t, was)
	m.sameButRevision(t, before)
	m.testServicesActive(t)
	for _, link := range []string{"/var/lib/kubelet", "/etc/cni/net.d", "/opt/cni/bin"} {
		if target := m.run(t, "readlink", "-f", link); strings.Contains(target, "/x1/") {
			t.Errorf("%s leads to the old revision: %s", link, target)
		}
	}
	if target := m.run(t, "readlink", "-f", "/var/snap/microk8s/current/var/kubernetes/backend"); strings.TrimSpace(target) != "/var/snap/microk8s/common/var/kubernetes/backend" {
		t.Errorf("the datastore is at %s", target)
	}
}

// samePod fails unless the pod's container is the one that it was.
func (m *machine) samePod(t *testing.T, was *corev1.Pod) {
	t.Helper()
	now := m.waitPod(t)
	if was.Status.ContainerStatuses[0].ContainerID != now.Status.ContainerStatuses[0].ContainerID || now.Status.ContainerStatuses[0].RestartCount != was.Status.ContainerStatuses[0].RestartCount {
		t.Errorf("the container did not survive: it was %+v and is %+v", was.Status.ContainerStatuses[0], now.Status.ContainerStatuses[0])
	}
}

func (m *machine) testServicesActive(t *testing.T) {
	t.Helper()
	got := m.services(t)
	for _, name := range []string{"containerd", "k8s-dqlite", "cluster-agent", "kubelite"} {
		if got[name] != "enabled active" {
			t.Errorf("service %s is %s", name, got[name])
		}
	}
}

// testFailingRefresh refreshes to a revision of which one hook fails: revision goes on. With
// configure, which is the last hook, the next one's services have run by then.
func (m *machine) testFailingRefresh(t *testing.T, hook, revision string) {
	bad := m.repack(t, "v1.37.100", map[string]string{"meta/hooks/" + hook: "#!/bin/sh\necho this release is broken\nexit 1\n"})
	was := m.waitPod(t)
	before := m.settledState(t)
	tr := m.startTraffic(t, "failing-"+hook)
	if out, code := m.try(t, "snap", "install", "--dangerous", "--classic", bad); code == 0 || !strings.Contains(out, "this release is broken") {
		t.Errorf("exit code %d\n%s", code, out)
	}
	m.waitReady(t)
	tr.check(t)
	if out := m.run(t, "microk8s", "version"); !strings.Contains(out, "revision "+revision) {
		t.Errorf("after the undone refresh: %s", out)
	}
	m.samePod(t, was)
	m.sameButRevision(t, before)
	m.testServicesActive(t)
}

func (m *machine) testRevert(t *testing.T) {
	was := m.waitPod(t)
	before := m.settledState(t)
	tr := m.startTraffic(t, "revert")
	m.run(t, "snap", "revert", "microk8s")
	m.waitReady(t)
	tr.check(t)
	if out := m.run(t, "microk8s", "version"); !strings.Contains(out, "revision x1") {
		t.Errorf("after the revert: %s", out)
	}
	m.samePod(t, was)
	m.sameButRevision(t, before)
	m.testServicesActive(t)
	// What was written between refresh and revert is part of the cluster, not of the revision.
	if _, err := m.client.CoreV1().ConfigMaps("default").Get(t.Context(), "failing-post-refresh-0", metav1.GetOptions{}); err != nil && !apierrors.IsNotFound(err) {
		t.Error(err)
	}
}

// testOtherCA goes to a revision whose $SNAP_DATA is from before the node got another CA, as
// joining and leaving a cluster give it one: it does not start, and says how to go back.
func (m *machine) testOtherCA(t *testing.T) {
	m.run(t, "microk8s", "refresh-certs", "-e", "ca.crt")
	m.connect(t)
	m.waitReady(t)
	m.run(t, "snap", "revert", "microk8s", "--revision=x2")
	eventually(t, time.Minute, func() error {
		out := m.run(t, "journalctl", "--no-pager", "--output=cat", "-t", "microk8s.daemon-kubelite")
		if !strings.Contains(out, "sudo snap revert microk8s --revision=x1") {
			return errors.New("kubelite does not say what to do")
		}
		return nil
	})
	if conn, err := m.dial(t.Context(), "tcp", "127.0.0.1:16443"); err == nil {
		conn.Close()
		t.Error("the API server runs with the certificates of another cluster")
	}
	m.run(t, "snap", "revert", "microk8s", "--revision=x1")
	m.waitReady(t)
	m.testServicesActive(t)
}

func (m *machine) testReboot(t *testing.T) {
	m.reboot(t, "kill")
	m.connect(t)
	m.waitReady(t)
	m.waitPod(t)
	m.testServicesActive(t)
}
