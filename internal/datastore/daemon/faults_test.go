package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"microk8s/internal/datastore/storedir"
	"microk8s/internal/longtest"

	"github.com/anishathalye/porcupine"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// The datastore under faults: clients on all members write and read in Kubernetes' patterns
// while members are killed, frozen, cut off from each other, restarted, removed and added, and
// while leadership moves. What they saw must be linearizable, and what the watches saw must be
// the history: ordered, without gaps and repetitions, with honest progress.
//
// It runs in rounds. After each the cluster is put right, the clients stop, and the round is
// checked, so that a history never gets too long to be decided.

// kind is what an operation does; each is one transaction of kube-apiserver's or a read.
type kind int

const (
	opCreate kind = iota
	opUpdate
	opDelete
	opGet
	opList
)

func (k kind) String() string { return [...]string{"create", "update", "delete", "get", "list"}[k] }

type opIn struct {
	kind   kind
	key    string
	value  string // unique in the whole test
	expect int64  // mod revision that update and delete compare with
}

type record struct {
	value string
	mod   int64
}

type opOut struct {
	ok   bool
	rev  int64             // of the answer's header
	kv   *record           // what a read, or an else-branch, has shown
	list map[string]record // what a list has shown
}

// operation is one call of a client. It is in doubt when an error came back.
type operation struct {
	client    int
	in        opIn
	out       opOut
	call, end int64
	doubt     bool
}

// modelState is the datastore as one machine.
type modelState struct {
	rev int64
	kv  map[string]record
}

func (s *modelState) with(key string, r *record) *modelState {
	n := &modelState{rev: s.rev + 1, kv: maps.Clone(s.kv)}
	if r == nil {
		delete(n.kv, key)
	} else {
		n.kv[key] = *r
	}
	return n
}

// step says whether an answer is right in a state, and what the state is then.
func step(s *modelState, in opIn, out opOut) (bool, *modelState) {
	cur, exists := s.kv[in.key]
	shown := func() bool { return (out.kv != nil) == exists && (!exists || *out.kv == cur) }
	next := s.rev + 1
	switch in.kind {
	case opCreate:
		if out.ok {
			return !exists && out.rev == next, s.with(in.key, &record{in.value, next})
		}
		return exists && out.rev == s.rev, s
	case opUpdate:
		if out.ok {
			return cur.mod == in.expect && out.rev == next, s.with(in.key, &record{in.value, next})
		}
		return cur.mod != in.expect && out.rev == s.rev && shown(), s
	case opDelete:
		if out.ok {
			return cur.mod == in.expect && out.rev == next, s.with(in.key, nil)
		}
		return cur.mod != in.expect && out.rev == s.rev && shown(), s
	case opGet:
		return out.rev == s.rev && shown(), s
	default:
		return out.rev == s.rev && maps.Equal(out.list, s.kv), s
	}
}

func model(start *modelState) porcupine.Model {
	return porcupine.Model{
		Init: func() any { return start },
		Step: func(state, in, out any) (bool, any) {
			ok, next := step(state.(*modelState), in.(opIn), out.(opOut))
			return ok, next
		},
		Equal: func(a, b any) bool {
			x, y := a.(*modelState), b.(*modelState)
			return x.rev == y.rev && maps.Equal(x.kv, y.kv)
		},
		Hash: func(s any) uint64 { return uint64(s.(*modelState).rev) },
		DescribeOperation: func(in, out any) string {
			return fmt.Sprintf("%v → %v", in, out)
		},
	}
}

// event is one change as a watch has shown it.
type event struct {
	rev   int64
	key   string
	value string // "" for a deletion
	prev  record
}

// watched is everything one watch of one member has shown since its start.
type watched struct {
	mu     sync.Mutex
	name   string
	events []event
	last   int64 // revision up to which everything was shown
	errs   []string
}

func (w *watched) wrong(format string, args ...any) {
	if len(w.errs) < 5 {
		w.errs = append(w.errs, w.name+": "+fmt.Sprintf(format, args...))
	}
}

