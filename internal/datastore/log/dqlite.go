package log

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"microk8s/internal/datastore/state"

	"github.com/canonical/go-dqlite/v3/client"
	dqdriver "github.com/canonical/go-dqlite/v3/driver"
)

// Database is the name of the database in dqlite, the one that upstream uses, so that tools find it.
const Database = "k8s"

// ErrForeign says that another program has written into a database of this one.
var ErrForeign = errors.New("the database has been written by another program")

const (
	columns    = "id, name, created, version, lease, value"
	width      = 6   // parameters of a row
	maxPrepare = 256 // rows of the largest statement that is kept prepared

	// largest id list of a delete; each is a parameter, of which a statement has at most 32766
	maxDelete = 1000
)

// Dqlite is a Log on a dqlite database. One SQL connection is one term of leadership: it is
// dead for good when the node stops leading, even if the node leads again.
type Dqlite struct {
	address string
	dial    client.DialFunc
	logf    client.LogFunc

	leading Leading
	term    atomic.Uint64 // in which conn was made; 0: there is none
	conn    *dqdriver.Conn
	stmts   map[int]driver.Stmt // by number of rows

	// Migrated is not nil when OpenDqlite has taken over a database of upstream k8s-dqlite.
	Migrated *Migration
}

var _ Log = (*Dqlite)(nil)

// openTimeout is how long connecting may take. A migration, which follows, may take longer.
const openTimeout = 30 * time.Second

