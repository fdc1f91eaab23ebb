package member

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Raft's files, in dqlite's format 1. All numbers are little endian.
//
// A segment is the format number and batches: two checksums (of the header and of the data),
// the header (number of entries, then 16 bytes for each: term, type, size) and the entries'
// data. An open segment is longer than its batches and filled with zeros.
const (
	diskFormat   = 1
	metadataSize = 32
	maxBatch     = 1 << 20 // entries of a batch that can be believed
	openSize     = 8 << 20 // of an open segment at least: dqlite allocates it before it writes (UV__MAX_SEGMENT_SIZE)
)

var (
	closedName = regexp.MustCompile(`^(\d{16})-(\d{16})$`)
	openName   = regexp.MustCompile(`^open-(\d+)$`)
	metaName   = regexp.MustCompile(`^snapshot-(\d+)-(\d+)-(\d+)\.meta$`)
)

// crcTable is of CRC-32 with the most significant bit first, polynomial 0x04c11db7, which
// hash/crc32 does not offer.
var crcTable = func() (t [256]uint32) {
	for i := range t {
		c := uint32(i) << 24
		for range 8 {
			if c&(1<<31) != 0 {
				c = c<<1 ^ 0x04c11db7
			} else {
				c <<= 1
			}
		}
		t[i] = c
	}
	return t
}()

func crc(sum uint32, data []byte) uint32 {
	for _, b := range data {
		sum = sum<<8 ^ crcTable[byte(sum>>24)^b]
	}
	return sum
}

// finishCut removes what a crash leaves while dqlite cuts off the end of the log: it writes the
// segment that stays, shorter, beside the old one, and then removes the old one. As long as both
// are there the log has its old end, and nothing was added; dqlite would refuse to start.
func finishCut(dir string) error {
	names, err := filepath.Glob(filepath.Join(dir, strings.Repeat("[0-9]", 16)+"-"+strings.Repeat("[0-9]", 16)))
	if err != nil {
		return err
	}
	for i := 0; i+1 < len(names); i++ { // sorted, so that the longest of those that begin alike is the last
		first, next := filepath.Base(names[i])[:16], filepath.Base(names[i+1])[:16]
		if first != next {
			continue
		}
		if err := os.Remove(names[i]); err != nil {
			return fmt.Errorf("cannot remove a copy of a part of the log: %w", err)
		}
	}
	return nil
}

// remedy says what to do about damaged files.
func remedy(dir string) string {
	return fmt.Sprintf("if other members of the cluster run, get the data from them with k8s-dqlite reseed --storage-dir %s, otherwise restore the directory from a backup", dir)
}

// Damage says that a member's files cannot be used, and are not: what was acknowledged could get lost.
type Damage struct {
	File string // its name in the directory
	What string // what is wrong with it, for a sentence about the file
	Err  error  // all of it, with what to do
}

func (d *Damage) Error() string { return d.Err.Error() }
func (d *Damage) Unwrap() error { return d.Err }

// closedSegment is a closed segment: entries first to last.
type closedSegment struct {
	name        string
	first, last uint64
	bad         error
}

// closedSnapshot is one that is complete: description and data are there.
type closedSnapshot struct {
	name        string // of the data
	term, index uint64
	stamp       uint64
	file        string // what is bad
	bad         error
}

// closedFiles are those of Raft's files that nobody writes to any more, with what is wrong with each.
type closedFiles struct {
	segments  []closedSegment  // by their first entry
	snapshots []closedSnapshot // in dqlite's order: the last one is used
	empty     bool             // there is not even an unfinished one
}

