package snap

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

// packed is the file that `make snap` built.
func packed(t *testing.T) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(build, "microk8s_*.snap"))
	if err != nil || len(files) != 1 {
		t.Fatalf("there are %d files build/microk8s_*.snap, want one; run `make snap` first", len(files))
	}
	return "/mnt/build/" + filepath.Base(files[0])
}

var versionLine = regexp.MustCompile(`(?m)^version: .*$`)

// repack makes another revision of the snap in the machine's scratch directory: the same tree
// under another version, with the given files in it. It is not packed as tightly as for users,
// which is the only difference.
func (m *machine) repack(t *testing.T, version string, files map[string]string) string {
	t.Helper()
	tree := filepath.Join(t.TempDir(), "tree")
	if out, err := exec.Command("cp", "-a", "--reflink=auto", filepath.Join(build, "snap"), tree).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	meta, err := os.ReadFile(filepath.Join(tree, "meta/snap.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{"meta/snap.yaml": versionLine.ReplaceAllString(string(meta), "version: "+version)}
	for name, text := range files {
		all[name] = text
	}
	for name, text := range all {
		if err := os.WriteFile(filepath.Join(tree, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	file := fmt.Sprintf("microk8s_%s.snap", version)
	cmd := exec.Command("mksquashfs", tree, filepath.Join(m.scratch, file), "-noappend", "-all-root", "-no-xattrs", "-no-progress", "-comp", "gzip", "-Xcompression-level", "1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("mksquashfs: %v\n%s", err, out)
	}
	if err := os.RemoveAll(tree); err != nil {
		t.Fatal(err)
	}
	return "/mnt/scratch/" + file
}
