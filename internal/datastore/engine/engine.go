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

	// Compacted is called, and must not block, after a compaction.
	Compacted func()

	// Quota is the number of bytes (see state.State.Bytes) beyond which nothing is written that grows the
	// data; 0 or less: there is no limit. Member is the id in the alarm that is raised then.
	Quota  int64
	Member uint64

	// Trim returns memory to the system that the log does not use. It may take a while, and is called where
	// nobody waits, after something that needed much.
	Trim func()

	// Full says that there is no space for more; it is asked often. Nothing is sent to the log
	// then: it would fail with an unknown outcome, and end this member's leadership.
	Full func() bool
}

// Engine is a running datastore. All methods may be called from any goroutine.
type Engine struct {
	opt Options
	hub *watch.Hub

	mu      sync.RWMutex // guards what follows up to the empty line; who writes reads it without
	st      *state.State // nil until there is data
	waiters []waiter     // by WaitRev
	alarms  map[dslog.Alarm]struct{}

	term      atomic.Pointer[term] // not nil while the engine leads
	rereading atomic.Bool
	releasing atomic.Bool
	epoch     epoch

	size, sizeInUse atomic.Int64 // of the database
	wakeExpiry      chan struct{}

	stats Stats
}

// Stats are counters since the start.
type Stats struct {
	Groups, Rows, Bytes, Failures atomic.Int64
	GroupSeconds                  atomic.Int64 // nanoseconds spent in appends
}

// Stats returns the counters.
func (e *Engine) Stats() *Stats { return &e.stats }

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
	if opt.Trim == nil {
		opt.Trim = func() {}
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

// Loaded reports whether there is data.
func (e *Engine) Loaded() bool {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.st != nil
}

// Leads reports whether the engine leads and takes writes.
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

// Txn evaluates a transaction and makes it durable. size is about its size in bytes. The
// response's headers have only the revision. A transaction whose compare failed waits for
// the writes before it as well: its answer may depend on them.
func (e *Engine) Txn(ctx context.Context, r *pb.TxnRequest, size int) (*pb.TxnResponse, error) {
	var resp *pb.TxnResponse
	cost := state.Cost(r)
	err := e.do(ctx, &job{bytes: size, stage: func(t *term) (err error) {
		if err := t.admit(cost); err != nil {
			return err
		}
		resp, err = t.st.Stage(r)
		return err
	}})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// Grant makes a lease of ttl seconds. An id of 0 lets the engine choose.
func (e *Engine) Grant(ctx context.Context, id, ttl int64) (int64, error) {
	err := e.do(ctx, &job{stage: func(t *term) error {
		if err := t.admit(state.GrantCost); err != nil {
			return err
		}
		for id == 0 {
			id = rand.Int64()
			if _, taken := t.st.Lease(id); taken {
				id = 0
			}
		}
		return t.st.StageGrant(id, ttl)
	}})
	return id, err
}

// Revoke ends a lease: its keys are deleted.
func (e *Engine) Revoke(ctx context.Context, id int64) error {
	return e.do(ctx, &job{alone: func(ctx context.Context, t *term) error {
		if err := t.admit(0); err != nil {
			return err
		}
		if _, ok := t.st.Lease(id); !ok {
			return state.ErrLeaseNotFound
		}
		return t.end(ctx, []int64{id})
	}})
}

// Renew restarts the countdown of a lease.
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
	return e.do(ctx, &job{alone: func(ctx context.Context, t *term) error {
		if err := t.admit(0); err != nil {
			return err
		}
		return t.compact(ctx, rev)
	}})
}
