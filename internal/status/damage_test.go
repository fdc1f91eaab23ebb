package status

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"microk8s/internal/datastore/storedir"
	"microk8s/internal/snapenv"
)

// TestDamage: each thing that can become of damaged files is said, with the next step.
func TestDamage(t *testing.T) {
	now := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	const archive = `{"name":"a.age","at":"nfs:/mnt/b","created":"2026-11-29T08:00:00Z"}`
	for name, tc := range map[string]struct {
		damage   storedir.Damage
		archive  string
		says, do string // "" for nothing
	}{
		"alone":              {storedir.Damage{State: storedir.DamageAlone, File: "snapshot-1-2-3", What: "it ends too early"}, archive, "snapshot-1-2-3 on this node is damaged (it ends too early), and no other node has its data: it does not start; the newest proven archive is a.age, of 2026-11-29T08:00:00Z: what was written since then is lost", "sudo microk8s restore a.age --from 'nfs:/mnt/b' --identity-file FILE"},
		"alone, no archive":  {storedir.Damage{State: storedir.DamageAlone, File: "f"}, "", "no proven archive of the cluster is known", "backup list"},
		"waiting":            {storedir.Damage{State: storedir.DamageWaiting, File: "f", Why: "no leader"}, archive, "which it cannot yet: no leader", "microk8s recover --dry-run"},
		"joining":            {storedir.Damage{State: storedir.DamageJoining, File: "f"}, archive, "is fetching", "wait"},
		"running":            {storedir.Damage{State: storedir.DamageRunning, File: "f"}, archive, "would not start again", "microk8s backup create"},
		"healed":             {storedir.Damage{State: storedir.DamageHealed, File: "f", Kept: "/k", Healed: []time.Time{now.Add(-time.Hour)}}, archive, "damaged once since 2026-11-29T11:00:00Z", "/k"},
		"healed again":       {storedir.Damage{State: storedir.DamageHealed, File: "f", Healed: []time.Time{now.Add(-30 * time.Hour), now.Add(-2 * time.Hour), now.Add(-time.Hour)}}, archive, "2 times since 2026-11-29T10:00:00Z", "disk"},
		"healed long ago":    {storedir.Damage{State: storedir.DamageHealed, File: "f", Healed: []time.Time{now.Add(-30 * time.Hour)}}, archive, "", ""},
		"never anything":     {storedir.Damage{}, "", "", ""},
		"of a later version": {storedir.Damage{State: "else", File: "f"}, "", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			env := snapenv.Env{Common: t.TempDir()}
			if err := os.MkdirAll(env.BackendLive(), 0o755); err != nil {
				t.Fatal(err)
			}
			if tc.damage.State != "" {
				if err := storedir.Dir(env.BackendLive()).NoteDamage(tc.damage); err != nil {
					t.Fatal(err)
				}
			}
			if tc.archive != "" {
				if err := os.WriteFile(filepath.Join(env.Common, "var/kubernetes/newest-archive.json"), []byte(tc.archive), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			var r Report
			r.damageProblem(env, now)
			if (len(r.Problems) > 0) != (tc.says != "") || !strings.Contains(fmt.Sprint(r.Problems), tc.says) {
				t.Fatalf("%+v", r.Problems)
			}
			for _, p := range r.Problems {
				if p.Looked() == "" || !strings.Contains(p.Do, tc.do) {
					t.Errorf("%+v", p)
				}
			}
		})
	}
}
