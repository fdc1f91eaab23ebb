package server

import (
	"context"
	"errors"
	"io"
	"time"

	"microk8s/internal/datastore/state"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// maxTTL is etcd's largest lease, in seconds.
const maxTTL = 9000000000

// LeaseGrant is part of the Lease service.
func (s *Server) LeaseGrant(ctx context.Context, r *pb.LeaseGrantRequest) (*pb.LeaseGrantResponse, error) {
	if r.TTL > maxTTL {
		return nil, rpctypes.ErrGRPCLeaseTTLTooLarge
	}
	ttl := max(r.TTL, 1)
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	id, err := s.opt.Engine.Grant(ctx, max(r.ID, 0), ttl)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &pb.LeaseGrantResponse{Header: s.now(), ID: id, TTL: ttl}, nil
}

// LeaseRevoke is part of the Lease service.
func (s *Server) LeaseRevoke(ctx context.Context, r *pb.LeaseRevokeRequest) (*pb.LeaseRevokeResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if err := s.opt.Engine.Revoke(ctx, r.ID); err != nil {
		return nil, toGRPC(err)
	}
	return &pb.LeaseRevokeResponse{Header: s.now()}, nil
}

// LeaseKeepAlive is part of the Lease service. As in etcd, an unknown lease has a TTL of 0.
func (s *Server) LeaseKeepAlive(stream pb.Lease_LeaseKeepAliveServer) error {
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		resp := &pb.LeaseKeepAliveResponse{Header: s.now(), ID: r.ID}
		if l, err := s.opt.Engine.Renew(r.ID); err == nil {
			resp.TTL = l.TTL
		} else if !errors.Is(err, state.ErrLeaseNotFound) {
			return toGRPC(err)
		}
		if err := stream.Send(resp); err != nil {
			return err
		}
	}
}

// LeaseTimeToLive is part of the Lease service.
func (s *Server) LeaseTimeToLive(_ context.Context, r *pb.LeaseTimeToLiveRequest) (*pb.LeaseTimeToLiveResponse, error) {
	resp := &pb.LeaseTimeToLiveResponse{ID: r.ID, TTL: -1}
	now := s.opt.Engine.Now()
	_ = s.opt.Engine.View(func(st *state.State) error {
		resp.Header = s.header(st.Rev())
		l, ok := st.Lease(r.ID)
		if !ok || l.Deadline.IsZero() {
			return nil
		}
		resp.GrantedTTL = l.TTL
		resp.TTL = max(int64(l.Deadline.Sub(now)/time.Second), 0)
		if r.Keys {
			for _, k := range st.LeaseKeys(r.ID) {
				resp.Keys = append(resp.Keys, []byte(k))
			}
		}
		return nil
	})
	return resp, nil
}

// LeaseLeases is part of the Lease service.
func (s *Server) LeaseLeases(context.Context, *pb.LeaseLeasesRequest) (*pb.LeaseLeasesResponse, error) {
	resp := &pb.LeaseLeasesResponse{}
	_ = s.opt.Engine.View(func(st *state.State) error {
		resp.Header = s.header(st.Rev())
		for _, id := range st.Leases() {
			resp.Leases = append(resp.Leases, &pb.LeaseStatus{ID: id})
		}
		return nil
	})
	return resp, nil
}
