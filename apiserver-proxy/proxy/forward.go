package proxy

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/traefik/traefik/v2/pkg/tcp"
	"golang.org/x/sys/unix"
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
		servers, patience, wait = b.usableFirst(slow), 10*patience, true
	}
	if b.ctx.Err() == nil {
		b.logRateLimited("no API server can be reached", "err", last)
	}
}

// usableFirst moves those that are not well to the end.
func (b *Balancer) usableFirst(list []*server) []*server {
	var well, rest []*server
	for _, s := range list {
		if b.usable(s) {
			well = append(well, s)
		} else {
			rest = append(rest, s)
		}
	}
	return append(well, rest...)
}

// converse sends the greeting and copies. With again the server has not taken the connection
// and another one can be tried; that is only so when more is set, and then its first byte is
// waited for no longer than patience.
func (b *Balancer) converse(client tcp.WriteCloser, backend *net.TCPConn, s *server, greeting []byte, more bool, patience time.Duration) (again bool, err error) {
	defer backend.Close()
	l := &link{client: client, backend: backend, early: more}
	if !s.link(l) {
		return false, nil
	}
	defer s.unlink(l)
	gone := func(err error) (bool, error) {
		if !errors.Is(err, net.ErrClosed) { // else a check has found the server dead
			s.failed(err)
		}
		return more, err
	}
	if len(greeting) > 0 {
		if _, err := backend.Write(greeting); err != nil {
			return gone(err)
		}
	}
	if more {
		first := buffers.Get().(*buffer)
		defer buffers.Put(first)
		_ = backend.SetReadDeadline(time.Now().Add(patience))
		n, err := backend.Read(first[:])
		if err != nil {
			return gone(err)
		}
		_ = backend.SetReadDeadline(time.Time{})
		s.established(l)
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
	moved := false // since the deadline was set
	for {
		n, err := copySome(to, from)
		switch {
		case err == nil && n > 0:
			moved = true
		case errors.Is(err, os.ErrDeadlineExceeded) && moved:
			// The other direction has ended, but in this one something still comes.
			moved = false
			_ = from.SetReadDeadline(time.Now().Add(b.times.HalfOpen))
		case err != nil || to.CloseWrite() != nil:
			to.Close()
			from.Close()
			return
		default: // the end; to may still answer, but not stay silent for ever
			_ = to.SetReadDeadline(time.Now().Add(b.times.HalfOpen))
			return
		}
	}
}

// buffer holds what is on its way. Connections without traffic, which most are, have none.
type buffer [32 << 10]byte

var buffers = sync.Pool{New: func() any { return new(buffer) }}

// copySome waits until there is something to read and writes it to the other side; 0 and no
// error are the end. For messages of the usual sizes this takes less time than splice(2).
func copySome(to io.Writer, from net.Conn) (n int, err error) {
	socket, ok := from.(syscall.Conn)
	if !ok {
		return 0, errors.ErrUnsupported
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return 0, err
	}
	var buf *buffer
	var readErr error
	err = raw.Read(func(fd uintptr) bool {
		buf = buffers.Get().(*buffer)
		for {
			if n, readErr = unix.Read(int(fd), buf[:]); readErr != unix.EINTR {
				break
			}
		}
		if readErr == unix.EAGAIN {
			buffers.Put(buf)
			buf = nil
			return false
		}
		return true
	})
	if buf != nil {
		defer buffers.Put(buf)
	}
	if err = errors.Join(err, readErr); err != nil || n == 0 {
		return 0, err
	}
	return to.Write(buf[:n])
}

// dial connects to one of servers, in their order: to the next one as soon as one fails, or is
// silent for a moment. rest are those that were not found to fail.
func (b *Balancer) dial(servers []*server) (conn *net.TCPConn, which *server, rest []*server, err error) {
	// Nearly always the first one answers at once.
	first := servers[0]
	conn, err = first.dial(b.ctx, min(b.times.Hedge, b.times.Dial))
	servers = servers[1:]
	if err == nil {
		return conn, first, servers, nil
	}
	if b.ctx.Err() != nil {
		return nil, nil, nil, b.ctx.Err()
	}
	if verdictOf(err).kind == silentKind {
		servers = b.usableFirst(append(slices.Clone(servers), first))
	} else {
		first.failed(err)
	}
	if len(servers) == 0 {
		return nil, nil, nil, err
	}

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
			conn, err := s.dial(ctx, b.times.Dial)
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
	pooled := buffers.Get().(*buffer)
	defer buffers.Put(pooled)
	buf := pooled[:recordHeader+maxRecord]
	n := 0
	got := func() []byte { return bytes.Clone(buf[:n]) }
	for {
		m, err := client.Read(buf[n:])
		n += m
		whole, decided := isGreeting(buf[:n])
		switch {
		case decided:
			return got(), whole, nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			return got(), false, nil
		case err != nil && n == 0:
			return nil, false, err // closed without a word, as checks of ports do
		case err != nil:
			return got(), false, nil
		}
	}
}

// isGreeting reports whether data is one whole record with a whole ClientHello and nothing more;
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
