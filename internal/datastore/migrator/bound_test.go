package migrator

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// TestFrozenDatastore asks one that takes connections and never answers.
func TestFrozenDatastore(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := clientv3.New(clientv3.Config{
		Endpoints: []string{l.Addr().String()}, Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const wait = 100 * time.Millisecond
	kv, lease := boundKV{c.KV, wait}, boundLease{c.Lease, wait}
	for name, call := range map[string]func(context.Context) error{
		"a read": func(ctx context.Context) error { _, err := kv.Get(ctx, "/x"); return err },
		"a write": func(ctx context.Context) error {
			_, err := kv.Txn(ctx).Then(clientv3.OpPut("/x", "y")).Commit()
			return err
		},
		"a lease":  func(ctx context.Context) error { _, err := lease.Grant(ctx, 1); return err },
		"its time": func(ctx context.Context) error { _, err := lease.TimeToLive(ctx, 1); return err },
	} {
		if err := call(t.Context()); err == nil || !strings.Contains(err.Error(), "microk8s logs k8s-dqlite") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
