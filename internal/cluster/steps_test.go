package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"microk8s/internal/journal"
	"microk8s/internal/service"
)

// TestStepsOfEveryPlan wants a title for each step, and no entry for a step that there is not.
func TestStepsOfEveryPlan(t *testing.T) {
	used := map[string]bool{}
	for operation, ids := range Steps() {
		for _, id := range ids {
			used[id] = true
			if titles[id] == "" {
				t.Errorf("%s/%s has no title", operation, id)
			}
		}
	}
	for id := range titles {
		if !used[id] {
			t.Errorf("no operation has the step %s", id)
		}
	}
	for old, id := range renamed {
		if !used[id] {
			t.Errorf("%q is renamed to %s, which no operation has", old, id)
		}
	}
}

// TestJournalsOfAnEarlierVersion takes the journals that the version before step IDs wrote, one
// for each step of each operation, and wants every one of them to be finished, or undone. The
// files have what that version wrote, but for the connection.
func TestJournalsOfAnEarlierVersion(t *testing.T) {
	for _, operation := range []string{opJoin, opJoinWorker, opLeave, opRemove} {
		data, err := os.ReadFile(filepath.Join("testdata/journals", operation+".jsonl"))
		if err != nil {
			t.Fatal(err)
		}
		ids, undos := Steps()[operation], Undos()[operation]
		slices.Reverse(undos)
		forward, back := 0, 0
		for line := range bytes.Lines(data) {
			var old journal.Record
			if err := json.Unmarshal(line, &old); err != nil {
				t.Fatal(err)
			}
			// Which step a line is about follows from its place in the file, not from renamed.
			if !old.Undoing {
				id := ids[forward]
				forward++
				t.Run(fmt.Sprintf("%s/%s/forward", operation, old.Step), func(t *testing.T) { testOldForward(t, old, id) })
				if !slices.Contains([]string{opJoin, opJoinWorker}, operation) || slices.Contains([]string{StepConfirm, StepCleanUp}, id) {
					continue
				}
				t.Run(fmt.Sprintf("%s/%s/undo", operation, old.Step), func(t *testing.T) { testOldUndo(t, old, id+"/begin") })
				continue
			}
			id := undos[back]
			back++
			t.Run(fmt.Sprintf("%s/%s/undoing", operation, old.Step), func(t *testing.T) { testOldUndo(t, old, id+"/undo-begin") })
		}
		if forward != len(ids) {
			t.Errorf("%s has %d steps and %d lines", operation, len(ids), forward)
		}
	}
}

// replaceJournal puts what an earlier version wrote in the journal's place.
func (s *site) replaceJournal(t *testing.T, old journal.Record, worker bool) {
	t.Helper()
	if old.Operation != opRemove {
		old.Params = s.params(t, old.Params, worker)
	}
	data, err := json.Marshal(old)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(data), "title") {
		t.Fatalf("an earlier version did not write %s", data)
	}
	if err := os.WriteFile(s.env.Journal(), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// params puts the connection to this test's agent into a journal's.
func (s *site) params(t *testing.T, raw json.RawMessage, worker bool) json.RawMessage {
	t.Helper()
	var p map[string]any
	if err := json.Unmarshal(raw, &p); err != nil {
		t.Fatal(err)
	}
	if _, ok := p["connection"]; ok {
		p["connection"] = s.options(t, worker).Target.Reveal()
	}
	raw, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func testOldForward(t *testing.T, old journal.Record, id string) {
	t.Parallel()
	s := newSite(t)
	worker := old.Operation != opJoin
	if old.Operation == opRemove { // its plan alone: no other node is here to be removed
		j := s.journal(t)
		s.replaceJournal(t, old, false)
		plan := s.node().removePlan(&removeParams{})
		var ran []string
		for i := range plan.Steps {
			at := plan.Steps[i].ID
			plan.Steps[i].Do = func(context.Context) error { ran = append(ran, at); return nil }
		}
		if err := j.Resume(t.Context(), plan); err != nil || len(ran) == 0 || ran[0] != id || ran[len(ran)-1] != StepDelete {
			t.Errorf("%v, ran %q, want from %s", err, ran, id)
		}
		return
	}
	run := func(j *journal.Journal) error { return s.node().Join(t.Context(), j, s.options(t, worker)) }
	if old.Operation == opLeave {
		j := s.journal(t)
		if err := run(j); err != nil {
			t.Fatal(err)
		}
		j.Close()
		run = func(j *journal.Journal) error { return s.node().Leave(t.Context(), j, LeaveOptions{}) }
	}
	j := s.journal(t)
	if dead, err := dying(j, old.Operation+"/"+id+"/begin", func() error { return run(j) }); !dead {
		t.Fatalf("it did not come there: %v", err)
	}
	s.replaceJournal(t, old, worker)
	if err := run(s.journal(t)); err != nil {
		t.Fatal(err)
	}
	if old.Operation == opLeave {
		if r, err := Pending(s.env); r != nil || err != nil || IsMember(s.env) {
			t.Errorf("pending: %+v, %v", r, err)
		}
		return
	}
	s.wantJoined(t, worker)
}

func testOldUndo(t *testing.T, old journal.Record, at string) {
	t.Parallel()
	s := newSite(t)
	worker := old.Operation == opJoinWorker
	before := s.tree(t)
	if old.Undoing {
		s.services.refuse = service.Kubelite
	}
	j := s.journal(t)
	if dead, err := dying(j, old.Operation+"/"+at, func() error { return s.node().Join(t.Context(), j, s.options(t, worker)) }); !dead {
		t.Fatalf("it did not come there: %v", err)
	}
	s.services.refuse = ""
	s.replaceJournal(t, old, worker)
	if found, err := s.node().UndoJoin(t.Context(), s.journal(t)); !found || err != nil {
		t.Fatalf("%v, %v", found, err)
	}
	compare(t, before, s.tree(t))
}

// TestPlacedNetwork leaves a cluster that has a pod network of its own: what the join has placed in
// the manifest's place is removed, recorded or not, and what somebody has put there since stays.
func TestPlacedNetwork(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(t *testing.T, s *site)
		left   string
	}{
		{"as it was placed", func(*testing.T, *site) {}, ""},
		{"placed with another version's text", func(t *testing.T, s *site) {
			for _, path := range []string{s.file(placedCNI), s.env.CNIManifest()} {
				write(t, path, "# Another text.\n")
			}
		}, ""},
		{"placed by a version without the record", func(t *testing.T, s *site) {
			if err := os.Remove(s.file(placedCNI)); err != nil {
				t.Fatal(err)
			}
			write(t, s.env.CNIManifest(), "# The cluster that this node has joined brings its own pod network.\n")
		}, ""},
		{"the user's", func(t *testing.T, s *site) {
			write(t, s.env.CNIManifest(), foreignCNI+"kind: DaemonSet\n")
		}, foreignCNI + "kind: DaemonSet\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newSite(t)
			s.foreignCNI = true
			j := s.journal(t)
			if err := s.node().Join(t.Context(), j, s.options(t, true)); err != nil {
				t.Fatal(err)
			}
			if read(t, s.env.CNIManifest()) != foreignCNI {
				t.Error("the built-in pod network does not stand aside")
			}
			tc.change(t, s)
			if err := s.node().Leave(t.Context(), j, LeaveOptions{}); err != nil {
				t.Fatal(err)
			}
			if now, _ := os.ReadFile(s.env.CNIManifest()); string(now) != tc.left {
				t.Errorf("the manifest is %q, want %q", now, tc.left)
			}
		})
	}
}

func (s *site) file(name string) string { return filepath.Join(s.env.ClusterDir(), name) }

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
