package schedule

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"time"

	"microk8s/internal/atomicfile"
)

// Newest is the newest archive that was proven, as a node remembers it for when the datastore is gone.
type Newest struct {
	Name    string    `json:"name"`
	At      string    `json:"at"` // its place
	Created time.Time `json:"created"`
}

// keepNewest writes the newest archive into a file, if there is one.
func (s *State) keepNewest(path string) error {
	if path == "" || s.Record == nil || s.Record.Proven == nil {
		return nil
	}
	data, err := json.Marshal(Newest{s.Record.Proven.Name, s.Record.At, s.Record.Proven.Created})
	if err != nil {
		return err
	}
	data = append(data, '\n')
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, data) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return atomicfile.Write(path, data, 0o640, nil)
}

// ReadNewest reads such a file; ok is false where no archive is known.
func ReadNewest(path string) (n Newest, ok bool) {
	data, err := os.ReadFile(path)
	if err != nil || json.Unmarshal(data, &n) != nil || n.Name == "" {
		return Newest{}, false
	}
	return n, true
}
