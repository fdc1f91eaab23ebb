package engine

import (
	"context"
	"errors"
	"fmt"
	"time"

	dslog "microk8s/internal/datastore/log"
)

// Limits of one group of transactions. Larger groups gain nothing (one statement of 128 rows
// costs little more than one of 32) and make the first caller wait for the last.
const (
	groupJobs  = 256
	groupBytes = 1 << 20
)

// job is one request to the writer: stage adds to a group, alone runs between groups.
type job struct {
	bytes int
	stage func(*term) error
	alone func(context.Context, *term) error
	err   error
	epoch int64 // of the log when the answer was made
	wrote bool  // it tried to commit, or its group did: it did not come from the state alone
	done  chan struct{}
}

// do hands a job to the writer and waits for its answer. When ctx ends first, the job may
// still be done.
func (e *Engine) do(ctx context.Context, j *job) error {
	t := e.term.Load()
	if t == nil {
		return ErrNotLeading
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	j.done = make(chan struct{})
	// Who writes by itself waits for its own statement, or for the end of leadership, whatever ctx
	// says; those who come after it do not wait longer than they want.
	if j.alone == nil && t.waiting.Load() == 0 && t.writing.TryLock() {
		begun := t.ctx.Err() == nil
		if begun {
			t.commitGroup(t.ctx, []*job{j})
		}
		t.writing.Unlock()
		if begun {
			return e.settle(ctx, t, j)
		}
	}
	t.waiting.Add(1)
	select {
	case t.queue <- j:
	case <-ctx.Done():
		t.waiting.Add(-1)
		return ctx.Err()
	case <-t.done:
		return ErrNotLeading
	}
	select {
	case <-j.done:
		return e.settle(ctx, t, j)
	case <-ctx.Done():
		return ctx.Err()
	case <-t.done:
		select {
		case <-j.done:
			return e.settle(ctx, t, j)
		default:
			return ErrNotLeading // it was never taken from the queue
		}
	}
}

// settle returns the answer of a job that is done. One that has written nothing is a read of the
// state: a member that was frozen while another began to lead, and does not know it yet, would
// answer from the past. So it counts only if this member leads after it, and has led since.
func (e *Engine) settle(ctx context.Context, t *term, j *job) error {
	if j.wrote || errors.Is(j.err, ErrNotLeading) || errors.Is(j.err, ErrUnknown) || errors.Is(j.err, ErrNotApplied) {
		return j.err
	}
	if err := e.opt.Confirm(ctx); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("%w: %w", ErrNotLeading, err)
	}
	if !e.epoch.since(j.epoch) || e.term.Load() != t {
		return fmt.Errorf("%w: leadership started over", ErrNotLeading)
	}
	return j.err
}

// commitGroup stages a group, makes it durable, shows it and answers.
func (t *term) commitGroup(ctx context.Context, group []*job) {
	t.mu.Lock()
	for _, j := range group {
		j.epoch, j.err = t.epoch.now(), j.stage(t)
	}
	t.mu.Unlock()
	writes := len(t.st.Staged())+len(t.st.StagedLeases()) > 0
	if err := t.flush(ctx); err != nil {
		writes = false
		for _, j := range group {
			if j.err == nil {
				j.err = err
			}
		}
	}
	t.raise(ctx)
	for _, j := range group {
		j.wrote = writes
		close(j.done)
	}
}

// flush makes everything staged durable and visible. After an error nothing is staged any
// more, and the state is what the log holds.
func (t *term) flush(ctx context.Context) error {
	changes, leases := t.st.Staged(), t.st.StagedLeases()
	if len(changes) == 0 && len(leases) == 0 {
		return nil
	}
	if t.opt.Full() {
		t.mu.Lock()
		t.st.Rollback()
		t.mu.Unlock()
		return errFull
	}
	rows := make([]dslog.Row, 0, len(changes)+len(leases))
	size := 0
	for _, c := range changes {
		rows = append(rows, dslog.VersionRow(c.Cur))
		size += len(c.Cur.KV.Key) + len(c.Cur.KV.Value)
	}
	for _, id := range leases {
		l, _ := t.st.Lease(id)
		rows = append(rows, dslog.LeaseRow(id, l.TTL))
	}
	start := time.Now()
	err := t.log.Append(ctx, rows)
	t.stats.GroupSeconds.Add(int64(time.Since(start)))
	if err != nil {
		t.stats.Failures.Add(1)
		return t.resolve(ctx, rows, err)
	}
	t.stats.Groups.Add(1)
	t.stats.Rows.Add(int64(len(rows)))
	t.stats.Bytes.Add(int64(size))
	t.publish()
	if len(leases) > 0 {
		select {
		case t.wakeExpiry <- struct{}{}:
		default:
		}
	}
	return nil
}

// publish commits what is staged and tells the watchers, in one step.
func (t *term) publish() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.commit()
}
