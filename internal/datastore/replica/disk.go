package replica

import (
	"context"
	"time"

	"microk8s/internal/datastore/storedir"
)

// wantFree is the space below which a disk counts as full. libdqlite allocates its log ahead, in
// segments of 8 MiB (src/raft/uv.h, UV__MAX_SEGMENT_SIZE). An append that finds none fails, and its
// leader steps down, and so does the next one, whose first entry fails as well. So writes are refused
// while there is still room in the segments for Raft's own entries. The rest is for small files.
const wantFree = 10 << 20

// watchDisk keeps what this daemon knows of free space.
func (r *Replica) watchDisk() {
	t := time.NewTicker(pingEvery)
	defer t.Stop()
	for {
		r.lookAtDisk()
		select {
		case <-r.ctx.Done():
			return
		case <-t.C:
		}
	}
}

func (r *Replica) lookAtDisk() {
	free, err := r.m.Free()
	full := err == nil && free < wantFree
	if was := r.full.Swap(full); was != full {
		if full {
			r.log.Error("the disk is full", "free", free, "wanted", wantFree)
		} else {
			r.log.Info("the disk has space again", "free", free)
		}
	}
	noRoom := r.tooManyFull(full)
	if was := r.noRoom.Swap(noRoom); was != noRoom && r.e.Leads() {
		if noRoom {
			r.log.Error("writes are refused: the disks of too many voters are full")
		} else {
			r.log.Info("writes are accepted again: there is space")
		}
	}
	if full && !noRoom {
		r.yield()
	}
}

// tooManyFull reports whether the voters that have space are no majority. Those that do not answer
// count as having it: whether they are missed is for Raft to find out.
func (r *Replica) tooManyFull(own bool) bool {
	id := r.m.Node().ID
	r.mu.Lock()
	defer r.mu.Unlock()
	voters, full := 0, 0
	for _, n := range r.members {
		if n.Role != storedir.Voter {
			continue
		}
		voters++
		if p := r.peers[n.Address]; n.ID == id && own || p != nil && p.online(onlineFor) && p.last.Full {
			full++
		}
	}
	return voters > 0 && voters-full <= voters/2
}

// yield begins to give leadership to a voter with space, if this daemon leads.
func (r *Replica) yield() {
	if !r.e.Leads() || r.alone.Load() || !r.yielding.CompareAndSwap(false, true) {
		return
	}
	r.spawn(func() {
		defer r.yielding.Store(false)
		ctx, cancel := context.WithTimeout(r.ctx, handoverLimit)
		defer cancel()
		if err := r.Yield(ctx); err != nil {
			r.log.Warn("the disk is full, and leadership stays here", "err", err)
		}
	})
}

// LowDisk says that the disk is nearly full, or has space again.
func (r *Replica) LowDisk(low bool) { r.lowDisk.Store(low) }

// Yield gives leadership to another voter, if this daemon leads and there is one.
func (r *Replica) Yield(ctx context.Context) error {
	if !r.e.Leads() || r.alone.Load() {
		return nil
	}
	return r.transfer(ctx, false)
}
