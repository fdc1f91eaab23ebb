package snap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"microk8s/tests/lab/labtest"
)

// build is where `make snap` leaves its results, from this folder.
const build = "../../build"

// instance is the name of this test's set of machines: always the same, so that the next run
// removes what a killed one left.
const instance = "snaptest"

// machine is a nested machine with a real snapd.
type machine struct {
	name    string
	scratch string // a directory of this machine, /mnt/scratch inside
	config  *rest.Config
	client  *kubernetes.Clientset
}

func snapdHost(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "./snapd-host", args...)
	cmd.Env = append(os.Environ(), "SNAPD_HOST_INSTANCE="+instance)
	return cmd
}

// prepare builds what machines are made of, and removes those of an earlier run. Where this
// machine cannot have any it says what is missing; on CI that is a failure.
func prepare(t *testing.T) {
	t.Helper()
	labtest.NeedRoot(t)
	if out, err := snapdHost(t.Context(), "check").CombinedOutput(); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("%v\n%s", err, out)
		}
		t.Skipf("no machine with snapd can be made here:\n%s", out)
	}
	began := time.Now()
	for _, args := range [][]string{{"build"}, {"clean"}} {
		if out, err := snapdHost(t.Context(), args...).CombinedOutput(); err != nil {
			t.Fatalf("snapd-host %s: %v\n%s", args[0], err, out)
		}
	}
	t.Logf("the machines' root took %s", time.Since(began).Round(time.Second))
}

// newMachine starts a machine that goes away with the test. A failed test leaves its journal
// and snapd's changes in build/test-logs.
func newMachine(t *testing.T, name string) *machine {
	t.Helper()
	m := &machine{name: name, scratch: t.TempDir()}
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		if t.Failed() {
			m.keepLogs(ctx, t)
			if os.Getenv("KEEP") != "" {
				t.Logf("kept: SNAPD_HOST_INSTANCE=%s tests/snap/snapd-host shell %s", instance, name)
				return
			}
		}
		if out, err := snapdHost(ctx, "rm", name).CombinedOutput(); err != nil {
			t.Errorf("snapd-host rm: %v\n%s", err, out)
		}
	})
	m.up(t)
	return m
}

func (m *machine) up(t *testing.T) {
	t.Helper()
	root, err := filepath.Abs(build)
	if err != nil {
		t.Fatal(err)
	}
	// What the machine writes goes to a file, not to a pipe that it would hold open.
	log, err := os.Create(filepath.Join(m.scratch, "up.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := snapdHost(context.WithoutCancel(t.Context()), "up", m.name, "--writable-sysctl", "--bind", root+":/mnt/build", "--bind", m.scratch+":/mnt/scratch")
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Run(); err != nil {
		out, _ := os.ReadFile(log.Name())
		t.Fatalf("snapd-host up: %v\n%s", err, out)
	}
}

func (m *machine) reboot(t *testing.T, how string) {
	t.Helper()
	if out, err := snapdHost(t.Context(), how, m.name).CombinedOutput(); err != nil {
		t.Fatalf("snapd-host %s: %v\n%s", how, err, out)
	}
	m.up(t)
}

// run returns the standard output of a command inside, as root, which must succeed.
func (m *machine) run(t *testing.T, args ...string) string {
	t.Helper()
	return m.runIn(t, nil, args...)
}

func (m *machine) runIn(t *testing.T, stdin io.Reader, args ...string) string {
	t.Helper()
	var out, errOut bytes.Buffer
	cmd := snapdHost(t.Context(), append([]string{"exec", m.name}, args...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errOut
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(args, " "), err, &out, &errOut)
	}
	return out.String()
}

// try returns standard output and error of a command that may fail, and its exit code.
func (m *machine) try(t *testing.T, args ...string) (string, int) {
	t.Helper()
	out, err := snapdHost(t.Context(), append([]string{"exec", m.name}, args...)...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if exit != nil {
		return string(out), exit.ExitCode()
	}
	return string(out), 0
}

func (m *machine) keepLogs(ctx context.Context, t *testing.T) {
	dir := filepath.Join(build, "test-logs", t.Name(), m.name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Log(err)
		return
	}
	for file, script := range map[string]string{
		"journal":  "journalctl --no-pager -o short-precise",
		"snapd":    "snap list --all; snap services; snap changes; for i in $(snap changes | awk '$2==\"Error\"{print $1}'); do snap change $i; done",
		"microk8s": "microk8s status; microk8s kubectl get pods -A -o wide; microk8s kubectl get events -A",
	} {
		out, _ := snapdHost(ctx, "exec", m.name, "bash", "-c", script).CombinedOutput()
		if err := os.WriteFile(filepath.Join(dir, file), out, 0o644); err != nil {
			t.Log(err)
		}
	}
	t.Logf("logs of %s are in %s", m.name, dir)
}

// connect makes the admin's client, whose connections begin inside the machine.
func (m *machine) connect(t *testing.T) {
	t.Helper()
	var err error
	m.config, err = clientcmd.RESTConfigFromKubeConfig([]byte(m.run(t, "cat", "/var/snap/microk8s/current/credentials/client.config")))
	if err != nil {
		t.Fatal(err)
	}
	m.config.QPS = -1
	m.config.Timeout = 10 * time.Second
	m.config.Dial = m.dial
	if m.client, err = kubernetes.NewForConfig(m.config); err != nil {
		t.Fatal(err)
	}
}

// dial connects from inside the machine's network.
func (m *machine) dial(ctx context.Context, network, address string) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		ns, err := os.Open("/run/netns/" + instance + "-" + m.name)
		if err != nil {
			done <- result{nil, err}
			return
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- result{nil, err}
			return
		}
		// One literal address is dialled on the calling goroutine, which this relies on.
		d := net.Dialer{FallbackDelay: -1}
		conn, err := d.DialContext(ctx, network, address)
		done <- result{conn, err}
	}()
	r := <-done
	return r.conn, r.err
}

// waitReady waits until the node has been Ready within the last heartbeats and runs version.
func (m *machine) waitReady(t *testing.T) {
	t.Helper()
	since := time.Now()
	eventually(t, 3*time.Minute, func() error {
		node, err := m.client.CoreV1().Nodes().Get(t.Context(), m.name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range node.Status.Conditions {
			if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("the node is not Ready after %s", time.Since(since).Round(time.Second))
	})
}

// eventually waits for f with a limit that only broken things reach.
func eventually(t *testing.T, limit time.Duration, f func() error) {
	t.Helper()
	labtest.Eventually(t, limit, f)
}
