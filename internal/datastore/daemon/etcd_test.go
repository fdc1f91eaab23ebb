package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// The daemon beside a real etcd: both get the same random requests, valid and invalid, and every field of
// the answers is compared.

// notCompared are the fields that cannot be the same, each with the reason. All others are compared.
var notCompared = map[protoreflect.FullName]string{
	"etcdserverpb.ResponseHeader.cluster_id":       "it names the cluster",
	"etcdserverpb.ResponseHeader.member_id":        "it names the member",
	"etcdserverpb.ResponseHeader.raft_term":        "of another Raft",
	"etcdserverpb.StatusResponse.dbSize":           "of another file format",
	"etcdserverpb.StatusResponse.dbSizeInUse":      "of another file format",
	"etcdserverpb.StatusResponse.leader":           "it names the member",
	"etcdserverpb.StatusResponse.raftIndex":        "of another Raft",
	"etcdserverpb.StatusResponse.raftAppliedIndex": "of another Raft",
	"etcdserverpb.StatusResponse.raftTerm":         "of another Raft",
	"etcdserverpb.MemberListResponse.members":      "one member is listed, because clients would connect to the others",
	// Of watches, which are compared as one list of events for each, also not: into which messages the
	// events are divided, and which revision beyond the events the header of such a message has.
}

// unordered are lists without a defined order.
var unordered = map[protoreflect.FullName]bool{
	"etcdserverpb.LeaseTimeToLiveResponse.keys": true,
	"etcdserverpb.LeaseLeasesResponse.leases":   true,
	"etcdserverpb.AlarmResponse.alarms":         true,
	"etcdserverpb.StatusResponse.errors":        true,
}

// notOffered are the calls that answer Unimplemented, which is not an answer of etcd's (docs/datastore.md).
var notOffered = []proto.Message{
	&pb.HashRequest{}, &pb.HashKVRequest{}, &pb.DefragmentRequest{}, &pb.MoveLeaderRequest{}, &pb.DowngradeRequest{},
	&pb.MemberAddRequest{}, &pb.MemberRemoveRequest{}, &pb.MemberUpdateRequest{}, &pb.MemberPromoteRequest{},
	&pb.AuthStatusRequest{}, &pb.AuthEnableRequest{}, &pb.AuthUserListRequest{}, &pb.AuthRoleListRequest{},
	&pb.LeaseGrantRequest{ID: -5, TTL: 100},
	&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), SortTarget: pb.RangeRequest_VALUE}, // as a stream
}

