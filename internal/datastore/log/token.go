package log

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// token is a connection to the own node that has the database open and does nothing with it.
// dqlite forgets what a connection has opened when the node stops leading, also when it leads
// again later. So to open the database again is refused as long as the leadership lasts in
// which the token was made, and by nothing else: that is a question to the own node which no
// write in flight delays, and go-dqlite's driver has none.
type token struct {
	mu   sync.Mutex
	conn net.Conn
}

// ErrDeposed says that the leadership has ended in which the log was opened.
var ErrDeposed = errors.New("the leadership in which the database was opened has ended")

// dqlite's wire protocol, version 1.
const (
	wireVersion     = 1
	wireOpen        = 3
	wireFailure     = 0
	wireDatabase    = 4
	wireHeader      = 8
	wireMax         = 4096 // of an answer that is expected here
	sqliteBusy      = 5
	defaultDeadline = 5 * time.Second
)

func newToken(ctx context.Context, dial func(context.Context) (net.Conn, error)) (*token, error) {
	conn, err := dial(ctx)
	if err != nil {
		return nil, err
	}
	t := &token{conn: conn}
	if _, err := conn.Write(binary.LittleEndian.AppendUint64(nil, wireVersion)); err != nil {
		conn.Close()
		return nil, err
	}
	kind, code, err := t.open(ctx)
	if err == nil && kind != wireDatabase {
		err = fmt.Errorf("cannot open the database a second time (dqlite's code %d)", code)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return t, nil
}

// open asks to open the database and gives the type of the answer, and its code if it failed.
func (t *token) open(ctx context.Context) (kind byte, code uint64, err error) {
	deadline := time.Now().Add(defaultDeadline)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := t.conn.SetDeadline(deadline); err != nil {
		return 0, 0, err
	}
	text := func(b []byte, s string) []byte {
		b = append(append(b, s...), 0)
		for len(b)%8 != 0 {
			b = append(b, 0)
		}
		return b
	}
	b := make([]byte, wireHeader, 64)
	b = text(b, Database)
	b = binary.LittleEndian.AppendUint64(b, 0)
	b = text(b, "volatile")
	binary.LittleEndian.PutUint32(b, uint32((len(b)-wireHeader)/8))
	b[4] = wireOpen
	if _, err := t.conn.Write(b); err != nil {
		return 0, 0, err
	}
	var header [wireHeader]byte
	if _, err := io.ReadFull(t.conn, header[:]); err != nil {
		return 0, 0, err
	}
	size := int64(binary.LittleEndian.Uint32(header[:])) * 8
	if size < 8 || size > wireMax {
		return 0, 0, fmt.Errorf("dqlite's answer has %d bytes", size)
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(t.conn, body); err != nil {
		return 0, 0, err
	}
	return header[4], binary.LittleEndian.Uint64(body), nil
}

// check is nil when the leadership in which the token was made lasted until now.
func (t *token) check(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.conn == nil {
		return ErrDeposed
	}
	kind, code, err := t.open(ctx)
	if err == nil && kind == wireFailure && code&0xff == sqliteBusy {
		return nil
	}
	t.conn.Close()
	t.conn = nil
	if err != nil {
		return fmt.Errorf("cannot ask the own node whether it leads: %w", err)
	}
	return ErrDeposed
}

func (t *token) close() {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.conn != nil {
		t.conn.Close()
		t.conn = nil
	}
}
