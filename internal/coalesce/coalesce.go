// Package coalesce lets callers that want the same fact at the same time share one read of it.
// It is for reads that a stranger can cause: a thousand wrong secrets are looked up with a few
// reads, and a right one is still compared with what was read after it came in.
package coalesce

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
)

// Reads shares reads of one value. The zero value is ready to use; its methods may be called
// from any goroutine.
type Reads[T any] struct {
	// Every is the least time between the ends and beginnings of two reads; 0 means none.
	Every time.Duration
	// Timeout bounds one read; 0 means 30 seconds.
	Timeout time.Duration

	flight singleflight.Group
	turn   sync.Mutex // one read at a time; guards last
	last   time.Time
}

const defaultTimeout = 30 * time.Second

// Do returns what read returned in a call that began after Do was called. Callers that wait for
// such a call share it and its result, which none of them may change. read gets a context of its
// own, since it outlives a caller that gives up. Do returns the context's error when ctx ends
// first.
func (r *Reads[T]) Do(ctx context.Context, read func(context.Context) (T, error)) (T, error) {
	type result struct{ value T }
	done := r.flight.DoChan("", func() (any, error) {
		r.turn.Lock()
		defer r.turn.Unlock()
		if wait := r.Every - time.Since(r.last); !r.last.IsZero() && wait > 0 {
			time.Sleep(wait)
		}
		// Whoever comes from here on may want something newer than this read sees.
		r.flight.Forget("")
		limit := r.Timeout
		if limit == 0 {
			limit = defaultTimeout
		}
		own, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
		defer cancel()
		value, err := read(own)
		r.last = time.Now()
		return result{value}, err
	})
	var none T
	select {
	case <-ctx.Done():
		return none, ctx.Err()
	case got := <-done:
		if value, ok := got.Val.(result); ok {
			return value.value, got.Err
		}
		return none, got.Err
	}
}
