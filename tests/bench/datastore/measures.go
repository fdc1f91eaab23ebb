package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// figure is what one measurement of one target gave. What does not apply is zero.
type figure struct {
	rate     float64 // per second; more is better
	p50, p99 time.Duration
	value    float64 // in the row's own unit; less is better
}

// value is a value of 1 KiB, as most objects of Kubernetes are about that large, of letters
// that do not compress to nothing.
func value() string {
	b := make([]byte, 1024)
	for i := range b {
		b[i] = 'a' + byte(rand.IntN(26))
	}
	return string(b)
}

func percentiles(d []time.Duration) (p50, p99 time.Duration) {
	if len(d) == 0 {
		return 0, 0
	}
	slices.Sort(d)
	return d[len(d)/2], d[min(len(d)-1, len(d)*99/100)]
}

// load runs call in so many callers for a time, each with its own number and how often it has
// called, and measures every call.
func load(ctx context.Context, callers int, during time.Duration, call func(ctx context.Context, caller, n int) error) (figure, error) {
	var mu sync.Mutex
	var all []time.Duration
	began := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for caller := range callers {
		g.Go(func() error {
			var mine []time.Duration
			for n := 0; time.Since(began) < during; n++ {
				start := time.Now()
				if err := call(ctx, caller, n); err != nil {
					return err
				}
				mine = append(mine, time.Since(start))
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, mine...)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return figure{}, err
	}
	f := figure{rate: float64(len(all)) / time.Since(began).Seconds()}
	f.p50, f.p99 = percentiles(all)
	return f, nil
}

var errLost = errors.New("a transaction without a rival was refused")

// create, update and remove are the transactions of an API server.

func create(ctx context.Context, c *clientv3.Client, key, val string) (int64, error) {
	r, err := c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", 0)).Then(clientv3.OpPut(key, val)).Else(clientv3.OpGet(key)).Commit()
	if err != nil {
		return 0, err
	}
	if !r.Succeeded {
		return 0, fmt.Errorf("create %s: %w", key, errLost)
	}
	return r.Header.Revision, nil
}

func update(ctx context.Context, c *clientv3.Client, key, val string, rev int64) (newRev int64, ok bool, err error) {
	r, err := c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", rev)).Then(clientv3.OpPut(key, val)).Else(clientv3.OpGet(key)).Commit()
	if err != nil {
		return 0, false, err
	}
	if r.Succeeded {
		return r.Header.Revision, true, nil
	}
	if kvs := r.Responses[0].GetResponseRange().Kvs; len(kvs) == 1 {
		return kvs[0].ModRevision, false, nil
	}
	return 0, false, nil
}

func remove(ctx context.Context, c *clientv3.Client, key string, rev int64) error {
	r, err := c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", rev)).Then(clientv3.OpDelete(key)).Else(clientv3.OpGet(key)).Commit()
	if err == nil && !r.Succeeded {
		err = fmt.Errorf("delete %s: %w", key, errLost)
	}
	return err
}

// run is one target in one round; its keys are its own.
type run struct {
	*target
	round  int
	during time.Duration
	val    string

	created [][]held // what createN made, for deleteN
}

type held struct {
	key string
	rev int64
}

// createN makes new keys; with spread, the callers are divided among the members.
func (r *run) createN(callers int, spread bool) func(context.Context) (figure, error) {
	return func(ctx context.Context) (figure, error) {
		prefix := fmt.Sprintf("/registry/create/%d/%d/%t/", r.round, callers, spread)
		made := make([][]held, callers)
		f, err := load(ctx, callers, r.during, func(ctx context.Context, caller, n int) error {
			on := 0
			if spread {
				on = caller
			}
			key := fmt.Sprintf("%s%d/%d", prefix, caller, n)
			rev, err := create(ctx, r.client(on, caller), key, r.val)
			made[caller] = append(made[caller], held{key, rev})
			return err
		})
		if !spread {
			r.created = made
		}
		return f, err
	}
}

// deleteN deletes what the last createN with as many callers has made.
func (r *run) deleteN(ctx context.Context) (figure, error) {
	callers := len(r.created)
	var mu sync.Mutex
	var all []time.Duration
	began := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for caller, keys := range r.created {
		g.Go(func() error {
			var mine []time.Duration
			for _, h := range keys {
				if time.Since(began) > r.during {
					break
				}
				start := time.Now()
				if err := remove(ctx, r.client(0, caller), h.key, h.rev); err != nil {
					return err
				}
				mine = append(mine, time.Since(start))
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, mine...)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return figure{}, fmt.Errorf("%d callers: %w", callers, err)
	}
	f := figure{rate: float64(len(all)) / time.Since(began).Seconds()}
	f.p50, f.p99 = percentiles(all)
	return f, nil
}

func (r *run) updateN(callers int) func(context.Context) (figure, error) {
	return func(ctx context.Context) (figure, error) {
		revs := make([]int64, callers)
		key := func(caller int) string { return fmt.Sprintf("/registry/update/%d/%d/%d", r.round, callers, caller) }
		for i := range callers {
			rev, err := create(ctx, r.client(0, i), key(i), r.val)
			if err != nil {
				return figure{}, err
			}
			revs[i] = rev
		}
		return load(ctx, callers, r.during, func(ctx context.Context, caller, _ int) error {
			rev, ok, err := update(ctx, r.client(0, caller), key(caller), r.val, revs[caller])
			if err == nil && !ok {
				err = errLost
			}
			revs[caller] = rev
			return err
		})
	}
}

// contended has 16 callers that update one key; the rate is that of the successful ones.
func (r *run) contended(ctx context.Context) (figure, error) {
	key := fmt.Sprintf("/registry/contended/%d", r.round)
	first, err := create(ctx, r.client(0, 0), key, r.val)
	if err != nil {
		return figure{}, err
	}
	const callers = 16
	revs := make([]int64, callers)
	for i := range revs {
		revs[i] = first
	}
	var done atomic.Int64
	began := time.Now()
	f, err := load(ctx, callers, r.during, func(ctx context.Context, caller, _ int) error {
		rev, ok, err := update(ctx, r.client(0, caller), key, r.val, revs[caller])
		if ok {
			done.Add(1)
		}
		revs[caller] = rev
		return err
	})
	f.rate = float64(done.Load()) / time.Since(began).Seconds()
	return f, err
}

// listed is how many objects the lists and counts have, and page how many are asked for at once.
const (
	listed = 5000
	page   = 500
)

// fill makes what lists read, once for all rounds.
func (r *run) fill(ctx context.Context, prefix string, n int) error {
	g, ctx := errgroup.WithContext(ctx)
	const callers = 32
	for caller := range callers {
		g.Go(func() error {
			for i := caller; i < n; i += callers {
				if _, err := create(ctx, r.client(0, caller), fmt.Sprintf("%s%06d", prefix, i), r.val); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

const listPrefix = "/registry/pods/"

func (r *run) getN(callers, member int) func(context.Context) (figure, error) {
	return func(ctx context.Context) (figure, error) {
		return load(ctx, callers, r.during, func(ctx context.Context, caller, n int) error {
			got, err := r.client(member, caller).Get(ctx, fmt.Sprintf("%s%06d", listPrefix, (caller*97+n)%listed))
			if err == nil && len(got.Kvs) != 1 {
				err = errors.New("a key is not there")
			}
			return err
		})
	}
}

// list reads all of listPrefix in pages, as an API server does.
func (r *run) list(ctx context.Context) (figure, error) {
	return load(ctx, 1, r.during, func(ctx context.Context, _, _ int) error {
		key, end := listPrefix, clientv3.GetPrefixRangeEnd(listPrefix)
		var rev int64
		seen := 0
		for {
			got, err := r.client(0, 0).Get(ctx, key, clientv3.WithRange(end), clientv3.WithLimit(page), clientv3.WithRev(rev))
			if err != nil {
				return err
			}
			rev = got.Header.Revision
			seen += len(got.Kvs)
			if !got.More || len(got.Kvs) == 0 {
				break
			}
			key = string(got.Kvs[len(got.Kvs)-1].Key) + "\x00"
		}
		if seen != listed {
			return fmt.Errorf("%d objects listed, want %d", seen, listed)
		}
		return nil
	})
}

func (r *run) count(ctx context.Context) (figure, error) {
	return load(ctx, 1, r.during, func(ctx context.Context, _, _ int) error {
		got, err := r.client(0, 0).Get(ctx, listPrefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err == nil && got.Count != listed {
			err = fmt.Errorf("%d objects counted, want %d", got.Count, listed)
		}
		return err
	})
}

// events measures from the answer of a write on the first member to its event on another.
func (r *run) events(member int) func(context.Context) (figure, error) {
	return func(ctx context.Context) (figure, error) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		prefix := fmt.Sprintf("/registry/events/%d/%d/", r.round, member)
		rev, err := create(ctx, r.client(0, 0), prefix, r.val)
		if err != nil {
			return figure{}, err
		}
		type arrival struct {
			rev int64
			at  time.Time
		}
		arrived := make(chan arrival, 1<<16)
		watch := r.client(member, 1).Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithRev(rev+1))
		go func() {
			for w := range watch {
				now := time.Now()
				for _, e := range w.Events {
					arrived <- arrival{e.Kv.ModRevision, now}
				}
			}
			close(arrived)
		}()
		var delays []time.Duration
		for began, n := time.Now(), 0; time.Since(began) < r.during; n++ {
			rev, err := create(ctx, r.client(0, 0), fmt.Sprintf("%s%d", prefix, n), r.val)
			if err != nil {
				return figure{}, err
			}
			answered := time.Now()
			select {
			case a, ok := <-arrived:
				if !ok || a.rev != rev {
					return figure{}, fmt.Errorf("event of revision %d came, want %d", a.rev, rev)
				}
				delays = append(delays, max(0, a.at.Sub(answered)))
			case <-time.After(10 * time.Second):
				return figure{}, errors.New("no event came")
			}
		}
		var f figure
		f.p50, f.p99 = percentiles(delays)
		return f, nil
	}
}

// progress measures from asking, right after a write, to an answer that covers the write.
func (r *run) progress(member int) func(context.Context) (figure, error) {
	return func(ctx context.Context) (figure, error) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		prefix := fmt.Sprintf("/registry/progress/%d/%d/", r.round, member)
		c := r.client(member, 2)
		watch := c.Watch(ctx, prefix+"nothing", clientv3.WithCreatedNotify())
		if w := <-watch; w.Err() != nil {
			return figure{}, w.Err()
		}
		var times []time.Duration
		for began, n := time.Now(), 0; time.Since(began) < r.during; n++ {
			rev, err := create(ctx, r.client(0, 0), fmt.Sprintf("%s%d", prefix, n), r.val)
			if err != nil {
				return figure{}, err
			}
			asked := time.Now()
			if err := c.RequestProgress(ctx); err != nil {
				return figure{}, err
			}
			for answered := false; !answered; {
				select {
				case w := <-watch:
					answered = w.Header.Revision >= rev
				case <-time.After(100 * time.Millisecond):
					// An API server asks again at this pace while the answer is too old.
					if time.Since(asked) > 10*time.Second {
						return figure{}, errors.New("no progress was told")
					}
					if err := c.RequestProgress(ctx); err != nil {
						return figure{}, err
					}
				}
			}
			times = append(times, time.Since(asked))
		}
		var f figure
		f.p50, f.p99 = percentiles(times)
		return f, nil
	}
}

// lease measures how much later than its time a key with a lease goes.
func (r *run) lease(ctx context.Context) (figure, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	const keys, ttl = 20, 3
	prefix := fmt.Sprintf("/registry/lease/%d/", r.round)
	watch := r.client(0, 1).Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithFilterPut())
	due := map[string]time.Time{}
	for i := range keys {
		l, err := r.client(0, 0).Grant(ctx, ttl)
		if err != nil {
			return figure{}, err
		}
		key := fmt.Sprintf("%s%d", prefix, i)
		due[key] = time.Now().Add(ttl * time.Second)
		if _, err := r.client(0, 0).Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", 0)).Then(clientv3.OpPut(key, "v", clientv3.WithLease(l.ID))).Else(clientv3.OpGet(key)).Commit(); err != nil {
			return figure{}, err
		}
	}
	var late []time.Duration
	for len(late) < keys {
		w, ok := <-watch
		if !ok || w.Err() != nil {
			return figure{}, fmt.Errorf("%d of %d leases ended: %w", len(late), keys, errors.Join(ctx.Err(), w.Err()))
		}
		for _, e := range w.Events {
			if e.Type == clientv3.EventTypeDelete {
				late = append(late, max(0, time.Since(due[string(e.Kv.Key)])))
			}
		}
	}
	var f figure
	f.p50, f.p99 = percentiles(late)
	return f, nil
}

// watches begins as many watches as an API server holds.
func (r *run) watches(ctx context.Context, n int) {
	for i := range n {
		w := r.client(i, i/2).Watch(clientv3.WithRequireLeader(ctx), fmt.Sprintf("/registry/steady/%d/", i), clientv3.WithPrefix(), clientv3.WithPrevKV())
		go func() {
			for range w { //nolint:revive // read and thrown away
			}
		}()
	}
}

// steady measures the CPU at a load of rate writes and rate reads in each second, with 60
// watches; 0 is the idle datastore.
func (r *run) steady(rate int) func(context.Context) (figure, error) {
	return func(ctx context.Context) (figure, error) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		r.watches(ctx, 60)
		during := 5 * r.during
		before, err := r.usage()
		if err != nil {
			return figure{}, err
		}
		began := time.Now()
		if rate > 0 {
			tick := time.NewTicker(time.Second / time.Duration(rate))
			defer tick.Stop()
			for n := 0; time.Since(began) < during; n++ {
				<-tick.C
				if _, err := create(ctx, r.client(0, n), fmt.Sprintf("/registry/steady/%d/%d/%d", n%60, r.round, n), r.val); err != nil {
					return figure{}, err
				}
				if _, err := r.client(0, n).Get(ctx, fmt.Sprintf("%s%06d", listPrefix, n%listed)); err != nil {
					return figure{}, err
				}
			}
		} else {
			select {
			case <-time.After(during):
			case <-ctx.Done():
				return figure{}, ctx.Err()
			}
		}
		after, err := r.usage()
		return figure{value: 100 * (after.cpu - before.cpu).Seconds() / time.Since(began).Seconds()}, err
	}
}

// perWrite is how many bytes reach the disk for a write of 1 KiB by one caller.
func (r *run) perWrite(ctx context.Context) (figure, error) {
	const writes = 500
	before, err := r.usage()
	if err != nil {
		return figure{}, err
	}
	for n := range writes {
		if _, err := create(ctx, r.client(0, 0), fmt.Sprintf("/registry/bytes/%d/%d", r.round, n), r.val); err != nil {
			return figure{}, err
		}
	}
	after, err := r.usage()
	return figure{value: float64(after.written-before.written) / writes / 1024}, err
}

// commit is how long one write of the log takes, on average, while one caller creates: what is
// between it and the whole call is the target's own time.
func (r *run) commit(ctx context.Context) (figure, error) {
	if r.commits == "" {
		return figure{}, nil
	}
	times, seconds, err := r.committed(ctx)
	if err != nil {
		return figure{}, err
	}
	if _, err := load(ctx, 1, r.during, func(ctx context.Context, _, n int) error {
		_, err := create(ctx, r.client(0, 0), fmt.Sprintf("/registry/commit/%d/%d", r.round, n), r.val)
		return err
	}); err != nil {
		return figure{}, err
	}
	times2, seconds2, err := r.committed(ctx)
	if err != nil || times2 == times {
		return figure{}, err
	}
	return figure{value: 1000 * (seconds2 - seconds) / (times2 - times)}, nil
}

// syncedWrites measures the disk by itself: writes of so many bytes, one after the other and each
// on the disk before the next, over what the file has already.
func syncedWrites(ctx context.Context, dir string, size int, during time.Duration) (figure, error) {
	f, err := os.CreateTemp(dir, "disk-")
	if err != nil {
		return figure{}, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	const blocks = 256
	block := make([]byte, size)
	for i := range block {
		block[i] = byte(i)
	}
	for i := range blocks {
		if _, err := f.WriteAt(block, int64(i*size)); err != nil {
			return figure{}, err
		}
	}
	if err := f.Sync(); err != nil {
		return figure{}, err
	}
	return load(ctx, 1, during, func(_ context.Context, _, n int) error {
		if _, err := f.WriteAt(block, int64(n%blocks*size)); err != nil {
			return err
		}
		return unix.Fdatasync(int(f.Fd()))
	})
}

// resident is the memory of the largest member.
func (r *run) resident(context.Context) (figure, error) {
	u, err := r.usage()
	return figure{value: float64(u.rss) / (1 << 20)}, err
}

// restart measures from the start of all members, stopped before, to the first answered read.
func (r *run) restart(ctx context.Context) (figure, error) {
	if err := r.stop(); err != nil {
		return figure{}, err
	}
	began := time.Now()
	if err := r.start(ctx); err != nil {
		return figure{}, err
	}
	f := figure{value: time.Since(began).Seconds()}
	got, err := r.client(0, 0).Get(ctx, manyPrefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err == nil && got.Count != many {
		err = fmt.Errorf("%d objects after the restart, want %d", got.Count, many)
	}
	return f, err
}

// begin prepares a round: the objects that are listed, in the first one, and in the others a
// compaction, which an API server asks for every five minutes.
func (r *run) begin(ctx context.Context) (figure, error) {
	if r.round == 0 {
		return figure{}, r.fill(ctx, listPrefix, listed)
	}
	return r.compact(ctx)
}

// compact asks for a compaction up to now; kine compacts by itself.
func (r *run) compact(ctx context.Context) (figure, error) {
	if r.name == "kine" {
		return figure{}, nil
	}
	c := r.client(0, 0)
	got, err := c.Get(ctx, listPrefix)
	if err != nil {
		return figure{}, err
	}
	if _, err := c.Compact(ctx, got.Header.Revision); err != nil {
		return figure{}, err
	}
	select {
	case <-time.After(r.during): // it goes on in the background
		return figure{}, nil
	case <-ctx.Done():
		return figure{}, ctx.Err()
	}
}

// many is the number of objects for the memory and start of a large cluster.
const (
	many       = 100_000
	manyPrefix = "/registry/many/"
)

func (r *run) fillMany(ctx context.Context) error { return r.fill(ctx, manyPrefix, many) }
