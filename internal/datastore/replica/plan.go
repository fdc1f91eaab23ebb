package replica

import (
	"sort"

	"microk8s/internal/datastore/storedir"
)

// How many members have each role, where there are enough.
const (
	wantVoters   = 3
	wantStandBys = 3
)

// candidate is a member as the choice of roles sees it.
type candidate struct {
	ID     uint64
	Role   storedir.Role
	Online bool
	Lost   bool // it has been offline long enough to be replaced
	Domain uint64
	Weight uint64
}

// change is one change of a role.
type change struct {
	ID   uint64
	Role storedir.Role
}

// plan returns the next change of a role that brings the cluster closer to its targets, if
// there is one. self leads. It is called again after each change, until it gives none.
//
// One member stays a voter. Of two only the leader votes: two voters are no safer than one,
// because neither can go on without the other. From three on there are three voters and three
// stand-bys, in as many failure domains as there are, and the others are spares.
func plan(self uint64, members []candidate) (change, bool) {
	if len(members) < 2 {
		return change{}, false
	}
	if len(members) == 2 {
		for _, m := range members {
			if m.ID != self && m.Role != storedir.Spare {
				return change{m.ID, storedir.Spare}, true
			}
		}
		return change{}, false
	}
	if c, ok := fill(self, members, storedir.Voter, wantVoters); ok {
		return c, true
	}
	return fill(self, members, storedir.StandBy, wantStandBys)
}

// fill brings the number of members of a role to want.
func fill(self uint64, members []candidate, role storedir.Role, want int) (change, bool) {
	var online, lost []candidate // of the role
	perDomain := map[uint64]int{}
	all := 0
	for _, m := range members {
		if m.Role != role {
			continue
		}
		all++
		switch {
		case m.Lost:
			lost = append(lost, m)
		default:
			online = append(online, m) // a moment's silence is no reason to replace a member
			perDomain[m.Domain]++
		}
	}
	from := candidates(self, members, role, perDomain)
	switch {
	case len(online) < want && len(from) > 0:
		return change{from[0].ID, role}, true
	case len(online) > want:
		return change{surplus(self, online, perDomain).ID, storedir.Spare}, true
	case len(online) == want && len(lost) > 0:
		return change{lost[0].ID, storedir.Spare}, true
	case len(online) == want && len(from) > 0 && perDomain[from[0].Domain] == 0 && crowded(perDomain):
		// One more for now: the crowded domain gives one up next.
		if role == storedir.Voter || from[0].Role == storedir.Spare {
			return change{from[0].ID, role}, true
		}
	}
	return change{}, false
}

func crowded(perDomain map[uint64]int) bool {
	for _, n := range perDomain {
		if n > 1 {
			return true
		}
	}
	return false
}

// candidates returns who could take a role, the best first: from a domain that has nobody in
// the role, who holds the data already, the lower weight, the lower id.
func candidates(self uint64, members []candidate, role storedir.Role, perDomain map[uint64]int) []candidate {
	var out []candidate
	for _, m := range members {
		if m.Online && !m.Lost && m.Role > role && m.ID != self {
			out = append(out, m)
		}
	}
	sort.Slice(out, func(i, j int) bool {
		a, b := out[i], out[j]
		if x, y := perDomain[a.Domain] > 0, perDomain[b.Domain] > 0; x != y {
			return !x
		}
		if a.Role != b.Role {
			return a.Role < b.Role
		}
		if a.Weight != b.Weight {
			return a.Weight < b.Weight
		}
		return a.ID < b.ID
	})
	return out
}

// surplus returns the member of a role that is needed least: from the most crowded domain, with
// the higher weight; never the leader.
func surplus(self uint64, of []candidate, perDomain map[uint64]int) candidate {
	rest := make([]candidate, 0, len(of))
	for _, m := range of {
		if m.ID != self {
			rest = append(rest, m)
		}
	}
	sort.Slice(rest, func(i, j int) bool {
		a, b := rest[i], rest[j]
		if x, y := perDomain[a.Domain], perDomain[b.Domain]; x != y {
			return x > y
		}
		if a.Weight != b.Weight {
			return a.Weight > b.Weight
		}
		return a.ID > b.ID
	})
	return rest[0]
}