// take judges a message and keeps its events.
func (w *watched) take(r clientv3.WatchResponse) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if r.IsProgressNotify() {
		w.last = max(w.last, r.Header.Revision)
		return
	}
	for i, ev := range r.Events {
		e := event{rev: ev.Kv.ModRevision, key: string(ev.Kv.Key), value: string(ev.Kv.Value)}
		if ev.PrevKv != nil {
			e.prev = record{string(ev.PrevKv.Value), ev.PrevKv.ModRevision}
		}
		if e.rev <= w.last && (i == 0 || e.rev != r.Events[i-1].Kv.ModRevision) {
			w.wrong("revision %d came after %d, or after progress to it", e.rev, w.last)
		}
		w.last = max(w.last, e.rev)
		w.events = append(w.events, e)
	}
}

func (w *watched) reached() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.last
}

// trial is one run of the test.
type trial struct {
	t    testing.TB
	c    *testCluster
	rnd  *rand.Rand
	base time.Time

	flying atomic.Int64 // writes in flight
	serial atomic.Int64 // makes values unique

	mu      sync.Mutex
	ops     []operation
	pending []operation // of earlier rounds, in doubt and not seen in the history yet
	watches []*watched

	state    *modelState // at the end of the last checked round
	faults   int
	kinds    map[string]int
	restarts sync.WaitGroup
	busy     map[*testMember]bool // has a fault
}

const prefix = "/registry/"

var faultKeys = []string{"/registry/a", "/registry/b", "/registry/c", "/registry/d", "/registry/e"}

// work is one client on one member until ctx ends.
func (tr *trial) work(ctx context.Context, id int, c *clientv3.Client, rnd *rand.Rand) {
	known := map[string]int64{} // mod revisions, as last seen by this client
	for ctx.Err() == nil {
		op := operation{client: id}
		op.in.key = faultKeys[rnd.IntN(len(faultKeys))]
		mod, seen := known[op.in.key]
		switch n := rnd.IntN(10); {
		case n < 3:
			op.in.kind = opGet
		case n < 4:
			op.in.kind = opList
		case !seen:
			op.in.kind = opCreate
		case n < 9:
			op.in.kind = opUpdate
		default:
			op.in.kind = opDelete
		}
		op.in.expect = mod
		if op.in.kind == opCreate || op.in.kind == opUpdate {
			op.in.value = fmt.Sprintf("%d-%d", id, tr.serial.Add(1))
		}
		call, cancel := context.WithTimeout(ctx, 3*time.Second)
		tr.carryOut(call, c, &op)
		cancel()
		if op.doubt {
			delete(known, op.in.key)
			if op.in.kind >= opGet {
				continue // a read that failed says nothing
			}
		} else {
			switch {
			case op.in.kind == opDelete && op.out.ok || op.in.kind == opGet && op.out.kv == nil:
				delete(known, op.in.key)
			case op.in.kind <= opUpdate && op.out.ok:
				known[op.in.key] = op.out.rev
			case op.out.kv != nil:
				known[op.in.key] = op.out.kv.mod
			case op.in.kind == opList:
				for k, r := range op.out.list {
					known[k] = r.mod
				}
			default:
				known[op.in.key] = 0 // somebody else has it, or not; the next get tells
			}
			if known[op.in.key] == 0 {
				delete(known, op.in.key)
			}
		}
		tr.mu.Lock()
		tr.ops = append(tr.ops, op)
		tr.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(rnd.IntN(12)) * time.Millisecond): // thinks
		}
	}
}

