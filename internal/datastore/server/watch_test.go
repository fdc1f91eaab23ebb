package server

import (
	"context"
	"sync/atomic"
	"testing"
	"time"
)

// leaders is a Backend of which only HasLeader can be asked.
type leaders struct {
	Backend
	has atomic.Bool
}

func (l *leaders) HasLeader() bool { return l.has.Load() }

// TestBeat holds that all streams hear of progress, and of a lost leader, each time, and that a stream that comes
// when the leader is lost already has as long as any.
func TestBeat(t *testing.T) {
	backend := &leaders{}
	backend.has.Store(true)
	s := New(Options{Backend: backend, ProgressInterval: time.Millisecond, NoLeaderAfter: 30 * time.Millisecond})
	done := make(chan struct{})
	go func() { defer close(done); s.beat() }()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	await := func(c <-chan struct{}) {
		t.Helper()
		select {
		case <-c:
		case <-ctx.Done():
			t.Fatal("no signal")
		}
	}
	lost, also := s.leaderless.wait(), s.leaderless.wait()
	for range 100 {
		a, b := s.progress.wait(), s.progress.wait()
		await(a)
		await(b)
	}
	select {
	case <-lost:
		t.Fatal("the leader is there, and streams were told that it is not")
	default:
	}
	backend.has.Store(false)
	await(lost)
	await(also)
	await(s.leaderless.wait())
	s.Close()
	await(done)
}
