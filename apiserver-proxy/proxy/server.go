package proxy

import (
	"context"
	"errors"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// server is one API server.
type server struct {
	b       *Balancer
	address string
	ctx     context.Context // ends a while after the server has left the list
	cancel  context.CancelFunc
	now     chan struct{} // asks for a check at once

	// Guarded by b.mu.
	verdict Verdict
	since   time.Time // of the verdict's kind
	stay    func()    // takes a removal back

	mu    sync.Mutex
	links map[*link]struct{}
}

// link is one connection, in both its parts.
type link struct {
	client, backend net.Conn
	early           bool // the server has not said a word: the client can be given to another; guarded by server.mu
}

func newServer(b *Balancer, address string) *server {
	s := &server{b: b, address: address, now: make(chan struct{}, 1), links: map[*link]struct{}{}, since: time.Now()}
	s.ctx, s.cancel = context.WithCancel(b.ctx)
	return s
}

// keepAlive finds out that a server's machine is gone when no check does, such as when there is
// no other server.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 3}

// unacknowledged is how long sent data may stay without an answer of the server's machine.
const unacknowledged = 20 * time.Second

var dialer = net.Dialer{
	KeepAliveConfig: keepAlive,
	Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(unacknowledged/time.Millisecond))
		}), err)
	},
}

func (s *server) dial(ctx context.Context, limit time.Duration) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	conn, err := dialer.DialContext(ctx, "tcp", s.address)
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

// failed records that a client could not be connected: the server receives no more until a check
// has found it well.
func (s *server) failed(err error) {
	if s.ctx.Err() == nil {
		s.b.verdict(s, verdictOf(err))
		s.checkNow()
	}
}

func (s *server) checkNow() {
	select {
	case s.now <- struct{}{}:
	default:
	}
}

// check goes on until ctx ends.
func (s *server) check() {
	session := s.b.probe.Session(s.address)
	defer session.Close()
	silent := 0 // checks without an answer, one after another
	for s.ctx.Err() == nil {
		ctx, cancel := context.WithTimeout(s.ctx, s.b.times.Probe)
		v := session.Probe(ctx)
		cancel()
		if s.ctx.Err() != nil {
			return
		}
		if v.kind == silentKind {
			silent++
		} else {
			silent = 0
		}
		another := s.b.verdict(s, v)
		if why := s.hopeless(v, silent); why != "" && another {
			s.endAll(why)
		}
		if silent == 1 {
			continue // the second check, which decides, at once
		}
		select {
		case <-s.ctx.Done():
		case <-s.now:
		case <-time.After(s.b.times.ProbeEvery):
		}
	}
}

// hopeless says why established connections are to be ended, "" when they are not.
func (s *server) hopeless(v Verdict, silent int) string {
	s.b.mu.Lock()
	age := time.Since(s.since)
	s.b.mu.Unlock()
	switch {
	case v.kind == silentKind && silent >= 2,
		v.kind == failingKind && age >= s.b.times.Failing,
		(v.kind == drainingKind || v.kind == refusingKind) && age >= s.b.times.Drain:
		return v.String()
	}
	return ""
}

// link takes up a connection; false when none are wanted any more.
func (s *server) link(l *link) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.b.ctx.Err() != nil {
		return false
	}
	s.links[l] = struct{}{}
	return true
}

func (s *server) established(l *link) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l.early = false
}

func (s *server) unlink(l *link) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.links, l)
}

// endAll closes all connections, and says why unless that is "". Clients that have heard nothing
// from the server yet stay and go to another one.
func (s *server) endAll(why string) {
	s.mu.Lock()
	n := 0
	for l := range s.links {
		l.backend.Close()
		if !l.early {
			l.client.Close()
			n++
		}
	}
	s.mu.Unlock()
	if n > 0 && why != "" {
		s.b.log.Warn("ended connections to an endpoint", "endpoint", s.address, "connections", n, "reason", why)
	}
}
