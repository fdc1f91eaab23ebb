// Package migrator copies a datastore to a backup (package backup) and back, over the etcd
// API: our own daemon, upstream's, or etcd itself. It is the subcommand `k8s-dqlite migrator`.
package migrator

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"microk8s/internal/datastore/backup"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Prefix is that of the keys which are backed up. It leaves out what API servers agree on
// among themselves (compact_rev_key).
const Prefix = "/"

const (
	page     = 500 // keys of one read
	attempts = 5
	pause    = 50 * time.Millisecond // between two attempts
	writers  = 16                    // the datastore commits what waits as one group
)

// scan calls fn with all keys at one revision, in order. When that revision is compacted
// meanwhile, it begins again; restart is called before.
func scan(ctx context.Context, c *clientv3.Client, restart func() error, fn func(*mvccpb.KeyValue) error) (revision int64, err error) {
	for attempt := 1; ; attempt++ {
		if err := restart(); err != nil {
			return 0, err
		}
		revision, err = scanOnce(ctx, c, fn)
		if errors.Is(err, rpctypes.ErrCompacted) && attempt < attempts {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("cannot read the datastore: %w", err)
		}
		return revision, nil
	}
}

func scanOnce(ctx context.Context, c *clientv3.Client, fn func(*mvccpb.KeyValue) error) (revision int64, err error) {
	end := clientv3.GetPrefixRangeEnd(Prefix)
	total, seen := int64(0), int64(0)
	for key := Prefix; ; {
		opts := []clientv3.OpOption{clientv3.WithRange(end), clientv3.WithLimit(page), clientv3.WithRev(revision)}
		r, err := c.Get(ctx, key, opts...)
		if err != nil {
			return 0, err
		}
		if revision == 0 {
			revision, total = r.Header.Revision, r.Count
		}
		for _, kv := range r.Kvs {
			if err := fn(kv); err != nil {
				return 0, err
			}
		}
		seen += int64(len(r.Kvs))
		if !r.More {
			break
		}
		if len(r.Kvs) == 0 {
			return 0, errors.New("a page has no keys, and there are more")
		}
		key = string(r.Kvs[len(r.Kvs)-1].Key) + "\x00"
	}
	if seen != total {
		return 0, fmt.Errorf("%d keys were read, and the datastore has %d", seen, total)
	}
	return revision, nil
}

// Backup writes all keys as of one revision into a new directory and checks what was written.
func Backup(ctx context.Context, c *clientv3.Client, dir string, log *slog.Logger) (*backup.Manifest, error) {
	// The number of keys is known only afterwards, and a compaction may make it begin again,
	// so the keys are kept until all are there.
	var kvs []*mvccpb.KeyValue
	revision, err := scan(ctx, c, func() error { kvs = kvs[:0]; return nil }, func(kv *mvccpb.KeyValue) error {
		kvs = append(kvs, kv)
		return nil
	})
	if err != nil {
		return nil, err
	}
	log.Debug("keys read", "keys", len(kvs), "revision", revision)
	w, err := backup.Create(dir)
	if err != nil {
		return nil, err
	}
	ttls := map[int64]int64{}
	for _, kv := range kvs {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		ttl, known := ttls[kv.Lease]
		if kv.Lease != 0 && !known {
			ttl, err = ttlOf(ctx, c, kv.Lease)
			if err != nil {
				return nil, err
			}
			ttls[kv.Lease] = ttl
		}
		if err := w.Add(backup.Pair{Key: kv.Key, Value: kv.Value, TTL: ttl}); err != nil {
			return nil, err
		}
	}
	return w.Close(revision, time.Now())
}

// ttlOf returns a lease's TTL as granted. A lease that ended meanwhile has its keys end soon
// after a restore. Upstream's daemon cannot be asked: its leases are their TTL.
func ttlOf(ctx context.Context, c *clientv3.Client, id int64) (int64, error) {
	r, err := c.TimeToLive(ctx, clientv3.LeaseID(id))
	switch {
	case errors.Is(err, rpctypes.ErrLeaseNotFound) || err == nil && r.GrantedTTL <= 0:
		return 1, nil
	case err != nil && id < 1<<31:
		return id, nil
	case err != nil:
		return 0, fmt.Errorf("cannot read a lease: %w", err)
	}
	return r.GrantedTTL, nil
}

