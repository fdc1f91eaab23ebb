package member

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"microk8s/internal/atomicfile"
	"microk8s/internal/datastore/storedir"
)

// termFile is our copy of Raft's term and vote, with a checksum: dqlite's metadata files have
// none, and a member with a wrong vote can lose what others acknowledged. Its name begins as
// theirs do, so that procedures that delete "metadata*" delete it too.
const termFile = "metadata.check"

// termVote is what a metadata file says. Each change is a new version.
type termVote struct{ version, term, vote uint64 }

func (v termVote) bytes() []byte {
	b := binary.LittleEndian.AppendUint64(nil, diskFormat)
	b = binary.LittleEndian.AppendUint64(b, v.version)
	b = binary.LittleEndian.AppendUint64(b, v.term)
	return binary.LittleEndian.AppendUint64(b, v.vote)
}

func parseTermVote(b []byte) (v termVote, ok bool) {
	if len(b) < metadataSize || binary.LittleEndian.Uint64(b) != diskFormat {
		return v, false
	}
	v = termVote{binary.LittleEndian.Uint64(b[8:]), binary.LittleEndian.Uint64(b[16:]), binary.LittleEndian.Uint64(b[24:])}
	return v, v.version != 0
}

// readMetadata returns the newer one of dqlite's two metadata files, as dqlite chooses it.
func readMetadata(dir string) (newest termVote, ok bool) {
	for _, name := range []string{"metadata1", "metadata2"} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || len(data) != metadataSize {
			continue
		}
		if v, valid := parseTermVote(data); valid && v.version > newest.version {
			newest, ok = v, true
		}
	}
	return newest, ok
}

// rememberTerm copies what the metadata files say now.
func rememberTerm(dir string) error {
	v, ok := readMetadata(dir)
	if !ok {
		return nil // a young node
	}
	b := v.bytes()
	b = binary.LittleEndian.AppendUint32(b, crc(0, b))
	if old, err := os.ReadFile(filepath.Join(dir, termFile)); err == nil && string(old) == string(b) {
		return nil
	}
	return atomicfile.Write(filepath.Join(dir, termFile), b, 0o660, nil)
}

// forgetTerm is for procedures that rewrite the metadata on purpose.
func forgetTerm(dir string) error {
	if err := os.Remove(filepath.Join(dir, termFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot remove the copy of term and vote: %w", err)
	}
	return nil
}

// checkTerm compares dqlite's metadata with our copy. After a crash the metadata may be newer
// than the copy, never older; of the same version, it must be equal.
func checkTerm(dir string) error {
	data, err := os.ReadFile(filepath.Join(dir, termFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot read the copy of term and vote: %w", err)
	}
	path := filepath.Join(dir, termFile)
	ours, ok := parseTermVote(data)
	if !ok || len(data) != metadataSize+4 || crc(0, data[:metadataSize]) != binary.LittleEndian.Uint32(data[metadataSize:]) {
		return &Damage{termFile, "its checksum is wrong", fmt.Errorf("%s is damaged; if the disk is sound otherwise, remove this file (it is a copy) and start again", path)}
	}
	theirs, ok := readMetadata(dir)
	switch {
	case !ok:
		return &Damage{"metadata1", "term and vote are lost", fmt.Errorf("the metadata files in %s are lost or damaged: term %d and vote are known to have been there; %s", dir, ours.term, remedy(dir))}
	case theirs.version < ours.version, theirs.term < ours.term, theirs.version == ours.version && theirs != ours:
		return &Damage{"metadata1", "term and vote are not those that were written last", fmt.Errorf("the metadata files in %s are damaged or from another time: they say term %d, vote %d (version %d), and %s says term %d, vote %d (version %d); %s",
			dir, theirs.term, theirs.vote, theirs.version, termFile, ours.term, ours.vote, ours.version, remedy(dir))}
	}
	return nil
}

// unborn tells the directory of a first member whose very first start was interrupted: dqlite writes
// term 1 and then the membership (uvBootstrap in its raft/uv.c), and never again a membership where
// there is a term. Nobody would ever lead. Nothing can have been stored yet, because for that the
// member must have elected itself, which makes the term 2.
func unborn(dir string) (bool, error) {
	v, ok := readMetadata(dir)
	if !ok || v != (termVote{version: 1, term: 1}) {
		return false, nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return false, fmt.Errorf("cannot list %s: %w", dir, err)
	}
	for _, e := range entries {
		name := e.Name()
		if name == "metadata2" || name == termFile || strings.HasPrefix(name, "open-") || strings.HasPrefix(name, "snapshot-") || name[0] >= '0' && name[0] <= '9' {
			return false, nil
		}
	}
	return true, nil
}

// beginAgain repeats the first start of a first member, where it was interrupted.
func (d directory) beginAgain(node storedir.Member) error {
	if node.ID != BootstrapID {
		return nil
	}
	again, err := unborn(string(d.Dir))
	if err == nil && again {
		err = os.Remove(d.File("metadata1"))
	}
	if err != nil {
		return fmt.Errorf("cannot finish the interrupted first start: %w", err)
	}
	return nil
}
