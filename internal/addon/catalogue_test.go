package addon

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"microk8s/internal/snapenv"
)

func TestCatalogueOfTheProduct(t *testing.T) {
	all, _, err := Catalogue(snapenv.Env{Snap: "../.."})
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, a := range all {
		seen[a.Name] = true
		if a.Description == "" || a.CheckStatus == "" {
			t.Errorf("%s lacks a description or check_status", a.Name)
		}
		if _, ok := parts[a.Name]; ok == (a.Builtin != "" || a.Alias != "" || a.Source != "") {
			t.Errorf("%s: has manifests %v, is builtin %v, alias %q", a.Name, ok, a.Builtin != "", a.Alias)
		}
		if target := Target(all, a); target.Alias != "" {
			t.Errorf("%s is an alias of %q, which is none of the addons", a.Name, a.Alias)
		}
	}
	for name := range parts {
		if !seen[name] {
			t.Errorf("%s can be enabled and is not in addons.yaml", name)
		}
	}
	for _, name := range defaults {
		if _, ok := parts[name]; !ok {
			t.Errorf("the default addon %s cannot be enabled", name)
		}
	}
}

func TestFind(t *testing.T) {
	all := []Addon{
		{Repository: "core", Name: "dns"}, {Repository: "core", Name: "hostpath-storage"}, {Repository: "core", Name: "twice"},
		{Repository: "mine", Name: "web"}, {Repository: "mine", Name: "twice"},
	}
	for _, tc := range []struct {
		name, want, nearest string
		inferred, invalid   bool
		ambiguous, why      bool
	}{
		{name: "twice", ambiguous: true},
		{name: "mine/twice", want: "mine/twice"},
		{name: "minio", why: true},
		{name: "mine/metallb"},
		{name: "dns", want: "core/dns", inferred: true},
		{name: "core/dns", want: "core/dns"},
		{name: "mine/dns"},
		{name: "dsn", nearest: "dns"},
		{name: "hostpath-storag", nearest: "hostpath-storage"},
		{name: "x"},
		{name: "kubeflow"},
		{name: "a/b/c", invalid: true},
		{name: "", invalid: true},
		{name: "core/", invalid: true},
	} {
		a, inferred, err := Find(all, tc.name)
		var unknown *UnknownError
		var ambiguous *AmbiguousError
		switch {
		case tc.ambiguous:
			if !errors.As(err, &ambiguous) || !slices.Equal(ambiguous.Repositories, []string{"core", "mine"}) {
				t.Errorf("%q: %v", tc.name, err)
			}
		case tc.want != "":
			if err != nil || a.FullName() != tc.want || inferred != tc.inferred {
				t.Errorf("%q: %s, %v, %v", tc.name, a.FullName(), inferred, err)
			}
		case tc.invalid:
			if !errors.Is(err, errInvalidName) {
				t.Errorf("%q: %v", tc.name, err)
			}
		case !errors.As(err, &unknown):
			t.Errorf("%q: %v, want an unknown name", tc.name, err)
		case (unknown.Why != "") != tc.why:
			t.Errorf("%q: the reason is %q", tc.name, unknown.Why)
		case tc.name != "mine/dns" && tc.name != "minio" && unknown.Nearest != tc.nearest:
			t.Errorf("%q: nearest is %q, want %q", tc.name, unknown.Nearest, tc.nearest)
		}
	}
}

func TestDamagedCatalogue(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	if _, _, err := Catalogue(env); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a file: %v", err)
	}
	if err := os.MkdirAll(env.CoreAddons(), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(env.CoreAddons(), "addons.yaml"), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Catalogue(env); err == nil {
		t.Error("a damaged file is no error")
	}
}
