package hostnet

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// legacyLock is what each run of the legacy iptables programs opens and closes, since rules of the old interface have no
// events of their own (iptables/xshared.h, XT_LOCK_NAME).
const legacyLock = "/run/xtables.lock"

// legacyRuns counts our own runs, each of which is an event, too.
var legacyRuns atomic.Int64

// WatchLegacy calls changed after somebody else ran a program of legacy iptables, until ctx ends. Several runs may be one
// call.
func WatchLegacy(ctx context.Context, changed func()) error {
	return watchLock(ctx, legacyLock, &legacyRuns, changed)
}

func watchLock(ctx context.Context, lock string, own *atomic.Int64, changed func()) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("cannot watch the lock of iptables: %w", err)
	}
	events := os.NewFile(uintptr(fd), "inotify") // with the runtime's poller: Close ends a Read
	defer events.Close()
	// The folder: the first run makes the file. Opening separates two closings, which the kernel would make one event (inotify(7)).
	if _, err := unix.InotifyAddWatch(fd, filepath.Dir(lock), unix.IN_OPEN|unix.IN_CLOSE|unix.IN_ONLYDIR); err != nil {
		return fmt.Errorf("cannot watch the lock of iptables in %s: %w", filepath.Dir(lock), err)
	}
	stop := context.AfterFunc(ctx, func() { events.Close() })
	defer stop()
	buf := make([]byte, 64*(unix.SizeofInotifyEvent+unix.NAME_MAX+1))
	for seen := own.Load(); ; {
		n, err := events.Read(buf)
		if ctx.Err() != nil || errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("cannot watch the lock of iptables: %w", err)
		}
		runs := int64(0)
		for rest := buf[:n]; len(rest) >= unix.SizeofInotifyEvent; {
			length := binary.NativeEndian.Uint32(rest[12:])
			name := bytes.TrimRight(rest[unix.SizeofInotifyEvent:unix.SizeofInotifyEvent+length], "\x00")
			mask := binary.NativeEndian.Uint32(rest[4:])
			if string(name) == filepath.Base(lock) && mask&unix.IN_CLOSE != 0 || mask&unix.IN_Q_OVERFLOW != 0 {
				runs++
			}
			rest = rest[unix.SizeofInotifyEvent+length:]
		}
		now := own.Load()
		if runs > now-seen {
			seen = now
			changed()
			continue
		}
		seen += runs
	}
}
