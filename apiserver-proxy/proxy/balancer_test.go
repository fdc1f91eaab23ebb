package proxy

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"microk8s/internal/longtest"
	"microk8s/internal/pki"
)

func TestConnectionsAreShared(t *testing.T) {
	c := newCluster(t, 3, quick)
	seen := map[string]int{}
	for range 30 {
		seen[c.mustName()]++
	}
	for _, s := range c.servers {
		if seen[s.address] != 10 {
			t.Errorf("%s got %d of 30 connections, want 10: %v", s.address, seen[s.address], seen)
		}
	}
}

func TestKilledServer(t *testing.T) {
	c := newCluster(t, 3, quick)
	st := c.stream(c.servers[1])
	c.servers[1].kill()
	st.ends()
	for range 20 {
		c.mustName()
	}
	c.servers[1].start()
	c.names(c.servers...)
}

func TestFrozenServer(t *testing.T) {
	c := newCluster(t, 3, quick)
	st := c.stream(c.servers[0])
	other := c.stream(c.servers[1])
	c.servers[0].signal(syscall.SIGSTOP)
	for range 6 {
		if got := c.mustName(); got == c.servers[0].address {
			t.Error("a frozen server answers")
		}
	}
	st.ends() // a frozen server's connections end only because the proxy ends them
	if _, err := other.line(); err != nil {
		t.Errorf("the connection to another server ended too: %v", err)
	}
	c.servers[0].signal(syscall.SIGCONT)
	c.names(c.servers...)
}

func TestOnlyServerFrozen(t *testing.T) {
	c := newCluster(t, 1, quick)
	st := c.stream(c.servers[0])
	c.servers[0].signal(syscall.SIGSTOP)
	c.waitLog("deactivated endpoint")
	c.servers[0].signal(syscall.SIGCONT)
	c.waitLog("activated endpoint")
	for range 100 { // more than what was on its way
		if _, err := st.line(); err != nil {
			t.Fatalf("the connection to the only server was ended, which helps nobody: %v", err)
		}
	}
}

func TestServerThatShutsDown(t *testing.T) {
	c := newCluster(t, 2, quick)
	st := c.stream(c.servers[0])
	c.servers[0].signal(syscall.SIGUSR1)
	c.names(c.servers[1])
	if !strings.Contains(c.log.String(), "it is shutting down") {
		t.Errorf("the reason is not said:\n%s", c.log)
	}
	if strings.Contains(c.log.String(), "ended connections") {
		t.Log("this machine is too slow to see the connection living on")
	} else if _, err := st.line(); err != nil {
		t.Errorf("the connection ended at once: %v", err)
	}
	st.ends()
	c.servers[0].signal(syscall.SIGHUP)
	c.names(c.servers...)
}

func TestServerThatCannotWork(t *testing.T) {
	c := newCluster(t, 2, quick)
	st := c.stream(c.servers[0])
	c.servers[0].signal(syscall.SIGUSR2)
	c.names(c.servers[1])
	st.ends()
	c.servers[1].signal(syscall.SIGUSR2) // none is well: rather these than nothing
	c.names(c.servers...)
}

func TestForeignServer(t *testing.T) {
	c := newCluster(t, 2, quick)
	foreign := &standIn{t: t, address: pickAddresses(t, 1)[0]}
	foreign.dir, _ = newFiles(t, pki.Maker{}, "https://127.0.0.1:1")
	foreign.start()
	t.Cleanup(foreign.kill)
	c.balancer.Set([]string{c.servers[0].address, c.servers[1].address, foreign.address})
	c.waitLog("it is no API server of this cluster")
	c.names(c.servers...)
}

func TestServersComeAndGo(t *testing.T) {
	c := newCluster(t, 3, quick)
	st, stays := c.stream(c.servers[2]), c.stream(c.servers[0])
	c.balancer.Set([]string{c.servers[0].address, c.servers[1].address})
	c.names(c.servers[0], c.servers[1])
	st.ends()
	if _, err := stays.line(); err != nil {
		t.Errorf("a connection to a server that is still listed ended: %v", err)
	}
	c.balancer.Set([]string{c.servers[2].address})
	c.names(c.servers[2])

	// One that comes back in time keeps its connections.
	long := quick
	long.Removed = time.Hour
	c = newCluster(t, 2, long)
	st = c.stream(c.servers[1])
	for range 5 {
		c.balancer.Set([]string{c.servers[0].address})
		c.names(c.servers[0])
		c.balancer.Set([]string{c.servers[0].address, c.servers[1].address})
		c.names(c.servers...)
	}
	if _, err := st.line(); err != nil {
		t.Errorf("the connection ended: %v", err)
	}
	c.balancer.mu.Lock()
	defer c.balancer.mu.Unlock()
	if n := len(c.balancer.removed); n != 0 {
		t.Errorf("%d servers are still to be removed", n)
	}
}

