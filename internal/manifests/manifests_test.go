package manifests

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/kube/kubetest"
	"microk8s/internal/snapenv"
)

// node is a control-plane node with a cluster. Its helm is a stand-in that writes down what it is
// asked; the real one is called on real nodes (tests/node).
type node struct {
	*kubetest.Server
	t   *testing.T
	env snapenv.Env

	mu       sync.Mutex
	helm     []string
	fail     bool            // helm fails
	releases map[string]bool // that helm knows
	why      string
}

func newNode(t *testing.T) *node {
	n := &node{Server: kubetest.New(t), t: t, env: snapenv.Under(t.TempDir()), releases: map[string]bool{}}
	n.Set(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "kube-system", UID: "cluster one"}})
	if err := os.MkdirAll(n.env.UserManifests(), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(n.env.ManifestsState()), 0o755); err != nil {
		t.Fatal(err)
	}
	return n
}

func (n *node) controller() *Controller {
	return &Controller{
		Env: n.env, Config: n.Config(), Log: slog.New(slog.DiscardHandler),
		Report: func(why string) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.why = why
		},
		Helm: func(_ context.Context, stdin []byte, argv ...string) error {
			n.mu.Lock()
			defer n.mu.Unlock()
			if n.fail {
				return errors.New("helm fails")
			}
			i := slices.Index(argv, "--")
			switch argv[0] {
			case "upgrade":
				n.releases[argv[i+1]] = true
				n.helm = append(n.helm, fmt.Sprintf("%s %s: %s", strings.Join(argv[:i], " "), argv[i+1], stdin))
			case "status":
				if !n.releases[argv[i+1]] {
					return errors.New("release: not found")
				}
			default:
				delete(n.releases, argv[i+1])
				n.helm = append(n.helm, strings.Join(argv, " "))
			}
			return nil
		},
	}
}

// calls returns what helm was asked to change since the last time.
func (n *node) calls() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := n.helm
	n.helm = nil
	return out
}

func (n *node) write(name, text string) {
	n.t.Helper()
	if err := os.WriteFile(filepath.Join(n.env.UserManifests(), name), []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) delete(name string) {
	n.t.Helper()
	if err := os.Remove(filepath.Join(n.env.UserManifests(), name)); err != nil {
		n.t.Fatal(err)
	}
}

func configMap(name, value string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: %s}\ndata: {k: %q}\n---\n", name, value)
}

func path(name string) string { return "v1/namespaces/default/configmaps/" + name }

func (n *node) want(when string, objects ...string) {
	n.t.Helper()
	got := n.Paths("configmaps")
	slices.Sort(objects)
	if !slices.Equal(got, objects) {
		n.t.Errorf("%s: %q, want %q", when, got, objects)
	}
}

func TestFiles(t *testing.T) {
	n := newNode(t)
	n.Set(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "theirs"}})
	c := n.controller()
	sync := func(when string) {
		t.Helper()
		if err := c.sync(t.Context()); err != nil {
			t.Errorf("%s: %v", when, err)
		}
	}
	n.write("a.yaml", configMap("one", "1")+configMap("two", "2")+configMap("theirs", "mine"))
	n.write("b.json", `{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "three"}}`)
	n.write(".a.yaml.swp", "no YAML: {")
	n.write("notes.txt", "no manifest")
	sync("two files")
	n.want("two files", path("one"), path("two"), path("three"), path("theirs"))
	if v := n.Get(path("theirs")).Object["data"].(map[string]any)["k"]; v != "mine" {
		t.Errorf("an object that was there has %v", v)
	}

	n.write("a.yaml", configMap("one", "changed"))
	c = n.controller() // as after a restart
	sync("an object less")
	n.want("an object less", path("one"), path("three")) // the file has taken over what was there
	if v := n.Get(path("one")).Object["data"].(map[string]any)["k"]; v != "changed" {
		t.Errorf("a changed object has %v", v)
	}

	n.delete("a.yaml")
	sync("a file less")
	n.want("a file less", path("three"))

	// What is wrong with one file does not keep the others, and removes nothing.
	n.write("b.json", `{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "three"`)
	n.write("c.yaml", configMap("four", "4"))
	if err := c.sync(t.Context()); err == nil || !strings.Contains(err.Error(), "b.json: ") {
		t.Errorf("a file that is cut off: %v", err)
	}
	n.want("a file that is cut off", path("three"), path("four"))
	n.delete("b.json")
	sync("it is gone")
	n.want("it is gone", path("four"))

	// In another cluster nothing of this is there, and everything is applied.
	n.Set(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "kube-system", UID: "cluster two"}})
	n.Remove(path("four"))
	n.delete("c.yaml")
	n.write("d.yaml", configMap("theirs", "again"))
	sync("another cluster")
	n.want("another cluster", path("theirs"))
}

