package node

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/pki"
	"microk8s/tests/lab"
	"microk8s/tests/lab/hoststate"
)

// TestBadInput is what people, disks and bad luck do to a node, told in order on one host.
// After each part the node runs again with everything it had.
func TestBadInput(t *testing.T) {
	n := newNode(t)
	step := n.steps(t)
	step("commands before the first start", n.testBeforeStart)
	step("first start killed at several moments", n.testFirstStartKilled)
	step("objects that must survive everything", n.deployWeb)
	step("start of a node that runs", func(t *testing.T) {
		pid := n.pid(t, "kubelite")
		n.run(t, "microk8s", "start")
		if now := n.pid(t, "kubelite"); now != pid {
			t.Errorf("kubelite was restarted: pid %s, was %s", now, pid)
		}
	})
	step("not root", n.testNotRoot)
	step("killed services", n.testKilledServices)
	step("killed supervisor", n.testKilledSupervisor)
	step("lost terminal", n.testLostTerminal)
	step("certificates of a running node", n.testLiveCertificates)
	step("a daemon that ends", n.testDaemonEnds)
	step("stop killed, stop twice", n.testStopKilled)
	step("argument files", n.testArgumentFiles)
	step("ports in use", n.testPortsInUse)
	step("certificates of a stopped node", n.testBadCertificates)
	step("datastore directory", n.testBadDatastore)
	step("full disk", n.testFullDisk)
	step("reset killed", n.testResetKilled)
	step("down leaves nothing", func(t *testing.T) {
		if err := n.lab.Down(t.Context()); err != nil {
			t.Fatal(err)
		}
		hoststate.Compare(t, n.before)
	})
}

// testBeforeStart runs commands on a machine that has no node: they say how to get one.
func (n *node) testBeforeStart(t *testing.T) {
	for _, args := range []string{"status", "kubectl get nodes", "ctr version", "config", "reset", "logs"} {
		n.fails(t, 1, []string{"this machine has no node yet", "sudo microk8s start"}, append([]string{"microk8s"}, strings.Fields(args)...)...)
	}
	n.run(t, "microk8s", "stop") // nothing to stop is no failure
	if out := n.run(t, "microk8s", "version"); !strings.HasPrefix(out, "MicroK8s ") {
		t.Errorf("version begins %q", out)
	}
	n.fails(t, 4, []string{"Failed to get certificate info", "sudo microk8s start"}, "microk8s", "refresh-certs", "--check")
}

