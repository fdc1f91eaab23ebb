package member

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strconv"

	"microk8s/internal/atomicfile"
)

// marker is how far a storage directory is known to have come, kept outside of it. A member
// that comes back with an older log or vote than it had, because somebody put an old copy of
// its directory in place, may lose what others and it have acknowledged: a majority can then
// be made of members that never saw it. So such a copy does not start.
type marker struct {
	ID      uint64 `json:"id"`
	Version uint64 `json:"version"` // of the metadata: grows with each change of term or vote
	Term    uint64 `json:"term"`
	// Index is a log entry that the directory certainly has: the last one while the member does
	// not run, and of the newest snapshot while it does, since a member that follows may drop
	// entries that were never committed.
	Index    uint64 `json:"index"`
	Revision string `json:"revision,omitempty"` // of the snap that ran on it last
}

var snapshotName = regexp.MustCompile(`^snapshot-\d+-(\d+)-\d+$`)

// lastIndex returns the index of the newest snapshot, and of the last entry in a closed segment
// or snapshot.
func lastIndex(dir string) (snapshot, last uint64, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, 0, err
	}
	for _, e := range entries {
		if m := snapshotName.FindStringSubmatch(e.Name()); m != nil {
			if n, err := strconv.ParseUint(m[1], 10, 64); err == nil {
				snapshot = max(snapshot, n)
			}
		}
		if m := closedName.FindStringSubmatch(e.Name()); m != nil {
			if n, err := strconv.ParseUint(m[2], 10, 64); err == nil {
				last = max(last, n)
			}
		}
	}
	return snapshot, max(last, snapshot), nil
}

// logEnd returns the index of the last entry of the log of a member that does not run, those in its open segments
// counted, or one that it has at least.
func logEnd(dir string) (uint64, error) {
	_, last, err := lastIndex(dir)
	if err != nil {
		return 0, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	closed := false
	for _, e := range entries {
		closed = closed || closedName.MatchString(e.Name())
	}
	if !closed {
		return last, nil // nothing says with which entry the first open segment begins
	}
	end := uint64(0)
	for _, e := range entries {
		if m := closedName.FindStringSubmatch(e.Name()); m != nil {
			if n, err := strconv.ParseUint(m[2], 10, 64); err == nil {
				end = max(end, n)
			}
		}
	}
	for _, e := range entries {
		if !openName.MatchString(e.Name()) {
			continue
		}
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return 0, err
		}
		if len(data) < 8 {
			continue
		}
		for off := 8; ; {
			n, next, err := batch(data, off)
			if err != nil {
				break
			}
			end, off = end+n, next
		}
	}
	return max(last, end), nil
}

// markers keeps the marker of one member; the zero value keeps none.
type markers struct {
	file, dir string
	id        uint64
	revision  string
	log       *slog.Logger
}

// forget is for a directory that starts over, or is rewritten on purpose.
func (m markers) forget() error {
	if m.file == "" {
		return nil
	}
	if err := os.Remove(m.file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot remove the marker of the datastore: %w", err)
	}
	return nil
}

// check refuses a directory that is older than its marker. One of another member is another
// one: this node has left a cluster, or joined one, since.
func (m markers) check() error {
	if m.file == "" {
		return nil
	}
	data, err := os.ReadFile(m.file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot read the marker of the datastore: %w", err)
	}
	var was marker
	if err := json.Unmarshal(data, &was); err != nil {
		return fmt.Errorf("%s is damaged: %w; if no old copy of %s was put in place, remove this file and start again", m.file, err, m.dir)
	}
	if was.ID != m.id {
		return nil
	}
	now, _ := readMetadata(m.dir)
	last, err := logEnd(m.dir)
	if err != nil {
		return fmt.Errorf("cannot read the datastore's files: %w", err)
	}
	if now.version >= was.Version && now.term >= was.Term && last >= was.Index {
		return nil
	}
	by := ""
	if was.Revision != "" {
		by = " under revision " + was.Revision
	}
	return &Damage{"metadata1", "the directory is an old copy of itself", fmt.Errorf("the datastore in %s is an old copy: it has term %d and entry %d, and this node's had come to term %d and entry %d%s; put the newer one back. "+
		"If it is lost: a member of a cluster must leave it (microk8s remove-node --force on another node, microk8s leave here) and join again; "+
		"a node that is alone may go on without what was written since: remove %s and start it", m.dir, now.term, last, was.Term, was.Index, by, m.file)}
}

// note writes the marker. Closed is after the member has ended in good order.
func (m markers) note(closed bool) {
	if m.file == "" {
		return
	}
	v, ok := readMetadata(m.dir)
	if !ok {
		return // a young node
	}
	snapshot, _, err := lastIndex(m.dir)
	if err == nil {
		now := marker{ID: m.id, Version: v.version, Term: v.term, Index: snapshot, Revision: m.revision}
		if closed {
			now.Index, err = logEnd(m.dir)
		}
		if err == nil {
			err = m.write(now)
		}
	}
	if err != nil {
		m.log.Warn("cannot keep the marker of the datastore", "err", err)
	}
}

func (m markers) write(now marker) error {
	data, err := json.Marshal(now)
	if err != nil {
		return err
	}
	data = append(data, '\n')
	if old, err := os.ReadFile(m.file); err == nil && string(old) == string(data) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(m.file), 0o755); err != nil {
		return err
	}
	return atomicfile.Write(m.file, data, 0o600, nil)
}
