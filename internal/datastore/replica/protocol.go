package replica

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"time"

	dslog "microk8s/internal/datastore/log"
	"microk8s/internal/datastore/member"
	"microk8s/internal/datastore/state"
	"microk8s/internal/datastore/storedir"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// The protocol of daemons, all of it: the calls below, and the KV, Lease and Maintenance services of etcd for
// what else than transactions is forwarded to the leader. Control messages are JSON, so that members of different
// versions understand each other; the data is in a form of its own.

const service = "microk8s.datastore.Peer"

// notLeading is the answer of a daemon that does not lead: what was asked did not happen.
var notLeading = status.Error(codes.FailedPrecondition, "this member does not lead")

func isNotLeading(err error) bool {
	s, ok := status.FromError(err)
	n, _ := status.FromError(notLeading)
	return ok && s.Code() == n.Code() && s.Message() == n.Message()
}

// pingRequest says who asks.
type pingRequest struct {
	ID      uint64
	Address string
	// Progress is what the asker's files have reached for certain.
	Progress member.Progress `json:",omitzero"`
}

// recallRequest asks, before a member starts, what is known of it.
type recallRequest struct{ ID uint64 }

// recallAnswer says how far the member had come, and whether the datastore was recovered without it.
type recallAnswer struct {
	Progress  member.Progress     `json:",omitzero"`
	Recovered *storedir.Recovered `json:",omitempty"`
}

// pingAnswer is what a daemon says of itself.
type pingAnswer struct {
	ID            uint64
	LeaderID      uint64 // who leads as far as its node knows, 0: nobody
	LeaderAddress string
	Leads         bool              // its daemon leads and takes writes
	Members       []storedir.Member // if it leads
	Stopping      bool              // it is about to stop
	LowDisk       bool              // its disk is nearly full
	Full          bool              // its disk has no space for the log to grow
	Alarms        []dslog.Alarm     `json:",omitempty"` // if it leads
	Domain        uint64
	Weight        uint64
	Size, InUse   int64 // of the database, if it leads
}

type whoAnswer struct{ ID, LeaderID uint64 }

// barrierRequest asks for a confirmed revision.
type barrierRequest struct {
	// Unconfirmed asks for the leader's revision alone, no matter whether it still leads.
	Unconfirmed bool
	// Voter's own node has said, after every read that this is for had come, that Leader leads;
	// 0: nothing is said.
	Voter  uint64 `json:",omitempty"`
	Leader uint64 `json:",omitempty"`
}

type barrierAnswer struct {
	Rev       int64
	Compacted int64 `json:",omitempty"`
}

type joinRequest struct {
	ID        uint64
	Address   string
	Forwarded bool
}

type joinAnswer struct{ Members []storedir.Member }

type handoverRequest struct {
	ID uint64
}

type empty struct{}

// followRequest asks for everything after a revision. Print is that of the revision.
type followRequest struct {
	ID    uint64
	Rev   int64
	Print uint32
}

// batch is a message of a Follow stream.
type batch struct {
	Snapshot  bool  // Versions are a part of the whole data, as of Rev, compacted to Compacted
	Last      bool  // it is the last part
	Rev       int64 // of the leader
	Compacted int64 // the leader's compaction, which the stream has reached
	Versions  []*state.Version
}

const (
	flagSnapshot = 1 << iota
	flagLast
)

// maxBatch limits what is taken from one message; transactions are limited to a few MiB.
const maxBatch = 64 << 20

