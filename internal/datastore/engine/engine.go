// Package engine owns the state of a datastore daemon. While the daemon leads, the engine takes
// transactions from many callers, makes them durable in groups through the log, and only then
// shows and answers them; it expires leases and compacts. While another daemon leads, it takes
// over what that one has committed. It takes and returns the messages of
// the etcd API, and knows nothing of connections, files or dqlite, nor of who leads.
//
// One goroutine writes at a time. While one statement runs, the next group forms in the queue, so there
// is no timer: one caller gets the latency of one statement, many share it. A caller who finds nobody
// writing or waiting writes by itself: to have another goroutine do it costs two changes of threads.
//
// What an engine shows is always what the log begins with: it takes over nothing that is not
// committed. So it may begin to lead by reading what the log holds beyond its state.
package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
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
	// ErrUnknown says that leadership ended before the outcome of the write was known.
	ErrUnknown = errors.New("leadership ended before the outcome of the write was known")
	// ErrNotLeading says that the engine does not lead: the write did not happen.
	ErrNotLeading = errors.New("this member does not lead")
)

// errFull is the error of what is not even tried without space.
var errFull = fmt.Errorf("%w: %w", ErrNotApplied, dslog.ErrNoSpace)

// Options of an Engine. Zero values mean the defaults.
type Options struct {
	Logger *slog.Logger
	Now    func() time.Time // time.Now

	// CompactAfter is how long the engine waits for a client to compact before it does so
	// itself, to the revision of CompactKeep ago. Defaults: 10 and 5 minutes.
	CompactAfter, CompactKeep time.Duration

	// Alone says that nobody else can have led since this engine began to lead. Only then a
	// write of unknown outcome may be recognized by its rows; another leader may have written
	// the same for somebody else. Nil means always.
	Alone func() bool

	// Confirm says, by a question to others that is asked after the call, whether this member
	// leads (see Engine.Confirm). Answers that wrote nothing wait for it. Nil means that nobody
	// else can lead.
	Confirm func(context.Context) error

	// Twice makes the engine apply every group twice. It is a fault of tests that check what
	// finds such faults.
	Twice bool

	// Compacted is called, and must not block, after a compaction.
	Compacted func()

	// Quota is the number of bytes (see state.State.Bytes) beyond which nothing is written that grows the
	// data; 0 or less: there is no limit. Member is the id in the alarm that is raised then.
	Quota  int64
	Member uint64

	// Full says that there is no space for more; it is asked often. Nothing is sent to the log
	// then: it would fail with an unknown outcome, and end this member's leadership.
	Full func() bool
}

