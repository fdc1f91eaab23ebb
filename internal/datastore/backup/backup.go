// Package backup is the form of a logical backup of the datastore: a directory with two files
// for each key, as upstream's k8s-dqlite reads and writes it, and a gzip tar of that directory.
//
// A directory holds <n>.key and <n>.data, n from 0 without gaps, with raw bytes. Beside them
// stands backup.json, which upstream does not have and ignores: number and hash of the keys,
// the revision that they are of, and which of them expire. It is written last, so a directory
// without it is either upstream's or incomplete.
//
// The package knows nothing of the datastore; package migrator fills and applies directories.
package backup

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"microk8s/internal/atomicfile"
)

// ManifestName is the file that says what a directory must hold.
const ManifestName = "backup.json"

// Manifest describes a backup.
type Manifest struct {
	Revision int64     `json:"revision"` // of the datastore; all keys are as of it
	Keys     int       `json:"keys"`
	SHA256   string    `json:"sha256"` // of all keys and values in order, each behind its length
	Created  time.Time `json:"created"`
	// Leases says after how many seconds keys end, by their number.
	Leases map[int]int64 `json:"leases,omitempty"`
}

// Pair is one key.
type Pair struct {
	Key, Value []byte
	TTL        int64 // seconds, 0: it does not expire
}

// ErrIncomplete says that a backup lacks something.
var ErrIncomplete = errors.New("the backup is incomplete or damaged")

// digest is the hash over keys and values in order.
type digest struct{ h hash.Hash }

func newDigest() digest { return digest{sha256.New()} }

func (d digest) add(parts ...[]byte) {
	var n [8]byte
	for _, p := range parts {
		binary.BigEndian.PutUint64(n[:], uint64(len(p)))
		d.h.Write(n[:])
		d.h.Write(p)
	}
}

func (d digest) sum() string { return hex.EncodeToString(d.h.Sum(nil)) }

// Writer fills a directory.
type Writer struct {
	dir string
	m   Manifest
	d   digest
}

// Create begins a backup in a directory that is empty or does not exist.
func Create(dir string) (*Writer, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the directory of the backup: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot make the directory of the backup: %w", err)
	}
	if len(entries) > 0 {
		return nil, fmt.Errorf("%s is not empty; give a new directory", dir)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, err
	}
	return &Writer{dir: dir, d: newDigest(), m: Manifest{Leases: map[int]int64{}}}, nil
}

func keyFile(n int) string  { return strconv.Itoa(n) + ".key" }
func dataFile(n int) string { return strconv.Itoa(n) + ".data" }

// Add writes the next pair.
func (w *Writer) Add(p Pair) error {
	n := w.m.Keys
	for name, data := range map[string][]byte{keyFile(n): p.Key, dataFile(n): p.Value} {
		if err := os.WriteFile(filepath.Join(w.dir, name), data, 0o640); err != nil {
			return fmt.Errorf("cannot write the backup: %w", err)
		}
	}
	w.d.add(p.Key, p.Value)
	if p.TTL > 0 {
		w.m.Leases[n] = p.TTL
	}
	w.m.Keys++
	return nil
}

// Close ends the backup: it reads everything back, compares it, and writes the manifest. A
// backup without keys is an error.
func (w *Writer) Close(revision int64, now time.Time) (*Manifest, error) {
	if w.m.Keys == 0 {
		return nil, errors.New("there is nothing to back up: no keys were found")
	}
	w.m.Revision, w.m.SHA256, w.m.Created = revision, w.d.sum(), now.UTC().Truncate(time.Second)
	if err := w.m.check(w.dir); err != nil {
		return nil, fmt.Errorf("what was written reads differently: %w", err)
	}
	data, err := json.MarshalIndent(w.m, "", "  ")
	if err != nil {
		return nil, err
	}
	if err := atomicfile.Write(filepath.Join(w.dir, ManifestName), append(data, '\n'), 0o640, nil); err != nil {
		return nil, err
	}
	return &w.m, nil
}

// check compares a directory with its manifest.
func (m *Manifest) check(dir string) error {
	d := newDigest()
	for n := range m.Keys {
		p, err := readPair(dir, n)
		if err != nil {
			return err
		}
		d.add(p.Key, p.Value)
	}
	if sum := d.sum(); sum != m.SHA256 {
		return fmt.Errorf("%w: the hash of its keys is %s, it must be %s", ErrIncomplete, sum, m.SHA256)
	}
	return nil
}

func readPair(dir string, n int) (p Pair, err error) {
	if p.Key, err = os.ReadFile(filepath.Join(dir, keyFile(n))); err == nil {
		p.Value, err = os.ReadFile(filepath.Join(dir, dataFile(n)))
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return p, fmt.Errorf("%w: %w", ErrIncomplete, err)
	case err != nil:
		return p, fmt.Errorf("cannot read the backup: %w", err)
	case len(p.Key) == 0:
		return p, fmt.Errorf("%w: %s is empty", ErrIncomplete, keyFile(n))
	}
	return p, nil
}

var pairName = regexp.MustCompile(`^(0|[1-9][0-9]{0,9})\.(key|data)$`)

// Set is a backup that was found complete.
type Set struct {
	dir string
	// Manifest is of the backup; of upstream's, which has none, only Keys and SHA256 are set.
	Manifest Manifest
}

// Open checks a directory completely: with a manifest against it, and in any case that the
// numbers have no gaps, that each key has its data, and that there is anything at all.
func Open(dir string) (*Set, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot read the backup: %w", err)
	}
	files, highest := 0, -1
	for _, e := range entries {
		if m := pairName.FindStringSubmatch(e.Name()); m != nil {
			n, _ := strconv.Atoi(m[1]) // at most ten digits
			files++
			highest = max(highest, n)
		}
	}
	s := &Set{dir: dir}
	data, err := os.ReadFile(filepath.Join(dir, ManifestName))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		s.Manifest.Keys = highest + 1
	case err != nil:
		return nil, fmt.Errorf("cannot read the backup: %w", err)
	default:
		if err := json.Unmarshal(data, &s.Manifest); err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrIncomplete, ManifestName, err)
		}
	}
	keys := s.Manifest.Keys
	switch {
	case keys <= 0 || highest < 0:
		return nil, fmt.Errorf("%w: there are no keys in %s", ErrIncomplete, dir)
	case highest+1 != keys || files != 2*keys:
		return nil, fmt.Errorf("%w: it has %d files up to number %d and must have %d files, two for each of %d keys", ErrIncomplete, files, highest, 2*keys, keys)
	}
	if s.Manifest.SHA256 != "" {
		return s, s.Manifest.check(dir)
	}
	d := newDigest()
	for n := range keys {
		p, err := readPair(dir, n)
		if err != nil {
			return nil, err
		}
		d.add(p.Key, p.Value)
	}
	s.Manifest.SHA256 = d.sum()
	return s, nil
}

// Lasting returns the same backup with all its leases at least that long, so that nothing of it ends
// while it is looked at.
func (s *Set) Lasting(least time.Duration) *Set {
	out := *s
	out.Manifest.Leases = make(map[int]int64, len(s.Manifest.Leases))
	for n, ttl := range s.Manifest.Leases {
		out.Manifest.Leases[n] = max(ttl, int64(least/time.Second))
	}
	return &out
}

// Pair returns the pair of a number.
func (s *Set) Pair(n int) (Pair, error) {
	p, err := readPair(s.dir, n)
	p.TTL = s.Manifest.Leases[n]
	return p, err
}
