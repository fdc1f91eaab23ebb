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

	// Builtin is not empty for what is part of every node and can be neither enabled nor
	// disabled; it says so in a sentence.
	Builtin string `json:"builtin"`

	dir string
}

// FullName is repository/name.
func (a Addon) FullName() string { return a.Repository + "/" + a.Name }

// Catalogue lists the addons of this machine's architecture, by repository and name.
func Catalogue(env snapenv.Env) ([]Addon, error) {
	return readRepository(CoreRepository, env.CoreAddons())
}

func readRepository(name, dir string) ([]Addon, error) {
	path := filepath.Join(dir, "addons.yaml")
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("could not load addons from %s: %w", dir, err)
	}
	var file struct {
		Top struct {
			Addons []Addon `json:"addons"`
		} `json:"microk8s-addons"`
	}
	if err := yaml.Unmarshal(data, &file); err != nil {
		return nil, fmt.Errorf("could not load addons from %s: %w", path, err)
	}
	var out []Addon
	for _, a := range file.Top.Addons {
		if !slices.Contains(a.Architectures, runtime.GOARCH) {
			continue
		}
		a.Repository, a.dir = name, filepath.Join(dir, "addons", a.Name)
		out = append(out, a)
	}
	slices.SortFunc(out, func(x, y Addon) int { return strings.Compare(x.FullName(), y.FullName()) })
	return out, nil
}

// UnknownError is a name that no repository has.
type UnknownError struct {
	Name    string
	Nearest string // the addon that may have been meant, or ""
}

func (e *UnknownError) Error() string {
	return fmt.Sprintf("Addon %s was not found in any repository", e.Name)
}

// errInvalidName is of names with more than one slash.
var errInvalidName = errors.New("Invalid addon name") //nolint:staticcheck // upstream's words, which scripts know

// Find gives the addon of that name, which may be given as repository/name; inferred says that
// the repository was not given.
func Find(all []Addon, name string) (a Addon, inferred bool, err error) {
	repo, short, full := strings.Cut(name, "/")
	if !full {
		repo, short = "", name
	}
	if strings.Contains(short, "/") || short == "" {
		return Addon{}, false, fmt.Errorf("%w %s", errInvalidName, name)
	}
	for _, a := range all {
		if a.Name == short && (!full || a.Repository == repo) {
			return a, !full, nil
		}
	}
	return Addon{}, false, &UnknownError{Name: name, Nearest: nearest(all, short)}
}

// nearest gives the name with the fewest edits to the one given, if they are few.
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
