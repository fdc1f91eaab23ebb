package proxy

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/traefik/traefik/v2/pkg/tcp"

	"microk8s/internal/connlimit"
)

// Times are the limits of one proxy. Zero values become those of [DefaultTimes].
type Times struct {
	Dial      time.Duration // to connect to a server
	Hedge     time.Duration // without an answer to a dial before the next server is dialled too
	FirstByte time.Duration // from a client's greeting to the server's first byte, while there are others to try
	Greeting  time.Duration // for a client's first bytes before a server is connected all the same

	ProbeEvery time.Duration // between two health checks of a server
	Probe      time.Duration // for the answer to one

	Failing  time.Duration // how long connections stay to a server that says that it cannot work
	Drain    time.Duration // … that says that it is shutting down, or takes no connections any more
	Removed  time.Duration // … that is not in the list any more
	HalfOpen time.Duration // without a byte before a connection that one side has closed is ended
}

// DefaultTimes suit machines in one building. A frozen server is left alone after at most
// ProbeEvery + 2 × Probe.
var DefaultTimes = Times{
	Dial: 3 * time.Second, Hedge: 300 * time.Millisecond, FirstByte: 2 * time.Second, Greeting: time.Second,
	ProbeEvery: time.Second, Probe: time.Second,
	Failing: 5 * time.Second, Drain: 20 * time.Second, Removed: 30 * time.Second, HalfOpen: time.Minute,
}

func (t Times) withDefaults() Times {
	d := DefaultTimes
	for _, f := range []struct {
		have *time.Duration
		def  time.Duration
	}{
		{&t.Dial, d.Dial}, {&t.Hedge, d.Hedge}, {&t.FirstByte, d.FirstByte}, {&t.Greeting, d.Greeting},
		{&t.ProbeEvery, d.ProbeEvery}, {&t.Probe, d.Probe},
		{&t.Failing, d.Failing}, {&t.Drain, d.Drain}, {&t.Removed, d.Removed}, {&t.HalfOpen, d.HalfOpen},
	} {
		if *f.have <= 0 {
			*f.have = f.def
		}
	}
	return t
}

// Balancer connects clients to servers.
//
// A client goes to the server whose turn it is among those that are well. When it cannot be
// connected, or ends the connection before its first byte, the client is given to the next one
// with all that it has sent, without noticing: what is repeated is a TLS greeting, which no
// server has acted upon. Only when all servers were tried is the client's connection closed.
// One that accepts connections and is silent is tried a second time, with more patience.
//
// Each server is checked all the time. One that is not well gets no new connections while
// another is; what happens to its established connections depends on what is wrong:
// see [Verdict]. A server without any connection costs one check in a second.
//
// All methods may be called concurrently. Close ends everything and waits.
type Balancer struct {
	log   *slog.Logger
	times Times
	probe Prober

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // health checks and connections

	switcher tcp.HandlerSwitcher

	mu      sync.Mutex
	servers []*server            // in the list, sorted by address
	removed map[string]*server   // not in the list any more, for a while
	told    map[string]time.Time // when these things were said last
}

// NewBalancer makes a balancer without servers, which closes every connection. probe may be nil:
// then a server is well that accepts connections.
func NewBalancer(probe Prober, times Times, log *slog.Logger) *Balancer {
	b := &Balancer{log: log, times: times.withDefaults(), probe: probe, removed: map[string]*server{}, told: map[string]time.Time{}}
	if b.probe == nil {
		b.probe = connectProber{}
	}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	b.switcher.Switch(tcp.NewWRRLoadBalancer())
	return b
}

// Set replaces the list of servers (host:port each, no two the same). Servers that stay keep
// their connections; those that are not in it any more keep theirs for a while.
func (b *Balancer) Set(addresses []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ctx.Err() != nil {
		return
	}
	var next []*server
	for _, a := range addresses {
		i := slices.IndexFunc(b.servers, func(s *server) bool { return s.address == a })
		if i >= 0 {
			next = append(next, b.servers[i])
			continue
		}
		if s := b.removed[a]; s != nil { // it has come back
			s.stay()
			delete(b.removed, a)
			next = append(next, s)
			continue
		}
		s := newServer(b, a)
		next = append(next, s)
		b.wg.Go(s.check)
	}
	for _, s := range b.servers {
		if !slices.Contains(next, s) {
			b.retire(s)
		}
	}
	slices.SortFunc(next, func(x, y *server) int { return strings.Compare(x.address, y.address) })
	b.servers = next
	b.rebuild()
}

// retire ends a server and its connections after a while, unless it stays. mu is held.
func (b *Balancer) retire(s *server) {
	ctx, stay := context.WithCancel(b.ctx)
	s.stay, b.removed[s.address] = stay, s
	b.wg.Go(func() {
		defer stay()
		select {
		case <-ctx.Done():
			return
		case <-time.After(b.times.Removed):
		}
		b.mu.Lock()
		stays := ctx.Err() != nil
		if !stays {
			delete(b.removed, s.address)
		}
		b.mu.Unlock()
		if !stays {
			s.cancel()
			s.endAll("it is not in the list any more")
		}
	})
}

