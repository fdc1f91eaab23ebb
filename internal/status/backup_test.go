package status

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/archive"
	"microk8s/internal/archive/schedule"
)

// TestBackups: what is said of the age of archives, and when it is a problem.
func TestBackups(t *testing.T) {
	now := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	note := func(age time.Duration) *archive.Note { return &archive.Note{Name: "a", Created: now.Add(-age)} }
	plan := &schedule.Settings{Every: metav1.Duration{Duration: 12 * time.Hour}}
	for name, tc := range map[string]struct {
		state *schedule.State
		err   error
		says  string // pieces of the problems; "" for none
		known bool
	}{
		"nothing":              {nil, nil, "", false},
		"an empty object":      {&schedule.State{}, nil, "", false},
		"a new schedule":       {&schedule.State{Settings: plan}, nil, "", true},
		"fresh":                {&schedule.State{Settings: plan, Record: &schedule.Record{Proven: note(3 * time.Hour)}}, nil, "", true},
		"old":                  {&schedule.State{Settings: plan, Record: &schedule.Record{Proven: note(75 * time.Hour)}}, nil, "3 days old, and the schedule wants one every 12h", true},
		"by hand, and old":     {&schedule.State{Record: &schedule.Record{Proven: note(75 * time.Hour)}}, nil, "3 days old, and no schedule makes new ones", true},
		"failed, still enough": {&schedule.State{Settings: plan, Record: &schedule.Record{Node: "n2", Error: "disk full", Proven: note(13 * time.Hour)}}, nil, "on node n2, was not made: disk full", true},
		"never":                {&schedule.State{Settings: plan, Record: &schedule.Record{Error: "x"}}, nil, "there is no proven archive", true},
	} {
		var r Report
		r.backupProblems(tc.state, tc.err, now)
		text := fmt.Sprint(r.Problems)
		if (len(r.Problems) > 0) != (tc.says != "") || !strings.Contains(text, tc.says) || r.Backup.Known != tc.known {
			t.Errorf("%s: %s, %+v", name, text, r.Backup)
		}
		for _, p := range r.Problems {
			if p.Looked() == "" || !strings.Contains(p.Do, "microk8s backup") {
				t.Errorf("%s: %+v", name, p)
			}
		}
	}
	var r Report
	if r.backupProblems(nil, errors.New("boom"), now); len(r.Unseen) != 1 || len(r.Problems) > 0 {
		t.Errorf("%+v", r)
	}
}
