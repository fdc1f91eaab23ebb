// Package limit slows down who guesses. A wrong token is answered late, later each time, and
// only so many answers of one source wait at once; what is right is answered at once. Tokens
// themselves are never locked: a stranger must not be able to use up somebody else's.
package limit

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"microk8s/internal/connlimit"
)

// Defaults of a Limiter.
const (
	First   = 100 * time.Millisecond // the first wrong answer is this late, each further one twice as much
	Longest = 5 * time.Second        // up to this
	Forget  = time.Minute            // a source that was quiet for this long starts over
	Waiting = 16                     // answers of one source that may be late at the same time
	sources = 4096                   // that are remembered
)

// Limiter counts failures by source. Its zero value is ready to use.
type Limiter struct {
	First, Longest, Forget time.Duration // zero means the default
	Now                    func() time.Time
	// Sleep waits; nil means for real. Tests count.
	Sleep func(ctx context.Context, d time.Duration)

	mu      sync.Mutex
	sources map[netip.Addr]*source
}

type source struct {
	failures int
	last     time.Time
	waiting  int
}

func or(d, def time.Duration) time.Duration {
	if d == 0 {
		return def
	}
	return d
}

func (l *Limiter) now() time.Time {
	if l.Now != nil {
		return l.Now()
	}
	return time.Now()
}

// Busy reports whether so many wrong answers to this source are waiting that no more are looked at.
func (l *Limiter) Busy(from netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.sources[connlimit.Source(from)]
	return s != nil && s.waiting >= Waiting
}

// Failed notes a wrong token and waits before it is answered.
func (l *Limiter) Failed(ctx context.Context, from netip.Addr) {
	s, wait := l.note(connlimit.Source(from))
	defer func() {
		l.mu.Lock()
		s.waiting--
		l.mu.Unlock()
	}()
	if l.Sleep != nil {
		l.Sleep(ctx, wait)
		return
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

func (l *Limiter) note(from netip.Addr) (*source, time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if l.sources == nil {
		l.sources = map[netip.Addr]*source{}
	}
	s := l.sources[from]
	if s == nil {
		l.makeRoom()
		s = &source{}
		l.sources[from] = s
	}
	if now.Sub(s.last) > or(l.Forget, Forget) {
		s.failures = 0
	}
	s.failures++
	s.waiting++
	s.last = now
	longest := or(l.Longest, Longest)
	wait := or(l.First, First)
	for range s.failures - 1 {
		if wait *= 2; wait >= longest {
			return s, longest
		}
	}
	return s, wait
}

// makeRoom forgets the quietest of a few sources. Looking at all of them would make work for
// who sends from everywhere.
func (l *Limiter) makeRoom() {
	if len(l.sources) < sources {
		return
	}
	const few = 8
	var oldest netip.Addr
	looked := 0
	for a, s := range l.sources { // in no particular order
		if s.waiting == 0 && (!oldest.IsValid() || s.last.Before(l.sources[oldest].last)) {
			oldest = a
		}
		if looked++; looked >= few && oldest.IsValid() {
			break
		}
	}
	delete(l.sources, oldest)
}
