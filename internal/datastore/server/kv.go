package server

import (
	"context"
	"errors"
	"slices"

	"microk8s/internal/datastore/engine"
	dslog "microk8s/internal/datastore/log"
	"microk8s/internal/datastore/state"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// streamChunk is about how many bytes one message of a RangeStream has, as in etcd.
const streamChunk = 1536 * 1024

func isNoSpace(err error) bool {
	return errors.Is(err, dslog.ErrNoSpace) || errors.Is(err, engine.ErrNoSpace)
}

// Range is part of the KV service.
func (s *Server) Range(ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	if err := checkRange(r); err != nil {
		return nil, err
	}
	if err := s.barrier(ctx); err != nil {
		return nil, toGRPC(err)
	}
	var resp *pb.RangeResponse
	err := s.opt.Engine.View(func(st *state.State) (err error) {
		resp, err = st.Range(r)
		return err
	})
	if err != nil {
		return nil, toGRPC(err)
	}
	resp.Header = s.header(resp.Header.Revision)
	return resp, nil
}

// RangeStream is part of the KV service: a Range in chunks, all of one revision.
func (s *Server) RangeStream(r *pb.RangeRequest, stream grpc.ServerStreamingServer[pb.RangeStreamResponse]) error {
	if err := checkRange(r); err != nil {
		return err
	}
	if r.SortOrder == pb.RangeRequest_DESCEND || r.SortTarget != pb.RangeRequest_KEY {
		return status.Error(codes.Unimplemented, "RangeStream does not support custom sort orders")
	}
	if r.MinModRevision != 0 || r.MaxModRevision != 0 || r.MinCreateRevision != 0 || r.MaxCreateRevision != 0 {
		return status.Error(codes.Unimplemented, "RangeStream does not support revision filters")
	}
	if err := s.barrier(stream.Context()); err != nil {
		return toGRPC(err)
	}
	// The first look pins the revision and counts.
	var first *pb.RangeResponse
	err := s.opt.Engine.View(func(st *state.State) (err error) {
		first, err = st.Range(&pb.RangeRequest{Key: r.Key, RangeEnd: r.RangeEnd, Revision: r.Revision, CountOnly: true})
		return err
	})
	if err != nil {
		return toGRPC(err)
	}
	newest := first.Header.Revision
	rev := r.Revision
	if rev <= 0 {
		rev = newest
	}
	final := &pb.RangeResponse{Header: s.header(newest), Count: first.Count}
	if r.CountOnly {
		return stream.Send(&pb.RangeStreamResponse{RangeResponse: final})
	}
	key, end, left := r.Key, r.RangeEnd, r.Limit
	for {
		var chunk pb.RangeResponse
		var next []byte
		err := s.opt.Engine.View(func(st *state.State) (err error) {
			chunk.Kvs, next, err = st.Page(key, end, rev, left, streamChunk, r.KeysOnly)
			return err
		})
		if err != nil {
			return toGRPC(err)
		}
		n := int64(len(chunk.Kvs))
		if next == nil || r.Limit > 0 && n == left {
			final.Kvs, final.More = chunk.Kvs, next != nil
			return stream.Send(&pb.RangeStreamResponse{RangeResponse: final})
		}
		if err := stream.Send(&pb.RangeStreamResponse{RangeResponse: &chunk}); err != nil {
			return err
		}
		key = next
		if r.Limit > 0 {
			left -= n
		}
	}
}

// Put is part of the KV service.
func (s *Server) Put(ctx context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
	if err := checkPut(r); err != nil {
		return nil, err
	}
	resp, err := s.write(ctx, &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: r}}}})
	if err != nil {
		return nil, err
	}
	put := resp.Responses[0].GetResponsePut()
	put.Header = resp.Header
	return put, nil
}

// DeleteRange is part of the KV service.
func (s *Server) DeleteRange(ctx context.Context, r *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error) {
	if len(r.Key) == 0 {
		return nil, rpctypes.ErrGRPCEmptyKey
	}
	resp, err := s.write(ctx, &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: r}}}})
	if err != nil {
		return nil, err
	}
	deleted := resp.Responses[0].GetResponseDeleteRange()
	deleted.Header = resp.Header
	return deleted, nil
}

// Txn is part of the KV service.
func (s *Server) Txn(ctx context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	if err := checkTxn(r, maxTxnOps); err != nil {
		return nil, err
	}
	for _, ops := range [][]*pb.RequestOp{r.Success, r.Failure} {
		if _, err := checkOverlap(ops); err != nil {
			return nil, err
		}
	}
	if !writes(r) {
		if err := s.barrier(ctx); err != nil {
			return nil, toGRPC(err)
		}
		var resp *pb.TxnResponse
		err := s.opt.Engine.View(func(st *state.State) (err error) {
			resp, err = st.Read(r)
			return err
		})
		if err != nil {
			return nil, toGRPC(err)
		}
		s.sign(resp)
		return resp, nil
	}
	return s.write(ctx, r)
}

