package daemon

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"microk8s/internal/datastore/member"
	"microk8s/internal/longtest"

	"github.com/canonical/go-dqlite/v3/client"
	dqdriver "github.com/canonical/go-dqlite/v3/driver"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// upstreamDB is a storage directory whose database is written as k8s-dqlite writes it.
type upstreamDB struct {
	t    *testing.T
	m    *member.Member
	conn *dqdriver.Conn
}

// openUpstream starts dqlite on a directory and connects to its database.
func openUpstream(t *testing.T, dir string) *upstreamDB {
	t.Helper()
	m, err := member.Start(member.Options{Dir: dir, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	store := client.NewInmemNodeStore()
	if err := store.Set(testContext(t), []client.NodeInfo{{Address: m.Node().Address}}); err != nil {
		t.Fatal(err)
	}
	d, err := dqdriver.New(store, dqdriver.WithDialFunc(func(ctx context.Context, _ string) (net.Conn, error) {
		return m.DialOwn(ctx)
	}), dqdriver.WithLogFunc(func(client.LogLevel, string, ...any) {}))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := d.Open("k8s")
	if err != nil {
		t.Fatal(err)
	}
	return &upstreamDB{t, m, conn.(*dqdriver.Conn)}
}

func (u *upstreamDB) close() {
	u.conn.Close()
	if err := u.m.Close(); err != nil {
		u.t.Error(err)
	}
}

func (u *upstreamDB) try(sql string, args ...any) error {
	named := make([]driver.NamedValue, len(args))
	for i, a := range args {
		if n, ok := a.(int); ok {
			a = int64(n)
		}
		named[i] = driver.NamedValue{Ordinal: i + 1, Value: a}
	}
	_, err := u.conn.ExecContext(testContext(u.t), sql, named)
	return err
}

func (u *upstreamDB) exec(sql string, args ...any) {
	u.t.Helper()
	if err := u.try(sql, args...); err != nil {
		u.t.Fatalf("%s: %v", sql, err)
	}
}

// list returns the rows of a query, columns joined by "|".
func (u *upstreamDB) list(sql string) (out []string) {
	u.t.Helper()
	rows, err := u.conn.QueryContext(testContext(u.t), sql, nil)
	if err != nil {
		u.t.Fatal(err)
	}
	defer rows.Close()
	values := make([]driver.Value, len(rows.Columns()))
	for {
		err := rows.Next(values)
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			u.t.Fatal(err)
		}
		var cols []string
		for _, v := range values {
			cols = append(cols, fmt.Sprint(v))
		}
		out = append(out, strings.Join(cols, "|"))
	}
}

const kineDDL = `CREATE TABLE kine (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, created INTEGER, deleted INTEGER,
	create_revision INTEGER NOT NULL, prev_revision INTEGER, lease INTEGER, value BLOB, old_value BLOB)`

// schema makes the table as a release of upstream has it: 0.0 (kine's own), 0.1 or 1.0.
func (u *upstreamDB) schema(version string) {
	u.t.Helper()
	u.exec(kineDDL)
	switch version {
	case "0.0":
		u.exec("CREATE INDEX kine_name_index ON kine (name)")
		u.exec("CREATE UNIQUE INDEX kine_name_prev_revision_uindex ON kine (name, prev_revision)")
	case "0.1":
		u.exec("CREATE INDEX kine_name_index ON kine (name, id)")
		u.exec("CREATE UNIQUE INDEX kine_name_prev_revision_uindex ON kine (prev_revision, name)")
		u.exec("PRAGMA user_version = 1")
	case "1.0":
		u.exec("CREATE UNIQUE INDEX k8s_dqlite_name_del_index ON kine (name ASC, id DESC, deleted)")
		u.exec("PRAGMA user_version = 65536")
	default:
		u.t.Fatalf("no schema %s", version)
	}
	u.exec("INSERT INTO kine (name, created, deleted, create_revision, prev_revision, lease, value, old_value) VALUES ('compact_rev_key', 1, 0, 0, 0, 0, x'', NULL)")
}

// put, del and compact do what upstream's statements do.
func (u *upstreamDB) put(name string, lease int, value string) {
	u.t.Helper()
	u.exec(`INSERT INTO kine (name, created, deleted, create_revision, prev_revision, lease, value, old_value)
		SELECT ?1, n.id IS NULL OR n.deleted, 0, CASE WHEN n.id IS NULL OR n.deleted THEN 0 WHEN n.created THEN n.id ELSE n.create_revision END,
			coalesce(n.id, 0), ?2, ?3, CASE WHEN n.deleted THEN NULL ELSE n.value END
		FROM (SELECT 1) LEFT JOIN (SELECT * FROM kine WHERE name = ?1 ORDER BY id DESC LIMIT 1) n`, name, lease, []byte(value))
}

func (u *upstreamDB) del(name string) {
	u.t.Helper()
	u.exec(`INSERT INTO kine (name, created, deleted, create_revision, prev_revision, lease, value, old_value)
		SELECT name, 0, 1, CASE WHEN created THEN id ELSE create_revision END, id, lease, NULL, value FROM kine WHERE name = ?1 ORDER BY id DESC LIMIT 1`, name)
}

func (u *upstreamDB) compact(rev int) {
	u.t.Helper()
	u.exec(`DELETE FROM kine WHERE name != 'compact_rev_key' AND id IN (
		SELECT prev_revision FROM kine WHERE name != 'compact_rev_key' AND prev_revision != 0 AND id <= ?1
		UNION SELECT id FROM kine WHERE deleted AND id <= ?1)`, rev)
	u.exec("UPDATE kine SET prev_revision = max(prev_revision, ?1) WHERE name = 'compact_rev_key'", rev)
}

// TestUpstreamDirectoryIsMigrated opens directories of each schema.
func TestUpstreamDirectoryIsMigrated(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"0.0", "0.1", "1.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			dir := newDir(t)
			ctx := testContext(t)
			u := openUpstream(t, dir)
			u.schema(version)
			for i := range 10 { // 2 … 11
				u.put(fmt.Sprintf("/registry/pods/%d", i), 0, fmt.Sprintf("v1 of %d", i))
			}
			u.put("/registry/pods/3", 0, "v2 of 3")         // 12
			u.del("/registry/pods/4")                       // 13
			u.compact(13)                                   // drops 5, 6 and 13
			u.put("/registry/pods/3", 0, "v3 of 3")         // 14
			u.del("/registry/pods/5")                       // 15
			u.put("/registry/pods/5", 0, "v1 of 5 again")   // 16
			u.put("/registry/masterleases/m", 2, "short")   // 17
			u.put("/registry/events/e", 3600, "long")       // 18
			u.put("/registry/events/gone", 3600, "deleted") // 19
			u.del("/registry/events/gone")                  // 20
			u.put("/registry/unicode/ä\x01", 0, "\x00\xff") // 21
			u.close()

			p := start(t, dir)
			if !strings.Contains(p.log.String(), "was migrated") {
				t.Error("the log does not tell")
			}
			// 22 is our health key.
			got, err := p.client.Get(ctx, "/registry/pods/", clientv3.WithPrefix(), clientv3.WithRev(21))
			if err != nil {
				t.Fatal(err)
			}
			if got.Header.Revision < 22 {
				t.Errorf("the revision went back to %d", got.Header.Revision)
			}
			want := map[string]string{"3": "4|14|v3 of 3", "5": "16|16|v1 of 5 again"}
			for _, i := range []int{0, 1, 2, 6, 7, 8, 9} {
				want[fmt.Sprint(i)] = fmt.Sprintf("%d|%d|v1 of %d", i+2, i+2, i)
			}
			want["3"] = "5|14|v3 of 3"
			if len(got.Kvs) != len(want) {
				t.Errorf("%d pods, want %d", len(got.Kvs), len(want))
			}
			for _, kv := range got.Kvs {
				name := strings.TrimPrefix(string(kv.Key), "/registry/pods/")
				if have := fmt.Sprintf("%d|%d|%s", kv.CreateRevision, kv.ModRevision, kv.Value); have != want[name] {
					t.Errorf("%s: %s, want %s", name, have, want[name])
				}
			}
			// What upstream still knew can still be read and watched; what it had compacted cannot.
			if old, err := p.client.Get(ctx, "/registry/pods/5", clientv3.WithRev(15)); err != nil || len(old.Kvs) != 0 {
				t.Errorf("at 15: %v, %v", old, err)
			}
			if old, err := p.client.Get(ctx, "/registry/pods/3", clientv3.WithRev(13)); err != nil || len(old.Kvs) != 1 || string(old.Kvs[0].Value) != "v2 of 3" {
				t.Errorf("at 13: %v, %v", old, err)
			}
			if _, err := p.client.Get(ctx, "/registry/pods/3", clientv3.WithRev(12)); err == nil || !strings.Contains(err.Error(), "compacted") {
				t.Errorf("at 12: %v", err)
			}
			w := <-p.client.Watch(ctx, "/registry/", clientv3.WithPrefix(), clientv3.WithRev(14), clientv3.WithPrevKV())
			if w.Err() != nil || len(w.Events) < 8 || w.Events[0].Kv.ModRevision != 14 || string(w.Events[0].PrevKv.Value) != "v2 of 3" ||
				w.Events[1].Type != clientv3.EventTypeDelete || w.Events[6].PrevKv == nil {
				t.Errorf("watch: %v", w)
			}
			odd, err := p.client.Get(ctx, "/registry/unicode/ä\x01")
			if err != nil || len(odd.Kvs) != 1 || string(odd.Kvs[0].Value) != "\x00\xff" {
				t.Errorf("odd bytes: %v, %v", odd, err)
			}
			if c, err := p.client.Get(ctx, "compact_rev_key"); err != nil || len(c.Kvs) != 0 {
				t.Errorf("compact_rev_key: %v, %v", c, err)
			}
			// The TTL counts again from the start; the short one ends soon, the long one does not.
			lease, err := p.client.TimeToLive(ctx, 3600)
			if err == nil && (lease.GrantedTTL != 3600 || lease.TTL > 3600) {
				t.Errorf("lease: %+v", lease)
			}
			ends := p.client.Watch(ctx, "/registry/masterleases/m", clientv3.WithRev(18))
			if e := <-ends; e.Err() != nil || len(e.Events) != 1 || e.Events[0].Type != clientv3.EventTypeDelete {
				t.Errorf("the short lease did not end: %+v", e)
			}
			if e, err := p.client.Get(ctx, "/registry/events/e"); err != nil || len(e.Kvs) != 1 || e.Kvs[0].Lease == 0 {
				t.Errorf("the long lease: %v, %v", e, err)
			}
			p.stop()

			u = openUpstream(t, dir)
			defer u.close()
			if n := u.list("SELECT type || ' ' || name FROM sqlite_master WHERE name LIKE 'kine%' OR name LIKE 'k8s%'"); len(n) != 1 || n[0] != "view kine" {
				t.Errorf("left of upstream's: %q", n)
			}
			// What an upstream daemon would do first.
			for _, sql := range []string{kineDDL, "INSERT INTO kine (name, created) VALUES ('/registry/health', 1)", "SELECT max(id) FROM kine", "CREATE UNIQUE INDEX IF NOT EXISTS k8s_dqlite_name_del_index ON kine (name ASC, id DESC, deleted)"} {
				if err := u.try(sql); err == nil {
					t.Errorf("upstream's daemon could do %s", sql)
				}
			}
		})
	}
}

