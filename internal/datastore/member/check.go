package member

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strconv"
	"strings"
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
	metaName   = regexp.MustCompile(`^snapshot-\d+-\d+-\d+\.meta$`)
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

// CheckFiles reads Raft's files as dqlite is going to, and refuses those whose damage dqlite
// would not notice or would make good by dropping what was acknowledged: a bad batch with a
// good one after it, a bad closed segment or description of a snapshot, and lost metadata.
// A bad batch at the very end is what a crash leaves, and cannot be told from damage to it.
func CheckFiles(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("cannot list %s: %w", dir, err)
	}
	damaged := func(name string, err error) error {
		return fmt.Errorf("%s is damaged: %w; the node does not start, so that nothing gets lost: %s", filepath.Join(dir, name), err, remedy(dir))
	}
	type numbered struct {
		name string
		n    uint64
	}
	var open []numbered
	log := false
	for _, e := range entries {
		name := e.Name()
		switch {
		case closedName.MatchString(name):
			log = true
			m := closedName.FindStringSubmatch(name)
			first, _ := strconv.ParseUint(m[1], 10, 64) // 16 digits
			last, _ := strconv.ParseUint(m[2], 10, 64)
			data, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				return fmt.Errorf("cannot read the log: %w", err)
			}
			if err := checkClosed(data, first, last); err != nil {
				return damaged(name, err)
			}
		case openName.MatchString(name):
			n, err := strconv.ParseUint(openName.FindStringSubmatch(name)[1], 10, 64)
			if err == nil {
				open = append(open, numbered{name, n})
			}
		case metaName.MatchString(name):
			log = true
			data, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				return fmt.Errorf("cannot read a snapshot's description: %w", err)
			}
			// An empty one is of a snapshot that was not finished.
			if len(data) == 0 {
				continue
			}
			if err := checkSnapshotMeta(data); err != nil {
				return damaged(name, err)
			}
			// The description comes first, the data appears whole: without it, a crash came
			// between them, and dqlite takes the snapshot before.
			name = strings.TrimSuffix(name, ".meta")
			data, err = os.ReadFile(filepath.Join(dir, name))
			if errors.Is(err, fs.ErrNotExist) || err == nil && len(data) == 0 {
				continue
			}
			if err != nil {
				return fmt.Errorf("cannot read a snapshot: %w", err)
			}
			if err := checkSnapshotData(data); err != nil {
				return damaged(name, err)
			}
		}
	}
	sort.Slice(open, func(i, j int) bool { return open[i].n < open[j].n })
	torn, tornErr := "", error(nil)
	for _, o := range open {
		data, err := os.ReadFile(filepath.Join(dir, o.name))
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
	return fmt.Errorf("%s has a log, but the node's term and vote are lost: %w; %s", dir, errors.Join(reasons...), remedy(dir))
}

var (
	errEnd     = errors.New("the batches end here")
	errHeader  = errors.New("the checksum of a batch's header is wrong")
	errData    = errors.New("the checksum of a batch's data is wrong")
	errLength  = errors.New("a batch is longer than the file")
	errFormat  = errors.New("it is not in the format of dqlite")
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
