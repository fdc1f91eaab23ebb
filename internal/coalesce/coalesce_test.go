package coalesce

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
)

// TestSharesReads has a hundred callers come while one read goes on: they share the next one.
func TestSharesReads(t *testing.T) {
	var r Reads[int64]
	var value, reads atomic.Int64
	began, release := make(chan struct{}), make(chan struct{})
	value.Store(1)
	var group sync.WaitGroup
	group.Go(func() {
		got, err := r.Do(t.Context(), func(context.Context) (int64, error) {
			reads.Add(1)
			v := value.Load()
			close(began)
			<-release
			return v, nil
		})
		if got != 1 || err != nil {
			t.Errorf("the first caller: %d %v", got, err)
		}
	})
	<-began
	value.Store(2) // after the first read looked, before the others came
	for range 100 {
		group.Go(func() {
			got, err := r.Do(t.Context(), func(context.Context) (int64, error) {
				reads.Add(1)
				return value.Load(), nil
			})
			if got != 2 || err != nil {
				t.Errorf("a later caller sees %d, %v: older than its call", got, err)
			}
		})
	}
	close(release)
	group.Wait()
	// The hundred may be late themselves: each that finds no read waiting begins one.
	if n := reads.Load(); n > 100 {
		t.Errorf("%d reads", n)
	}
}

// TestManyCallersFewReads holds the first read until all others wait.
func TestManyCallersFewReads(t *testing.T) {
	var r Reads[int]
	var reads atomic.Int64
	began, release := make(chan struct{}), make(chan struct{})
	var first, others sync.WaitGroup
	first.Go(func() {
		_, _ = r.Do(t.Context(), func(context.Context) (int, error) { reads.Add(1); close(began); <-release; return 0, nil })
	})
	<-began
	ctx, cancel := context.WithCancel(t.Context())
	for range 50 {
		others.Go(func() {
			_, err := r.Do(ctx, func(context.Context) (int, error) { reads.Add(1); return 0, nil })
			if !errors.Is(err, context.Canceled) {
				t.Errorf("a caller that gave up: %v", err)
			}
		})
	}
	cancel()
	others.Wait() // a caller that gives up does not wait for the read
	close(release)
	first.Wait()
	if _, err := r.Do(t.Context(), func(context.Context) (int, error) { reads.Add(1); return 0, nil }); err != nil {
		t.Error(err)
	}
	if n := reads.Load(); n > 3 {
		t.Errorf("52 callers caused %d reads", n)
	}
}

func TestErrorsAreReturned(t *testing.T) {
	var r Reads[string]
	bad := errors.New("no answer")
	if _, err := r.Do(t.Context(), func(context.Context) (string, error) { return "", bad }); !errors.Is(err, bad) {
		t.Errorf("%v", err)
	}
	if v, err := r.Do(t.Context(), func(context.Context) (string, error) { return "x", nil }); v != "x" || err != nil {
		t.Errorf("after an error: %q %v", v, err)
	}
}
