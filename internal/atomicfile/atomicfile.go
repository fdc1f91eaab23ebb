// Package atomicfile replaces files that other processes read: the new content is written
// beside the old one, given its mode and owner, synced, and renamed. A crash or a full disk
// leaves the old file as it was.
package atomicfile

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Owner is the numeric owner of a written file. The zero value of *Owner (nil) leaves the
// process' own.
type Owner struct{ UID, GID int }

// Write replaces the file at path by data with the given permission bits (not masked by the
// umask). owner may be nil. The directory must exist. An error leaves the old file, if any,
// and no temporary file behind.
//
//	err := atomicfile.Write(env.Args("kubelet"), text, 0o660, nil)
func Write(path string, data []byte, perm os.FileMode, owner *Owner) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name()) // already gone after a rename
			err = fmt.Errorf("cannot write %s: %w", path, err)
		}
	}()
	if _, err = f.Write(data); err != nil {
		return err
	}
	if owner != nil {
		if err = f.Chown(owner.UID, owner.GID); err != nil {
			return err
		}
	}
	if err = f.Chmod(perm); err != nil { // after chown, which clears special bits
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	// The new content is in place and complete; syncing the directory makes the name durable.
	return errors.Join(f.Close(), syncDir(filepath.Dir(path)))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
