package journal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// disk is what the steps of a test change: the names of those that are in effect, in order. A
// step that is done twice is in effect once.
type disk struct {
	done  []string
	fail  map[string]error // by "do a" or "undo a"
	calls []string
}

func (d *disk) plan(commit string, names ...string) Plan {
	p := Plan{Operation: "join", Commit: commit}
	for _, n := range names {
		p.Steps = append(p.Steps, Step{
			ID: n, Title: "Do " + n,
			Do: func(context.Context) error {
				d.calls = append(d.calls, "do "+n)
				if !slices.Contains(d.done, n) {
					d.done = append(d.done, n)
				}
				return d.fail["do "+n]
			},
			Undo: func(context.Context) error {
				d.calls = append(d.calls, "undo "+n)
				if err := d.fail["undo "+n]; err != nil {
					return err
				}
				d.done = slices.DeleteFunc(d.done, func(x string) bool { return x == n })
				return nil
			},
		})
	}
	return p
}

func open(t *testing.T, path string) *Journal {
	t.Helper()
	j, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return j
}

func nothingPending(t *testing.T, path string) {
	t.Helper()
	if r, err := Read(path); r != nil || err != nil {
		t.Errorf("pending: %+v, %v", r, err)
	}
}

func TestRun(t *testing.T) {
	boom := errors.New("boom")
	for _, tc := range []struct {
		name    string
		fail    map[string]error
		commit  string
		done    string
		undone  bool
		pending bool
	}{
		{name: "all steps", commit: "c", done: "a b c d"},
		{name: "the first fails", fail: map[string]error{"do a": boom}, commit: "c", undone: true},
		{name: "one before the commit fails", fail: map[string]error{"do b": boom}, commit: "c", undone: true},
		{name: "the commit fails", fail: map[string]error{"do c": boom}, commit: "c", done: "a b c", pending: true},
		{name: "one after it fails", fail: map[string]error{"do d": boom}, commit: "c", done: "a b c d", pending: true},
		{name: "no commit, the last fails", fail: map[string]error{"do d": boom}, undone: true},
		{name: "undo fails", fail: map[string]error{"do c": boom, "undo b": errors.New("stuck")}, done: "a b", pending: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "journal")
			d := &disk{fail: tc.fail}
			err := open(t, path).Run(t.Context(), d.plan(tc.commit, "a", "b", "c", "d"), nil)
			var failed *Failed
			if (err != nil) != (tc.fail != nil) || err != nil && (!errors.Is(err, boom) || !errors.As(err, &failed)) {
				t.Fatalf("error: %v", err)
			}
			if failed != nil && failed.Undone != tc.undone {
				t.Errorf("Undone is %v", failed.Undone)
			}
			if got := strings.Join(d.done, " "); got != tc.done {
				t.Errorf("in effect: %q, want %q", got, tc.done)
			}
			if r, err := Read(path); (r != nil) != tc.pending || err != nil {
				t.Errorf("pending: %+v, %v", r, err)
			}
		})
	}
}

// killed is what At panics with where a process would be killed.
type killed struct{ at Point }

// runUntil carries out f until the n-th point and reports whether there was one.
func runUntil(j *Journal, n int, f func() error) (died bool, err error) {
	count := 0
	j.At = func(p Point) {
		if count++; count == n {
			panic(killed{p})
		}
	}
	defer func() {
		if r := recover(); r != nil {
			if _, ok := r.(killed); !ok {
				panic(r)
			}
			died = true
		}
	}()
	return false, f()
}

// TestKilledAnywhere kills a change at every point, and its repetition at every point of it,
// and wants the third to end in one of the two states.
func TestKilledAnywhere(t *testing.T) {
	for _, failing := range []string{"", "do b", "do c"} {
		for first := 1; ; first++ {
			more := false
			for second := 1; ; second++ {
				path := filepath.Join(t.TempDir(), "journal")
				d := &disk{fail: map[string]error{}}
				if failing != "" {
					d.fail[failing] = errors.New("boom")
				}
				plan := d.plan("d", "a", "b", "c", "d", "e")
				attempt := func(n int) (bool, error) {
					j := open(t, path)
					defer j.Close()
					return runUntil(j, n, func() error {
						if r, err := j.Pending(); err != nil || r != nil {
							if err == nil {
								err = j.Resume(t.Context(), plan)
							}
							return err
						}
						return j.Run(t.Context(), plan, nil)
					})
				}
				died1, _ := attempt(first)
				died2 := false
				if died1 {
					more = true
					if died2, _ = attempt(second); died2 {
						_, _ = attempt(-1)
					}
				}
				want := "a b c d e"
				if failing != "" {
					want = ""
				}
				if got := strings.Join(d.done, " "); got != want {
					t.Fatalf("%q, killed at point %d and then %d: in effect %q\n%v", failing, first, second, got, d.calls)
				}
				nothingPending(t, path)
				if !died2 {
					break
				}
			}
			if !more {
				if first < 5 {
					t.Fatalf("only %d points were met", first)
				}
				break
			}
		}
	}
}

