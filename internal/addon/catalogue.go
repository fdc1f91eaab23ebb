package addon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"microk8s/internal/snapenv"
)

// CoreRepository is the name of the repository that is part of the product.
const CoreRepository = "core"

// Addon is one entry of an addons.yaml.
type Addon struct {
	Repository    string   `json:"-"`
	Name          string   `json:"name"`
	Description   string   `json:"description"`
	Version       string   `json:"version"`
	CheckStatus   string   `json:"check_status"`
	Architectures []string `json:"supported_architectures"`
	Confinement   string   `json:"confinement"`

	// Builtin is not empty for what is part of every node and can be neither enabled nor
	// disabled; it says so in a sentence.
	Builtin string `json:"builtin"`

	// Alias names the addon that this one is another, deprecated, name of.
	Alias string `json:"alias"`

	// Images are those that are not in the snap but in a pack, by full name; Online, by the names of the
	// containers that use them or of the arguments that name them, are the images of registries that do the same.
	Images []string          `json:"images"`
	Online map[string]string `json:"online"`

	// Source is where the repository is that this addon stands for; "" for all others. Enabling the addon adds it.
	Source string `json:"source"`

	dir string
}

// FullName is repository/name.
func (a Addon) FullName() string { return a.Repository + "/" + a.Name }

// Hook is the program that enables or disables an addon of a person's own repository; it is ""
// for core addons, which have none.
func (a Addon) Hook(verb string) string {
	if a.Repository == CoreRepository {
		return ""
	}
	return filepath.Join(a.dir, verb)
}

// confinement is how the product is confined; addons for another confinement are not there.
const confinement = "classic"

// Catalogue lists the addons that this machine can have, those of the product and those of the
// repositories that people have added, by repository and name. broken are the repositories
// that could not be read, err is about the product's own.
func Catalogue(env snapenv.Env) (all []Addon, broken []error, err error) {
	core, err := readRepository(CoreRepository, env.CoreAddons())
	if err != nil {
		return nil, nil, err
	}
	all = core.usable()
	for _, name := range repositoryNames(env) {
		r, err := readRepository(name, env.AddonRepository(name))
		if err != nil {
			broken = append(broken, err)
			continue
		}
		all = append(all, r.usable()...)
	}
	slices.SortFunc(all, func(x, y Addon) int {
		if c := strings.Compare(x.Repository, y.Repository); c != 0 {
			return c
		}
		return strings.Compare(x.Name, y.Name)
	})
	return all, broken, nil
}

// repositoryNames lists the repositories that people have added.
func repositoryNames(env snapenv.Env) []string {
	entries, _ := os.ReadDir(env.AddonRepositories())
	var out []string
	for _, e := range entries {
		if e.IsDir() && e.Name() != CoreRepository && !strings.HasPrefix(e.Name(), ".") {
			out = append(out, e.Name())
		}
	}
	return out
}

// metadata is an addons.yaml.
type metadata struct {
	Description string  `json:"description"`
	Addons      []Addon `json:"addons"`
}

func readRepository(name, dir string) (metadata, error) {
	path := filepath.Join(dir, "addons.yaml")
	data, err := os.ReadFile(path)
	if err != nil {
		return metadata{}, fmt.Errorf("could not load addons from %s: %w", dir, err)
	}
	var file struct {
		Top metadata `json:"microk8s-addons"`
	}
	if err := yaml.Unmarshal(data, &file); err != nil {
		return metadata{}, fmt.Errorf("could not load addons from %s: %w", path, err)
	}
	for i := range file.Top.Addons {
		a := &file.Top.Addons[i]
		a.Repository, a.dir = name, filepath.Join(dir, "addons", a.Name)
		if name != CoreRepository {
			a.Builtin, a.Alias, a.Source, a.Images, a.Online = "", "", "", nil, nil // keys of ours, which may mean something else there
		}
	}
	return file.Top, nil
}

// usable returns the addons for this machine.
func (m metadata) usable() []Addon {
	var out []Addon
	for _, a := range m.Addons {
		if slices.Contains(a.Architectures, runtime.GOARCH) && (a.Confinement == "" || strings.Contains(a.Confinement, confinement)) {
			out = append(out, a)
		}
	}
	return out
}

