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
