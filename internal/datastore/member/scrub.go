package member

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// How Scrub reads: it is in no hurry.
const (
	scrubPause = 100 * time.Millisecond // after each file
	scrubTries = 3                      // a file that is about to be renamed or removed is no damage
	scrubAgain = 2 * time.Second
)

// Scrub reads the closed segments and snapshots of a member that runs, from the disk and not from the kernel's
// memory, and returns a [*Damage] where one is damaged that the member needs at its next start.
func Scrub(ctx context.Context, dir string) error {
	var found *Damage
	for try := range scrubTries {
		if try > 0 {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(scrubAgain):
			}
		}
		c, err := readClosed(dir, func(path string) ([]byte, error) { return readDisk(ctx, path) })
		if errors.Is(err, fs.ErrNotExist) && ctx.Err() == nil {
			found = nil
			continue // it was renamed or removed meanwhile
		}
		if err != nil {
			return err
		}
		name, err := c.damaged()
		if err == nil {
			return nil
		}
		if _, ok := c.superfluous(); ok {
			return nil // the next start sets them aside
		}
		if found != nil && found.File != name {
			found = nil
			continue
		}
		found = &Damage{name, err.Error(), fmt.Errorf("%s is damaged: %w", filepath.Join(dir, name), err)}
	}
	if found == nil {
		return nil // it changes all the time; the next one sees it
	}
	return found
}

// readDisk reads a file without what the kernel remembers of it.
func readDisk(ctx context.Context, path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) // it is advice
	data, err := io.ReadAll(f)
	if err != nil {
		return nil, err
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(scrubPause):
		return data, nil
	}
}