// testFirstStartKilled kills the very first start again and again, each time a little later.
func (n *node) testFirstStartKilled(t *testing.T) {
	for _, moment := range []string{
		n.path("args/kubelet"),
		n.path("certs/ca.key"),
		n.path("credentials/client.config"),
		n.common("var/log/supervisor.log"),
		n.common("var/log/kubelite.log"),
	} {
		var out bytes.Buffer
		cmd, err := n.lab.Spawn(t.Context(), n.name, lab.Command{Args: []string{"microk8s", "start"}, Stdout: &out, Stderr: &out})
		if err != nil {
			t.Fatal(err)
		}
		until(t, func() error { _, err := os.Stat(moment); return err })
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	n.run(t, "microk8s", "start")
	n.connect(t)
	n.usable(t)
}

// testNotRoot runs commands as somebody who may nothing.
func (n *node) testNotRoot(t *testing.T) {
	const perm = "Insufficient permissions to access MicroK8s."
	for _, c := range []struct {
		args string
		code int
		says string
	}{
		{"status", 1, perm}, {"start", 1, perm}, {"stop", 1, perm}, {"kubectl get nodes", 1, perm},
		{"ctr version", 1, perm}, {"config", 1, perm}, {"version", 1, perm}, {"logs", 1, perm},
		{"reset", 50, "Elevated permissions is needed"}, {"refresh-certs --check", 50, "Elevated permissions is needed"},
		{"inspect", 1, "needs root"},
	} {
		n.fails(t, c.code, []string{c.says}, append([]string{"setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "microk8s"}, strings.Fields(c.args)...)...)
	}
	n.usable(t)
}

// testKilledServices kills each service; it comes back, and the containers notice nothing.
func (n *node) testKilledServices(t *testing.T) {
	containers := n.containers(t)
	for _, service := range []string{"containerd", "k8s-dqlite", "cluster-agent", "kubelite"} {
		n.killAndWait(t, service, "-KILL")
	}
	n.killAndWait(t, "kubelite", "-TERM") // ends well, and must come back all the same
	n.usable(t)
	if now := n.containers(t); !slices.Equal(now, containers) {
		t.Errorf("containers are %q, were %q", now, containers)
	}
	n.waitPodsAnswer(t)
}

// killAndWait ends a service's process and waits for the next one.
func (n *node) killAndWait(t *testing.T, service, signal string) {
	t.Helper()
	old := n.pid(t, service)
	n.run(t, "kill", signal, old)
	until(t, func() error {
		if now, err := n.try(t, "pgrep", "-x", service); err != nil || strings.TrimSpace(now) == old {
			return fmt.Errorf("%s has pid %q, %w", service, now, err)
		}
		return nil
	})
}

func (n *node) testKilledSupervisor(t *testing.T) {
	containers := n.containers(t)
	supervisor := n.supervisor(t)
	n.run(t, "kill", "-KILL", supervisor)
	n.run(t, "microk8s", "start")
	n.usable(t)
	if now := n.containers(t); !slices.Equal(now, containers) {
		t.Errorf("after kill -9, containers are %q, were %q", now, containers)
	}

	supervisor = n.supervisor(t)
	n.run(t, "kill", "-TERM", supervisor)
	until(t, func() error { return n.nothingRuns(t) })
	if out, err := n.tryAll(t, "", "microk8s", "status"); exitCode(err) != 1 || !strings.Contains(out, "are not running") || !strings.Contains(out, "microk8s start") {
		t.Errorf("status after the supervisor was asked to stop: %v\n%s", err, out)
	}
	n.run(t, "microk8s", "start")
	n.usable(t)
	n.waitPodsAnswer(t)
}

// testLostTerminal starts the node from a terminal that then is closed.
func (n *node) testLostTerminal(t *testing.T) {
	n.run(t, "microk8s", "stop")
	cmd, err := n.lab.Spawn(t.Context(), n.name, lab.Command{Args: []string{"script", "-qec", "microk8s start", "/dev/null"}})
	if err != nil {
		t.Fatal(err)
	}
	until(t, func() error { _, err := n.try(t, "pgrep", "-x", "kubelite"); return err })
	_ = cmd.Process.Kill() // the hang-up reaches every process of the terminal
	_ = cmd.Wait()
	n.usable(t)
}

// testLiveCertificates makes certificates due, and gives the host another address, while the
// node runs.
func (n *node) testLiveCertificates(t *testing.T) {
	kubelite := n.pid(t, "kubelite")
	for _, age := range []int{340, 700} { // of 365 days: due, and expired
		due := n.reissue(t, time.Now().AddDate(0, 0, -age))
		eventually(t, time.Minute, func() error {
			served, err := n.served(t)
			if err != nil {
				return err
			}
			if served.SerialNumber.Cmp(due.SerialNumber) == 0 || time.Now().Before(served.NotBefore) || time.Until(served.NotAfter) < 300*24*time.Hour {
				return fmt.Errorf("served is a certificate that ends on %s", served.NotAfter)
			}
			on := n.certificate(t, "server.crt")
			if on.SerialNumber.Cmp(served.SerialNumber) != 0 {
				return fmt.Errorf("served is not what is in certs/server.crt")
			}
			return nil
		})
	}
	n.run(t, "ip", "address", "add", "10.99.0.7/32", "dev", "eth0")
	want := net.IPv4(10, 99, 0, 7)
	eventually(t, time.Minute, func() error {
		served, err := n.served(t)
		if err == nil && !slices.ContainsFunc(served.IPAddresses, want.Equal) {
			err = fmt.Errorf("the served certificate is for %v", served.IPAddresses)
		}
		return err
	})
	n.run(t, "ip", "address", "del", "10.99.0.7/32", "dev", "eth0")
	if now := n.pid(t, "kubelite"); now != kubelite {
		t.Errorf("kubelite was restarted for a certificate: pid %s, was %s", now, kubelite)
	}
	n.usable(t)
}

// testDaemonEnds gives one of kubelite's daemons a flag that it can parse and not use.
func (n *node) testDaemonEnds(t *testing.T) {
	undoScheduler := n.edit(t, n.path("args/kube-scheduler"), func(data []byte) []byte {
		return append(data, "--config=/does/not/exist\n"...)
	})
	// Somebody changes the pods' range of a cluster that has nodes.
	undoRange := n.edit(t, n.path("args/kube-controller-manager"), func(data []byte) []byte {
		return append(data, "--cluster-cidr=10.77.0.0/16\n"...)
	})
	n.run(t, "kill", "-TERM", n.pid(t, "kubelite"))
	eventually(t, time.Minute, func() error {
		out, err := n.tryAll(t, "", "microk8s", "status")
		for _, want := range []string{
			"microk8s is running", "kube-scheduler inside kubelite has ended", "/does/not/exist", // the API server goes on
			"kube-controller-manager inside kubelite runs, but it goes on without the node-ipam-controller", "is out the range of cluster cidr 10.77.0.0/16", "correct --cluster-cidr in",
		} {
			if err != nil || !strings.Contains(out, want) {
				return fmt.Errorf("status: %v, and nothing of %q\n%s", fmt.Sprint(err), want, out)
			}
		}
		return nil
	})
	undoScheduler()
	undoRange()
	n.run(t, "microk8s", "stop")
	n.run(t, "microk8s", "start")
	n.usable(t)
}

func (n *node) testStopKilled(t *testing.T) {
	for _, moment := range []string{"Stopping Kubernetes", "Stopping the containers", "Stopping the other services"} {
		n.killAt(t, moment, "microk8s", "stop")
	}
	for range 2 {
		n.run(t, "microk8s", "stop")
		if err := n.nothingRuns(t); err != nil {
			t.Error(err)
		}
	}
}

// testArgumentFiles damages argument files of a stopped node. The start that follows fails
// and names the file, and so does status.
func (n *node) testArgumentFiles(t *testing.T) {
	damages := map[string]func(path string) error{
		"NUL bytes":    func(p string) error { return os.WriteFile(p, []byte("--a=b\n\x00\x00\x00"), 0o660) },
		"no flags":     func(p string) error { return os.WriteFile(p, []byte("half a line"), 0o660) },
		"empty":        func(p string) error { return os.WriteFile(p, nil, 0o660) },
		"unreadable":   func(p string) error { os.Remove(p); return os.Mkdir(p, 0o755) },
		"unknown flag": func(p string) error { return os.WriteFile(p, []byte("--no-such-flag=1\n"), 0o660) },
	}
	for _, c := range []struct{ file, damage string }{
		{"kubelet", "NUL bytes"}, {"kubelet", "empty"}, {"kubelet", "unreadable"},
		{"kube-apiserver", "no flags"}, {"kube-apiserver", "unreadable"}, {"kube-apiserver", "unknown flag"},
		{"containerd", "NUL bytes"}, {"containerd", "empty"}, {"containerd", "unreadable"},
	} {
		t.Run(c.file+", "+c.damage, func(t *testing.T) {
			path := n.path("args/" + c.file)
			undo := n.keep(t, path)
			defer undo()
			if err := damages[c.damage](path); err != nil {
				t.Fatal(err)
			}
			says := []string{"/var/snap/microk8s/current/args", c.file}
			if c.damage == "unknown flag" {
				says = append(says, "--no-such-flag")
			}
			n.fails(t, 1, says, "microk8s", "start")
			n.fails(t, 1, append(says, "microk8s is not running"), "microk8s", "status")
			n.run(t, "microk8s", "stop")
		})
	}
	n.run(t, "microk8s", "start")
	n.usable(t)
	n.run(t, "microk8s", "stop")
}

func (n *node) testPortsInUse(t *testing.T) {
	for _, port := range []string{"16443", "25000", "10250"} {
		l, err := n.lab.Listen(t.Context(), n.name, "tcp", ":"+port)
		if err != nil {
			t.Fatal(err)
		}
		n.fails(t, 1, []string{"port " + port + ", which ", "is in use", "stop that program"}, "microk8s", "start")
		l.Close()
	}
}

// testBadCertificates damages the certificates of a stopped node. What can be issued again is.
func (n *node) testBadCertificates(t *testing.T) {
	n.reissue(t, time.Now().AddDate(0, 0, -700)) // expired while the node was off
	n.run(t, "microk8s", "start")
	n.usable(t)
	n.run(t, "microk8s", "stop")

	for name, damage := range map[string]func(crt, key string) error{
		"of another key": func(_, key string) error {
			other, err := pki.Maker{}.Key(2048)
			if err != nil {
				return err
			}
			return os.WriteFile(key, pki.EncodeKey(other), 0o600)
		},
		"no certificate": func(crt, _ string) error { return os.WriteFile(crt, []byte("\x00\x00"), 0o660) },
	} {
		t.Run(name, func(t *testing.T) {
			defer n.keep(t, n.path("certs/server.crt"))()
			defer n.keep(t, n.path("certs/server.key"))()
			if err := damage(n.path("certs/server.crt"), n.path("certs/server.key")); err != nil {
				t.Fatal(err)
			}
			n.fails(t, 1, []string{"certs/server.crt"}, "microk8s", "start")
		})
	}
	t.Run("CA of somebody else", func(t *testing.T) {
		defer n.keep(t, n.path("certs/ca.crt"))()
		key, err := pki.Maker{}.Key(2048)
		if err != nil {
			t.Fatal(err)
		}
		der, err := pki.Maker{}.Issue(pki.Request{Subject: pkix.Name{CommonName: "other"}, Days: 30, CA: true}, key.Public(), nil, key)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(n.path("certs/ca.crt"), pki.EncodeCert(der), 0o660); err != nil {
			t.Fatal(err)
		}
		n.fails(t, 1, []string{"certs/ca.crt", "refresh-certs --undo"}, "microk8s", "start")
	})
	n.run(t, "microk8s", "start")
	n.usable(t)
	n.run(t, "microk8s", "stop")
}

// testBadDatastore damages the directory of a stopped datastore.
func (n *node) testBadDatastore(t *testing.T) {
	dir := n.common("var/kubernetes/backend")
	segment := func() string {
		closed, _ := filepath.Glob(filepath.Join(dir, "0*-0*"))
		if len(closed) == 0 {
			t.Fatal("the datastore has no closed segment")
		}
		return closed[len(closed)-1]
	}()
	for _, c := range []struct {
		name, file string
		damage     func([]byte) []byte
		says       []string
	}{
		{"flipped bit", segment, func(d []byte) []byte { d[len(d)/2] ^= 4; return d }, []string{filepath.Base(segment), "damaged", "backup"}},
		{"truncated", segment, func(d []byte) []byte { return d[:len(d)-100] }, []string{filepath.Base(segment), "damaged", "backup"}},
		{"something else", segment, func([]byte) []byte { return []byte("a letter to my aunt") }, []string{filepath.Base(segment), "format"}},
		{"key lost", filepath.Join(dir, "cluster.key"), nil, []string{"cluster.key"}},
		{"key of nothing", filepath.Join(dir, "cluster.key"), func([]byte) []byte { return nil }, []string{"cluster.key"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			undo := n.keep(t, c.file)
			defer undo()
			if c.damage == nil {
				if err := os.Remove(c.file); err != nil {
					t.Fatal(err)
				}
			} else {
				n.edit(t, c.file, c.damage)
			}
			n.fails(t, 1, c.says, "microk8s", "start")
			n.run(t, "microk8s", "stop")
		})
	}
	t.Run("no text", func(t *testing.T) { // there is a copy of what it says
		n.edit(t, filepath.Join(dir, "info.yaml"), func([]byte) []byte { return []byte("\x00{{") })
		n.run(t, "microk8s", "start")
		if data, err := os.ReadFile(filepath.Join(dir, "info.yaml")); err != nil || !strings.Contains(string(data), "Address: ") {
			t.Errorf("info.yaml was not made again: %v, %q", err, data)
		}
	})
	n.usable(t)
}

// loadNothing asks a node with a full disk for what needs room: one line says so, and nothing
// is changed.
func (n *node) loadNothing(t *testing.T) {
	t.Helper()
	n.fails(t, 1, []string{"cannot enable ingress: the disk of /var/snap/microk8s/"}, "microk8s", "enable", "ingress")
	n.wantAddon(t, "ingress", "disabled")
	n.fails(t, 1, []string{"(n1): Failed to import the image: the disk of this node is full, free some space there"}, "microk8s", "images", "import", "/web.tar")
	n.fails(t, 1, []string{"no space left on device\n  free some space"}, "sh", "-c", "microk8s images import < /web.tar")
	n.fails(t, 1, []string{"no space left on device\n  free some space"}, "microk8s", "images", "export-local", "/var/snap/microk8s/common/all.tar")
	if out := n.run(t, "sh", "-c", "cd /var/snap/microk8s/; find current/tmp common -maxdepth 1 -name '*.tar*'"); out != "" {
		t.Errorf("files are left:\n%s", out)
	}
}

// testFullDisk fills the disk under a running node and frees it again.
func (n *node) testFullDisk(t *testing.T) {
	// The kubelet wants more than the gigabyte that it sets aside for the host.
	if err := n.lab.Disk(t.Context(), n.name, 3<<30); err != nil {
		t.Fatal(err)
	}
	n.usable(t)
	n.run(t, "microk8s", "kubectl", "create", "configmap", "before", "--from-literal=a=b")
	n.copyWebImage(t)
	// All of it: most in one piece that needs no writing, then what is left, small blocks too.
	n.run(t, "sh", "-c", `cd /var/snap/microk8s/common
		fallocate -l $(($(stat -f -c '%a*%S' .) - 40*1024*1024)) filler
		for size in 1M 512; do dd if=/dev/zero of=filler.$size bs=$size 2>/dev/null; done; true`)
	until(t, func() error {
		out, _ := n.tryAll(t, "", "microk8s", "status")
		if !strings.Contains(out, "is full") || !strings.Contains(out, "free some space") {
			return fmt.Errorf("status: %s", out)
		}
		return nil
	})
	n.loadNothing(t)
	acknowledged := []string{}
	var refused error
	big := strings.Repeat("x", 100<<10)
	for i := range 400 { // until what the datastore has set aside is used up
		name := fmt.Sprintf("full-%d", i)
		_, err := n.client.CoreV1().ConfigMaps("default").Create(t.Context(), &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string]string{"x": big},
		}, metav1.CreateOptions{})
		if err != nil {
			refused = err
			break
		}
		acknowledged = append(acknowledged, name)
	}
	if refused == nil {
		t.Error("40 MB were written to a full disk")
	}
	t.Logf("%d writes were acknowledged, then: %v", len(acknowledged), refused)
	n.run(t, "sh", "-c", "rm /var/snap/microk8s/common/filler*")
	eventually(t, 2*time.Minute, func() error {
		_, err := n.client.CoreV1().ConfigMaps("default").Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{GenerateName: "after-"}}, metav1.CreateOptions{})
		return err
	})
	for _, name := range append(acknowledged, "before") {
		if _, err := n.client.CoreV1().ConfigMaps("default").Get(t.Context(), name, metav1.GetOptions{}); err != nil {
			t.Errorf("an acknowledged object: %v", err)
		}
	}
	n.usable(t)
	if err := n.lab.Disk(t.Context(), n.name, 0); err != nil {
		t.Fatal(err)
	}
	n.usable(t)
}