// TestChurn kills, freezes and drains servers in random order, always leaving one well, and
// changes the list, while clients connect all the time. None may fail.
func TestChurn(t *testing.T) {
	withSeeds(t, func(t *testing.T, rnd *rand.Rand) {
		times := quick
		times.FirstByte = 300 * time.Millisecond
		c := newCluster(t, 4, times)
		var wg sync.WaitGroup
		stop := make(chan struct{})
		counts := make([]int, 4)
		for i := range counts {
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					conn, err := c.handshake()
					if err != nil {
						t.Errorf("connection %d of client %d failed while a server lived: %v", counts[i], i, err)
						return
					}
					conn.Close()
					counts[i]++
				}
			})
		}
		rounds := longtest.Of(100, 15)
		for round := range rounds {
			well := rnd.IntN(len(c.servers))
			var undo []func()
			for i, s := range c.servers {
				if i == well {
					continue
				}
				switch rnd.IntN(5) {
				case 0:
					s.kill()
					undo = append(undo, s.start)
				case 1:
					s.signal(syscall.SIGSTOP)
					undo = append(undo, func() { s.signal(syscall.SIGCONT) })
				case 2:
					s.signal(syscall.SIGUSR1)
					undo = append(undo, func() { s.signal(syscall.SIGHUP) })
				case 3:
					var some []string
					for j, s := range c.servers {
						if j == well || rnd.IntN(2) == 0 {
							some = append(some, s.address)
						}
					}
					c.balancer.Set(some)
				}
			}
			c.mustName()
			for _, f := range undo {
				f()
			}
			var all []string
			for _, s := range c.servers {
				all = append(all, s.address)
			}
			c.balancer.Set(all)
			c.mustName()
			if t.Failed() {
				t.Logf("in round %d", round)
				break
			}
		}
		close(stop)
		wg.Wait()
		t.Logf("connections made: %v", counts)
	})
}

// raw is a server of the test's own protocol behind a balancer that knows open ports only.
func raw(t *testing.T, times Times, serve ...func(*net.TCPConn)) (dial func() *net.TCPConn) {
	t.Helper()
	b := NewBalancer(nil, times, slog.New(slog.NewTextHandler(t.Output(), nil)))
	var addresses []string
	var wg sync.WaitGroup
	for _, f := range serve {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addresses = append(addresses, l.Addr().String())
		wg.Go(func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				wg.Go(func() { defer conn.Close(); f(conn.(*net.TCPConn)) })
			}
		})
		t.Cleanup(func() { l.Close() })
	}
	b.Set(addresses)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.Serve(ctx, l, 10) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		b.Close()
	})
	return func() *net.TCPConn {
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn.(*net.TCPConn)
	}
}

func TestHalfClose(t *testing.T) {
	dial := raw(t, Times{}, func(c *net.TCPConn) {
		data, err := io.ReadAll(c)
		fmt.Fprintf(c, "%d bytes, %v", len(data), err)
	})
	conn := dial()
	if _, err := conn.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); string(got) != "1048576 bytes, <nil>" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

func TestHalfOpenEnds(t *testing.T) {
	ended := make(chan error, 1)
	dial := raw(t, Times{HalfOpen: 50 * time.Millisecond}, func(c *net.TCPConn) {
		_, _ = io.Copy(io.Discard, c)
		for range 10 { // slow, but not silent
			_, _ = c.Write([]byte("x"))
			time.Sleep(20 * time.Millisecond)
		}
		_, err := c.Read(make([]byte, 1)) // the proxy has half closed already
		for err != nil {                  // until it has closed, which only writing shows
			if _, werr := c.Write([]byte("y")); werr != nil {
				ended <- werr
				return
			}
			time.Sleep(200 * time.Millisecond)
		}
	})
	conn := dial()
	_, _ = conn.Write([]byte("hello"))
	_ = conn.CloseWrite()
	got, _ := io.ReadAll(conn)
	if !strings.HasPrefix(string(got), "xxxxxxxxxx") {
		t.Errorf("%q: cut although something came all the time", got)
	}
	<-ended
}

func TestServerSpeaksFirst(t *testing.T) {
	dial := raw(t, Times{Greeting: 10 * time.Millisecond}, func(c *net.TCPConn) { fmt.Fprint(c, "welcome") })
	if got, err := io.ReadAll(dial()); string(got) != "welcome" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

// hello is a record with a ClientHello as far as the proxy looks into it.
var hello = append([]byte{22, 3, 1, 0, 8, 1, 0, 0, 4}, "abcd"...)

func TestGreetingIsGivenToTheNext(t *testing.T) {
	for _, tc := range []struct {
		name string
		bad  func(*net.TCPConn)
	}{
		{"closes", func(*net.TCPConn) {}},
		{"reads and closes", func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 100)) }},
		{"resets", func(c *net.TCPConn) { _ = c.SetLinger(0) }},
		{"says nothing", func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			good := func(c *net.TCPConn) {
				buf := make([]byte, len(hello))
				_, err := io.ReadFull(c, buf)
				fmt.Fprintf(c, "%q %v", buf, err)
			}
			dial := raw(t, Times{FirstByte: 100 * time.Millisecond}, tc.bad, tc.bad, good)
			for range 5 {
				conn := dial()
				// In pieces, as a network may deliver it.
				for _, part := range [][]byte{hello[:1], hello[1:7], hello[7:]} {
					if _, err := conn.Write(part); err != nil {
						t.Fatal(err)
					}
				}
				if got, err := io.ReadAll(conn); string(got) != fmt.Sprintf("%q <nil>", hello) || err != nil {
					t.Errorf("%q, %v", got, err)
				}
			}
		})
	}
}

