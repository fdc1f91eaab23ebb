package member

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"
	"unsafe"
)

/*
#include <dqlite.h>
*/
import "C"

// here is a connection to the local node without a socket: the node does what a request asks for on the thread of
// the goroutine that makes it (scripts/components/dqlite/here.patch). Through a socket two threads
// wake each other for each request.
//
// It is for one request at a time, as go-dqlite makes them: who writes reads next. An error of sending is told by Read.
type here struct {
	mu       sync.Mutex
	client   *C.struct_dqlite_here // nil after Close, and after an error
	out      []byte
	in       []byte // what is left of the answer, in memory of the client
	deadline time.Time
}

// keptBytes is how large a buffer is kept for the next request.
const keptBytes = 64 << 10

// DialHere connects to the local node without a socket.
func (m *Member) DialHere(context.Context) (net.Conn, error) {
	name := append([]byte(m.socket), 0)
	var client *C.struct_dqlite_here
	if code := C.dqlite_here_open((*C.char)(unsafe.Pointer(&name[0])), &client); code != 0 {
		return nil, fmt.Errorf("cannot connect to the local dqlite node: it does not run (code %d)", code)
	}
	return &here{client: client}, nil
}

func (h *here) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.out = append(h.out, p...)
	return len(p), nil
}

func (h *here) Read(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.in) == 0 {
		if err := h.call(); err != nil {
			return 0, &net.OpError{Op: "read", Net: "dqlite", Err: err}
		}
	}
	n := copy(p, h.in)
	h.in = h.in[n:]
	return n, nil
}

// call sends what was written and receives an answer.
func (h *here) call() error {
	if h.client == nil {
		return net.ErrClosed
	}
	timeout := time.Duration(-1)
	if !h.deadline.IsZero() {
		timeout = max(0, time.Until(h.deadline))
	}
	var answer unsafe.Pointer
	var n C.size_t
	code := C.dqlite_here_call(h.client, unsafe.Pointer(unsafe.SliceData(h.out)), C.size_t(len(h.out)), C.int64_t(timeout), &answer, &n)
	h.out = h.out[:0]
	if cap(h.out) > keptBytes {
		h.out = nil
	}
	switch code {
	case 0:
		h.in = unsafe.Slice((*byte)(answer), int(n))
		return nil
	case C.DQLITE_HERE_TIMEOUT:
		h.release()
		return os.ErrDeadlineExceeded
	case C.DQLITE_MISUSE:
		h.release()
		return errors.New("an answer is read to which there is no request")
	default:
		h.release()
		return io.EOF
	}
}

// release closes the client. What was asked for may still happen.
func (h *here) release() {
	if h.client != nil {
		C.dqlite_here_close(h.client)
		h.client, h.in = nil, nil
	}
}

// Close waits for a request that is under way.
func (h *here) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.release()
	return nil
}

func (h *here) SetDeadline(t time.Time) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.deadline = t
	return nil
}

func (h *here) SetReadDeadline(t time.Time) error { return h.SetDeadline(t) }

func (h *here) SetWriteDeadline(time.Time) error { return nil }

func (h *here) LocalAddr() net.Addr { return hereAddr{} }

func (h *here) RemoteAddr() net.Addr { return hereAddr{} }

type hereAddr struct{}

func (hereAddr) Network() string { return "dqlite" }

func (hereAddr) String() string { return "here" }