// testResetKilled kills a reset at several moments; the last one does the whole work.
func (n *node) testResetKilled(t *testing.T) {
	for _, moment := range []string{"Removing everything from the cluster", "Stopping Kubernetes", "Stopping the other services", "Starting the services"} {
		n.killAt(t, moment, "microk8s", "reset")
	}
	n.run(t, "microk8s", "reset")
	n.usable(t)
	if list, err := n.client.AppsV1().Deployments("default").List(t.Context(), metav1.ListOptions{}); err != nil || len(list.Items) != 0 {
		t.Errorf("deployments after reset: %v, %v", list.Items, err)
	}
	if list, err := n.client.CoreV1().ConfigMaps("default").List(t.Context(), metav1.ListOptions{}); err != nil || len(list.Items) != 1 {
		t.Errorf("config maps after reset: %d, %v", len(list.Items), err)
	}
}

// What follows is how these tests look at the node and damage it.

// common is a file of the node's $SNAP_COMMON, as seen from here. Unlike a file below path it
// is not reached through links, which mean the host's own root.
func (n *node) common(file string) string {
	return filepath.Join(n.lab.Root(n.name), "var/snap/microk8s/common", file)
}

// usable waits until status says that the node can be used, which old reports do not make it
// say, and checks that the objects of the test are there.
func (n *node) usable(t *testing.T) {
	t.Helper()
	out, err := n.tryAll(t, "", "microk8s", "status", "--wait-ready", "--timeout", "90")
	if err != nil {
		t.Fatalf("the node cannot be used: %v\n%s", err, out)
	}
}

