package replica

import (
	"bytes"
	"context"
	"reflect"
	"sync"
	"sync/atomic"
	"testing"

	"microk8s/internal/datastore/state"

	"go.etcd.io/etcd/api/v3/mvccpb"
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
