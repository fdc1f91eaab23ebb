package report

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestPage has a page hold the very table that is printed, and the command that repeats it.
func TestPage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "node.md")
	args := os.Args
	t.Cleanup(func() { os.Args = args })
	os.Args = []string{"bench", "-rounds", "1", "-page", path, "--page=" + path, "-large=false"}
	r := &Table{
		Title: "A node", About: "What it means.", Part: "node", Now: time.Unix(1e9, 0),
		Head: []string{"what", "measured", "budget"}, Rows: [][]string{{"start", "2.4 s", ""}, {"  of it", "1 s", "15 s"}},
	}
	var out strings.Builder
	if err := r.Write(&out, path); err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	table := "what     measured  budget\nstart    2.4 s\n  of it  1 s       15 s\n"
	if !strings.HasSuffix(out.String(), "What it means.\n\n"+table) {
		t.Errorf("printed:\n%s", &out)
	}
	for _, want := range []string{"# A node\n\n`scripts/bench node -rounds 1 -large=false`, on ", ", 2001-09-09, load average ", "\nWhat it means.\n\n```text\n" + table + "```\n"} {
		if !strings.Contains(string(page), want) {
			t.Errorf("the page lacks %q:\n%s", want, page)
		}
	}
}