func (b *batch) marshal() []byte {
	size := 32
	for _, v := range b.Versions {
		size += len(v.KV.Key) + len(v.KV.Value) + 40
	}
	out := make([]byte, 1, size)
	if b.Snapshot {
		out[0] |= flagSnapshot
	}
	if b.Last {
		out[0] |= flagLast
	}
	out = binary.AppendUvarint(out, uint64(b.Rev))
	out = binary.AppendUvarint(out, uint64(max(b.Compacted, 0))) // below revision 1 there is nothing to lose
	out = binary.AppendUvarint(out, uint64(len(b.Versions)))
	for _, v := range b.Versions {
		out = binary.AppendUvarint(out, uint64(dslog.VersionID(v)))
		out = binary.AppendUvarint(out, uint64(v.KV.CreateRevision))
		out = binary.AppendUvarint(out, uint64(v.KV.Version))
		out = binary.AppendUvarint(out, uint64(v.KV.Lease))
		out = binary.AppendUvarint(out, uint64(len(v.KV.Key)))
		out = append(out, v.KV.Key...)
		out = binary.AppendUvarint(out, uint64(len(v.KV.Value)))
		out = append(out, v.KV.Value...)
	}
	return out
}

var errBatch = errors.New("a message of the leader cannot be read")

func (b *batch) unmarshal(data []byte) error {
	if len(data) == 0 {
		return errBatch
	}
	*b = batch{Snapshot: data[0]&flagSnapshot != 0, Last: data[0]&flagLast != 0}
	data = data[1:]
	bad := false
	number := func() int64 {
		n, k := binary.Uvarint(data)
		if k <= 0 || n > 1<<63-1 {
			bad = true
			data = nil
			return 0
		}
		data = data[k:]
		return int64(n)
	}
	bytes := func() []byte {
		n := number()
		if bad || n > int64(len(data)) {
			bad = true
			return nil
		}
		out := data[:n:n]
		data = data[n:]
		return out
	}
	b.Rev, b.Compacted = number(), number()
	n := number()
	const least = 6 // bytes of a version
	if bad || n > int64(len(data)/least) {
		return errBatch
	}
	b.Versions = make([]*state.Version, 0, n)
	for range n {
		r := dslog.Row{ID: number(), Create: number(), Version: number(), Lease: number()}
		r.Key = bytes()
		r.Value = bytes()
		if bad || len(r.Key) == 0 {
			return errBatch
		}
		b.Versions = append(b.Versions, r.VersionOf())
	}
	if len(data) != 0 {
		return errBatch
	}
	return nil
}

// writeRequest are transactions, each for itself.
type writeRequest struct{ txns []*pb.TxnRequest }

// writeAnswer has their outcomes, in their order.
type writeAnswer struct{ results []writeResult }

// writeResult has one of the two.
type writeResult struct {
	resp *pb.TxnResponse
	err  *spb.Status
}

var errWrites = errors.New("a message with forwarded writes cannot be read")

// What a part of a message is; both messages are such parts one after another, each with its length.
const (
	partTxn byte = iota + 1
	partResponse
	partError
)

func appendPart(out []byte, kind byte, m proto.Message) ([]byte, error) {
	out = append(out, kind)
	out = binary.AppendUvarint(out, uint64(proto.Size(m)))
	return proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(out, m)
}

// parts calls fn for each part of a message, which has forwardJobs at most.
func parts(data []byte, fn func(kind byte, body []byte) error) error {
	for n := 0; len(data) > 0; n++ {
		kind := data[0]
		size, k := binary.Uvarint(data[1:])
		if n == forwardJobs || k <= 0 || size > uint64(len(data)-1-k) {
			return errWrites
		}
		body := data[1+k:]
		if err := fn(kind, body[:size:size]); err != nil {
			return errors.Join(errWrites, err)
		}
		data = body[size:]
	}
	return nil
}