// methods are the unary calls by the type of the request, with the answer's.
var methods = map[protoreflect.FullName]struct {
	path string
	resp func() proto.Message
}{
	"etcdserverpb.RangeRequest":           {"KV/Range", func() proto.Message { return new(pb.RangeResponse) }},
	"etcdserverpb.PutRequest":             {"KV/Put", func() proto.Message { return new(pb.PutResponse) }},
	"etcdserverpb.DeleteRangeRequest":     {"KV/DeleteRange", func() proto.Message { return new(pb.DeleteRangeResponse) }},
	"etcdserverpb.TxnRequest":             {"KV/Txn", func() proto.Message { return new(pb.TxnResponse) }},
	"etcdserverpb.CompactionRequest":      {"KV/Compact", func() proto.Message { return new(pb.CompactionResponse) }},
	"etcdserverpb.LeaseGrantRequest":      {"Lease/LeaseGrant", func() proto.Message { return new(pb.LeaseGrantResponse) }},
	"etcdserverpb.LeaseRevokeRequest":     {"Lease/LeaseRevoke", func() proto.Message { return new(pb.LeaseRevokeResponse) }},
	"etcdserverpb.LeaseTimeToLiveRequest": {"Lease/LeaseTimeToLive", func() proto.Message { return new(pb.LeaseTimeToLiveResponse) }},
	"etcdserverpb.LeaseLeasesRequest":     {"Lease/LeaseLeases", func() proto.Message { return new(pb.LeaseLeasesResponse) }},
	"etcdserverpb.MemberListRequest":      {"Cluster/MemberList", func() proto.Message { return new(pb.MemberListResponse) }},
	"etcdserverpb.MemberAddRequest":       {"Cluster/MemberAdd", func() proto.Message { return new(pb.MemberAddResponse) }},
	"etcdserverpb.MemberRemoveRequest":    {"Cluster/MemberRemove", func() proto.Message { return new(pb.MemberRemoveResponse) }},
	"etcdserverpb.MemberUpdateRequest":    {"Cluster/MemberUpdate", func() proto.Message { return new(pb.MemberUpdateResponse) }},
	"etcdserverpb.MemberPromoteRequest":   {"Cluster/MemberPromote", func() proto.Message { return new(pb.MemberPromoteResponse) }},
	"etcdserverpb.StatusRequest":          {"Maintenance/Status", func() proto.Message { return new(pb.StatusResponse) }},
	"etcdserverpb.AlarmRequest":           {"Maintenance/Alarm", func() proto.Message { return new(pb.AlarmResponse) }},
	"etcdserverpb.HashRequest":            {"Maintenance/Hash", func() proto.Message { return new(pb.HashResponse) }},
	"etcdserverpb.HashKVRequest":          {"Maintenance/HashKV", func() proto.Message { return new(pb.HashKVResponse) }},
	"etcdserverpb.DefragmentRequest":      {"Maintenance/Defragment", func() proto.Message { return new(pb.DefragmentResponse) }},
	"etcdserverpb.MoveLeaderRequest":      {"Maintenance/MoveLeader", func() proto.Message { return new(pb.MoveLeaderResponse) }},
	"etcdserverpb.DowngradeRequest":       {"Maintenance/Downgrade", func() proto.Message { return new(pb.DowngradeResponse) }},
	"etcdserverpb.AuthStatusRequest":      {"Auth/AuthStatus", func() proto.Message { return new(pb.AuthStatusResponse) }},
	"etcdserverpb.AuthEnableRequest":      {"Auth/AuthEnable", func() proto.Message { return new(pb.AuthEnableResponse) }},
	"etcdserverpb.AuthUserListRequest":    {"Auth/UserList", func() proto.Message { return new(pb.AuthUserListResponse) }},
	"etcdserverpb.AuthRoleListRequest":    {"Auth/RoleList", func() proto.Message { return new(pb.AuthRoleListResponse) }},
}

// request is one request. streamed makes a Range a RangeStream.
type request struct {
	msg      proto.Message
	streamed bool
}

func (r request) String() string {
	text := prototext.MarshalOptions{Multiline: false}.Format(r.msg)
	if len(text) > 2000 {
		text = text[:2000] + "…"
	}
	name := string(r.msg.ProtoReflect().Descriptor().Name())
	if r.streamed {
		name = "RangeStream of " + name
	}
	return name + "{" + text + "}"
}

// send carries out a request and returns the answer.
func (r request) send(ctx context.Context, c *grpc.ClientConn) (proto.Message, error) {
	switch m := r.msg.(type) {
	case *pb.RangeRequest:
		if r.streamed {
			return rangeStream(ctx, c, m)
		}
	case *pb.LeaseKeepAliveRequest:
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		s, err := pb.NewLeaseClient(c).LeaseKeepAlive(ctx)
		if err == nil {
			err = s.Send(m)
		}
		if err != nil {
			return nil, err
		}
		return s.Recv()
	}
	method, ok := methods[r.msg.ProtoReflect().Descriptor().FullName()]
	if !ok {
		return nil, fmt.Errorf("no method for %T", r.msg)
	}
	resp := method.resp()
	return resp, c.Invoke(ctx, "/etcdserverpb."+method.path, r.msg, resp)
}

// rangeStream puts the chunks together: how large they are is the server's choice.
func rangeStream(ctx context.Context, c *grpc.ClientConn, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	s, err := pb.NewKVClient(c).RangeStream(ctx, r)
	if err != nil {
		return nil, err
	}
	whole := &pb.RangeResponse{}
	for {
		chunk, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return whole, nil
		}
		if err != nil {
			return nil, err
		}
		if whole.Header != nil {
			return nil, errors.New("a chunk came after the last one")
		}
		part := chunk.RangeResponse
		whole.Kvs = append(whole.Kvs, part.Kvs...)
		whole.Header, whole.Count, whole.More = part.Header, part.Count, part.More
	}
}