// rebuild sends new connections to the healthy servers, or to all if none is. mu is held.
func (b *Balancer) rebuild() {
	var well, rest []*server
	for _, s := range b.servers {
		if s.verdict.usable() {
			well = append(well, s)
		} else {
			rest = append(rest, s)
		}
	}
	if len(well) == 0 {
		well, rest = rest, nil
	}
	// The new balancer begins with the first server again; turning the list keeps the first
	// from getting more than its share where things change often.
	if len(well) > 0 {
		n := int(time.Now().UnixNano()/int64(time.Microsecond)) % len(well)
		well = slices.Concat(well[n:], well[:n])
	}
	next := tcp.NewWRRLoadBalancer()
	for i := range well {
		order := slices.Concat(well[i:], well[:i], rest)
		next.AddServer(tcp.HandlerFunc(func(client tcp.WriteCloser) { b.forward(client, order) }))
	}
	b.switcher.Switch(next)
}

// verdict takes in what is now known of a server and reports whether another one is healthy.
func (b *Balancer) verdict(s *server, v Verdict) (another bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if before := s.verdict; before.kind != v.kind {
		s.since = time.Now()
		s.verdict = v
		switch {
		case !v.usable():
			b.log.Warn("deactivated endpoint", "endpoint", s.address, "reason", v)
		case !before.usable():
			b.log.Info("activated endpoint", "endpoint", s.address)
		}
		if before.usable() != v.usable() {
			b.rebuild()
		}
	}
	for _, o := range b.servers {
		if o != s && o.verdict.kind == wellKind {
			return true
		}
	}
	return false
}

func (b *Balancer) usable(s *server) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return s.verdict.usable()
}

// Addresses lists the servers, sorted.
func (b *Balancer) Addresses() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make([]string, len(b.servers))
	for i, s := range b.servers {
		out[i] = s.address
	}
	return out
}

// Close ends all connections and checks and waits for them.
func (b *Balancer) Close() {
	b.mu.Lock()
	b.cancel()
	all := slices.Clone(b.servers)
	for _, s := range b.removed {
		all = append(all, s)
	}
	b.mu.Unlock()
	for _, s := range all {
		s.endAll("")
	}
	b.wg.Wait()
}

// Serve accepts clients until ctx ends or accepting fails for good, with at most limit
// connections at a time; further ones wait in the kernel's queue. Where the proxy listens for other
// machines too, one of them has at most a quarter of the connections, and all of them half: the
// node's own kubelet and kube-proxy always find room. More are closed. Serve closes the listener,
// leaves established connections to Close, and returns nil when ctx has ended.
func (b *Balancer) Serve(ctx context.Context, listener net.Listener, limit int) error {
	stop := context.AfterFunc(ctx, func() { listener.Close() })
	defer stop()
	defer listener.Close()
	slots := make(chan struct{}, limit)
	others := &guests{each: max(limit/4, 1), all: max(limit/2, 1), from: map[netip.Addr]int{}}
	pause := time.Duration(0)
	for {
		select {
		case slots <- struct{}{}:
		default:
			b.logRateLimited("connection limit reached; new connections are queued", "limit", limit)
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return nil
			}
		}
		conn, err := listener.Accept()
		if err != nil {
			<-slots
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return err
			}
			// Out of descriptors or memory: it passes.
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			b.log.Warn("cannot accept a connection", "err", err, "retry_in", pause)
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return nil
			}
			continue
		}
		pause = 0
		client, ok := conn.(tcp.WriteCloser)
		if !ok {
			conn.Close()
			<-slots
			continue
		}
		leave, ok := others.admit(conn.RemoteAddr())
		if !ok {
			conn.Close()
			<-slots
			b.logRateLimited("a machine has too many connections; new ones are closed", "from", conn.RemoteAddr().String())
			continue
		}
		b.wg.Go(func() {
			defer func() { <-slots }()
			defer leave()
			defer client.Close()
			b.switcher.ServeTCP(client)
		})
	}
}

// guests counts the connections of other machines.
type guests struct {
	each, all int // at most, of one source and of all
	mu        sync.Mutex
	from      map[netip.Addr]int
	n         int
}

// admit takes up a connection unless there are too many; leave takes it out. Those of this machine are
// not counted.
func (g *guests) admit(a net.Addr) (leave func(), ok bool) {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil || ap.Addr().Unmap().IsLoopback() {
		return func() {}, true
	}
	source := connlimit.Source(ap.Addr())
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.n >= g.all || g.from[source] >= g.each {
		return nil, false
	}
	g.n++
	g.from[source]++
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.n--
		if g.from[source]--; g.from[source] == 0 {
			delete(g.from, source)
		}
	}, true
}

// logRateLimited logs what clients may cause as often as they like, at most once in ten seconds.
func (b *Balancer) logRateLimited(msg string, args ...any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if now := time.Now(); now.Sub(b.told[msg]) > 10*time.Second {
		b.told[msg] = now
		b.log.Error(msg, args...)
	}
}