func (q *writeRequest) marshal() (out []byte, err error) {
	for _, t := range q.txns {
		if out, err = appendPart(out, partTxn, t); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (q *writeRequest) unmarshal(data []byte) error {
	return parts(data, func(kind byte, body []byte) error {
		if kind != partTxn {
			return errWrites
		}
		t := new(pb.TxnRequest)
		q.txns = append(q.txns, t)
		return proto.Unmarshal(body, t)
	})
}

func (a *writeAnswer) marshal() (out []byte, err error) {
	for _, r := range a.results {
		if r.err != nil {
			out, err = appendPart(out, partError, r.err)
		} else {
			out, err = appendPart(out, partResponse, r.resp)
		}
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (a *writeAnswer) unmarshal(data []byte) error {
	return parts(data, func(kind byte, body []byte) error {
		var r writeResult
		defer func() { a.results = append(a.results, r) }()
		switch kind {
		case partResponse:
			r.resp = new(pb.TxnResponse)
			return proto.Unmarshal(body, r.resp)
		case partError:
			r.err = new(spb.Status)
			if err := proto.Unmarshal(body, r.err); err != nil {
				return err
			}
			if r.err.Code == int32(codes.OK) {
				return errWrites
			}
			return nil
		}
		return errWrites
	})
}

// fingerprint is a checksum of the changes of one revision.
func fingerprint(changes []state.Change, rev int64) uint32 {
	var sum uint32
	table := crc32.MakeTable(crc32.Castagnoli)
	for _, c := range changes {
		if c.Rev() != rev {
			break
		}
		b := batch{Versions: []*state.Version{c.Cur}}
		sum = crc32.Update(sum, table, b.marshal())
	}
	return sum
}

// codec carries protobuf messages, batches, forwarded writes, and everything else as JSON.
type codec struct{}

func (codec) Name() string { return "proto" }

func (codec) Marshal(v any) ([]byte, error) {
	switch v := v.(type) {
	case *batch:
		return v.marshal(), nil
	case *writeRequest:
		return v.marshal()
	case *writeAnswer:
		return v.marshal()
	case proto.Message:
		return proto.Marshal(v)
	}
	return json.Marshal(v)
}

func (codec) Unmarshal(data []byte, v any) error {
	switch v := v.(type) {
	case *batch:
		return v.unmarshal(data)
	case *writeRequest:
		return v.unmarshal(data)
	case *writeAnswer:
		return v.unmarshal(data)
	case proto.Message:
		return proto.Unmarshal(data, v)
	}
	return json.Unmarshal(data, v)
}

var _ encoding.Codec = codec{}

// handler makes a method of a unary call.
func handler[Q, A any](name string, fn func(*Replica, context.Context, *Q) (*A, error)) grpc.MethodDesc {
	return grpc.MethodDesc{MethodName: name, Handler: func(srv any, ctx context.Context, dec func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
		q := new(Q)
		if err := dec(q); err != nil {
			return nil, err
		}
		call := func(ctx context.Context, q any) (any, error) { return fn(srv.(*Replica), ctx, q.(*Q)) }
		if interceptor == nil {
			return call(ctx, q)
		}
		return interceptor(ctx, q, &grpc.UnaryServerInfo{Server: srv, FullMethod: "/" + service + "/" + name}, call)
	}}
}

var serviceDesc = grpc.ServiceDesc{
	ServiceName: service,
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{
		handler("Ping", (*Replica).servePing),
		handler("Who", (*Replica).serveWho),
		handler("Recall", (*Replica).serveRecall),
		handler("Barrier", (*Replica).serveBarrier),
		handler("Write", (*Replica).serveWrite),
		handler("Join", (*Replica).serveJoin),
		handler("Handover", (*Replica).serveHandover),
	},
	Streams: []grpc.StreamDesc{{
		StreamName: "Follow", ServerStreams: true,
		Handler: func(srv any, stream grpc.ServerStream) error {
			q := new(followRequest)
			if err := stream.RecvMsg(q); err != nil {
				return err
			}
			return srv.(*Replica).serveFollow(q, stream)
		},
	}},
}

// call makes a unary call of ours.
func call[A, Q any](ctx context.Context, c *grpc.ClientConn, name string, q *Q) (*A, error) {
	a := new(A)
	if err := c.Invoke(ctx, "/"+service+"/"+name, q, a, grpc.ForceCodec(codec{})); err != nil {
		return nil, err
	}
	return a, nil
}

// callTimed is call with a time limit.
func callTimed[A, Q any](ctx context.Context, limit time.Duration, c *grpc.ClientConn, name string, q *Q) (*A, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return call[A](ctx, c, name, q)
}

func describe(err error) string {
	if s, ok := status.FromError(err); ok {
		return s.Message()
	}
	return fmt.Sprint(err)
}
