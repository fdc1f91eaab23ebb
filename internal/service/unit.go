package service

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"microk8s/internal/fileaccess"

	"golang.org/x/sys/unix"
	"gopkg.in/natefinch/lumberjack.v2"
)

// unit is one supervised service. start and stop are called with the supervisor's order held;
// current may be called at any time.
type unit struct {
	sup  *Supervisor
	name string
	log  io.Writer

	// mainOnly: stopping ends the main process and leaves what it started (the shims of the
	// containers).
	mainOnly bool

	cancel context.CancelFunc // nil when the loop does not run
	done   chan struct{}      // closed when the loop has ended

	mu    sync.Mutex
	state State
}

// Log files: two old ones of 20 MB each are kept beside the current one.
const (
	logMegabytes = 20
	logBackups   = 2
)

func newUnit(s *Supervisor, name string) (*unit, error) {
	path := s.Env.ServiceLog(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("cannot make the log folder: %w", err)
	}
	// Made here because the rotation keeps the mode and owner that it finds.
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	if err != nil {
		return nil, fmt.Errorf("cannot make the log of %s: %w", name, err)
	}
	_ = f.Close()
	if err := fileaccess.Share(path, 0o640); err != nil {
		s.Log.Warn("only root can read a service's log", "service", name, "err", err)
	}
	return &unit{
		sup:      s,
		name:     name,
		log:      draining{&lumberjack.Logger{Filename: path, MaxSize: logMegabytes, MaxBackups: logBackups}},
		mainOnly: name == Containerd,
		state:    State{Name: name, Phase: Stopped},
	}, nil
}

// draining never fails: when the disk is full a service loses log lines and goes on, instead
// of blocking on a pipe that nobody reads.
type draining struct{ io.Writer }

func (d draining) Write(p []byte) (int, error) {
	_, _ = d.Writer.Write(p)
	return len(p), nil
}

func (u *unit) current() State {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.state
}

func (u *unit) set(change func(*State)) {
	u.mu.Lock()
	defer u.mu.Unlock()
	old := u.state.Phase
	change(&u.state)
	if u.state.Phase != old {
		u.state.Since = time.Now().UTC()
	}
}

// note writes a line of the supervisor's own into the service's log.
func (u *unit) note(format string, a ...any) {
	fmt.Fprintf(u.log, NotePrefix+"%s %s\n", time.Now().UTC().Format(time.RFC3339), fmt.Sprintf(format, a...))
}

// NotePrefix begins the lines that the supervisor itself writes into a service's log.
const NotePrefix = "-- microk8s: "

