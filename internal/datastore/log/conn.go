package log

import (
	"bufio"
	"net"
)

// together is a connection that sends what was written, in one piece, when an answer is waited
// for. go-dqlite writes the header and the body of a request one by one, and reads an answer the
// same way: each piece would wake the other side.
//
// It is for one request at a time, as go-dqlite makes them: who writes reads next. An error of
// sending is told by Read.
type together struct {
	net.Conn
	r   *bufio.Reader
	out []byte
}

// keptBytes is how large a buffer is kept for the next request.
const keptBytes = 64 << 10

// Together makes a connection to dqlite such that each request goes out in one piece.
func Together(c net.Conn) net.Conn { return &together{Conn: c, r: bufio.NewReader(c)} }

func (t *together) Write(p []byte) (int, error) {
	t.out = append(t.out, p...)
	return len(p), nil
}

func (t *together) Read(p []byte) (int, error) {
	if len(t.out) > 0 {
		_, err := t.Conn.Write(t.out)
		t.out = t.out[:0]
		if cap(t.out) > keptBytes {
			t.out = nil
		}
		if err != nil {
			return 0, err
		}
	}
	return t.r.Read(p)
}
