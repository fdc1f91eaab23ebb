package addon

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

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

// TestFetchingFromASilentServer clones from a server that takes connections and says nothing.
func TestFetchingFromASilentServer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") // the kernel accepts for it, as for a frozen process
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	env := snapenv.Under(t.TempDir())
	if err := os.MkdirAll(env.AddonRepositories(), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, scheme := range []string{"http", "git"} {
		source := scheme + "://" + l.Addr().String() + "/addons"
		r := &Repositories{Env: env, Out: io.Discard, Err: io.Discard, Stall: 500 * time.Millisecond}
		err := r.Add(t.Context(), "others", source, "", false)
		if err == nil || !strings.Contains(err.Error(), source+" brought nothing for 500ms") {
			t.Errorf("%s: %v", scheme, err)
		}
	}
	if left, _ := os.ReadDir(env.AddonRepositories()); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestProgressLines leaves git's progress out where nobody watches, and nothing else.
func TestProgressLines(t *testing.T) {
	const said = "Cloning into 'x'...\nremote: Counting objects:  50% (1/2)\rremote: Counting objects: 100% (2/2), done.  \nwarning: a\nfatal: b\n"
	for all, want := range map[bool]string{true: said, false: "Cloning into 'x'...\nwarning: a\nfatal: b\n"} {
		var out strings.Builder
		p := &progressLines{w: &out, all: all, seen: func() {}}
		for i := range len(said) { // in pieces
			if _, err := p.Write([]byte(said[i : i+1])); err != nil {
				t.Fatal(err)
			}
		}
		if out.String() != want {
			t.Errorf("%t: %q", all, out.String())
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
		{"deployment.apps/thing ", "deployment.apps", true},
	} {
		if got := mayBeIn(tc.check, tc.kind); got != tc.want {
			t.Errorf("%q in %s: %v", tc.check, tc.kind, got)
		}
	}
}

// TestCheckStatusWithBlank has names that begin with another's: with a blank behind it a check_status means the
// whole name, as in the table of kubectl that upstream searches.
func TestCheckStatusWithBlank(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	get := func(_ context.Context, path string, into *metav1.PartialObjectMetadataList) error {
		if path == rows["deployment.apps"] {
			into.Items = []metav1.PartialObjectMetadata{{ObjectMeta: metav1.ObjectMeta{Name: "thing-agent"}}, {ObjectMeta: metav1.ObjectMeta{Name: "other"}}}
		}
		return nil
	}
	for check, want := range map[string]bool{
		"deployment.apps/thing ": false, "deployment.apps/thing": true, "deployment.apps/other ": true, "thing-agent ": true, "deployment.apps/agent": false,
	} {
		a := Addon{Repository: "t", Name: "x", CheckStatus: check}
		on, err := CheckForeign(t.Context(), env, get, []Addon{a})
		if err != nil || on["t/x"] != want {
			t.Errorf("check_status %q: %v, %v; want %v", check, on["t/x"], err, want)
		}
	}
}
