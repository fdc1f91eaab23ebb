package server

import (
	"context"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// MemberList is part of the Cluster service: one member, with the address of the caller. The
// real members are behind it and not for etcd's clients, which would connect to them.
func (s *Server) MemberList(context.Context, *pb.MemberListRequest) (*pb.MemberListResponse, error) {
	return &pb.MemberListResponse{Header: s.header(0), Members: []*pb.Member{{
		ID: s.opt.MemberID, Name: "k8s-dqlite", ClientURLs: []string{s.opt.ClientURL}, PeerURLs: []string{s.opt.ClientURL},
	}}}, nil
}

// Status is part of the Maintenance service.
func (s *Server) Status(ctx context.Context, _ *pb.StatusRequest) (*pb.StatusResponse, error) {
	total, used := s.opt.Backend.Size()
	h := s.now()
	resp := &pb.StatusResponse{
		Header: h, Version: Version, DowngradeInfo: &pb.DowngradeInfo{}, StorageVersion: "3.7.0", DbSize: total, DbSizeInUse: used,
		DbSizeQuota: s.opt.Engine.Space().Quota,
		RaftIndex:   uint64(h.Revision), RaftAppliedIndex: uint64(h.Revision), RaftTerm: h.RaftTerm,
	}
	if s.opt.Backend.HasLeader() {
		resp.Leader = s.opt.MemberID
	} else {
		resp.Errors = []string{"etcdserver: no leader"}
		return resp, nil
	}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	alarms, err := s.opt.Backend.Alarm(ctx, &pb.AlarmRequest{})
	if err != nil {
		// Clients learn from Status what this member is and can. That is known here, also when the
		// leader is slow, or of a version without alarms.
		if status.Code(toGRPC(err)) != codes.Unimplemented {
			resp.Errors = append(resp.Errors, "etcdserver: the leader does not say which alarms stand: "+err.Error())
		}
		return resp, nil
	}
	for _, a := range alarms.Alarms {
		resp.Errors = append(resp.Errors, a.String())
	}
	return resp, nil
}

// statusTimeout is for the question to the leader which alarms stand.
const statusTimeout = 2 * time.Second

// Alarm is part of the Maintenance service.
func (s *Server) Alarm(ctx context.Context, r *pb.AlarmRequest) (*pb.AlarmResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	resp, err := s.opt.Backend.Alarm(ctx, r)
	if err != nil {
		return nil, toGRPC(err)
	}
	resp.Header = s.now()
	return resp, nil
}
