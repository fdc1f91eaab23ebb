package nodeconfig

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// mayLoad are the files, besides this package's, that read argument files: those that hand a file's words on to
// the program that it is for, or to another node, and those that read a copy.
var mayLoad = []string{"internal/serverargs/serverargs.go", "internal/serverargs/summary.go", "cmd/kubelite/run.go", "internal/daemon/daemon.go", "internal/cli/passthrough.go", "internal/cluster/leave.go", "internal/cluster/restore.go"}

var loads = regexp.MustCompile(`\bargs\.Load\(`)

// TestOnlyReader holds that what the argument files say about the node is decided here alone.
func TestOnlyReader(t *testing.T) {
	const root = "../.."
	seen := 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(root, path)
		switch {
		case err != nil:
			return err
		case d.IsDir() && (rel == "build" || rel != "." && strings.HasPrefix(d.Name(), ".")):
			return filepath.SkipDir
		case !strings.HasSuffix(rel, ".go"), strings.HasSuffix(rel, "_test.go"), strings.HasPrefix(rel, "internal/nodeconfig/"):
			return nil
		}
		data, err := os.ReadFile(path)
		if err == nil && loads.Match(data) {
			seen++
			if !slices.Contains(mayLoad, rel) {
				t.Errorf("%s reads an argument file: use nodeconfig.Load, File or Edit", rel)
			}
		}
		return err
	})
	if err != nil || seen != len(mayLoad) {
		t.Errorf("%d files of %q, %v", seen, mayLoad, err)
	}
}
