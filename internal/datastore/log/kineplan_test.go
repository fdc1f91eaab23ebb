package log

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"microk8s/internal/datastore/state"
)

// upstream imitates k8s-dqlite's table: what its statements would leave.
type upstream struct {
	rows      []kineRow
	compacted int64
	last      int64
}

func (u *upstream) newest(name string) (kineRow, bool) {
	for i := len(u.rows) - 1; i >= 0; i-- {
		if u.rows[i].Name == name {
			return u.rows[i], true
		}
	}
	return kineRow{}, false
}

func (u *upstream) write(name string, del bool, lease int64) bool {
	old, ok := u.newest(name)
	live := ok && !old.Deleted
	r := kineRow{ID: u.last + 1, Name: name, Lease: lease}
	switch {
	case del && !live:
		return false
	case !live:
		r.Created = true
	default:
		r.Deleted = del
		r.Create = old.Create
		if old.Created {
			r.Create = old.ID
		}
	}
	u.last++
	u.rows = append(u.rows, r)
	return true
}

// compact removes superseded rows and deletions up to rev.
func (u *upstream) compact(rev int64, remember bool) {
	u.rows = slices.DeleteFunc(slices.Clone(u.rows), func(r kineRow) bool {
		if r.ID > rev || r.Name == kineCompactName {
			return false
		}
		next := slices.IndexFunc(u.rows, func(o kineRow) bool { return o.Name == r.Name && o.ID > r.ID && o.ID <= rev })
		return r.Deleted || next >= 0
	})
	if remember {
		u.compacted = rev
	}
}

// load returns the state that the log would have after the migration.
func (u *upstream) load() (*kinePlan, *state.State, error) {
	p := newKinePlan(u.compacted)
	for _, r := range u.rows {
		if err := p.Add(r); err != nil {
			return nil, nil, err
		}
	}
	if err := p.Done(u.last); err != nil {
		return nil, nil, err
	}
	names := map[int64]string{}
	for _, r := range u.rows {
		names[r.ID] = r.Name
	}
	l := state.NewLoader(p.Floor)
	for _, r := range p.Rows {
		row := Row{ID: r.ID << subBits, Key: []byte(names[r.ID]), Create: r.Create, Version: r.Version, Lease: r.Lease}
		if err := l.Add(row.VersionOf()); err != nil {
			return p, nil, err
		}
	}
	st, _ := l.Done()
	return p, st, nil
}

// Whatever upstream has done, its table becomes a history that our loader takes, with the
// same keys at the same revisions.
func TestKinePlanOfRandomHistories(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		u := &upstream{}
		if r.IntN(3) > 0 {
			u.rows, u.last = []kineRow{{ID: 1, Name: kineCompactName, Created: true}}, 1
		}
		for range r.IntN(200) {
			switch r.IntN(40) {
			case 0: // rolled back elsewhere, and filled or not
				u.last++
				if r.IntN(2) == 0 {
					u.rows = append(u.rows, kineRow{ID: u.last, Name: fmt.Sprintf("gap-%d", u.last), Deleted: true})
				}
			case 1:
				u.compact(u.compacted+r.Int64N(u.last-u.compacted+1), r.IntN(4) > 0)
			default:
				u.write(fmt.Sprintf("/k/%d", r.IntN(12)), r.IntN(4) == 0, r.Int64N(3)*60)
			}
		}
		p, st, err := u.load()
		if err != nil {
			t.Fatalf("seed %d: %v\n%+v", seed, err, u)
		}
		live := 0
		for i := range 12 {
			name := fmt.Sprintf("/k/%d", i)
			want, ok := u.newest(name)
			if !ok || want.Deleted {
				continue
			}
			live++
			create := want.Create
			if want.Created {
				create = want.ID
			}
			j := slices.IndexFunc(p.Rows, func(r plannedRow) bool { return r.ID == want.ID })
			if j < 0 || p.Rows[j].Create != create || p.Rows[j].Version == 0 || p.Rows[j].Lease != want.Lease {
				t.Fatalf("seed %d: %s became %+v, want %+v", seed, name, p.Rows[max(j, 0)], want)
			}
			if want.Lease > 0 && !p.TTLs[want.Lease] {
				t.Fatalf("seed %d: the lease of %d s is lost", seed, want.Lease)
			}
		}
		if st.Keys() != live || st.Rev() != max(u.last, 1) || p.Floor < u.compacted || st.Compacted() != p.Floor {
			t.Fatalf("seed %d: %d keys at %d, compacted %d; want %d at %d, compacted %d", seed, st.Keys(), st.Rev(), st.Compacted(), live, u.last, u.compacted)
		}
	}
}

func TestKinePlanKeepsHistory(t *testing.T) {
	u := &upstream{}
	for range 5 {
		u.write("/a", false, 0)
		u.write("/b", false, 0)
	}
	u.write("/a", true, 0)
	u.compact(4, true)
	p, st, err := u.load()
	if err != nil || p.Floor != 4 || len(p.Rows) != 9 || st.Keys() != 1 || st.Rev() != 11 {
		t.Fatalf("%+v, %v", p, err)
	}
	if _, err := st.History(5); err != nil {
		t.Error(err)
	}
}

func TestKinePlanRefusesWhatUpstreamNeverWrites(t *testing.T) {
	for _, rows := range [][]kineRow{
		{{ID: 2, Name: "/a", Created: true}, {ID: 2, Name: "/b", Created: true}},
		{{ID: 1, Name: "", Created: true}},
		{{ID: 1, Name: "/a", Bad: true}},
		{{ID: 1 << 60, Name: "/a", Created: true}},
		{{ID: -1, Name: "/a", Created: true}},
	} {
		p := newKinePlan(0)
		var err error
		for _, r := range rows {
			if err == nil {
				err = p.Add(r)
			}
		}
		if err == nil {
			t.Errorf("%+v was taken", rows)
		}
	}
}

func FuzzKinePlan(f *testing.F) {
	f.Add([]byte{1, 2, 3, 4, 5, 6, 7, 8}, int64(3), int64(9))
	f.Fuzz(func(t *testing.T, data []byte, compacted, highest int64) {
		u := &upstream{compacted: compacted, last: highest % (1 << 40)}
		id := int64(0)
		for i := 0; i+3 < len(data); i += 4 {
			id += int64(data[i]%3) + 1
			u.rows = append(u.rows, kineRow{ID: id, Name: fmt.Sprint(data[i+1] % 4), Created: data[i+2]&1 > 0, Deleted: data[i+2]&2 > 0, Create: int64(int8(data[i+3])), Lease: int64(int8(data[i+2]))})
		}
		if _, st, err := u.load(); err != nil {
			t.Fatal(err)
		} else if st.Rev() < id {
			t.Fatal("the revision went back")
		}
	})
}
