package addon

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"microk8s/internal/snapenv"
)

const goodYAML = `microk8s-addons:
  addons:
    - {name: x, description: d, version: "1", check_status: pod/x, supported_architectures: [amd64, arm64]}
`

func TestValidate(t *testing.T) {
	for _, tc := range []struct{ name, yaml, err string }{
		{"good", goodYAML, ""},
		{"none", "", "does not contain an addons.yaml file"},
		{"no yaml", "a: [", "Yaml format error in addons.yaml file: "},
		{"something else", "other: 1", "Invalid addons.yaml file: 'microk8s-addons'"},
		{"no list", "microk8s-addons: {addons: 3}", "'addons' is a required property"},
		{"number", strings.Replace(goodYAML, `"1"`, "1.0", 1), "1 is not of type 'string', for 'version'"},
		{"missing", strings.Replace(goodYAML, "check_status: pod/x, ", "", 1), "'check_status' is a required property of addon 1"},
		{"architecture", strings.Replace(goodYAML, "arm64", "armhf", 1), "armhf is not one of"},
		{"way out", strings.Replace(goodYAML, "name: x", "name: ../x", 1), "is not a valid name of an addon"},
		{"no hook", strings.Replace(goodYAML, "name: x", "name: z", 1), "Missing enable hook for z addon"},
	} {
		dir := t.TempDir()
		if tc.yaml != "" {
			if err := os.WriteFile(filepath.Join(dir, "addons.yaml"), []byte(tc.yaml), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		hooks := filepath.Join(dir, "addons/x")
		if err := os.MkdirAll(hooks, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, verb := range []string{"enable", "disable"} {
			if err := os.WriteFile(filepath.Join(hooks, verb), nil, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		err := Validate(dir)
		if tc.err == "" && err != nil || tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
			t.Errorf("%s: %v, want %q", tc.name, err, tc.err)
		}
		if tc.err == "" {
			if err := os.Chmod(filepath.Join(hooks, "disable"), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := Validate(dir); err == nil || err.Error() != "disable hook for x addon needs execute permissions" {
				t.Errorf("a hook that is not executable: %v", err)
			}
		}
	}
}

func TestForeignChecks(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	file, ok := statusFile(env, "${SNAP_DATA}/var/lock/x")
	if !ok || file != env.Lock("x") {
		t.Errorf("the file is %q, %v", file, ok)
	}
	for _, tc := range []struct {
		check, kind string
		want        bool
	}{
		{"pod/speaker", "pod", true},
		{"pod/speaker", "service", false},
		{"deployment.apps/x", "deployment.apps", true},
		{"apps/x", "deployment.apps", true},
		{"operator-node-feature-discovery", "service", true},
		{"", "pod", false},
	} {
		if got := mayBeIn(tc.check, tc.kind); got != tc.want {
			t.Errorf("%q in %s: %v", tc.check, tc.kind, got)
		}
	}
}
