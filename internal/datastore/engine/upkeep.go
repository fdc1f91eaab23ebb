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
	}()
}

// expire ends the leases whose time is over and sets the timer for the next one.
func (e *Engine) expire(ctx context.Context, timer *time.Timer) {
	if e.opt.Full() || e.raised(pb.AlarmType_CORRUPT) {
		timer.Reset(time.Second)
		return
	}
	now := e.opt.Now()
	e.mu.RLock()
	due, next := e.st.Expired(now)
	e.mu.RUnlock()
	if len(due) > 0 {
		if err := e.end(ctx, due); err != nil {
			e.opt.Logger.Warn("leases could not be ended, trying again", "leases", len(due), "err", err)
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
func (e *Engine) end(ctx context.Context, leases []int64) error {
	for len(leases) > 0 {
		if e.opt.Full() {
			return errFull
		}
		staged, n := 0, 0
		e.mu.Lock()
		for n < len(leases) && staged < expireKeys {
			staged += e.st.StageExpire(leases[n])
			if len(e.st.LeaseKeys(leases[n])) > 0 {
				break
			}
			n++
		}
		e.mu.Unlock()
		if err := e.flush(ctx); err != nil {
			return err
		}
		rows := make([]int64, n)
		for i, id := range leases[:n] {
			rows[i] = dslog.LeaseRow(id, 1).ID
		}
		if n > 0 {
			if err := e.log.Delete(ctx, rows); err != nil {
				return e.broken(ctx, err)
			}
		}
		e.mu.Lock()
		for _, id := range leases[:n] {
			e.st.DropLease(id)
		}
		e.mu.Unlock()
		leases = leases[n:]
	}
	return nil
}

// broken opens the log again after an error outside of an append, and returns the error.
func (e *Engine) broken(ctx context.Context, cause error) error {
	if err := e.reopen(ctx); err != nil {
		return err
	}
	if _, err := e.catchUp(ctx); err != nil {
		return err
	}
	return cause
}

// compact remembers the revision durably first: what has been answered as compacted stays so.
func (e *Engine) compact(ctx context.Context, rev int64) error {
	if err := e.st.CheckCompact(rev); err != nil {
		return err
	}
	if e.opt.Full() {
		return errFull
	}
	if err := e.log.SetCompacted(ctx, rev); err != nil {
		return e.broken(ctx, err) // it may be remembered, and the next try or start finds it
	}
	e.mu.Lock()
	dead, err := e.st.Compact(rev)
	e.mu.Unlock()
	if err != nil {
		return err
	}
	e.dead = append(e.dead, ids(dead)...)
	e.lastCompact = e.opt.Now()
	e.opt.Compacted()
	e.release(len(dead))
	e.opt.Logger.Info("compacted", "revision", rev, "rows", len(dead))
	return nil
}

// bury deletes some dead rows. What fails is tried again: they do no harm.
func (e *Engine) bury(ctx context.Context) {
	if e.opt.Full() {
		return
	}
	if e.sweep {
		e.sweep = false
		if err := e.findDead(ctx); err != nil {
			e.sweep = true
			e.opt.Logger.Warn("old rows could not be looked for, trying again", "err", e.broken(ctx, err))
			return
		}
	}
	if len(e.dead) == 0 {
		return
	}
	n := min(len(e.dead), buryRows)
	if err := e.log.Delete(ctx, e.dead[:n]); err != nil {
		e.opt.Logger.Warn("old rows could not be deleted, trying again", "err", e.broken(ctx, err))
		return
	}
	if e.dead = e.dead[n:]; len(e.dead) == 0 {
		e.dead = nil
		if err := e.measure(ctx); err != nil {
			e.opt.Logger.Warn("cannot measure the database", "err", e.broken(ctx, err))
		}
	}
}

// findDead looks for rows that the last leader has not deleted after a compaction.
func (e *Engine) findDead(ctx context.Context) error {
	live := map[int64]struct{}{}
	e.mu.RLock()
	compacted := e.st.Compacted()
	for _, v := range e.st.Versions() {
		if v.KV.ModRevision <= compacted {
			live[dslog.VersionID(v)] = struct{}{}
		}
	}
	e.mu.RUnlock()
	var dead []int64
	err := e.log.IDs(ctx, dslog.LastID(compacted), func(id int64) error {
		if _, ok := live[id]; !ok {
			dead = append(dead, id)
		}
		return nil
	})
	if err != nil {
		return err
	}
	e.dead = append(e.dead, dead...)
	slices.Sort(e.dead)
	e.dead = slices.Compact(e.dead)
	return nil
}

func (e *Engine) measure(ctx context.Context) error {
	total, used, err := e.log.Size(ctx)
	if err != nil {
		return err
	}
	e.size.Store(total)
	e.sizeInUse.Store(used)
	return nil
}

// everyMinute measures, remembers which revision was when, and compacts if nobody else does.
func (e *Engine) everyMinute(ctx context.Context) {
	if err := e.measure(ctx); err != nil {
		e.opt.Logger.Warn("cannot measure the database", "err", e.broken(ctx, err))
		return
	}
	now := e.opt.Now()
	e.samples = append(e.samples, sample{now, e.st.Rev()})
	var target int64
	for len(e.samples) > 1 && !e.samples[1].at.After(now.Add(-e.opt.CompactKeep)) {
		e.samples = e.samples[1:]
	}
	if first := e.samples[0]; !first.at.After(now.Add(-e.opt.CompactKeep)) {
		target = first.rev
	}
	// With the alarm API servers cannot compact, because they would write a key first.
	if !e.raised(pb.AlarmType_NOSPACE) && now.Sub(e.lastCompact) < e.opt.CompactAfter || e.st.CheckCompact(target) != nil || target <= state.FirstRevision {
		return
	}
	// As an API server would: first the key, which says that this compaction is ours.
	value := &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{
		Key: []byte(CompactKey), Value: []byte(strconv.FormatInt(target, 10)),
	}}}
	e.mu.Lock()
	_, err := e.st.Stage(&pb.TxnRequest{Success: []*pb.RequestOp{value}})
	e.mu.Unlock()
	if err == nil {
		err = e.flush(ctx)
	}
	if err == nil {
		err = e.compact(ctx, target)
	}
	if err != nil {
		e.opt.Logger.Warn("cannot compact", "revision", target, "err", err)
	}
}
