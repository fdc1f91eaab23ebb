package log

import "fmt"

// kineRow is what decides about one row of upstream's table. Its id is its revision; upstream
// stores neither versions nor, in creations, the revision of the creation.
type kineRow struct {
	ID      int64
	Name    string
	Created bool
	Deleted bool
	Create  int64 // create_revision as stored, 0 in creations
	Lease   int64 // seconds: upstream's leases are their own TTL
	Bad     bool  // a column has a type or value that upstream never writes
}

// kineCompactName is the row whose prev_revision is upstream's compacted revision. It is no key:
// API servers make their own of that name here.
const kineCompactName = "compact_rev_key"

// plannedRow is a row of kine that becomes one of the log.
type plannedRow struct {
	ID, Create, Version int64 // Version 0: a deletion
	Lease               int64
}

// kinePlan turns upstream's rows into a history without gaps. Add takes them by rising id.
//
// Everything above Floor is complete: each revision has its row, and each row what it builds
// on. Where rows are missing (upstream fills gaps, and stops half-way through compactions)
// the floor rises to that point, and it becomes the compacted revision. Keys lose nothing by
// that, only the history before it cannot be read any more.
type kinePlan struct {
	Floor int64
	Rows  []plannedRow
	TTLs  map[int64]bool // of keys that exist; valid after Done

	last  int64 // revision of the last row taken
	keys  map[string]kineKey
	prior int64 // id of the last row seen, taken or not
}

type kineKey struct {
	create, version, lease int64
	live                   bool
}

// newKinePlan begins with upstream's compacted revision, 0 for none.
func newKinePlan(compacted int64) *kinePlan {
	return &kinePlan{Floor: max(compacted, 0), last: 1, keys: map[string]kineKey{}}
}

// Add takes the next row.
func (p *kinePlan) Add(r kineRow) error {
	if r.ID <= p.prior || r.ID > maxKineID {
		return fmt.Errorf("row %d follows row %d", r.ID, p.prior)
	}
	p.prior = r.ID
	old, seen := p.keys[r.Name]
	switch {
	case r.Bad || r.Name == "":
		return fmt.Errorf("row %d is not one that k8s-dqlite writes", r.ID)
	case r.Name == kineCompactName, r.Deleted && !seen && r.Create <= 0:
		return nil // no key, or upstream's filling of a gap: both leave one
	}
	if r.ID > p.last+1 {
		p.Floor = max(p.Floor, r.ID-1)
	}
	p.last = r.ID
	out := plannedRow{ID: r.ID}
	key := kineKey{live: !r.Deleted}
	switch {
	case r.Deleted:
		if !old.live {
			p.Floor = max(p.Floor, r.ID) // what it deletes is gone
		}
	case old.live:
		key.create, key.version = old.create, old.version+1
	case r.Created || r.Create == r.ID:
		key.create, key.version = r.ID, 1
	default:
		// An update of what is gone: its version is not known any more, but above 1.
		p.Floor = max(p.Floor, r.ID)
		key.create, key.version = r.Create, 2
		if r.Create <= 0 || r.Create > r.ID {
			key.create = r.ID
		}
	}
	if !r.Deleted {
		key.lease = max(r.Lease, 0)
		out.Create, out.Version, out.Lease = key.create, key.version, key.lease
	}
	p.keys[r.Name] = key
	p.Rows = append(p.Rows, out)
	return nil
}

// Done ends the plan. highest is the largest id that the table ever had, which is the current
// revision: it never goes back.
func (p *kinePlan) Done(highest int64) error {
	highest = max(highest, p.prior)
	if highest > maxKineID {
		return fmt.Errorf("the revision %d is out of range", highest)
	}
	if highest > p.last {
		p.Floor = highest
	}
	p.Floor = min(p.Floor, max(highest, p.last)) // a compaction beyond the end would be damage
	p.TTLs = map[int64]bool{}
	for _, k := range p.keys {
		if k.live && k.lease > 0 {
			p.TTLs[k.lease] = true
		}
	}
	return nil
}

// maxKineID is the largest revision whose rows have ids in the log.
const maxKineID = 1 << (62 - subBits)