// readClosed reads the closed segments and snapshots of a directory. read returns a file's content.
func readClosed(dir string, read func(path string) ([]byte, error)) (c closedFiles, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return c, fmt.Errorf("cannot list %s: %w", dir, err)
	}
	c.empty = true
	for _, e := range entries {
		name := e.Name()
		if m := closedName.FindStringSubmatch(name); m != nil {
			c.empty = false
			s := closedSegment{name: name}
			s.first, _ = strconv.ParseUint(m[1], 10, 64) // 16 digits
			s.last, _ = strconv.ParseUint(m[2], 10, 64)
			data, err := read(filepath.Join(dir, name))
			switch {
			case errors.Is(err, unix.EIO):
				s.bad = err // the disk has lost it
			case err != nil:
				return c, fmt.Errorf("cannot read the log: %w", err)
			default:
				s.bad = checkClosed(data, s.first, s.last)
			}
			c.segments = append(c.segments, s)
		}
		m := metaName.FindStringSubmatch(name)
		if m == nil {
			continue
		}
		c.empty = false
		s := closedSnapshot{name: strings.TrimSuffix(name, ".meta")}
		for i, n := range []*uint64{&s.term, &s.index, &s.stamp} {
			if *n, err = strconv.ParseUint(m[i+1], 10, 64); err != nil {
				return c, fmt.Errorf("%s is not the name of a snapshot: %w", name, err)
			}
		}
		data, err := read(filepath.Join(dir, name))
		if errors.Is(err, unix.EIO) {
			s.file, s.bad = name, err
			c.snapshots = append(c.snapshots, s)
			continue
		}
		if err != nil {
			return c, fmt.Errorf("cannot read a snapshot's description: %w", err)
		}
		// An empty one is of a snapshot that was not finished.
		if len(data) == 0 {
			continue
		}
		if s.bad = checkSnapshotMeta(data); s.bad != nil {
			s.file = name
			c.snapshots = append(c.snapshots, s)
			continue
		}
		// The description comes first, the data appears whole: without it, a crash came
		// between them, and dqlite takes the snapshot before.
		data, err = read(filepath.Join(dir, s.name))
		if errors.Is(err, fs.ErrNotExist) || err == nil && len(data) == 0 {
			continue
		}
		switch {
		case errors.Is(err, unix.EIO):
			s.bad = err
		case err != nil:
			return c, fmt.Errorf("cannot read a snapshot: %w", err)
		default:
			s.bad = checkSnapshotData(data)
		}
		if s.bad != nil {
			s.file = s.name
		}
		c.snapshots = append(c.snapshots, s)
	}
	slices.SortFunc(c.segments, func(a, b closedSegment) int {
		return cmp.Or(cmp.Compare(a.first, b.first), cmp.Compare(a.last, b.last))
	})
	slices.SortFunc(c.snapshots, func(a, b closedSnapshot) int {
		return cmp.Or(cmp.Compare(a.term, b.term), cmp.Compare(a.index, b.index), cmp.Compare(a.stamp, b.stamp))
	})
	return c, nil
}

// damaged returns the first file that is bad, "" where there is none.
func (c closedFiles) damaged() (name string, err error) {
	for _, s := range c.segments {
		if s.bad != nil {
			return s.name, s.bad
		}
	}
	for _, s := range c.snapshots {
		if s.bad != nil {
			return s.file, s.bad
		}
	}
	return c.gap()
}

// gap returns the segment before which entries are missing, "" where there is none. dqlite passes over older
// segments that do not lead up to the last one, if a snapshot makes them superfluous (uvFilterSegments in its
// raft/uv.c).
func (c closedFiles) gap() (name string, err error) {
	if len(c.segments) == 0 {
		return "", nil
	}
	first := c.lastRun()
	from := uint64(0)
	if n := len(c.snapshots); n > 0 {
		from = c.snapshots[n-1].index
	} else if first > 0 {
		from = c.segments[first-1].last // without a snapshot all of them are needed
	}
	if s := c.segments[first]; s.first > from+1 {
		return s.name, fmt.Errorf("%w: it begins with entry %d, and entry %d is in no other file", errBefore, s.first, from+1)
	}
	return "", nil
}

// lastRun is the first of the segments that lead up to the last one without a gap.
func (c closedFiles) lastRun() int {
	i := len(c.segments) - 1
	for i > 0 && c.segments[i-1].last+1 >= c.segments[i].first {
		i--
	}
	return i
}

