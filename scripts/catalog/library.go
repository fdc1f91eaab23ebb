package catalog

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// LibraryOf returns the C library of that key.
func LibraryOf(key string) (Library, error) {
	for _, l := range Libraries {
		if l.Key == key {
			return l, nil
		}
	}
	return Library{}, fmt.Errorf("there is no C library %q in the table", key)
}

// Installed returns the version of the library that a build on this machine links: that of the
// Debian package, or what its own build wrote down below root.
func (l Library) Installed(root string) (string, error) {
	if l.Package == "" {
		data, err := os.ReadFile(filepath.Join(root, l.Version))
		if err != nil {
			return "", fmt.Errorf("the version of %s is not known; run: make deps: %w", l.Name, err)
		}
		return strings.TrimSpace(string(data)), nil
	}
	out, err := exec.Command("dpkg-query", "-W", "-f", "${Version}", l.Package).Output()
	if errors.Is(err, exec.ErrNotFound) {
		return "unknown", nil // not Debian or Ubuntu: who builds there knows
	}
	if err != nil {
		return "", fmt.Errorf("the version of %s is not known; run: make deps: %w", l.Name, err)
	}
	return strings.TrimSpace(string(out)), nil
}
