package replica

import (
	"context"
	"sync"
)

// rounds shares work among callers: one round runs at a time, and serves all who came before
// it began.
type rounds struct {
	run func(context.Context) (int64, error)

	mu      sync.Mutex
	next    *round // not begun
	running bool
}

type round struct {
	done  chan struct{}
	value int64
	err   error
}

// wait returns the result of a round that begins after the call.
func (r *rounds) wait(ctx, life context.Context) (int64, error) {
	r.mu.Lock()
	if r.next == nil {
		r.next = &round{done: make(chan struct{})}
	}
	mine := r.next
	if !r.running {
		// Nobody runs one: without a change of goroutines.
		r.running = true
		r.next = nil
		r.mu.Unlock()
		mine.value, mine.err = r.run(life)
		close(mine.done)
		r.mu.Lock()
		if r.next != nil {
			go r.loop(life)
		} else {
			r.running = false
		}
		r.mu.Unlock()
		return mine.value, mine.err
	}
	r.mu.Unlock()
	select {
	case <-mine.done:
		return mine.value, mine.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

func (r *rounds) loop(life context.Context) {
	for {
		r.mu.Lock()
		now := r.next
		r.next = nil
		if now == nil {
			r.running = false
			r.mu.Unlock()
			return
		}
		r.mu.Unlock()
		now.value, now.err = r.run(life)
		close(now.done)
	}
}
