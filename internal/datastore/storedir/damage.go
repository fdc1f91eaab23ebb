package storedir

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"microk8s/internal/atomicfile"
)

// What became of damaged files.
const (
	DamageAlone   = "alone"   // the member does not start: there is nobody to get the data from
	DamageWaiting = "waiting" // it does not start yet: the others have no leader
	DamageJoining = "joining" // its old files are set aside, and it gets its data from the others
	DamageRunning = "running" // it runs, with what it has in memory; it would not start again
	DamageHealed  = "healed"  // it has its data again
)

// Damage says what was found wrong with a member's files last, and what became of it.
type Damage struct {
	State string    `json:"state"`
	File  string    `json:"file"` // its name in the directory
	What  string    `json:"what"` // what is wrong with it
	Found time.Time `json:"found"`
	Why   string    `json:"why,omitempty"`  // it is not healed yet
	Kept  string    `json:"kept,omitempty"` // folder with the damaged files
	// Healed is when it was healed, the last few times.
	Healed []time.Time `json:"healed,omitempty"`
}

const healedKept = 20

// Damage returns what was found last; ok is false where nothing ever was.
func (d Dir) Damage() (x Damage, ok bool) {
	data, err := os.ReadFile(d.File(DamageFile))
	if err != nil || json.Unmarshal(data, &x) != nil {
		return Damage{}, false
	}
	return x, true
}

// NoteDamage writes down what was found, or what became of it. When files were healed before stays.
func (d Dir) NoteDamage(x Damage) error {
	old, _ := d.Damage()
	x.Healed = append(slices.Clone(old.Healed), x.Healed...)
	x.Healed = x.Healed[max(0, len(x.Healed)-healedKept):]
	if x.State != DamageHealed && old.State != DamageHealed && old.File == x.File && !old.Found.IsZero() {
		x.Found = old.Found
	}
	data, err := json.Marshal(x)
	if err != nil {
		return err
	}
	return atomicfile.Write(d.File(DamageFile), append(data, '\n'), 0o640, nil)
}

// SettleDamage is for a member that starts, with all of its files in order.
func (d Dir) SettleDamage(now time.Time) error {
	x, ok := d.Damage()
	switch {
	case !ok || x.State == DamageHealed:
		return nil
	case x.State == DamageJoining:
		x.Healed = []time.Time{now}
	case len(x.Healed) == 0: // somebody has put them right
		if err := os.Remove(d.File(DamageFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cannot remove the note of damage: %w", err)
		}
		return nil
	default:
		x.Healed = nil
	}
	x.State, x.Why = DamageHealed, ""
	return d.NoteDamage(x)
}
