package suite

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// TestEachDefenceIsNeeded runs the attacks without one defence after the other: an attack on it
// must succeed. Without it an attack would show nothing.
func TestEachDefenceIsNeeded(t *testing.T) {
	t.Parallel()
	program := filepath.Join(t.TempDir(), "attacks")
	build := exec.CommandContext(t.Context(), "go", "test", "-c", "-overlay", overlay(t), "-trimpath", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("cannot build the weakened agent: %v\n%s", err, out)
	}
	run := func(without string) (failed []string, out string) {
		cmd := exec.CommandContext(t.Context(), program, "-test.run", "^TestAttacks$/^"+without)
		cmd.Env = append(os.Environ(), "MICROK8S_WEAKENED="+without)
		text, err := cmd.CombinedOutput()
		for _, m := range regexp.MustCompile(`--- FAIL: TestAttacks/([a-z-]+)/`).FindAllStringSubmatch(string(text), -1) {
			failed = append(failed, m[1])
		}
		if (err != nil) != (len(failed) > 0) {
			t.Errorf("without %q the attacks end with %v:\n%s", without, err, text)
		}
		return failed, string(text)
	}
	if failed, out := run(""); len(failed) > 0 {
		t.Fatalf("with every defence %v fail:\n%s", failed, out)
	}
	t.Run("without", func(t *testing.T) {
		slots := make(chan struct{}, runtime.NumCPU())
		for _, name := range defences(t) {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				slots <- struct{}{}
				defer func() { <-slots }()
				failed, out := run(name)
				if !slices.Contains(failed, name) {
					t.Errorf("no attack on it succeeds; others: %v\n%s", failed, strings.TrimSpace(out))
				}
			})
		}
	})
}

// defences lists the names of the files in mutants.
func defences(t *testing.T) (names []string) {
	t.Helper()
	files, err := filepath.Glob("mutants/*.patch")
	if err != nil || len(files) == 0 {
		t.Fatalf("no mutants: %v", err)
	}
	for _, f := range files {
		names = append(names, strings.TrimSuffix(filepath.Base(f), ".patch"))
	}
	return names
}

// overlay applies every mutant, and returns the file for the option -overlay of go that builds
// the result. Each package that a mutant changes gets the function weakened beside it.
func overlay(t *testing.T) string {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	sources := map[string]string{} // by path below root
	for _, name := range defences(t) {
		text, err := os.ReadFile(filepath.Join("mutants", name+".patch"))
		if err != nil {
			t.Fatal(err)
		}
		err = weaken(name, string(text), sources, func(path string) (string, error) {
			source, err := os.ReadFile(filepath.Join(root, path))
			return string(source), err
		})
		if err != nil {
			t.Fatalf("mutants/%s.patch does not apply: %v", name, err)
		}
	}
	for _, path := range slices.Collect(maps.Keys(sources)) {
		pkg := regexp.MustCompile(`(?m)^package \w+$`).FindString(sources[path])
		sources[filepath.Join(filepath.Dir(path), "weakened.go")] = pkg + `

import "os"

func weakened(defence string) bool { return os.Getenv("MICROK8S_WEAKENED") == defence }
`
	}
	replace := map[string]string{}
	dir := t.TempDir()
	for path, text := range sources {
		file := filepath.Join(dir, strings.ReplaceAll(path, "/", "_"))
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		replace[filepath.Join(root, path)] = file
	}
	list, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(file, list, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// weaken applies one mutant to the sources, which read adds to. The mutant is a unified diff
// without line numbers: what a hunk replaces must be in its file exactly once, and each hunk
// asks for weakened("name").
func weaken(name, mutant string, sources map[string]string, read func(path string) (string, error)) error {
	if about, _, _ := strings.Cut(mutant, "\n"); !strings.HasSuffix(about, ".") {
		return fmt.Errorf("its first line is not a sentence about the defence: %q", about)
	}
	files := strings.Split(mutant, "\n--- ")[1:]
	if len(files) == 0 {
		return fmt.Errorf("it changes no file")
	}
	for _, f := range files {
		path, hunks, _ := strings.Cut(f, "\n")
		if _, ok := sources[path]; !ok {
			text, err := read(path)
			if err != nil {
				return err
			}
			sources[path] = text
		}
		for i, hunk := range strings.Split("\n"+strings.TrimSuffix(hunks, "\n"), "\n@@\n")[1:] {
			var before, after bytes.Buffer
			for line := range strings.Lines(hunk + "\n") {
				if line[0] != '+' {
					before.WriteString(line[1:])
				}
				if line[0] != '-' {
					after.WriteString(line[1:])
				}
				if !strings.ContainsRune("+- ", rune(line[0])) {
					return fmt.Errorf("%s, hunk %d: a line begins with %q", path, i+1, line[:1])
				}
			}
			if !strings.Contains(after.String(), `weakened("`+name+`")`) {
				return fmt.Errorf("%s, hunk %d: it does not ask for weakened(%q)", path, i+1, name)
			}
			if n := strings.Count("\n"+sources[path], "\n"+before.String()); n != 1 {
				return fmt.Errorf("%s, hunk %d: this is in the file %d times, not once:\n%s", path, i+1, n, &before)
			}
			sources[path] = strings.TrimPrefix(strings.Replace("\n"+sources[path], "\n"+before.String(), "\n"+after.String(), 1), "\n")
		}
	}
	return nil
}

// TestMutantsThatDoNotApply: a mutant of code that has changed is an error, never left out.
func TestMutantsThatDoNotApply(t *testing.T) {
	t.Parallel()
	const source = "package p\n\nfunc f() int {\n\treturn 1\n}\n\nfunc g() int {\n\treturn 1\n}\n"
	for name, c := range map[string]struct{ mutant, want string }{
		"gone":       {"A.\n--- f.go\n@@\n-\treturn 2\n+\treturn weakened(\"x\")\n", "0 times"},
		"ambiguous":  {"A.\n--- f.go\n@@\n-\treturn 1\n+\treturn weakened(\"x\")\n", "2 times"},
		"other name": {"A.\n--- f.go\n@@\n func g() int {\n+weakened(\"y\")\n", "does not ask"},
		"no file":    {"A.\n", "no file"},
		"no mark":    {"A.\n--- f.go\n@@\nfunc g() int {\n", "begins with"},
		"no words":   {"\n--- f.go\n", "not a sentence"},
		"applies":    {"A.\n--- f.go\n@@\n func g() int {\n-\treturn 1\n+\treturn weakened(\"x\")\n", ""},
	} {
		err := weaken("x", c.mutant, map[string]string{}, func(string) (string, error) { return source, nil })
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}
