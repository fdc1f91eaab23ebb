package log

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"strings"
)

// The table of upstream k8s-dqlite, and what stands in its place afterwards: a view that
// can neither be written nor replaced, so that an upstream daemon that opens the directory
// fails, with an error that names the reason, instead of beginning an empty table.
const (
	kineTable = "kine"
	kineGuard = `CREATE VIEW kine AS SELECT 'this datastore belongs to microk8s and cannot be used by k8s-dqlite of Canonical' AS notice`
)

// ErrKine says that upstream's table holds what this program does not understand.
var ErrKine = errors.New("the table of k8s-dqlite cannot be taken over")

// Migration says what was taken over from an upstream database.
type Migration struct {
	Rows, Keys          int
	Revision, Compacted int64
}

// migrateKine turns upstream's table into the log, in one transaction: afterwards either all
// of it has happened or nothing. Revisions stay; leases get their full TTL again, as with a
// start of upstream.
func (l *Dqlite) migrateKine(ctx context.Context) (*Migration, error) {
	if err := l.exec(ctx, "BEGIN", nil); err != nil {
		return nil, err
	}
	m, err := l.moveKine(ctx)
	if err == nil {
		err = l.exec(ctx, "COMMIT", nil)
	}
	if err != nil {
		l.drop() // the node rolls back what a connection leaves open
		return nil, fmt.Errorf("cannot migrate (the data is as it was): %w", err)
	}
	return m, nil
}

func (l *Dqlite) moveKine(ctx context.Context) (*Migration, error) {
	if err := l.clearLog(ctx); err != nil {
		return nil, err
	}
	plan, err := l.planKine(ctx)
	if err != nil {
		return nil, err
	}
	for rows := plan.Rows; len(rows) > 0; {
		n := min(len(rows), 1000)
		if err := l.copyKine(ctx, rows[:n]); err != nil {
			return nil, err
		}
		rows = rows[n:]
	}
	for ttl := range plan.TTLs {
		r := LeaseRow(ttl, ttl)
		if err := l.exec(ctx, "INSERT INTO log ("+columns+") VALUES (?, x'', 0, 0, ?, x'')", named(r.ID, r.Lease)); err != nil {
			return nil, err
		}
	}
	if plan.Floor > 0 {
		if err := l.SetCompacted(ctx, plan.Floor); err != nil {
			return nil, err
		}
	}
	if err := l.exec(ctx, "DROP TABLE "+kineTable, nil); err != nil {
		return nil, err
	}
	m := &Migration{Rows: len(plan.Rows), Revision: max(plan.last, plan.Floor), Compacted: plan.Floor}
	for _, k := range plan.keys {
		if k.live {
			m.Keys++
		}
	}
	return m, l.exec(ctx, kineGuard, nil)
}

// clearLog makes the log's tables, and refuses when they hold something: then somebody has
// written into upstream's table after this program had taken the directory over.
func (l *Dqlite) clearLog(ctx context.Context) error {
	names, err := l.names(ctx)
	if err != nil {
		return err
	}
	for _, ddl := range tables {
		name := strings.Fields(ddl)[2]
		if names[name] == "" {
			if err := l.exec(ctx, ddl, nil); err != nil {
				return err
			}
			continue
		}
		used := false
		if err := l.query(ctx, "SELECT 1 FROM "+name+" LIMIT 1", nil, func([]driver.Value) error { used = true; return nil }); err != nil {
			return err
		}
		if used {
			return fmt.Errorf("%w: the tables %q and %q both hold data, so k8s-dqlite has written behind this program's back", ErrForeign, kineTable, name)
		}
	}
	return nil
}

// planKine reads everything but the values.
func (l *Dqlite) planKine(ctx context.Context) (*kinePlan, error) {
	compacted, highest := int64(0), int64(0)
	for sql, to := range map[string]*int64{
		"SELECT coalesce(max(prev_revision), 0) FROM kine WHERE name = '" + kineCompactName + "'": &compacted,
		// Versions of upstream differ in whether the table counts by itself.
		"SELECT coalesce(max(id), 0) FROM kine": &highest,
	} {
		if err := l.query(ctx, sql, nil, func(v []driver.Value) (err error) { *to, err = number(v[0]); return err }); err != nil {
			return nil, err
		}
	}
	names, err := l.names(ctx)
	if err != nil {
		return nil, err
	}
	if names["sqlite_sequence"] != "" {
		err := l.query(ctx, "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'kine'", nil, func(v []driver.Value) error {
			seq, err := number(v[0])
			highest = max(highest, seq)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	plan := newKinePlan(compacted)
	const sql = "SELECT id, CAST(name AS BLOB), created, deleted, create_revision, lease FROM kine ORDER BY id"
	err = l.query(ctx, sql, nil, func(v []driver.Value) error {
		var r kineRow
		var created, deleted int64
		name, nameErr := blob(v[1])
		r.Name, r.Bad = string(name), nameErr != nil
		for i, to := range []*int64{&r.ID, nil, &created, &deleted, &r.Create, &r.Lease} {
			if to == nil || v[i] == nil {
				continue
			}
			n, err := wholeNumber(v[i])
			*to, r.Bad = n, r.Bad || err != nil
		}
		r.Created, r.Deleted = created != 0, deleted != 0
		if err := plan.Add(r); err != nil {
			return fmt.Errorf("%w: %w", ErrKine, err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := plan.Done(highest); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKine, err)
	}
	return plan, nil
}

// wholeNumber is number for columns that upstream fills with truth values as well.
func wholeNumber(v driver.Value) (int64, error) {
	if b, ok := v.(bool); ok {
		if b {
			return 1, nil
		}
		return 0, nil
	}
	return number(v)
}

// copyKine copies rows with their values, inside the database.
func (l *Dqlite) copyKine(ctx context.Context, rows []plannedRow) error {
	args := make([]driver.NamedValue, 0, 4*len(rows))
	for _, r := range rows {
		for _, v := range []int64{r.ID, r.Create, r.Version, r.Lease} {
			args = append(args, driver.NamedValue{Ordinal: len(args) + 1, Value: v})
		}
	}
	sql := fmt.Sprintf(`WITH plan (id, created, version, lease) AS (VALUES (?,?,?,?)%s)
INSERT INTO log (%s)
SELECT plan.id << %d, CAST(kine.name AS BLOB), plan.created, plan.version, plan.lease,
	CASE WHEN plan.version = 0 THEN x'' ELSE CAST(coalesce(kine.value, x'') AS BLOB) END
FROM plan JOIN kine ON kine.id = plan.id`, strings.Repeat(",(?,?,?,?)", len(rows)-1), columns, subBits)
	if l.conn == nil {
		return errClosed
	}
	res, err := l.conn.ExecContext(ctx, sql, args)
	if err != nil {
		return l.failed(err)
	}
	if n, err := res.RowsAffected(); err != nil || n != int64(len(rows)) {
		return fmt.Errorf("%d of %d rows were copied: %w", n, len(rows), err)
	}
	return nil
}
