package cli

import (
	"context"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"microk8s/internal/service"
)

// TestMistakes: whoever makes a mistake is told what to type instead, in words that are not a Go
// function's, and fails with an exit code.
func TestMistakes(t *testing.T) {
	said := regexp.MustCompile(nextStep.String() + `|Usage: microk8s|choose from|is not one of`)
	for _, line := range strings.Split(strings.TrimSpace(mistakes), "\n") {
		t.Run(line, func(t *testing.T) {
			a := newApp(t)
			a.services.Phase = service.Running
			a.write(t, a.Env.AdminKubeconfig(), fakeAPI(t))
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			code := a.run(ctx, strings.Fields(line)...)
			text := a.out.String() + a.err.String()
			if code == ExitOK {
				t.Errorf("exit code 0: %s", text)
			}
			if !said.MatchString(text) || strings.Contains(text, "more with: microk8s inspect") {
				t.Errorf("no next step of its own: %s", text)
			}
			for _, word := range []string{"strconv", "time: invalid", "nil pointer", "%!"} {
				if strings.Contains(text, word) {
					t.Errorf("%q is no word for a person: %s", word, text)
				}
			}
		})
	}
}

// TestSuggestions: a name with a letter or two wrong is taken for the command that is like it.
func TestSuggestions(t *testing.T) {
	for typed, want := range map[string]string{"stauts": "Did you mean: microk8s start, or microk8s status\n", "ad-node": "Did you mean: microk8s add-node\n", "frobnicate": ""} {
		a := newApp(t)
		code := a.run(t.Context(), typed)
		if got := a.err.String(); code != ExitError || !strings.Contains(got, want) || want == "" && strings.Contains(got, "Did you mean") {
			t.Errorf("%s: code %d: %s", typed, code, got)
		}
	}
}

const mistakes = `
stauts
nothing-like-it
status --format xml
status -o xml
status --timeout soon
status --timeout 99999999999999999999
status --wait-ready=perhaps
status extra
enable
enable dsn
enable nothing-like-it
enable a/b/c
enable community
disable
disable nothing-like-it
add-node --token abc
add-node --token-ttl -5
add-node --token-ttl soon
add-node --expires tomorrow
add-node --format xml
add-node extra
join
join somewhere
join 10.0.0.1:25000/abcd
join 10.0.0.1:port/0123456789abcdef0123456789abcdef
join a b
remove-node
remove-node a b
leave extra
config --user
config --user Ann_1
config --user ann --role king
config --user ann --ttl forever
config --user ann --ttl 1s
config --ttl 5h
config --user ann --list
config --frob
images import /there/is/nothing
images import a b
images frob
dbctl frob
dbctl backup name
dbctl backup --keep many
dbctl backup --keep -3
dbctl restore
dbctl restore /there/is/nothing
dbctl restore a b
logs nginx
logs -n x
logs -n -5
logs --since yesterday
refresh-certs
refresh-certs -e own.crt
refresh-certs /there/is/nothing
refresh-certs -c -u
encryption frob
pod-security frob
pod-security enforce frob
network frob
network api-address frob
network api-address 127.0.0.1
network why
network why a b
network why a b:80/icmp
network check extra
addons frob
addons repo frob
addons repo add
addons repo add x/y /there/is/nothing
addons repo add x
addons repo remove core
addons repo remove nothing
addons repo update core
addons repo update nothing
addons repo list --format xml
inspect --frob
inspect extra
version --short
version -o xml
reset extra
reset --destroy-storage=perhaps
start --frob
start now
stop --force
completion
completion tcsh
`

// TestEachCommandHasANextStep: an error that nobody thought of ends with what to type, too, and with
// what concerns the command.
func TestEachCommandHasANextStep(t *testing.T) {
	a := newApp(t)
	for _, c := range a.commands() {
		if c.hidden {
			continue
		}
		a.err.Reset()
		a.sayNextStep([]string{"microk8s", c.name}, "the sky has fallen")
		if got := a.err.String(); nextSteps[c.name] == "" || !nextStep.MatchString(got) {
			t.Errorf("%s: %q", c.name, got)
		}
	}
	for name := range nextSteps {
		if !slices.ContainsFunc(a.commands(), func(c command) bool { return c.name == name }) {
			t.Errorf("there is no command %s", name)
		}
	}
}

