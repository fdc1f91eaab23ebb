// Package log is the durable form of the datastore: an append-only table in a dqlite
// database. A row is one version of a key or one lease; one statement appends all rows of a
// group of transactions, so that they are committed together or not at all.
//
// What the rows mean is decided elsewhere (packages state and engine). Only the node that leads
// can be asked.
package log

import (
	"context"
	"errors"

	"microk8s/internal/datastore/state"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// subBits is how many bits of a row's id count the changes of one revision.
const subBits = 12

// Row is one row of the table. Versions have ids from their revision upwards; leases have
// negative ids, so that one statement appends both.
type Row struct {
	ID      int64
	Key     []byte
	Create  int64
	Version int64 // 0: a deletion
	Lease   int64 // of a lease row: its TTL in seconds
	Value   []byte
}

// VersionRow is the row of a version.
func VersionRow(v *state.Version) Row {
	return Row{
		ID: VersionID(v), Key: v.KV.Key, Create: v.KV.CreateRevision, Version: v.KV.Version,
		Lease: v.KV.Lease, Value: v.KV.Value,
	}
}

// VersionID is the id of a version's row.
func VersionID(v *state.Version) int64 { return v.KV.ModRevision<<subBits | int64(v.Sub) }

// LastID is the largest id that a row of a revision can have.
func LastID(rev int64) int64 { return rev<<subBits | (1<<subBits - 1) }

// LeaseRow is the row of a lease.
func LeaseRow(id, ttl int64) Row { return Row{ID: -id, Lease: ttl} }

// LeaseOf returns the lease of a row; ok is false when the row is a version.
func (r Row) LeaseOf() (id, ttl int64, ok bool) { return -r.ID, r.Lease, r.ID < 0 }

// VersionOf is the version of a row.
func (r Row) VersionOf() *state.Version {
	return &state.Version{
		KV: mvccpb.KeyValue{
			Key: r.Key, Value: r.Value, Lease: r.Lease, Version: r.Version,
			CreateRevision: r.Create, ModRevision: r.ID >> subBits,
		},
		Sub: int(r.ID & (1<<subBits - 1)),
	}
}

// Alarm is one of etcd's alarms, which is raised by or for a member and stands until somebody ends it.
type Alarm struct {
	Member uint64       `json:"member"`
	Type   pb.AlarmType `json:"type"`
}

// ErrNoSpace says that nothing is appended because disks are full.
var ErrNoSpace = errors.New("no space left for the datastore")

// Log is the durable log as its only writer sees it. Its methods are called from one
// goroutine. After any error of Append, Compacted, Delete or Load the outcome is unknown and
// the log is unusable until Reopen succeeded.
type Log interface {
	// Append makes the rows durable, all or none.
	Append(ctx context.Context, rows []Row) error
	// Load calls fn for every row with a larger id, by rising id, and for all leases when
	// after is negative. It also returns the revision of the last compaction, or state.NeverCompacted.
	Load(ctx context.Context, after int64, fn func(Row) error) (compacted int64, err error)
	// IDs calls fn for the id of every version up to an id, by rising id.
	IDs(ctx context.Context, upTo int64, fn func(int64) error) error
	// Leases returns the lease rows.
	Leases(ctx context.Context) ([]Row, error)
	// SetCompacted remembers the revision of a compaction.
	SetCompacted(ctx context.Context, rev int64) error
	// Alarms returns the alarms that stand.
	Alarms(ctx context.Context) ([]Alarm, error)
	// SetAlarm raises an alarm, or ends it.
	SetAlarm(ctx context.Context, a Alarm, on bool) error
	// Delete removes rows that nobody can reach.
	Delete(ctx context.Context, ids []int64) error
	// Size is the size of the live database in bytes, and how much of it is in use.
	Size(ctx context.Context) (total, used int64, err error)
	// Check is nil when the node has led without a break since the last Reopen, until now. It
	// may be called from any goroutine.
	Check() error
	// Reopen begins a new connection, on the local node and only if it leads.
	Reopen(ctx context.Context) error
	Close() error
}
