// Package connlimit bounds what strangers can make a server hold: connections in all and for
// each source, new connections and calls per second and source, and bytes before the first call.
//
// A full server does not lock honest callers out. A new connection of a source with few takes
// the place of the oldest one of the source with most; connections whose caller has shown a
// secret keep their place (see [Conn.Keep]). A source is an IPv4 address or a /64 of IPv6, which
// is what one person can have many of.
package connlimit

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Limits of a Listener. All fields must be set.
type Limits struct {
	Total     int // connections
	PerSource int // connections of one source
	// New connections of one source: a burst, then so many per second. More are closed before
	// anything is computed for them.
	NewPerSecond float64
	NewBurst     int
	// Calls of one source: a burst, then so many per second. More wait.
	CallsPerSecond float64
	CallsBurst     int
	// Early is the number of bytes that a connection may send until its first call is read: the
	// TLS handshake with a client certificate, and the headers.
	Early int64
}

const (
	maxSources = 4096        // that are remembered
	minAge     = time.Second // of a connection that makes room where every source has as few
)

// Listener is a net.Listener with limits. Its methods may be called from any goroutine.
type Listener struct {
	net.Listener
	limits Limits

	mu      sync.Mutex
	total   int
	sources map[netip.Addr]*source
}

// source is what is remembered of one. Its fields are guarded by Listener.mu.
type source struct {
	conns []*Conn // the oldest first
	fresh *rate.Limiter
	calls *rate.Limiter
}

// Wrap puts limits on a listener.
func Wrap(l net.Listener, limits Limits) *Listener {
	return &Listener{Listener: l, limits: limits, sources: map[netip.Addr]*source{}}
}

// Source returns what counts as one source: the address, or its /64.
func Source(a netip.Addr) netip.Addr {
	a = a.Unmap().WithZone("")
	if a.Is6() {
		if p, err := a.Prefix(64); err == nil {
			return p.Addr()
		}
	}
	return a
}

// Accept returns the next connection that is within the limits, as a *Conn. Others are closed.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c, evicted := l.admit(raw)
		if evicted != nil {
			evicted.abort()
		}
		if c != nil {
			return c, nil
		}
		abort(raw)
	}
}

// abort closes a connection without waiting for its peer to take what was sent.
func abort(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = c.Close()
}

