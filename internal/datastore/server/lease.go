package server

import (
	"context"
	"errors"
	"io"

	"microk8s/internal/datastore/state"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// minTTL is etcd's smallest lease, in seconds, with its default election timeout: one and a half times that,
// rounded up.
const minTTL = 2

// LeaseGrant is part of the Lease service.
func (s *Server) LeaseGrant(ctx context.Context, r *pb.LeaseGrantRequest) (*pb.LeaseGrantResponse, error) {
	if r.ID < 0 {
		return nil, status.Error(codes.Unimplemented, "etcdserver: leases with a negative ID are not supported")
	}
	ttl := max(r.TTL, minTTL)
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	id, err := s.opt.Backend.Grant(ctx, r.ID, ttl)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &pb.LeaseGrantResponse{Header: s.now(), ID: id, TTL: ttl}, nil
}

// LeaseRevoke is part of the Lease service.
func (s *Server) LeaseRevoke(ctx context.Context, r *pb.LeaseRevokeRequest) (*pb.LeaseRevokeResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if err := s.opt.Backend.Revoke(ctx, r.ID); err != nil {
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
		resp := &pb.LeaseKeepAliveResponse{ID: r.ID}
		ctx, cancel := context.WithTimeout(stream.Context(), requestTimeout)
		resp.TTL, err = s.opt.Backend.Renew(ctx, r.ID)
		cancel()
		if errors.Is(err, state.ErrLeaseNotFound) {
			resp.TTL = 0
		} else if err != nil {
			return toGRPC(err)
		}
		resp.Header = s.now()
		if err := stream.Send(resp); err != nil {
			return err
		}
	}
}

// LeaseTimeToLive is part of the Lease service.
func (s *Server) LeaseTimeToLive(ctx context.Context, r *pb.LeaseTimeToLiveRequest) (*pb.LeaseTimeToLiveResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	resp, err := s.opt.Backend.TimeToLive(ctx, r)
	if err != nil {
		return nil, toGRPC(err)
	}
	resp.Header = s.header(resp.Header.GetRevision())
	return resp, nil
}

// LeaseLeases is part of the Lease service.
func (s *Server) LeaseLeases(ctx context.Context, _ *pb.LeaseLeasesRequest) (*pb.LeaseLeasesResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	resp, err := s.opt.Backend.Leases(ctx)
	if err != nil {
		return nil, toGRPC(err)
	}
	resp.Header = s.header(resp.Header.GetRevision())
	return resp, nil
}
