package member

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"microk8s/internal/datastore/storedir"
)

// The view follows the node: who leads is known when it is said to have changed, and nothing is known
// of a node that was stopped.
func TestView(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, storedir.InitFile), []byte(fmt.Sprintf("Address: %s\n", address)), 0o600); err != nil {
		t.Fatal(err)
	}
	m, err := Start(Options{Dir: dir, Logger: slog.New(slog.DiscardHandler), DisableTLS: true})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-m.Changed():
	case <-time.After(time.Minute):
		t.Fatal("nobody leads")
	}
	own := m.Node()
	v := m.View()
	if v.Leader.ID != own.ID || v.Leader.Address != address || !v.Leads || v.Term == 0 || !m.Leads() {
		t.Errorf("the only member sees %+v", v)
	}
	for range 2 { // asked for, and remembered
		members, err := m.Cluster(t.Context())
		if err != nil || len(members) != 1 || members[0].Address != address {
			t.Errorf("the members are %v, %v", members, err)
		}
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	if v := m.View(); v != (View{}) {
		t.Errorf("after the end the view is %+v", v)
	}
}
