// Package journal carries out changes that consist of several steps, so that they can be
// interrupted anywhere, by a crash or kill -9 too, and end either done or undone.
//
// A [Plan] is a list of steps, each of which can be run again after an interruption and knows how
// to undo itself. A [Journal] is a file that records which step is under way; it is on disk before
// the step begins. When a step fails, it and those before it are undone in reverse order, up to
// the plan's commit: from there on a plan only goes forward, and a failed one is finished by
// running it again.
//
// A step is stored by its ID, which stays the same as long as a journal may hold it. Its title is
// for people and may change with any version.
//
// What the steps do, and what they must remember (it belongs in the journal's parameters), is
// up to the callers: internal/cluster has joining, leaving and removing.
package journal

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"microk8s/internal/atomicfile"
)

// Step is one part of a change. Do and Undo may have been interrupted before and then are run
// again from their beginning; Undo is also run when Do never began to change anything.
type Step struct {
	// ID is what the journal stores and what a [Point] names: unique in its plan, words of
	// a-z joined by hyphens, as "save-state". It never changes once a version with it is out.
	ID string
	// Title is what people read while the step runs: the beginning of a sentence, as "Stop the
	// services".
	Title string
	Do    func(ctx context.Context) error
	Undo  func(ctx context.Context) error // nil if there is nothing to undo
}

// Plan is a change.
type Plan struct {
	Operation string // "join"
	Steps     []Step
	// Commit is the ID of the first step that is not undone, nor are those before it once it has
	// begun. "" means that all of them can be.
	Commit string
	// Renamed maps what earlier versions stored for a step to its ID, so that a change which they
	// began can be finished or undone. Entries for steps of other plans do no harm.
	Renamed map[string]string
}

// IDs returns the IDs of the plan's steps, in order.
func (p Plan) IDs() []string {
	var out []string
	for _, s := range p.Steps {
		out = append(out, s.ID)
	}
	return out
}

// Undos returns the IDs of the steps that have something to undo, in order, as long as the plan
// has not come to its commit.
func (p Plan) Undos() []string {
	var out []string
	for _, s := range p.Steps[:p.commit()] {
		if s.Undo != nil {
			out = append(out, s.ID)
		}
	}
	return out
}

// index returns the index of the step with an ID, or with a name of an earlier version; -1 if
// there is none.
func (p Plan) index(id string) int {
	is := func(id string) int { return slices.IndexFunc(p.Steps, func(s Step) bool { return s.ID == id }) }
	if i := is(id); i >= 0 {
		return i
	}
	if now, ok := p.Renamed[id]; ok {
		return is(now)
	}
	return -1
}

// commit is the index of the first step that is not undone.
func (p Plan) commit() int {
	if i := p.index(p.Commit); i >= 0 {
		return i
	}
	return len(p.Steps)
}

var stepID = regexp.MustCompile(`^[a-z]+(-[a-z]+)*$`)

func (p Plan) check() error {
	seen := map[string]bool{}
	for _, s := range p.Steps {
		if !stepID.MatchString(s.ID) || s.Title == "" || s.Do == nil || seen[s.ID] {
			return fmt.Errorf("step %q of %s lacks an ID of a-z and hyphens, a title or something to do, or is there twice", s.ID, p.Operation)
		}
		seen[s.ID] = true
	}
	if p.Commit != "" && !seen[p.Commit] {
		return fmt.Errorf("%s has no step %q", p.Operation, p.Commit)
	}
	return nil
}

// Record is what the file holds: a change that was begun and is neither done nor undone.
type Record struct {
	Operation string          `json:"operation"`
	Params    json.RawMessage `json:"params,omitempty"` // what the steps need to know; may hold secrets
	Step      string          `json:"step"`             // ID of the one under way, or to be undone next
	Title     string          `json:"title,omitempty"`  // the step's, for readers without the plan
	Undoing   bool            `json:"undoing,omitempty"`
	Reason    string          `json:"reason,omitempty"` // why it is undone
}

// At returns what to show people for the step: its title. Earlier versions stored that alone.
func (r Record) At() string {
	if r.Title != "" {
		return r.Title
	}
	return r.Step
}