// comparableText is an answer without what is not compared, as text.
func comparableText(m proto.Message, err error) string {
	if err != nil {
		s := status.Convert(err)
		return fmt.Sprintf("error %s: %s", s.Code(), s.Message())
	}
	m = proto.Clone(m)
	normalize(m.ProtoReflect())
	// Without the spaces that prototext varies from build to build.
	text := strings.ReplaceAll(prototext.MarshalOptions{Multiline: true, Indent: " "}.Format(m), ":  ", ": ")
	return strings.ReplaceAll(text, "  alarm:", " alarm:")
}

func normalize(m protoreflect.Message) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if _, ok := notCompared[f.FullName()]; ok {
			m.Clear(f)
			return true
		}
		switch {
		case f.IsList():
			list := v.List()
			if f.Message() != nil {
				for i := range list.Len() {
					normalize(list.Get(i).Message())
				}
			}
			if unordered[f.FullName()] {
				all := make([]protoreflect.Value, list.Len())
				for i := range all {
					all[i] = list.Get(i)
				}
				slices.SortFunc(all, func(a, b protoreflect.Value) int { return strings.Compare(sortKey(f, a), sortKey(f, b)) })
				for i, x := range all {
					list.Set(i, x)
				}
			}
		case f.Message() != nil && !f.IsMap():
			normalize(v.Message())
		}
		return true
	})
}

func sortKey(f protoreflect.FieldDescriptor, v protoreflect.Value) string {
	if f.Message() != nil {
		b, _ := proto.MarshalOptions{Deterministic: true}.Marshal(v.Message().Interface())
		return string(b)
	}
	return v.String()
}

