package member

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"microk8s/internal/datastore/storedir"

	"github.com/canonical/go-dqlite/v3/client"
)

// FailureDomain is what the file of this name said at the start.
func (m *Member) FailureDomain() uint64 { return m.domain }

// Change asks the local node, which must lead, for a change of membership, role or leadership.
func (m *Member) Change(ctx context.Context, fn func(*client.Client) error) error {
	c, err := m.Client(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	return fn(c)
}

// Weight asks the local node for its weight.
func (m *Member) Weight(ctx context.Context) (weight uint64, err error) {
	err = m.listing.do(ctx, func(c *client.Client) error {
		d, err := c.Describe(ctx)
		if err == nil {
			weight = d.Weight
		}
		return err
	})
	return weight, err
}

// ownClient is a connection to the local node for one question at a time. After an error it is
// made again: answers must not be taken for those of other questions.
type ownClient struct {
	m  *Member
	mu sync.Mutex
	c  *client.Client
}

func (o *ownClient) do(ctx context.Context, fn func(*client.Client) error) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if o.c == nil {
		c, err := o.m.Client(ctx)
		if err != nil {
			return err
		}
		o.c = c
	}
	err := fn(o.c)
	if err != nil {
		o.c.Close()
		o.c = nil
	}
	return err
}

func (o *ownClient) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.c != nil {
		o.c.Close()
		o.c = nil
	}
}

func (m *Member) dialer() *net.Dialer {
	d := &net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 3}}
	if host, _, err := net.SplitHostPort(m.node.Address); err == nil && m.opt.FromOwn {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(host)}
	}
	return d
}

// DialPeer connects to the daemon of another member.
func (m *Member) DialPeer(ctx context.Context, address string) (net.Conn, error) {
	conn, err := m.dialer().DialContext(ctx, "tcp", address)
	if err != nil || m.dialTLS == nil {
		return conn, err
	}
	t := tls.Client(conn, m.dialTLS)
	if err := t.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, fmt.Errorf("cannot agree on TLS with %s: %w; is its %s the same?", address, err, storedir.CertFile)
	}
	if t.ConnectionState().NegotiatedProtocol != PeerProtocol {
		conn.Close()
		return nil, fmt.Errorf("%s is not a datastore of this version; members with upstream's k8s-dqlite cannot be in the same cluster", address)
	}
	return t, nil
}

// Peers listens for the daemons of other members.
func (m *Member) Peers() net.Listener { return m.peers }

// peerListener gives out connections that have been accepted elsewhere.
type peerListener struct {
	address string
	conns   chan net.Conn
	done    chan struct{}
	once    sync.Once
}

func newPeerListener(address string) *peerListener {
	return &peerListener{address: address, conns: make(chan net.Conn), done: make(chan struct{})}
}

// give hands a connection over; false means that nobody takes it.
func (l *peerListener) give(ctx context.Context, c net.Conn) bool {
	select {
	case l.conns <- c:
		return true
	case <-l.done:
	case <-ctx.Done():
	case <-time.After(handshakeTimeout): // the daemon does not listen yet
	}
	return false
}

func (l *peerListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *peerListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

type peerAddr string

func (peerAddr) Network() string  { return "tcp" }
func (a peerAddr) String() string { return string(a) }

func (l *peerListener) Addr() net.Addr { return peerAddr(l.address) }

// peeked is a connection whose first bytes have been read already.
type peeked struct {
	net.Conn
	first []byte
}

func (p *peeked) Read(b []byte) (int, error) {
	if len(p.first) > 0 {
		n := copy(b, p.first)
		p.first = p.first[n:]
		return n, nil
	}
	return p.Conn.Read(b)
}

// peek looks whether a connection without TLS begins as HTTP/2 does. dqlite's protocol begins
// with a small number.
func peek(conn net.Conn) (net.Conn, bool) {
	_ = conn.SetReadDeadline(time.Now().Add(handshakeTimeout))
	first := make([]byte, 3)
	n := 0
	for n < len(first) {
		k, err := conn.Read(first[n:])
		n += k
		if err != nil {
			break
		}
	}
	_ = conn.SetReadDeadline(time.Time{})
	return &peeked{Conn: conn, first: first[:n]}, bytes.Equal(first, []byte("PRI"))
}

// Joining reports whether this node has still to be added to the cluster.
func (m *Member) Joining() bool { return m.dir.Has(storedir.JoinFile) }

// Known returns the members of cluster.yaml. Of a node that is joining only the addresses are known.
func (m *Member) Known() []storedir.Member {
	nodes, _, err := read(m.dir, storedir.ClusterFile, storedir.ParseMembers)
	if err != nil {
		m.opt.Logger.Warn("cannot read the list of members", "err", err)
	}
	return nodes
}

// Remember writes the list of members, and this node's role, where tools and the next start
// find them. The list must come from a leader.
func (m *Member) Remember(members []storedir.Member) error {
	if len(members) == 0 {
		return errors.New("a list without members")
	}
	for _, n := range members {
		if n.ID == m.node.ID {
			own := m.node
			own.Role = n.Role
			if err := m.dir.writeChanged(storedir.InfoFile, string(storedir.EncodeSelf(own))); err != nil {
				return err
			}
		}
	}
	return m.dir.writeChanged(storedir.ClusterFile, string(storedir.EncodeMembers(members)))
}

// Joined ends the joining: the node is one of these members.
func (m *Member) Joined(members []storedir.Member) error {
	if err := m.Remember(members); err != nil {
		return err
	}
	if err := os.Remove(m.dir.File(storedir.JoinFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cannot remove %s: %w", m.dir.File(storedir.JoinFile), err)
	}
	return nil
}

func (d directory) writeChanged(name, content string) error {
	if old, err := os.ReadFile(d.File(name)); err == nil && string(old) == content {
		return nil
	}
	return d.write(name, content)
}