// Engine is a running datastore. All methods may be called from any goroutine.
type Engine struct {
	opt Options
	hub *watch.Hub

	mu      sync.RWMutex
	st      *state.State // nil until there is data
	waiters []waiter     // by WaitRev
	alarms  map[dslog.Alarm]struct{}

	term      atomic.Pointer[term] // not nil while the engine leads
	rereading atomic.Bool
	releasing atomic.Bool
	epoch     atomic.Int64 // odd while the log is open and its end not read yet

	// Of who writes, see term.writing.
	log         dslog.Log
	dead        []int64 // ids of rows that nobody can reach
	sweep       bool    // rows that the last leader left may be dead as well
	lastCompact time.Time
	samples     []sample
	overQuota   bool // a request was refused, and the alarm is not raised yet

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

// term is one time of leadership.
type term struct {
	ctx     context.Context
	log     dslog.Log
	queue   chan *job
	waiting atomic.Int64  // jobs in the queue, or taken from it and not begun
	writing sync.Mutex    // held by who stages or uses the log; for good when the writer has ended
	done    chan struct{} // closed when the writer has ended; what is still queued was not applied
}

// write calls fn when nobody else writes.
func (t *term) write(fn func()) {
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

type waiter struct {
	rev     int64
	compact bool // until it is compacted, not committed
	done    chan struct{}
}

// job is one request to the writer: stage adds to a group, alone runs between groups.
type job struct {
	bytes int
	stage func(*state.State) error
	alone func(context.Context) error
	err   error
	epoch int64 // of the log when the answer was made
	wrote bool  // it tried to commit, or its group did: it did not come from the state alone
	done  chan struct{}
}

// New makes an engine without data, which neither leads nor follows.
func New(opt Options) *Engine {
	if opt.Now == nil {
		opt.Now = time.Now
	}
	if opt.CompactAfter == 0 {
		opt.CompactAfter = 10 * time.Minute
	}
	if opt.CompactKeep == 0 {
		opt.CompactKeep = 5 * time.Minute
	}
	if opt.Alone == nil {
		opt.Alone = func() bool { return true }
	}
	if opt.Confirm == nil {
		opt.Confirm = func(context.Context) error { return nil }
	}
	if opt.Compacted == nil {
		opt.Compacted = func() {}
	}
	if opt.Full == nil {
		opt.Full = func() bool { return false }
	}
	e := &Engine{opt: opt, alarms: map[dslog.Alarm]struct{}{}, wakeExpiry: make(chan struct{}, 1)}
	e.hub = watch.NewHub(e, 0)
	return e
}

// Lead makes the engine lead with a log that is open on the node that leads: it takes over
// what the log holds, calls started, and writes until ctx ends. It returns nil then, and an
// error when the log cannot be read. Apply and Load must not be called meanwhile.
func (e *Engine) Lead(ctx context.Context, l dslog.Log, started func()) error {
	e.log, e.dead, e.sweep = l, nil, false
	if err := e.takeOver(ctx); err != nil {
		return err
	}
	if err := e.readAlarms(ctx); err != nil {
		return fmt.Errorf("cannot read the alarms: %w", err)
	}
	now := e.opt.Now()
	e.lastCompact = now
	e.samples = []sample{{now, e.Rev()}}
	if err := e.measure(ctx); err != nil {
		return fmt.Errorf("cannot measure the database: %w", err)
	}
	e.epoch.Store(e.epoch.Load()&^1 + 2)
	e.rereading.Store(false)
	t := &term{ctx: ctx, log: l, queue: make(chan *job, 4096), done: make(chan struct{})}
	e.term.Store(t)
	started()
	e.run(ctx, t)
	t.writing.Lock() // nobody writes any more
	e.term.Store(nil)
	close(t.done)
	return nil
}

// takeOver brings the state to what the log holds, and starts the leases anew.
func (e *Engine) takeOver(ctx context.Context) error {
	if e.Loaded() {
		_, err := e.readTail(ctx)
		if err == nil {
			e.mu.Lock()
			e.st.RestartLeases(e.opt.Now())
			e.mu.Unlock()
			e.sweep = true
			return nil
		}
		if !errors.Is(err, errGap) {
			return err
		}
		e.opt.Logger.Info("this member has fallen behind the last compaction; reading all data again")
	}
	st, dead, err := load(ctx, e.log)
	if err != nil {
		return err
	}
	st.RestartLeases(e.opt.Now())
	e.dead = dead
	return e.Load(st)
}

// Confirm asks, by round, whether the others take this member for the leader, and then the own
// node whether it has led ever since the state was brought up to date. When it returns nil,
// every write that anybody acknowledged before the call is in the state. round must ask a
// majority of the voters after it was called. A nil round is right for a single voter.
func (e *Engine) Confirm(ctx context.Context, round func(context.Context) error) error {
	t, epoch := e.term.Load(), e.epoch.Load()
	if t == nil {
		return ErrNotLeading
	}
	if epoch&1 != 0 {
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
	if e.epoch.Load() != epoch || e.term.Load() != t {
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
	j := &job{done: make(chan struct{}), alone: func(ctx context.Context) error {
		e.rereading.Store(false)
		return e.broken(ctx, cause)
	}}
	if !t.put(j) {
		e.rereading.Store(false) // so many writes wait that one of them will fail
	}
}

// Loaded says whether there is data.
func (e *Engine) Loaded() bool {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.st != nil
}

// Leads says whether the engine leads and takes writes.
func (e *Engine) Leads() bool { return e.term.Load() != nil }

// Load replaces all data by a newer state, which the engine owns from then on. Watches that
// cannot be told every change between the two end as if compacted.
func (e *Engine) Load(st *state.State) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.st != nil && st.Rev() < e.st.Rev() {
		return fmt.Errorf("the data has revision %d, and this member had revision %d already", st.Rev(), e.st.Rev())
	}
	e.st = st
	e.hub.Rewind(st.Rev())
	e.reached(st.Rev())
	e.release(st.Keys()) // what reading them took
	return nil
}

// Apply takes over versions that the leader has committed: whole revisions in order. Those
// that the state has already are skipped.
func (e *Engine) Apply(versions []*state.Version) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, v := range versions {
		if v.KV.ModRevision <= e.st.Rev() {
			continue
		}
		if err := e.st.StageVersion(v); err != nil {
			e.st.Rollback()
			return err
		}
	}
	e.commit()
	return nil
}

// ApplyCompaction follows a compaction of the leader to a revision that the state has reached.
func (e *Engine) ApplyCompaction(rev int64) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if rev <= e.st.Compacted() {
		return nil
	}
	dead, err := e.st.Compact(rev) // the leader deletes the rows
	e.release(len(dead))
	e.reached(e.st.Rev())
	return err
}

// commit shows what is staged, in one step with the watchers. The caller holds the lock.
func (e *Engine) commit() {
	changes := e.st.Commit(e.opt.Now())
	rev := e.st.Rev()
	e.hub.Publish(changes, rev)
	e.reached(rev)
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
	if e.st == nil {
		return 0
	}
	return e.st.Rev()
}

// Compacted is the revision of the last compaction.
func (e *Engine) Compacted() int64 {
	e.mu.RLock()
	defer e.mu.RUnlock()
	if e.st == nil {
		return 0
	}
	return e.st.Compacted()
}

// Keys is the number of live keys.
func (e *Engine) Keys() int {
	e.mu.RLock()
	defer e.mu.RUnlock()
	if e.st == nil {
		return 0
	}
	return e.st.Keys()
}

// View calls fn with the state, which fn must not change nor keep. A group may be staged in it that
// is not committed yet, nor ever will be: fn uses what shows committed revisions only.
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
			e.write(t.ctx, []*job{j})
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

// settle gives the answer of a job that is done. One that has written nothing is a read of the
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
	if j.epoch&1 != 0 || e.epoch.Load() != j.epoch || e.term.Load() != t {
		return fmt.Errorf("%w: leadership started over", ErrNotLeading)
	}
	return j.err
}