// start runs the service unless it does already, and returns when its process exists. One that
// waits after a failure is started at once: the caller has fixed something.
func (u *unit) start() error {
	if u.current().Phase == Backoff {
		u.stop()
	}
	if u.cancel != nil {
		select {
		case <-u.done: // idle or failed: start again
		default:
			return nil
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	u.cancel, u.done = cancel, make(chan struct{})
	u.set(func(st *State) { st.Restarts, st.LastExit, st.LastWords = 0, "", "" })
	started := make(chan error, 1)
	go func() {
		defer close(u.done)
		u.loop(ctx, started)
	}()
	return <-started
}

// stop ends the service and waits for it.
func (u *unit) stop() {
	if u.cancel != nil {
		u.cancel()
		<-u.done
		u.cancel = nil
	}
	u.set(func(st *State) { st.Phase, st.PID = Stopped, 0 })
}

// loop runs the process again and again until ctx ends or the process has nothing to do.
func (u *unit) loop(ctx context.Context, started chan<- error) {
	backoff := u.sup.MinBackoff
	for first := true; ; first = false {
		p, err := u.spawn()
		if err != nil {
			err = fmt.Errorf("cannot start %s: %w", u.name, err)
			u.note("%v", err)
			u.sup.Log.Error("service not started", "service", u.name, "err", err)
			if first {
				u.set(func(st *State) { st.Phase, st.PID, st.LastExit = Failed, 0, err.Error() })
				started <- err
				return
			}
		} else {
			began := time.Now()
			u.set(func(st *State) { st.Phase, st.PID = Running, p.pid })
			if first {
				started <- nil
			}
			stopped := u.watch(ctx, p)
			if stopped {
				return
			}
			ws := p.status
			text := waitText(ws)
			u.note("%s ended: %s", u.name, text)
			if ws.Exited() && ws.ExitStatus() == ExitIdle {
				u.sup.Log.Info("service has nothing to do", "service", u.name)
				u.set(func(st *State) { st.Phase, st.PID, st.LastExit = Idle, 0, text })
				return
			}
			if time.Since(began) >= u.sup.StableAfter {
				backoff = u.sup.MinBackoff
			}
			u.sup.Log.Warn("service ended", "service", u.name, "status", text, "restart_in", backoff)
			u.set(func(st *State) { st.Phase, st.PID, st.LastExit = Backoff, 0, text })
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(backoff):
		}
		backoff = min(2*backoff, u.sup.MaxBackoff)
		// All that the process wrote has arrived in the log by now.
		words := LastLine(u.sup.Env.ServiceLog(u.name))
		u.set(func(st *State) { st.Restarts, st.LastWords = st.Restarts+1, words })
	}
}

// watch waits until the process has ended by itself, or ends it when ctx does (then it
// returns true). In both cases nothing that belongs to the process is left.
func (u *unit) watch(ctx context.Context, p *process) (stopped bool) {
	defer forget(u.sup.Env, u.name)
	select {
	case <-p.ended:
	case <-ctx.Done():
		stopped = true
		u.set(func(st *State) { st.Phase = Stopping })
		p.signal(unix.SIGTERM, u.mainOnly)
		p.signal(unix.SIGCONT, u.mainOnly) // a process that was stopped takes no other signal, as systemd does it
		select {
		case <-p.ended:
		case <-time.After(u.sup.StopTimeout):
			u.sup.Log.Warn("service did not stop in time and is killed", "service", u.name, "after", u.sup.StopTimeout)
			u.note("%s did not stop within %s and is killed", u.name, u.sup.StopTimeout)
			p.signal(unix.SIGKILL, u.mainOnly)
			<-p.ended
		}
		u.note("%s stopped: %s", u.name, waitText(p.status))
		u.set(func(st *State) { st.LastExit = waitText(p.status) })
	}
	if !u.mainOnly {
		p.signal(unix.SIGKILL, false) // helpers that the main process left in its group
	}
	return stopped
}

// process is a running program, leader of its own session and process group.
type process struct {
	pid    int
	ended  chan struct{}
	status syscall.WaitStatus // valid once ended is closed
}

func (p *process) signal(sig syscall.Signal, mainOnly bool) {
	pid := -p.pid
	if mainOnly {
		pid = p.pid
	}
	_ = unix.Kill(pid, sig) // gone already: as wanted
}

// spawn starts the program with its output going to the service's log.
func (u *unit) spawn() (*process, error) {
	argv := u.sup.Argv(u.name)
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer w.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		r.Close()
		return nil, err
	}
	defer null.Close()
	p, err := u.sup.reaper.spawn(argv[0], argv, &os.ProcAttr{
		Dir:   "/",
		Env:   append(slices.Clip(u.sup.Environ), fmt.Sprintf("%s=%d", supervisorVar, os.Getpid())),
		Files: []*os.File{null, w, w},
		// The main process is told when the supervisor dies, however that happens.
		Sys: &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGTERM},
	})
	if err != nil {
		r.Close()
		return nil, err
	}
	// A shim may hold the pipe longer than the service lives; the copy ends with the last one.
	go func() {
		defer r.Close()
		_, _ = io.Copy(u.log, r)
	}()
	u.note("%s started, pid %d", u.name, p.pid)
	if err := remember(u.sup.Env, u.name, p.pid); err != nil {
		u.sup.Log.Warn("cannot record a service's process", "service", u.name, "err", err)
	}
	return p, nil
}
