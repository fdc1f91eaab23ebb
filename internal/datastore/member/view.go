package member

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"unsafe"

	"microk8s/internal/datastore/storedir"

	"github.com/canonical/go-dqlite/v3/client"
	"golang.org/x/sys/unix"
)

/*
#include <dqlite.h>
*/
import "C"

// View is what the local node knows of who leads, as of one moment
// (scripts/components/dqlite/view.patch). What this node sends to others, a vote or the
// acknowledgement of an entry, it sends after it is seen here that it knows of the sender's term
// or leader.
type View struct {
	Term          uint64
	Configuration uint64 // changes with the members and their roles
	Leads         bool   // this node leads in Term, as long as it has not left that term

	// Leader is who leads as far as this node knows; the zero value is nobody. A node that has no
	// vote never knows, and one that gives leadership away says nobody.
	Leader storedir.Member
}

// View reads what the local node knows, now. It neither waits for the node's thread nor for the
// disk. A node that was stopped knows nothing.
func (m *Member) View() View {
	name := append([]byte(m.socket), 0)
	var v C.struct_dqlite_view
	if C.dqlite_view_get((*C.char)(unsafe.Pointer(&name[0])), &v) != 0 {
		return View{}
	}
	out := View{Term: uint64(v.term), Configuration: uint64(v.configuration), Leads: bool(v.leads)}
	if v.leader_id != 0 {
		out.Leader = storedir.Member{ID: uint64(v.leader_id), Address: C.GoString(&v.leader_address[0])}
	}
	return out
}

// Leader is who leads as far as the local node knows, the zero value if it knows of nobody. A spare never
// knows: the leader sends it nothing.
func (m *Member) Leader() storedir.Member { return m.View().Leader }

// Leads reports whether the local node leads and does not give leadership away.
func (m *Member) Leads() bool { return m.Leader().ID == m.node.ID }

// leading returns the term in which the local node leads, if it does.
func (m *Member) leading() (term uint64, leads bool) {
	v := m.View()
	return v.Term, v.Leads
}

// Changed has a value after Leader has changed.
func (m *Member) Changed() <-chan struct{} { return m.changed }

// watchView waits for changes of who leads until stop is closed, and notes term and vote.
func (m *Member) watchView(events *os.File) {
	defer m.wg.Done()
	var was View
	count := make([]byte, 8)
	for {
		now := m.View()
		if was.Leader.ID != now.Leader.ID {
			if now.Leader.ID != 0 {
				m.opt.Logger.Info("the leader has changed", "leader", now.Leader.Address, "self", now.Leader.ID == m.node.ID)
			} else {
				m.opt.Logger.Info("nobody leads, as far as this member knows")
			}
			select {
			case m.changed <- struct{}{}:
			default:
			}
			m.rememberTerm() // not at each term: its vote may be on the way to the disk
		}
		was = now
		if _, err := events.Read(count); err != nil {
			if !errors.Is(err, os.ErrClosed) {
				m.opt.Logger.Error("cannot watch for a change of leader", "err", err)
			}
			return
		}
	}
}

// viewEvents returns a file that can be read after each change of the view.
func (m *Member) viewEvents() (*os.File, error) {
	name := append([]byte(m.socket), 0)
	fd, err := C.dqlite_view_fd((*C.char)(unsafe.Pointer(&name[0])))
	if fd < 0 {
		return nil, fmt.Errorf("cannot watch for a change of leader: %w", err)
	}
	if err := unix.SetNonblock(int(fd), true); err != nil { // for the poller of os.File
		unix.Close(int(fd))
		return nil, fmt.Errorf("cannot watch for a change of leader: %w", err)
	}
	return os.NewFile(uintptr(fd), "eventfd"), nil
}

// memberList is what the local node said last of the members, for as long as its view says that
// nothing has changed.
type memberList struct {
	mu    sync.Mutex
	of    View
	nodes []client.NodeInfo
}

// Cluster returns the members as the local node has them, which the caller must not change. Only that of
// a leader is sure to be the latest.
func (m *Member) Cluster(ctx context.Context) (nodes []client.NodeInfo, err error) {
	l := &m.known
	l.mu.Lock()
	defer l.mu.Unlock()
	// Before the question: the answer is at least as new.
	of := m.View()
	if l.nodes != nil && of.Term == l.of.Term && of.Configuration == l.of.Configuration {
		return l.nodes, nil
	}
	err = m.listing.do(ctx, func(c *client.Client) error {
		nodes, err = c.Cluster(ctx)
		return err
	})
	if err != nil {
		return nil, err
	}
	l.of, l.nodes = of, nodes
	return nodes, nil
}
