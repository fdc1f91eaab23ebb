// Package engine runs the datastore: it owns the state, takes transactions from many callers,
// makes them durable in groups through the log, and only then shows and answers them. It
// expires leases and compacts. It knows nothing of gRPC, files or dqlite.
//
// One goroutine writes. While one statement runs, the next group forms in the queue, so there
// is no timer: one caller gets the latency of one statement, many share it.
package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	dslog "microk8s/internal/datastore/log"
	"microk8s/internal/datastore/state"
	"microk8s/internal/datastore/watch"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// Limits of one group of transactions. Larger groups gain nothing (one statement of 128 rows
// costs little more than one of 32) and make the first caller wait for the last.
const (
	groupJobs  = 256
	groupBytes = 1 << 20
)

// Errors of writes that did not happen or may not have.
var (
	// ErrNotApplied says that the write failed and is known not to have happened.
	ErrNotApplied = errors.New("the write was not applied")
	// ErrStopped says that the engine ended before it answered: the outcome is unknown.
	ErrStopped = errors.New("the datastore is shutting down")
)

// Options of an Engine. Zero values mean the defaults.
type Options struct {
	Log    dslog.Log
	Logger *slog.Logger
	Now    func() time.Time // time.Now

	// CompactAfter is how long the engine waits for a client to compact before it does so
	// itself, to the revision of CompactKeep ago. Defaults: 10 and 5 minutes.
	CompactAfter, CompactKeep time.Duration
}

// Engine is a running datastore. All methods may be called from any goroutine.
type Engine struct {
	opt Options
	hub *watch.Hub

	mu sync.RWMutex
	st *state.State

	queue chan *job
	done  chan struct{} // closed when the writer has ended
	stop  context.CancelFunc

	dead        []int64 // ids of rows that nobody can reach
	lastCompact time.Time
	samples     []sample

	size, sizeInUse atomic.Int64 // of the database
	wakeExpiry      chan struct{}

	stats Stats
}

type sample struct {
	at  time.Time
	rev int64
}

// Stats are counters since the start.
type Stats struct {
	Groups, Rows, Bytes, Failures atomic.Int64
	GroupSeconds                  atomic.Int64 // nanoseconds spent in appends
}

// Stats gives the counters.
func (e *Engine) Stats() *Stats { return &e.stats }

// job is one request to the writer: stage adds to a group, alone runs between groups.
type job struct {
	bytes int
	stage func(*state.State) error
	alone func(context.Context) error
	err   error
	done  chan struct{}
}

// Open loads the state from the log and starts the writer. The engine works until Close.
func Open(ctx context.Context, opt Options) (*Engine, error) {
	if opt.Now == nil {
		opt.Now = time.Now
	}
	if opt.CompactAfter == 0 {
		opt.CompactAfter = 10 * time.Minute
	}
	if opt.CompactKeep == 0 {
		opt.CompactKeep = 5 * time.Minute
	}
	e := &Engine{
		opt:        opt,
		queue:      make(chan *job, 4096),
		done:       make(chan struct{}),
		wakeExpiry: make(chan struct{}, 1),
	}
	st, dead, err := load(ctx, opt.Log)
	if err != nil {
		return nil, err
	}
	now := opt.Now()
	st.RestartLeases(now)
	e.st, e.dead = st, dead
	e.hub = watch.NewHub(e, st.Rev())
	e.lastCompact = now
	e.samples = []sample{{now, st.Rev()}}
	if err := e.measure(ctx); err != nil {
		return nil, fmt.Errorf("cannot measure the database: %w", err)
	}
	run, cancel := context.WithCancel(context.Background())
	e.stop = cancel
	go e.run(run)
	return e, nil
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

// Close stops the writer. Waiting writes fail with ErrStopped. It does not close the log.
func (e *Engine) Close() {
	e.stop()
	<-e.done
}

// Done is closed when the writer has ended.
func (e *Engine) Done() <-chan struct{} { return e.done }

// Hub is where watches are made.
func (e *Engine) Hub() *watch.Hub { return e.hub }

// History is part of watch.Source.
func (e *Engine) History(rev int64) ([]state.Change, error) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.st.History(rev)
}

// Rev is the committed revision.
func (e *Engine) Rev() int64 {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.st.Rev()
}

// Compacted is the revision of the last compaction.
func (e *Engine) Compacted() int64 {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.st.Compacted()
}

// Keys is the number of live keys.
func (e *Engine) Keys() int {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.st.Keys()
}

// View calls fn with the committed state, which fn must not change nor keep.
func (e *Engine) View(fn func(*state.State) error) error {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return fn(e.st)
}

// Size is the size of the database in bytes, and how much of it is in use; at most a few
// seconds old while there are writes.
func (e *Engine) Size() (total, used int64) { return e.size.Load(), e.sizeInUse.Load() }

