// Package docs holds what the pages and comments of the repository say against the repository:
// packages and the map of them, citations, links, and the commands, flags, targets and tests that
// pages name.
package docs

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
)

// root is the repository.
const root = "../.."

// tree is every file that belongs to the repository's own module, by its path in it.
func tree(t *testing.T) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name != "." && strings.HasPrefix(d.Name(), ".") && d.Name() != ".ci" || name == "build" || d.Name() == "node_modules" {
				return filepath.SkipDir
			}
			return nil
		}
		if st, err := d.Info(); err != nil || !st.Mode().IsRegular() || st.Size() > 1<<20 {
			return err
		}
		data, err := os.ReadFile(path)
		if err == nil && !bytes.ContainsRune(data, 0) {
			files[name] = string(data)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 300 {
		t.Fatalf("only %d files were found", len(files))
	}
	return files
}

// modules returns the folders that are Go modules of their own.
func modules(files map[string]string) (out []string) {
	for name := range files {
		if filepath.Base(name) == "go.mod" && name != "go.mod" {
			out = append(out, filepath.Dir(name)+"/")
		}
	}
	return out
}

// packages returns the Go packages of the main module with their comments, by folder.
func packages(t *testing.T, files map[string]string) map[string]string {
	t.Helper()
	others := modules(files)
	out := map[string]string{}
	for name, text := range files {
		if !strings.HasSuffix(name, ".go") || strings.Contains(name, "testdata/") ||
			slices.ContainsFunc(others, func(m string) bool { return strings.HasPrefix(name, m) }) {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, text, parser.PackageClauseOnly|parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		dir := filepath.Dir(name)
		if _, ok := out[dir]; !ok {
			out[dir] = ""
		}
		if f.Doc != nil {
			out[dir] += docText(f.Doc)
		}
	}
	return out
}

func docText(g *ast.CommentGroup) string { return strings.TrimSpace(g.Text()) }

// mapped returns the folders that the table in ARCHITECTURE.md has rows for. {a,b} is expanded.
func mapped(t *testing.T, files map[string]string) (out []string) {
	t.Helper()
	text, ok := files["docs/ARCHITECTURE.md"]
	if !ok {
		t.Fatal("there is no docs/ARCHITECTURE.md")
	}
	_, table, ok := strings.Cut(text, "| folder | holds |")
	if !ok {
		t.Fatal("docs/ARCHITECTURE.md has no table of folders")
	}
	table, _, _ = strings.Cut(table, "\n\n")
	for line := range strings.Lines(table) {
		cell, _, _ := strings.Cut(strings.TrimPrefix(line, "|"), "|")
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cell, -1) {
			before, rest, braces := strings.Cut(m[1], "{")
			if !braces {
				out = append(out, strings.TrimSuffix(m[1], "/"))
				continue
			}
			inner, after, _ := strings.Cut(rest, "}")
			for part := range strings.SplitSeq(inner, ",") {
				out = append(out, strings.TrimSuffix(before+part+after, "/"))
			}
		}
	}
	return out
}

// TestMap wants a row in ARCHITECTURE.md for each package, and a package comment in each; and
// nothing in the map that is not there.
func TestMap(t *testing.T) {
	files := tree(t)
	rows := mapped(t, files)
	pkgs := packages(t, files)
	if len(pkgs) < 60 {
		t.Fatalf("only %d packages were found", len(pkgs))
	}
	for dir, comment := range pkgs {
		if comment == "" {
			t.Errorf("%s has no package comment: say what it is for, and what it leaves to others", dir)
		}
		program := strings.HasPrefix(dir, "cmd/") && strings.Count(dir, "/") == 1
		if !slices.Contains(rows, dir) && !(program && slices.Contains(rows, "cmd/NAME")) {
			t.Errorf("%s has no row in the table of docs/ARCHITECTURE.md", dir)
		}
	}
	seen := map[string]bool{}
	for _, row := range rows {
		if st, err := os.Stat(filepath.Join(root, row)); row != "cmd/NAME" && (err != nil || !st.IsDir()) {
			t.Errorf("docs/ARCHITECTURE.md has a row for %s, which is not there", row)
		}
		if seen[row] {
			t.Errorf("docs/ARCHITECTURE.md has two rows for %s", row)
		}
		seen[row] = true
	}
}

var (
	// cited matches a page with the sections that are named behind it: "cli.md 3 and 4".
	cited   = regexp.MustCompile(`(?:^|[^$*{}A-Za-z0-9_/.-])([A-Za-z0-9_/.-]+\.md)(?:,? +(\d+(?:\.\d+)*(?:(?:, | and )\d+(?:\.\d+)*)*))?`)
	section = regexp.MustCompile(`\d+(?:\.\d+)*`)
	heading = regexp.MustCompile(`(?m)^#+ (\d+(?:\.\d+)*)[. ]`)
	adr     = regexp.MustCompile(`\bADR (\d+)`)
	rule    = regexp.MustCompile(`\bW(\d{1,2})\b`)
)

