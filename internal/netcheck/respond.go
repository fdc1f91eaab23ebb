package netcheck

import (
	"context"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// perPeer is how many questions of one node are answered in a second; a check asks some ten.
	perPeer = 20
	// dialEvery is how often the ports of one node are dialled at its request.
	dialEvery = 5 * time.Second
	// dialWait is how long a port may take to accept.
	dialWait = time.Second
)

// Node is a node as the others know it.
type Node struct {
	Name    string
	Address netip.Addr // its own
	Tunnel  netip.Addr // of its end of the tunnel; the zero value where there is none
	MAC     string     // of its end of the tunnel
	// ControlPlane is set where the node runs an API server and a member of the datastore.
	ControlPlane bool
}

// needs returns which ports of one node another has to reach: the datastore's only between members, the API server's only where
// there is one.
func needs(from, to Node) portSet {
	s := portSet(0b0011)
	if to.ControlPlane {
		s |= 0b0100
		if from.ControlPlane {
			s |= 0b1000
		}
	}
	return s
}

// Responder answers the questions of other nodes.
type Responder struct {
	// Node returns the node whose tunnel has an address; ok is false for everybody else, who gets no answer.
	Node func(netip.Addr) (n Node, ok bool)
	// Dial is net.Dialer's; tests have another.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)

	mu    sync.Mutex
	peers map[netip.Addr]*peer
}

type peer struct {
	limit   *rate.Limiter
	dialled time.Time
	open    portSet
	heard   time.Time
}

// Serve answers on conn, which is bound to the tunnel's address, until ctx ends; it closes conn.
func (r *Responder) Serve(ctx context.Context, conn net.PacketConn) error {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer conn.Close()
	buf := make([]byte, maxSize+1)
	for {
		n, from, err := conn.ReadFrom(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		m, err := unmarshal(buf[:n])
		source, ok := from.(*net.UDPAddr)
		if err != nil || m.kind != ping || !ok {
			continue
		}
		asker, known := r.Node(source.AddrPort().Addr().Unmap())
		if !known {
			continue
		}
		p := r.peer(asker)
		if !p.limit.Allow() {
			continue
		}
		answer := message{kind: pong, nonce: m.nonce, size: m.size}
		if m.asked == 0 {
			_, _ = conn.WriteTo(answer.marshal(), from)
			continue
		}
		wg.Go(func() {
			answer.asked = m.asked
			answer.open = r.dial(ctx, asker, p, m.asked)
			_, _ = conn.WriteTo(answer.marshal(), from)
		})
	}
}

// Heard returns when the last question of a node came, the zero time if none did.
func (r *Responder) Heard(n Node) time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	if p := r.peers[n.Tunnel]; p != nil {
		return p.heard
	}
	return time.Time{}
}

func (r *Responder) peer(n Node) *peer {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.peers == nil {
		r.peers = map[netip.Addr]*peer{}
	}
	p := r.peers[n.Tunnel]
	if p == nil {
		p = &peer{limit: rate.NewLimiter(perPeer, 2*perPeer)}
		r.peers[n.Tunnel] = p
	}
	p.heard = time.Now()
	return p
}

// dial tries ports of a node at the address that the cluster knows it by. In between, the last results count.
func (r *Responder) dial(ctx context.Context, n Node, p *peer, asked portSet) portSet {
	r.mu.Lock()
	fresh := time.Since(p.dialled) < dialEvery
	open := p.open
	if !fresh {
		p.dialled = time.Now()
	}
	r.mu.Unlock()
	if fresh {
		return open & asked
	}
	open = tryPorts(ctx, r.Dial, n.Address, 1<<len(ports)-1)
	r.mu.Lock()
	p.open = open
	r.mu.Unlock()
	return open & asked
}

// tryPorts dials ports side by side and returns those that accepted.
func tryPorts(ctx context.Context, dial func(context.Context, string, string) (net.Conn, error), to netip.Addr, which portSet) (open portSet) {
	if dial == nil {
		dial = (&net.Dialer{}).DialContext
	}
	ctx, cancel := context.WithTimeout(ctx, dialWait)
	defer cancel()
	var wg sync.WaitGroup
	results := make([]bool, len(ports))
	for i, port := range ports {
		if !which.has(i) {
			continue
		}
		wg.Go(func() {
			conn, err := dial(ctx, "tcp", net.JoinHostPort(to.String(), strconv.Itoa(port)))
			if err == nil {
				conn.Close()
				results[i] = true
			}
		})
	}
	wg.Wait()
	for i, ok := range results {
		if ok {
			open |= 1 << i
		}
	}
	return open
}