// Result says what a restore has done.
type Result struct {
	Keys      int   // in the backup
	Written   int   // had to be written; the others were as in the backup
	Deleted   int   // were not in the backup
	Kept      int   // of the backup were left as they are now: they would undo what was revoked since
	Contended int   // have been changed by somebody else since
	Revision  int64 // of the datastore afterwards
}

type current struct {
	rev int64
	sum [sha256.Size]byte
}

// Restore makes every key of the backup as it was, and with prune deletes the keys that are
// not in it, except those that say what was revoked (see kept). It may be repeated. Any key that fails makes it fail, after all others were
// tried. Afterwards everything is read again and compared.
func Restore(ctx context.Context, c *clientv3.Client, set *backup.Set, prune bool, log *slog.Logger) (*Result, error) {
	return fill(ctx, c, set, prune, kept, log)
}

// Copy makes a datastore hold exactly what the backup has, every key of it, and nothing else. It is for
// a datastore that serves no cluster: see Restore for one that does.
func Copy(ctx context.Context, c *clientv3.Client, set *backup.Set, log *slog.Logger) (*Result, error) {
	none := func(map[string]current) func(string) bool { return func(string) bool { return false } }
	return fill(ctx, c, set, true, none, log)
}

// RestoreCluster is Restore with prune for an archive that becomes this cluster, or a running cluster's past:
// what belongs to machines and their admission stays as it is now, too (backup.Elsewhere).
func RestoreCluster(ctx context.Context, c *clientv3.Client, set *backup.Set, log *slog.Logger) (*Result, error) {
	rule := func(map[string]current) func(string) bool { return backup.Elsewhere }
	return fill(ctx, c, set, true, rule, log)
}

// fill is Restore with the rule that says, from what the datastore has, which keys stay as they are.
func fill(ctx context.Context, c *clientv3.Client, set *backup.Set, prune bool, rule func(map[string]current) func(string) bool, log *slog.Logger) (*Result, error) {
	have, _, err := inventory(ctx, c)
	if err != nil {
		return nil, err
	}
	keep := rule(have)
	r := restore{c: c, leases: map[int64]clientv3.LeaseID{}, wrote: map[string]written{}}
	type task struct {
		p   backup.Pair
		del bool
	}
	tasks := make(chan task)
	var wg sync.WaitGroup
	for range writers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for t := range tasks {
				if err := r.apply(ctx, t.p, t.del); err != nil {
					r.failed.Add(1)
					log.Error("a key failed", "key", string(t.p.Key), "err", err)
					r.mu.Lock()
					r.err = fmt.Errorf("%s: %w", t.p.Key, err)
					r.mu.Unlock()
				}
			}
		}()
	}
	res := &Result{Keys: set.Manifest.Keys}
	inBackup := make(map[string]bool, set.Manifest.Keys)
	var readErr error
	for n := range set.Manifest.Keys {
		p, err := set.Pair(n)
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			readErr = err
			break
		}
		if keep(string(p.Key)) {
			res.Kept++
			continue
		}
		inBackup[string(p.Key)] = true
		if old, ok := have[string(p.Key)]; ok && p.TTL == 0 && old.sum == sha256.Sum256(p.Value) {
			continue
		}
		res.Written++
		tasks <- task{p: p}
	}
	if prune && readErr == nil {
		for k := range have {
			if !inBackup[k] && !keep(k) {
				res.Deleted++
				tasks <- task{p: backup.Pair{Key: []byte(k)}, del: true}
			}
		}
	}
	close(tasks)
	wg.Wait()
	if readErr != nil {
		return nil, readErr
	}
	if n := r.failed.Load(); n > 0 {
		return nil, fmt.Errorf("%d of %d keys could not be restored, among them %w; run the restore again", n, res.Written+res.Deleted, r.err)
	}
	return res, r.verify(ctx, set, prune, keep, inBackup, have, res)
}

// inventory reads what there is.
func inventory(ctx context.Context, c *clientv3.Client) (map[string]current, int64, error) {
	var have map[string]current
	rev, err := scan(ctx, c, func() error { have = map[string]current{}; return nil }, func(kv *mvccpb.KeyValue) error {
		have[string(kv.Key)] = current{kv.ModRevision, sha256.Sum256(kv.Value)}
		return nil
	})
	return have, rev, err
}

