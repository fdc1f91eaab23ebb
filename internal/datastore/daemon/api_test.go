package daemon

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

func TestKubernetesTransactions(t *testing.T) {
	t.Parallel()
	p := start(t, newDir(t))
	ctx, c := testContext(t), p.client
	create := func(key, value string) *clientv3.TxnResponse {
		t.Helper()
		r, err := c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", 0)).Then(clientv3.OpPut(key, value)).Commit()
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	first := create("/r/a", "1")
	if !first.Succeeded || first.Header.Revision != 3 { // 2 is the health key
		t.Fatalf("create: %v", first)
	}
	if again := create("/r/a", "2"); again.Succeeded || again.Header.Revision != 3 {
		t.Fatalf("create of what exists: %v", again)
	}
	update := func(rev int64, value string) *clientv3.TxnResponse {
		t.Helper()
		r, err := c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision("/r/a"), "=", rev)).
			Then(clientv3.OpPut("/r/a", value)).Else(clientv3.OpGet("/r/a")).Commit()
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := update(3, "2"); !r.Succeeded || r.Header.Revision != 4 {
		t.Fatalf("update: %v", r)
	}
	r := update(3, "3")
	kvs := r.Responses[0].GetResponseRange().Kvs
	if r.Succeeded || r.Header.Revision != 4 || len(kvs) != 1 || string(kvs[0].Value) != "2" || kvs[0].Version != 2 || kvs[0].CreateRevision != 3 {
		t.Fatalf("update of an old revision: %v", r)
	}
	del, err := c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision("/r/a"), "=", 4)).
		Then(clientv3.OpDelete("/r/a")).Else(clientv3.OpGet("/r/a")).Commit()
	if err != nil || !del.Succeeded || del.Header.Revision != 5 {
		t.Fatalf("delete: %v, %v", del, err)
	}
	if r := create("/r/a", "4"); !r.Succeeded || r.Header.Revision != 6 {
		t.Fatalf("create after delete: %v", r)
	}
	got, err := c.Get(ctx, "/r/a")
	if err != nil || got.Kvs[0].Version != 1 || got.Kvs[0].CreateRevision != 6 {
		t.Fatalf("after create: %v, %v", got, err)
	}
	if old, err := c.Get(ctx, "/r/a", clientv3.WithRev(4)); err != nil || string(old.Kvs[0].Value) != "2" || old.Header.Revision != 6 {
		t.Fatalf("read of the past: %v, %v", old, err)
	}
	if none, err := c.Get(ctx, "/r"); err != nil || none.Count != 0 || none.Header.Revision != 6 {
		t.Fatalf("the read for the current revision: %v, %v", none, err)
	}
}

