package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"microk8s/scripts/catalog"
)

// repository is a small one with a component "tool" whose module, example.test/dep, is beside it.
func repository(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range map[string]string{
		"go.mod":                             "module x\n\ngo 1.26\n\nrequire k8s.io/kubernetes v1.37.1\n",
		"scripts/components/tool/go.mod":     "module " + catalog.ModulePrefix + "tool\n\ngo 1.26\n\nrequire example.test/dep v1.2.3\n\nreplace example.test/dep => ./dep\n",
		"scripts/components/tool/main.go":    "package main\n\nimport \"example.test/dep\"\n\nfunc main() { println(dep.Version, dep.Minor) }\n",
		"scripts/components/tool/dep/go.mod": "module example.test/dep\n\ngo 1.26\n",
		"scripts/components/tool/dep/dep.go": "package dep\n\nvar Version, Minor = \"unset\", \"unset\"\n",
	} {
		write(t, filepath.Join(root, name), text)
	}
	return root
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func tool() catalog.Component {
	return catalog.Component{
		Name: "tool", Module: "example.test/dep", Place: catalog.Snap, Dir: "bin",
		Variables: []catalog.Variable{{Name: "example.test/dep.Version", Value: "{number}"}, {Name: "example.test/dep.Minor", Value: "{minor}"}},
	}
}

func bring(t *testing.T, root string, c catalog.Component) error {
	t.Helper()
	b, err := newBuild(root, c)
	if err != nil {
		t.Fatal(err)
	}
	return b.bring()
}

func TestBuildsWhatChanged(t *testing.T) {
	root := repository(t)
	program := filepath.Join(root, "build/components/bin/tool")
	says := func(want string) {
		t.Helper()
		out, err := exec.Command(program).CombinedOutput()
		if err != nil || strings.TrimSpace(string(out)) != want {
			t.Errorf("the program says %q, %v; want %q", out, err, want)
		}
	}
	old := time.Unix(1000000000, 0)
	for _, step := range []struct {
		name    string
		change  func()
		says    string
		rebuilt bool
	}{
		{"first", func() {}, "1.2.3 37", true},
		{"nothing changed", func() {}, "1.2.3 37", false},
		{"a test file", func() { write(t, filepath.Join(root, "scripts/components/tool/main_test.go"), "package main\n") }, "1.2.3 37", false},
		{"Kubernetes", func() {
			write(t, filepath.Join(root, "go.mod"), "module x\n\ngo 1.26\n\nrequire k8s.io/kubernetes v1.38.0\n")
		}, "1.2.3 38", true},
		{"the source", func() {
			write(t, filepath.Join(root, "scripts/components/tool/main.go"), "package main\n\nimport \"example.test/dep\"\n\nfunc main() { println(dep.Version) }\n")
		}, "1.2.3", true},
		{"the program was lost", func() { os.Remove(program) }, "1.2.3", true},
	} {
		step.change()
		_ = os.Chtimes(program, old, old) // not there at first
		if err := bring(t, root, tool()); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		says(step.says)
		fi, err := os.Stat(program)
		if err != nil {
			t.Fatal(err)
		}
		if rebuilt := !fi.ModTime().Equal(old); rebuilt != step.rebuilt {
			t.Errorf("%s: built again is %v, want %v", step.name, rebuilt, step.rebuilt)
		}
	}
}

// TestVariableThatIsNotThere: the linker would say nothing.
func TestVariableThatIsNotThere(t *testing.T) {
	c := tool()
	c.Variables[0].Name = "example.test/dep.version"
	err := bring(t, repository(t), c)
	if err == nil || !strings.Contains(err.Error(), "dep.version") {
		t.Errorf("error is %v", err)
	}
}

// TestVendoredModuleMustBeWhatItWas uses a module that the product has anyway.
func TestVendoredModuleMustBeWhatItWas(t *testing.T) {
	c := tool()
	version, err := catalog.Required("../../go.mod", "golang.org/x/sync")
	if err != nil {
		t.Fatal(err)
	}
	c.Vendored = []catalog.Vendored{{Module: "golang.org/x/sync", Version: version, Sum: "h1:of another one", Dir: "sync"}}
	root := repository(t)
	if err := bring(t, root, c); err == nil || !strings.Contains(err.Error(), "has the sum h1:") {
		t.Errorf("error is %v", err)
	}
	if _, err := os.Stat(filepath.Join(root, "build/components/src/sync")); err == nil {
		t.Error("it was copied all the same")
	}
}

// TestReadyAndLater holds that what is built before a node runs and what is built afterwards is all that is
// shipped, and that a node gets its runtime, its network and the addon that a first start enables before.
func TestReadyAndLater(t *testing.T) {
	names := func(of ...string) []string {
		chosen, err := choose(of)
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, c := range chosen {
			out = append(out, c.Name)
		}
		slices.Sort(out)
		return out
	}
	if both, all := names("ready", "later"), names(); !slices.Equal(both, all) {
		t.Errorf("both are %v, all is %v", both, all)
	}
	ready := names("ready")
	for _, needed := range []string{"cni", "containerd", "coredns", "runc"} {
		if !slices.Contains(ready, needed) {
			t.Errorf("a node does not become Ready without %s", needed)
		}
	}
	if _, err := choose([]string{"nothing"}); err == nil {
		t.Error("chose a component that there is not")
	}
}

// TestChangedCopiesAreOfTheVersionInUse: a component of which a changed copy is built is pinned in two places, and
// the kinds of Traefik travel with the addon.
func TestChangedCopiesAreOfTheVersionInUse(t *testing.T) {
	for _, c := range catalog.Components {
		for _, v := range c.Vendored {
			version, err := catalog.Required(filepath.Join(c.Name, "go.mod"), v.Module)
			if err != nil || version != v.Version {
				t.Errorf("%s: the changed copy of %s is %s, its go.mod wants %s, %v", c.Name, v.Module, v.Version, version, err)
			}
			if v.Module != c.Module || c.Name != "traefik" {
				continue
			}
			kinds, err := os.ReadFile("../../addons/core/addons/ingress/kinds.yaml")
			if err != nil || !strings.HasPrefix(string(kinds), "# The kinds of Traefik "+v.Version+" ") {
				t.Errorf("kinds.yaml is not of %s: %v", v.Version, err)
			}
		}
	}
}

// TestBodiesFlow runs the change of Traefik's entry point in a server: a body may take longer than the limit as long as
// it flows, and ends where it stalls.
func TestBodiesFlow(t *testing.T) {
	source, err := os.ReadFile("traefik/flowing.go.txt")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write(t, filepath.Join(dir, "go.mod"), "module example.test/server\n\ngo 1.26\n")
	write(t, filepath.Join(dir, "flowing.go"), string(source))
	write(t, filepath.Join(dir, "flowing_test.go"), `package server

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

const pause = 300 * time.Millisecond

func upload(t *testing.T, parts int, wait time.Duration) string {
	t.Helper()
	server := httptest.NewUnstartedServer(flowing(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil {
			w.WriteHeader(http.StatusRequestTimeout)
		}
		fmt.Fprint(w, n)
	}), pause))
	server.Config.ReadHeaderTimeout = pause
	server.Start()
	defer server.Close()
	conn, err := net.Dial("tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for range 2 { // on one connection: no deadline is left of the first
		fmt.Fprint(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n")
		for range parts {
			time.Sleep(wait)
			fmt.Fprint(conn, "ab")
		}
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != 200 {
			return resp.Status + " " + string(body)
		}
	}
	return "200"
}

func TestFlows(t *testing.T) {
	if got := upload(t, 10, pause/5); got != "200" { // twice the limit in all
		t.Error(got)
	}
}

func TestStalls(t *testing.T) {
	if got := upload(t, 3, 0); got != "408 Request Timeout 6" {
		t.Error(got)
	}
}
`)
	cmd := exec.CommandContext(t.Context(), "go", "test", "-count=1", ".")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=", "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
