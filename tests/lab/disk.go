package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// MinDisk is the smallest size of a host's data disk, in bytes: below, ext4 has no room for its
// journal.
const MinDisk = 16 << 20

// Disk puts a host's data (/var/snap) on a file system of the given size in bytes, or back on
// the machine's with 0. The data is kept; if it does not fit, nothing changes. A host that runs
// is switched off and on again for it.
func (l *Lab) Disk(ctx context.Context, name string, size int64) error {
	if size != 0 && size < MinDisk {
		return fmt.Errorf("cannot make a disk of %d bytes: at least %d MiB", size, MinDisk>>20)
	}
	return l.locked(ctx, func() error {
		h, err := l.load(name)
		if err != nil {
			return err
		}
		on := h.up()
		if err := l.powerOff(ctx, h); err != nil {
			return err
		}
		change := l.resizeDisk(ctx, h, size)
		if on {
			if err := l.boot(ctx, h); err != nil {
				return errors.Join(change, err)
			}
		}
		return change
	})
}

// resizeDisk replaces or resizes the image of a host that is off. The record is the switch: it
// is written when the new place holds all data, and what it does not name is removed.
func (l *Lab) resizeDisk(ctx context.Context, h *host, size int64) error {
	if size == h.Disk {
		return nil
	}
	if err := l.prepareRoot(h); err != nil {
		return err
	}
	image, data := l.imageFile(h.Name), filepath.Join(l.rootDir(h.Name), "var/snap")
	fail := func(err error) error { return fmt.Errorf("cannot change the disk of %s: %w", h.Name, err) }
	switch {
	case h.Disk == 0:
		if err := makeImage(ctx, image, size); err != nil {
			return fail(err)
		}
		if err := copyData(ctx, image, data, "to"); err != nil {
			os.Remove(image)
			return fail(err)
		}
		h.Disk = size
		if err := l.save(h); err != nil {
			return err
		}
		return emptyDir(data)
	case size == 0:
		if err := emptyDir(data); err != nil { // of an interrupted attempt
			return fail(err)
		}
		if err := copyData(ctx, image, data, "from"); err != nil {
			return fail(err)
		}
		h.Disk = 0
		if err := l.save(h); err != nil {
			return err
		}
		return os.Remove(image)
	}
	if err := run(ctx, "e2fsck", "-f", "-p", image); err != nil {
		return fail(err)
	}
	if size > h.Disk {
		if err := os.Truncate(image, size); err != nil {
			return fail(err)
		}
	}
	if err := run(ctx, "resize2fs", image, fmt.Sprintf("%dK", size>>10)); err != nil {
		_ = os.Truncate(image, max(size, h.Disk)) // as it was
		return fail(fmt.Errorf("the data may need more room: %w", err))
	}
	if err := os.Truncate(image, size); err != nil {
		return fail(err)
	}
	h.Disk = size
	return l.save(h)
}

func makeImage(ctx context.Context, image string, size int64) error {
	_ = os.Remove(image)
	f, err := os.OpenFile(image, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	err = errors.Join(f.Truncate(size), f.Close())
	if err == nil {
		// No blocks kept back for root: this disk shall be full when it is full.
		err = run(ctx, "mkfs.ext4", "-q", "-F", "-m", "0", image)
	}
	if err != nil {
		os.Remove(image)
	}
	return err
}

// copyData copies a host's data to or from its image, mounted where nobody else sees it.
func copyData(ctx context.Context, image, data, direction string) error {
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{argvCopy, image, data, direction}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Setpgid: true}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, lastLine(string(out)))
	}
	return nil
}

// copyMain is the body of copyData, in a mount namespace of its own.
func copyMain() error {
	image, data, direction := os.Args[1], os.Args[2], os.Args[3]
	if err := mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	const there = "/mnt"
	if err := mountImage(image, there); err != nil {
		return err
	}
	source, target := data, there
	if direction == "from" {
		source, target = there, data
	}
	entries, err := os.ReadDir(source)
	if err != nil {
		return err
	}
	args := []string{"-a", "-t", target, "--"}
	for _, e := range entries {
		if e.Name() != "lost+found" {
			args = append(args, filepath.Join(source, e.Name()))
		}
	}
	if len(args) > 4 {
		if err := run(context.Background(), "cp", args...); err != nil {
			return err
		}
	}
	return unix.Unmount(there, 0) // writes everything out
}

func emptyDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return os.MkdirAll(dir, 0o755)
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// waitImageFree waits until the loop device of a host's image is gone: the kernel takes the
// mounts of a dead host down a moment after its last process.
func (l *Lab) waitImageFree(ctx context.Context, name string) error {
	for {
		files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
		busy := ""
		for _, f := range files {
			if b, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(b)) == l.imageFile(name) {
				busy = f
			}
		}
		if busy == "" {
			return nil
		}
		if err := pause(ctx, 5*time.Millisecond); err != nil {
			return fmt.Errorf("the disk of %s is still in use by %s: %w", name, filepath.Dir(filepath.Dir(busy)), err)
		}
	}
}

func run(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // never two at work on one disk
	runtime.LockOSThread()                                             // the signal comes when the starting thread ends
	defer runtime.UnlockOSThread()
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, lastLine(string(out)))
	}
	return nil
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}