// superfluous returns the files of a directory with damage without which it is whole, because what is in them
// is in others as well: segments that a newer snapshot covers, and snapshots in whose place an older one can be
// used with the segments after it. ok is false where something that is damaged is needed.
func (c closedFiles) superfluous() (names []string, ok bool) {
	rest := closedFiles{segments: c.segments}
	newest := uint64(0) // entry of a bad snapshot
	for _, s := range c.snapshots {
		if s.bad == nil {
			rest.snapshots = append(rest.snapshots, s)
			continue
		}
		names = append(names, s.name, s.name+".meta")
		newest = max(newest, s.index)
	}
	bad := -1
	for i, s := range c.segments {
		if s.bad != nil {
			bad = i
		}
	}
	n := len(rest.snapshots)
	if bad >= 0 {
		last := c.segments[bad].last
		// Open segments do not say with which entry they begin: it is the one after the last closed segment, or
		// after the snapshot where there is none.
		if n == 0 || rest.snapshots[n-1].index < last || bad == len(c.segments)-1 && rest.snapshots[n-1].index != last {
			return nil, false
		}
		for _, s := range c.segments[:bad+1] {
			names = append(names, s.name)
		}
		rest.segments = c.segments[bad+1:]
	}
	if newest > 0 && (n == 0 || rest.snapshots[n-1].index < newest) {
		k := len(rest.segments)
		if n == 0 || k == 0 || rest.segments[k-1].last < newest {
			return nil, false
		}
	}
	if _, err := rest.gap(); err != nil {
		return nil, false
	}
	return names, len(names) > 0
}

// CheckFiles reads Raft's files as dqlite is going to, and refuses those whose damage dqlite
// would not notice or would make good by dropping what was acknowledged: a bad batch with a
// good one after it, a bad closed segment or description of a snapshot, and lost metadata.
// A bad batch at the very end is what a crash leaves, and cannot be told from damage to it.
// What is refused is a [*Damage].
func CheckFiles(dir string) error {
	damaged := func(name string, err error) error {
		return &Damage{name, err.Error(), fmt.Errorf("%s is damaged: %w; the node does not start, so that nothing gets lost: %s", filepath.Join(dir, name), err, remedy(dir))}
	}
	closed, err := readClosed(dir, os.ReadFile)
	if err != nil {
		return err
	}
	if name, err := closed.damaged(); err != nil {
		return damaged(name, err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("cannot list %s: %w", dir, err)
	}
	type numbered struct {
		name string
		n    uint64
	}
	var open []numbered
	for _, e := range entries {
		if m := openName.FindStringSubmatch(e.Name()); m != nil {
			if n, err := strconv.ParseUint(m[1], 10, 64); err == nil {
				open = append(open, numbered{e.Name(), n})
			}
		}
	}
	sort.Slice(open, func(i, j int) bool { return open[i].n < open[j].n })
	log := !closed.empty
	torn, tornErr := "", error(nil)
	for _, o := range open {
		data, err := os.ReadFile(filepath.Join(dir, o.name))
		if errors.Is(err, unix.EIO) {
			return damaged(o.name, err)
		}
		if err != nil {
			return fmt.Errorf("cannot read the log: %w", err)
		}
		good, bad, err := checkOpen(data)
		if err == nil && bad != nil && len(data) < openSize {
			// A crash tears a write into the allocated space. dqlite cuts the file only at the end of
			// a batch, before it renames it.
			err = fmt.Errorf("it was cut off: %w", bad)
		}
		if err != nil {
			return damaged(o.name, err)
		}
		if good > 0 && torn != "" {
			return damaged(torn, fmt.Errorf("%w, and %s goes on after it", tornErr, o.name))
		}
		if bad != nil && torn == "" {
			torn, tornErr = o.name, bad
		}
		log = log || good > 0
	}
	if log {
		return checkMetadata(dir)
	}
	return nil
}

func checkMetadata(dir string) error {
	var reasons []error
	for _, name := range []string{"metadata1", "metadata2"} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		switch {
		case err != nil:
			reasons = append(reasons, err)
		case len(data) != metadataSize:
			reasons = append(reasons, fmt.Errorf("%s has %d bytes instead of %d", name, len(data), metadataSize))
		case binary.LittleEndian.Uint64(data) != diskFormat || binary.LittleEndian.Uint64(data[8:]) == 0:
			reasons = append(reasons, fmt.Errorf("%s is not in the format of dqlite", name))
		default:
			return nil // the other may be missing on a young node, or torn by a crash
		}
	}
	lost := errors.Join(reasons...)
	return &Damage{"metadata1", "the node's term and vote are lost", fmt.Errorf("%s has a log, but the node's term and vote are lost: %w; %s", dir, lost, remedy(dir))}
}