// A new directory of ours is as closed to upstream as a migrated one.
func TestNewDirectoryIsClosedToUpstream(t *testing.T) {
	t.Parallel()
	dir := newDir(t)
	start(t, dir).stop()
	u := openUpstream(t, dir)
	defer u.close()
	if err := u.try(kineDDL); err == nil {
		t.Error("upstream's table could be made")
	}
}

// What upstream wrote behind our back is refused, and stays.
func TestTwoHistoriesAreRefused(t *testing.T) {
	t.Parallel()
	dir := newDir(t)
	start(t, dir).stop()
	u := openUpstream(t, dir)
	u.exec("DROP VIEW kine")
	u.schema("1.0")
	u.put("/registry/x", 0, "x")
	u.close()
	err := Run(testContext(t), config(dir), "", slog.New(slog.DiscardHandler), nil)
	if err == nil || !strings.Contains(err.Error(), "behind") || !strings.Contains(err.Error(), dir) {
		t.Fatalf("it was not refused: %v", err)
	}
	u = openUpstream(t, dir)
	defer u.close()
	if rows := u.list("SELECT name FROM kine WHERE id = 2"); len(rows) != 1 || rows[0] != "/registry/x" {
		t.Errorf("upstream's data after the refusal: %q", rows)
	}
}

