package catalog

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const patches = root + "/" + Folder + "/dqlite"

// header returns the fields of a patch's DEP-3 header; a field may be there several times.
func header(t *testing.T, file string) map[string][]string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	head, _, ok := strings.Cut(string(data), "\n---\n")
	if !ok {
		t.Fatalf("%s: there is no header that --- ends", file)
	}
	fields := map[string][]string{}
	for line := range strings.Lines(head) {
		if name, value, ok := strings.Cut(line, ": "); ok && !strings.HasPrefix(line, " ") {
			fields[name] = append(fields[name], strings.TrimSpace(value))
		}
	}
	return fields
}

// TestPatches: the series is complete, and each patch says what was wrong, which test fails
// without it, and what upstream has of it.
func TestPatches(t *testing.T) {
	data, err := os.ReadFile(filepath.Join(patches, "series"))
	if err != nil {
		t.Fatal(err)
	}
	var series []string
	for line := range strings.Lines(string(data)) {
		if !strings.HasPrefix(line, "#") {
			series = append(series, strings.TrimSpace(line))
		}
	}
	files, err := filepath.Glob(filepath.Join(patches, "*.patch"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if !slices.Contains(series, filepath.Base(file)) {
			t.Errorf("%s is not in the series", file)
		}
	}
	if len(series) != len(files) {
		t.Errorf("%d patches in the series, %d files", len(series), len(files))
	}
	for _, name := range series {
		fields := header(t, filepath.Join(patches, name))
		for _, field := range []string{"Description", "Defect", "Test", "Origin", "Forwarded", "Applied-Upstream", "Last-Update"} {
			if len(fields[field]) == 0 {
				t.Errorf("%s has no field %s", name, field)
			}
		}
		for _, test := range fields["Test"] {
			goTest, ok := strings.CutPrefix(test, "Go ")
			switch {
			case ok:
				if exec.Command("grep", "-rq", "--include=*_test.go", "func "+goTest+"(t ", root+"/internal/datastore").Run() != nil {
					t.Errorf("%s: there is no test %s", name, goTest)
				}
			case !strings.HasPrefix(test, "C "):
				t.Errorf("%s: the test %q is neither Go's nor of the C suites", name, test)
			}
		}
	}
}
