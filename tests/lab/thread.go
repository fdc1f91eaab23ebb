package lab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// onThread runs f on a thread of its own that ends with it, so that f may move the thread into
// namespaces and cgroups. It is never the main thread, which cannot end and would keep them
// busy.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go takeThread(func() { done <- f() })
	return <-done
}

func takeThread(f func()) {
	runtime.LockOSThread()
	if unix.Gettid() != os.Getpid() {
		f()
		return // locked: the runtime ends the thread
	}
	gone := make(chan struct{})
	go func() { // holds the main thread meanwhile, so the goroutine gets another one
		defer close(gone)
		takeThread(f)
	}()
	<-gone
	runtime.UnlockOSThread()
}

// namespace kinds in the order to enter them; mnt is last because the others are found through
// this machine's /proc.
var namespaces = []struct {
	name string
	flag int
}{
	{"cgroup", unix.CLONE_NEWCGROUP}, {"ipc", unix.CLONE_NEWIPC}, {"uts", unix.CLONE_NEWUTS},
	{"net", unix.CLONE_NEWNET}, {"pid", unix.CLONE_NEWPID}, {"mnt", unix.CLONE_NEWNS},
}

// enter moves the calling thread into the namespaces of a process (the PID namespace: of the
// processes it forks).
func enter(p process, only ...string) error {
	fds := make([]int, len(namespaces))
	for i := range fds {
		fds[i] = -1
	}
	defer func() {
		for _, fd := range fds {
			if fd >= 0 {
				unix.Close(fd)
			}
		}
	}()
	want := func(name string) bool {
		if len(only) == 0 {
			return true
		}
		for _, o := range only {
			if o == name {
				return true
			}
		}
		return false
	}
	for i, ns := range namespaces {
		if !want(ns.name) {
			continue
		}
		fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/%s", p.PID, ns.name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("cannot open %s namespace: %w", ns.name, err)
		}
		fds[i] = fd
	}
	if !p.alive() { // the number may have been reused between its check and here
		return ErrNotRunning
	}
	if want("mnt") {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("cannot unshare the working directory: %w", err)
		}
	}
	for i, ns := range namespaces {
		if fds[i] < 0 {
			continue
		}
		if err := unix.Setns(fds[i], ns.flag); err != nil {
			return fmt.Errorf("cannot enter %s namespace: %w", ns.name, err)
		}
	}
	return nil
}

// startIn starts cmd in the cgroups of a group of this lab and, if inside is given, in the
// namespaces of that process.
func (l *Lab) startIn(group string, inside *process, cmd func() (*exec.Cmd, error)) (*exec.Cmd, error) {
	var started *exec.Cmd
	err := onThread(func() error {
		v2, err := l.joinCgroups(group, inside == nil)
		if err != nil {
			return err
		}
		if v2 != nil {
			defer v2.Close()
		}
		if inside != nil {
			if err := enter(*inside); err != nil {
				return err
			}
		}
		c, err := cmd()
		if err != nil {
			return err
		}
		if c.SysProcAttr == nil {
			c.SysProcAttr = &syscall.SysProcAttr{}
		}
		if v2 != nil {
			c.SysProcAttr.UseCgroupFD, c.SysProcAttr.CgroupFD = true, int(v2.Fd())
		}
		started = c
		return c.Start()
	})
	return started, err
}

// lookPath finds a program in a PATH on the calling thread's root.
func lookPath(file, path string) (string, error) {
	if strings.Contains(file, "/") {
		return file, nil
	}
	for _, dir := range filepath.SplitList(path) {
		p := filepath.Join(dir, file)
		if st, err := os.Stat(p); err == nil && !st.IsDir() && st.Mode()&0o111 != 0 {
			return p, nil
		}
	}
	return "", &exec.Error{Name: file, Err: exec.ErrNotFound}
}