// fails runs a command that must fail with this exit code and say all of that.
func (n *node) fails(t *testing.T, code int, says []string, args ...string) {
	t.Helper()
	out, err := n.tryAll(t, "", args...)
	if exitCode(err) != code {
		t.Errorf("%s: %v, want exit code %d\n%s", strings.Join(args, " "), err, code, out)
		return
	}
	for _, s := range says {
		if !strings.Contains(out, s) {
			t.Errorf("%s does not say %q:\n%s", strings.Join(args, " "), s, out)
		}
	}
}

func (n *node) pid(t *testing.T, program string) string {
	t.Helper()
	return strings.TrimSpace(n.run(t, "pgrep", "-o", "-x", program))
}

func (n *node) supervisor(t *testing.T) string {
	t.Helper()
	return strings.TrimSpace(n.run(t, "pgrep", "-o", "-x", "supervisor"))
}

// nothingRuns reports whether processes of the node are left.
func (n *node) nothingRuns(t *testing.T) error {
	t.Helper()
	out := n.run(t, "ps", "-eo", "args")
	for _, p := range []string{"/web", "/pause", "kubelite", "containerd", "k8s-dqlite", "supervisor"} {
		if strings.Contains(out, p) {
			return fmt.Errorf("%s still runs:\n%s", p, out)
		}
	}
	return nil
}