func TestSlowServers(t *testing.T) {
	slow := func(c *net.TCPConn) {
		_, _ = io.ReadFull(c, make([]byte, len(hello)))
		select {
		case <-time.After(100 * time.Millisecond):
			fmt.Fprint(c, "at last")
		case <-t.Context().Done():
		}
	}
	for n := range 3 {
		servers := []func(*net.TCPConn){slow}
		for range n {
			servers = append(servers, slow)
		}
		dial := raw(t, Times{FirstByte: 20 * time.Millisecond}, servers...)
		conn := dial()
		_, _ = conn.Write(hello)
		if got, err := io.ReadAll(conn); string(got) != "at last" || err != nil {
			t.Errorf("%d servers: %q, %v", n+1, got, err)
		}
	}
}

func TestIsGreeting(t *testing.T) {
	for _, tc := range []struct {
		name           string
		data           string
		whole, decided bool
	}{
		{"nothing", "", false, false},
		{"HTTP", "G", false, true},
		{"half a header", string(hello[:7]), false, false},
		{"all but a byte", string(hello[:len(hello)-1]), false, false},
		{"whole", string(hello), true, true},
		{"more than one", string(hello) + "x", false, true},
		{"a greeting of two records", string([]byte{22, 3, 1, 0, 8, 1, 0, 1, 4, 'a', 'b', 'c', 'd'}), false, true},
		{"another message", string([]byte{22, 3, 1, 0, 8, 2, 0, 0, 4, 'a', 'b', 'c', 'd'}), false, true},
		{"too long", string([]byte{22, 3, 1, 0xff, 0xff, 1, 0, 0xff, 0xfb}), false, true},
	} {
		if whole, decided := isGreeting([]byte(tc.data)); whole != tc.whole || decided != tc.decided {
			t.Errorf("%s: whole %v, decided %v", tc.name, whole, decided)
		}
	}
}

func TestLimitOfConnections(t *testing.T) {
	dial := raw(t, Times{}, func(c *net.TCPConn) { _, _ = io.Copy(c, c) })
	var conns []*net.TCPConn
	for range 10 {
		conn := dial()
		echo(t, conn)
		conns = append(conns, conn)
	}
	extra := dial() // waits in the kernel's queue
	conns[3].Close()
	echo(t, extra)
	for i, c := range conns {
		if i != 3 {
			echo(t, c)
		}
	}
}

// elsewhere is a listener whose clients come from the addresses that are put into from.
type elsewhere struct {
	net.Listener
	from chan string
}

type visitor struct {
	*net.TCPConn
	address string
}

func (v visitor) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(v.address), 4000))
}

func (l elsewhere) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return visitor{conn.(*net.TCPConn), <-l.from}, nil
}

// TestOtherMachines: where the proxy listens for others too, they cannot keep the node itself out.
func TestOtherMachines(t *testing.T) {
	server, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	go func() {
		for {
			conn, err := server.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(conn, conn); conn.Close() }()
		}
	}()
	b := NewBalancer(nil, Times{}, slog.New(slog.DiscardHandler))
	b.Set([]string{server.Addr().String()})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	from := make(chan string, 1)
	go func() { done <- b.Serve(ctx, elsewhere{l, from}, 12) }() // 3 of one source, 6 in all
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		b.Close()
	}()
	dial := func(address string) (conn net.Conn, open bool) {
		t.Helper()
		from <- address
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second)) // it may wait in the kernel's queue
		_, err = conn.Write([]byte("x"))
		if err == nil {
			_, err = io.ReadFull(conn, make([]byte, 1))
		}
		return conn, err == nil
	}
	var first net.Conn
	for _, tc := range []struct {
		address string
		open    bool
	}{
		{"192.0.2.1", true}, {"192.0.2.1", true}, {"::ffff:192.0.2.1", true}, {"192.0.2.1", false},
		{"2001:db8::1", true}, {"2001:db8::2", true}, {"2001:db8::3", true}, {"192.0.2.7", false},
		{"127.0.0.1", true}, {"::1", true}, {"127.0.0.1", true}, {"127.0.0.1", true}, {"127.0.0.1", true},
	} {
		conn, open := dial(tc.address)
		if open != tc.open {
			t.Errorf("one from %s is open: %v, want %v", tc.address, open, tc.open)
		}
		if first == nil {
			first = conn
		}
	}
	first.Close()
	eventually := time.Now().Add(10 * time.Second)
	for {
		if _, open := dial("192.0.2.7"); open {
			break
		}
		if time.Now().After(eventually) {
			t.Fatal("the place of one that has ended is not free")
		}
	}
}

func echo(t *testing.T, conn net.Conn) {
	t.Helper()
	buf := make([]byte, 4)
	if _, err := conn.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, buf); err != nil || string(buf) != "ping" {
		t.Fatalf("%q, %v", buf, err)
	}
}