// startEtcd starts an etcd of one member. Its answers do not depend on how many members it has.
func startEtcd(t *testing.T, args ...string) *grpc.ClientConn {
	t.Helper()
	program, err := filepath.Abs("../../../build/peers/etcd")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("this test compares with etcd; build it with: make build/peers/etcd.stamp (%v)", err)
	}
	dir := t.TempDir()
	client, peer := "http://"+freeAddress(t), "http://"+freeAddress(t)
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(program, append([]string{
		"--data-dir", filepath.Join(dir, "data"), "--name", "n", "--listen-client-urls", client, "--advertise-client-urls", client,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "n=" + peer,
		"--unsafe-no-fsync", "--log-level", "error",
	}, args...)...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if text, err := os.ReadFile(log.Name()); err == nil && t.Failed() && len(text) > 0 {
			t.Logf("log of etcd:\n%s", text[max(0, len(text)-5000):])
		}
	})
	address := strings.TrimPrefix(client, "http://")
	within(t, "etcd listens", func() bool {
		c, err := net.Dial("tcp", address)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return rawConn(t, "passthrough:///"+address)
}

func rawConn(t *testing.T, target string) *grpc.ClientConn {
	t.Helper()
	c, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20), grpc.MaxCallSendMsgSize(64<<20)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// comparison is a run of requests against both.
type comparison struct {
	t       *testing.T
	ctx     context.Context
	etcd    *grpc.ClientConn
	members []*grpc.ClientConn
	rand    *rand.Rand
	said    []string // the requests so far
	streams []*twoStreams
	// A watch that begins in the past is served by etcd with the next pass of a loop, and not before.
	unsettled bool
	passes    *oneStream // of etcd, see pass
	probes    int64
}

// TestAnswersAreEtcds sends random requests to a real etcd and to daemons, of one member and of three.
func TestAnswersAreEtcds(t *testing.T) {
	n := 1000
	if os.Getenv("MICROK8S_TEST_LONG") != "" {
		n = 100000
	}
	if s := os.Getenv("MICROK8S_TEST_REQUESTS"); s != "" {
		if _, err := fmt.Sscan(s, &n); err != nil {
			t.Fatal(err)
		}
	}
	for _, members := range []int{1, 3} {
		t.Run(fmt.Sprintf("%d-members", members), func(t *testing.T) {
			t.Parallel()
			seed := time.Now().UnixNano()
			if s := os.Getenv("MICROK8S_TEST_SEED"); s != "" {
				if _, err := fmt.Sscan(s, &seed); err != nil {
					t.Fatal(err)
				}
			}
			t.Logf("MICROK8S_TEST_SEED=%d MICROK8S_TEST_REQUESTS=%d", seed, n)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			c := &comparison{t: t, ctx: ctx, etcd: startEtcd(t), rand: rand.New(rand.NewPCG(uint64(seed), uint64(members)))}
			for _, m := range newCluster(t, members).members {
				c.members = append(c.members, rawConn(t, "unix://"+filepath.Join(m.dir, "kine.sock:12379")))
			}
			c.run(n)
		})
	}
}

func (c *comparison) run(n int) {
	g := &generator{rand: c.rand, rev: 2}
	// The daemon has written this key by itself: revisions are the same from here on.
	if _, err := (request{msg: &pb.PutRequest{Key: []byte(HealthKey), Value: []byte(HealthValue)}}).send(c.ctx, c.etcd); err != nil {
		c.t.Fatal(err)
	}
	c.unimplemented()
	c.expiry(g)
	for i := 0; i < n && !c.t.Failed(); i++ {
		if c.rand.IntN(25) == 0 {
			c.watchStep(g)
			continue
		}
		r := g.next()
		if _, ok := r.msg.(*pb.CompactionRequest); ok {
			c.settle(g)
		}
		c.both(g, r)
		if i%200 == 199 {
			c.settle(g)
		}
	}
	if !c.t.Failed() {
		c.settle(g)
	}
	c.t.Logf("%d requests, revision %d", len(c.said), g.rev)
}

// both sends a request to both and compares.
func (c *comparison) both(g *generator, r request) {
	c.t.Helper()
	i := c.rand.IntN(len(c.members))
	c.said = append(c.said, fmt.Sprintf("%d@%d %s", len(c.said), i, r))
	ctx, cancel := context.WithTimeout(c.ctx, 30*time.Second)
	defer cancel()
	switch r.msg.(type) {
	case *pb.StatusRequest, *pb.LeaseKeepAliveRequest:
		c.barrier(ctx, i) // their headers have the revision that the member has reached
	}
	var want proto.Message
	var wantErr error
	var wg sync.WaitGroup
	wg.Go(func() { want, wantErr = r.send(ctx, c.etcd) })
	got, gotErr := r.send(ctx, c.members[i])
	wg.Wait()
	if q, ok := r.msg.(*pb.LeaseGrantRequest); ok && q.ID == 0 && wantErr == nil && gotErr == nil {
		c.chosen(ctx, i, want.(*pb.LeaseGrantResponse), got.(*pb.LeaseGrantResponse))
	}
	if a, ok := want.(*pb.LeaseTimeToLiveResponse); ok && wantErr == nil && gotErr == nil {
		if b := got.(*pb.LeaseTimeToLiveResponse); a.TTL > 0 && b.TTL > 0 && max(a.TTL, b.TTL)-min(a.TTL, b.TTL) <= 3 {
			b.TTL = a.TTL // seconds that are left, read one after the other
		}
	}
	c.compare(r.String(), comparableText(want, wantErr), comparableText(got, gotErr))
	if wantErr == nil {
		g.learn(r, want)
	}
}

func (c *comparison) compare(what, want, got string) {
	c.t.Helper()
	if want == got {
		return
	}
	c.t.Errorf("%s\n-- etcd:\n%s\n-- the daemon:\n%s\n-- the requests before, the last ones of %d:\n%s",
		what, want, got, len(c.said), strings.Join(c.said[max(0, len(c.said)-15):], "\n"))
	if dir := os.Getenv("TEST_LOGS"); dir != "" {
		os.WriteFile(filepath.Join(dir, "requests"), []byte(strings.Join(c.said, "\n")), 0o600)
	}
}

// chosen ends leases whose ids the servers have chosen, and takes the ids out of the answers.
func (c *comparison) chosen(ctx context.Context, i int, want, got *pb.LeaseGrantResponse) {
	for conn, a := range map[*grpc.ClientConn]*pb.LeaseGrantResponse{c.etcd: want, c.members[i]: got} {
		if a.ID <= 0 {
			c.t.Errorf("the chosen lease is %d", a.ID)
		}
		if _, err := (request{msg: &pb.LeaseRevokeRequest{ID: a.ID}}).send(ctx, conn); err != nil {
			c.t.Error(err)
		}
		a.ID = 1
	}
}

// barrier waits until a member has everything.
func (c *comparison) barrier(ctx context.Context, member int) {
	if _, err := (request{msg: &pb.RangeRequest{Key: []byte("barrier")}}).send(ctx, c.members[member]); err != nil {
		c.t.Error(err)
	}
}

// unimplemented checks what is not offered.
func (c *comparison) unimplemented() {
	ctx, cancel := context.WithTimeout(c.ctx, 30*time.Second)
	defer cancel()
	for _, m := range notOffered {
		_, streamed := m.(*pb.RangeRequest)
		if _, err := (request{m, streamed}).send(ctx, c.members[0]); status.Code(err) != codes.Unimplemented {
			c.t.Errorf("%s is answered with %v", request{m, streamed}, err)
		}
	}
	s, err := pb.NewMaintenanceClient(c.members[0]).Snapshot(ctx, &pb.SnapshotRequest{})
	if err == nil {
		_, err = s.Recv()
	}
	if status.Code(err) != codes.Unimplemented {
		c.t.Errorf("Snapshot is answered with %v", err)
	}
}

// expiry waits for the end of a lease with keys.
func (c *comparison) expiry(g *generator) {
	c.open(g, &pb.WatchCreateRequest{Key: []byte("x"), RangeEnd: []byte("y"), PrevKv: true})
	c.both(g, request{msg: &pb.LeaseGrantRequest{ID: 999, TTL: -1}})
	for _, k := range []string{"x2", "x1", "x3"} {
		c.both(g, request{msg: &pb.PutRequest{Key: []byte(k), Value: []byte("v"), Lease: 999}})
	}
	s := c.streams[0]
	within(c.t, "the lease ends", func() bool {
		return strings.Contains(s.want.text(), "DELETE") && strings.Contains(s.got.text(), "DELETE")
	})
	g.rev++
	c.both(g, request{msg: &pb.LeaseTimeToLiveRequest{ID: 999, Keys: true}})
	c.both(g, request{msg: &pb.RangeRequest{Key: []byte("x"), RangeEnd: []byte("y")}})
	c.settle(g)
}

// twoStreams is one Watch call to each.
type twoStreams struct {
	member    int
	want, got *oneStream
	ids       map[int64]bool // what was asked for
}

// oneStream keeps what a stream of watches received.
type oneStream struct {
	pb.Watch_WatchClient
	mu      sync.Mutex
	control []string           // in order
	events  map[int64][]string // by watch
	ended   error
}

func (c *comparison) newStream(conn *grpc.ClientConn) *oneStream {
	w, err := pb.NewWatchClient(conn).Watch(c.ctx)
	if err != nil {
		c.t.Fatal(err)
	}
	s := &oneStream{Watch_WatchClient: w, events: map[int64][]string{}}
	go func() {
		for {
			r, err := w.Recv()
			s.mu.Lock()
			if err != nil {
				s.ended = err
				s.mu.Unlock()
				return
			}
			s.take(r)
			s.mu.Unlock()
		}
	}()
	return s
}

func (s *oneStream) take(r *pb.WatchResponse) {
	if len(r.Events) == 0 {
		s.control = append(s.control, comparableText(r, nil))
		return
	}
	for _, ev := range r.Events {
		text := comparableText(ev, nil)
		if ev.Type == mvccpb.Event_DELETE {
			text = "DELETE " + text
		}
		if r.Header.GetRevision() < ev.Kv.ModRevision {
			text += " in a message of an older revision"
		}
		s.events[r.WatchId] = append(s.events[r.WatchId], text)
	}
}

func (s *oneStream) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var b bytes.Buffer
	// Answers about several watches that one request ends come in any order.
	for _, line := range slices.Sorted(slices.Values(s.control)) {
		fmt.Fprintln(&b, line)
	}
	for _, id := range slices.Sorted(maps.Keys(s.events)) {
		fmt.Fprintf(&b, "watch %d: %s\n", id, strings.Join(s.events[id], "\n"))
	}
	if s.ended != nil {
		fmt.Fprintln(&b, "ended:", s.ended)
	}
	return b.String()
}

