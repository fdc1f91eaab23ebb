package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// boot switches a host on, unless it is on already.
func (l *Lab) boot(ctx context.Context, h *host) error {
	if h.up() {
		_, err := l.ensureSwitch(ctx) // mends the network if the switch was killed
		return err
	}
	fail := func(err error) error { return fmt.Errorf("cannot start host %s: %w", h.Name, err) }
	if err := l.powerOff(ctx, h); err != nil { // what a crash may have left
		return err
	}
	if err := l.prepareRoot(h); err != nil {
		return fail(err)
	}
	sw, err := l.ensureSwitch(ctx)
	if err != nil {
		return fail(err)
	}
	list, err := l.makeCgroups(h.Name)
	if err != nil {
		return fail(err)
	}
	_, aliases, err := hierarchies()
	if err != nil {
		return fail(err)
	}
	if err := l.launch(ctx, h, sw, initConfig{
		Name: h.Name, Root: l.rootDir(h.Name), Snap: h.Snap, Cgroups: list, Aliases: aliases, Image: l.image(h),
	}); err != nil {
		_ = l.powerOff(context.WithoutCancel(ctx), h)
		return fail(err)
	}
	return nil
}

func (l *Lab) image(h *host) string {
	if h.Disk == 0 {
		return ""
	}
	return l.imageFile(h.Name)
}

// launch starts the init process and waits until it has set the host up.
func (l *Lab) launch(ctx context.Context, h *host, sw process, cfg initConfig) error {
	l.log.Info("start host", "host", h.Name, "address", l.addr(h).String())
	logFile, err := os.OpenFile(l.LogFile(h.Name), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer logFile.Close()
	cfgR, cfgW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer cfgW.Close()
	statusR, statusW, err := os.Pipe()
	if err != nil {
		cfgR.Close()
		return err
	}
	defer statusR.Close()
	cmd, err := l.startIn(h.Name, nil, func() (*exec.Cmd, error) {
		return &exec.Cmd{
			Path:       "/proc/self/exe",
			Args:       []string{argvInit, l.instance, h.Name},
			Env:        []string{"PATH=" + Path, "HOME=/root", "LANG=C.UTF-8"},
			Dir:        "/",
			Stdout:     logFile,
			Stderr:     logFile,
			ExtraFiles: []*os.File{cfgR, statusW},
			SysProcAttr: &syscall.SysProcAttr{
				Setsid:     true,
				Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWNET,
			},
		}, nil
	})
	cfgR.Close()
	statusW.Close()
	if err != nil {
		return err
	}
	go func() { _ = cmd.Wait() }() // reap it should it end before this program
	h.Booted = false
	if h.Init, err = identify(cmd.Process.Pid); err != nil {
		return err
	}
	// Recorded before it may do anything: if this program dies first, init sees the pipe close
	// and ends.
	if err := l.save(h); err != nil {
		return err
	}
	if err := l.attach(h, sw); err != nil {
		return err
	}
	if err := json.NewEncoder(cfgW).Encode(cfg); err != nil {
		return err
	}
	cfgW.Close()
	stop := context.AfterFunc(ctx, func() { statusR.SetReadDeadline(time.Now()) })
	defer stop()
	status, err := io.ReadAll(statusR)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return err
	}
	if msg := strings.TrimSpace(string(status)); msg != statusReady {
		if msg == "" {
			msg = "its init process ended; see " + l.LogFile(h.Name)
		}
		return errors.New(msg)
	}
	h.Booted = true
	return l.save(h)
}

// up reports whether the host is switched on, paused or not.
func (h *host) up() bool { return h.Booted && h.Init.alive() }

// wait returns when the process is gone.
func (p process) wait(ctx context.Context) error {
	for d := time.Millisecond; p.alive(); d = min(2*d, 50*time.Millisecond) {
		if err := pause(ctx, d); err != nil {
			return err
		}
	}
	return nil
}

// powerOff kills everything in a host and removes its cgroups and its network. It works as
// well when part of that is gone.
func (l *Lab) powerOff(ctx context.Context, h *host) error {
	s := l.loadShared()
	if h.Number != 0 {
		l.detach(h, s.Switch)
	}
	if h.Init.alive() {
		l.log.Info("switch host off", "host", h.Name)
		_ = unix.Kill(h.Init.PID, unix.SIGKILL) // takes its whole PID namespace along
	}
	// Also thaws what was paused; only then can it die.
	if err := l.removeCgroups(ctx, h.Name); err != nil {
		return fmt.Errorf("cannot switch %s off: %w", h.Name, err)
	}
	limited, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := h.Init.wait(limited); err != nil {
		return fmt.Errorf("cannot switch %s off: its init process (%d) does not end: %w", h.Name, h.Init.PID, err)
	}
	if h.Disk != 0 {
		return l.waitImageFree(limited, h.Name)
	}
	return nil
}

// Pause freezes all processes of a host, like a machine that stops answering.
func (l *Lab) Pause(ctx context.Context, name string) error { return l.freeze(ctx, name, true) }

// Resume lets a paused host go on.
func (l *Lab) Resume(ctx context.Context, name string) error { return l.freeze(ctx, name, false) }

func (l *Lab) freeze(ctx context.Context, name string, frozen bool) error {
	return l.locked(ctx, func() error {
		h, err := l.load(name)
		if err != nil {
			return err
		}
		if !h.up() {
			return fmt.Errorf("cannot pause or resume %s: %w", name, ErrNotRunning)
		}
		list, _, err := hierarchies()
		if err != nil {
			return err
		}
		done := false
		for _, y := range list {
			dir := l.freezerDir(y, name)
			if !freezeDir(dir, y, frozen) {
				continue
			}
			done = true
			if err := waitFrozen(ctx, dir, y, frozen); err != nil {
				return fmt.Errorf("cannot pause or resume %s: %w", name, err)
			}
			break // one hierarchy is enough
		}
		if !done {
			return fmt.Errorf("cannot pause or resume %s: this machine has no cgroup freezer", name)
		}
		return nil
	})
}

func (l *Lab) freezerDir(y hierarchy, name string) string {
	return filepath.Join(y.Mount, l.cgroupName(), name)
}

// isFrozen reads what freezeDir wrote.
func isFrozen(dir string, y hierarchy) bool {
	if y.V2 {
		b, _ := os.ReadFile(filepath.Join(dir, "cgroup.freeze"))
		return strings.TrimSpace(string(b)) == "1"
	}
	b, _ := os.ReadFile(filepath.Join(dir, "freezer.state"))
	return len(b) > 0 && strings.TrimSpace(string(b)) != "THAWED"
}

// waitFrozen waits until the kernel has stopped, or let go, every process.
func waitFrozen(ctx context.Context, dir string, y hierarchy, frozen bool) error {
	for {
		var reached bool
		if y.V2 {
			b, _ := os.ReadFile(filepath.Join(dir, "cgroup.events"))
			reached = strings.Contains(string(b), "frozen 1") == frozen
		} else {
			b, _ := os.ReadFile(filepath.Join(dir, "freezer.state"))
			reached = (strings.TrimSpace(string(b)) == "FROZEN") == frozen
		}
		if reached {
			return nil
		}
		if err := pause(ctx, 5*time.Millisecond); err != nil {
			return err
		}
		if frozen {
			freezeDir(dir, y, true) // v1 may need to be asked again while processes fork
		}
	}
}

// state of a host now.
func (l *Lab) state(h *host) State {
	if !h.up() {
		return Off
	}
	list, _, _ := hierarchies()
	for _, y := range list {
		if isFrozen(l.freezerDir(y, h.Name), y) {
			return Paused
		}
	}
	return Running
}
