package replica

import (
	"slices"
	"time"

	"microk8s/internal/datastore/engine"
	dslog "microk8s/internal/datastore/log"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/state"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

const (
	largest      = 5                // prefixes that are named
	largestEvery = 10 * time.Second // they are looked for at most so often: that reads all keys
)

// Space returns how much of the quota is used, and the alarms as the leader named them last.
func (r *Replica) Space() engine.Space {
	s := r.e.Space()
	if r.e.Leads() {
		return s
	}
	s.Alarms = nil
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.peers {
		if p.last.Leads {
			s.Alarms = p.last.Alarms
		}
	}
	return s
}

// space is Space for programs beside the daemon, with what takes most where that matters.
func (r *Replica) space() *peers.Space {
	if !r.e.Loaded() {
		return nil
	}
	s := r.Space()
	out := &peers.Space{Bytes: s.Bytes, Quota: s.Quota}
	out.Refused = slices.ContainsFunc(s.Alarms, func(a dslog.Alarm) bool { return a.Type == pb.AlarmType_NOSPACE })
	if !out.Refused && (s.Quota == 0 || s.Bytes < s.Quota/10*8) {
		return out
	}
	r.largestMu.Lock()
	defer r.largestMu.Unlock()
	if time.Since(r.largestAt) >= largestEvery {
		r.largest = nil
		_ = r.e.View(func(st *state.State) error {
			for _, p := range st.Largest(largest) {
				r.largest = append(r.largest, peers.Prefix(p))
			}
			return nil
		})
		r.largestAt = time.Now()
	}
	out.Largest = r.largest
	return out
}