// admit takes a connection up, or returns nil. evicted is one that made room and is to be closed.
func (l *Listener) admit(raw net.Conn) (c, evicted *Conn) {
	var from netip.Addr
	if ap, err := netip.ParseAddrPort(raw.RemoteAddr().String()); err == nil {
		from = Source(ap.Addr())
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.sources[from]
	if s == nil {
		l.forget()
		s = &source{
			fresh: rate.NewLimiter(rate.Limit(l.limits.NewPerSecond), l.limits.NewBurst),
			calls: rate.NewLimiter(rate.Limit(l.limits.CallsPerSecond), l.limits.CallsBurst),
		}
		l.sources[from] = s
	}
	if !s.fresh.Allow() || len(s.conns) >= l.limits.PerSource {
		return nil, nil
	}
	if l.total >= l.limits.Total {
		if evicted = l.victim(len(s.conns)); evicted == nil {
			return nil, nil
		}
		l.remove(evicted)
	}
	c = &Conn{Conn: raw, l: l, from: from, s: s, since: time.Now(), early: l.limits.Early}
	s.conns = append(s.conns, c)
	l.total++
	return c, evicted
}

// victim chooses the connection that makes room for one of a source that has n: the oldest of
// the source with most, if that one has clearly more, else the oldest that has had its time of
// those sources that have more than n. nil means that there is none: a source never takes the
// place of one that has fewer connections.
func (l *Listener) victim(n int) *Conn {
	var heaviest *source
	var oldest *Conn
	for _, s := range l.sources {
		first := s.evictable()
		if first == nil || len(s.conns) <= n {
			continue
		}
		if heaviest == nil || len(s.conns) > len(heaviest.conns) {
			heaviest = s
		}
		if oldest == nil || first.since.Before(oldest.since) {
			oldest = first
		}
	}
	switch {
	case heaviest == nil:
		return nil
	case len(heaviest.conns) > n+1:
		return heaviest.evictable()
	case time.Since(oldest.since) >= minAge:
		return oldest
	}
	return nil
}

func (s *source) evictable() *Conn {
	for _, c := range s.conns {
		if !c.kept {
			return c
		}
	}
	return nil
}

// forget drops sources without connections when there are too many. A connection's source is
// always remembered, and Total bounds those.
func (l *Listener) forget() {
	for a, s := range l.sources { // in no particular order
		if len(l.sources) < maxSources {
			return
		}
		if len(s.conns) == 0 {
			delete(l.sources, a)
		}
	}
}

// remove takes a connection off the books. l.mu is held.
func (l *Listener) remove(c *Conn) {
	for i, other := range c.s.conns {
		if other == c {
			c.s.conns = append(c.s.conns[:i], c.s.conns[i+1:]...)
			l.total--
			return
		}
	}
}

// Counts returns the number of connections and of sources that have any.
func (l *Listener) Counts() (conns, sources int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.sources {
		if len(s.conns) > 0 {
			sources++
		}
	}
	return l.total, sources
}

// Conn is a connection that a Listener has accepted.
type Conn struct {
	net.Conn
	l     *Listener
	from  netip.Addr
	s     *source
	since time.Time

	kept bool // guarded by l.mu

	mu    sync.Mutex
	early int64 // bytes that may still come before Started; negative afterwards
}

// ErrEarly is returned to a server that reads more than a stranger may send before the first call.
var ErrEarly = errors.New("too many bytes before the first call")

// Read implements net.Conn.
func (c *Conn) Read(p []byte) (int, error) {
	c.mu.Lock()
	left := c.early
	c.mu.Unlock()
	if left == 0 {
		return 0, ErrEarly
	}
	if left > 0 && int64(len(p)) > left {
		p = p[:left]
	}
	n, err := c.Conn.Read(p)
	c.mu.Lock()
	if c.early > 0 {
		c.early = max(c.early-int64(n), 0)
	}
	c.mu.Unlock()
	return n, err
}

// Started lifts the limit of early bytes: the first call has been read.
func (c *Conn) Started() {
	c.mu.Lock()
	c.early = -1
	c.mu.Unlock()
}

// Keep lets the connection have its place until it ends: its caller has shown a secret.
func (c *Conn) Keep() {
	c.l.mu.Lock()
	c.kept = true
	c.l.mu.Unlock()
}

// Call waits until the source may make one more call. It reports whether the caller had to wait,
// and returns the context's error when ctx ends first.
func (c *Conn) Call(ctx context.Context) (waited bool, err error) {
	if c.s.calls.Allow() {
		return false, nil
	}
	return true, c.s.calls.Wait(ctx)
}

// Close implements net.Conn.
func (c *Conn) Close() error {
	c.l.mu.Lock()
	c.l.remove(c)
	c.l.mu.Unlock()
	return c.Conn.Close()
}

func (c *Conn) abort() { abort(c.Conn) }

// Of returns the Conn below a connection of net/http or crypto/tls; nil where there is none.
func Of(conn net.Conn) *Conn {
	for {
		switch c := conn.(type) {
		case *Conn:
			return c
		case interface{ NetConn() net.Conn }:
			conn = c.NetConn()
		default:
			return nil
		}
	}
}

type key struct{}

// Serve ties a Listener's limits to an HTTP server: early bytes end with the first call, and
// handlers find the connection with [From]. Call it before the server serves.
func Serve(srv *http.Server) {
	srv.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		return context.WithValue(ctx, key{}, Of(conn))
	}
	srv.ConnState = func(conn net.Conn, state http.ConnState) {
		if c := Of(conn); c != nil && state == http.StateActive {
			c.Started()
		}
	}
}

// From returns the connection of a call; nil where no Listener of this package accepted it.
func From(ctx context.Context) *Conn {
	c, _ := ctx.Value(key{}).(*Conn)
	return c
}