func (tr *trial) carryOut(ctx context.Context, c *clientv3.Client, op *operation) {
	in := op.in
	op.call = time.Since(tr.base).Nanoseconds()
	defer func() { op.end = time.Since(tr.base).Nanoseconds() }()
	var err error
	one := func(kvs []*record) *record {
		if len(kvs) == 0 {
			return nil
		}
		return kvs[0]
	}
	records := func(r *clientv3.GetResponse) (out []*record) {
		for _, kv := range r.Kvs {
			out = append(out, &record{string(kv.Value), kv.ModRevision})
		}
		return out
	}
	switch in.kind {
	case opGet:
		var r *clientv3.GetResponse
		if r, err = c.Get(ctx, in.key); err == nil {
			op.out = opOut{rev: r.Header.Revision, kv: one(records(r))}
		}
	case opList:
		var r *clientv3.GetResponse
		if r, err = c.Get(ctx, prefix, clientv3.WithPrefix()); err == nil {
			op.out = opOut{rev: r.Header.Revision, list: map[string]record{}}
			for i, rec := range records(r) {
				if k := string(r.Kvs[i].Key); k != HealthKey {
					op.out.list[k] = *rec
				}
			}
		}
	default:
		tr.flying.Add(1)
		defer tr.flying.Add(-1)
		txn := c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(in.key), "=", in.expect))
		switch in.kind {
		case opCreate:
			txn = c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(in.key), "=", 0)).Then(clientv3.OpPut(in.key, in.value))
		case opUpdate:
			txn = txn.Then(clientv3.OpPut(in.key, in.value)).Else(clientv3.OpGet(in.key))
		case opDelete:
			txn = txn.Then(clientv3.OpDelete(in.key)).Else(clientv3.OpGet(in.key))
		}
		var r *clientv3.TxnResponse
		if r, err = txn.Commit(); err == nil {
			op.out = opOut{ok: r.Succeeded, rev: r.Header.Revision}
			if !r.Succeeded && in.kind != opCreate {
				op.out.kv = one(records((*clientv3.GetResponse)(r.Responses[0].GetResponseRange())))
			}
		}
	}
	op.doubt = err != nil
}

