package node

import (
	"bytes"
	"context"
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

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"microk8s/tests/lab"
	"microk8s/tests/lab/hoststate"
	"microk8s/tests/lab/labtest"
)

// build is where `make build` leaves its results, from this folder.
const build = "../../build"

// node is one lab host with the product started on it.
type node struct {
	lab    *lab.Lab
	name   string
	config *rest.Config
	client *kubernetes.Clientset
	before hoststate.State // of the machine, before the lab
}

// newNode makes a lab of the test's own with the host n1 and others, on which nothing is
// started. It goes away with the test; a failed one leaves the logs of every service behind.
func newNode(t *testing.T, others ...string) *node {
	t.Helper()
	labtest.NeedRoot(t)
	snap := filepath.Join(build, "snap")
	if _, err := os.Stat(filepath.Join(snap, "bin/kubelite")); err != nil {
		t.Fatalf("%v; run `make build` first", err)
	}
	n := &node{name: "n1", lab: labtest.New(t, snap)}
	n.before = hoststate.Take(t, n.lab.Instance())
	for _, host := range append([]string{n.name}, others...) {
		labtest.Node(t, n.lab, host, lab.Options{})
	}
	return n
}

// steps returns a function that runs the parts of a story: a part that fails ends it, since
// what follows stands on it.
func (n *node) steps(t *testing.T) func(name string, f func(t *testing.T)) {
	return func(name string, f func(t *testing.T)) {
		t.Helper()
		if !t.Run(name, f) {
			t.FailNow()
		}
	}
}

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

// copyWebImage puts the archive of the test image into the host, as /web.tar.
func (n *node) copyWebImage(t *testing.T) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(build, "test-images/web.tar"))
	if err == nil {
		err = os.WriteFile(filepath.Join(n.lab.Root(n.name), "web.tar"), data, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// httpGet asks from inside the named host.
func (n *node) httpGet(t *testing.T, host, url string) (string, error) {
	t.Helper()
	client := &http.Client{
		Timeout: 5 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true, // each request is balanced again
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

// run returns the standard output of a command in the host, which must succeed.
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

// tryAll returns standard output and error together.
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

// eventually waits for f with a limit that only broken things reach.
func eventually(t *testing.T, limit time.Duration, f func() error) {
	t.Helper()
	labtest.Eventually(t, limit, f)
}

func ptr[T any](v T) *T { return &v }