// OpenDqlite opens the database on the node with this address and creates the tables if they
// are missing; a database of upstream k8s-dqlite is migrated. dial connects to that node,
// whatever address it is given; leading tells whether it leads. It is an error when the node does
// not lead, or when upstream has written into a database of this program (ErrForeign).
func OpenDqlite(ctx context.Context, address string, dial func(context.Context) (net.Conn, error), leading Leading, logf client.LogFunc) (*Dqlite, error) {
	l := &Dqlite{
		address: address,
		logf:    logf,
		leading: leading,
		dial: func(ctx context.Context, a string) (net.Conn, error) {
			// The driver follows the leader that a node reports. Writing there would be
			// writing behind the back of that leader's daemon.
			if a != address {
				return nil, fmt.Errorf("%s leads, not this node (%s)", a, address)
			}
			return dial(ctx)
		},
	}
	attempt, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	if err := l.Reopen(attempt); err != nil {
		return nil, err
	}
	if err := l.prepareTables(ctx); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Reopen is part of Log.
func (l *Dqlite) Reopen(ctx context.Context) error {
	l.drop()
	term, leads := l.leading()
	if !leads {
		return errors.New("cannot open the database: the local node does not lead")
	}
	store := client.NewInmemNodeStore()
	if err := store.Set(ctx, []client.NodeInfo{{Address: l.address}}); err != nil {
		return err
	}
	d, err := dqdriver.New(store, dqdriver.WithDialFunc(l.dial),
		dqdriver.WithLogFunc(l.logf), dqdriver.WithRetryLimit(1))
	if err != nil {
		return err
	}
	connector, err := d.OpenConnector(Database)
	if err != nil {
		return err
	}
	conn, err := connector.Connect(ctx)
	if err != nil {
		return fmt.Errorf("cannot open the database on the local node: %w", err)
	}
	l.conn, l.stmts = conn.(*dqdriver.Conn), map[int]driver.Stmt{}
	// The connection was made in this term: dqlite opens a database on a leader only, and forgets it
	// when leadership ends.
	if err := l.leading.check(term); err != nil {
		l.drop()
		return fmt.Errorf("cannot open the database on the local node: %w", err)
	}
	l.term.Store(term)
	return nil
}

// Check is part of Log.
func (l *Dqlite) Check() error { return l.leading.check(l.term.Load()) }

func (l *Dqlite) drop() {
	if l.conn != nil {
		l.conn.Close()
		l.conn, l.stmts = nil, nil
	}
	l.term.Store(0)
}

// Close is part of Log.
func (l *Dqlite) Close() error {
	l.drop()
	return nil
}

// tables are the statements that make the tables.
var tables = []string{
	"CREATE TABLE log (id INTEGER PRIMARY KEY, name BLOB, created INTEGER NOT NULL, version INTEGER NOT NULL, lease INTEGER NOT NULL, value BLOB)",
	"CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
}

// names returns the types of the tables and views by name.
func (l *Dqlite) names(ctx context.Context) (map[string]string, error) {
	names := map[string]string{}
	err := l.query(ctx, "SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view')", nil, func(v []driver.Value) error {
		name, ok := v[0].(string)
		kind, ok2 := v[1].(string)
		if !ok || !ok2 {
			return fmt.Errorf("unexpected table name of type %T", v[0])
		}
		names[name] = kind
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("cannot list the tables: %w", err)
	}
	return names, nil
}

// prepareTables migrates upstream's table if there is one, and makes what is missing.
func (l *Dqlite) prepareTables(ctx context.Context) error {
	names, err := l.names(ctx)
	if err != nil {
		return err
	}
	if names[kineTable] == "table" {
		if l.Migrated, err = l.migrateKine(ctx); err != nil {
			return err
		}
		return nil
	}
	for _, ddl := range append(tables, kineGuard) {
		if names[strings.Fields(ddl)[2]] != "" {
			continue
		}
		if err := l.exec(ctx, ddl, nil); err != nil {
			return fmt.Errorf("cannot create a table: %w", err)
		}
	}
	return nil
}

func named(values ...driver.Value) []driver.NamedValue {
	args := make([]driver.NamedValue, len(values))
	for i, v := range values {
		args[i] = driver.NamedValue{Ordinal: i + 1, Value: v}
	}
	return args
}

// errClosed is what calls get between a failure and Reopen.
var errClosed = errors.New("the connection to the database is closed")

func (l *Dqlite) exec(ctx context.Context, sql string, args []driver.NamedValue) error {
	if l.conn == nil {
		return errClosed
	}
	_, err := l.conn.ExecContext(ctx, sql, args)
	return l.failed(err)
}

// failed closes the connection on any error: what it did is unknown, and so is its state.
func (l *Dqlite) failed(err error) error {
	if err == nil {
		return nil
	}
	l.drop()
	return err
}

func (l *Dqlite) query(ctx context.Context, sql string, args []driver.NamedValue, fn func([]driver.Value) error) error {
	if l.conn == nil {
		return errClosed
	}
	rows, err := l.conn.QueryContext(ctx, sql, args)
	if err != nil {
		return l.failed(err)
	}
	values := make([]driver.Value, len(rows.Columns()))
	for {
		err := rows.Next(values)
		if errors.Is(err, io.EOF) {
			return rows.Close()
		}
		if err == nil {
			err = fn(values)
		}
		if err != nil {
			return l.failed(err)
		}
	}
}

// Append is part of Log.
func (l *Dqlite) Append(ctx context.Context, rows []Row) error {
	if len(rows) == 0 {
		return nil
	}
	if l.conn == nil {
		return errClosed
	}
	args := make([]driver.NamedValue, 0, len(rows)*width)
	for _, r := range rows {
		n := len(args)
		args = append(args,
			driver.NamedValue{Ordinal: n + 1, Value: r.ID},
			driver.NamedValue{Ordinal: n + 2, Value: r.Key},
			driver.NamedValue{Ordinal: n + 3, Value: r.Create},
			driver.NamedValue{Ordinal: n + 4, Value: r.Version},
			driver.NamedValue{Ordinal: n + 5, Value: r.Lease},
			driver.NamedValue{Ordinal: n + 6, Value: r.Value},
		)
	}
	sql := func() string {
		return "INSERT INTO log (" + columns + ") VALUES (?,?,?,?,?,?)" + strings.Repeat(",(?,?,?,?,?,?)", len(rows)-1)
	}
	if len(rows) > maxPrepare {
		return l.exec(ctx, sql(), args)
	}
	stmt := l.stmts[len(rows)]
	if stmt == nil {
		var err error
		if stmt, err = l.conn.PrepareContext(ctx, sql()); err != nil {
			return l.failed(err)
		}
		l.stmts[len(rows)] = stmt
	}
	_, err := stmt.(driver.StmtExecContext).ExecContext(ctx, args)
	return l.failed(err)
}

// Load is part of Log.
func (l *Dqlite) Load(ctx context.Context, after int64, fn func(Row) error) (compacted int64, err error) {
	compacted = state.NeverCompacted
	err = l.query(ctx, "SELECT value FROM meta WHERE name = 'compacted'", nil, func(v []driver.Value) (err error) {
		compacted, err = number(v[0])
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("cannot read the revision of the last compaction: %w", err)
	}
	err = l.query(ctx, "SELECT "+columns+" FROM log WHERE id > ? ORDER BY id", named(after), func(v []driver.Value) error {
		r, err := rowOf(v)
		if err != nil {
			return err
		}
		return fn(r)
	})
	if err != nil {
		return 0, fmt.Errorf("cannot read the log: %w", err)
	}
	return compacted, nil
}

// IDs is part of Log.
func (l *Dqlite) IDs(ctx context.Context, upTo int64, fn func(int64) error) error {
	return l.query(ctx, "SELECT id FROM log WHERE id BETWEEN 0 AND ? ORDER BY id", named(upTo), func(v []driver.Value) error {
		id, err := number(v[0])
		if err != nil {
			return err
		}
		return fn(id)
	})
}

// Leases is part of Log.
func (l *Dqlite) Leases(ctx context.Context) (leases []Row, err error) {
	err = l.query(ctx, "SELECT "+columns+" FROM log WHERE id < 0", nil, func(v []driver.Value) error {
		r, err := rowOf(v)
		leases = append(leases, r)
		return err
	})
	return leases, err
}

// rowOf decodes a row of the table and rejects what no writer of ours can have made.
func rowOf(v []driver.Value) (r Row, err error) {
	if len(v) != width {
		return r, fmt.Errorf("a row has %d columns instead of %d", len(v), width)
	}
	for _, c := range []struct {
		to *int64
		at int
	}{{&r.ID, 0}, {&r.Create, 2}, {&r.Version, 3}, {&r.Lease, 4}} {
		if *c.to, err = number(v[c.at]); err != nil {
			return r, fmt.Errorf("column %d of row %d: %w", c.at, r.ID, err)
		}
	}
	if r.Key, err = blob(v[1]); err != nil {
		return r, fmt.Errorf("the name in row %d: %w", r.ID, err)
	}
	if r.Value, err = blob(v[5]); err != nil {
		return r, fmt.Errorf("the value in row %d: %w", r.ID, err)
	}
	switch {
	case r.ID < 0 && (r.Lease <= 0 || len(r.Key) > 0):
		err = fmt.Errorf("row %d is not a valid lease", r.ID)
	case r.ID >= 0 && (len(r.Key) == 0 || r.Version < 0 || r.Lease < 0 || r.Create < 0 || r.Create > r.ID>>subBits):
		err = fmt.Errorf("row %d is not a valid version of a key", r.ID)
	}
	return r, err
}

func number(v driver.Value) (int64, error) {
	n, ok := v.(int64)
	if !ok {
		return 0, fmt.Errorf("a number is stored as %T", v)
	}
	return n, nil
}

func blob(v driver.Value) ([]byte, error) {
	switch b := v.(type) {
	case []byte:
		return b, nil // the driver made it for this row
	case nil:
		return nil, nil
	}
	return nil, fmt.Errorf("bytes are stored as %T", v)
}

// SetCompacted is part of Log.
func (l *Dqlite) SetCompacted(ctx context.Context, rev int64) error {
	return l.exec(ctx, "INSERT OR REPLACE INTO meta (name, value) VALUES ('compacted', ?)", named(rev))
}

// Alarms are rows of the table meta, too: the name has the type and the member.
const alarmName = "alarm %d of %d"

// Alarms is part of Log.
func (l *Dqlite) Alarms(ctx context.Context) (alarms []Alarm, err error) {
	err = l.query(ctx, "SELECT name FROM meta WHERE name LIKE 'alarm %'", nil, func(v []driver.Value) error {
		name, _ := v[0].(string)
		var a Alarm
		if _, err := fmt.Sscanf(name, alarmName, &a.Type, &a.Member); err != nil {
			return fmt.Errorf("the alarm %q cannot be read: %w", name, err)
		}
		alarms = append(alarms, a)
		return nil
	})
	return alarms, err
}

// SetAlarm is part of Log.
func (l *Dqlite) SetAlarm(ctx context.Context, a Alarm, on bool) error {
	sql := "DELETE FROM meta WHERE name = ?"
	if on {
		sql = "INSERT OR REPLACE INTO meta (name, value) VALUES (?, 1)"
	}
	return l.exec(ctx, sql, named(fmt.Sprintf(alarmName, a.Type, a.Member)))
}

// Delete is part of Log.
func (l *Dqlite) Delete(ctx context.Context, ids []int64) error {
	for len(ids) > 0 {
		n := min(len(ids), maxDelete)
		args := make([]driver.NamedValue, n)
		for i, id := range ids[:n] {
			args[i] = driver.NamedValue{Ordinal: i + 1, Value: id}
		}
		if err := l.exec(ctx, "DELETE FROM log WHERE id IN (?"+strings.Repeat(",?", n-1)+")", args); err != nil {
			return err
		}
		ids = ids[n:]
	}
	return nil
}

// Size is part of Log.
func (l *Dqlite) Size(ctx context.Context) (total, used int64, err error) {
	const sql = "SELECT c.page_count * s.page_size, (c.page_count - f.freelist_count) * s.page_size FROM pragma_page_count() c, pragma_page_size() s, pragma_freelist_count() f"
	err = l.query(ctx, sql, nil, func(v []driver.Value) (err error) {
		if total, err = number(v[0]); err == nil {
			used, err = number(v[1])
		}
		return err
	})
	return total, used, err
}
