package daemon

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"microk8s/internal/datastore/peers"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
)

// fillQuota puts large values until they are refused, and returns how many were taken.
func fillQuota(t *testing.T, c *clientv3.Client) int {
	t.Helper()
	for i := range 10000 {
		_, err := c.Put(testContext(t), fmt.Sprintf("/registry/configmaps/default/%05d", i), strings.Repeat("v", 100<<10))
		if errors.Is(err, rpctypes.ErrNoSpace) {
			return i
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Fatal("nothing was refused")
	return 0
}

func alarms(t *testing.T, c *clientv3.Client) int {
	t.Helper()
	r, err := c.AlarmList(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	return len(r.Alarms)
}

func wantNoSpace(t *testing.T, c *clientv3.Client) {
	t.Helper()
	if _, err := c.Put(testContext(t), "/registry/small", "v"); !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Errorf("a put is answered with %v", err)
	}
	if _, err := c.Grant(testContext(t), 100); !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Errorf("a lease is answered with %v", err)
	}
	if r, err := c.Get(testContext(t), "/registry/configmaps/default/00000"); err != nil || r.Count != 1 {
		t.Errorf("a read: %v, %v", r, err)
	}
}

// free deletes what fillQuota has put, as an API server would, and compacts.
func free(t *testing.T, c *clientv3.Client) {
	t.Helper()
	const prefix = "/registry/configmaps/default/"
	r, err := c.Txn(testContext(t)).If(clientv3.Compare(clientv3.Version(prefix+"00000"), ">", 0)).
		Then(clientv3.OpDelete(prefix, clientv3.WithPrefix())).Else(clientv3.OpGet(prefix + "00000")).Commit()
	if err != nil || !r.Succeeded {
		t.Fatalf("a deletion beyond the quota: %v, %v", r, err)
	}
	put := func() { // what the compaction keeps is the version before
		if _, err := c.Delete(testContext(t), "/registry/health"); err != nil {
			t.Fatal(err)
		}
	}
	put()
	last, err := c.Get(testContext(t), "/")
	if err == nil {
		_, err = c.Compact(testContext(t), last.Header.Revision)
	}
	if err != nil {
		t.Fatalf("a compaction beyond the quota: %v", err)
	}
}

// Beyond the quota writes that grow the data are refused until somebody has made room and has ended the
// alarm; a daemon that is over it starts.
func TestQuota(t *testing.T) {
	t.Parallel()
	cfg := config(newDir(t))
	cfg.Quota = 3 << 20
	p := startConfig(t, cfg)
	n := fillQuota(t, p.client)
	if n < 25 || n > 30 {
		t.Errorf("%d values of 100 KiB fit into 3 MiB", n)
	}
	wantNoSpace(t, p.client)
	if alarms(t, p.client) != 1 {
		t.Error("there is no alarm")
	}
	s, err := p.client.Status(testContext(t), cfg.Listen)
	if err != nil || s.DbSizeQuota != cfg.Quota || len(s.Errors) != 1 || !strings.Contains(s.Errors[0], "NOSPACE") {
		t.Errorf("status: %v, %v", s, err)
	}

	// With a smaller quota it is over it from the start on.
	p.stop()
	cfg = config(cfg.StorageDir)
	cfg.Quota = 1 << 20
	p = startConfig(t, cfg)
	wantNoSpace(t, p.client)
	members, err := peers.Members(testContext(t), cfg.StorageDir)
	if err != nil || members[0].Space == nil {
		t.Fatalf("%+v, %v", members, err)
	}
	space := members[0].Space
	if !space.Refused || space.Quota != cfg.Quota || space.Bytes < 2<<20 || len(space.Largest) == 0 ||
		space.Largest[0].Prefix != "/registry/configmaps/" || space.Largest[0].Keys != n || space.Largest[0].Bytes < 2<<20 {
		t.Errorf("%+v", space)
	}

	free(t, p.client)
	wantNoSpaceStill := func() {
		if _, err := p.client.Put(testContext(t), "/registry/small", "v"); !errors.Is(err, rpctypes.ErrNoSpace) {
			t.Errorf("before the alarm is ended: %v", err)
		}
	}
	wantNoSpaceStill()
	var out strings.Builder
	command := NewCommand([]string{"alarm", "disarm", "--endpoint", cfg.Listen}, nil, nil)
	command.SetOut(&out)
	if err := command.ExecuteContext(testContext(t)); err != nil || !strings.Contains(out.String(), "NOSPACE") || alarms(t, p.client) != 0 {
		t.Fatalf("disarm: %v, %s", err, &out)
	}
	if _, err := p.client.Put(testContext(t), "/registry/small", "v"); err != nil {
		t.Errorf("after the alarm: %v", err)
	}
	if fillQuota(t, p.client) < 5 {
		t.Error("the deletions have made no room")
	}
}

// The alarm is every member's, and outlives all of them.
func TestQuotaOfMembers(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, "--quota-backend-bytes", "2000000")
	writer := c.members[1]
	fillQuota(t, writer.client)
	for _, m := range c.members {
		wantNoSpace(t, m.client)
		if alarms(t, m.client) != 1 {
			t.Errorf("%s knows of no alarm", m.address)
		}
		within(t, "the member says so", func() bool {
			for _, o := range m.list(t) {
				if o.Self && o.Space != nil {
					return o.Space.Refused && len(o.Space.Largest) > 0
				}
			}
			return false
		})
	}
	for _, m := range c.members { // as a power cut ends them
		m.kill(t)
	}
	for _, m := range c.members {
		c.launch(m)
	}
	for _, m := range c.members {
		c.serves(m)
	}
	for _, m := range c.members {
		within(t, "a refusal after the restart", func() bool {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			_, err := m.client.Put(ctx, "/registry/small", "v")
			if err == nil {
				t.Fatal("the put was taken")
			}
			return errors.Is(err, rpctypes.ErrNoSpace)
		})
	}
	free(t, c.members[2].client)
	if _, err := c.members[0].client.AlarmDisarm(testContext(t), &clientv3.AlarmMember{}); err != nil {
		t.Fatal(err)
	}
	for _, m := range c.members {
		if _, err := m.client.Put(testContext(t), "/registry/small", "v"); err != nil {
			t.Errorf("after the alarm, at %s: %v", m.address, err)
		}
	}
}