// UnknownError is a name that no repository has.
type UnknownError struct {
	Name    string
	Nearest string // the addon that may have been meant, or ""
	Why     string // why the product does not offer it, where it is an addon of upstream's
}

func (e *UnknownError) Error() string {
	if e.Why != "" {
		return fmt.Sprintf("Addon %s is not part of this product: %s", e.Name, e.Why)
	}
	return fmt.Sprintf("Addon %s was not found in any repository", e.Name)
}

// AmbiguousError is a name that several repositories have.
type AmbiguousError struct {
	Name         string
	Repositories []string
}

func (e *AmbiguousError) Error() string {
	lines := []string{
		fmt.Sprintf("Addon %s exists in more than repository. Please explicitly specify", e.Name),
		"the repository using any of:",
	}
	for _, r := range e.Repositories {
		lines = append(lines, "    "+r+"/"+e.Name)
	}
	return strings.Join(lines, "\n")
}

// errInvalidName is of names with more than one slash.
var errInvalidName = errors.New("Invalid addon name") //nolint:staticcheck // upstream's words, which scripts know

// notOffered are the core addons of upstream that the product does not have, with what to do
// instead. docs/scope.md has the reasons.
var notOffered = map[string]string{
	"cis-hardening": "its settings are arguments of the services, in args/, and RBAC and Node authorization are on already",
	"gpu":           "install NVIDIA's GPU operator with microk8s helm",
	"kube-ovn":      "bring a pod network of your own as args/cni-network/cni.yaml",
	"linkerd":       "install its Helm chart with microk8s helm",
	"mayastor":      "install its Helm chart with microk8s helm",
	"minio":         "install its Helm chart with microk8s helm",
	"nvidia":        "install NVIDIA's GPU operator with microk8s helm",
	"observability": "install the Helm chart kube-prometheus-stack with microk8s helm",
	"prometheus":    "install the Helm chart kube-prometheus-stack with microk8s helm",
	"rook-ceph":     "install its Helm chart with microk8s helm",
}

// Find returns the addon of that name, which may be given as repository/name; inferred says that
// the repository was not given.
func Find(all []Addon, name string) (a Addon, inferred bool, err error) {
	repo, short, full := strings.Cut(name, "/")
	if !full {
		repo, short = "", name
	}
	if strings.Contains(short, "/") || short == "" {
		return Addon{}, false, fmt.Errorf("%w %s", errInvalidName, name)
	}
	var found []Addon
	for _, a := range all {
		if a.Name == short && (!full || a.Repository == repo) {
			found = append(found, a)
		}
	}
	switch len(found) {
	case 0:
		unknown := &UnknownError{Name: name, Nearest: nearest(all, short)}
		if !full || repo == CoreRepository {
			unknown.Why = notOffered[short]
		}
		return Addon{}, false, unknown
	case 1:
		return found[0], !full, nil
	}
	ambiguous := &AmbiguousError{Name: name}
	for _, a := range found {
		ambiguous.Repositories = append(ambiguous.Repositories, a.Repository)
	}
	return Addon{}, false, ambiguous
}

// Target returns the addon that an alias stands for, and others as they are.
func Target(all []Addon, a Addon) Addon {
	if a.Alias == "" {
		return a
	}
	for _, x := range all {
		if x.Repository == a.Repository && x.Name == a.Alias {
			return x
		}
	}
	return a
}

// nearest returns the name with the fewest edits to the one given, if they are few.
func nearest(all []Addon, name string) string {
	best, at := "", 3
	for _, a := range all {
		if d := edits(a.Name, name); d < at && d < len(name) {
			best, at = a.Name, d
		}
	}
	return best
}

// edits is the number of letters to insert, delete or replace to make y of x.
func edits(x, y string) int {
	row := make([]int, len(y)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(x) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(y) {
			replace := diagonal
			if x[i] != y[j] {
				replace++
			}
			diagonal = row[j+1]
			row[j+1] = min(replace, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(y)]
}
