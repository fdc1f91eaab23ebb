package service

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"microk8s/internal/atomicfile"
	"microk8s/internal/fileaccess"
	"microk8s/internal/snapenv"
)

// Supervisor starts the services of a node without snapd and keeps them running. One process
// holds it (`microk8s supervise`); others talk to it with [Client]. It is exclusive: a second
// one on the same $SNAP_COMMON waits for the lock and then gives up.
//
// A service that ends is started again after a back-off, unless its exit status is [ExitIdle]:
// then it has nothing to do and is left. The
// supervisor adopts orphaned descendants, so it reaps the shims of containers too. What it
// leaves behind when it is killed with SIGKILL is ended by the next one.
type Supervisor struct {
	Env snapenv.Env
	Log *slog.Logger

	// Argv returns the command of a service. nil means `$SNAP/bin/microk8s daemon <name>`.
	Argv func(name string) []string

	// Environ is the environment of the services, in the form of os.Environ.
	Environ []string

	// The first restart after a failure waits MinBackoff, each further one twice as long, up
	// to MaxBackoff; a process that ran for StableAfter starts over. StopTimeout is the time
	// between SIGTERM and SIGKILL. Zero means the defaults below.
	// LockWait is how long to wait for a supervisor that is just ending.
	MinBackoff, MaxBackoff, StableAfter, StopTimeout, LockWait time.Duration

	reaper *reaper
	order  sync.Mutex // held over each start, stop and restart
	units  map[string]*unit
	ended  chan struct{} // closed when a stop of everything was asked for
	endNow func()
}

// Defaults of [Supervisor]. StopTimeout is that of snapd's units (snap.md 3), MinBackoff is a
// little above their RestartSec; MaxBackoff bounds how long a node stays down after the cause
// of a failure went away.
const (
	DefaultMinBackoff  = 200 * time.Millisecond
	DefaultMaxBackoff  = 10 * time.Second
	DefaultStableAfter = time.Minute
	DefaultStopTimeout = 30 * time.Second
	DefaultLockWait    = 10 * time.Second
)

// ErrOther is wrapped when another supervisor holds the lock.
var ErrOther = errors.New("another supervisor is running")

// Run serves until ctx ends or a client asked to stop everything, then ends every service and
// container. start names services to start at once. ready is called when the control socket
// answers; it may be nil.
func (s *Supervisor) Run(ctx context.Context, start []string, ready func()) error {
	s.defaults()
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		s.Log.Warn("cannot adopt orphaned processes", "err", err)
	}
	if err := s.endOrphans(ctx); err != nil {
		return err
	}
	if s.reaper, err = startReaper(); err != nil {
		return err
	}
	s.units = map[string]*unit{}
	for _, name := range Names() {
		u, err := newUnit(s, name)
		if err != nil {
			return err
		}
		s.units[name] = u
	}
	listener, err := s.listen()
	if err != nil {
		return err
	}
	server := &http.Server{Handler: s.handler(), ReadHeaderTimeout: 10 * time.Second}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	if ready != nil {
		ready()
	}
	s.Log.Info("supervisor started", "pid", os.Getpid(), "socket", s.Env.SupervisorSocket())
	if len(start) > 0 {
		if _, err := s.start(start); err != nil {
			s.Log.Error("some services could not be started", "err", err)
		}
	}
	select {
	case <-ctx.Done():
		s.Log.Info("supervisor was asked to stop")
		s.endNow()
		s.stopAll()
	case <-s.ended:
	case err = <-served:
		s.endNow()
		s.stopAll()
	}
	// The client that asked still waits for its answer; nobody new gets in.
	_ = os.Remove(s.Env.SupervisorSocket())
	shut, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_ = server.Shutdown(shut)
	s.Log.Info("supervisor ended")
	return err
}

