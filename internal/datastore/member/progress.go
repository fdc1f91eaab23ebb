package member

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"microk8s/internal/atomicfile"
	"microk8s/internal/datastore/storedir"
)

// Progress is how far a member's files have come for certain: what a directory never goes back behind, unless
// somebody puts an older one in its place. A whole machine that was put back has an older marker, too; the other
// members remember.
type Progress struct {
	Version uint64 // of the metadata: grows with each change of term or vote
	Term    uint64
	Index   uint64 // of the newest snapshot, which has committed entries only
}

// Behind reports whether p is of an older directory than one that has come to q.
func (p Progress) Behind(q Progress) bool {
	return p.Version < q.Version || p.Term < q.Term || p.Index < q.Index
}

// Progress returns how far this member's files have come.
func (m *Member) Progress() Progress {
	v, ok := readMetadata(m.opt.Dir)
	snapshot, _, err := lastIndex(m.opt.Dir)
	if !ok || err != nil {
		return Progress{}
	}
	return Progress{v.version, v.term, snapshot}
}

// ProgressOf returns how far the directory of a member that does not run has come, and whose it is. ok is false
// for one that has nothing to forget: it is to be made, or of a node that joins.
func ProgressOf(dir string) (self storedir.Member, p Progress, ok bool) {
	d := at(dir)
	if d.Has(storedir.InitFile) || d.Has(storedir.JoinFile) || d.Has(storedir.ReseedFile) {
		return self, p, false
	}
	self, err := d.Self()
	if err != nil {
		return self, p, false // the start says so
	}
	v, hasMetadata := readMetadata(dir)
	end, err := logEnd(dir)
	if !hasMetadata || err != nil {
		return self, p, false
	}
	return self, Progress{v.version, v.term, end}, true
}

// PutBack is the damage of a directory that others know to have been further.
func PutBack(dir, by string, now, was Progress) *Damage {
	return &Damage{"metadata1", "the directory is an old copy of itself", fmt.Errorf("the datastore in %s is an old copy: it has term %d and entry %d, and the member at %s has seen it at term %d and entry %d; this machine was put back from a snapshot, or is a copy",
		dir, now.Term, now.Index, by, was.Term, was.Index)}
}

// Seen is how far other members were known to have come, by their IDs.
type Seen map[uint64]Progress

// ReadSeen reads what this member has seen of others.
func (m *Member) ReadSeen() (s Seen) {
	data, err := os.ReadFile(m.dir.File(storedir.SeenFile))
	if err != nil || json.Unmarshal(data, &s) != nil || s == nil {
		return Seen{} // others may remember
	}
	return s
}

// WriteSeen writes it down.
func (m *Member) WriteSeen(s Seen) error {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return atomicfile.Write(m.dir.File(storedir.SeenFile), append(data, '\n'), 0o660, nil)
}

// Recovered returns the recovery after which this member goes on, if it has left out the member with an ID.
func (m *Member) Recovered(id uint64) *storedir.Recovered {
	r, err := storedir.Read(m.dir.Dir, storedir.RecoveredFile, storedir.ParseRecovered)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			m.opt.Logger.Warn("cannot read which members were left out", "err", err)
		}
		return nil
	}
	if !slices.Contains(r.LeftOut, id) {
		return nil
	}
	return &r
}

// leaveOut writes down which members a recovery leaves out, those of earlier ones included.
func (d directory) leaveOut(self storedir.Member, now time.Time) error {
	members, err := d.Members()
	if err != nil {
		return nil //nolint:nilerr // nobody is known who could be told
	}
	old, _ := storedir.Read(d.Dir, storedir.RecoveredFile, storedir.ParseRecovered)
	r := storedir.Recovered{At: now.UTC(), By: self.Address, LeftOut: old.LeftOut}
	for _, m := range members {
		if m.ID != self.ID && !slices.Contains(r.LeftOut, m.ID) {
			r.LeftOut = append(r.LeftOut, m.ID)
		}
	}
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return atomicfile.Write(d.File(storedir.RecoveredFile), append(data, '\n'), 0o660, nil)
}