type written struct {
	rev int64
	ttl int64
}

type restore struct {
	c      *clientv3.Client
	failed atomic.Int64

	mu     sync.Mutex
	err    error
	leases map[int64]clientv3.LeaseID // by TTL
	wrote  map[string]written
}

func (r *restore) lease(ctx context.Context, ttl int64) (clientv3.LeaseID, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if id, ok := r.leases[ttl]; ok {
		return id, nil
	}
	l, err := r.c.Grant(ctx, ttl)
	if err != nil {
		return 0, fmt.Errorf("cannot make a lease: %w", err)
	}
	r.leases[ttl] = l.ID
	return l.ID, nil
}

// apply writes or deletes one key, in the transactions that an API server uses: upstream's
// daemon knows no others.
func (r *restore) apply(ctx context.Context, p backup.Pair, del bool) (err error) {
	for attempt := 1; ; attempt++ {
		var rev int64
		if rev, err = r.once(ctx, p, del); err == nil {
			r.mu.Lock()
			r.wrote[string(p.Key)] = written{rev, p.TTL}
			r.mu.Unlock()
			return nil
		}
		if attempt == attempts || ctx.Err() != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
	}
}

var errChanged = errors.New("it is being changed by somebody else; stop what writes it, or try again")

func (r *restore) once(ctx context.Context, p backup.Pair, del bool) (int64, error) {
	key := string(p.Key)
	var opts []clientv3.OpOption
	if p.TTL > 0 {
		id, err := r.lease(ctx, p.TTL)
		if err != nil {
			return 0, err
		}
		opts = append(opts, clientv3.WithLease(id))
	}
	got, err := r.c.Get(ctx, key, clientv3.WithLimit(1))
	if err != nil {
		return 0, err
	}
	rev := int64(0)
	if len(got.Kvs) > 0 {
		rev = got.Kvs[0].ModRevision
	}
	op := clientv3.OpPut(key, string(p.Value), opts...)
	if del {
		if rev == 0 {
			return got.Header.Revision, nil
		}
		op = clientv3.OpDelete(key)
	}
	txn := r.c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", rev)).Then(op)
	if rev > 0 {
		txn = txn.Else(clientv3.OpGet(key))
	}
	t, err := txn.Commit()
	switch {
	case err != nil:
		return 0, err
	case !t.Succeeded:
		return 0, errChanged
	}
	return t.Header.Revision, nil
}

// verify reads everything again. A difference is an error, unless somebody else has written
// the key since: API servers may be running.
func (r *restore) verify(ctx context.Context, set *backup.Set, prune bool, keep func(string) bool, inBackup map[string]bool, before map[string]current, res *Result) error {
	after, rev, err := inventory(ctx, r.c)
	if err != nil {
		return err
	}
	res.Revision = rev
	for n := range set.Manifest.Keys {
		p, err := set.Pair(n)
		if err != nil {
			return err
		}
		key := string(p.Key)
		if keep(key) {
			continue
		}
		got, ok := after[key]
		if ok && got.sum == sha256.Sum256(p.Value) {
			continue
		}
		last := max(r.wrote[key].rev, before[key].rev)
		switch {
		case ok && got.rev > last, !ok && p.TTL > 0:
			res.Contended++
		case !ok:
			// It was there, and deleted: what the datastore says of its own past decides.
			old, err := r.c.Get(ctx, key, clientv3.WithRev(last), clientv3.WithLimit(1))
			if err != nil || len(old.Kvs) == 0 || !bytes.Equal(old.Kvs[0].Value, p.Value) {
				return fmt.Errorf("%s is missing after the restore; run the restore again", key)
			}
			res.Contended++
		default:
			return fmt.Errorf("%s differs from the backup after the restore; run the restore again", key)
		}
	}
	if prune {
		for key, got := range after {
			if inBackup[key] || keep(key) {
				continue
			}
			if w, ok := r.wrote[key]; ok && got.rev <= w.rev {
				return fmt.Errorf("%s is there after its deletion; run the restore again", key)
			}
			res.Contended++
		}
	}
	return nil
}
