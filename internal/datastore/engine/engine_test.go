package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sort"
	"sync"
	"testing"
	"time"

	dslog "microk8s/internal/datastore/log"
	"microk8s/internal/datastore/state"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// memory is a log with faults: what it loses is only what was not acknowledged.
type memory struct {
	mu        sync.Mutex
	rows      map[int64]dslog.Row
	compacted int64
	alarms    map[dslog.Alarm]bool
	closed    bool
	reopens   int
	// fault decides what becomes of an append: applied or not, and the error.
	fault func(rows []dslog.Row) (apply bool, err error)
}

func (m *memory) usable() error {
	if m.closed {
		return errors.New("used after an error")
	}
	return nil
}

func (m *memory) Append(_ context.Context, rows []dslog.Row) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.usable(); err != nil {
		return err
	}
	apply, err := true, error(nil)
	if m.fault != nil {
		apply, err = m.fault(rows)
	}
	if apply {
		for _, r := range rows {
			m.rows[r.ID] = r
		}
	}
	m.closed = err != nil
	return err
}

func (m *memory) Load(_ context.Context, after int64, fn func(dslog.Row) error) (int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var ids []int64
	for id := range m.rows {
		if id > after {
			ids = append(ids, id)
		}
	}
	sort.Slice(ids, func(i, j int) bool { return ids[i] < ids[j] })
	for _, id := range ids {
		if err := fn(m.rows[id]); err != nil {
			return 0, err
		}
	}
	return m.compacted, m.usable()
}

func (m *memory) Leases(context.Context) (rows []dslog.Row, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for id, r := range m.rows {
		if id < 0 {
			rows = append(rows, r)
		}
	}
	return rows, m.usable()
}

func (m *memory) SetCompacted(_ context.Context, rev int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.compacted = rev
	return m.usable()
}

func (m *memory) Alarms(context.Context) ([]dslog.Alarm, error) {
	return slices.Collect(maps.Keys(m.alarms)), m.usable()
}

func (m *memory) SetAlarm(_ context.Context, a dslog.Alarm, on bool) error {
	if m.alarms == nil {
		m.alarms = map[dslog.Alarm]bool{}
	}
	m.alarms[a] = true
	if !on {
		delete(m.alarms, a)
	}
	return m.usable()
}

func (m *memory) Delete(_ context.Context, ids []int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, id := range ids {
		delete(m.rows, id)
	}
	return m.usable()
}

func (m *memory) Size(context.Context) (int64, int64, error) { return 1, 1, m.usable() }

func (m *memory) Reopen(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = false
	m.reopens++
	return nil
}

func (m *memory) Close() error { return nil }

func (m *memory) IDs(_ context.Context, upTo int64, fn func(int64) error) error {
	_, err := m.Load(context.Background(), -1, func(r dslog.Row) error {
		if r.ID > upTo {
			return nil
		}
		return fn(r.ID)
	})
	return err
}

func (m *memory) Check() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.usable()
}

// leading is an engine that leads until Close.
type leading struct {
	*Engine
	Close func()
}

func open(t *testing.T, m *memory, opt Options) *leading {
	t.Helper()
	if m.rows == nil {
		m.rows = map[int64]dslog.Row{}
	}
	opt.Logger = slog.New(slog.DiscardHandler)
	return lead(t, New(opt), m)
}

// lead makes an engine lead.
func lead(t *testing.T, e *Engine, m *memory) *leading {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	started, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- e.Lead(ctx, m, func() { close(started) }) }()
	select {
	case <-started:
	case err := <-done:
		cancel()
		t.Fatal(err)
	}
	l := &leading{Engine: e, Close: sync.OnceFunc(func() { cancel(); <-done })}
	t.Cleanup(l.Close)
	return l
}

func put(key, value string) *pb.TxnRequest {
	return &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: []byte(value)}}}}}
}

