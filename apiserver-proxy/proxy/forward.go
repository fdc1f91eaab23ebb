package proxy

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"time"

	"github.com/traefik/traefik/v2/pkg/tcp"
)

// forward connects a client to the first of servers that works and copies until both sides are
// done. The caller closes client.
func (b *Balancer) forward(client tcp.WriteCloser, servers []*server) {
	greeting, complete, err := readGreeting(client, b.times.Greeting)
	if err != nil {
		return
	}
	var last error
	patience, wait := b.times.FirstByte, len(servers) == 1
	for len(servers) > 0 {
		var slow []*server // connected, but without a word
		for rest := servers; len(rest) > 0; {
			var backend *net.TCPConn
			var s *server
			if backend, s, rest, err = b.dial(rest); err != nil {
				last = err
				break
			}
			more := complete && !(wait && len(rest) == 0)
			again, err := b.converse(client, backend, s, greeting, more, patience)
			if !again {
				return
			}
			if last = err; errors.Is(err, os.ErrDeadlineExceeded) {
				slow = append(slow, s)
			}
		}
		// Once more those that are only slow, with more time, and without a limit for the last.
		slices.SortStableFunc(slow, func(x, y *server) int { return compareBool(b.usable(y), b.usable(x)) })
		servers, patience, wait = slow, 10*patience, true
	}
	if b.ctx.Err() == nil {
		b.noServer(last)
	}
}

func compareBool(x, y bool) int {
	switch {
	case x == y:
		return 0
	case x:
		return 1
	}
	return -1
}

// converse sends the greeting and copies. With again the server has not taken the connection
// and another one can be tried; that is only so when more is set, and then its first byte is
// waited for no longer than patience.
func (b *Balancer) converse(client tcp.WriteCloser, backend *net.TCPConn, s *server, greeting []byte, more bool, patience time.Duration) (again bool, err error) {
	defer backend.Close()
	l := &link{client: client, backend: backend}
	if !more {
		if !s.link(l) {
			return false, nil
		}
		defer s.unlink(l)
	}
	if len(greeting) > 0 {
		if _, err := backend.Write(greeting); err != nil {
			s.failed(err)
			return more, err
		}
	}
	if more {
		// As long as the server has said nothing the connection is not counted as
		// established: it is not ended but given to another server.
		first := make([]byte, 16<<10)
		stop := context.AfterFunc(b.ctx, func() { backend.Close() })
		_ = backend.SetReadDeadline(time.Now().Add(patience))
		n, err := backend.Read(first)
		if !stop() {
			return false, nil
		}
		if err != nil {
			s.failed(err)
			return true, err
		}
		_ = backend.SetReadDeadline(time.Time{})
		if !s.link(l) {
			return false, nil
		}
		defer s.unlink(l)
		if _, err := client.Write(first[:n]); err != nil {
			return false, nil
		}
	}
	b.copyBoth(client, backend)
	return false, nil
}

// copyBoth copies in both directions. The end of one is passed on and leaves the other going, as
// TCP has it; an error ends both.
func (b *Balancer) copyBoth(client tcp.WriteCloser, backend *net.TCPConn) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.copyOne(backend, client)
	}()
	b.copyOne(client, backend)
	<-done
}

func (b *Balancer) copyOne(to, from tcp.WriteCloser) {
	for {
		// Between two TCP connections this is splice(2): the bytes stay in the kernel.
		n, err := io.Copy(to, from)
		if errors.Is(err, os.ErrDeadlineExceeded) && n > 0 {
			// The other direction has ended, but in this one something still comes.
			_ = from.SetReadDeadline(time.Now().Add(b.times.HalfOpen))
			continue
		}
		if err != nil || to.CloseWrite() != nil {
			to.Close()
			from.Close()
			return
		}
		// to may still answer, but not stay silent for ever.
		_ = to.SetReadDeadline(time.Now().Add(b.times.HalfOpen))
		return
	}
}

// dial connects to one of servers, in their order: to the next one as soon as one fails, or is
// silent for a moment. rest are those that were not found to fail.
func (b *Balancer) dial(servers []*server) (conn *net.TCPConn, which *server, rest []*server, err error) {
	type result struct {
		s    *server
		conn *net.TCPConn
		err  error
	}
	ctx, cancel := context.WithCancel(b.ctx)
	results := make(chan result, len(servers))
	next, running := 0, 0
	start := func() {
		s := servers[next]
		next, running = next+1, running+1
		go func() {
			conn, err := s.dial(ctx)
			results <- result{s, conn, err}
		}()
	}
	defer func() {
		cancel()
		for range running { // at once: their context has ended
			if r := <-results; r.conn != nil {
				r.conn.Close()
			}
		}
	}()
	failed := map[*server]bool{}
	start()
	hedge := time.NewTimer(b.times.Hedge)
	defer hedge.Stop()
	for running > 0 {
		select {
		case r := <-results:
			running--
			if r.err == nil {
				for _, s := range servers {
					if s != r.s && !failed[s] {
						rest = append(rest, s)
					}
				}
				return r.conn, r.s, rest, nil
			}
			if b.ctx.Err() != nil {
				return nil, nil, nil, b.ctx.Err()
			}
			failed[r.s], err = true, r.err
			r.s.failed(r.err)
			if next < len(servers) {
				start()
				hedge.Reset(b.times.Hedge)
			}
		case <-hedge.C:
			if next < len(servers) && b.usable(servers[next]) { // rather wait than ask one that is not well
				start()
				hedge.Reset(b.times.Hedge)
			}
		}
	}
	return nil, nil, nil, err
}

// Sizes of TLS (RFC 8446, 4 and 5.1).
const (
	recordHeader    = 5
	messageHeader   = 4
	maxRecord       = 1 << 14
	handshakeRecord = 22
	clientHello     = 1
)

// readGreeting reads the record with which a TLS client begins. complete says that it is one,
// whole: then the client says nothing more before it has an answer, and the bytes can be sent
// to one server after another. Anything else is returned as far as it has come, and a client
// that says nothing within the limit waits for its server to speak first.
func readGreeting(client net.Conn, limit time.Duration) (greeting []byte, complete bool, err error) {
	_ = client.SetReadDeadline(time.Now().Add(limit))
	defer client.SetReadDeadline(time.Time{})
	buf := make([]byte, recordHeader+maxRecord)
	n := 0
	for {
		m, err := client.Read(buf[n:])
		n += m
		whole, decided := isGreeting(buf[:n])
		switch {
		case decided:
			return buf[:n], whole, nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			return buf[:n], false, nil
		case err != nil && n == 0:
			return nil, false, err // closed without a word, as checks of ports do
		case err != nil:
			return buf[:n], false, nil
		}
	}
}

// isGreeting says whether data is one whole record with a whole ClientHello and nothing more;
// with decided false it is too short to tell.
func isGreeting(data []byte) (whole, decided bool) {
	if len(data) > 0 && data[0] != handshakeRecord {
		return false, true
	}
	if len(data) < recordHeader+messageHeader {
		return false, false
	}
	record := int(binary.BigEndian.Uint16(data[3:5]))
	message := int(data[6])<<16 | int(data[7])<<8 | int(data[8])
	if data[5] != clientHello || record > maxRecord || message+messageHeader != record {
		return false, true
	}
	switch have := len(data) - recordHeader; {
	case have < record:
		return false, false
	case have > record:
		return false, true
	}
	return true, true
}