// containers returns the ids of the running containers of the Deployment web.
func (n *node) containers(t *testing.T) []string {
	t.Helper()
	var ids []string
	pods, err := n.client.CoreV1().Pods("default").List(t.Context(), metav1.ListOptions{LabelSelector: "app=web"})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		for _, c := range p.Status.ContainerStatuses {
			ids = append(ids, c.ContainerID)
		}
	}
	slices.Sort(ids)
	return ids
}

// killAt runs a command and kills it with SIGKILL when it has printed that line.
func (n *node) killAt(t *testing.T, line string, args ...string) {
	t.Helper()
	r, w := io.Pipe()
	cmd, err := n.lab.Spawn(t.Context(), n.name, lab.Command{Args: args, Stdout: w, Stderr: w})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		ended <- cmd.Wait()
		w.Close()
	}()
	var said []string
	seen := false
	for s := bufio.NewScanner(r); s.Scan(); {
		said = append(said, s.Text())
		if s.Text() == line {
			seen = true
			_ = cmd.Process.Kill()
		}
	}
	<-ended
	if !seen {
		t.Fatalf("%s did not say %q:\n%s", strings.Join(args, " "), line, strings.Join(said, "\n"))
	}
}

// keep returns a function that puts a file back as it is now.
func (n *node) keep(t *testing.T, path string) (undo func()) {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, st.Mode().Perm()); err != nil {
			t.Fatal(err)
		}
	}
}

