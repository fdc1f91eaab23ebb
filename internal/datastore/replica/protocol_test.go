package replica

import (
	"bytes"
	"context"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"microk8s/internal/datastore/state"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

func TestBatch(t *testing.T) {
	want := batch{Snapshot: true, Last: true, Rev: 9, Compacted: 3, Versions: []*state.Version{
		{KV: mvccpb.KeyValue{Key: []byte("a"), Value: []byte("x"), ModRevision: 8, CreateRevision: 2, Version: 4, Lease: 1 << 60}},
		{KV: mvccpb.KeyValue{Key: []byte("b"), Value: []byte{}, ModRevision: 9}, Sub: 4095},
	}}
	var got batch
	if err := got.unmarshal(want.marshal()); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v became %+v, %v", want, got, err)
	}
}

func FuzzBatch(f *testing.F) {
	f.Add([]byte{})
	f.Add((&batch{Rev: 5, Versions: []*state.Version{{KV: mvccpb.KeyValue{Key: []byte("k"), Value: []byte("v"), ModRevision: 5, CreateRevision: 5, Version: 1}}}}).marshal())
	f.Fuzz(func(t *testing.T, data []byte) {
		var b, again batch
		if b.unmarshal(data) != nil {
			return
		}
		if err := again.unmarshal(b.marshal()); err != nil || !bytes.Equal(again.marshal(), b.marshal()) {
			t.Fatalf("%v", err)
		}
	})
}

func TestWrites(t *testing.T) {
	txn := &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("k"), Value: []byte("v")}}}}}
	sent := writeRequest{txns: []*pb.TxnRequest{txn, {}, txn}}
	data, err := sent.marshal()
	if err != nil {
		t.Fatal(err)
	}
	var got writeRequest
	if err := got.unmarshal(data); err != nil || len(got.txns) != 3 || !proto.Equal(got.txns[2], txn) {
		t.Errorf("%v became %v, %v", sent.txns, got.txns, err)
	}
	if err := new(writeRequest).unmarshal(slices.Repeat(data, forwardJobs/3+1)); err == nil {
		t.Error("a message with too many transactions was read")
	}
	answer := writeAnswer{results: []writeResult{
		{resp: &pb.TxnResponse{Succeeded: true, Header: &pb.ResponseHeader{Revision: 7}}},
		{err: status.Convert(notLeading).Proto()},
	}}
	if data, err = answer.marshal(); err != nil {
		t.Fatal(err)
	}
	var back writeAnswer
	if err := back.unmarshal(data); err != nil || len(back.results) != 2 || back.results[0].resp.Header.Revision != 7 ||
		back.results[0].err != nil || !isNotLeading(status.FromProto(back.results[1].err).Err()) {
		t.Errorf("%v became %v, %v", answer.results, back.results, err)
	}
}

func FuzzWrites(f *testing.F) {
	data, _ := (&writeRequest{txns: []*pb.TxnRequest{{}, {Compare: []*pb.Compare{{Key: []byte("k")}}}}}).marshal()
	f.Add(data)
	data, _ = (&writeAnswer{results: []writeResult{{resp: &pb.TxnResponse{}}, {err: status.Convert(notLeading).Proto()}}}).marshal()
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		var q, again writeRequest
		if q.unmarshal(data) == nil {
			out, err := q.marshal()
			if err != nil || again.unmarshal(out) != nil || len(q.txns) != len(again.txns) {
				t.Fatalf("%d transactions became %d: %v", len(q.txns), len(again.txns), err)
			}
		}
		var a, same writeAnswer
		if a.unmarshal(data) == nil {
			out, err := a.marshal()
			if err != nil || same.unmarshal(out) != nil || len(a.results) != len(same.results) {
				t.Fatalf("%d results became %d: %v", len(a.results), len(same.results), err)
			}
		}
	})
}

// A caller is served by a round that began after it came.
func TestRounds(t *testing.T) {
	var began atomic.Int64
	inside, release := make(chan struct{}), make(chan struct{})
	r := &rounds{run: func(context.Context) (int64, error) {
		n := began.Add(1)
		if n == 1 {
			close(inside)
			<-release
		}
		return n, nil
	}}
	var wg sync.WaitGroup
	results := make([]int64, 10)
	wait := func(i int) {
		defer wg.Done()
		results[i], _ = r.wait(t.Context(), t.Context())
	}
	wg.Add(1)
	go wait(0)
	<-inside
	for i := 1; i < len(results); i++ {
		wg.Add(1)
		go wait(i)
	}
	for waiting := false; !waiting; {
		r.mu.Lock()
		waiting = r.next != nil
		r.mu.Unlock()
	}
	close(release)
	wg.Wait()
	for i, v := range results {
		if i == 0 && v != 1 || i > 0 && v < 2 {
			t.Errorf("caller %d was served by round %d", i, v)
		}
	}
}
