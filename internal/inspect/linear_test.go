package inspect

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// text is head as often as it fits, and where there is a tail, that in the second half.
type text struct {
	head, tail string
	names      bool // no expression is tried on it
}

// repeated are texts that a redactor might go through again and again.
var repeated = []text{
	{head: "a ", names: true}, {head: "a=", names: true}, {head: "token=", names: true}, {head: `token="`, names: true},
	{head: "--password ", names: true}, {head: "token:\n", names: true}, {head: "token: |\n", names: true}, {head: `X="`, names: true},
	{head: "a\n", names: true}, {head: "\v", names: true}, {head: "token=[", names: true}, {head: "token={x ", names: true},
	{head: "://a:"}, {head: "://@"}, {head: "eyJ"}, {head: "LS0tLS1CRUdJTi"}, {head: "-----BEGIN PRIVATE KEY-----"},
	{head: "?a="}, {head: "mysql -p"}, {head: "bearer "},
	{head: "password=x ", tail: " ", names: true}, {head: "password=x ", tail: "\v", names: true}, {head: "token=[x] ", tail: "\v"}, {head: `"token":"x",`, tail: "\v"},
	{head: "token='", tail: "a"}, {head: `token=\"`, tail: "x"}, {head: "://a:b@", tail: "a"}, {head: "://:@x ", tail: "@x"},
	{head: "mysql ", tail: "a "}, {head: "curl -u a ", tail: "x"},
}

// TestRedactIsLinear counts the steps that the redactor and the packages below it take, as the counters of
// coverage have them: no clock has a part in it. Whatever a text repeats, each of its bytes may take some
// hundred steps, and where expressions of Go's are tried on it some thousand. What goes through the rest of
// a line again and again takes more than that for 32 KiB.
func TestRedactIsLinear(t *testing.T) {
	t.Parallel()
	for _, problem := range slow(t, nil, repeated) {
		t.Error(problem)
	}
}

// TestSlowRedactorIsFound: without the repairs that made the redactor fast, the count says so.
func TestSlowRedactorIsFound(t *testing.T) {
	t.Parallel()
	names, blanks := text{head: "a ", names: true}, text{head: "password=x ", tail: " ", names: true}
	problems := slow(t, strings.NewReplacer(
		"assigns && onlySpace(value)", `strings.TrimSpace(value) == "" && assigns`,
		"m, ok := nextAssignment(body[at:])", "m, ok := byExpression(body[at:])",
		"// scanner goes", `var assignment = regexp.MustCompile(`+"`"+assignment.String()+"`"+`)

func byExpression(s string) (found, bool) {
	m := assignment.FindStringSubmatchIndex(s)
	if m == nil {
		return found{}, false
	}
	f := found{dashes: m[4], name: m[4], end: m[5], quoted: m[6] >= 0, sep: m[8], sepEnd: m[9]}
	if m[2] >= 0 {
		f.dashes = m[2]
	}
	return f, true
}

// scanner goes`), []text{names, blanks})
	all := strings.Join(problems, "\n")
	for _, r := range []text{names, blanks} {
		if want := fmt.Sprintf("%q and %q: ", r.head, r.tail); !strings.Contains(all, want) {
			t.Errorf("the redactor as it was is not found to be slow with %s\n%s", want, all)
		}
	}
}

// slow builds the redactor with counters, changed if change is not nil, and returns for which texts it takes
// too many steps.
func slow(t *testing.T, change *strings.Replacer, texts []text) (problems []string) {
	t.Helper()
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// A module of the redactor's files alone: with them, packages of Go's own are built with counters.
	write("go.mod", "module steps\n\ngo 1.26\n")
	files := []string{"redact.go", "text.go", "objects.go", "assignment.go"}
	env, err := filepath.Glob("../snapenv/*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range append(files, env...) {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.ReplaceAll(string(data), `"microk8s/internal/`, `"steps/`)
		if change != nil && filepath.Base(file) == "text.go" {
			text = change.Replace(text)
		}
		write(strings.TrimPrefix(filepath.Join("inspect", file), "inspect/../"), text)
	}
	write("inspect/steps_test.go", `package inspect

import (
	"os"
	"strconv"
	"strings"
	"testing"
)

func TestSteps(t *testing.T) {
	size, _ := strconv.Atoi(os.Getenv("STEPS_SIZE"))
	var text string
	if head, tail := os.Getenv("STEPS_HEAD"), os.Getenv("STEPS_TAIL"); tail == "" {
		text = strings.Repeat(head, size/len(head))
	} else {
		text = strings.Repeat(head, size/2/len(head)) + strings.Repeat(tail, size/2/len(tail))
	}
	r := newRedactor(map[string]bool{"0123456789abcdef": true})
	r.Redact(text)
	r.RedactFile("kubelet", text)
	r.RedactFile("kubelet-env", text)
}
`)
	program := filepath.Join(dir, "steps.test")
	build := exec.CommandContext(t.Context(), "go", "test", "-c", "-covermode=atomic", "-coverpkg=./inspect,regexp,strings,bytes,unicode/utf8", "-o", program, "./inspect")
	build.Dir = dir
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-trimpath", "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("cannot build the redactor with counters: %v\n%s", err, out)
	}
	steps := func(head, tail string, size int) (n int) {
		t.Helper()
		profile := filepath.Join(dir, "profile")
		cmd := exec.CommandContext(t.Context(), program, "-test.coverprofile="+profile)
		cmd.Env = append(os.Environ(), "STEPS_HEAD="+head, "STEPS_TAIL="+tail, fmt.Sprintf("STEPS_SIZE=%d", size))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		f, err := os.Open(profile)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		lines := bufio.NewScanner(f)
		for lines.Scan() { // FILE:FROM,TO STATEMENTS TIMES
			if fields := strings.Fields(lines.Text()); len(fields) == 3 {
				statements, err := strconv.Atoi(fields[1])
				times, err2 := strconv.Atoi(fields[2])
				if err != nil || err2 != nil {
					t.Fatalf("the profile has the line %q", lines.Text())
				}
				n += statements * times
			}
		}
		if err := lines.Err(); err != nil {
			t.Fatal(err)
		}
		return n
	}
	const size = 32 << 10
	start := steps("x", "", 0)
	for _, r := range texts {
		most := 2500
		if r.names {
			most = 450
		}
		if n := (steps(r.head, r.tail, size) - start) / size; n == 0 || n > most {
			problems = append(problems, fmt.Sprintf("%q and %q: %d steps for each byte, at most %d are wanted", r.head, r.tail, n, most))
		}
	}
	return problems
}
