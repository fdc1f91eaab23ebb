// Package workingset takes what only a program's start needed out of its memory: the heap that has
// become free, and the pages of the program's own file that it has not used since.
//
// A Go program runs the initialisation of all its packages when it starts, and afterwards uses less
// than half of its code and tables. The pages stay mapped, and the kernel counts them as in use; it
// takes mapped pages back last. [Trim] unmaps them: those that are used again come back from the page
// cache, in groups of 16, and the others are the first to go when memory is short.
package workingset

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// settle is how long after its start a program has done what it does once. Caches are filled and
// leases are taken within seconds; nothing depends on the exact time.
const settle = 20 * time.Second

// TrimAfterStart calls [Trim] once, when the program has come to rest after its start. It returns
// when that is done, or when ctx ends. A host that does not allow it loses nothing but the memory.
func TrimAfterStart(ctx context.Context) {
	timer := time.NewTimer(settle)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
		_ = Trim()
	}
}

// Trim returns the free heap to the system, and unmaps the unchanged pages of the files that this
// process has mapped privately and may not write to: its program and libraries. Other threads may run
// meanwhile. The error is that of the kernel's list of mappings, or of the first that it refused.
func Trim() error {
	debug.FreeOSMemory()
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		return err
	}
	defer f.Close()
	ranges, err := unchanged(f)
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range ranges {
		if err := r.drop(); err != nil {
			errs = append(errs, fmt.Errorf("cannot unmap pages at %x: %w", r.from, err))
		}
	}
	return errors.Join(errs...)
}

// span is a range of addresses.
type span struct{ from, to uintptr }

// drop unmaps its pages. First they are made cold, else the kernel takes them as just used when it
// unmaps them, and keeps them in memory longer; and are not to come back as huge pages, of which
// most is not used (where the file system has such; squashfs has none).
func (s span) drop() error {
	for _, advice := range []uintptr{unix.MADV_COLD, unix.MADV_NOHUGEPAGE, unix.MADV_DONTNEED} {
		_, _, errno := unix.Syscall(unix.SYS_MADVISE, s.from, s.to-s.from, advice)
		// A kernel before 5.4 or without huge pages does not know the others.
		if errno != 0 && (advice == unix.MADV_DONTNEED || errno != unix.EINVAL) {
			return errno
		}
	}
	return nil
}

// unchanged returns the mappings that hold nothing but what is in their files: private, not
// writable, and without pages of their own. (The relocated tables of a program with shared
// libraries are mapped so as well, but they were written to before: they have such pages.)
func unchanged(smaps io.Reader) ([]span, error) {
	var out []span
	var now span
	candidate := false
	lines := bufio.NewScanner(smaps)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) == 0 {
			continue
		}
		if !strings.HasSuffix(f[0], ":") {
			// address perms offset device inode path
			from, to, ok := strings.Cut(f[0], "-")
			if !ok || len(f) < 5 {
				return nil, fmt.Errorf("unknown form of smaps: %q", lines.Text())
			}
			a, err1 := strconv.ParseUint(from, 16, 64)
			b, err2 := strconv.ParseUint(to, 16, 64)
			if err := errors.Join(err1, err2); err != nil {
				return nil, fmt.Errorf("unknown form of smaps: %w", err)
			}
			now = span{uintptr(a), uintptr(b)}
			candidate = (f[1] == "r--p" || f[1] == "r-xp") && f[4] != "0"
			continue
		}
		// Each mapping has this line, after its address.
		if f[0] == "Anonymous:" && candidate && len(f) > 1 && f[1] == "0" {
			out = append(out, now)
		}
	}
	return out, lines.Err()
}
