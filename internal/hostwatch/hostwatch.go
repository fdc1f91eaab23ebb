// Package hostwatch calls the owners of state in the host's network when the kernel reports that
// somebody may have changed it, so that they put back what differs: a firewall that was flushed, a
// network manager that was restarted, a link that went down and up.
//
// It knows nothing of what the owners keep. Each owner has one Sync, which compares what is there with
// what it wants and writes only what differs; it is called at the start, after events that concern the
// owner, and every [Resync] for what the kernel does not announce. Nothing is polled in between.
package hostwatch

import (
	"cmp"
	"context"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"
)

// Resync is the longest time between two calls of an owner's Sync. Some changes have no event: bridge
// sysctls, rules of legacy iptables.
const Resync = 5 * time.Minute

const (
	// settle is how long a subsystem has to be quiet before an owner looks at it: whoever reloads a
	// firewall writes it in several transactions.
	settle = 200 * time.Millisecond
	// settleLimit bounds the wait when changes do not end.
	settleLimit = time.Second
	// contest is how soon after a repair the same one counts as a contest with somebody who undoes it.
	contest = 10 * time.Second
	// contestPause is the longest pause between two repairs in a contest.
	contestPause = 3 * time.Second
	// failurePause is the longest pause after which a failed Sync is repeated.
	failurePause = time.Minute
)

// Owner keeps some state in the host's network.
type Owner struct {
	Name string // for logs: "pod network"

	// Concerns reports whether a change may have touched the owner's state. It is called for every
	// event of the kernel and for [Lost], one after the other, and must be fast and not block; nil means none. What
	// it says of Lost has no effect: Sync is called. The owner's own writes are events, too: Sync then finds no difference.
	Concerns func(Change) bool

	// Sync compares the host with what the owner wants, writes what differs, and returns in words
	// what it changed, such as "route 10.1.2.0/24", for the log. After an error it is called again,
	// with growing pauses. Calls for one owner do not overlap. ctx ends with the registration.
	Sync func(ctx context.Context) (changed []string, err error)

	// Every is the longest time between two calls; 0 means [Resync].
	Every time.Duration
}

// Watcher distributes events of the network namespace in which the process runs. Its methods may be
// called from any goroutine.
type Watcher struct {
	log *slog.Logger

	mu     sync.Mutex
	owners map[*Registration]struct{}
}

// New returns a watcher without owners; it works while [Watcher.Run] does.
func New(log *slog.Logger) *Watcher {
	return &Watcher{log: log, owners: map[*Registration]struct{}{}}
}

// Registration is an owner that is called. Close ends it.
type Registration struct {
	w       *Watcher
	owner   Owner
	log     *slog.Logger
	wake    chan struct{}
	cancel  context.CancelFunc
	stopped chan struct{}
}

// Register adds an owner, whose Sync is called at once and from then on until the registration is closed or
// ctx ends. It may be called before Run and while it runs; without Run only events are missing.
func (w *Watcher) Register(ctx context.Context, o Owner) *Registration {
	ctx, cancel := context.WithCancel(ctx)
	r := &Registration{
		w: w, owner: o, log: w.log.With("owner", o.Name),
		wake: make(chan struct{}, 1), cancel: cancel, stopped: make(chan struct{}),
	}
	w.mu.Lock()
	w.owners[r] = struct{}{}
	w.mu.Unlock()
	go r.keep(ctx)
	return r
}

// Trigger has Sync called soon, as an event does: for an owner whose wishes changed.
func (r *Registration) Trigger() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Close ends the registration and waits until Sync is not running any more. What the owner put on the
// host stays.
func (r *Registration) Close() {
	r.cancel()
	<-r.stopped
}

// keep calls Sync until ctx ends.
func (r *Registration) keep(ctx context.Context) {
	defer close(r.stopped)
	defer func() {
		r.w.mu.Lock()
		delete(r.w.owners, r)
		r.w.mu.Unlock()
	}()
	var repaired time.Time           // the last repair but for the first Sync
	var pause, failure time.Duration // between repairs in a contest; after a failure
	before, last := "", ""           // what was put back, and the error that was logged
	for first := true; ; first = false {
		changed, err := r.owner.Sync(ctx)
		if ctx.Err() != nil {
			return
		}
		if len(changed) > 0 && !first {
			what := strings.Join(changed, ", ")
			r.log.Info("somebody changed the host's network; it was put back", "changed", what)
			if time.Since(repaired) < contest+pause && what == before {
				pause = min(max(2*pause, settle), contestPause)
			} else {
				pause = 0
			}
			repaired, before = time.Now(), what
		}
		next := cmp.Or(r.owner.Every, Resync)
		next -= rand.N(next / 10)
		if err == nil {
			failure, last = 0, ""
		} else {
			failure = min(max(2*failure, time.Second), failurePause)
			next = failure
			if err.Error() != last {
				r.log.Warn("the host's network cannot be put in order", "err", err, "retry_in", next)
				last = err.Error()
			}
		}
		if !r.wait(ctx, next, pause) {
			return
		}
	}
}

// wait returns after a change that concerns the owner, when it has settled, or after next; false when ctx ends.
func (r *Registration) wait(ctx context.Context, next, pause time.Duration) bool {
	timer := time.NewTimer(next)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	case <-r.wake:
	}
	if pause > 0 {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(pause):
		}
	}
	limit := time.NewTimer(settleLimit)
	defer limit.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-r.wake:
		case <-limit.C:
			return true
		case <-time.After(settle):
			return true
		}
	}
}

// distribute wakes the owners that a change concerns.
func (w *Watcher) distribute(c Change) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for r := range w.owners {
		if r.owner.Concerns != nil && r.owner.Concerns(c) || c.Kind == Lost {
			r.Trigger()
		}
	}
}
