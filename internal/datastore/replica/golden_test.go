package replica

import (
	"encoding/hex"
	"reflect"
	"testing"

	dslog "microk8s/internal/datastore/log"
	"microk8s/internal/datastore/member"
	"microk8s/internal/datastore/state"
	"microk8s/internal/datastore/storedir"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	spb "google.golang.org/genproto/googleapis/rpc/status"
)

// What daemons say to each other, to the byte: members of a cluster are refreshed one after the other, and
// those of two releases must understand each other.
func TestBytesOfMessages(t *testing.T) {
	put := func(key string) *pb.TxnRequest {
		return &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: []byte("v")}}}}}
	}
	version := func(key string, create, mod, version int64, sub int) *state.Version {
		v := &state.Version{KV: mvccpb.KeyValue{Key: []byte(key), CreateRevision: create, ModRevision: mod, Version: version}, Sub: sub}
		if version > 0 {
			v.KV.Value, v.KV.Lease = []byte("value"), 77
		}
		return v
	}
	for name, tc := range map[string]struct {
		message any
		text    string // JSON
		hex     string // of the others
	}{
		"ping":          {message: &pingRequest{ID: 5, Address: "10.0.0.1:19001"}, text: `{"ID":5,"Address":"10.0.0.1:19001"}`},
		"progress":      {message: &pingRequest{ID: 5, Address: "a:1", Progress: member.Progress{Version: 4, Term: 3, Index: 9}}, text: `{"ID":5,"Address":"a:1","Progress":{"Version":4,"Term":3,"Index":9}}`},
		"recall":        {message: &recallRequest{ID: 5}, text: `{"ID":5}`},
		"recall answer": {message: &recallAnswer{Progress: member.Progress{Version: 4, Term: 3, Index: 9}}, text: `{"Progress":{"Version":4,"Term":3,"Index":9}}`},
		"ping answer": {
			message: &pingAnswer{ID: 5, LeaderID: 6, LeaderAddress: "a:1", Leads: true, Members: []storedir.Member{{ID: 6, Address: "a:1", Role: storedir.StandBy}}, Weight: 2, Domain: 3, Size: 7, InUse: 4},
			text:    `{"ID":5,"LeaderID":6,"LeaderAddress":"a:1","Leads":true,"Members":[{"ID":6,"Address":"a:1","Role":1}],"Stopping":false,"LowDisk":false,"Full":false,"Domain":3,"Weight":2,"Size":7,"InUse":4}`,
		},
		"alarm":          {message: &pingAnswer{Alarms: []dslog.Alarm{{Member: 1, Type: pb.AlarmType_NOSPACE}}}, text: `{"ID":0,"LeaderID":0,"LeaderAddress":"","Leads":false,"Members":null,"Stopping":false,"LowDisk":false,"Full":false,"Alarms":[{"member":1,"type":1}],"Domain":0,"Weight":0,"Size":0,"InUse":0}`},
		"who":            {message: &whoAnswer{ID: 1, LeaderID: 2}, text: `{"ID":1,"LeaderID":2}`},
		"barrier":        {message: &barrierRequest{Voter: 1, Leader: 2}, text: `{"Unconfirmed":false,"Voter":1,"Leader":2}`},
		"unconfirmed":    {message: &barrierRequest{Unconfirmed: true}, text: `{"Unconfirmed":true}`},
		"barrier answer": {message: &barrierAnswer{Rev: 9}, text: `{"Rev":9}`},
		"compacted":      {message: &barrierAnswer{Rev: 9, Compacted: 3}, text: `{"Rev":9,"Compacted":3}`},
		"join":           {message: &joinRequest{ID: 1, Address: "a:1"}, text: `{"ID":1,"Address":"a:1","Forwarded":false}`},
		"join answer":    {message: &joinAnswer{Members: []storedir.Member{{ID: 1, Address: "a:1"}}}, text: `{"Members":[{"ID":1,"Address":"a:1","Role":0}]}`},
		"follow":         {message: &followRequest{ID: 1, Rev: 2, Print: 3}, text: `{"ID":1,"Rev":2,"Print":3}`},
		"writes":         {message: &writeRequest{txns: []*pb.TxnRequest{put("a"), put("b")}}, hex: "010a12081206" + "0a0161120176" + "010a12081206" + "0a0162120176"},
		"write answer": {
			message: &writeAnswer{results: []writeResult{{resp: &pb.TxnResponse{Header: &pb.ResponseHeader{Revision: 5}, Succeeded: true}}, {err: &spb.Status{Code: 9, Message: "no"}}}},
			hex:     "0206" + "0a0218051001" + "0306" + "080912026e6f",
		},
		"changes": {
			message: &batch{Rev: 300, Compacted: 4, Versions: []*state.Version{version("a", 2, 300, 3, 0), version("b", 0, 300, 0, 1)}},
			hex:     "00ac020402" + "80804b02034d0161" + "0576616c7565" + "81804b000000016200",
		},
		"snapshot": {message: &batch{Snapshot: true, Last: true, Rev: 1, Compacted: state.NeverCompacted, Versions: []*state.Version{}}, hex: "03010000"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := codec{}.Marshal(tc.message)
			if err != nil {
				t.Fatal(err)
			}
			if tc.text != "" && string(got) != tc.text || tc.hex != "" && hex.EncodeToString(got) != tc.hex {
				t.Errorf("%s %s", got, hex.EncodeToString(got))
			}
			back := reflect.New(reflect.TypeOf(tc.message).Elem()).Interface()
			if err := (codec{}).Unmarshal(got, back); err != nil {
				t.Fatal(err)
			}
			if again, err := (codec{}).Marshal(back); err != nil || string(again) != string(got) {
				t.Errorf("read and written again: %s, %v", again, err)
			}
		})
	}
}
