package connlimit

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"
)

// pipe is a listener whose connections come from made-up addresses.
type pipe struct {
	conns chan net.Conn
}

func (p *pipe) Accept() (net.Conn, error) {
	c, ok := <-p.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}
func (p *pipe) Close() error   { close(p.conns); return nil }
func (p *pipe) Addr() net.Addr { return &net.TCPAddr{} }

// named is one end of a connection with a remote address.
type named struct {
	net.Conn
	remote string
}

func (n named) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(n.remote), 4000))
}

// closed reports whether the other end was closed.
func closed(t *testing.T, c net.Conn) bool {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	_, err := c.Read(make([]byte, 1))
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrClosedPipe)
}

type fixture struct {
	t *testing.T
	p *pipe
	l *Listener
}

func start(t *testing.T, limits Limits) *fixture {
	p := &pipe{conns: make(chan net.Conn)}
	f := &fixture{t: t, p: p, l: Wrap(p, limits)}
	t.Cleanup(func() { _ = f.l.Close() })
	return f
}

// dial connects from an address. accepted is nil where the connection was closed at once.
func (f *fixture) dial(from string) (client net.Conn, accepted *Conn) {
	f.t.Helper()
	ours, theirs := net.Pipe()
	got := make(chan *Conn, 1)
	go func() {
		c, err := f.l.Accept()
		if err == nil {
			got <- c.(*Conn)
		}
	}()
	f.p.conns <- named{theirs, from}
	select {
	case c := <-got:
		return ours, c
	case <-time.After(100 * time.Millisecond):
		if !closed(f.t, ours) {
			f.t.Errorf("a connection of %s is neither accepted nor closed", from)
		}
		// The Accept that goes on waiting takes the next one: give it one from elsewhere.
		_, theirs := net.Pipe()
		f.p.conns <- named{theirs, "203.0.113.99"}
		(<-got).Close()
		return ours, nil
	}
}

var wide = Limits{Total: 4, PerSource: 3, NewPerSecond: 1e6, NewBurst: 1000, CallsPerSecond: 1e6, CallsBurst: 1000, Early: 1 << 20}

func TestPerSource(t *testing.T) {
	f := start(t, wide)
	var conns []*Conn
	for range 3 {
		_, c := f.dial("192.0.2.1")
		conns = append(conns, c)
	}
	if _, c := f.dial("192.0.2.1"); c != nil {
		t.Error("a fourth connection of one source")
	}
	if _, c := f.dial("192.0.2.2"); c == nil {
		t.Error("another source is refused")
	}
	conns[0].Close()
	conns[0].Close() // counts once
	if _, c := f.dial("192.0.2.1"); c == nil {
		t.Error("the place of a closed connection is not free")
	}
	if n, sources := f.l.Counts(); n != 4 || sources != 2 {
		t.Errorf("%d connections of %d sources", n, sources)
	}
}

// TestFullServer lets the connection of a new source take the place of the heaviest one's oldest,
// but not that of a caller that has shown a secret.
func TestFullServer(t *testing.T) {
	f := start(t, wide)
	oldest, kept := f.dial("192.0.2.1")
	kept.Keep()
	second, _ := f.dial("192.0.2.1")
	f.dial("192.0.2.1")
	f.dial("192.0.2.2")
	if _, c := f.dial("192.0.2.3"); c == nil {
		t.Fatal("a full server refuses a new source")
	}
	if closed(t, oldest) || !closed(t, second) {
		t.Error("the wrong connection made room")
	}
	if n, _ := f.l.Counts(); n != wide.Total {
		t.Errorf("%d connections", n)
	}
}

// TestLighterSources keeps the connection of a source with few, however old it is, when one with
// more wants another.
func TestLighterSources(t *testing.T) {
	f := start(t, wide)
	honest, c := f.dial("192.0.2.1")
	c.since = time.Now().Add(-time.Hour)
	f.dial("192.0.2.2")
	f.dial("192.0.2.2")
	f.dial("192.0.2.3")
	f.dial("192.0.2.3") // of the fifth, which takes a place of 192.0.2.2 or is refused
	f.dial("192.0.2.2")
	if closed(t, honest) {
		t.Error("the only connection of a source made room for others' second")
	}
}