// What is not understood is refused at once, and stays.
func TestStrangeUpstreamRowsAreRefused(t *testing.T) {
	t.Parallel()
	dir := newDir(t)
	u := openUpstream(t, dir)
	u.schema("1.0")
	u.exec("INSERT INTO kine (name, created, deleted, create_revision) VALUES ('/a', 'yes', 0, 0)")
	u.close()
	err := Run(testContext(t), config(dir), "", slog.New(slog.DiscardHandler), nil)
	if err == nil || !strings.Contains(err.Error(), "row 2") {
		t.Fatalf("it was not refused: %v", err)
	}
	u = openUpstream(t, dir)
	defer u.close()
	if rows := u.list("SELECT count(*) FROM kine"); len(rows) != 1 || rows[0] != "2" {
		t.Errorf("upstream's data after the refusal: %q", rows)
	}
}

// Killed with -9 at any moment of the migration and opened again, the result is the same. The
// table is large enough that the transaction is longer than dqlite's 8 MiB segments.
func TestMigrationSurvivesKills(t *testing.T) {
	t.Parallel()
	withSeeds(t, migrationSurvivesKills)
}

func migrationSurvivesKills(t *testing.T, rnd *rand.Rand) {
	dir := newDir(t)
	u := openUpstream(t, dir)
	u.schema("1.0")
	const keys = 20000
	u.exec(`WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?1)
		INSERT INTO kine (name, created, deleted, create_revision, prev_revision, lease, value)
		SELECT '/registry/k/' || i, 1, 0, 0, 0, 0, CAST(i || printf('%.*c', 1000, 'x') AS BLOB) FROM n`, keys)
	u.close()
	began := time.Now()
	whole := start(t, move(t, image(t, dir)))
	took := time.Since(began)
	whole.stop()
	rounds := longtest.Of(40, 6)
	killed := 0
	for round := range rounds {
		copied := move(t, image(t, dir))
		cmd := launch(t, copied)
		time.Sleep(time.Duration(rnd.Int64N(int64(took)))) // when it is killed is what the test varies
		if _, err := os.Stat(filepath.Join(copied, "kine.sock:12379")); err != nil {
			killed++
		}
		cmd.Process.Kill()
		cmd.Wait()
		p := start(t, copied)
		got, err := p.client.Get(testContext(t), "/registry/k/", clientv3.WithPrefix())
		if err != nil || len(got.Kvs) != keys {
			t.Fatalf("round %d: %d keys, %v", round, len(got.Kvs), err)
		}
		for _, kv := range got.Kvs {
			n := strings.TrimPrefix(string(kv.Key), "/registry/k/")
			if kv.ModRevision != kv.CreateRevision || fmt.Sprint(kv.ModRevision-1) != n || strings.TrimRight(string(kv.Value), "x") != n {
				t.Fatalf("round %d: %s is at %d with %.10q", round, kv.Key, kv.ModRevision, kv.Value)
			}
		}
		p.stop()
	}
	if killed == 0 {
		t.Error("no kill came before the migration had ended")
	}
}
