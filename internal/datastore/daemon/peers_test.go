package daemon

import (
	"errors"
	"testing"

	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
)

func TestMembersOfOne(t *testing.T) {
	t.Parallel()
	dir := newDir(t)
	if _, err := peers.Members(testContext(t), dir); !errors.Is(err, peers.ErrNotRunning) {
		t.Errorf("without a daemon: %v", err)
	}
	p := start(t, dir)
	got, err := peers.Members(testContext(t), dir)
	if err != nil || len(got) != 1 {
		t.Fatal(got, err)
	}
	if m := got[0]; !m.Self || !m.Online || !m.Leader || m.Role != storedir.Voter || m.Address == "" || m.LastSeen.IsZero() {
		t.Errorf("the only member: %+v", m)
	}
	if err := peers.Remove(testContext(t), dir, got[0].Address); !errors.Is(err, peers.ErrOnlyMember) {
		t.Errorf("removing it: %v", err)
	}
	if err := peers.Remove(testContext(t), dir, "127.0.0.1:1"); !errors.Is(err, peers.ErrNotMember) {
		t.Errorf("removing who is none: %v", err)
	}
	p.stop()
	if _, err := peers.Members(testContext(t), dir); !errors.Is(err, peers.ErrNotRunning) {
		t.Errorf("after its end: %v", err)
	}
}