// What a real etcd beyond its quota refuses and what it goes on with, the daemon does as well. Where the quota
// is reached differs, because etcd counts its file.
func TestQuotaIsAsInEtcd(t *testing.T) {
	t.Parallel()
	const quota = 4 << 20
	cfg := config(newDir(t))
	cfg.Quota = quota
	startConfig(t, cfg)
	etcd, daemon := startEtcd(t, "--quota-backend-bytes", fmt.Sprint(quota)), rawConn(t, cfg.Listen)
	big := request{msg: &pb.PutRequest{Key: []byte("a"), Value: make([]byte, 100<<10)}}
	for _, c := range []*grpc.ClientConn{etcd, daemon} {
		if _, err := (request{msg: &pb.LeaseGrantRequest{ID: 5, TTL: 1000}}).send(testContext(t), c); err != nil {
			t.Fatal(err)
		}
		for i := 0; ; i++ {
			_, err := big.send(testContext(t), c)
			if errors.Is(rpctypes.Error(err), rpctypes.ErrNoSpace) {
				break
			}
			if err != nil || i > 1000 {
				t.Fatalf("after %d puts: %v", i, err)
			}
		}
	}
	put := &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("b")}}}
	del := &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte("a")}}}
	for _, r := range []request{
		big,
		{msg: &pb.PutRequest{Key: []byte("b")}},
		{msg: &pb.PutRequest{Key: []byte("b"), Lease: 77}},
		{msg: &pb.TxnRequest{Success: []*pb.RequestOp{put}}},
		{msg: &pb.TxnRequest{Failure: []*pb.RequestOp{put}}},
		{msg: &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{Success: []*pb.RequestOp{put}}}}}}},
		{msg: &pb.LeaseGrantRequest{ID: 6, TTL: 100}},
		{msg: &pb.LeaseKeepAliveRequest{ID: 5}},
		{msg: &pb.LeaseRevokeRequest{ID: 5}},
		{msg: &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte{0}, KeysOnly: true}},
		{msg: &pb.CompactionRequest{Revision: 5}},
		{msg: &pb.TxnRequest{Success: []*pb.RequestOp{del}}},
		{msg: &pb.DeleteRangeRequest{Key: []byte("b")}},
		{msg: &pb.AlarmRequest{Alarm: pb.AlarmType_NOSPACE}},
		{msg: &pb.AlarmRequest{Alarm: pb.AlarmType_CORRUPT}},
		{msg: &pb.StatusRequest{}},
		{msg: &pb.AlarmRequest{Action: pb.AlarmRequest_DEACTIVATE, Alarm: pb.AlarmType_NOSPACE}},
	} {
		answer := func(c *grpc.ClientConn) string {
			a, err := r.send(testContext(t), c)
			// Who was first to be full, and how many puts that took, is different.
			return regexp.MustCompile(`(?i)(revision|version|memberID): ?\d+`).ReplaceAllString(comparableText(a, err), "$1")
		}
		if want, got := answer(etcd), answer(daemon); want != got {
			t.Errorf("%s\n-- etcd:\n%s\n-- the daemon:\n%s", r, want, got)
		}
	}
}