func read(t *testing.T, e *leading, key string) (value string, rev int64) {
	t.Helper()
	err := e.View(func(s *state.State) error {
		r, err := s.Range(&pb.RangeRequest{Key: []byte(key)})
		if err == nil && len(r.Kvs) == 1 {
			value, rev = string(r.Kvs[0].Value), r.Kvs[0].ModRevision
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return value, rev
}

// An append that fails may have happened or not. Either way the answer is what is true.
func TestUnknownOutcome(t *testing.T) {
	cause := errors.New("the connection broke")
	for _, applied := range []bool{false, true} {
		t.Run(fmt.Sprintf("applied=%t", applied), func(t *testing.T) {
			m := &memory{}
			e := open(t, m, Options{})
			ctx := context.Background()
			if _, err := e.Txn(ctx, put("a", "1"), 0); err != nil {
				t.Fatal(err)
			}
			m.mu.Lock()
			m.fault = func([]dslog.Row) (bool, error) { m.fault = nil; return applied, cause }
			m.mu.Unlock()
			resp, err := e.Txn(ctx, put("a", "2"), 0)
			value, rev := read(t, e, "a")
			switch {
			case applied && (err != nil || resp.Header.Revision != 3 || value != "2" || rev != 3):
				t.Errorf("applied: %v, %v, %s at %d", resp, err, value, rev)
			case !applied && (!errors.Is(err, ErrNotApplied) || !errors.Is(err, cause) || value != "1" || rev != 2):
				t.Errorf("not applied: %v, %v, %s at %d", resp, err, value, rev)
			}
			next, err := e.Txn(ctx, put("b", "3"), 0)
			if err != nil || next.Header.Revision != rev+1 {
				t.Errorf("the next write: %v, %v", next, err)
			}
			if changes, err := e.History(2); err != nil || len(changes) != int(e.Rev())-1 {
				t.Errorf("history: %v, %v", changes, err)
			}
			if m.reopens != 1 {
				t.Errorf("reopened %d times", m.reopens)
			}
		})
	}
}

// What writes nothing is answered only by a member that leads after it.
func TestFailedCompareIsConfirmed(t *testing.T) {
	deposed := errors.New("another leads")
	var confirm error
	asked := 0
	e := open(t, &memory{}, Options{Confirm: func(context.Context) error { asked++; return confirm }})
	ctx := context.Background()
	if _, err := e.Txn(ctx, put("a", "1"), 0); err != nil || asked != 0 {
		t.Fatalf("a write: %v, confirmed %d times", err, asked)
	}
	create := put("a", "2")
	create.Compare = []*pb.Compare{{Key: []byte("a"), Target: pb.Compare_MOD, Result: pb.Compare_EQUAL, TargetUnion: &pb.Compare_ModRevision{ModRevision: 0}}}
	if r, err := e.Txn(ctx, create, 0); err != nil || r.Succeeded || asked != 1 {
		t.Errorf("a create of what exists: %v, %v, confirmed %d times", r, err, asked)
	}
	if err := e.Revoke(ctx, 7); !errors.Is(err, state.ErrLeaseNotFound) || asked != 2 {
		t.Errorf("an unknown lease: %v, confirmed %d times", err, asked)
	}
	confirm = deposed
	if _, err := e.Txn(ctx, create, 0); !errors.Is(err, ErrNotLeading) || !errors.Is(err, deposed) {
		t.Errorf("a create on a deposed leader: %v", err)
	}
	if err := e.Revoke(ctx, 7); !errors.Is(err, ErrNotLeading) {
		t.Errorf("an unknown lease on a deposed leader: %v", err)
	}
	confirm = nil
	e.opt.Confirm = func(context.Context) error { e.epoch.begin(); return nil } // leadership ended and began again meanwhile
	if _, err := e.Txn(ctx, create, 0); !errors.Is(err, ErrNotLeading) {
		t.Errorf("a create across two leaderships: %v", err)
	}
}

// While a write is on its way to the log, and when it does not arrive there, nobody is shown it:
// not as a value, nor in the history, nor in what a new follower is given.
func TestWriteInFlightIsNotShown(t *testing.T) {
	m := &memory{}
	entered, release := make(chan struct{}), make(chan struct{})
	e := open(t, m, Options{})
	if _, err := e.Txn(context.Background(), put("a", "1"), 0); err != nil {
		t.Fatal(err)
	}
	m.mu.Lock()
	m.fault = func([]dslog.Row) (bool, error) {
		m.fault = nil
		close(entered)
		<-release
		return false, errors.New("leadership is lost")
	}
	m.mu.Unlock()
	done := make(chan error, 1)
	go func() {
		_, err := e.Txn(context.Background(), put("a", "2"), 0)
		done <- err
	}()
	<-entered
	look := func() {
		t.Helper()
		err := e.View(func(s *state.State) error {
			for _, v := range s.Versions() {
				if v.KV.ModRevision > s.Rev() {
					t.Errorf("revision %d is given to a follower, and %d is committed", v.KV.ModRevision, s.Rev())
				}
			}
			history, err := s.History(s.Rev() + 1)
			if len(history) > 0 {
				t.Errorf("the history has %v", history)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
		if value, rev := read(t, e, "a"); value != "1" || rev != 2 {
			t.Errorf("%s at %d is read", value, rev)
		}
	}
	look()
	close(release)
	if err := <-done; !errors.Is(err, ErrNotApplied) {
		t.Error(err)
	}
	look()
}

// Leases of unknown outcome are found as well.
func TestUnknownOutcomeOfLease(t *testing.T) {
	m := &memory{}
	e := open(t, m, Options{})
	m.mu.Lock()
	m.fault = func([]dslog.Row) (bool, error) { m.fault = nil; return true, errors.New("x") }
	m.mu.Unlock()
	id, err := e.Grant(context.Background(), 0, 60)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Renew(id); err != nil {
		t.Error("the lease is unknown:", err)
	}
}

func TestWritesInParallelShareStatements(t *testing.T) {
	m := &memory{}
	release := make(chan struct{})
	entered := make(chan struct{}, 1)
	groups := 0
	m.fault = func([]dslog.Row) (bool, error) {
		if groups++; groups == 1 {
			entered <- struct{}{}
			<-release
		}
		return true, nil
	}
	e := open(t, m, Options{})
	const n = 40
	results := make(chan int64, n)
	write := func(i int) {
		r, err := e.Txn(context.Background(), put(fmt.Sprint(i), "v"), 10)
		if err != nil {
			t.Error(err)
			results <- 0
			return
		}
		results <- r.Header.Revision
	}
	go write(0)
	<-entered
	for i := 1; i < n; i++ {
		go write(i)
	}
	for e.term.Load().waiting.Load() < n-1 {
		time.Sleep(time.Millisecond) // the others have no other way to say that they wait
	}
	close(release)
	seen := map[int64]bool{}
	for range n {
		seen[<-results] = true
	}
	// One by itself, and the rest together; who counts as waiting may not be in the queue yet.
	if len(seen) != n || groups < 2 || groups > 4 {
		t.Errorf("%d revisions in %d statements", len(seen), groups)
	}
}

func TestCompactsByItself(t *testing.T) {
	var mu sync.Mutex
	now := time.Unix(1e6, 0)
	clock := func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	m := &memory{}
	// Its own minute is the smaller of a minute and CompactKeep, in real time; the clock that
	// decides is ours.
	e := open(t, m, Options{Now: clock, CompactAfter: 10 * time.Millisecond, CompactKeep: 5 * time.Millisecond})
	ctx := context.Background()
	for i := range 10 {
		if _, err := e.Txn(ctx, put("a", fmt.Sprint(i)), 0); err != nil {
			t.Fatal(err)
		}
	}
	deadline := time.Now().Add(10 * time.Second)
	for e.Compacted() <= 0 {
		mu.Lock()
		now = now.Add(time.Millisecond)
		mu.Unlock()
		if time.Now().After(deadline) {
			t.Fatal("it never compacted")
		}
		time.Sleep(time.Millisecond) // real time passes for the ticker
	}
	value, _ := read(t, e, CompactKey)
	var told int64
	if _, err := fmt.Sscan(value, &told); err != nil || told <= 0 || told > e.Compacted() {
		t.Errorf("the key says %q, compacted is %d", value, e.Compacted())
	}
	if v, _ := read(t, e, "a"); v != "9" {
		t.Errorf("the live value is %q", v)
	}
}

func TestClosedEngineRefuses(t *testing.T) {
	e := open(t, &memory{}, Options{})
	e.Close()
	if _, err := e.Txn(context.Background(), put("a", "1"), 0); !errors.Is(err, ErrNotLeading) {
		t.Error(err)
	}
}
