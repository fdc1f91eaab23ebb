package state

import (
	"sort"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
)

// maxTTL is etcd's largest lease, in seconds.
const maxTTL = 9000000000

// StageGrant stages a lease. It counts from the Commit that makes it visible.
func (s *State) StageGrant(id, ttl int64) error {
	if ttl > maxTTL {
		return ErrTTLTooLarge
	}
	if s.leases[id] != nil {
		return ErrLeaseExists
	}
	s.leases[id] = &Lease{ID: id, TTL: ttl}
	s.stagedLeases = append(s.stagedLeases, id)
	return nil
}

// StageExpire stages the deletion of a lease's keys, all at one revision and in key order, and
// returns how many. Of more than MaxChanges keys the others are left for the next call. A lease with
// none left can be dropped.
func (s *State) StageExpire(id int64) int {
	keys := s.LeaseKeys(id)
	if len(keys) == 0 {
		return 0
	}
	keys = keys[:min(len(keys), MaxChanges)]
	s.stagedRev++
	for i, k := range keys {
		s.staged = append(s.staged, s.push(&Version{KV: mvccpb.KeyValue{Key: []byte(k), ModRevision: s.stagedRev}, Sub: i}))
	}
	return len(keys)
}

// LeaseKeys returns the keys of a lease in order, staged changes included.
func (s *State) LeaseKeys(id int64) []string {
	keys := make([]string, 0, len(s.attached[id]))
	for k := range s.attached[id] {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}

// DropLease forgets a lease.
func (s *State) DropLease(id int64) { delete(s.leases, id) }

// Lease returns a copy of a lease.
func (s *State) Lease(id int64) (Lease, bool) {
	if l := s.leases[id]; l != nil {
		return *l, true
	}
	return Lease{}, false
}

// Leases returns the ids of all leases in order.
func (s *State) Leases() []int64 {
	ids := make([]int64, 0, len(s.leases))
	for id := range s.leases {
		ids = append(ids, id)
	}
	sort.Slice(ids, func(i, j int) bool { return ids[i] < ids[j] })
	return ids
}

// RenewLease restarts the countdown of a lease.
func (s *State) RenewLease(id int64, now time.Time) (Lease, bool) {
	l := s.leases[id]
	if l == nil || l.Deadline.IsZero() {
		return Lease{}, false
	}
	l.Deadline = now.Add(time.Duration(l.TTL) * time.Second)
	return *l, true
}

// RestartLeases restarts the countdown of all leases, as etcd does when leadership moves:
// a lease may end late, never early.
func (s *State) RestartLeases(now time.Time) {
	for _, l := range s.leases {
		l.Deadline = now.Add(time.Duration(l.TTL) * time.Second)
	}
}

// Expired returns the leases whose time is over, and when the next one ends (zero: none).
func (s *State) Expired(now time.Time) (ids []int64, next time.Time) {
	for id, l := range s.leases {
		switch {
		case l.Deadline.IsZero(): // staged
		case !l.Deadline.After(now):
			ids = append(ids, id)
		case next.IsZero() || l.Deadline.Before(next):
			next = l.Deadline
		}
	}
	sort.Slice(ids, func(i, j int) bool { return ids[i] < ids[j] })
	return ids, next
}
