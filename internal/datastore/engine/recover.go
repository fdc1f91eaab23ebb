package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	dslog "microk8s/internal/datastore/log"
	"microk8s/internal/datastore/state"
)

// takeOver brings the state to what the log holds, and restarts the leases.
func (t *term) takeOver(ctx context.Context) error {
	if t.Loaded() {
		_, err := t.readTail(ctx)
		if err == nil {
			t.mu.Lock()
			t.st.RestartLeases(t.opt.Now())
			t.mu.Unlock()
			t.sweep = true
			return nil
		}
		if !errors.Is(err, errGap) {
			return err
		}
		t.opt.Logger.Info("this member has fallen behind the last compaction; reading all data again")
	}
	st, dead, err := load(ctx, t.log)
	if err != nil {
		return err
	}
	st.RestartLeases(t.opt.Now())
	t.dead = dead
	return t.Load(st)
}

func load(ctx context.Context, l dslog.Log) (*state.State, []int64, error) {
	var loader *state.Loader
	leases, err := l.Leases(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read the leases: %w", err)
	}
	// The compacted revision decides how rows are judged, so it is needed before the first.
	compacted, err := l.Load(ctx, int64(1)<<62, func(dslog.Row) error { return nil })
	if err != nil {
		return nil, nil, err
	}
	loader = state.NewLoader(compacted)
	for _, r := range leases {
		id, ttl, _ := r.LeaseOf()
		loader.AddLease(id, ttl)
	}
	_, err = l.Load(ctx, -1, func(r dslog.Row) error { return loader.Add(r.VersionOf()) })
	if err != nil {
		return nil, nil, err
	}
	st, versions := loader.Done()
	return st, ids(versions), nil
}

func ids(versions []*state.Version) []int64 {
	out := make([]int64, len(versions))
	for i, v := range versions {
		out[i] = dslog.VersionID(v)
	}
	return out
}

// resolve finds out what became of an append that failed: it takes back what is staged,
// opens the log again, and takes over what it holds. It returns nil when that is the append.
func (t *term) resolve(ctx context.Context, rows []dslog.Row, cause error) error {
	t.mu.Lock()
	t.st.Rollback()
	t.mu.Unlock()
	alone := t.opt.Alone()
	t.opt.Logger.Warn("a write has an unknown outcome; reading the log again", "err", cause)
	if err := t.reopen(ctx); err != nil {
		return err
	}
	found, err := t.catchUp(ctx)
	if err != nil {
		return err
	}
	for _, r := range rows {
		if f, ok := found[r.ID]; !ok || !sameRow(f, r) {
			t.opt.Logger.Warn("the write was not applied", "revision", t.Rev())
			if t.opt.Full() {
				return errFull // most likely the cause, and dqlite's errors do not tell
			}
			return fmt.Errorf("%w: %w", ErrNotApplied, cause)
		}
	}
	if !alone || !t.opt.Alone() {
		return ErrUnknown
	}
	t.opt.Logger.Info("the write was applied", "revision", t.Rev())
	return nil
}

func sameRow(a, b dslog.Row) bool {
	return bytes.Equal(a.Key, b.Key) && bytes.Equal(a.Value, b.Value) &&
		a.Create == b.Create && a.Version == b.Version && a.Lease == b.Lease
}

// reopen tries until the log is open again; that takes as long as the node does not lead.
func (t *term) reopen(ctx context.Context) error {
	t.epoch.end()
	const pause, report = 100 * time.Millisecond, 10 * time.Second
	lastReport := time.Now()
	for {
		attempt, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := t.log.Reopen(attempt)
		cancel()
		if err == nil {
			return nil
		}
		if time.Since(lastReport) >= report {
			lastReport = time.Now()
			t.opt.Logger.Error("the log cannot be opened again, writes wait", "err", err)
		}
		select {
		case <-ctx.Done():
			return ErrUnknown
		case <-time.After(pause):
		}
	}
}

// catchUp takes over what the log holds beyond the state, and all of it by id.
func (t *term) catchUp(ctx context.Context) (map[int64]dslog.Row, error) {
	for {
		found, err := t.readTail(ctx)
		if err == nil {
			if !t.opt.Alone() {
				// Others may have led meanwhile, and renewed leases.
				t.mu.Lock()
				t.st.RestartLeases(t.opt.Now())
				t.mu.Unlock()
			}
			err = t.readAlarms(ctx)
		}
		if err == nil {
			t.epoch.begin()
			return found, nil
		}
		if errors.Is(err, errGap) {
			// Others have led for a long time. Leadership that begins again reads everything.
			return nil, ErrUnknown
		}
		t.opt.Logger.Error("cannot read the end of the log, trying again", "err", err)
		if err := t.reopen(ctx); err != nil {
			return nil, err
		}
	}
}

// errGap says that rows beyond the state have been compacted away already.
var errGap = errors.New("the log has been compacted beyond this member's data")

// readTail takes over what the log holds beyond the state: versions, leases, compaction. It
// returns the rows by id.
func (t *term) readTail(ctx context.Context) (map[int64]dslog.Row, error) {
	var tail []dslog.Row
	compacted, err := t.log.Load(ctx, dslog.LastID(t.Rev()), func(r dslog.Row) error {
		tail = append(tail, r)
		return nil
	})
	if err != nil {
		return nil, err
	}
	leases, err := t.log.Leases(ctx)
	if err != nil {
		return nil, err
	}
	found := make(map[int64]dslog.Row, len(tail)+len(leases))
	t.mu.Lock()
	defer t.mu.Unlock()
	if compacted > t.st.Rev() {
		return nil, errGap
	}
	for _, r := range tail {
		if err := t.st.StageVersion(r.VersionOf()); err != nil {
			t.st.Rollback()
			return nil, fmt.Errorf("the log has been written by somebody else: %w", err)
		}
		found[r.ID] = r
	}
	kept := make(map[int64]bool, len(leases))
	for _, r := range leases {
		found[r.ID] = r
		id, ttl, _ := r.LeaseOf()
		kept[id] = true
		if err := t.st.StageGrant(id, ttl); err != nil && !errors.Is(err, state.ErrLeaseExists) {
			t.st.Rollback()
			return nil, err
		}
	}
	t.commit()
	for _, id := range t.st.Leases() {
		if !kept[id] {
			t.st.DropLease(id)
		}
	}
	if compacted > t.st.Compacted() {
		dead, err := t.st.Compact(compacted)
		if err != nil {
			return nil, err
		}
		t.dead = append(t.dead, ids(dead)...)
	}
	return found, nil
}

// broken opens the log again after an error outside of an append, and returns the error.
func (t *term) broken(ctx context.Context, cause error) error {
	if err := t.reopen(ctx); err != nil {
		return err
	}
	if _, err := t.catchUp(ctx); err != nil {
		return err
	}
	return cause
}