// hinted is a command in a message: what stands before it says that it is to be typed.
var hinted = regexp.MustCompile("(?:^|[:;,(`'] ?|\\b(?:with|run|see|and|or|then|by|again) )(?:sudo )?microk8s ([a-z][a-z0-9-]*)((?: (?:--?[a-z][a-z-]*|[a-z][a-z0-9-]*|[A-Z_|]+|%s))*)")

// TestHintsAreCommands: what messages tell people to type exists, with its subcommand and flags, and
// so do the pages that they name.
func TestHintsAreCommands(t *testing.T) {
	const top = "../.."
	root := newApp(t).Tree()
	raw := []string{"kubectl", "helm", "helm3", "ctr", "enable", "disable", "daemon", "hook"}
	page := regexp.MustCompile(`\bdocs/[a-z0-9/-]+\.md`)
	found := 0
	check := func(at, text string) {
		for _, p := range page.FindAllString(text, -1) {
			if _, err := os.Stat(filepath.Join(top, p)); err != nil {
				t.Errorf("%s: %v", at, err)
			}
		}
		for _, m := range hinted.FindAllStringSubmatch(text, -1) {
			i := slices.IndexFunc(root.Commands(), func(c *cobra.Command) bool { return c.Name() == m[1] })
			if i < 0 && slices.Contains([]string{"is", "server", "node"}, m[1]) {
				continue // a sentence, or the name of a protocol
			}
			if i < 0 {
				t.Errorf("%s: there is no microk8s %s: %s", at, m[1], text)
				continue
			}
			found++
			if slices.Contains(raw, m[1]) {
				continue
			}
			cmd := root.Commands()[i]
			for _, w := range strings.Fields(m[2]) {
				if sub := slices.IndexFunc(cmd.Commands(), func(c *cobra.Command) bool { return c.Name() == w }); sub >= 0 {
					cmd = cmd.Commands()[sub]
					continue
				}
				if w == "and" || w == "or" {
					break
				}
				name, long := strings.CutPrefix(w, "--")
				cmd.InitDefaultHelpFlag()
				switch {
				case long && cmd.Flags().Lookup(name) == nil && cmd.InheritedFlags().Lookup(name) == nil,
					!long && strings.HasPrefix(w, "-") && cmd.Flags().ShorthandLookup(w[1:]) == nil:
					t.Errorf("%s: microk8s %s has no flag %s: %s", at, m[1], w, text)
				}
			}
		}
	}
	files := token.NewFileSet()
	for _, dir := range []string{"internal", "cluster-agent", "cmd", "apiserver-proxy"} {
		err := filepath.WalkDir(filepath.Join(top, dir), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
				return err
			}
			file, err := parser.ParseFile(files, path, nil, 0)
			if err != nil {
				return err
			}
			ast.Inspect(file, func(n ast.Node) bool {
				if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
					if text, err := strconv.Unquote(lit.Value); err == nil {
						check(files.Position(lit.Pos()).String(), text)
					}
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if found < 200 {
		t.Fatalf("only %d commands were found: the test looks in the wrong place", found)
	}
}

// TestFailuresHaveHints: no command fails with a failure whose next step is left empty.
func TestFailuresHaveHints(t *testing.T) {
	paths, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	files := token.NewFileSet()
	calls := 0
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(files, path, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			if name, ok := call.Fun.(*ast.Ident); !ok || name.Name != "failf" || len(call.Args) == 0 {
				return true
			}
			calls++
			if hint, ok := call.Args[0].(*ast.BasicLit); ok && strings.Trim(hint.Value, "\"` ") == "" {
				t.Errorf("%s: say what to do next", files.Position(call.Pos()))
			}
			return true
		})
	}
	if calls < 20 {
		t.Fatalf("only %d calls were found: the test looks in the wrong place", calls)
	}
}
