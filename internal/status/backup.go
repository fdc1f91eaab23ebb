package status

import (
	"context"
	"fmt"
	"net/http"
	"time"

	corev1 "k8s.io/api/core/v1"

	"microk8s/internal/archive/schedule"
	"microk8s/internal/kube"
)

// Backup is what the cluster knows of its archives.
type Backup struct {
	Known     bool // there is a schedule, or an archive was made once
	Scheduled bool
	Every     time.Duration // from one archive to the next, 0 without a schedule
	Name      string        // of the newest archive that was proven, "" for none
	Age       time.Duration // of that
	Created   time.Time     // of that
}

// backupPath is the object that says it.
const backupPath = "/api/v1/namespaces/" + kube.SystemNamespace + "/configmaps/" + schedule.Name

// backups asks for the record of archives, nil where there is none.
func (c *apiClient) backups(ctx context.Context) (*schedule.State, error) {
	var m corev1.ConfigMap
	if err := c.decode(ctx, backupPath, &m); err != nil {
		if s, ok := err.(*errStatus); ok && s.code == http.StatusNotFound { //nolint:errorlint // it is not wrapped
			return nil, nil
		}
		return nil, err
	}
	return schedule.Parse(&m)
}

// backupProblems adds what is wrong with the archives: none was made, none was proven, or too long ago.
func (r *Report) backupProblems(s *schedule.State, err error, now time.Time) {
	if err != nil {
		r.Unseen = append(r.Unseen, Unseen{ID: "backup.age", Why: shorten(err.Error())})
		return
	}
	if s == nil || s.Settings == nil && s.Record == nil {
		return
	}
	b := Backup{Known: true, Scheduled: s.Settings != nil}
	if b.Scheduled {
		b.Every = s.Settings.Every.Duration
	}
	age, old, ok := s.Age(now)
	if ok {
		b.Name, b.Age, b.Created = s.Record.Proven.Name, age, s.Record.Proven.Created
	}
	r.Backup = b
	wanted := "no schedule makes new ones"
	if b.Scheduled {
		wanted = fmt.Sprintf("the schedule wants one every %s", Short(b.Every))
	}
	if s.Record != nil && s.Record.Error != "" {
		r.add("backup.failed", "the last archive of the cluster, begun at %s on node %s, was not made: %s", s.Record.Attempt.UTC().Format(time.RFC3339), s.Record.Node, shorten(s.Record.Error))(
			"see microk8s backup schedule, and try it with: sudo microk8s backup create")
	}
	switch {
	case ok && old:
		r.add("backup.age", "the newest proven archive of the cluster is %s old, and %s", Short(age), wanted)("make one with: sudo microk8s backup create")
	case !ok && old && s.Record != nil: // a schedule that was set just now has not failed
		r.add("backup.age", "there is no proven archive of the cluster, and %s", wanted)("make one with: sudo microk8s backup create")
	}
}

// Short is an age for people: in days from two on, hours, or minutes.
func Short(d time.Duration) string {
	switch day := 24 * time.Hour; {
	case d >= 2*day:
		return fmt.Sprintf("%d days", d/day)
	case d >= time.Hour && d%time.Hour < time.Minute:
		return fmt.Sprintf("%dh", d/time.Hour)
	case d >= time.Hour:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return fmt.Sprintf("%dm", d/time.Minute)
}
