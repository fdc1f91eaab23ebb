package server

import (
	"context"
	"errors"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"microk8s/internal/datastore/engine"
)

// leader stands for the leader, which is another member; only what Status asks is there.
type leader struct {
	Backend
	err error
}

func (l leader) Alarm(context.Context, *pb.AlarmRequest) (*pb.AlarmResponse, error) {
	return nil, l.err
}
func (leader) HasLeader() bool           { return true }
func (leader) Size() (total, used int64) { return 2, 1 }

// A member answers Status by itself: API servers read the version from it, and may not do
// without because the leader is slow or of an earlier version.
func TestStatusDoesNotNeedTheLeader(t *testing.T) {
	for _, test := range []struct {
		name string
		err  error
		says string
	}{
		{"an earlier version", status.Error(codes.Unimplemented, "unknown method Alarm"), ""},
		{"no answer", context.DeadlineExceeded, "does not say which alarms stand"},
		{"an error", errors.New("broken"), "does not say which alarms stand"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := New(Options{Engine: engine.New(engine.Options{}), MemberID: 1, Backend: leader{err: test.err}})
			defer s.Close()
			resp, err := s.Status(t.Context(), &pb.StatusRequest{})
			if err != nil || resp.Version != Version {
				t.Fatalf("%v, %v", resp, err)
			}
			if got := strings.Join(resp.Errors, "; "); !strings.Contains(got, test.says) || (test.says == "" && got != "") {
				t.Errorf("errors: %q", got)
			}
		})
	}
}