// under notes that a step is under way.
func (r *Record) under(s Step) { r.Step, r.Title = s.ID, s.Title }

// Point is a moment in a change. For each step there are two: it has been written down and
// nothing has been done, and all is done and that has not been written down.
type Point struct {
	Operation, Step string // Step is an ID
	Undo, End       bool
}

// String returns the form in which a person names a point: join/stop/begin.
func (p Point) String() string {
	what := "begin"
	switch {
	case p.Undo && p.End:
		what = "undo-end"
	case p.Undo:
		what = "undo-begin"
	case p.End:
		what = "end"
	}
	return p.Operation + "/" + p.Step + "/" + what
}

// ErrBusy is returned while another process carries out a change of this node.
var ErrBusy = errors.New("another change of this node is under way")

// Journal is the file of one node. Only one process has it at a time; its methods may not be
// called concurrently.
type Journal struct {
	// Show is called around each step, for people who watch; nil just runs it.
	Show func(s Step, undo bool, run func() error) error
	// At is called at each point; tests end the process there.
	At  func(Point)
	Log *slog.Logger

	path string
	lock *os.File
	once sync.Once
}

// Open takes the journal at path, which need not exist; its directory is made, for root alone.
// The error wraps ErrBusy while another process has it. [Journal.Close] releases it.
func Open(path string) (*Journal, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("cannot open the journal: %w", err)
	}
	f, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot open the journal: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w (%s is locked); wait until it has ended", ErrBusy, path)
		}
		return nil, fmt.Errorf("cannot lock the journal: %w", err)
	}
	return &Journal{path: path, lock: f, Log: slog.New(slog.DiscardHandler)}, nil
}

// Close releases the journal. It may be called twice.
func (j *Journal) Close() error {
	var err error
	j.once.Do(func() { err = j.lock.Close() })
	return err
}

// Read returns the change that was begun and has not ended, nil if there is none. It needs no open
// journal: status reads it beside a running change.
func Read(path string) (*Record, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the journal: %w", err)
	}
	var r Record
	err = json.Unmarshal(data, &r)
	if err == nil && (r.Operation == "" || r.Step == "") {
		err = errors.New("it names no step")
	}
	if err != nil {
		return nil, fmt.Errorf("the journal %s is damaged: %w", path, err)
	}
	return &r, nil
}

// Pending returns the change that was begun and has not ended, nil if there is none.
func (j *Journal) Pending() (*Record, error) { return Read(j.path) }

func (j *Journal) write(r Record) error {
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("cannot write the journal: %w", err)
	}
	return atomicfile.Write(j.path, data, 0o600, nil)
}