// archive is a chart, as `helm package` makes it.
func archive(t *testing.T, name, version string) []byte {
	t.Helper()
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	w := tar.NewWriter(z)
	text := fmt.Sprintf("apiVersion: v2\nname: %s\nversion: %s\n", name, version)
	err := w.WriteHeader(&tar.Header{Name: name + "/Chart.yaml", Mode: 0o644, Size: int64(len(text))})
	if err == nil {
		_, err = w.Write([]byte(text))
	}
	if err := errors.Join(err, w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestCharts(t *testing.T) {
	n := newNode(t)
	c := n.controller()
	want := func(when string, calls ...string) {
		t.Helper()
		if err := c.sync(t.Context()); err != nil {
			t.Errorf("%s: %v", when, err)
		}
		if got := n.calls(); !slices.Equal(got, calls) {
			t.Errorf("%s: helm is asked\n%q, want\n%q", when, got, calls)
		}
	}
	const upgrade = "upgrade --install --create-namespace --namespace "
	n.write("shop-1.0.0.tgz", string(archive(t, "shop", "1.0.0")))
	n.write("shop.values.yaml", "replicas: 2\n")
	n.write("web.yaml", "apiVersion: helm.cattle.io/v1\nkind: HelmChart\nmetadata: {name: web, namespace: kube-system}\n"+
		"spec: {chart: web, repo: 'https://charts.example.org', version: 1.2.3, targetNamespace: sites, valuesContent: 'a: 1'}\n---\n"+configMap("beside", "1"))
	want("two charts", upgrade+"default --values - shop: replicas: 2\n", upgrade+"sites --values - --repo https://charts.example.org --version 1.2.3 web: a: 1")
	n.want("an object beside a chart", path("beside"))
	want("nothing has changed")
	c = n.controller()
	want("after a restart")
	delete(n.releases, "web") // by reset
	c = n.controller()
	want("after a reset", upgrade+"sites --values - --repo https://charts.example.org --version 1.2.3 web: a: 1")
	n.write("shop.values.yaml", "replicas: 3\n")
	want("other values", upgrade+"default --values - shop: replicas: 3\n")
	n.write("web.yaml", "apiVersion: helm.cattle.io/v1\nkind: HelmChart\nmetadata: {name: web}\nspec: {set: {a.b: 2, c: x}, targetNamespace: sites, chartContent: "+
		base64.StdEncoding.EncodeToString(archive(t, "web", "2.0.0"))+"}\n")
	want("a chart within the file", upgrade+"sites --values - web: a:\n  b: 2\nc: x\n")
	n.want("no object any more")
	n.delete("web.yaml")
	want("a file less", "uninstall --ignore-not-found --namespace sites -- web")

	n.fail = true
	n.write("shop.values.yaml", "replicas: 4\n")
	if err := c.sync(t.Context()); err == nil || !strings.Contains(err.Error(), "shop-1.0.0.tgz: cannot install the chart shop: helm fails") {
		t.Errorf("helm fails: %v", err)
	}
	n.fail = false
	want("again", upgrade+"default --values - shop: replicas: 4\n")
	n.delete("shop-1.0.0.tgz")
	want("all gone", "uninstall --ignore-not-found --namespace default -- shop")
}

func TestBadCharts(t *testing.T) {
	for name, tc := range map[string]struct{ file, text, want string }{
		"no chart":            {"a.yaml", "spec: {version: 1.0.0}", "names no chart"},
		"a flag":              {"a.yaml", "spec: {chart: --post-renderer}", "which is no chart"},
		"a path":              {"a.yaml", "spec: {chart: /etc/passwd}", "name a file in"},
		"a path upwards":      {"a.yaml", "spec: {chart: ../../x.tgz}", "name a file in"},
		"a file that is gone": {"a.yaml", "spec: {chart: x.tgz}", "cannot read its chart"},
		"no base64":           {"a.yaml", "spec: {chartContent: '%%'}", "not base64"},
		"values":              {"a.yaml", "spec: {chart: x, repo: 'https://e', valuesContent: 'a: ['}", "valuesContent: "},
		"both values":         {"a.yaml", "spec: {chart: x, repo: 'https://e', valuesContent: 'a: 1', set: {a: 1}}", "both set and valuesContent"},
		"no archive":          {"a.tgz", "text", "it is no chart"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			text := tc.text
			if strings.HasSuffix(tc.file, ".yaml") {
				text = "apiVersion: helm.cattle.io/v1\nkind: HelmChart\nmetadata: {name: c}\n" + text
			}
			n.write(tc.file, text)
			err := n.controller().sync(t.Context())
			if err == nil || !strings.Contains(err.Error(), tc.file+": ") || !strings.Contains(err.Error(), tc.want) || len(n.calls()) > 0 {
				t.Errorf("error %v, want %q", err, tc.want)
			}
		})
	}
}

// TestRun follows the folder: nothing asks for a change to be seen.
func TestRun(t *testing.T) {
	n := newNode(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- n.controller().Run(ctx) }()
	until := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("never: " + what)
			}
		}
	}
	why := func() string {
		n.mu.Lock()
		defer n.mu.Unlock()
		return n.why
	}
	n.write("a.yaml", configMap("one", "1"))
	until("a new file is applied", func() bool { return n.Get(path("one")) != nil })
	n.write("b.yaml", "a: [")
	until("a wrong file is reported", func() bool { return strings.Contains(why(), "b.yaml") })
	n.delete("b.yaml")
	until("it is not reported any more", func() bool { return why() == "" })
	n.delete("a.yaml")
	until("what came from a file goes with it", func() bool { return n.Get(path("one")) == nil })
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