// settle waits until all streams have received the same, after what etcd sends a little later.
func (c *comparison) settle(g *generator) {
	c.t.Helper()
	if c.unsettled {
		c.pass(g)
		c.unsettled = false
	}
	for _, s := range c.streams {
		deadline := time.Now().Add(5 * time.Second)
		for s.want.text() != s.got.text() {
			if time.Now().After(deadline) {
				c.compare(fmt.Sprintf("the watches of a stream at member %d", s.member), s.want.text(), s.got.text())
				return
			}
			time.Sleep(2 * time.Millisecond)
		}
		for _, o := range []*oneStream{s.want, s.got} {
			o.mu.Lock()
			o.control, o.events = nil, map[int64][]string{}
			o.mu.Unlock()
		}
	}
}

// pass waits until etcd has served the watches that began in the past: all of them in one pass, so that one
// that is made now, of a revision with an event, shows when that is over.
func (c *comparison) pass(g *generator) {
	if c.passes == nil {
		c.passes = c.newStream(c.etcd)
	}
	c.probes++
	id := c.probes
	err := c.passes.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		WatchId: id, Key: []byte{0}, RangeEnd: []byte{0}, StartRevision: g.rev,
	}}})
	for end := time.Now().Add(time.Second); err == nil && time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		c.passes.mu.Lock()
		served := len(c.passes.events[id]) > 0
		delete(c.passes.events, id)
		c.passes.mu.Unlock()
		if served {
			break
		}
	}
	if err == nil {
		err = c.passes.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: &pb.WatchCancelRequest{WatchId: id}}})
	}
	if err != nil {
		c.t.Error(err)
	}
}