func (s *Supervisor) defaults() {
	or := func(d *time.Duration, def time.Duration) {
		if *d == 0 {
			*d = def
		}
	}
	or(&s.MinBackoff, DefaultMinBackoff)
	or(&s.MaxBackoff, DefaultMaxBackoff)
	or(&s.StableAfter, DefaultStableAfter)
	or(&s.StopTimeout, DefaultStopTimeout)
	or(&s.LockWait, DefaultLockWait)
	if s.Argv == nil {
		s.Argv = func(name string) []string { return []string{s.Env.Bin("microk8s"), "daemon", name} }
	}
	s.ended = make(chan struct{})
	s.endNow = sync.OnceFunc(func() { close(s.ended) })
}

// lock takes the exclusive lock of this installation; it ends with the process at the latest.
func (s *Supervisor) lock(ctx context.Context) (func(), error) {
	if err := os.MkdirAll(s.Env.RunDir(), 0o755); err != nil {
		return nil, fmt.Errorf("cannot start the supervisor: %w", err)
	}
	path := filepath.Join(s.Env.RunDir(), "supervisor.lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot start the supervisor: %w", err)
	}
	deadline := time.Now().Add(s.LockWait)
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("cannot lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			f.Close()
			return nil, fmt.Errorf("cannot lock %s: %w", path, ErrOther)
		}
	}
}

// listen makes the control socket: root and the group of the product may use it.
func (s *Supervisor) listen() (net.Listener, error) {
	path := s.Env.SupervisorSocket()
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cannot make the control socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("cannot make the control socket: %w", err)
	}
	if err := fileaccess.Share(path, 0o660); err != nil {
		s.Log.Warn("only root can use the control socket", "err", err)
	}
	return l, nil
}

// start starts and enables services; see [Manager.Start].
func (s *Supervisor) start(names []string) ([]State, error) {
	names, err := resolveAll(names)
	if err != nil {
		return nil, err
	}
	s.order.Lock()
	defer s.order.Unlock()
	if s.isEnding() {
		return nil, errEnding
	}
	if err := s.enable(names, true); err != nil {
		return nil, err
	}
	var errs []error
	for _, n := range names {
		errs = append(errs, s.units[n].start())
	}
	return s.states(), errors.Join(errs...)
}

// errEnding answers a start that came while the supervisor was on its way out; the client
// starts a new one.
var errEnding = errors.New("the supervisor is ending")

func (s *Supervisor) isEnding() bool {
	select {
	case <-s.ended:
		return true
	default:
		return false
	}
}

// stop stops and disables services; see [Manager.Stop]. No names ends the supervisor too.
func (s *Supervisor) stop(names []string) ([]State, error) {
	all := len(names) == 0
	names, err := resolveAll(names)
	if err != nil {
		return nil, err
	}
	s.order.Lock()
	defer s.order.Unlock()
	if err := s.enable(names, false); err != nil {
		return nil, err
	}
	for _, n := range slices.Backward(names) {
		s.units[n].stop()
	}
	if all {
		err = s.endContainers()
		s.endNow()
	}
	return s.states(), err
}

// restart stops and starts those of names that are enabled.
func (s *Supervisor) restart(names []string) ([]State, error) {
	names, err := resolveAll(names)
	if err != nil {
		return nil, err
	}
	s.order.Lock()
	defer s.order.Unlock()
	enabled := Enabled(s.Env)
	names = slices.DeleteFunc(names, func(n string) bool { return !slices.Contains(enabled, n) })
	for _, n := range slices.Backward(names) {
		s.units[n].stop()
	}
	var errs []error
	for _, n := range names {
		errs = append(errs, s.units[n].start())
	}
	return s.states(), errors.Join(errs...)
}

// stopAll ends everything without disabling it: the machine goes down, not the node.
func (s *Supervisor) stopAll() {
	s.order.Lock()
	defer s.order.Unlock()
	for _, n := range slices.Backward(Names()) {
		s.units[n].stop()
	}
	if err := s.endContainers(); err != nil {
		s.Log.Error("some containers were left", "err", err)
	}
}

