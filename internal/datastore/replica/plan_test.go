package replica

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"microk8s/internal/datastore/storedir"
)

// cluster makes members from words such as "v", "v/2" (failure domain 2), "s-" (offline for a
// moment), "p!" (lost): v voter, s stand-by, p spare. The first leads.
func cluster(words string) (out []candidate) {
	for i, w := range strings.Fields(words) {
		c := candidate{ID: uint64(i + 1), Online: true, Role: map[byte]storedir.Role{'v': storedir.Voter, 's': storedir.StandBy, 'p': storedir.Spare}[w[0]]}
		if _, d, ok := strings.Cut(w, "/"); ok {
			fmt.Sscan(d, &c.Domain)
		}
		if strings.ContainsAny(w, "-!") {
			c.Online, c.Lost = false, strings.Contains(w, "!")
		}
		out = append(out, c)
	}
	return out
}

func roles(members []candidate) string {
	var out []string
	for _, m := range members {
		out = append(out, map[storedir.Role]string{storedir.Voter: "v", storedir.StandBy: "s", storedir.Spare: "p"}[m.Role])
	}
	return strings.Join(out, " ")
}

// settle makes all changes.
func settle(t *testing.T, members []candidate) int {
	t.Helper()
	for n := 0; ; n++ {
		c, ok := plan(1, members)
		if !ok {
			return n
		}
		if n > 3*len(members)+10 {
			t.Fatalf("the roles never settle: %s", roles(members))
		}
		for i := range members {
			if members[i].ID == c.ID {
				if members[i].Role == c.Role {
					t.Fatalf("member %d has the role %s already", c.ID, c.Role)
				}
				members[i].Role = c.Role
			}
		}
	}
}

func TestPlan(t *testing.T) {
	for _, tc := range []struct{ name, from, to string }{
		{"one member", "v", "v"},
		{"the second does not vote", "v p", "v p"},
		{"of two only the leader votes", "v v", "v p"},
		{"of two, the other lost", "v v!", "v p"},
		{"the third makes three voters", "v p p", "v v v"},
		{"the fourth stands by", "v v v p", "v v v s"},
		{"seven", "v v v s s s p", "v v v s s s p"},
		{"a moment's silence changes nothing", "v v v- s", "v v v s"},
		{"a lost voter is replaced by who has the data", "v v v! p s", "v v p s v"},
		{"a lost voter that nobody can replace stays", "v v v!", "v v v"},
		{"a lost stand-by is replaced when there are enough", "v v v s! s s p", "v v v p s s s"},
		{"a voter too many", "v v v v", "v v v s"},
		{"offline members are not chosen", "v p- p p", "v p v v"},
		{"domains without voters come first", "v/1 p/1 p/1 p/2 p/3", "v s s v v"},
		{"a crowded domain gives up a voter", "v/1 v/1 v/2 p/3", "v s v v"},
		{"nothing to spread", "v/1 v/1 v/1 p/1", "v v v s"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			members := cluster(tc.from)
			settle(t, members)
			if got := roles(members); got != tc.to {
				t.Errorf("%s became %s, not %s", tc.from, got, tc.to)
			}
		})
	}
}

// Whatever the cluster looks like, the changes come to an end, the leader keeps its vote, and
// no change leaves the cluster with fewer voters online than three, unless it had fewer.
func TestPlanSettles(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for range 20000 {
		members := make([]candidate, 1+rnd.IntN(9))
		for i := range members {
			members[i] = candidate{ID: uint64(i + 1), Role: storedir.Role(rnd.IntN(3)), Online: rnd.IntN(4) > 0, Domain: uint64(rnd.IntN(4)), Weight: uint64(rnd.IntN(2))}
			members[i].Lost = !members[i].Online && rnd.IntN(2) == 0
		}
		members[0] = candidate{ID: 1, Role: storedir.Voter, Online: true}
		before := 0
		for _, m := range members {
			if m.Role == storedir.Voter && !m.Lost {
				before++
			}
		}
		settle(t, members)
		after := 0
		for _, m := range members {
			if m.Role == storedir.Voter && !m.Lost {
				after++
			}
		}
		if members[0].Role != storedir.Voter || len(members) > 2 && after < min(before, 3) {
			t.Fatalf("%v", members)
		}
	}
}