var (
	errEnd     = errors.New("the batches end here")
	errHeader  = errors.New("the checksum of a batch's header is wrong")
	errData    = errors.New("the checksum of a batch's data is wrong")
	errLength  = errors.New("a batch is longer than the file")
	errFormat  = errors.New("it is not in the format of dqlite")
	errBefore  = errors.New("what comes before it is missing")
	errMissing = errors.New("the number of entries is not the one in the file's name")
)

// batch checks the batch at off. next is where the following one begins: it is known, not 0,
// unless the header is bad.
func batch(data []byte, off int) (entries uint64, next int, err error) {
	rest := data[off:]
	if len(rest) < 16 {
		return 0, 0, errEnd
	}
	sumHeader, sumData := binary.LittleEndian.Uint32(rest), binary.LittleEndian.Uint32(rest[4:])
	n := binary.LittleEndian.Uint64(rest[8:])
	if n == 0 && sumHeader == 0 && sumData == 0 {
		return 0, 0, errEnd
	}
	if n == 0 || n > maxBatch || uint64(len(rest)) < 16+16*n {
		return 0, 0, errHeader
	}
	header := rest[8 : 16+16*n]
	if crc(0, header) != sumHeader {
		return 0, 0, errHeader
	}
	size := uint64(0)
	for i := range n {
		size += uint64(binary.LittleEndian.Uint32(header[8+16*i+12:]))
	}
	if size > uint64(len(rest))-16-16*n {
		return 0, 0, errLength
	}
	next = off + int(16+16*n+size)
	if crc(0, rest[16+16*n:16+16*n+size]) != sumData {
		return n, next, errData
	}
	return n, next, nil
}

func checkClosed(data []byte, first, last uint64) error {
	if len(data) < 8 || binary.LittleEndian.Uint64(data) != diskFormat {
		return errFormat
	}
	entries := uint64(0)
	for off := 8; off < len(data); {
		n, next, err := batch(data, off)
		if err != nil {
			return fmt.Errorf("at byte %d: %w", off, err)
		}
		entries, off = entries+n, next
	}
	if last < first || entries != last-first+1 {
		return fmt.Errorf("%w: %d", errMissing, entries)
	}
	return nil
}

// checkOpen counts the good batches of an open segment. bad is about a bad one at the end,
// err about one that others follow.
func checkOpen(data []byte) (good int, bad, err error) {
	if len(data) < 8 || zero(data) {
		return 0, nil, nil // prepared, and not used yet
	}
	if binary.LittleEndian.Uint64(data) != diskFormat {
		if binary.LittleEndian.Uint64(data) == 0 && !follows(data, 8) {
			return 0, errFormat, nil // the first write was torn
		}
		return 0, nil, errFormat
	}
	for off := 8; off < len(data); {
		_, next, err := batch(data, off)
		if err == nil {
			good++
			off = next
			continue
		}
		if errors.Is(err, errEnd) && zero(data[off:]) {
			return good, nil, nil
		}
		from := off + 8
		if next != 0 {
			from = next
		}
		err = fmt.Errorf("at byte %d: %w", off, err)
		if follows(data, from) {
			return good, nil, fmt.Errorf("%w, and good ones follow", err)
		}
		return good, err, nil
	}
	return good, nil, nil
}

// follows says whether there is a good batch anywhere from off on. Batches are a multiple of
// 8 bytes long.
func follows(data []byte, off int) bool {
	for ; off+16 <= len(data); off += 8 {
		if n := binary.LittleEndian.Uint64(data[off+8:]); n == 0 || n > maxBatch {
			continue
		}
		if _, _, err := batch(data, off); err == nil {
			return true
		}
	}
	return false
}

func zero(data []byte) bool {
	for _, b := range data {
		if b != 0 {
			return false
		}
	}
	return true
}

// checkSnapshotMeta checks format, checksum, index and size of the configuration, and the
// configuration itself.
func checkSnapshotMeta(data []byte) error {
	const header = 32
	if len(data) < header || binary.LittleEndian.Uint64(data) != diskFormat {
		return errFormat
	}
	size := binary.LittleEndian.Uint64(data[24:])
	if size > uint64(len(data)-header) {
		return errLength
	}
	if crc(0, data[16:header+size]) != uint32(binary.LittleEndian.Uint64(data[8:])) {
		return errors.New("its checksum is wrong")
	}
	return nil
}