// observe watches everything on one member until ctx ends, and goes on where it was when the
// watch ends.
func (tr *trial) observe(ctx context.Context, w *watched, c *clientv3.Client) {
	for ctx.Err() == nil {
		life, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
		ch := c.Watch(life, prefix, clientv3.WithPrefix(), clientv3.WithPrevKV(), clientv3.WithProgressNotify(), clientv3.WithRev(w.reached()+1))
		for r := range ch {
			if r.CompactRevision != 0 {
				w.mu.Lock()
				w.wrong("compacted at %d, and nobody compacts", r.CompactRevision)
				w.mu.Unlock()
				cancel()
				return
			}
			if r.Err() != nil {
				break
			}
			w.take(r)
		}
		cancel()
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// check judges the round that has ended; final is the state that a read has shown after it.
func (tr *trial) check(final *modelState) error {
	var history []event
	for _, w := range tr.watches {
		w.mu.Lock()
		errs, events := w.errs, slices.Clone(w.events)
		w.mu.Unlock()
		if len(errs) > 0 {
			return fmt.Errorf("a watch is wrong: %s", strings.Join(errs, "; "))
		}
		events = slices.DeleteFunc(events, func(e event) bool { return e.rev > final.rev || e.key == HealthKey })
		if history == nil {
			history = events
			continue
		}
		if !slices.Equal(history, events) {
			for i := range min(len(history), len(events)) {
				if history[i] != events[i] {
					return fmt.Errorf("%s and %s saw different histories: %v and %v", tr.watches[0].name, w.name, history[i], events[i])
				}
			}
			return fmt.Errorf("%s saw %d events up to revision %d, %s saw %d", tr.watches[0].name, len(history), final.rev, w.name, len(events))
		}
	}
	// The history is one of single changes, each of which continues the last.
	at := map[string]record{}
	written := map[string]event{} // by value
	deleted := map[int64]event{}  // by the mod revision that was deleted
	last := int64(1)
	for i, e := range history {
		if e.prev != at[e.key] {
			return fmt.Errorf("revision %d replaces %v, and the key was %v", e.rev, e.prev, at[e.key])
		}
		if i > 0 && e.rev != last+1 {
			return fmt.Errorf("revision %d follows %d", e.rev, last)
		}
		last = e.rev
		if e.value == "" {
			deleted[e.prev.mod] = e
			delete(at, e.key)
			continue
		}
		if other, twice := written[e.value]; twice {
			return fmt.Errorf("the value %s was written at revision %d and again at %d", e.value, other.rev, e.rev)
		}
		written[e.value] = e
		at[e.key] = record{e.value, e.rev}
	}
	if !maps.Equal(at, final.kv) {
		return fmt.Errorf("the history leads to %v, and a read shows %v", at, final.kv)
	}
	// What was in doubt is decided by the history.
	tr.mu.Lock()
	ops := tr.ops
	tr.ops = nil
	tr.mu.Unlock()
	acked := map[int64]bool{} // deletions, by the mod revision
	for _, o := range ops {
		if !o.doubt && o.in.kind == opDelete && o.out.ok {
			acked[o.in.expect] = true
		}
	}
	forever := time.Since(tr.base).Nanoseconds()
	var decided []porcupine.Operation
	var pending []operation
	add := func(o operation) {
		decided = append(decided, porcupine.Operation{ClientId: o.client, Input: o.in, Call: o.call, Output: o.out, Return: o.end})
	}
	// Of several deletions in doubt that may have been the one in the history, the one called
	// first is taken: whatever was seen after it fits.
	ops = append(tr.pending, ops...)
	slices.SortFunc(ops, func(a, b operation) int { return int(a.call - b.call) })
	for _, o := range ops {
		if !o.doubt {
			add(o)
			if o.out.ok && o.in.value != "" && written[o.in.value].rev != o.out.rev {
				return fmt.Errorf("an acknowledged write is not in the history: %v, %v", o.in, o.out)
			}
			continue
		}
		var e event
		var done bool
		if o.in.kind == opDelete {
			if e, done = deleted[o.in.expect]; done && (acked[o.in.expect] || e.key != o.in.key || o.in.expect == 0) {
				done = false // another did it
			}
		} else {
			e, done = written[o.in.value]
		}
		switch {
		case done && e.rev > tr.state.rev:
			o.out = opOut{ok: true, rev: e.rev}
			o.end = forever
			if o.in.kind == opDelete {
				acked[o.in.expect] = true
			}
			add(o)
		case !done:
			pending = append(pending, o)
		}
	}
	tr.pending = pending
	tr.t.Logf("%d operations (%d in doubt and never seen), revisions %d to %d, %d faults so far", len(decided), len(pending), tr.state.rev, final.rev, tr.faults)
	result, info := porcupine.CheckOperationsVerbose(model(tr.state), decided, 2*time.Minute)
	if result != porcupine.Ok {
		file := filepath.Join(os.TempDir(), fmt.Sprintf("datastore-history-%d.html", os.Getpid()))
		if err := porcupine.VisualizePath(model(tr.state), info, file); err == nil {
			tr.t.Logf("the history: %s", file)
		}
		return fmt.Errorf("the history is not linearizable (%s)%s", result, explain(tr.state, history, decided))
	}
	tr.state = final
	return nil
}

// explain names answers that cannot be right: each answer tells a revision, and so the state
// that it was made from and those that other answers had shown before its call.
func explain(start *modelState, history []event, ops []porcupine.Operation) string {
	at := map[int64]*modelState{start.rev: start}
	for s, i := start, 0; i < len(history); i++ {
		e := history[i]
		if e.rev <= s.rev {
			continue
		}
		var r *record
		if e.value != "" {
			r = &record{e.value, e.rev}
		}
		s = s.with(e.key, r)
		at[e.rev] = s
	}
	var out strings.Builder
	say := func(o porcupine.Operation, format string, args ...any) {
		in, res := o.Input.(opIn), o.Output.(opOut)
		fmt.Fprintf(&out, "\n  client %d, %.3f to %.3f s: %v %s (expects %d): ok %v, revision %d: %s", o.ClientId, float64(o.Call)/1e9, float64(o.Return)/1e9,
			in.kind, in.key, in.expect, res.ok, res.rev, fmt.Sprintf(format, args...))
	}
	ends := slices.Clone(ops)
	slices.SortFunc(ends, func(a, b porcupine.Operation) int { return int(a.Return - b.Return) })
	for _, o := range ops {
		in, res := o.Input.(opIn), o.Output.(opOut)
		before := res.rev
		if in.kind <= opDelete && res.ok {
			before--
		}
		if s := at[before]; s == nil {
			say(o, "nobody has seen this revision")
		} else if ok, _ := step(s, in, res); !ok {
			say(o, "not from the state at %d: the key has %v there, and the answer shows %v %v", before, s.kv[in.key], res.kv, res.list)
		}
		for _, p := range ends {
			if p.Return >= o.Call {
				break
			}
			if r := p.Output.(opOut).rev; r > res.rev {
				say(o, "client %d had been shown %d at %.3f s (%v)", p.ClientId, r, float64(p.Return)/1e9, p.Input.(opIn).kind)
				break
			}
		}
	}
	return out.String()
}

// cut drops what two members send each other, both ways.
func (tr *trial) cut(a, b *testMember) {
	for _, p := range [][2]*testMember{{a, b}, {b, a}} {
		tr.nft("add", "rule", "inet", "faults", "input", "ip", "saddr", host(p[0]), "ip", "daddr", host(p[1]), "drop")
	}
}

func (tr *trial) heal() { tr.nft("flush", "chain", "inet", "faults", "input") }

func host(m *testMember) string { return strings.TrimSuffix(m.address, ":19001") }

func (tr *trial) nft(args ...string) {
	if out, err := exec.Command("nft", args...).CombinedOutput(); err != nil {
		tr.t.Errorf("nft %v: %v: %s", args, err, out)
	}
}

// tool runs the dqlite tool on the directory of a member.
func (tr *trial) tool(m *testMember, command string) error {
	cmd := exec.Command(os.Args[0], "-s", "file://"+filepath.Join(m.dir, "cluster.yaml"), "-c", filepath.Join(m.dir, storedir.CertFile),
		"-k", filepath.Join(m.dir, storedir.KeyFile), "k8s", command)
	cmd.Env = append(os.Environ(), "TEST_K8S_DQLITE=tool")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", command, err, out)
	}
	return nil
}

// fault does one thing to the cluster, while a write is in flight. What it breaks is whole
// again after a moment.
func (tr *trial) fault() {
	rnd := tr.rnd
	var free []*testMember
	tr.mu.Lock()
	for _, m := range tr.c.members {
		if !tr.busy[m] {
			free = append(free, m)
		}
	}
	tr.mu.Unlock()
	within(tr.t.(*testing.T), "a write is in flight", func() bool { return tr.flying.Load() > 0 })
	if len(free) == 0 {
		return
	}
	m := free[rnd.IntN(len(free))]
	for_ := time.Duration(100+rnd.IntN(1200)) * time.Millisecond
	later := func(ms []*testMember, fn func()) {
		tr.mu.Lock()
		for _, m := range ms {
			tr.busy[m] = true
		}
		tr.mu.Unlock()
		tr.restarts.Add(1)
		time.AfterFunc(for_, func() {
			defer tr.restarts.Done()
			fn()
			tr.mu.Lock()
			for _, m := range ms {
				delete(tr.busy, m)
			}
			tr.mu.Unlock()
		})
	}
	name := ""
	switch n := rnd.IntN(100); {
	case n < 30:
		name = "kill"
		tr.killed(m)
		later([]*testMember{m}, func() { tr.again(m) })
	case n < 34 && len(free) == len(tr.c.members):
		name = "kill all"
		for _, m := range free {
			tr.killed(m)
		}
		later(free, func() {
			for _, m := range free {
				tr.again(m)
			}
		})
	case n < 55:
		name = "freeze"
		m.cmd.Process.Signal(syscall.SIGSTOP)
		later([]*testMember{m}, func() { m.cmd.Process.Signal(syscall.SIGCONT) })
	case n < 75:
		name = "cut"
		others := tr.c.members
		if rnd.IntN(2) == 0 { // from one other, or from all
			others = []*testMember{others[rnd.IntN(len(others))]}
		}
		for _, o := range others {
			if o != m {
				tr.cut(m, o)
			}
		}
		later(nil, tr.heal)
	case n < 82:
		name = "restart"
		m.cmd.Process.Signal(syscall.SIGTERM)
		later([]*testMember{m}, func() {
			end := time.AfterFunc(20*time.Second, func() { m.cmd.Process.Kill() })
			m.cmd.Wait()
			end.Stop()
			tr.again(m)
		})
	case n < 95 || len(free) < 3:
		name = "transfer"
		for_ = 0
		later(nil, func() { _ = tr.tool(m, ".transfer "+m.address) }) // to who is no voter, or gone, it fails
	default:
		name = "remove and add"
		o := free[(slices.Index(free, m)+1)%len(free)]
		later([]*testMember{m}, func() {
			// A removal whose outcome is not known may have happened.
			var err error
			for range 100 {
				if err = tr.tool(o, ".remove "+m.address); err == nil || strings.Contains(err.Error(), "no member has the address") {
					err = nil
					break
				}
			}
			if err != nil {
				tr.t.Errorf("%s cannot be removed: %v", m.address, err)
			}
			tr.killed(m)
			tr.wipe(m)
			tr.again(m)
		})
	}
	tr.faults++
	tr.kinds[name]++
}

func (tr *trial) killed(m *testMember) {
	m.cmd.Process.Kill()
	m.cmd.Wait()
}

// wipe makes the directory of a member that of one that joins.
func (tr *trial) wipe(m *testMember) {
	var list []string
	for _, o := range tr.c.members {
		if o != m {
			list = append(list, o.address)
		}
	}
	entries, _ := os.ReadDir(m.dir)
	for _, e := range entries {
		if n := e.Name(); n != storedir.CertFile && n != storedir.KeyFile && n != "tuning.yaml" {
			os.RemoveAll(filepath.Join(m.dir, n))
		}
	}
	writeFile(tr.t, filepath.Join(m.dir, "init.yaml"), []byte("Address: "+m.address+"\nCluster: ["+strings.Join(list, ", ")+"]\n"))
}

// again starts a member that has ended. Nobody waits for it here.
func (tr *trial) again(m *testMember) { tr.c.launch(m) }

// settle waits until all is whole and reads the state on every member.
func (tr *trial) settle() *modelState {
	t := tr.t.(*testing.T)
	tr.restarts.Wait()
	tr.heal()
	var final *modelState
	for _, m := range tr.c.members {
		var r *clientv3.GetResponse
		within(t, m.address+" reads", func() bool {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			var err error
			r, err = m.client.Get(ctx, prefix, clientv3.WithPrefix())
			return err == nil
		})
		s := &modelState{rev: r.Header.Revision, kv: map[string]record{}}
		for _, kv := range r.Kvs {
			if string(kv.Key) != HealthKey {
				s.kv[string(kv.Key)] = record{string(kv.Value), kv.ModRevision}
			}
		}
		if final == nil || s.rev > final.rev { // a write in doubt may still have come
			final = s
		}
	}
	for _, w := range tr.watches {
		within(t, w.name+" shows everything", func() bool {
			return w.reached() >= final.rev || lastEvent(w) >= maxMod(final) && w.reached() >= final.rev
		})
	}
	return final
}

func lastEvent(w *watched) int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.events) == 0 {
		return 0
	}
	return w.events[len(w.events)-1].rev
}

