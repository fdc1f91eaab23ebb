package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// plain are phrases that stop a reader, each with what to write instead.
var plain = []struct {
	phrase  *regexp.Regexp
	instead string
}{
	{regexp.MustCompile(`(?i)\banew\b`), "again, or a verb with re-: restart, recreate, reinstall"},
	{regexp.MustCompile(`(?i)\bthe own (node|member|dqlite|address|side)\b`), "the local node"},
	{regexp.MustCompile(`(?i)\bseldom\b`), "rarely"},
	{regexp.MustCompile(`(?i)\bmend(s|ed|ing)?\b`), "fix"},
	{regexp.MustCompile(`(?i)\bbelongs? into\b`), "belongs in"},
	{regexp.MustCompile(`(?i)\bsays whether\b`), "reports whether"},
	{regexp.MustCompile(`(?i)\b(refuses|rejects|wakes|answers|tells|for|by) who (is|has|may|can|does|wants|knows)\b`), "a noun before who: callers who are not root"},
	{regexp.MustCompile(`(?i)\b(was|were) taken back\b|\btaking (it|that) back\b`), "undone, rolled back, revoked"},
}

// literals are the folders whose Go string literals are read: what people see. Comments are read in
// those of them that commented names.
var (
	literals  = []string{"cmd/", "internal/", "cluster-agent/", "apiserver-proxy/"}
	commented = []string{
		"internal/args", "internal/atomicfile", "internal/certs", "internal/cli", "internal/daemon", "internal/fileaccess", "internal/hook",
		"internal/hostinfo", "internal/hostnet", "internal/inspect", "internal/journal", "internal/kube", "internal/kubeconfig",
		"internal/pki", "internal/service", "internal/snapenv", "internal/status", "internal/token",
		"apiserver-proxy", "cluster-agent/agent", "cluster-agent/api", "cluster-agent/fanout", "cluster-agent/launchconf", "cluster-agent/limit",
		"cluster-agent/remount", "cluster-agent/renewal", "cluster-agent/server", "cluster-agent/worker",
	}
	// kept have old texts on purpose.
	kept = []string{"internal/cluster/steps.go"}
)

// TestLanguage keeps phrases out of pages, messages and comments that a native reader stops at.
func TestLanguage(t *testing.T) {
	read := 0
	complain := func(where, text string) {
		read++
		for _, p := range plain {
			if m := p.phrase.FindString(text); m != "" {
				t.Errorf("%s: %q: write %s", where, strings.TrimSpace(m), p.instead)
			}
		}
	}
	for name, text := range tree(t) {
		switch {
		case strings.HasSuffix(name, ".md"):
			complain(name, text)
		case !strings.HasSuffix(name, ".go"), strings.HasSuffix(name, "_test.go"), slices.Contains(kept, name),
			!slices.ContainsFunc(literals, func(p string) bool { return strings.HasPrefix(name, p) }):
		default:
			set := token.NewFileSet()
			f, err := parser.ParseFile(set, name, text, parser.ParseComments|parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			at := func(p token.Pos) string { return name + ":" + strconv.Itoa(set.Position(p).Line) }
			ast.Inspect(f, func(n ast.Node) bool {
				if l, ok := n.(*ast.BasicLit); ok && l.Kind == token.STRING {
					if s, err := strconv.Unquote(l.Value); err == nil {
						complain(at(l.Pos()), s)
					}
				}
				return true
			})
			if slices.ContainsFunc(commented, func(p string) bool { return strings.HasPrefix(name, p+"/") }) {
				for _, g := range f.Comments {
					complain(at(g.Pos()), g.Text())
				}
			}
		}
	}
	if read < 5000 {
		t.Errorf("only %d texts were read", read)
	}
}