// open begins a watch on a new stream.
func (c *comparison) open(g *generator, r *pb.WatchCreateRequest) {
	i := c.rand.IntN(len(c.members))
	s := &twoStreams{member: i, want: c.newStream(c.etcd), got: c.newStream(c.members[i]), ids: map[int64]bool{}}
	c.streams = append(c.streams, s)
	c.watch(g, s, &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: r}})
}

// watch sends a request to both streams and waits for the answers.
func (c *comparison) watch(g *generator, s *twoStreams, r *pb.WatchRequest) {
	c.t.Helper()
	c.said = append(c.said, fmt.Sprintf("%d@%d %s", len(c.said), s.member, request{msg: r}))
	c.barrier(c.ctx, s.member)
	count := func(o *oneStream) int {
		o.mu.Lock()
		defer o.mu.Unlock()
		return len(o.control)
	}
	want, got := count(s.want), count(s.got)
	for _, o := range []*oneStream{s.want, s.got} {
		if err := o.Send(r); err != nil {
			c.t.Error(err)
		}
	}
	if r.GetCreateRequest() != nil {
		within(c.t, "the watch is created", func() bool { return count(s.want) > want && count(s.got) > got })
		c.unsettled = c.unsettled || r.GetCreateRequest().StartRevision > 0
		return
	}
	// There may be no answer: what comes later is found by the next comparison.
	for end := time.Now().Add(30 * time.Millisecond); time.Now().Before(end) && (count(s.want) == want || count(s.got) == got); {
		time.Sleep(time.Millisecond)
	}
}

// watchStep does something with watches.
func (c *comparison) watchStep(g *generator) {
	if len(c.streams) == 0 || len(c.streams) < 6 && c.rand.IntN(4) == 0 {
		c.open(g, g.create())
		return
	}
	s := c.streams[c.rand.IntN(len(c.streams))]
	switch k := c.rand.IntN(10); {
	case k < 6:
		c.watch(g, s, &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: g.create()}})
	case k < 8:
		c.settle(g)
		c.watch(g, s, &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: &pb.WatchCancelRequest{WatchId: g.watchID()}}})
	default:
		c.settle(g)
		c.watch(g, s, &pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}})
	}
}