func maxMod(s *modelState) (mod int64) {
	for _, r := range s.kv {
		mod = max(mod, r.mod)
	}
	return mod
}

// runTrial makes so many faults on so many members, and returns what is wrong.
func runTrial(t *testing.T, rnd *rand.Rand, members, faults int, broken Faults) (*trial, error) {
	broken.FromOwn = true
	setting, err := json.Marshal(broken)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("TEST_FAULTS", string(setting))
	c := &testCluster{t: t, network: "127.77.0"}
	for range members {
		m := c.prepare()
		writeFile(t, filepath.Join(m.dir, "tuning.yaml"), []byte("network-latency: 30ms\n"))
		c.start(m)
	}
	c.waitRoles(3)
	tr := &trial{t: t, c: c, rnd: rnd, base: time.Now(), kinds: map[string]int{}, busy: map[*testMember]bool{}}
	for _, args := range [][]string{{"add", "table", "inet", "faults"}, {"add", "chain", "inet", "faults", "input", "{ type filter hook input priority 0; }"}} {
		tr.nft(args...)
	}
	defer tr.nft("delete", "table", "inet", "faults")
	start, err := c.members[0].client.Get(testContext(t), prefix, clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	tr.state = &modelState{rev: start.Header.Revision, kv: map[string]record{}}
	defer func() {
		for _, m := range c.members {
			m.cmd.Process.Signal(syscall.SIGCONT) // one that is frozen cannot be waited for
		}
	}()
	watching, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer func() { stop(); wg.Wait() }()
	for i, m := range c.members {
		for j := range 2 {
			w := &watched{name: fmt.Sprintf("watch %d of member %d", j, i), last: start.Header.Revision}
			tr.watches = append(tr.watches, w)
			wc := dial(t, "unix://"+filepath.Join(m.dir, "kine.sock:12379"))
			wg.Add(1)
			go func() { defer wg.Done(); tr.observe(watching, w, wc) }()
		}
	}
	const perRound = 12
	for tr.faults < faults && !t.Failed() {
		working, end := context.WithCancel(context.Background())
		var clients sync.WaitGroup
		for i, m := range c.members {
			for j := range 3 {
				r := rand.New(rand.NewPCG(rnd.Uint64(), 0))
				clients.Add(1)
				go func() { defer clients.Done(); tr.work(working, i*3+j, m.client, r) }()
			}
		}
		for n := 0; n < perRound && tr.faults < faults; n++ {
			time.Sleep(time.Duration(50+rnd.IntN(900)) * time.Millisecond) // the schedule of faults is one of times
			tr.fault()
		}
		tr.restarts.Wait()
		tr.heal()
		end()
		clients.Wait()
		if err := tr.check(tr.settle()); err != nil {
			return tr, err
		}
	}
	return tr, nil
}

// inNetwork runs a test again, as root, in a network namespace of its own, beside others that do
// so, and says whether it is in it now.
func inNetwork(t *testing.T) bool {
	t.Helper()
	if os.Getenv("TEST_IN_NETWORK") == "1" {
		if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return true
	}
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	t.Parallel()
	cmd := exec.Command("unshare", "-n", os.Args[0], "-test.v", "-test.timeout=90m", "-test.run=^"+strings.ReplaceAll(t.Name(), "/", "$/^")+"$")
	cmd.Env = append(os.Environ(), "TEST_IN_NETWORK=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
	return false
}

// TestFaults makes 200 faults in the gate and 2,000 in the long run: three fifths on three members,
// the rest on five. Both run at the same time, each in a network of its own. When and to whom a
// fault comes is the seed's; what it meets there is not, so a run cannot be repeated exactly.
func TestFaults(t *testing.T) {
	for _, members := range []int{3, 5} {
		t.Run(fmt.Sprintf("members-%d", members), func(t *testing.T) {
			if !inNetwork(t) {
				return
			}
			faults := map[int]int{3: 120, 5: 80}[members]
			if longtest.Enabled() {
				faults *= 10
			}
			if n := os.Getenv("TEST_FAULT_COUNT"); n != "" {
				fmt.Sscan(n, &faults)
			}
			withSeeds(t, func(t *testing.T, rnd *rand.Rand) {
				tr, err := runTrial(t, rnd, members, faults, Faults{})
				if err != nil {
					t.Error(err)
				}
				t.Logf("%d faults: %v", tr.faults, tr.kinds)
			})
		})
	}
}

// What finds violations is itself tested: a build that reads without a barrier, and one that
// applies groups twice, must be found.
func TestFaultsAreFound(t *testing.T) {
	for name, broken := range map[string]Faults{"reads without barrier": {NoBarrier: true}, "groups twice": {Twice: true}} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			if !inNetwork(t) {
				return
			}
			_, err := runTrial(t, rand.New(rand.NewPCG(1, 1)), 3, 60, broken)
			if err == nil {
				t.Fatal("nothing was found")
			}
			t.Logf("found: %v", err)
		})
	}
}