// Txn evaluates a transaction and makes it durable. size is about its size in bytes. The
// response's headers have only the revision. A transaction whose compare failed waits for
// the writes before it as well: its answer may depend on them.
func (e *Engine) Txn(ctx context.Context, r *pb.TxnRequest, size int) (*pb.TxnResponse, error) {
	var resp *pb.TxnResponse
	cost := state.Cost(r)
	err := e.do(ctx, &job{bytes: size, stage: func(s *state.State) (err error) {
		if err := e.admit(cost); err != nil {
			return err
		}
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
		if err := e.admit(state.GrantCost); err != nil {
			return err
		}
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
		if err := e.admit(0); err != nil {
			return err
		}
		if _, ok := e.st.Lease(id); !ok {
			return state.ErrLeaseNotFound
		}
		return e.end(ctx, []int64{id})
	}})
}

// Renew starts the countdown of a lease anew.
func (e *Engine) Renew(id int64) (state.Lease, error) {
	if !e.Leads() {
		return state.Lease{}, ErrNotLeading
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	l, ok := e.st.RenewLease(id, e.opt.Now())
	if !ok {
		return l, state.ErrLeaseNotFound
	}
	return l, nil
}

// TimeToLive says how long a lease lives. Only the leader knows.
func (e *Engine) TimeToLive(r *pb.LeaseTimeToLiveRequest) *pb.LeaseTimeToLiveResponse {
	e.mu.RLock()
	defer e.mu.RUnlock()
	resp := &pb.LeaseTimeToLiveResponse{Header: &pb.ResponseHeader{Revision: e.st.Rev()}, ID: r.ID, TTL: -1}
	l, ok := e.st.Lease(r.ID)
	if !ok || l.Deadline.IsZero() {
		return resp
	}
	resp.GrantedTTL = l.TTL
	resp.TTL = max(int64(l.Deadline.Sub(e.opt.Now())/time.Second), 0)
	if r.Keys {
		for _, k := range e.st.LeaseKeys(r.ID) {
			resp.Keys = append(resp.Keys, []byte(k))
		}
	}
	return resp
}

// LeaseList gives all leases. Only the leader knows.
func (e *Engine) LeaseList() *pb.LeaseLeasesResponse {
	e.mu.RLock()
	defer e.mu.RUnlock()
	resp := &pb.LeaseLeasesResponse{Header: &pb.ResponseHeader{Revision: e.st.Rev()}}
	for _, id := range e.st.Leases() {
		if l, _ := e.st.Lease(id); !l.Deadline.IsZero() { // else it is staged
			resp.Leases = append(resp.Leases, &pb.LeaseStatus{ID: id})
		}
	}
	return resp
}

// Compact makes revisions below rev unreadable.
func (e *Engine) Compact(ctx context.Context, rev int64) error {
	return e.do(ctx, &job{alone: func(ctx context.Context) error {
		if err := e.admit(0); err != nil {
			return err
		}
		return e.compact(ctx, rev)
	}})
}

// run is the writer.
func (e *Engine) run(ctx context.Context, t *term) {
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
			t.write(func() {
				if (len(e.dead) > 0 || e.sweep) && !e.opt.Full() {
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
					t.write(func() { e.expire(ctx, expiry) })
					continue
				case <-e.wakeExpiry:
					t.write(func() { e.expire(ctx, expiry) })
					continue
				case <-minute.C:
					t.write(func() { e.everyMinute(ctx) })
					continue
				case <-idle:
					t.write(func() { e.bury(ctx) })
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
			before := e.epoch.Load()
			j.err = j.alone(ctx)
			j.epoch = e.epoch.Load()
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
		e.write(ctx, group)
		if groups++; groups%64 == 0 {
			// Nobody waits for these, but they must not starve under load either.
			e.bury(ctx)
			e.expire(ctx, expiry)
		}
		t.writing.Unlock()
	}
}

var closed = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// write stages a group, makes it durable, shows it and answers.
func (e *Engine) write(ctx context.Context, group []*job) {
	e.mu.Lock()
	for _, j := range group {
		j.epoch, j.err = e.epoch.Load(), j.stage(e.st)
	}
	e.mu.Unlock()
	again := e.st.Staged()
	writes := len(again)+len(e.st.StagedLeases()) > 0
	if err := e.flush(ctx); err != nil {
		writes = false
		for _, j := range group {
			if j.err == nil {
				j.err = err
			}
		}
	} else if e.opt.Twice {
		e.mu.Lock()
		for _, c := range again {
			if !c.Cur.Deleted() {
				_, _ = e.st.Stage(&pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{
					RequestPut: &pb.PutRequest{Key: c.Cur.KV.Key, Value: c.Cur.KV.Value, Lease: c.Cur.KV.Lease},
				}}}})
			}
		}
		e.mu.Unlock()
		_ = e.flush(ctx)
	}
	e.raise(ctx)
	for _, j := range group {
		j.wrote = writes
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
	if e.opt.Full() {
		e.mu.Lock()
		e.st.Rollback()
		e.mu.Unlock()
		return errFull
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
	err := e.log.Append(ctx, rows)
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
	e.commit()
}

// resolve finds out what became of an append that failed: it takes back what is staged,
// opens the log again, and takes over what it holds. It returns nil when that is the append.
func (e *Engine) resolve(ctx context.Context, rows []dslog.Row, cause error) error {
	e.mu.Lock()
	e.st.Rollback()
	e.mu.Unlock()
	alone := e.opt.Alone()
	e.opt.Logger.Warn("a write has an unknown outcome; reading the log again", "err", cause)
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
			if e.opt.Full() {
				return errFull // most likely the cause, and dqlite's errors do not tell
			}
			return fmt.Errorf("%w: %w", ErrNotApplied, cause)
		}
	}
	if !alone || !e.opt.Alone() {
		return ErrUnknown
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
	e.epoch.Store(e.epoch.Load() | 1)
	const pause, report = 100 * time.Millisecond, 10 * time.Second
	lastReport := time.Now()
	for {
		attempt, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := e.log.Reopen(attempt)
		cancel()
		if err == nil {
			return nil
		}
		if time.Since(lastReport) >= report {
			lastReport = time.Now()
			e.opt.Logger.Error("the log cannot be opened again, writes wait", "err", err)
		}
		select {
		case <-ctx.Done():
			return ErrUnknown
		case <-time.After(pause):
		}
	}
}

// catchUp takes over what the log holds beyond the state, and all of it by id.
func (e *Engine) catchUp(ctx context.Context) (map[int64]dslog.Row, error) {
	for {
		found, err := e.readTail(ctx)
		if err == nil {
			if !e.opt.Alone() {
				// Others may have led meanwhile, and renewed leases.
				e.mu.Lock()
				e.st.RestartLeases(e.opt.Now())
				e.mu.Unlock()
			}
			err = e.readAlarms(ctx)
		}
		if err == nil {
			e.epoch.Add(1)
			return found, nil
		}
		if errors.Is(err, errGap) {
			// Others have led for a long time. Leadership that begins anew reads everything.
			return nil, ErrUnknown
		}
		e.opt.Logger.Error("cannot read the end of the log, trying again", "err", err)
		if err := e.reopen(ctx); err != nil {
			return nil, err
		}
	}
}

// errGap says that rows beyond the state have been compacted away already.
var errGap = errors.New("the log has been compacted beyond this member's data")

// readTail takes over what the log holds beyond the state: versions, leases, compaction. It
// gives the rows by id.
func (e *Engine) readTail(ctx context.Context) (map[int64]dslog.Row, error) {
	var tail []dslog.Row
	compacted, err := e.log.Load(ctx, dslog.LastID(e.Rev()), func(r dslog.Row) error {
		tail = append(tail, r)
		return nil
	})
	if err != nil {
		return nil, err
	}
	leases, err := e.log.Leases(ctx)
	if err != nil {
		return nil, err
	}
	found := make(map[int64]dslog.Row, len(tail)+len(leases))
	e.mu.Lock()
	defer e.mu.Unlock()
	if compacted > e.st.Rev() {
		return nil, errGap
	}
	for _, r := range tail {
		if err := e.st.StageVersion(r.VersionOf()); err != nil {
			e.st.Rollback()
			return nil, fmt.Errorf("the log has been written by somebody else: %w", err)
		}
		found[r.ID] = r
	}
	kept := make(map[int64]bool, len(leases))
	for _, r := range leases {
		found[r.ID] = r
		id, ttl, _ := r.LeaseOf()
		kept[id] = true
		if err := e.st.StageGrant(id, ttl); err != nil && !errors.Is(err, state.ErrLeaseExists) {
			e.st.Rollback()
			return nil, err
		}
	}
	e.commit()
	for _, id := range e.st.Leases() {
		if !kept[id] {
			e.st.DropLease(id)
		}
	}
	if compacted > e.st.Compacted() {
		dead, err := e.st.Compact(compacted)
		if err != nil {
			return nil, err
		}
		e.dead = append(e.dead, ids(dead)...)
	}
	return found, nil
}
