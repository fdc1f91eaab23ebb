package docs

import (
	"io"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"microk8s/internal/cli"
	"microk8s/internal/snapenv"
)

// output runs the command line in an empty installation and returns what it prints.
func output(t *testing.T, args ...string) string {
	t.Helper()
	var b strings.Builder
	app := &cli.App{Env: snapenv.Under(t.TempDir()), In: strings.NewReader(""), Out: &b, Err: io.Discard, Group: snapenv.Group}
	app.Main(t.Context(), append([]string{"microk8s"}, args...))
	return b.String()
}

// said returns the command lines in a page that begin with `microk8s`, from code blocks and from code
// in a sentence, as words.
func said(text string) (out [][]string) {
	var spans []string
	block := false
	var prose strings.Builder
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if strings.HasPrefix(line, "```") {
			block = !block
			continue
		}
		if block || strings.HasPrefix(line, "    ") {
			line, _, _ = strings.Cut(line, " # ")
			spans = append(spans, line)
		}
		if !block {
			prose.WriteString(line + " ")
		}
	}
	for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(prose.String(), -1) {
		spans = append(spans, m[1])
	}
	for _, span := range spans {
		for _, part := range regexp.MustCompile(`[|;&]+|\$\(`).Split(span, -1) {
			words := strings.Fields(part)
			if i := slices.Index(words, "microk8s"); i >= 0 && !slices.Contains([]string{"install", "refresh", "remove", "set", "get", "revert", "start", "stop", "restart", "services"}, last(words[:i])) {
				out = append(out, words[i+1:])
			}
		}
	}
	return out
}

func last(words []string) string {
	if len(words) == 0 {
		return ""
	}
	return words[len(words)-1]
}

// TestCommands wants each command, subcommand and flag of microk8s that a page shows to exist.
func TestCommands(t *testing.T) {
	listed := output(t, "help")
	// Flags of these are other programs', or an addon's.
	raw := []string{"kubectl", "helm", "helm3", "ctr", "enable", "disable", "daemon", "hook"}
	hidden := []string{"daemon", "hook", "supervise", "node-config", "find-resolv-conf", "help"}
	name := regexp.MustCompile(`^[a-z][a-z0-9-]*$`)
	found := 0
	for page, text := range tree(t) {
		if !strings.HasSuffix(page, ".md") || strings.HasPrefix(page, "docs/adr/") {
			continue
		}
		for _, words := range said(text) {
			if len(words) == 0 || !name.MatchString(words[0]) {
				continue
			}
			command := words[0]
			if command == "is" || command == "was" { // a sentence of its own: microk8s is running
				continue
			}
			found++
			if !slices.Contains(hidden, command) && !regexp.MustCompile(`(?m)^\s+`+command+`\b`).MatchString(listed) {
				t.Errorf("%s shows `microk8s %s`, and there is no such command", page, strings.Join(words, " "))
				continue
			}
			if slices.Contains(raw, command) {
				continue
			}
			var path []string // with subcommands
			for _, w := range words {
				if !name.MatchString(w) {
					break
				}
				path = append(path, w)
			}
			for _, w := range words {
				flag, _, _ := strings.Cut(strings.Trim(w, "[]().,:"), "=")
				if !strings.HasPrefix(flag, "--") || flag == "--" || flag == "--help" {
					continue
				}
				known := ""
				for i := range path { // flags of each command on the way to the last word
					known += output(t, append(append([]string{"__completeNoDesc"}, path[:i+1]...), "--")...)
				}
				if !slices.Contains(strings.Fields(strings.ReplaceAll(known, "=", " ")), flag) {
					t.Errorf("%s shows `microk8s %s`, and there is no flag %s", page, strings.Join(words, " "), flag)
				}
			}
		}
	}
	if found < 50 {
		t.Errorf("only %d command lines were found", found)
	}
}

// TestCommandsHaveARow wants each command in the table of refusals of docs/spec.
func TestCommandsHaveARow(t *testing.T) {
	_, table, _ := strings.Cut(tree(t)["docs/spec/cli.md"], "### 1.0")
	table, _, _ = strings.Cut(table, "### 1.1")
	names := regexp.MustCompile(`(?m)^\s+([a-z][a-z0-9-]+)`).FindAllStringSubmatch(output(t, "help"), -1)
	if len(names) < 20 {
		t.Fatalf("only %d commands are listed", len(names))
	}
	for _, m := range names {
		if !strings.Contains(table, "`"+m[1]+"`") {
			t.Errorf("docs/spec/cli.md 1.0 does not name the command %s", m[1])
		}
	}
}

// TestNames wants the make targets, scripts and tests that pages name to exist.
func TestNames(t *testing.T) {
	files := tree(t)
	var tests strings.Builder
	for name, text := range files {
		if strings.HasSuffix(name, "_test.go") || strings.HasSuffix(name, ".go") && strings.Contains(name, "test") {
			tests.WriteString(text)
		}
	}
	code := regexp.MustCompile("`[^`]+`|(?m:^    .*$)")
	for page, text := range files {
		if !strings.HasSuffix(page, ".md") {
			continue
		}
		for _, span := range code.FindAllString(text, -1) {
			for _, m := range regexp.MustCompile(`\bmake ([a-z][a-z-]*)`).FindAllStringSubmatch(span, -1) {
				if !regexp.MustCompile(`(?m)^` + m[1] + `:`).MatchString(files["Makefile"]) {
					t.Errorf("%s names `make %s`, which the Makefile does not have", page, m[1])
				}
			}
			for _, m := range regexp.MustCompile(`(?:^|[\s"`+"`"+`(])((?:scripts|snap|cmd|internal|cluster-agent|apiserver-proxy|tests)/[A-Za-z0-9_./*-]+)`).FindAllStringSubmatch(span, -1) {
				path := strings.TrimSuffix(strings.TrimRight(m[1], "./"), "/...")
				if strings.HasSuffix(path, "/NAME") {
					continue
				}
				if matches, _ := filepath.Glob(filepath.Join(root, path)); len(matches) == 0 {
					t.Errorf("%s names %s, which does not exist", page, path)
				}
			}
			for _, m := range regexp.MustCompile(`\b(Test[A-Z][A-Za-z]+)\b`).FindAllStringSubmatch(span, -1) {
				if !strings.Contains(tests.String(), "func "+m[1]+"(") {
					t.Errorf("%s names the test %s, which does not exist", page, m[1])
				}
			}
		}
	}
}