func TestNewPerSecond(t *testing.T) {
	limits := wide
	limits.Total, limits.PerSource, limits.NewPerSecond, limits.NewBurst = 100, 100, 0.001, 5
	f := start(t, limits)
	for i := range 5 {
		_, c := f.dial("192.0.2.1")
		if c == nil {
			t.Fatalf("connection %d of a burst of five is refused", i+1)
		}
		c.Close()
	}
	if _, c := f.dial("192.0.2.1"); c != nil {
		t.Error("a sixth connection at once")
	}
	if _, c := f.dial("2001:db8::1"); c == nil {
		t.Error("another source has to wait")
	}
}

func TestSources(t *testing.T) {
	for _, tc := range []struct {
		x, y string
		same bool
	}{
		{"fd00::1", "fd00::ffff:ffff:ffff:ffff", true},
		{"fd00::1", "fd00:0:0:1::1", false},
		{"10.0.0.1", "::ffff:10.0.0.1", true},
		{"fe80::1%eth0", "fe80::2%eth1", true},
		{"10.0.0.1", "10.0.0.2", false},
	} {
		if got := Source(netip.MustParseAddr(tc.x)) == Source(netip.MustParseAddr(tc.y)); got != tc.same {
			t.Errorf("%s and %s: %v", tc.x, tc.y, got)
		}
	}
	f := start(t, wide)
	for i := range 3 * maxSources {
		_, theirs := net.Pipe()
		c, _ := f.l.admit(named{theirs, netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}).String()})
		c.Close()
	}
	if n := len(f.l.sources); n > maxSources {
		t.Errorf("%d sources are remembered", n)
	}
}

func TestEarlyBytes(t *testing.T) {
	limits := wide
	limits.Early = 10
	f := start(t, limits)
	client, c := f.dial("192.0.2.1")
	go func() { _, _ = client.Write(make([]byte, 100)) }()
	got, err := io.ReadAll(c)
	if len(got) != 10 || !errors.Is(err, ErrEarly) {
		t.Errorf("%d bytes, then %v", len(got), err)
	}
	client.Close()
	client, c = f.dial("192.0.2.2")
	c.Started()
	go func() { _, _ = client.Write(make([]byte, 100)); client.Close() }()
	if got, err := io.ReadAll(c); len(got) != 100 || err != nil {
		t.Errorf("after the first call: %d bytes, then %v", len(got), err)
	}
}

func TestCalls(t *testing.T) {
	limits := wide
	limits.CallsPerSecond, limits.CallsBurst = 0.001, 2
	f := start(t, limits)
	_, c := f.dial("192.0.2.1")
	for range 2 {
		if waited, err := c.Call(t.Context()); waited || err != nil {
			t.Errorf("within the burst: %v %v", waited, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if waited, err := c.Call(ctx); !waited || err == nil {
		t.Errorf("after the burst: %v %v", waited, err)
	}
}

// TestHTTP finds the connection from a handler, and lifts the limit of early bytes.
func TestHTTP(t *testing.T) {
	limits := wide
	limits.Early = 1 << 10
	raw, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if c := From(r.Context()); c == nil || err != nil || n != 100<<10 {
			http.Error(w, "wrong", http.StatusTeapot)
		}
	})}
	Serve(srv)
	l := Wrap(raw, limits)
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(l) }()
	resp, err := http.Post("http://"+raw.Addr().String(), "text/plain", io.LimitReader(zeros{}, 100<<10))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("%d", resp.StatusCode)
	}
	if From(t.Context()) != nil {
		t.Error("a connection from nowhere")
	}
	srv.Close()
	<-ended
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
