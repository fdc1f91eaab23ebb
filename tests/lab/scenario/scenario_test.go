package scenario

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"microk8s/tests/lab"
)

// fakeLab stands in for a lab, and writes down what is done to it.
type fakeLab struct{ did []string }

func (f *fakeLab) note(format string, a ...any) error {
	f.did = append(f.did, strings.TrimSpace(fmt.Sprintf(format, a...)))
	return nil
}
func (f *fakeLab) Up(_ context.Context, n string, _ lab.Options) error { return f.note("up %s", n) }
func (f *fakeLab) Start(_ context.Context, n string) error             { return f.note("start %s", n) }
func (f *fakeLab) Kill(_ context.Context, n string) error              { return f.note("kill %s", n) }
func (f *fakeLab) Pause(_ context.Context, n string) error             { return f.note("pause %s", n) }
func (f *fakeLab) Resume(_ context.Context, n string) error            { return f.note("resume %s", n) }
func (f *fakeLab) Cut(_ context.Context, a, b string) error            { return f.note("cut %s %s", a, b) }
func (f *fakeLab) Heal(_ context.Context, n ...string) error {
	return f.note("heal %s", strings.Join(n, " "))
}
func (f *fakeLab) Disk(_ context.Context, n string, s int64) error { return f.note("disk %s %d", n, s) }
func (f *fakeLab) Exec(_ context.Context, n string, c lab.Command) error {
	fmt.Fprintln(c.Stdout, "it says", n)
	return f.note("exec %s %s", n, c.Args[2])
}

const head = "version: 1\nhosts: [{name: n1}, {name: n2}]\n"

func TestMistakes(t *testing.T) {
	for text, want := range map[string]string{
		"version: 2\nhosts: [{name: n1}]\nsteps: []\n":                      "version: 2 is not known; write version: 1",
		"version: 1\nsteps: []\n":                                           "hosts: there are none",
		"version: 1\nhosts: [{name: n1}, {name: n1}]\nsteps: []\n":          "n1 is there twice",
		"version: 1\nhosts: [{nam: n1}]\nsteps: []\n":                       `it is not a scenario: unknown field "nam"`,
		"version: 1\nhosts: [{name: n1, disk: big}]\nsteps: []\n":           `"big" is not a size`,
		head + "steps: [{at: 1s}]\n":                                        "steps: number 1: it has 0 actions, and should have one of kill, start",
		head + "steps: [{kill: n1, start: n1}]\n":                           "number 1: it has 2 actions",
		head + "steps: [{kill: n3}]\n":                                      `there is no host "n3" in hosts`,
		head + "steps: [{kill: $x}]\n":                                      "there is no x in choose",
		head + "choose: {x: [n9]}\nsteps: []\n":                             "there is no host n9 in hosts",
		head + "steps: [{at: 5s, kill: n1}, {at: 2s, start: n1}]\n":         "number 2: at: 2s is before the step above it, at 5s",
		head + "steps: [{at: soon, kill: n1}]\n":                            "it is not a scenario",
		head + "steps: [{run: {host: n1}}]\n":                               "there is no command",
		head + "steps: [{expect: {host: n1, command: a, output: \"(\"}}]\n": "output: error parsing regexp",
		head + "steps: [{disk: {host: n1, size: x}}]\n":                     `disk: size: "x" is none`,
		head + "steps: [{cut: [n1, n2, n1]}]\n":                             "one host or two",
		head + "steps: [{heal: [all]}, {cut: [all]}]\n":                     `number 2: there is no host "all"`,
		"- a\n": "it is not a scenario",
	} {
		if _, err := Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s\n got %v\nwant %s", text, err, want)
		}
	}
}

func TestPlay(t *testing.T) {
	s, err := Parse([]byte(head + `choose: {victim: [n1, n2]}
product: true
steps:
- kill: $victim
- at: 50ms
  start: $victim
- cut: [n1]
- heal: [all]
- disk: {host: n2, size: 1Mi}
- run: {host: n1, command: "true"}
- expect: {host: n2, command: "true", output: says n2}
`))
	if err != nil {
		t.Fatal(err)
	}
	played := func(seed uint64) (did []string, out string) {
		f, b := &fakeLab{}, &bytes.Buffer{}
		began := time.Now()
		if err := Play(t.Context(), f, s, seed, b); err != nil {
			t.Fatal(err)
		}
		if time.Since(began) < 50*time.Millisecond {
			t.Error("the second step did not wait for its time")
		}
		return f.did, b.String()
	}
	did, out := played(1)
	_, victim, _ := strings.Cut(did[4], "kill ")
	want := []string{"up n1", "up n2", "exec n1 microk8s start", "exec n2 microk8s start", "kill " + victim, "start " + victim, "cut n1", "heal", "disk n2 1048576", "exec n1 true", "exec n2 true"}
	if !slices.Equal(did, want) || !strings.HasPrefix(out, "seed 1\n$victim is "+victim+"\n") {
		t.Errorf("did %q\nwant %q\nsaid %s", did, want, out)
	}
	if again, _ := played(1); !slices.Equal(again, did) {
		t.Errorf("with the same seed: %q", again)
	}
	s.Steps[5].Run.Output = "something else"
	if err := Play(t.Context(), &fakeLab{}, s, 1, &bytes.Buffer{}); err == nil || !strings.Contains(err.Error(), "step 6, run on n1: true: no match of") {
		t.Errorf("a step that fails: %v", err)
	}
}

// TestRecord holds that what is recorded can be played.
func TestRecord(t *testing.T) {
	r := Recorder{Path: filepath.Join(t.TempDir(), "met.yaml"), Began: time.Now()}
	if err := r.Begin([]Host{{Name: "n1"}}); err != nil {
		t.Fatal(err)
	}
	if err := r.Begin(nil); err == nil {
		t.Error("a file that exists was replaced")
	}
	for i, err := range []error{
		r.AddHost(Host{Name: "n2"}), r.AddHost(Host{Name: "n2"}),
		r.Add(Step{Kill: "n2"}, r.Began.Add(1500*time.Millisecond)),
		r.Add(Step{Run: &Command{On: "n1", Command: "false", Exit: 1}}, r.Began.Add(2*time.Second)),
	} {
		if err != nil {
			t.Fatalf("%d: %v", i, err)
		}
	}
	data, err := os.ReadFile(r.Path)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Parse(data)
	if err != nil {
		t.Fatalf("%v\n%s", err, data)
	}
	if len(s.Hosts) != 2 || len(s.Steps) != 2 || s.Steps[0].Kill != "n2" || s.Steps[0].At.Duration != 1500*time.Millisecond || s.Steps[1].Run.Exit != 1 {
		t.Errorf("recorded:\n%s", data)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(head + "steps: [{at: 1s, kill: n1}]\n"))
	f.Fuzz(func(_ *testing.T, data []byte) { _, _ = Parse(data) })
}