// edit changes the text of a file; undo puts it back.
func (n *node) edit(t *testing.T, path string, change func([]byte) []byte) (undo func()) {
	t.Helper()
	undo = n.keep(t, path)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, change(data), 0o660); err != nil {
		t.Fatal(err)
	}
	return undo
}

func (n *node) certificate(t *testing.T, file string) *x509.Certificate {
	t.Helper()
	data, err := os.ReadFile(n.path("certs/" + file))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := pki.ParseCert(data)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// reissue replaces server.crt by one that is the same and was issued at another time.
func (n *node) reissue(t *testing.T, at time.Time) *x509.Certificate {
	t.Helper()
	keyText, err := os.ReadFile(n.path("certs/ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := pki.ParseKey(keyText)
	if err != nil {
		t.Fatal(err)
	}
	old := n.certificate(t, "server.crt")
	der, err := pki.Maker{Now: func() time.Time { return at }}.Issue(pki.Request{
		Subject: old.Subject, DNSNames: old.DNSNames, IPs: old.IPAddresses, Days: 365, ServerAuth: true, ClientAuth: true,
	}, old.PublicKey, n.certificate(t, "ca.crt"), key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(n.path("certs/server.crt"), pki.EncodeCert(der), 0o660); err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// served is the certificate that the API server shows.
func (n *node) served(t *testing.T) (*x509.Certificate, error) {
	t.Helper()
	conn, err := n.lab.Dial(t.Context(), n.name, "tcp", "127.0.0.1:16443")
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	client := tls.Client(conn, &tls.Config{InsecureSkipVerify: true}) // it is looked at, not trusted
	if err := client.HandshakeContext(t.Context()); err != nil {
		return nil, err
	}
	return client.ConnectionState().PeerCertificates[0], nil
}

// until is eventually for what takes moments and must be seen at once.
func until(t *testing.T, f func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("not within a minute: %v", err)
		}
	}
}
