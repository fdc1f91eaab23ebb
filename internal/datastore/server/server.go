// Package server speaks the etcd v3 API over an engine: the subset that Kubernetes and common
// tools use, with etcd's error texts and codes. Every other call answers Unimplemented, which
// clients understand as "not offered", unlike any other error.
package server

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"sync"
	"time"

	"microk8s/internal/datastore/engine"
	"microk8s/internal/datastore/state"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
)

// Version is what Status reports. Clients conclude from it what the server can do: below
// 3.5.13 API servers give up consistent reads from their cache, from 3.7 on there is RangeStream.
const Version = "3.7.0"

// etcd's limits.
const (
	maxRequestBytes = 1536 * 1024
	maxReceiveBytes = maxRequestBytes + 512*1024 // of one message; gRPC refuses what is larger
	maxTxnOps       = 128
	requestTimeout  = 7 * time.Second // for a write to become durable, and for a read to be confirmed
)

// Options of a Server.
type Options struct {
	Engine    *engine.Engine
	Logger    *slog.Logger
	ClusterID uint64
	MemberID  uint64
	ClientURL string // what MemberList gives as the address of the one member

	// ProgressInterval is the period of progress notifications of idle watches that asked for them.
	ProgressInterval time.Duration

	// Backend is where the leader is.
	Backend Backend

	// Streams that require a leader end when there has been none for NoLeaderAfter.
	NoLeaderAfter time.Duration
}

// Backend carries out what only the leader can.
type Backend interface {
	// Txn evaluates a transaction of about size bytes and makes it durable.
	Txn(ctx context.Context, r *pb.TxnRequest, size int) (*pb.TxnResponse, error)
	Compact(ctx context.Context, rev int64) error
	// Grant makes a lease of ttl seconds; an id of 0 is chosen.
	Grant(ctx context.Context, id, ttl int64) (int64, error)
	Revoke(ctx context.Context, id int64) error
	// Renew restarts the countdown of a lease and returns its seconds.
	Renew(ctx context.Context, id int64) (int64, error)
	TimeToLive(ctx context.Context, r *pb.LeaseTimeToLiveRequest) (*pb.LeaseTimeToLiveResponse, error)
	Leases(ctx context.Context) (*pb.LeaseLeasesResponse, error)
	// Barrier returns nil when every write acknowledged before the call is in the engine.
	Barrier(ctx context.Context) error
	// CatchUp tries to bring the engine to where the leader is. It proves nothing: an answer
	// after it is as new as can be had without asking a majority.
	CatchUp(ctx context.Context)
	// Alarm lists, raises or ends alarms.
	Alarm(ctx context.Context, r *pb.AlarmRequest) (*pb.AlarmResponse, error)
	// HasLeader reports whether a leader is known.
	HasLeader() bool
	// Size is the size of the database in bytes, and how much of it is in use.
	Size() (total, used int64)
}

// Server is the etcd API. Make it with New.
type Server struct {
	pb.UnimplementedKVServer
	pb.UnimplementedWatchServer
	pb.UnimplementedLeaseServer
	pb.UnimplementedClusterServer
	pb.UnimplementedMaintenanceServer
	pb.UnimplementedAuthServer

	opt    Options
	health *health.Server
	stop   context.Context // ends streams at shutdown
	cancel context.CancelFunc

	beating              sync.Once // by the first stream
	progress, leaderless signal
}

// New makes the API server. Close ends its streams.
func New(opt Options) *Server {
	if opt.ProgressInterval <= 0 {
		opt.ProgressInterval = 5 * time.Second
	}
	if opt.NoLeaderAfter <= 0 {
		opt.NoLeaderAfter = 3 * time.Second
	}
	s := &Server{opt: opt, health: health.NewServer()}
	s.stop, s.cancel = context.WithCancel(context.Background())
	s.health.SetServingStatus("", healthpb.HealthCheckResponse_SERVING)
	return s
}

// GRPC makes a gRPC server with etcd's limits and this API on it.
func (s *Server) GRPC(opts ...grpc.ServerOption) *grpc.Server {
	opts = append([]grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxReceiveBytes),
		grpc.MaxSendMsgSize(math.MaxInt32),
		grpc.MaxConcurrentStreams(math.MaxUint32),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 2 * time.Hour, Timeout: 20 * time.Second}),
	}, opts...)
	g := grpc.NewServer(opts...)
	pb.RegisterKVServer(g, s)
	pb.RegisterWatchServer(g, s)
	pb.RegisterLeaseServer(g, s)
	pb.RegisterClusterServer(g, s)
	pb.RegisterMaintenanceServer(g, s)
	pb.RegisterAuthServer(g, s)
	healthpb.RegisterHealthServer(g, s.health)
	return g
}

// Close ends all streams and says NOT_SERVING.
func (s *Server) Close() {
	s.health.Shutdown()
	s.cancel()
}

// barrier waits until the engine has everything that was acknowledged before the call.
func (s *Server) barrier(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	return s.opt.Backend.Barrier(ctx)
}

func (s *Server) header(rev int64) *pb.ResponseHeader {
	return &pb.ResponseHeader{ClusterId: s.opt.ClusterID, MemberId: s.opt.MemberID, Revision: rev, RaftTerm: 1}
}

func (s *Server) now() *pb.ResponseHeader { return s.header(s.opt.Engine.Rev()) }

// toGRPC turns an error into the one that etcd would send.
func toGRPC(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, state.ErrCompacted):
		return rpctypes.ErrGRPCCompacted
	case errors.Is(err, state.ErrFutureRev):
		return rpctypes.ErrGRPCFutureRev
	case errors.Is(err, state.ErrLeaseNotFound):
		return rpctypes.ErrGRPCLeaseNotFound
	case errors.Is(err, state.ErrTTLTooLarge):
		return rpctypes.ErrGRPCLeaseTTLTooLarge
	case errors.Is(err, state.ErrLeaseExists):
		return rpctypes.ErrGRPCLeaseExist
	case errors.Is(err, state.ErrKeyNotFound):
		return rpctypes.ErrGRPCKeyNotFound
	case errors.Is(err, state.ErrTooManyRows):
		return rpctypes.ErrGRPCTooManyOps
	case errors.Is(err, engine.ErrCorrupt):
		return rpctypes.ErrGRPCCorrupt
	case isNoSpace(err):
		return rpctypes.ErrGRPCNoSpace
	case errors.Is(err, engine.ErrNotApplied):
		return rpctypes.ErrGRPCLeaderChanged
	case errors.Is(err, engine.ErrUnknown):
		return rpctypes.ErrGRPCTimeoutDueToLeaderFail
	case errors.Is(err, engine.ErrNotLeading):
		return rpctypes.ErrGRPCLeaderChanged
	case errors.Is(err, context.DeadlineExceeded):
		return rpctypes.ErrGRPCTimeout
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, err.Error())
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(codes.Unavailable, err.Error())
}