func (s *Supervisor) states() []State {
	enabled := Enabled(s.Env)
	var out []State
	for _, n := range Names() {
		st := s.units[n].current()
		st.Enabled = slices.Contains(enabled, n)
		out = append(out, st)
	}
	return out
}

// enabledFile lists the services that start at boot, one name per line; it is absent on a
// stopped node.
func enabledFile(env snapenv.Env) string { return filepath.Join(env.Common, "var/supervisor.enabled") }

// Enabled lists the services that our supervisor starts at boot, in start order. It is empty
// on a stopped node and on one that was never started.
func Enabled(env snapenv.Env) []string {
	data, err := os.ReadFile(enabledFile(env))
	if err != nil {
		return nil
	}
	have := strings.Fields(string(data))
	return slices.DeleteFunc(Names(), func(n string) bool { return !slices.Contains(have, n) })
}

func (s *Supervisor) enable(names []string, on bool) error {
	have := Enabled(s.Env)
	want := slices.DeleteFunc(Names(), func(n string) bool {
		if slices.Contains(names, n) {
			return !on
		}
		return !slices.Contains(have, n)
	})
	path := enabledFile(s.Env)
	if len(want) == 0 {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("cannot disable the services: %w", err)
		}
		return nil
	}
	if slices.Equal(have, want) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("cannot enable the services: %w", err)
	}
	return atomicfile.Write(path, []byte(strings.Join(want, "\n")+"\n"), 0o644, nil)
}

// Supervise runs the supervisor in this process until ctx ends or a client stops everything.
// With boot it starts what was running when the machine went down, and returns at once where
// that is nothing.
func Supervise(ctx context.Context, env snapenv.Env, log *slog.Logger, environ []string, boot bool, ready io.WriteCloser) error {
	var start []string
	if boot {
		if start = Enabled(env); len(start) == 0 {
			log.Info("the node was stopped: nothing to supervise")
			return nil
		}
	}
	// The services set scores of their own; without their supervisor none would be restarted.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0); err != nil {
		log.Info("the kernel may end the supervisor when memory is short, before it ends pods", "err", err)
	}
	s := &Supervisor{Env: env, Log: log, Environ: ServiceEnviron(env, environ)}
	return s.Run(ctx, start, func() {
		if ready != nil {
			_, _ = io.WriteString(ready, readyWord)
			_ = ready.Close()
		}
	})
}

// readyWord is what a spawned supervisor writes when its socket answers.
const readyWord = "ready\n"

// ServiceEnviron is the environment in which services run: the variables of the snap and
// those of base that concern a daemon. What a person's session holds (KUBECONFIG, SUDO_USER,
// XDG_RUNTIME_DIR …) must not change how a service behaves.
func ServiceEnviron(env snapenv.Env, base []string) []string {
	keep := func(key string) bool {
		switch key {
		case "LANG", "LC_ALL", "TZ", "GODEBUG", "GOTRACEBACK", "GOMAXPROCS", "GOMEMLIMIT", "GOGC",
			"SSL_CERT_FILE", "SSL_CERT_DIR":
			return true
		}
		lower := strings.ToLower(key)
		return strings.HasSuffix(lower, "_proxy") || strings.HasPrefix(key, "MICROK8S_")
	}
	out := []string{"HOME=/root"}
	path := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, kv := range base {
		key, value, _ := strings.Cut(kv, "=")
		switch {
		case key == "PATH" && value != "":
			path = value
		case keep(key):
			out = append(out, kv)
		}
	}
	own := filepath.Join(env.Snap, "bin")
	if !slices.Contains(strings.Split(path, ":"), own) {
		path = own + ":" + path
	}
	return env.Environ(append(out, "PATH="+path))
}

// waitText says how a process ended.
func waitText(ws syscall.WaitStatus) string {
	switch {
	case ws.Signaled():
		return "killed by " + unix.SignalName(ws.Signal())
	default:
		return "exit status " + strconv.Itoa(ws.ExitStatus())
	}
}