func (s *Server) write(ctx context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	size := proto.Size(r)
	if size > maxRequestBytes {
		return nil, rpctypes.ErrGRPCRequestTooLarge
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	resp, err := s.opt.Backend.Txn(ctx, r, size)
	if err != nil {
		return nil, toGRPC(err)
	}
	s.sign(resp)
	return resp, nil
}

// sign completes the header of a response; those of its parts have the revision only, as in etcd.
func (s *Server) sign(resp *pb.TxnResponse) { resp.Header = s.header(resp.Header.Revision) }

// Compact is part of the KV service. Physical compaction is not waited for.
func (s *Server) Compact(ctx context.Context, r *pb.CompactionRequest) (*pb.CompactionResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if err := s.opt.Backend.Compact(ctx, r.Revision); err != nil {
		return nil, toGRPC(err)
	}
	return &pb.CompactionResponse{Header: s.now()}, nil
}

// writes reports whether a transaction has other operations than ranges, even if they change nothing.
func writes(r *pb.TxnRequest) bool {
	return slices.ContainsFunc(slices.Concat(r.Success, r.Failure), func(op *pb.RequestOp) bool { return op.GetRequestRange() == nil })
}

func checkRange(r *pb.RangeRequest) error {
	if len(r.Key) == 0 {
		return rpctypes.ErrGRPCEmptyKey
	}
	_, order := pb.RangeRequest_SortOrder_name[int32(r.SortOrder)]
	_, target := pb.RangeRequest_SortTarget_name[int32(r.SortTarget)]
	if !order || !target {
		return rpctypes.ErrGRPCInvalidSortOption
	}
	return nil
}

func checkPut(r *pb.PutRequest) error {
	switch {
	case len(r.Key) == 0:
		return rpctypes.ErrGRPCEmptyKey
	case r.IgnoreValue && len(r.Value) != 0:
		return rpctypes.ErrGRPCValueProvided
	case r.IgnoreLease && r.Lease != 0:
		return rpctypes.ErrGRPCLeaseProvided
	}
	return nil
}

// checkTxn validates a transaction and those inside it as etcd does.
func checkTxn(r *pb.TxnRequest, ops int) error {
	if len(r.Compare) > ops || len(r.Success) > ops || len(r.Failure) > ops {
		return rpctypes.ErrGRPCTooManyOps
	}
	for _, c := range r.Compare {
		if len(c.Key) == 0 {
			return rpctypes.ErrGRPCEmptyKey
		}
	}
	for _, branch := range [][]*pb.RequestOp{r.Success, r.Failure} {
		for _, op := range branch {
			var err error
			switch o := op.Request.(type) {
			case *pb.RequestOp_RequestRange:
				err = checkRange(o.RequestRange)
			case *pb.RequestOp_RequestPut:
				err = checkPut(o.RequestPut)
			case *pb.RequestOp_RequestDeleteRange:
				if len(o.RequestDeleteRange.Key) == 0 {
					err = rpctypes.ErrGRPCEmptyKey
				}
			case *pb.RequestOp_RequestTxn:
				err = checkTxn(o.RequestTxn, ops-max(len(r.Compare), len(r.Success), len(r.Failure)))
			default:
				err = rpctypes.ErrGRPCKeyNotFound // an empty operation, as etcd answers it
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// touched is the keys that a list of operations puts, and what it deletes.
type touched struct {
	puts    map[string]struct{}
	deletes []*pb.DeleteRangeRequest
}

// put adds a key, which must not be deleted, nor put before except by the other branch of its transaction.
func (t *touched) put(key string, other map[string]struct{}) error {
	_, twice := t.puts[key]
	_, exclusive := other[key]
	if twice && !exclusive || slices.ContainsFunc(t.deletes, func(d *pb.DeleteRangeRequest) bool { return deletes(d, key) }) {
		return rpctypes.ErrGRPCDuplicateKey
	}
	t.puts[key] = struct{}{}
	return nil
}

func deletes(d *pb.DeleteRangeRequest, key string) bool {
	switch from, to := string(d.Key), string(d.RangeEnd); to {
	case "":
		return key == from
	case "\x00":
		return key >= from
	default:
		return key >= from && key < to
	}
}

// checkOverlap refuses operations that put a key twice, or put and delete it: there would be two versions
// of one revision. The two branches of an inner transaction may each put a key. etcd overlooks two kinds,
// deletes without end and deletes by an inner transaction of what an earlier one has put, and ends when it
// reads such a revision after its compaction.
func checkOverlap(ops []*pb.RequestOp) (*touched, error) {
	t := &touched{puts: map[string]struct{}{}}
	for _, op := range ops {
		if d := op.GetRequestDeleteRange(); d != nil {
			t.deletes = append(t.deletes, d)
		}
	}
	for _, op := range ops {
		inner := op.GetRequestTxn()
		if inner == nil {
			continue
		}
		success, err := checkOverlap(inner.Success)
		if err != nil {
			return nil, err
		}
		failure, err := checkOverlap(inner.Failure)
		if err != nil {
			return nil, err
		}
		both := slices.Concat(success.deletes, failure.deletes)
		for k := range t.puts {
			if slices.ContainsFunc(both, func(d *pb.DeleteRangeRequest) bool { return deletes(d, k) }) {
				return nil, rpctypes.ErrGRPCDuplicateKey
			}
		}
		for k := range success.puts {
			if err := t.put(k, nil); err != nil {
				return nil, err
			}
		}
		for k := range failure.puts {
			if err := t.put(k, success.puts); err != nil {
				return nil, err
			}
		}
		t.deletes = append(t.deletes, both...)
	}
	for _, op := range ops {
		if p := op.GetRequestPut(); p != nil {
			if err := t.put(string(p.Key), nil); err != nil {
				return nil, err
			}
		}
	}
	return t, nil
}
