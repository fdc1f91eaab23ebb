package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"microk8s/tests/lab"
	"microk8s/tests/lab/labtest"
)

// build is where `make build` leaves its results, from this folder.
const build = "../../build"

// cluster is a lab with hosts on which nothing is started yet.
type cluster struct {
	lab  *lab.Lab
	seed uint64
	rand *rand.Rand
	port string // of the agents

	written []string // what API servers have acknowledged: names of ConfigMaps
}

// newCluster makes a lab of the test's own. It goes away with the test; a failed one leaves the
// logs of every service behind.
func newCluster(t *testing.T, hosts ...string) *cluster {
	t.Helper()
	return newClusterOn(t, lab.Options{DefaultRoute: true}, hosts...)
}

// newClusterOn is newCluster on hosts of another kind.
func newClusterOn(t *testing.T, kind lab.Options, hosts ...string) *cluster {
	t.Helper()
	labtest.NeedRoot(t)
	snap := filepath.Join(build, "snap")
	if _, err := os.Stat(filepath.Join(snap, "bin/kubelite")); err != nil {
		t.Fatalf("%v; run `make build` first", err)
	}
	c := &cluster{lab: labtest.New(t, snap), seed: seed(t), port: "25000"}
	c.rand = rand.New(rand.NewPCG(c.seed, 0))
	t.Logf("seed %d (MICROK8S_TEST_SEED)", c.seed)
	for _, h := range hosts {
		labtest.Node(t, c.lab, h, kind)
	}
	return c
}

func seed(t *testing.T) uint64 {
	t.Helper()
	if text := os.Getenv("MICROK8S_TEST_SEED"); text != "" {
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	return 1
}

// steps returns a function that runs the parts of a story: a part that fails ends it, since what
// follows stands on it.
func steps(t *testing.T) func(name string, f func(t *testing.T)) {
	return func(name string, f func(t *testing.T)) {
		t.Helper()
		if !t.Run(name, f) {
			t.FailNow()
		}
	}
}

// result is what a command in a host did.
type result struct {
	out, err string // what it printed
	code     int    // exit code; 128 and the signal where one ended it
}

func (r result) String() string {
	return fmt.Sprintf("code %d\nstdout: %s\nstderr: %s", r.code, r.out, r.err)
}

// try runs a command that may fail.
func (c *cluster) try(t *testing.T, host string, args ...string) result {
	t.Helper()
	return c.tryContext(t.Context(), t, host, args...)
}

func (c *cluster) tryContext(ctx context.Context, t *testing.T, host string, args ...string) result {
	t.Helper()
	var out, errOut bytes.Buffer
	err := c.lab.Exec(ctx, host, lab.Command{Args: args, Stdout: &out, Stderr: &errOut})
	r := result{out: out.String(), err: errOut.String()}
	var exit *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &exit):
		r.code = exit.ExitCode()
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			r.code = 128 + int(ws.Signal())
		}
	default:
		t.Fatalf("%s: %v: %v", host, args, err)
	}
	return r
}

// run returns the standard output of a command that must succeed.
func (c *cluster) run(t *testing.T, host string, args ...string) string {
	t.Helper()
	r := c.try(t, host, args...)
	if r.code != 0 {
		t.Fatalf("%s: %s: %s", host, strings.Join(args, " "), r)
	}
	return r.out
}

// status asks a node how it is, and gives it time to say so: no test depends on the machine's speed.
func (c *cluster) status(t *testing.T, host string) result {
	t.Helper()
	return c.try(t, host, "env", "MICROK8S_STATUS_BUDGET=10s", "microk8s", "status")
}

// start starts a single node and waits until it is Ready.
func (c *cluster) start(t *testing.T, host string) {
	t.Helper()
	c.run(t, host, "microk8s", "start")
	c.waitReady(t, host, host)
}

// line returns what add-node prints on a node, as words to type: the first line with the agent's
// port in it, as upstream's own tests take it.
func (c *cluster) line(t *testing.T, host string, flags ...string) []string {
	t.Helper()
	out := c.run(t, host, append([]string{"microk8s", "add-node"}, flags...)...)
	for text := range strings.Lines(out) {
		if strings.Contains(text, ":"+c.port+"/") {
			return strings.Fields(text)
		}
	}
	t.Fatalf("add-node printed no line:\n%s", out)
	return nil
}

// lineTo is line with another address in it: of a balancer, or of who poses as the node.
func (c *cluster) lineTo(t *testing.T, address, host string, flags ...string) []string {
	t.Helper()
	words := c.line(t, host, flags...)
	_, secret, _ := strings.Cut(words[2], "/")
	words[2] = address + "/" + secret
	return words
}

// join types a fresh line.
func (c *cluster) join(t *testing.T, from, host string, flags ...string) {
	t.Helper()
	began := time.Now()
	c.run(t, host, append(c.line(t, from), flags...)...)
	t.Logf("%s joined in %s", host, time.Since(began).Round(100*time.Millisecond))
}