func TestErrorsAreEtcds(t *testing.T) {
	t.Parallel()
	p := start(t, newDir(t))
	ctx, c := testContext(t), p.client
	for i := range 5 {
		if _, err := c.Put(ctx, "/k", fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Compact(ctx, 5); err != nil {
		t.Fatal(err)
	}
	call := func(what string, want error, err error) {
		t.Helper()
		if !errors.Is(err, want) {
			t.Errorf("%s: %v instead of %v", what, err, want)
		}
	}
	_, err := c.Get(ctx, "/k", clientv3.WithRev(100))
	call("future read", rpctypes.ErrFutureRev, err)
	_, err = c.Get(ctx, "/k", clientv3.WithRev(4))
	call("compacted read", rpctypes.ErrCompacted, err)
	_, err = c.Compact(ctx, 5)
	call("second compaction", rpctypes.ErrCompacted, err)
	_, err = c.Compact(ctx, 100)
	call("future compaction", rpctypes.ErrFutureRev, err)
	_, err = c.Put(ctx, "", "x")
	call("empty key", rpctypes.ErrEmptyKey, err)
	_, err = c.Put(ctx, "/k", "x", clientv3.WithLease(77))
	call("unknown lease", rpctypes.ErrLeaseNotFound, err)
	_, err = c.Put(ctx, "/k", strings.Repeat("x", 1600*1024))
	call("large request", rpctypes.ErrRequestTooLarge, err)
	// clientv3 itself refuses to send more than 2 MiB.
	_, err = pb.NewKVClient(c.ActiveConnection()).Put(ctx, &pb.PutRequest{Key: []byte("/k"), Value: make([]byte, 5<<20)})
	if status.Code(err) != codes.ResourceExhausted { // gRPC's own limit, as etcd has it
		t.Errorf("very large request: %v", err)
	}
	_, err = c.Txn(ctx).Then(clientv3.OpPut("/k", "1"), clientv3.OpPut("/k", "2")).Commit()
	call("key put twice", rpctypes.ErrDuplicateKey, err)
	_, err = c.Revoke(ctx, 77)
	call("revoking an unknown lease", rpctypes.ErrLeaseNotFound, err)

	for name, err := range map[string]error{
		"Defragment": ignore(c.Defragment(ctx, p.cfg.Listen)),
		"RoleList":   ignore(c.RoleList(ctx)),
		"HashKV":     ignore(c.HashKV(ctx, p.cfg.Listen, 0)),
	} {
		if status.Code(err) != codes.Unimplemented {
			t.Errorf("%s: %v", name, err)
		}
	}
	got, err := c.Get(ctx, "/k")
	if err != nil || string(got.Kvs[0].Value) != "4" {
		t.Errorf("after all refusals: %v, %v", got, err)
	}
	if _, err := c.Put(ctx, "/big", strings.Repeat("x", 1500*1024)); err != nil {
		t.Errorf("the largest request: %v", err)
	}
}

func ignore[T any](_ T, err error) error { return err }

func TestListsPagesAndStreams(t *testing.T) {
	t.Parallel()
	p := start(t, newDir(t))
	ctx, c := testContext(t), p.client
	const n = 700
	for i := range n {
		if _, err := c.Put(ctx, fmt.Sprintf("/p/%04d", i), strings.Repeat("v", 4000)); err != nil {
			t.Fatal(err)
		}
	}
	now, err := c.Get(ctx, "/p/", clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil || now.Count != n || len(now.Kvs) != 0 || now.More {
		t.Fatalf("count: %v, %v", now, err)
	}
	rev := now.Header.Revision
	if _, err := c.Put(ctx, "/p/0000-later", "x"); err != nil { // must not show in what follows
		t.Fatal(err)
	}
	if _, err := c.Delete(ctx, "/p/0500"); err != nil {
		t.Fatal(err)
	}
	end := clientv3.GetPrefixRangeEnd("/p/")
	key, seen := "/p/", 0
	for {
		r, err := c.Get(ctx, key, clientv3.WithRange(end), clientv3.WithLimit(100), clientv3.WithRev(rev))
		if err != nil {
			t.Fatal(err)
		}
		if r.Count != int64(n-seen) || r.Header.Revision != rev+2 {
			t.Fatalf("page at %s: count %d, revision %d", key, r.Count, r.Header.Revision)
		}
		for _, kv := range r.Kvs {
			if want := fmt.Sprintf("/p/%04d", seen); string(kv.Key) != want {
				t.Fatalf("%s instead of %s", kv.Key, want)
			}
			seen++
		}
		if r.More != (seen < n) {
			t.Fatalf("more is %t after %d", r.More, seen)
		}
		if !r.More {
			break
		}
		key = string(r.Kvs[len(r.Kvs)-1].Key) + "\x00"
	}
	keys, err := c.Get(ctx, "/p/", clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithSort(clientv3.SortByKey, clientv3.SortDescend), clientv3.WithLimit(2))
	if err != nil || len(keys.Kvs) != 2 || string(keys.Kvs[0].Key) != "/p/0699" || keys.Kvs[0].Value != nil || !keys.More {
		t.Fatalf("keys, descending: %v, %v", keys, err)
	}

	kv := pb.NewKVClient(c.ActiveConnection())
	for _, tc := range []struct {
		name string
		req  *pb.RangeRequest
		n    int
		more bool
	}{
		{"all of the past", &pb.RangeRequest{Revision: rev}, n, false},
		{"all", &pb.RangeRequest{}, n, false},
		{"limited", &pb.RangeRequest{Limit: 450}, 450, true},
		{"limit is the number", &pb.RangeRequest{Limit: n}, n, false},
		{"count", &pb.RangeRequest{CountOnly: true}, 0, false},
		{"keys", &pb.RangeRequest{KeysOnly: true}, n, false},
	} {
		tc.req.Key, tc.req.RangeEnd = []byte("/p/"), []byte(end)
		stream, err := kv.RangeStream(ctx, tc.req)
		if err != nil {
			t.Fatal(err)
		}
		var last *pb.RangeResponse
		got, chunks, prev := 0, 0, ""
		for {
			m, err := stream.Recv()
			if err != nil {
				break
			}
			if last != nil && (last.Header != nil || last.More || last.Count != 0) {
				t.Errorf("%s: a chunk before the last has a header", tc.name)
			}
			last = m.RangeResponse
			chunks++
			got += len(last.Kvs)
			for _, kv := range last.Kvs {
				if string(kv.Key) <= prev {
					t.Errorf("%s: %s after %s", tc.name, kv.Key, prev)
				}
				prev = string(kv.Key)
			}
		}
		if last == nil || last.Header.GetRevision() != rev+2 || last.Count != n || got != tc.n || last.More != tc.more {
			t.Errorf("%s: %d keys in %d chunks, last %v", tc.name, got, chunks, last.GetHeader())
		}
		if tc.n == n && !tc.req.KeysOnly && chunks < 2 {
			t.Errorf("%s: %d chunks", tc.name, chunks)
		}
	}
	stream, err := kv.RangeStream(ctx, &pb.RangeRequest{Key: []byte("/p/"), RangeEnd: []byte(end), SortOrder: pb.RangeRequest_DESCEND})
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("a sorted stream: %v", err)
	}
}

func TestWatch(t *testing.T) {
	t.Parallel()
	p := start(t, newDir(t))
	ctx, c := testContext(t), p.client
	first, err := c.Put(ctx, "/w/a", "0")
	if err != nil {
		t.Fatal(err)
	}
	const n = 300
	w := c.Watch(ctx, "/w/", clientv3.WithPrefix(), clientv3.WithRev(first.Header.Revision), clientv3.WithPrevKV(), clientv3.WithCreatedNotify())
	go func() {
		for i := 1; i < n; i++ {
			key := fmt.Sprintf("/w/%c", 'a'+i%3)
			if i%7 == 0 {
				c.Delete(ctx, key)
			} else {
				c.Put(ctx, key, fmt.Sprint(i))
			}
			c.Put(ctx, "/elsewhere", "x")
		}
		c.Put(ctx, "/w/end", "")
	}()
	if r := <-w; !r.Created {
		t.Fatalf("the first answer is %v", r)
	}
	last, live := int64(0), map[string]string{}
	for r := range w {
		if err := r.Err(); err != nil {
			t.Fatal(err)
		}
		for _, ev := range r.Events {
			key := string(ev.Kv.Key)
			if ev.Kv.ModRevision <= last {
				t.Fatalf("revision %d after %d", ev.Kv.ModRevision, last)
			}
			last = ev.Kv.ModRevision
			if last > r.Header.Revision {
				t.Fatalf("an event of %d under the header revision %d", last, r.Header.Revision)
			}
			if key == "/w/end" {
				return
			}
			old, existed := live[key]
			if existed != (ev.PrevKv != nil) || existed && string(ev.PrevKv.Value) != old {
				t.Fatalf("previous value of %s: %v instead of %q", key, ev.PrevKv, old)
			}
			if ev.IsCreate() != (!existed && ev.Type == clientv3.EventTypePut) {
				t.Fatalf("%v: created is wrong", ev)
			}
			delete(live, key)
			if ev.Type == clientv3.EventTypePut {
				live[key] = string(ev.Kv.Value)
			}
		}
	}
	t.Fatal("the watch ended")
}

// Progress with revision R must come after every event up to R, at once.
func TestProgressIsHonestAndPrompt(t *testing.T) {
	t.Parallel()
	p := start(t, newDir(t))
	ctx, c := testContext(t), p.client
	w := c.Watch(ctx, "/p/", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	<-w
	written, seen := int64(0), int64(0)
	for i := range 200 {
		key := "/p/x"
		if i%2 == 0 {
			key = "/other"
		}
		r, err := c.Put(ctx, key, "v")
		if err != nil {
			t.Fatal(err)
		}
		if key == "/p/x" {
			written = r.Header.Revision
		}
		if err := c.RequestProgress(ctx); err != nil {
			t.Fatal(err)
		}
		for done := false; !done; {
			m := <-w
			for _, ev := range m.Events {
				seen = ev.Kv.ModRevision
			}
			if m.IsProgressNotify() {
				if m.Header.Revision >= written && seen < written {
					t.Fatalf("progress %d, but of %d only %d was seen", m.Header.Revision, written, seen)
				}
				done = m.Header.Revision >= r.Header.Revision
			}
		}
	}
}

func TestPeriodicProgress(t *testing.T) {
	t.Parallel()
	p := start(t, newDir(t))
	ctx, c := testContext(t), p.client
	w := c.Watch(ctx, "/p/", clientv3.WithPrefix(), clientv3.WithProgressNotify())
	for i := range 3 { // also after events
		put, err := c.Put(ctx, "/p/x", fmt.Sprint(i))
		if err != nil {
			t.Fatal(err)
		}
		for m := range w {
			if m.IsProgressNotify() && m.Header.Revision >= put.Header.Revision {
				break
			}
		}
	}
	if ctx.Err() != nil {
		t.Fatal("no progress was notified")
	}
}

func TestWatchOfCompactedRevision(t *testing.T) {
	t.Parallel()
	p := start(t, newDir(t))
	ctx, c := testContext(t), p.client
	for i := range 10 {
		if _, err := c.Put(ctx, "/c", fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Compact(ctx, 8); err != nil {
		t.Fatal(err)
	}
	check := func() {
		t.Helper()
		r := <-c.Watch(ctx, "/c", clientv3.WithRev(7))
		if !errors.Is(r.Err(), rpctypes.ErrCompacted) || r.CompactRevision != 8 {
			t.Fatalf("below: %v, %d", r.Err(), r.CompactRevision)
		}
		r = <-c.Watch(ctx, "/c", clientv3.WithRev(8), clientv3.WithPrevKV())
		if r.Err() != nil || len(r.Events) == 0 || r.Events[0].Kv.ModRevision != 8 || r.Events[0].PrevKv != nil {
			t.Fatalf("with previous values, from the compacted revision on: %v", r)
		}
		r = <-c.Watch(ctx, "/c", clientv3.WithRev(8))
		if r.Err() != nil || len(r.Events) == 0 || r.Events[0].Kv.ModRevision != 8 {
			t.Fatalf("from the compacted revision on: %v", r)
		}
		r = <-c.Watch(ctx, "/c", clientv3.WithRev(9), clientv3.WithPrevKV())
		if r.Err() != nil || len(r.Events) == 0 || r.Events[0].Kv.ModRevision != 9 || r.Events[0].PrevKv == nil {
			t.Fatalf("from the next revision on: %v", r)
		}
	}
	check()
	p.stop()
	p = start(t, p.cfg.StorageDir)
	c = p.client
	check()
}

func TestLeases(t *testing.T) {
	t.Parallel()
	p := start(t, newDir(t))
	ctx, c := testContext(t), p.client
	grant := func(ttl int64) clientv3.LeaseID {
		t.Helper()
		l, err := c.Grant(ctx, ttl)
		if err != nil {
			t.Fatal(err)
		}
		return l.ID
	}
	put := func(key string, id clientv3.LeaseID) {
		t.Helper()
		if _, err := c.Put(ctx, key, "v", clientv3.WithLease(id)); err != nil {
			t.Fatal(err)
		}
	}
	begin := time.Now()
	short, long := grant(2), grant(3600)
	w := c.Watch(ctx, "/l/", clientv3.WithPrefix(), clientv3.WithPrevKV(), clientv3.WithFilterPut())
	put("/l/a", short)
	put("/l/b", short)
	put("/l/stays", long)
	put("/l/detached", short)
	if _, err := c.Put(ctx, "/l/detached", "v"); err != nil {
		t.Fatal(err)
	}
	var gone []string
	for len(gone) < 2 {
		r := <-w
		if r.Err() != nil {
			t.Fatal(r.Err())
		}
		for _, ev := range r.Events {
			if time.Since(begin) < 2*time.Second {
				t.Errorf("%s was deleted early", ev.Kv.Key)
			}
			if ev.PrevKv == nil {
				t.Errorf("no previous value of %s", ev.Kv.Key)
			}
			gone = append(gone, fmt.Sprintf("%s@%d", ev.Kv.Key, ev.Kv.ModRevision))
		}
	}
	left, err := c.Get(ctx, "/l/", clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil || len(left.Kvs) != 2 {
		t.Fatalf("left: %v, %v; gone: %v", left, err, gone)
	}
	if _, err := c.Put(ctx, "/l/late", "v", clientv3.WithLease(short)); !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		t.Errorf("the ended lease: %v", err)
	}
	if _, err := c.Revoke(ctx, long); err != nil {
		t.Fatal(err)
	}
	left, err = c.Get(ctx, "/l/", clientv3.WithPrefix())
	if err != nil || len(left.Kvs) != 1 || string(left.Kvs[0].Key) != "/l/detached" {
		t.Fatalf("after the revocation: %v, %v", left, err)
	}

	// Across a restart a lease starts again, and ends.
	again := grant(1)
	put("/l/again", again)
	p.stop()
	p = start(t, p.cfg.StorageDir)
	c = p.client
	ttl, err := c.TimeToLive(ctx, again, clientv3.WithAttachedKeys())
	if err != nil || ttl.GrantedTTL != 2 || len(ttl.Keys) != 1 {
		t.Fatalf("after the restart: %v, %v", ttl, err)
	}
	for r := range c.Watch(ctx, "/l/again", clientv3.WithRev(1), clientv3.WithFilterPut()) {
		if r.Err() != nil {
			t.Fatal(r.Err())
		}
		if len(r.Events) > 0 {
			return
		}
	}
	t.Fatal("the lease did not end")
}

func TestStatusMembersAndHealth(t *testing.T) {
	t.Parallel()
	p := start(t, newDir(t))
	ctx, c := testContext(t), p.client
	st, err := c.Status(ctx, p.cfg.Listen)
	if err != nil || st.DbSize <= 0 || st.DbSizeInUse > st.DbSize || !strings.HasPrefix(st.Version, "3.7.") || st.Leader != st.Header.MemberId {
		t.Errorf("status: %v, %v", st, err)
	}
	members, err := c.MemberList(ctx)
	if err != nil || len(members.Members) != 1 || members.Members[0].ClientURLs[0] != p.cfg.Listen {
		t.Errorf("members: %v, %v", members, err)
	}
	h, err := healthpb.NewHealthClient(c.ActiveConnection()).Check(ctx, &healthpb.HealthCheckRequest{})
	if err != nil || h.Status != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health: %v, %v", h, err)
	}
	got, err := c.Get(ctx, HealthKey)
	if err != nil || len(got.Kvs) != 1 || string(got.Kvs[0].Value) != HealthValue {
		t.Errorf("the health key: %v, %v", got, err)
	}
}

// Writes of many callers at once: one revision each, and none lost over a restart.
func TestConcurrentWritersAndRestart(t *testing.T) {
	t.Parallel()
	p := start(t, newDir(t))
	ctx, c := testContext(t), p.client
	const writers, each = 32, 50
	type ack struct {
		key string
		rev int64
	}
	acks := make(chan ack, writers*each)
	errs := make(chan error, writers)
	for w := range writers {
		go func() {
			for i := range each {
				key := fmt.Sprintf("/c/%d/%d", w, i)
				r, err := c.Put(ctx, key, key)
				if err != nil {
					errs <- err
					return
				}
				acks <- ack{key, r.Header.Revision}
			}
			errs <- nil
		}()
	}
	for range writers {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	close(acks)
	revs := map[int64]string{}
	p.stop()
	p = start(t, p.cfg.StorageDir)
	all, err := p.client.Get(ctx, "/c/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	stored := map[string]int64{}
	for _, kv := range all.Kvs {
		stored[string(kv.Key)] = kv.ModRevision
	}
	for a := range acks {
		if other, twice := revs[a.rev]; twice {
			t.Errorf("revision %d is of %s and %s", a.rev, other, a.key)
		}
		revs[a.rev] = a.key
		if stored[a.key] != a.rev {
			t.Errorf("%s is at %d instead of %d", a.key, stored[a.key], a.rev)
		}
	}
	if all.Header.Revision != 2+writers*each {
		t.Errorf("revision %d after %d writes", all.Header.Revision, writers*each)
	}
}

// The compaction protocol of API servers, and that the revision survives the compaction of
// its own deletion.
func TestCompactionKeepsRevision(t *testing.T) {
	t.Parallel()
	p := start(t, newDir(t))
	ctx, c := testContext(t), p.client
	compactTxn := func(version int64, rev string) *clientv3.TxnResponse {
		t.Helper()
		r, err := c.Txn(ctx).If(clientv3.Compare(clientv3.Version("compact_rev_key"), "=", version)).
			Then(clientv3.OpPut("compact_rev_key", rev)).Else(clientv3.OpGet("compact_rev_key")).Commit()
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := compactTxn(0, "0"); !r.Succeeded {
		t.Fatal("the first")
	}
	r := compactTxn(0, "5")
	if r.Succeeded || string(r.Responses[0].GetResponseRange().Kvs[0].Value) != "0" {
		t.Fatalf("a lost race: %v", r)
	}
	for i := range 50 {
		if _, err := c.Put(ctx, fmt.Sprintf("/k%d", i%5), "v"); err != nil {
			t.Fatal(err)
		}
	}
	del, err := c.Delete(ctx, "/k0")
	if err != nil {
		t.Fatal(err)
	}
	rev := del.Header.Revision
	if r := compactTxn(1, fmt.Sprint(rev)); !r.Succeeded || r.Header.Revision != rev+1 {
		t.Fatalf("%v", r)
	}
	if _, err := c.Compact(ctx, rev+1); err != nil {
		t.Fatal(err)
	}
	del, err = c.Delete(ctx, "compact_rev_key")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Compact(ctx, del.Header.Revision); err != nil {
		t.Fatal(err)
	}
	p.stop()
	p = start(t, p.cfg.StorageDir)
	got, err := p.client.Get(ctx, "/k", clientv3.WithPrefix())
	if err != nil || got.Count != 4 || got.Header.Revision != del.Header.Revision {
		t.Fatalf("after the restart: %d keys at %d instead of %d, %v", got.Count, got.Header.Revision, del.Header.Revision, err)
	}
	put, err := p.client.Put(ctx, "/k0", "new")
	if err != nil || put.Header.Revision != del.Header.Revision+1 {
		t.Fatalf("%v, %v", put, err)
	}
}

func TestSlowWatcherLosesNothing(t *testing.T) {
	t.Parallel()
	p := start(t, newDir(t))
	ctx, c := testContext(t), p.client
	// A stream that is not read, beside a client that is: clientv3 would read for us.
	stream, err := pb.NewWatchClient(c.ActiveConnection()).Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("/s/"), RangeEnd: []byte("/s0")}}}); err != nil {
		t.Fatal(err)
	}
	const n = 400
	value := strings.Repeat("x", 16<<10)
	for i := range n {
		if _, err := c.Put(ctx, fmt.Sprintf("/s/%d", i), value); err != nil {
			t.Fatal(err)
		}
	}
	seen, last := 0, int64(0)
	for seen < n {
		m, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		for _, ev := range m.Events {
			if ev.Kv.ModRevision <= last {
				t.Fatalf("%d after %d", ev.Kv.ModRevision, last)
			}
			last = ev.Kv.ModRevision
			seen++
		}
	}
}

func TestManyWatchesOnOneStream(t *testing.T) {
	t.Parallel()
	p := start(t, newDir(t))
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(testContext(t)))
	defer cancel()
	const n = 50
	var chans [n]clientv3.WatchChan
	for i := range chans {
		chans[i] = p.client.Watch(ctx, fmt.Sprintf("/m/%d/", i), clientv3.WithPrefix(), clientv3.WithCreatedNotify())
		if r := <-chans[i]; !r.Created {
			t.Fatal(r)
		}
	}
	for i := range chans {
		if _, err := p.client.Put(ctx, fmt.Sprintf("/m/%d/x", i), fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	for i, ch := range chans {
		r := <-ch
		if len(r.Events) != 1 || string(r.Events[0].Kv.Value) != fmt.Sprint(i) {
			t.Errorf("watch %d: %v", i, r)
		}
	}
}