// do gives a job to the writer and waits for its answer. When ctx ends first, the job may
// still be done.
func (e *Engine) do(ctx context.Context, j *job) error {
	j.done = make(chan struct{})
	select {
	case e.queue <- j:
	case <-ctx.Done():
		return ctx.Err()
	case <-e.done:
		return ErrStopped
	}
	select {
	case <-j.done:
		return j.err
	case <-ctx.Done():
		return ctx.Err()
	case <-e.done:
		select {
		case <-j.done:
			return j.err
		default:
			return ErrStopped
		}
	}
}

// Txn evaluates a transaction and makes it durable. size is about its size in bytes. The
// response's headers have only the revision. A transaction whose compare failed waits for
// the writes before it as well: its answer may depend on them.
func (e *Engine) Txn(ctx context.Context, r *pb.TxnRequest, size int) (*pb.TxnResponse, error) {
	var resp *pb.TxnResponse
	err := e.do(ctx, &job{bytes: size, stage: func(s *state.State) (err error) {
		resp, err = s.Stage(r)
		return err
	}})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// Grant makes a lease of ttl seconds. An id of 0 lets the engine choose.
func (e *Engine) Grant(ctx context.Context, id, ttl int64) (int64, error) {
	err := e.do(ctx, &job{stage: func(s *state.State) error {
		for id == 0 {
			id = rand.Int64()
			if _, taken := s.Lease(id); taken {
				id = 0
			}
		}
		return s.StageGrant(id, ttl)
	}})
	return id, err
}

// Revoke ends a lease: its keys are deleted.
func (e *Engine) Revoke(ctx context.Context, id int64) error {
	return e.do(ctx, &job{alone: func(ctx context.Context) error {
		if _, ok := e.st.Lease(id); !ok {
			return state.ErrLeaseNotFound
		}
		return e.end(ctx, []int64{id})
	}})
}

// Renew starts the countdown of a lease anew.
func (e *Engine) Renew(id int64) (state.Lease, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	l, ok := e.st.RenewLease(id, e.opt.Now())
	if !ok {
		return l, state.ErrLeaseNotFound
	}
	return l, nil
}

// Now is the engine's time, which deadlines of leases refer to.
func (e *Engine) Now() time.Time { return e.opt.Now() }

// Compact makes revisions below rev unreadable.
func (e *Engine) Compact(ctx context.Context, rev int64) error {
	return e.do(ctx, &job{alone: func(ctx context.Context) error { return e.compact(ctx, rev) }})
}

// run is the writer.
func (e *Engine) run(ctx context.Context) {
	defer close(e.done)
	expiry := time.NewTimer(0)
	defer expiry.Stop()
	minute := time.NewTicker(min(time.Minute, e.opt.CompactKeep))
	defer minute.Stop()
	var held *job // taken from the queue, but not fit for the last group
	groups := 0
	for {
		j := held
		held = nil
		if j == nil {
			var idle chan struct{}
			if len(e.dead) > 0 {
				idle = closed // nothing else to do: delete dead rows
			}
			select {
			case j = <-e.queue:
			default:
				select {
				case <-ctx.Done():
					return
				case j = <-e.queue:
				case <-expiry.C:
					e.expire(ctx, expiry)
					continue
				case <-e.wakeExpiry:
					e.expire(ctx, expiry)
					continue
				case <-minute.C:
					e.everyMinute(ctx)
					continue
				case <-idle:
					e.bury(ctx)
					continue
				}
			}
		}
		if ctx.Err() != nil {
			return
		}
		if j.alone != nil {
			j.err = j.alone(ctx)
			close(j.done)
			continue
		}
		group, bytes := append(make([]*job, 0, 16), j), j.bytes
	fill:
		for len(group) < groupJobs && bytes < groupBytes {
			select {
			case j := <-e.queue:
				if j.alone != nil {
					held = j
					break fill
				}
				group, bytes = append(group, j), bytes+j.bytes
			default:
				break fill
			}
		}
		e.write(ctx, group)
		if groups++; groups%64 == 0 {
			// Nobody waits for these, but they must not starve under load either.
			e.bury(ctx)
			e.expire(ctx, expiry)
		}
	}
}

var closed = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// write stages a group, makes it durable, shows it and answers.
func (e *Engine) write(ctx context.Context, group []*job) {
	e.mu.Lock()
	for _, j := range group {
		j.err = j.stage(e.st)
	}
	e.mu.Unlock()
	if err := e.flush(ctx); err != nil {
		for _, j := range group {
			if j.err == nil {
				j.err = err
			}
		}
	}
	for _, j := range group {
		close(j.done)
	}
}

// flush makes everything staged durable and visible. After an error nothing is staged any
// more, and the state is what the log holds.
func (e *Engine) flush(ctx context.Context) error {
	changes, leases := e.st.Staged(), e.st.StagedLeases()
	if len(changes) == 0 && len(leases) == 0 {
		return nil
	}
	rows := make([]dslog.Row, 0, len(changes)+len(leases))
	size := 0
	for _, c := range changes {
		rows = append(rows, dslog.VersionRow(c.Cur))
		size += len(c.Cur.KV.Key) + len(c.Cur.KV.Value)
	}
	for _, id := range leases {
		l, _ := e.st.Lease(id)
		rows = append(rows, dslog.LeaseRow(id, l.TTL))
	}
	start := time.Now()
	err := e.opt.Log.Append(ctx, rows)
	e.stats.GroupSeconds.Add(int64(time.Since(start)))
	if err != nil {
		e.stats.Failures.Add(1)
		return e.resolve(ctx, rows, err)
	}
	e.stats.Groups.Add(1)
	e.stats.Rows.Add(int64(len(rows)))
	e.stats.Bytes.Add(int64(size))
	e.publish()
	if len(leases) > 0 {
		select {
		case e.wakeExpiry <- struct{}{}:
		default:
		}
	}
	return nil
}

// publish commits what is staged and tells the watchers, in one step.
func (e *Engine) publish() {
	e.mu.Lock()
	defer e.mu.Unlock()
	changes := e.st.Commit(e.opt.Now())
	e.hub.Publish(changes, e.st.Rev())
}

// resolve finds out what became of an append that failed: it takes back what is staged,
// opens the log again, and takes over what it holds. It returns nil when that is the append.
func (e *Engine) resolve(ctx context.Context, rows []dslog.Row, cause error) error {
	e.mu.Lock()
	e.st.Rollback()
	e.mu.Unlock()
	e.opt.Logger.Warn("a write has an unknown outcome; reading the log again", "error", cause)
	if err := e.reopen(ctx); err != nil {
		return err
	}
	found, err := e.catchUp(ctx)
	if err != nil {
		return err
	}
	for _, r := range rows {
		if f, ok := found[r.ID]; !ok || !sameRow(f, r) {
			e.opt.Logger.Warn("the write was not applied", "revision", e.Rev())
			return fmt.Errorf("%w: %w", ErrNotApplied, cause)
		}
	}
	e.opt.Logger.Info("the write was applied", "revision", e.Rev())
	return nil
}

func sameRow(a, b dslog.Row) bool {
	return bytes.Equal(a.Key, b.Key) && bytes.Equal(a.Value, b.Value) &&
		a.Create == b.Create && a.Version == b.Version && a.Lease == b.Lease
}

// reopen tries until the log is open again; that takes as long as the node does not lead.
func (e *Engine) reopen(ctx context.Context) error {
	const pause, report = 100 * time.Millisecond, 10 * time.Second
	lastReport := time.Now()
	for {
		attempt, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := e.opt.Log.Reopen(attempt)
		cancel()
		if err == nil {
			return nil
		}
		if time.Since(lastReport) >= report {
			lastReport = time.Now()
			e.opt.Logger.Error("the log cannot be opened again, writes wait", "error", err)
		}
		select {
		case <-ctx.Done():
			return ErrStopped
		case <-time.After(pause):
		}
	}
}

// catchUp takes over what the log holds beyond the state, and all of it by id.
func (e *Engine) catchUp(ctx context.Context) (map[int64]dslog.Row, error) {
	for {
		found, err := e.readTail(ctx)
		if err == nil {
			return found, nil
		}
		e.opt.Logger.Error("cannot read the end of the log, trying again", "error", err)
		if err := e.reopen(ctx); err != nil {
			return nil, err
		}
	}
}

func (e *Engine) readTail(ctx context.Context) (map[int64]dslog.Row, error) {
	var tail []dslog.Row
	_, err := e.opt.Log.Load(ctx, dslog.LastID(e.Rev()), func(r dslog.Row) error {
		tail = append(tail, r)
		return nil
	})
	if err != nil {
		return nil, err
	}
	leases, err := e.opt.Log.Leases(ctx)
	if err != nil {
		return nil, err
	}
	found := make(map[int64]dslog.Row, len(tail)+len(leases))
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, r := range tail {
		if err := e.st.StageVersion(r.VersionOf()); err != nil {
			e.st.Rollback()
			return nil, fmt.Errorf("the log has been written by somebody else: %w", err)
		}
		found[r.ID] = r
	}
	for _, r := range leases {
		found[r.ID] = r
		id, ttl, _ := r.LeaseOf()
		if err := e.st.StageGrant(id, ttl); err != nil && !errors.Is(err, state.ErrLeaseExists) {
			return nil, err
		}
	}
	changes := e.st.Commit(e.opt.Now())
	e.hub.Publish(changes, e.st.Rev())
	return found, nil
}
