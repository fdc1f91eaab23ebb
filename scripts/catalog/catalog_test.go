package catalog

import (
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

const root = "../.."

func TestTheTableAndTheModulesAgree(t *testing.T) {
	for _, err := range Check(root) {
		t.Error(err)
	}
	seen := map[string]bool{}
	for _, c := range Components {
		for _, key := range []string{c.Name, c.Title() + " as a row"} {
			if seen[key] {
				t.Errorf("two components are called %s", key)
			}
			seen[key] = true
		}
		for _, key := range c.Libraries {
			if _, err := LibraryOf(key); err != nil {
				t.Errorf("%s: %v", c.Name, err)
			}
		}
		if c.Licence == "" || c.Source == "" || c.Place == "" || (c.Place == Snap) != (c.Dir != "") {
			t.Errorf("%s: the entry is not complete", c.Name)
		}
	}
}

// TestRuleForModules: one name, one go line, no folder without an entry.
func TestRuleForModules(t *testing.T) {
	for name, tc := range map[string]struct{ folder, mod, want string }{
		"another name":      {"helm", "module microk8s/components/helm\n\ngo " + goLine + "\n", "the module is called microk8s/components/helm"},
		"another go line":   {"helm", "module " + ModulePrefix + "helm\n\ngo 1.26\n", "its go line is not go " + goLine},
		"inside of another": {"cert-manager", "module " + ModulePrefix + "cert-manager\n\ngo " + goLine + "\n", ", not github.com/cert-manager/cert-manager/cert-manager"},
		"not in the table":  {"other", "module " + ModulePrefix + "other\n\ngo " + goLine + "\n", `there is no component "other"`},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, Folder, tc.folder, "go.mod")
			if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, []byte(tc.mod), 0o644); err != nil {
				t.Fatal(err)
			}
			var all []string
			for _, err := range Check(dir) {
				all = append(all, err.Error())
			}
			if !strings.Contains(strings.Join(all, "\n"), tc.want) {
				t.Errorf("found %q, want %q among it", all, tc.want)
			}
		})
	}
}

// TestHelmActsAsTheKubernetesThatIsShipped: without these variables it is Kubernetes 1.20 to
// charts (pkg/chartutil, pkg/lint/rules of helm 3.22.0), since only its Makefile sets them.
func TestHelmActsAsTheKubernetesThatIsShipped(t *testing.T) {
	c, err := Find("helm")
	if err != nil {
		t.Fatal(err)
	}
	flags, err := c.Linker(root)
	if err != nil {
		t.Fatal(err)
	}
	kubernetes, err := Required(filepath.Join(root, "go.mod"), "k8s.io/kubernetes")
	if err != nil {
		t.Fatal(err)
	}
	minor := strings.Split(kubernetes, ".")[1]
	for _, pkg := range []string{"chartutil", "lint/rules"} {
		for _, want := range []string{".k8sVersionMajor=1 ", ".k8sVersionMinor=" + minor + " "} {
			if !strings.Contains(flags+" ", "-X helm.sh/helm/v3/pkg/"+pkg+want) {
				t.Errorf("%q lacks %s of %s", flags, want, pkg)
			}
		}
	}
}

var setAtLink = regexp.MustCompile(`-X[ =]'?"?([^\s='"]+)=`)

// TestVariablesOfTheirOwnBuilds reads how each module builds itself: a variable that is set
// there is set here too, or is in Unset with the reason.
func TestVariablesOfTheirOwnBuilds(t *testing.T) {
	for _, c := range Components {
		t.Run(c.Name, func(t *testing.T) {
			dir := moduleDir(t, c)
			decided := map[string]bool{}
			for _, v := range c.Variables {
				decided[path.Ext(v.Name)] = true
			}
			for name := range c.Unset {
				decided["."+name] = true
			}
			found := map[string]bool{}
			for _, pattern := range []string{"Makefile", "*.mk", "*.sh", "scripts/*", "hack/*.sh", ".goreleaser*", ".github/workflows/*"} {
				files, err := filepath.Glob(filepath.Join(dir, pattern))
				if err != nil {
					t.Fatal(err)
				}
				for _, file := range files {
					data, err := os.ReadFile(file)
					if err != nil {
						continue // a folder
					}
					for _, m := range setAtLink.FindAllStringSubmatch(string(data), -1) {
						found[path.Ext(m[1])] = true
					}
				}
			}
			for name := range found {
				if !decided[name] {
					t.Errorf("the build of %s sets %s at link time, and nothing here says what it is to be", c.Module, name[1:])
				}
			}
		})
	}
}

// moduleDir is the folder of the component's module in the cache of modules.
func moduleDir(t *testing.T, c Component) string {
	t.Helper()
	version, err := c.Version(root)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "mod", "download", "-json", c.Module+"@"+version)
	cmd.Dir = t.TempDir()
	out, err := cmd.Output()
	var got struct{ Dir string }
	if err != nil || json.Unmarshal(out, &got) != nil {
		t.Fatalf("%s %s: %v %s", c.Module, version, err, out)
	}
	return got.Dir
}

// TestKindsOfModules: the kinds that an addon brings are those of its module, with our annotation that keeps them.
func TestKindsOfModules(t *testing.T) {
	for name, files := range map[string]string{"metallb": "config/manifests/metallb-native.yaml", "cert-manager": "deploy/crds/*.yaml"} {
		c, err := Find(name)
		if err != nil {
			t.Fatal(err)
		}
		found, err := filepath.Glob(filepath.Join(moduleDir(t, c), files))
		if err != nil {
			t.Fatal(err)
		}
		theirs := map[string]any{}
		for _, file := range found {
			maps.Copy(theirs, definitions(t, file))
		}
		ours := definitions(t, filepath.Join(root, "addons/core/addons", name, "crds.yaml"))
		if len(theirs) == 0 || len(theirs) != len(ours) {
			t.Errorf("the module of %s has %d kinds, the addon %d", name, len(theirs), len(ours))
		}
		for kind, spec := range theirs {
			if !reflect.DeepEqual(spec, ours[kind]) {
				t.Errorf("%s is another one in the module", kind)
			}
		}
	}
}

// definitions returns the spec of each CustomResourceDefinition of a file.
func definitions(t *testing.T, path string) map[string]any {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]any{}
	// The one change of ours: AS numbers of MetalLB are int32 there, with a maximum that is none.
	text := regexp.MustCompile(`format: int32(\n +maximum: 4294967295)`).ReplaceAllString(string(data), "format: int64$1")
	for document := range strings.SplitSeq(text, "\n---\n") {
		var o struct {
			Kind     string
			Metadata struct{ Name string }
			Spec     any
		}
		if err := yaml.Unmarshal([]byte(document), &o); err != nil {
			t.Fatal(err)
		}
		if o.Kind == "CustomResourceDefinition" {
			out[o.Metadata.Name] = o.Spec
		}
	}
	return out
}