func TestInterrupted(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	d := &disk{}
	ctx, cancel := context.WithCancel(t.Context())
	plan := d.plan("", "a", "b")
	plan.Steps[0].Do = func(context.Context) error {
		d.done = append(d.done, "a")
		cancel()
		return nil
	}
	var undone error
	undo := plan.Steps[0].Undo
	plan.Steps[0].Undo = func(ctx context.Context) error { undone = ctx.Err(); return undo(ctx) }
	err := open(t, path).Run(ctx, plan, nil)
	if !errors.Is(err, context.Canceled) || len(d.done) != 0 || undone != nil {
		t.Errorf("error %v, in effect %v, undone under a context with %v", err, d.done, undone)
	}
	nothingPending(t, path)
}

func TestUndo(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	d := &disk{}
	plan := d.plan("c", "a", "b", "c", "d")
	j := open(t, path)
	if err := j.Undo(t.Context(), plan, "nothing to do"); err != nil {
		t.Fatal(err)
	}
	if died, err := runUntil(j, 3, func() error { return j.Run(t.Context(), plan, map[string]int{"x": 1}) }); !died {
		t.Fatal(err)
	}
	if err := j.Run(t.Context(), plan, nil); err == nil {
		t.Error("a second change was begun")
	}
	if r, _ := j.Pending(); r == nil || r.Step != "b" || string(r.Params) != `{"x":1}` {
		t.Errorf("pending: %+v", r)
	}
	if err := j.Undo(t.Context(), plan, "not wanted"); err != nil || len(d.done) != 0 {
		t.Errorf("%v, in effect: %v", err, d.done)
	}
	nothingPending(t, path)

	if died, err := runUntil(j, 5, func() error { return j.Run(t.Context(), plan, nil) }); !died {
		t.Fatal(err)
	}
	if err := j.Undo(t.Context(), plan, "too late"); !errors.Is(err, ErrCommitted) {
		t.Errorf("undo after the commit: %v", err)
	}
}

func TestBusy(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	j := open(t, path)
	if _, err := Open(path); !errors.Is(err, ErrBusy) {
		t.Errorf("a second process: %v", err)
	}
	j.Close()
	open(t, path)
}

func TestForeignRecords(t *testing.T) {
	for _, tc := range []struct{ name, text, want string }{
		{"torn", `{"operation":"jo`, "damaged"},
		{"empty", ``, "damaged"},
		{"a step of another version", `{"operation":"join","step":"zzz"}`, "this version has no step"},
		{"another operation", `{"operation":"leave","step":"a"}`, "this version has no step"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "journal")
			if err := os.WriteFile(path, []byte(tc.text), 0o600); err != nil {
				t.Fatal(err)
			}
			d := &disk{}
			err := open(t, path).Resume(t.Context(), d.plan("", "a"))
			if err == nil || !strings.Contains(err.Error(), tc.want) || len(d.calls) != 0 {
				t.Errorf("%v, calls %v", err, d.calls)
			}
		})
	}
}

// TestRenamedStep has journals that hold what an earlier version stored for a step.
func TestRenamedStep(t *testing.T) {
	for _, tc := range []struct{ name, text, calls, says string }{
		{"forward", `{"operation":"join","step":"Old b"}`, "do b do c", "Old b"},
		{"backward", `{"operation":"join","step":"Old b","undoing":true,"reason":"x"}`, "undo b undo a", "Old b"},
		{"of today", `{"operation":"join","step":"b","title":"Do b"}`, "do b do c", "Do b"},
		{"of another plan only", `{"operation":"join","step":"Other"}`, "", "Other"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "journal")
			if err := os.WriteFile(path, []byte(tc.text), 0o600); err != nil {
				t.Fatal(err)
			}
			if r, err := Read(path); err != nil || r.At() != tc.says {
				t.Errorf("read %+v, %v", r, err)
			}
			d := &disk{}
			plan := d.plan("", "a", "b", "c")
			plan.Renamed = map[string]string{"Old b": "b", "Other": "z"}
			err := open(t, path).Resume(t.Context(), plan)
			if got := strings.Join(d.calls, " "); got != tc.calls {
				t.Errorf("ran %q, want %q (%v)", got, tc.calls, err)
			}
			if tc.calls != "" {
				nothingPending(t, path)
			}
		})
	}
}

func TestPlansAreChecked(t *testing.T) {
	d := &disk{}
	for i, plan := range []Plan{d.plan("x", "a"), d.plan("", "a", "a"), d.plan("", ""), d.plan("", "Stop it"), {Operation: "o", Steps: []Step{{ID: "a", Title: "A"}}}, {Operation: "o", Steps: []Step{{ID: "a", Do: d.plan("", "a").Steps[0].Do}}}} {
		path := filepath.Join(t.TempDir(), fmt.Sprint(i))
		if err := open(t, path).Run(t.Context(), plan, nil); err == nil {
			t.Errorf("plan %d was run", i)
		}
		nothingPending(t, path)
	}
}
