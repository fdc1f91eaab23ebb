package state

import (
	"fmt"
	"slices"
)

// Loader rebuilds a State from the versions that a log holds.
type Loader struct {
	s    *State
	last *Version
}

// NewLoader begins with the revision of the last compaction, or NeverCompacted.
func NewLoader(compacted int64) *Loader {
	s := New()
	s.compacted = compacted
	if compacted > s.rev {
		s.rev = compacted
	}
	return &Loader{s: s}
}

// Add takes the next version, by rising revision and position. It fails when the version
// cannot follow what came before, that is, when the log lost or gained something.
func (l *Loader) Add(v *Version) error {
	s := l.s
	rev := v.KV.ModRevision
	if l.last != nil && (rev < l.last.KV.ModRevision || rev == l.last.KV.ModRevision && v.Sub <= l.last.Sub) {
		return fmt.Errorf("revision %d is out of order", rev)
	}
	// Below the compaction there are gaps, above there must be none.
	if rev > s.compacted+1 && rev > s.rev+1 {
		return fmt.Errorf("the changes between revision %d and %d are missing", s.rev, rev)
	}
	if rev > s.compacted && rev != s.rev && v.Sub != 0 {
		return fmt.Errorf("the first change of revision %d is missing", rev)
	}
	l.last = v
	c := s.push(v)
	switch {
	case v.Deleted():
		if c.Prev == nil && rev > s.compacted {
			return fmt.Errorf("revision %d deletes a key that does not exist", rev)
		}
	case c.Prev != nil && (v.KV.Version != c.Prev.KV.Version+1 || v.KV.CreateRevision != c.Prev.KV.CreateRevision) && rev >= s.compacted:
		return fmt.Errorf("revision %d does not continue version %d of its key", rev, c.Prev.KV.Version)
	case c.Prev == nil && rev > s.compacted && (v.KV.Version != 1 || v.KV.CreateRevision != rev):
		return fmt.Errorf("revision %d continues a key that does not exist", rev)
	}
	if rev > s.rev {
		s.rev = rev
	}
	if rev >= s.compacted {
		s.history = append(s.history, c)
	}
	return nil
}

// AddLease takes a lease. Its time starts with RestartLeases.
func (l *Loader) AddLease(id, ttl int64) { l.s.leases[id] = &Lease{ID: id, TTL: ttl} }

// Done returns the state, and the versions in the log that compaction should have removed.
func (l *Loader) Done() (*State, []*Version) {
	s := l.s
	var keys [][]byte
	s.keys.Ascend(func(e *entry) bool {
		if e.vers[0].KV.ModRevision < s.compacted {
			keys = append(keys, e.key)
		}
		return true
	})
	var dead []*Version
	if s.compacted > 0 {
		for _, k := range keys {
			dead = s.prune(k, dead)
		}
	}
	s.keys.Ascend(func(e *entry) bool {
		if e.at(s.rev) != nil {
			s.live++
		}
		return true
	})
	s.stagedRev = s.rev
	return s, dead
}

// Versions gives all versions by rising revision and position, so that a Loader that begins
// with the same compaction rebuilds the state from them. What is staged is not among them.
func (s *State) Versions() []*Version {
	var all []*Version
	s.keys.Ascend(func(e *entry) bool {
		for _, v := range e.vers {
			if v.KV.ModRevision <= s.rev {
				all = append(all, v)
			}
		}
		return true
	})
	slices.SortFunc(all, func(a, b *Version) int {
		if d := cmp(a.KV.ModRevision, b.KV.ModRevision); d != 0 {
			return d
		}
		return a.Sub - b.Sub
	})
	return all
}

// StageVersion stages a version that the log already holds: what another writer, or a write
// of unknown outcome, has left there.
func (s *State) StageVersion(v *Version) error {
	switch rev := v.KV.ModRevision; {
	case rev == s.stagedRev+1 && v.Sub == 0:
	case rev == s.stagedRev && v.Sub > 0 && len(s.staged) > 0:
	default:
		return fmt.Errorf("revision %d cannot follow %d", rev, s.stagedRev)
	}
	s.stagedRev = v.KV.ModRevision
	s.staged = append(s.staged, s.push(v))
	return nil
}
