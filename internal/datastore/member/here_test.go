package member

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"microk8s/internal/datastore/storedir"

	"github.com/canonical/go-dqlite/v3/client"
	dqdriver "github.com/canonical/go-dqlite/v3/driver"
)

// startAlone starts a member without others and waits until it leads.
func startAlone(t *testing.T) *Member {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, storedir.InitFile), []byte(fmt.Sprintf("Address: %s\n", address)), 0o600); err != nil {
		t.Fatal(err)
	}
	m, err := Start(Options{Dir: dir, Logger: slog.New(slog.DiscardHandler), DisableTLS: true})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-m.Changed():
	case <-time.After(time.Minute):
		t.Fatal("nobody leads")
	}
	return m
}

// connect opens a database through a connection without a socket.
func connect(t *testing.T, m *Member) *dqdriver.Conn {
	t.Helper()
	store := client.NewInmemNodeStore()
	if err := store.Set(t.Context(), []client.NodeInfo{{Address: m.Node().Address}}); err != nil {
		t.Fatal(err)
	}
	d, err := dqdriver.New(store, dqdriver.WithDialFunc(func(ctx context.Context, _ string) (net.Conn, error) { return m.DialHere(ctx) }),
		dqdriver.WithLogFunc(func(client.LogLevel, string, ...any) {}), dqdriver.WithRetryLimit(1))
	if err != nil {
		t.Fatal(err)
	}
	c, err := d.Open("test")
	if err != nil {
		t.Fatal(err)
	}
	return c.(*dqdriver.Conn)
}

// long is a query that takes a while; dqlite cannot stop one.
const long = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 200000) SELECT count(*) FROM n"

// rows reads a query's first rows, all with a negative number, and closes it.
func rows(t *testing.T, c *dqdriver.Conn, query string, n int) int {
	t.Helper()
	r, err := c.QueryContext(t.Context(), query, nil)
	if err != nil {
		t.Fatal(err)
	}
	got := 0
	for values := make([]driver.Value, len(r.Columns())); got != n; got++ {
		if err := r.Next(values); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	return got
}

// The connection without a socket does what one with a socket does: answers in several pieces, queries that are
// given up, several connections at once, limits of time, and the end of the node.
func TestHere(t *testing.T) {
	m := startAlone(t)
	closed := false
	defer func() {
		if !closed {
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		}
	}()
	c := connect(t, m)
	if _, err := c.ExecContext(t.Context(), "CREATE TABLE t (id INTEGER PRIMARY KEY, v BLOB)", nil); err != nil {
		t.Fatal(err)
	}
	insert, err := c.PrepareContext(t.Context(), "INSERT INTO t (v) VALUES (?)")
	if err != nil {
		t.Fatal(err)
	}
	// Pieces of an answer have about a MiB.
	const n = 40
	value := []byte(strings.Repeat("v", 100<<10))
	for range n {
		if _, err := insert.(driver.StmtExecContext).ExecContext(t.Context(), []driver.NamedValue{{Ordinal: 1, Value: value}}); err != nil {
			t.Fatal(err)
		}
	}
	if got := rows(t, c, "SELECT id, v FROM t", -1); got != n {
		t.Errorf("%d rows came, want %d", got, n)
	}
	rows(t, c, "SELECT id, v FROM t", 1) // given up after the first
	if _, err := c.ExecContext(t.Context(), "INSERT INTO missing (x) VALUES (1)", nil); err == nil || !strings.Contains(err.Error(), "no such table") {
		t.Errorf("a wrong statement: %v", err)
	}

	// Several at once: some write, some read, some are closed in the middle of an answer.
	var wg sync.WaitGroup
	for i := range 4 {
		o := connect(t, m)
		wg.Go(func() {
			defer o.Close()
			for range 30 {
				if i%2 == 0 {
					if _, err := o.ExecContext(t.Context(), "UPDATE t SET v = 'x' WHERE id > 20", nil); err != nil && !strings.Contains(err.Error(), "locked") { // by a checkpoint
						t.Error(err)
						return
					}
					continue
				}
				r, err := o.QueryContext(t.Context(), "SELECT id, v FROM t", nil)
				if err == nil {
					err = r.Next(make([]driver.Value, 2))
				} else if strings.Contains(err.Error(), "locked") || strings.Contains(err.Error(), "checkpoint in progress") {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				if err := r.Close(); err != nil {
					t.Error(err)
					return
				}
			}
			if i%2 == 1 {
				_, _ = o.QueryContext(t.Context(), "SELECT id, v FROM t", nil) // and closed before all of it was fetched
			}
		})
	}
	wg.Wait()

	// After the limit of time the connection is of no use, and the others are.
	late := connect(t, m)
	limited, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	if _, err := late.QueryContext(limited, long, nil); err == nil {
		t.Error("an answer came in no time")
	}
	if _, err := late.ExecContext(t.Context(), "DELETE FROM t", nil); err == nil {
		t.Error("a connection is used on whose answer nobody waited")
	}
	late.Close()
	if got := rows(t, c, "SELECT id FROM t", -1); got != n {
		t.Errorf("%d rows came on another connection, want %d", got, n)
	}

	// The node ends while somebody waits for an answer, and while somebody has fetched a part of one.
	part := connect(t, m)
	if _, err := part.QueryContext(t.Context(), "SELECT id, v FROM t", nil); err != nil {
		t.Fatal(err)
	}
	waiting := connect(t, m)
	answered := make(chan error, 1)
	go func() {
		_, err := waiting.QueryContext(context.WithoutCancel(t.Context()), long, nil)
		answered <- err
	}()
	closed = true
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	<-answered // one way or the other
	if _, err := c.ExecContext(t.Context(), "DELETE FROM t", nil); err == nil {
		t.Error("a node that has ended takes statements")
	}
	for _, o := range []*dqdriver.Conn{c, part, waiting} {
		o.Close()
	}
	if _, err := m.DialHere(t.Context()); err == nil {
		t.Error("a node that has ended takes connections")
	}
}
