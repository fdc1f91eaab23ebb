package status

import (
	"fmt"
	"time"

	"microk8s/internal/archive/schedule"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/snapenv"
)

// healedShown is how long it is said that files were damaged that are whole again: they rarely are once only.
const healedShown = 24 * time.Hour

// damageProblem says what is wrong with the files of this node's datastore, and what became of it.
func (r *Report) damageProblem(env snapenv.Env, now time.Time) {
	x, ok := storedir.Dir(env.BackendLive()).Damage()
	if !ok {
		return
	}
	const id = "datastore.damage"
	what := fmt.Sprintf("the datastore's file %s on this node is damaged (%s)", x.File, shorten(x.What))
	switch x.State {
	case storedir.DamageAlone:
		newest, known := schedule.ReadNewest(env.NewestArchive())
		if !known {
			r.add(id, "%s, and no other node has its data: it does not start, and no proven archive of the cluster is known", what)(
				"keep " + env.BackendLive() + " as it is; look for an archive with microk8s backup list --from PLACE, or for a copy of the folder made while the node was stopped")
			return
		}
		r.add(id, "%s, and no other node has its data: it does not start; the newest proven archive is %s, of %s: what was written since then is lost", what, newest.Name, newest.Created.UTC().Format(time.RFC3339))(
			fmt.Sprintf("sudo microk8s restore %s --from '%s' --identity-file FILE --dry-run (or --passphrase-file FILE), and again without --dry-run", newest.Name, newest.At))
	case storedir.DamageWaiting:
		r.add(id, "%s; it fetches its data from the other nodes by itself as soon as it can, which it cannot yet: %s", what, shorten(x.Why))(
			"start the other control-plane nodes; if they are gone for good, see what is left with: sudo microk8s recover --dry-run")
	case storedir.DamageJoining:
		r.add(id, "%s; it is fetching its data from the other nodes", what)("wait; nothing has to be typed")
	case storedir.DamageRunning:
		r.add(id, "%s; the datastore goes on with what it has in memory, and would not start again", what)(
			"do not stop this node; make an archive now with: sudo microk8s backup create; then add nodes, or restore it on another machine")
	case storedir.DamageHealed:
		n, first := 0, now
		for _, at := range x.Healed {
			if age := now.Sub(at); age < healedShown {
				n++
				if at.Before(first) {
					first = at
				}
			}
		}
		if n == 0 {
			return
		}
		times := "once"
		if n > 1 {
			times = fmt.Sprintf("%d times", n)
		}
		r.add(id, "files of the datastore on this node were damaged %s since %s, the last one %s; they are whole again", times, first.UTC().Format(time.RFC3339), x.File)(
			"check this machine's disk and memory; the damaged files are in " + x.Kept)
	}
}