func (j *Journal) remove() error {
	if err := os.Remove(j.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot remove the journal: %w", err)
	}
	dir, err := os.Open(filepath.Dir(j.path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// Failed is the error of a change that did not succeed.
type Failed struct {
	Step string // ID of the step that failed
	Err  error
	// Undone: nothing is left of the change. If it is not set, the change is still in the
	// journal: running it again goes on, forward or backward.
	Undone  bool
	UndoErr error // why undoing it failed; nil if it was not tried
}

func (f *Failed) Error() string {
	if f.UndoErr != nil {
		return fmt.Sprintf("%v; and undoing it failed: %v", f.Err, f.UndoErr)
	}
	return f.Err.Error()
}

func (f *Failed) Unwrap() []error { return []error{f.Err, f.UndoErr} }

// Run begins a change and carries it out. There must not be one that was begun before. Params
// is kept in the file as JSON.
func (j *Journal) Run(ctx context.Context, plan Plan, params any) error {
	old, err := j.Pending()
	if err != nil {
		return err
	}
	if old != nil {
		return fmt.Errorf("cannot begin to %s: the step %q of %s has not ended", plan.Operation, old.At(), old.Operation)
	}
	data, err := json.Marshal(params)
	if err != nil {
		return fmt.Errorf("cannot write the journal: %w", err)
	}
	return j.forward(ctx, plan, Record{Operation: plan.Operation, Params: data}, 0)
}

// Resume goes on with the change in the journal, of which plan is the list of steps: forward,
// or backward if it was being undone. It does nothing if nothing is pending.
func (j *Journal) Resume(ctx context.Context, plan Plan) error {
	r, i, err := j.find(plan)
	if err != nil || r == nil {
		return err
	}
	if r.Undoing {
		if err := j.backward(ctx, plan, *r, i); err != nil {
			return &Failed{Step: r.Step, Err: errors.New(r.Reason), UndoErr: err}
		}
		return &Failed{Step: r.Step, Err: errors.New(r.Reason), Undone: true}
	}
	return j.forward(ctx, plan, *r, i)
}

// ErrCommitted is wrapped when a change is past its commit.
var ErrCommitted = errors.New("past the point of no return; it can only be finished")

// Undo undoes the change in the journal. The error wraps ErrCommitted if the change is past its
// commit. It does nothing if nothing is pending.
func (j *Journal) Undo(ctx context.Context, plan Plan, reason string) error {
	r, i, err := j.find(plan)
	if err != nil || r == nil {
		return err
	}
	if i >= plan.commit() && !r.Undoing {
		return fmt.Errorf("cannot undo %s at %q: %w", plan.Operation, r.At(), ErrCommitted)
	}
	if !r.Undoing {
		r.Reason = reason
	}
	return j.backward(ctx, plan, *r, i)
}

func (j *Journal) find(plan Plan) (*Record, int, error) {
	if err := plan.check(); err != nil {
		return nil, 0, err
	}
	r, err := j.Pending()
	if err != nil || r == nil {
		return nil, 0, err
	}
	i := plan.index(r.Step)
	if r.Operation != plan.Operation || i < 0 {
		return nil, 0, fmt.Errorf("cannot go on with %s in %s: this version has no step %q; finish it with the version that began it", r.Operation, j.path, r.Step)
	}
	r.under(plan.Steps[i])
	return r, i, nil
}

func (j *Journal) forward(ctx context.Context, plan Plan, r Record, from int) error {
	if err := plan.check(); err != nil {
		return err
	}
	for i := from; i < len(plan.Steps); i++ {
		s := plan.Steps[i]
		err := ctx.Err()
		if err == nil {
			r.under(s)
			if err := j.write(r); err != nil {
				// What is on disk is the step before, and this one has done nothing yet.
				if i == from && from == 0 {
					return err
				}
				return j.failed(ctx, plan, r, i-1, err)
			}
			j.at(Point{Operation: plan.Operation, Step: s.ID})
			err = j.show(s, false, func() error { return s.Do(ctx) })
		} else if i == 0 {
			return err
		}
		if err != nil {
			return j.failed(ctx, plan, r, i, err)
		}
		j.Log.Debug("step done", "operation", plan.Operation, "step", s.ID)
		j.at(Point{Operation: plan.Operation, Step: s.ID, End: true})
	}
	return j.remove()
}

func (j *Journal) failed(ctx context.Context, plan Plan, r Record, i int, err error) error {
	f := &Failed{Step: plan.Steps[i].ID, Err: err}
	if i >= plan.commit() {
		return f
	}
	r.under(plan.Steps[i])
	r.Reason = err.Error()
	f.UndoErr = j.backward(context.WithoutCancel(ctx), plan, r, i)
	f.Undone = f.UndoErr == nil
	return f
}

func (j *Journal) backward(ctx context.Context, plan Plan, r Record, from int) error {
	r.Undoing = true
	for i := from; i >= 0; i-- {
		s := plan.Steps[i]
		if s.Undo == nil {
			continue
		}
		r.under(s)
		if err := j.write(r); err != nil {
			return err
		}
		j.at(Point{Operation: plan.Operation, Step: s.ID, Undo: true})
		if err := j.show(s, true, func() error { return s.Undo(ctx) }); err != nil {
			return fmt.Errorf("%q: %w", s.Title, err)
		}
		j.at(Point{Operation: plan.Operation, Step: s.ID, Undo: true, End: true})
	}
	return j.remove()
}

func (j *Journal) at(p Point) {
	if j.At != nil {
		j.At(p)
	}
}

func (j *Journal) show(s Step, undo bool, run func() error) error {
	if j.Show != nil {
		return j.Show(s, undo, run)
	}
	return run()
}
