// Package survivors decides, from the copies of a datastore that are left after a disaster, whether it can
// be recovered from one of them, from which, and what may be lost at most. It is pure: others find the
// copies and rewrite the one that is chosen.
//
// The rule behind it is Raft's: what was acknowledged is on a majority of the voters, and of two logs the
// one whose last entry has the higher term, or in the same term the higher index, has all that the other
// one acknowledged (Ongaro, Ousterhout: In Search of an Understandable Consensus Algorithm, 5.4.1).
package survivors

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"microk8s/internal/datastore/storedir"
)

// Copy is one member's directory, wherever it was found.
type Copy struct {
	Where  string // for people: a node's name, or a directory
	Local  bool   // it is this node's own
	Member storedir.Member
	// Term and Index are of the last entry of its log.
	Term, Index uint64
	Revision    int64 // of the datastore, 0 where it is not known
	// Damaged says why it cannot be used; Term and Index are then what it had at least.
	Damaged string
}

// newer compares how far two copies have come, as Raft does.
func newer(a, b Copy) int {
	return cmp.Or(cmp.Compare(a.Term, b.Term), cmp.Compare(a.Index, b.Index))
}

// Decision is what to do.
type Decision struct {
	Use    Copy   // the newest copy that can be used
	Copies []Copy // all, the newest first; of several of one member the newest
	// Voters are the members whose vote counts, and Missing those of them of which no usable copy was found.
	Voters, Missing []storedir.Member
	// Complete: the copies that were found are of a majority of the voters, so that nothing that was
	// acknowledged is lost.
	Complete bool
	// Clones are members of which several copies were found that differ.
	Clones []storedir.Member
}

// Reasons not to decide.
var (
	// ErrNone: there is no copy that can be used.
	ErrNone = errors.New("no copy of the datastore can be used")
	// ErrMayReturn: members of which no copy was found may come back with newer data.
	ErrMayReturn = errors.New("members of which no copy was found may come back")
	// ErrNewerDamaged: a copy that cannot be used is newer than every one that can.
	ErrNewerDamaged = errors.New("a damaged copy is newer than every one that can be used")
)

// Told is what a person has said about the members that are missing.
type Told struct {
	Gone bool // members of which no copy was found never come back
	Lose bool // what only damaged copies have may be lost
}

// Decide chooses among the copies. The voters are those that the newest copy's directory names. The
// decision is returned also beside an error, as far as it goes.
func Decide(members []storedir.Member, copies []Copy, told Told) (Decision, error) {
	var d Decision
	for _, m := range members {
		if m.Role == storedir.Voter {
			d.Voters = append(d.Voters, m)
		}
	}
	if len(d.Voters) == 0 { // a list from before roles were given
		d.Voters = slices.Clone(members)
	}
	sorted := slices.Clone(copies)
	for i := range sorted {
		if sorted[i].Index == 0 && sorted[i].Damaged == "" { // a spare's
			sorted[i].Damaged = "it has none of the data"
		}
	}
	slices.SortStableFunc(sorted, func(a, b Copy) int {
		return cmp.Or(newer(b, a), cmp.Compare(boolRank(a.Damaged != ""), boolRank(b.Damaged != "")), cmp.Compare(boolRank(!a.Local), boolRank(!b.Local)))
	})
	seen := map[uint64]Copy{}
	for _, c := range sorted {
		before, twice := seen[c.Member.ID]
		switch {
		case !twice:
			seen[c.Member.ID] = c
			d.Copies = append(d.Copies, c)
		default:
			if newer(before, c) != 0 && !slices.Contains(d.Clones, c.Member) {
				d.Clones = append(d.Clones, c.Member)
			}
			// An older copy of a member whose newest one is damaged can be used all the same.
			if before.Damaged != "" && c.Damaged == "" {
				d.Copies = append(d.Copies, c)
			}
		}
	}
	usable := slices.DeleteFunc(slices.Clone(d.Copies), func(c Copy) bool { return c.Damaged != "" })
	for _, v := range d.Voters {
		if !slices.ContainsFunc(usable, func(c Copy) bool { return c.Member.ID == v.ID }) {
			d.Missing = append(d.Missing, v)
		}
	}
	if len(usable) == 0 {
		return d, ErrNone
	}
	d.Use = usable[0]
	majority := len(d.Voters)/2 + 1
	newest := d.Copies[0]
	// An old copy of a member may lack what that member has acknowledged: it stands for no vote.
	whole := 0
	for _, v := range d.Voters {
		if c, ok := seen[v.ID]; ok && c.Damaged == "" {
			whole++
		}
	}
	d.Complete = whole >= majority && newer(newest, d.Use) == 0
	switch {
	case newer(newest, d.Use) > 0 && !told.Lose:
		return d, fmt.Errorf("%w: %s has entry %d of term %d at least (%s), and the newest usable one, %s, ends with entry %d of term %d",
			ErrNewerDamaged, newest.Where, newest.Index, newest.Term, newest.Damaged, d.Use.Where, d.Use.Index, d.Use.Term)
	case len(d.Missing) > 0 && !told.Gone:
		return d, fmt.Errorf("%w: %s", ErrMayReturn, addresses(d.Missing))
	}
	return d, nil
}

func boolRank(b bool) int {
	if b {
		return 1
	}
	return 0
}

func addresses(members []storedir.Member) string {
	var out []string
	for _, m := range members {
		out = append(out, m.Address)
	}
	return strings.Join(out, ", ")
}

// Loss says in a sentence what may be lost at most.
func (d Decision) Loss() string {
	if d.Complete {
		return "nothing that was acknowledged is lost: the copies are of a majority of the voters"
	}
	return fmt.Sprintf("writes that were acknowledged by %s and are in none of these copies are lost; how many cannot be known", addresses(d.Missing))
}
