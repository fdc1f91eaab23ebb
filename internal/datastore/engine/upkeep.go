package engine

import (
	"context"
	"runtime/debug"
	"slices"
	"strconv"
	"time"

	dslog "microk8s/internal/datastore/log"
	"microk8s/internal/datastore/state"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// CompactKey is the key through which API servers agree on compaction: its value is the
// revision that was compacted, its version guards against doing it twice.
const CompactKey = "compact_rev_key"

const (
	expireKeys = 1000 // keys after which no further lease is ended in the same statement
	buryRows   = 1000 // dead rows that are deleted between two groups

	releaseRows = 1 << 14 // rows after whose end memory is given back; they may be some 20 MiB
)

// release gives memory back to the system after something that needed it for so many rows: the
// collector, which does it by itself, takes minutes and keeps a part. It does not wait for that, which
// is one collection.
func (e *Engine) release(rows int) {
	if rows < releaseRows || !e.releasing.CompareAndSwap(false, true) {
		return
	}
	go func() {
		defer e.releasing.Store(false)
		debug.FreeOSMemory()
		e.opt.Trim()
	}()
}

// expire ends the leases whose time is over and sets the timer for the next one.
func (t *term) expire(ctx context.Context, timer *time.Timer) {
	if t.opt.Full() || t.raised(pb.AlarmType_CORRUPT) {
		timer.Reset(time.Second)
		return
	}
	now := t.opt.Now()
	t.mu.RLock()
	due, next := t.st.Expired(now)
	t.mu.RUnlock()
	if len(due) > 0 {
		if err := t.end(ctx, due); err != nil {
			t.opt.Logger.Warn("leases could not be ended, trying again", "leases", len(due), "err", err)
			next = now.Add(time.Second)
		}
	}
	wait := time.Minute
	if !next.IsZero() {
		// At least a pause: leases that end together are ended together.
		wait = min(max(next.Sub(now), 50*time.Millisecond), wait)
	}
	timer.Reset(wait)
}

// end deletes the keys of leases and then the leases.
func (t *term) end(ctx context.Context, leases []int64) error {
	for len(leases) > 0 {
		if t.opt.Full() {
			return errFull
		}
		staged, n := 0, 0
		t.mu.Lock()
		for n < len(leases) && staged < expireKeys {
			staged += t.st.StageExpire(leases[n])
			if len(t.st.LeaseKeys(leases[n])) > 0 {
				break
			}
			n++
		}
		t.mu.Unlock()
		if err := t.flush(ctx); err != nil {
			return err
		}
		rows := make([]int64, n)
		for i, id := range leases[:n] {
			rows[i] = dslog.LeaseRow(id, 1).ID
		}
		if n > 0 {
			if err := t.log.Delete(ctx, rows); err != nil {
				return t.broken(ctx, err)
			}
		}
		t.mu.Lock()
		for _, id := range leases[:n] {
			t.st.DropLease(id)
		}
		t.mu.Unlock()
		leases = leases[n:]
	}
	return nil
}

// compact remembers the revision durably first: what has been answered as compacted stays so.
func (t *term) compact(ctx context.Context, rev int64) error {
	if err := t.st.CheckCompact(rev); err != nil {
		return err
	}
	if t.opt.Full() {
		return errFull
	}
	if err := t.log.SetCompacted(ctx, rev); err != nil {
		return t.broken(ctx, err) // it may be remembered, and the next try or start finds it
	}
	t.mu.Lock()
	dead, err := t.st.Compact(rev)
	t.mu.Unlock()
	if err != nil {
		return err
	}
	t.dead = append(t.dead, ids(dead)...)
	t.lastCompact = t.opt.Now()
	t.opt.Compacted()
	t.release(len(dead))
	t.opt.Logger.Info("compacted", "revision", rev, "rows", len(dead))
	return nil
}

// bury deletes some dead rows. What fails is tried again: they do no harm.
func (t *term) bury(ctx context.Context) {
	if t.opt.Full() {
		return
	}
	if t.sweep {
		t.sweep = false
		if err := t.findDead(ctx); err != nil {
			t.sweep = true
			t.opt.Logger.Warn("old rows could not be looked for, trying again", "err", t.broken(ctx, err))
			return
		}
	}
	if len(t.dead) == 0 {
		return
	}
	n := min(len(t.dead), buryRows)
	if err := t.log.Delete(ctx, t.dead[:n]); err != nil {
		t.opt.Logger.Warn("old rows could not be deleted, trying again", "err", t.broken(ctx, err))
		return
	}
	t.buried += n
	if t.dead = t.dead[n:]; len(t.dead) == 0 {
		t.dead = nil
		t.release(t.buried) // what the log took for them
		t.buried = 0
		if err := t.measure(ctx); err != nil {
			t.opt.Logger.Warn("cannot measure the database", "err", t.broken(ctx, err))
		}
	}
}

// findDead looks for rows that the last leader has not deleted after a compaction.
func (t *term) findDead(ctx context.Context) error {
	live := map[int64]struct{}{}
	t.mu.RLock()
	compacted := t.st.Compacted()
	for _, v := range t.st.Versions() {
		if v.KV.ModRevision <= compacted {
			live[dslog.VersionID(v)] = struct{}{}
		}
	}
	t.mu.RUnlock()
	var dead []int64
	err := t.log.IDs(ctx, dslog.LastID(compacted), func(id int64) error {
		if _, ok := live[id]; !ok {
			dead = append(dead, id)
		}
		return nil
	})
	if err != nil {
		return err
	}
	t.dead = append(t.dead, dead...)
	slices.Sort(t.dead)
	t.dead = slices.Compact(t.dead)
	return nil
}

func (t *term) measure(ctx context.Context) error {
	total, used, err := t.log.Size(ctx)
	if err != nil {
		return err
	}
	t.size.Store(total)
	t.sizeInUse.Store(used)
	return nil
}

// everyMinute measures, remembers which revision was when, and compacts if nobody else does.
func (t *term) everyMinute(ctx context.Context) {
	if err := t.measure(ctx); err != nil {
		t.opt.Logger.Warn("cannot measure the database", "err", t.broken(ctx, err))
		return
	}
	now := t.opt.Now()
	t.samples = append(t.samples, sample{now, t.st.Rev()})
	var target int64
	for len(t.samples) > 1 && !t.samples[1].at.After(now.Add(-t.opt.CompactKeep)) {
		t.samples = t.samples[1:]
	}
	if first := t.samples[0]; !first.at.After(now.Add(-t.opt.CompactKeep)) {
		target = first.rev
	}
	// With the alarm API servers cannot compact, because they would write a key first.
	if !t.raised(pb.AlarmType_NOSPACE) && now.Sub(t.lastCompact) < t.opt.CompactAfter || t.st.CheckCompact(target) != nil || target <= state.FirstRevision {
		return
	}
	// As an API server would: first the key, which says that this compaction is ours.
	value := &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{
		Key: []byte(CompactKey), Value: []byte(strconv.FormatInt(target, 10)),
	}}}
	t.mu.Lock()
	_, err := t.st.Stage(&pb.TxnRequest{Success: []*pb.RequestOp{value}})
	t.mu.Unlock()
	if err == nil {
		err = t.flush(ctx)
	}
	if err == nil {
		err = t.compact(ctx, target)
	}
	if err != nil {
		t.opt.Logger.Warn("cannot compact", "revision", target, "err", err)
	}
}
