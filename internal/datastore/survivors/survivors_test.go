package survivors

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"microk8s/internal/datastore/storedir"
	"microk8s/internal/longtest"
)

func members(n int) (out []storedir.Member) {
	for i := range n {
		out = append(out, storedir.Member{ID: uint64(i + 1), Address: fmt.Sprintf("10.0.0.%d:19001", i+1)})
	}
	return out
}

// TestNeverStaler: whatever members of three and five survive, with whatever logs and damage, what is
// chosen is never older than a copy that is there, except where a person was told; and where it is called
// complete, every entry that a majority had is in it.
func TestNeverStaler(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	chosen, refused := 0, 0
	for _, n := range []int{3, 5} {
		all := members(n)
		for round := range longtest.Of(20000, 1500) {
			// Logs as Raft makes them: within a term logs are prefixes of the leader's; an entry is
			// acknowledged when a majority has it.
			logs := make([]Copy, n)
			for i := range logs {
				logs[i] = Copy{Where: all[i].Address, Member: all[i], Term: 1 + r.Uint64N(4), Index: 1 + r.Uint64N(20)}
			}
			for subset := 1; subset < 1<<n; subset++ {
				var there []Copy
				for i := range n {
					if subset&(1<<i) == 0 {
						continue
					}
					c := logs[i]
					c.Local = len(there) == 0
					if r.IntN(4) == 0 {
						c.Damaged = "bad"
					}
					there = append(there, c)
					if r.IntN(6) == 0 { // an old copy of the same member
						old := logs[i]
						old.Where, old.Index = "copy", 1+r.Uint64N(old.Index)
						there = append(there, old)
					}
				}
				r.Shuffle(len(there), func(i, j int) { there[i], there[j] = there[j], there[i] })
				told := Told{Gone: r.IntN(2) == 0, Lose: r.IntN(2) == 0}
				d, err := Decide(all, there, told)
				if err != nil {
					refused++
					if errors.Is(err, ErrNone) {
						for _, c := range there {
							if c.Damaged == "" {
								t.Fatalf("round %d: nothing was found usable of %+v", round, there)
							}
						}
					}
					continue
				}
				chosen++
				for _, c := range there {
					switch {
					case newer(c, d.Use) <= 0:
					case c.Damaged == "":
						t.Fatalf("round %d: %+v was taken, and %+v is newer", round, d.Use, c)
					case !told.Lose:
						t.Fatalf("round %d: %+v was taken in silence, and the damaged %+v is newer", round, d.Use, c)
					}
				}
				if d.Use.Damaged != "" {
					t.Fatalf("round %d: a damaged copy was taken: %+v", round, d.Use)
				}
				if len(d.Missing) > 0 && !told.Gone {
					t.Fatalf("round %d: %+v may come back, and nobody said otherwise", round, d.Missing)
				}
				if d.Complete {
					// Any acknowledged entry is on some voter of every majority: the newest logs of the survivors
					// are of a majority, so the newest of them has it.
					best, have := Copy{}, 0
					for i := range n {
						ok := false
						for _, c := range there {
							ok = ok || c.Member == all[i] && c.Damaged == "" && newer(c, logs[i]) == 0
						}
						if ok {
							have++
							if newer(logs[i], best) > 0 {
								best = logs[i]
							}
						}
					}
					if have < n/2+1 || newer(best, d.Use) > 0 {
						t.Fatalf("round %d: called complete with %d of %d logs: %+v", round, have, n, there)
					}
				}
			}
		}
	}
	if chosen < 1000 || refused < 1000 {
		t.Errorf("%d were chosen, %d refused: the cases are too few", chosen, refused)
	}
}

func TestDecide(t *testing.T) {
	all := members(3)
	at := func(i int, term, index uint64) Copy {
		return Copy{Where: fmt.Sprint("n", i), Member: all[i-1], Term: term, Index: index}
	}
	bad := func(c Copy) Copy { c.Damaged = "bad"; return c }
	for name, tc := range map[string]struct {
		copies []Copy
		told   Told
		err    error
		use    string
	}{
		"nothing":                     {nil, Told{Gone: true}, ErrNone, ""},
		"one, the others may return":  {[]Copy{at(1, 2, 7)}, Told{}, ErrMayReturn, "n1"},
		"one, the others are gone":    {[]Copy{at(1, 2, 7)}, Told{Gone: true}, nil, "n1"},
		"a spare has no data":         {[]Copy{at(1, 0, 0)}, Told{Gone: true}, ErrNone, ""},
		"a higher term wins":          {[]Copy{at(1, 2, 70), at(2, 3, 7)}, Told{Gone: true}, nil, "n2"},
		"a higher index wins":         {[]Copy{at(1, 3, 8), at(2, 3, 7)}, Told{Gone: true}, nil, "n1"},
		"the newer one is damaged":    {[]Copy{at(1, 3, 7), bad(at(2, 3, 9))}, Told{Gone: true}, ErrNewerDamaged, "n1"},
		"and that was accepted":       {[]Copy{at(1, 3, 7), bad(at(2, 3, 9))}, Told{Gone: true, Lose: true}, nil, "n1"},
		"a damaged one that is older": {[]Copy{at(1, 3, 9), bad(at(2, 3, 7))}, Told{Gone: true}, nil, "n1"},
	} {
		d, err := Decide(all, tc.copies, tc.told)
		if !errors.Is(err, tc.err) || d.Use.Where != tc.use {
			t.Errorf("%s: %+v, %v", name, d, err)
		}
	}
	// Two machines from one disk are told apart.
	old := at(1, 2, 3)
	old.Where = "snapshot"
	if d, _ := Decide(all, []Copy{old, at(1, 2, 9)}, Told{Gone: true}); len(d.Clones) != 1 || d.Use.Where != "n1" {
		t.Errorf("%+v", d)
	}
	own := at(2, 2, 9)
	own.Local = true
	if d, _ := Decide(all, []Copy{at(1, 2, 9), own}, Told{Gone: true}); !d.Use.Local || !d.Complete {
		t.Errorf("of equal ones the local one is used: %+v", d)
	}
}
