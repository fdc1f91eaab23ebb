package migrator

import (
	"context"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// answerTimeout is how long the datastore may take for one request. The client would wait for a
// frozen one for ever.
const answerTimeout = 30 * time.Second

// bounded calls do with a context that ends after wait.
func bounded[T any](ctx context.Context, wait time.Duration, do func(context.Context) (T, error)) (T, error) {
	limited, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	v, err := do(limited)
	if err != nil && limited.Err() != nil && ctx.Err() == nil {
		return v, fmt.Errorf("the datastore did not answer within %s; see: microk8s status, and microk8s logs k8s-dqlite", wait)
	}
	return v, err
}

// boundKV is a clientv3.KV whose requests end.
type boundKV struct {
	clientv3.KV
	wait time.Duration
}

// Get implements clientv3.KV.
func (b boundKV) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	return bounded(ctx, b.wait, func(ctx context.Context) (*clientv3.GetResponse, error) { return b.KV.Get(ctx, key, opts...) })
}

// Txn implements clientv3.KV.
func (b boundKV) Txn(ctx context.Context) clientv3.Txn {
	return &boundTxn{ctx: ctx, kv: b.KV, wait: b.wait}
}

// boundTxn collects a transaction and sends it with a limit.
type boundTxn struct {
	ctx         context.Context
	kv          clientv3.KV
	wait        time.Duration
	cmps        []clientv3.Cmp
	then, other []clientv3.Op
}

func (t *boundTxn) If(cs ...clientv3.Cmp) clientv3.Txn   { t.cmps = append(t.cmps, cs...); return t }
func (t *boundTxn) Then(ops ...clientv3.Op) clientv3.Txn { t.then = append(t.then, ops...); return t }
func (t *boundTxn) Else(ops ...clientv3.Op) clientv3.Txn { t.other = append(t.other, ops...); return t }

// Commit implements clientv3.Txn.
func (t *boundTxn) Commit() (*clientv3.TxnResponse, error) {
	return bounded(t.ctx, t.wait, func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return t.kv.Txn(ctx).If(t.cmps...).Then(t.then...).Else(t.other...).Commit()
	})
}

// boundLease is a clientv3.Lease whose requests end.
type boundLease struct {
	clientv3.Lease
	wait time.Duration
}

// Grant implements clientv3.Lease.
func (b boundLease) Grant(ctx context.Context, ttl int64) (*clientv3.LeaseGrantResponse, error) {
	return bounded(ctx, b.wait, func(ctx context.Context) (*clientv3.LeaseGrantResponse, error) { return b.Lease.Grant(ctx, ttl) })
}

// TimeToLive implements clientv3.Lease.
func (b boundLease) TimeToLive(ctx context.Context, id clientv3.LeaseID, opts ...clientv3.LeaseOption) (*clientv3.LeaseTimeToLiveResponse, error) {
	return bounded(ctx, b.wait, func(ctx context.Context) (*clientv3.LeaseTimeToLiveResponse, error) {
		return b.Lease.TimeToLive(ctx, id, opts...)
	})
}
