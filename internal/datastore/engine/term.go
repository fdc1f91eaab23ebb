package engine

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	dslog "microk8s/internal/datastore/log"
)

type sample struct {
	at  time.Time
	rev int64
}

// term is one time of leadership.
type term struct {
	*Engine
	ctx     context.Context
	log     dslog.Log // Check may be called at any time
	queue   chan *job
	waiting atomic.Int64  // jobs in the queue, or taken from it and not begun
	done    chan struct{} // closed when the writer has ended; what is still queued was not applied

	writing     sync.Mutex // held by who stages or uses the log; for good when the writer has ended
	dead        []int64    // ids of rows that nobody can reach
	buried      int        // of them, deleted since there were none
	sweep       bool       // rows that the last leader left may be dead as well
	lastCompact time.Time
	samples     []sample
	overQuota   bool // a request was refused, and the alarm is not raised yet
}

// epoch tells whether the log was open, and its end read, all the time between two moments.
type epoch struct{ n atomic.Int64 } // odd while that is not so

// begin starts a new epoch, in which it is so.
func (p *epoch) begin() { p.n.Store(p.n.Load()&^1 + 2) }

// end ends the epoch: the log is opened again.
func (p *epoch) end() { p.n.Store(p.n.Load() | 1) }

// now is a moment.
func (p *epoch) now() int64 { return p.n.Load() }

// since reports whether it has been so since a moment.
func (p *epoch) since(moment int64) bool { return moment&1 == 0 && p.n.Load() == moment }

// exclusive calls fn when nobody else writes.
func (t *term) exclusive(fn func()) {
	t.writing.Lock()
	defer t.writing.Unlock()
	fn()
}

// put queues a job for the writer; false means that there is no place.
func (t *term) put(j *job) bool {
	t.waiting.Add(1)
	select {
	case t.queue <- j:
		return true
	default:
		t.waiting.Add(-1)
		return false
	}
}

// Lead makes the engine lead with a log that is open on the node that leads: it takes over
// what the log holds, calls started, and writes until ctx ends. It returns nil then, and an
// error when the log cannot be read. Apply and Load must not be called meanwhile.
func (e *Engine) Lead(ctx context.Context, l dslog.Log, started func()) error {
	t := &term{Engine: e, ctx: ctx, log: l, queue: make(chan *job, 4096), done: make(chan struct{})}
	if err := t.takeOver(ctx); err != nil {
		return err
	}
	if err := t.readAlarms(ctx); err != nil {
		return fmt.Errorf("cannot read the alarms: %w", err)
	}
	now := e.opt.Now()
	t.lastCompact = now
	t.samples = []sample{{now, e.Rev()}}
	if err := t.measure(ctx); err != nil {
		return fmt.Errorf("cannot measure the database: %w", err)
	}
	e.epoch.begin()
	e.rereading.Store(false)
	e.term.Store(t)
	started()
	t.run(ctx)
	t.writing.Lock() // nobody writes any more
	e.term.Store(nil)
	close(t.done)
	return nil
}

// Confirm asks, by round, whether the others take this member for the leader, and then the local
// node whether it has led ever since the state was brought up to date. When it returns nil,
// every write that anybody acknowledged before the call is in the state. round must ask a
// majority of the voters after it was called. A nil round is right for a single voter.
func (e *Engine) Confirm(ctx context.Context, round func(context.Context) error) error {
	t, moment := e.term.Load(), e.epoch.now()
	if t == nil {
		return ErrNotLeading
	}
	if !e.epoch.since(moment) {
		return fmt.Errorf("%w: the log is being read again", ErrNotLeading)
	}
	if round == nil {
		return nil
	}
	if err := round(ctx); err != nil {
		return err
	}
	// Not before the round: the node may have lost leadership and won it again until then.
	if err := t.log.Check(); err != nil {
		e.reread(t, err)
		return err
	}
	if !e.epoch.since(moment) || e.term.Load() != t {
		return fmt.Errorf("%w: leadership started over", ErrNotLeading)
	}
	return nil
}

// reread makes the writer open the log again after a failed check: if the node leads, or leads
// again, reads go on after that.
func (e *Engine) reread(t *term, cause error) {
	if !e.rereading.CompareAndSwap(false, true) {
		return
	}
	j := &job{done: make(chan struct{}), alone: func(ctx context.Context, t *term) error {
		e.rereading.Store(false)
		return t.broken(ctx, cause)
	}}
	if !t.put(j) {
		e.rereading.Store(false) // so many writes wait that one of them will fail
	}
}

// run is the writer.
func (t *term) run(ctx context.Context) {
	expiry := time.NewTimer(0)
	defer expiry.Stop()
	minute := time.NewTicker(min(time.Minute, t.opt.CompactKeep))
	defer minute.Stop()
	var held *job // taken from the queue, but not fit for the last group
	groups := 0
	for {
		j := held
		held = nil
		if j == nil {
			var idle chan struct{}
			t.exclusive(func() {
				if (len(t.dead) > 0 || t.sweep) && !t.opt.Full() {
					idle = closed // nothing else to do: delete dead rows
				}
			})
			select {
			case j = <-t.queue:
			default:
				select {
				case <-ctx.Done():
					return
				case j = <-t.queue:
				case <-expiry.C:
					t.exclusive(func() { t.expire(ctx, expiry) })
					continue
				case <-t.wakeExpiry:
					t.exclusive(func() { t.expire(ctx, expiry) })
					continue
				case <-minute.C:
					t.exclusive(func() { t.everyMinute(ctx) })
					continue
				case <-idle:
					t.exclusive(func() { t.bury(ctx) })
					continue
				}
			}
		}
		if ctx.Err() != nil {
			j.err = ErrNotLeading
			close(j.done)
			return
		}
		t.writing.Lock()
		if j.alone != nil {
			t.waiting.Add(-1)
			before := t.epoch.now()
			j.err = j.alone(ctx, t)
			j.epoch = t.epoch.now()
			j.wrote = j.err == nil || j.epoch != before // else the error is an answer from the state
			t.writing.Unlock()
			close(j.done)
			continue
		}
		group, bytes := append(make([]*job, 0, 16), j), j.bytes
	fill:
		for len(group) < groupJobs && bytes < groupBytes {
			select {
			case j := <-t.queue:
				if j.alone != nil {
					held = j
					break fill
				}
				group, bytes = append(group, j), bytes+j.bytes
			default:
				break fill
			}
		}
		t.waiting.Add(-int64(len(group)))
		t.commitGroup(ctx, group)
		if groups++; groups%64 == 0 {
			// Nobody waits for these, but they must not starve under load either.
			t.bury(ctx)
			t.expire(ctx, expiry)
		}
		t.writing.Unlock()
	}
}

var closed = func() chan struct{} { c := make(chan struct{}); close(c); return c }()
