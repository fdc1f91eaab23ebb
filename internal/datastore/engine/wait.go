package engine

import (
	"context"
	"slices"
)

type waiter struct {
	rev     int64
	compact bool // until it is compacted, not committed
	done    chan struct{}
}

// reached wakes who waits for a revision. The caller holds the lock.
func (e *Engine) reached(rev int64) {
	kept := e.waiters[:0]
	for _, w := range e.waiters {
		if !w.compact && w.rev <= rev || w.compact && w.rev <= e.st.Compacted() {
			close(w.done)
		} else {
			kept = append(kept, w)
		}
	}
	e.waiters = kept
}

// WaitRev waits until a revision is committed here.
func (e *Engine) WaitRev(ctx context.Context, rev int64) error {
	return e.wait(ctx, waiter{rev: rev})
}

// WaitCompacted waits until a compaction to a revision is known here.
func (e *Engine) WaitCompacted(ctx context.Context, rev int64) error {
	return e.wait(ctx, waiter{rev: rev, compact: true})
}

func (e *Engine) wait(ctx context.Context, w waiter) error {
	w.done = make(chan struct{})
	e.mu.Lock()
	e.waiters = append(e.waiters, w)
	if e.st != nil {
		e.reached(e.st.Rev())
	}
	e.mu.Unlock()
	select {
	case <-w.done:
		return nil
	case <-ctx.Done():
		e.mu.Lock()
		e.waiters = slices.DeleteFunc(e.waiters, func(o waiter) bool { return o.done == w.done })
		e.mu.Unlock()
		return ctx.Err()
	}
}
