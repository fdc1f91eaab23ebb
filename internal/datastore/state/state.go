// Package state is the datastore's state machine: keys with all their versions since the
// last compaction, the history of changes, and leases. It is pure: no I/O, no clock, no
// goroutines. The caller passes time in, makes staged changes durable, and serializes access
// (readers may run beside each other, nothing may run beside a call that changes the state).
//
// Writes happen in two steps. Stage… evaluates a transaction against everything staged so
// far and adds its changes with the next revision; they are invisible to reads, because those
// end at the committed revision. Commit makes all staged changes visible, Rollback forgets them.
package state

import (
	"bytes"
	"errors"
	"sort"
	"time"

	"github.com/google/btree"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// Errors of reads and of staging. The server maps them to etcd's.
var (
	ErrCompacted     = errors.New("required revision has been compacted")
	ErrFutureRev     = errors.New("required revision is a future revision")
	ErrLeaseNotFound = errors.New("requested lease not found")
	ErrLeaseExists   = errors.New("lease already exists")
	ErrTTLTooLarge   = errors.New("too large lease TTL")
	ErrKeyNotFound   = errors.New("key not found")
	ErrTooManyRows   = errors.New("transaction changes too many keys")
)

// MaxChanges is the largest number of keys that one transaction may change.
const MaxChanges = 4096

// NeverCompacted is the revision of the last compaction when there was none. As in etcd, a first
// compaction to revision 0 is possible.
const NeverCompacted = -1

// FirstRevision is the revision of an empty store, as in etcd.
const FirstRevision = 1

// Version is one version of a key. It is immutable once staged and shared by everybody who
// reads it. A deletion has Version 0 and only key and mod revision.
type Version struct {
	KV  mvccpb.KeyValue
	Sub int // position among the changes of its revision
}

// Deleted reports whether the version is a deletion.
func (v *Version) Deleted() bool { return v.KV.Version == 0 }

// versionBytes is what a version counts beside its key and value: its numbers and its place in the index.
const versionBytes = 64

// size is what the version counts in State.Bytes.
func (v *Version) size() int64 { return int64(versionBytes + len(v.KV.Key) + len(v.KV.Value)) }

// Change is one version and the live version that it replaced (nil for a creation).
type Change struct {
	Cur, Prev *Version
}

// Rev is the revision of the change.
func (c Change) Rev() int64 { return c.Cur.KV.ModRevision }

type entry struct {
	key  []byte
	vers []*Version // by rising revision
}

// at returns the newest version at or below rev, nil if there is none or it is a deletion.
func (e *entry) at(rev int64) *Version {
	for i := len(e.vers) - 1; i >= 0; i-- {
		v := e.vers[i]
		if v.KV.ModRevision > rev {
			continue
		}
		if v.Deleted() {
			return nil
		}
		return v
	}
	return nil
}

// Lease is a lease and when it ends.
type Lease struct {
	ID       int64
	TTL      int64 // seconds, as granted
	Deadline time.Time
}

// State is the state machine. Make it with New.
type State struct {
	keys      *btree.BTreeG[*entry]
	rev       int64 // committed
	compacted int64
	history   []Change // revisions compacted … rev

	staged       []Change
	stagedRev    int64 // rev plus the staged revisions
	stagedLeases []int64

	leases   map[int64]*Lease
	attached map[int64]map[string]struct{} // lease → keys whose newest (also staged) version has it
	live     int                           // live keys at the committed revision
	bytes    int64                         // of all versions, staged ones included
}

// New returns the empty state.
func New() *State {
	return &State{
		keys:      btree.NewG(32, func(a, b *entry) bool { return bytes.Compare(a.key, b.key) < 0 }),
		rev:       FirstRevision,
		compacted: NeverCompacted,
		stagedRev: FirstRevision,
		leases:    map[int64]*Lease{},
		attached:  map[int64]map[string]struct{}{},
	}
}

// Rev is the committed revision.
func (s *State) Rev() int64 { return s.rev }

// Compacted is the revision of the last compaction, or NeverCompacted.
func (s *State) Compacted() int64 { return s.compacted }

// Bytes is what all versions take that can be read, staged ones included: a deletion frees nothing until a
// compaction has passed it.
func (s *State) Bytes() int64 { return s.bytes }

// Keys is the number of live keys.
func (s *State) Keys() int { return s.live }

// History gives all changes at or above rev in order. The slice is valid and unchanging
// after the lock is given back. ErrCompacted if some are gone.
func (s *State) History(rev int64) ([]Change, error) {
	if rev < s.compacted {
		return nil, ErrCompacted
	}
	i := sort.Search(len(s.history), func(i int) bool { return s.history[i].Rev() >= rev })
	return s.history[i:len(s.history):len(s.history)], nil
}

// Staged returns the staged changes in order.
func (s *State) Staged() []Change { return s.staged }

// StagedLeases returns the ids of the staged leases.
func (s *State) StagedLeases() []int64 { return s.stagedLeases }

// Commit makes everything staged visible and returns the changes. Deadlines of new leases
// count from now.
func (s *State) Commit(now time.Time) []Change {
	done := s.staged
	for _, c := range done {
		switch {
		case c.Cur.Deleted():
			s.live--
		case c.Prev == nil:
			s.live++
		}
	}
	s.history = append(s.history, done...)
	s.rev = s.stagedRev
	for _, id := range s.stagedLeases {
		if l := s.leases[id]; l != nil {
			l.Deadline = now.Add(time.Duration(l.TTL) * time.Second)
		}
	}
	s.staged, s.stagedLeases = nil, nil
	return done
}

// Rollback forgets everything staged.
func (s *State) Rollback() {
	s.unstage(0)
	s.stagedRev = s.rev
	for _, id := range s.stagedLeases {
		delete(s.leases, id)
	}
	s.stagedLeases = nil
}

// unstage takes back all staged changes but the first n.
func (s *State) unstage(n int) {
	for i := len(s.staged) - 1; i >= n; i-- {
		cur := s.staged[i].Cur
		e, _ := s.keys.Get(&entry{key: cur.KV.Key})
		s.detach(cur)
		s.bytes -= cur.size()
		e.vers = e.vers[:len(e.vers)-1]
		if len(e.vers) == 0 {
			s.keys.Delete(e)
		} else {
			s.attach(e.vers[len(e.vers)-1])
		}
	}
	s.staged = s.staged[:n]
}

func (s *State) attach(v *Version) {
	if v.KV.Lease == 0 {
		return
	}
	m := s.attached[v.KV.Lease]
	if m == nil {
		m = map[string]struct{}{}
		s.attached[v.KV.Lease] = m
	}
	m[string(v.KV.Key)] = struct{}{}
}

func (s *State) detach(v *Version) {
	if m := s.attached[v.KV.Lease]; m != nil {
		delete(m, string(v.KV.Key))
		if len(m) == 0 {
			delete(s.attached, v.KV.Lease)
		}
	}
}

// push adds a version as the newest of its key.
func (s *State) push(v *Version) Change {
	e, ok := s.keys.Get(&entry{key: v.KV.Key})
	if !ok {
		e = &entry{key: v.KV.Key}
		s.keys.ReplaceOrInsert(e)
	}
	var prev *Version
	if n := len(e.vers); n > 0 {
		s.detach(e.vers[n-1])
		if !e.vers[n-1].Deleted() {
			prev = e.vers[n-1]
		}
	}
	v.KV.Key = e.key // one copy of the key for all versions
	e.vers = append(e.vers, v)
	s.bytes += v.size()
	s.attach(v)
	return Change{Cur: v, Prev: prev}
}

// current is the newest version of a key, staged ones included, nil if it does not exist.
func (s *State) current(key []byte) *Version {
	if e, ok := s.keys.Get(&entry{key: key}); ok {
		return e.at(s.stagedRev + 1)
	}
	return nil
}

// CheckCompact reports whether a compaction to rev is possible now.
func (s *State) CheckCompact(rev int64) error {
	switch {
	case rev <= s.compacted:
		return ErrCompacted
	case rev > s.rev:
		return ErrFutureRev
	}
	return nil
}

// Compact makes revisions below rev unreadable and returns the versions that nobody can
// reach any more, which the caller deletes from the log. Everything needed to read and
// watch from rev on, previous values included, stays. Nothing may be staged.
func (s *State) Compact(rev int64) ([]*Version, error) {
	if err := s.CheckCompact(rev); err != nil {
		return nil, err
	}
	s.compacted = rev
	n := sort.Search(len(s.history), func(i int) bool { return s.history[i].Rev() >= rev })
	var dead []*Version
	for _, c := range s.history[:n] {
		dead = s.prune(c.Cur.KV.Key, dead)
	}
	s.history = append([]Change(nil), s.history[n:]...)
	return dead, nil
}

// prune drops versions of a key that are superseded, or deletions, below the compacted revision.
func (s *State) prune(key []byte, dead []*Version) []*Version {
	e, ok := s.keys.Get(&entry{key: key})
	if !ok {
		return dead
	}
	n := sort.Search(len(e.vers), func(i int) bool { return e.vers[i].KV.ModRevision >= s.compacted })
	if n > 0 && !e.vers[n-1].Deleted() {
		n--
	}
	if n == 0 {
		return dead
	}
	for _, v := range e.vers[:n] {
		s.bytes -= v.size()
	}
	dead = append(dead, e.vers[:n]...)
	if n == len(e.vers) {
		s.keys.Delete(e)
		return dead
	}
	e.vers = append([]*Version(nil), e.vers[n:]...)
	return dead
}