// elsewhere are pages of other projects.
var elsewhere = []string{"annotations.md"}

// citing returns the text of a file in which citations count: all of it in a page, a script or a
// configuration, the comments of Go.
func citing(t *testing.T, name, text string) string {
	t.Helper()
	switch {
	case strings.Contains(name, "testdata/"), strings.HasPrefix(name, "LICENSE"), strings.HasSuffix(name, "/crds.yaml"): // as their module has them
		return ""
	case strings.HasSuffix(name, ".go"):
		f, err := parser.ParseFile(token.NewFileSet(), name, text, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		for _, g := range f.Comments {
			b.WriteString(strings.Join(strings.Fields(g.Text()), " ") + "\n") // a citation may be broken by a line
		}
		return b.String()
	}
	return text
}

// TestCitations wants each page and section that a comment, script or page names to exist, and
// each decision.
func TestCitations(t *testing.T) {
	files := tree(t)
	sections := map[string][]string{}
	for name, text := range files {
		if strings.HasPrefix(name, "docs/") {
			for _, m := range heading.FindAllStringSubmatch(text, -1) {
				sections[name] = append(sections[name], m[1])
			}
		}
	}
	rules := files["docs/spec/cluster-agent.md"]
	found := 0
	for name, text := range files {
		text := citing(t, name, text)
		for _, m := range cited.FindAllStringSubmatch(text, -1) {
			page := resolve(files, name, m[1], m[2] != "")
			if slices.Contains(elsewhere, m[1]) {
				continue
			}
			if page == "" {
				t.Errorf("%s names the page %s, which does not exist", name, m[1])
				continue
			}
			for _, s := range section.FindAllString(m[2], -1) {
				found++
				if !slices.Contains(sections[page], s) {
					t.Errorf("%s cites %s %s, and %s has no such section", name, m[1], s, page)
				}
			}
		}
		for _, m := range adr.FindAllStringSubmatch(text, -1) {
			if !slices.ContainsFunc(slices.Collect(keys(files)), func(n string) bool { return strings.HasPrefix(n, fmt.Sprintf("docs/adr/%04s-", m[1])) }) {
				t.Errorf("%s cites ADR %s, which does not exist", name, m[1])
			}
		}
		if strings.HasSuffix(name, ".go") {
			for _, m := range rule.FindAllStringSubmatch(text, -1) {
				if !strings.Contains(rules, "| "+m[0]+" |") {
					t.Errorf("%s cites the rule %s, which docs/spec/cluster-agent.md 8 does not have", name, m[0])
				}
			}
		}
	}
	if found < 50 {
		t.Errorf("only %d citations were found: the test looks at the wrong thing", found)
	}
}

func keys(files map[string]string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for name := range files {
			if !yield(name) {
				return
			}
		}
	}
}

// resolve returns the path of a page as a file names it: from the file's folder, from the
// repository, from docs, or, with a section, from docs/spec. "" if there is none.
func resolve(files map[string]string, from, page string, numbered bool) string {
	places := []string{filepath.Join(filepath.Dir(from), page), filepath.Clean(page), filepath.Join("docs", page)}
	spec := filepath.Join("docs/spec", page)
	if numbered {
		places = append([]string{spec}, places...)
	} else {
		places = append(places, spec)
	}
	for _, p := range places {
		if _, ok := files[p]; ok {
			return p
		}
	}
	return ""
}

// TestLinks wants each link from a page to another to lead to something, its anchor included.
func TestLinks(t *testing.T) {
	files := tree(t)
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	found := 0
	for name, text := range files {
		if !strings.HasSuffix(name, ".md") {
			continue
		}
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			target, anchor, _ := strings.Cut(m[1], "#")
			if strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
				continue
			}
			found++
			path := filepath.Join(filepath.Dir(name), target)
			if target == "" {
				path = name
			}
			if _, err := os.Stat(filepath.Join(root, path)); err != nil {
				t.Errorf("%s links to %s, which does not exist", name, m[1])
			} else if anchor != "" && !slices.Contains(anchors(files[path]), anchor) {
				t.Errorf("%s links to %s, and that page has no heading for #%s", name, m[1], anchor)
			}
		}
	}
	if found < 20 {
		t.Errorf("only %d links were found", found)
	}
}

// anchors returns the anchors of a page's headings, as GitHub makes them.
func anchors(text string) (out []string) {
	for line := range strings.Lines(text) {
		if title, ok := strings.CutPrefix(strings.TrimLeft(line, "#"), " "); ok && strings.HasPrefix(line, "#") {
			out = append(out, strings.Map(func(r rune) rune {
				switch {
				case unicode.IsLetter(r), unicode.IsDigit(r), r == '-', r == '_':
					return unicode.ToLower(r)
				case r == ' ':
					return '-'
				}
				return -1
			}, strings.TrimSpace(title)))
		}
	}
	return out
}