// client talks to a node's API server as its administrator; connections begin inside the host.
func (c *cluster) client(t *testing.T, host string) *kubernetes.Clientset {
	t.Helper()
	k, err := c.tryClient(host)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (c *cluster) tryClient(host string) (*kubernetes.Clientset, error) {
	data, err := os.ReadFile(c.path(host, "credentials/client.config"))
	if err != nil {
		return nil, err
	}
	cfg, err := clientcmd.RESTConfigFromKubeConfig(data)
	if err != nil {
		return nil, err
	}
	cfg.QPS, cfg.Timeout = -1, 15*time.Second
	cfg.Dial = c.dialer(host)
	return kubernetes.NewForConfig(cfg)
}

// dialer makes connections that begin inside a host.
func (c *cluster) dialer(host string) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		return c.lab.Dial(ctx, host, network, address)
	}
}

// path is a file of a node's $SNAP_DATA, as seen from here.
func (c *cluster) path(host, file string) string {
	return filepath.Join(c.lab.Root(host), "var/snap/microk8s/current", file)
}

// real is path, with the datastore's folder where it really is: the link to it is for the host.
func (c *cluster) real(host, file string) string {
	if rest, ok := strings.CutPrefix(file, "var/kubernetes/backend/"); ok {
		return filepath.Join(c.lab.Root(host), "var/snap/microk8s/common/var/kubernetes/backend", rest)
	}
	return c.path(host, file)
}

func (c *cluster) ip(t *testing.T, host string) string {
	t.Helper()
	ip, err := c.lab.IP(host)
	if err != nil {
		t.Fatal(err)
	}
	return ip
}

// node returns a Node object as an API server has it.
func (c *cluster) node(t *testing.T, at, name string) (*corev1.Node, error) {
	k, err := c.tryClient(at)
	if err != nil {
		return nil, err
	}
	return k.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
}

func isReady(n *corev1.Node) bool {
	return slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
}

// waitReady waits until the API server of one node says that another (or the same) is Ready.
func (c *cluster) waitReady(t *testing.T, at, name string) {
	t.Helper()
	eventually(t, 3*time.Minute, func() error {
		n, err := c.node(t, at, name)
		if err != nil {
			return err
		}
		if !isReady(n) {
			return fmt.Errorf("%s is not Ready: %v", name, n.Status.Conditions)
		}
		return nil
	})
}

// nodes lists the names that an API server knows.
func (c *cluster) nodes(t *testing.T, at string) []string {
	t.Helper()
	list, err := c.client(t, at).CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, n := range list.Items {
		names = append(names, n.Name)
	}
	slices.Sort(names)
	return names
}

func (c *cluster) wantNodes(t *testing.T, at string, want ...string) {
	t.Helper()
	if got := c.nodes(t, at); !slices.Equal(got, want) {
		t.Errorf("nodes at %s: %v, want %v", at, got, want)
	}
}

// webImage is built from tests/images/web; nodes could not pull it from anywhere.
const webImage = "microk8s.test/web:1"

func (c *cluster) loadWebImage(t *testing.T, host string) {
	t.Helper()
	image, err := os.Open(filepath.Join(build, "test-images/web.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	var out bytes.Buffer
	if err := c.lab.Exec(t.Context(), host, lab.Command{Args: []string{"microk8s", "ctr", "images", "import", "-"}, Stdin: image, Stdout: &out, Stderr: &out}); err != nil {
		t.Fatalf("cannot import the test image: %v\n%s", err, &out)
	}
}

// httpGet asks from inside a host.
func (c *cluster) httpGet(host, url string) (string, error) {
	client := &http.Client{
		Timeout: 5 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true, // each request is balanced again
			DialContext:       c.dialer(host),
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
	return strings.TrimSpace(string(body)), err
}

// mark leaves something in a cluster that shows whose data it is.
func (c *cluster) mark(t *testing.T, host, text string) {
	t.Helper()
	k := c.client(t, host)
	cm := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "mark"}, Data: map[string]string{"mark": text}}
	eventually(t, time.Minute, func() error {
		_, err := k.CoreV1().ConfigMaps("default").Create(t.Context(), cm, metav1.CreateOptions{})
		return err
	})
}

// wantMark checks that a node still has the data it had, "" for none.
func (c *cluster) wantMark(t *testing.T, host, want string) {
	t.Helper()
	eventually(t, time.Minute, func() error {
		k, err := c.tryClient(host)
		if err != nil {
			return err
		}
		cm, err := k.CoreV1().ConfigMaps("default").Get(t.Context(), "mark", metav1.GetOptions{})
		switch {
		case err == nil && cm.Data["mark"] == want:
			return nil
		case err == nil:
			return fmt.Errorf("%s has the data of %q, want %q", host, cm.Data["mark"], want)
		case want == "" && strings.Contains(err.Error(), "not found"):
			return nil
		}
		return err
	})
}

// eventually waits for f with a limit that only broken things reach.
func eventually(t *testing.T, limit time.Duration, f func() error) {
	t.Helper()
	labtest.Eventually(t, limit, f)
}
