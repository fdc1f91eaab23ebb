// Package diskspace checks, before something large is written, that there is room for it.
package diskspace

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// block is what a file takes at least, and what sizes are rounded up to, in bytes.
const block = 4096

// Need is what files will take.
type Need struct{ Bytes, Files uint64 }

// Add counts one more file of so many bytes.
func (n *Need) Add(size int64) {
	n.Bytes += (uint64(max(size, 0)) + block - 1) / block * block
	n.Files++
}

// Error is the error of a check that found too little room.
type Error struct {
	Dir        string
	Need, Free Need
}

func (e *Error) Error() string {
	if e.Free.Bytes < e.Need.Bytes {
		return fmt.Sprintf("%s has %d MiB free, and %d MiB are needed; free some space there", e.Dir, e.Free.Bytes>>20, e.Need.Bytes>>20+1)
	}
	return fmt.Sprintf("the file system of %s has room for %d more files, and %d are needed; remove some files there", e.Dir, e.Free.Files, e.Need.Files)
}

// Check returns an *Error when the file system of a directory has no room for what is needed. A
// tenth is added, since directories and journals take their part.
func Check(dir string, need Need) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("cannot find out how much space %s has: %w", dir, err)
	}
	need.Bytes += need.Bytes / 10
	free := Need{Bytes: fs.Bavail * uint64(fs.Bsize), Files: fs.Ffree}
	if free.Bytes < need.Bytes || fs.Files > 0 && free.Files < need.Files { // some file systems do not count files
		return &Error{Dir: dir, Need: need, Free: free}
	}
	return nil
}
