package service

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"microk8s/internal/snapenv"
)

// The test binary is also the program under test: copied to $SNAP/bin/microk8s it runs a real
// supervisor (`supervise`) and real services (`daemon NAME`), which are shell scripts that a
// test has put into $SNAP/svc.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Getenv("SNAP") != "" {
		switch os.Args[1] {
		case "supervise":
			os.Exit(helperSupervise())
		case "daemon":
			if err := TieToSupervisor(os.Getenv); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			script := filepath.Join(os.Getenv("SNAP"), "svc", os.Args[2])
			err := syscall.Exec("/bin/sh", []string{"sh", script}, os.Environ())
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		case "detach": // a service that runs what stops it
			ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
			defer stop()
			env := snapenv.FromEnviron(os.Getenv)
			err := detach(ctx, env, "the token\n", []string{"/bin/sh", filepath.Join(env.Snap, "detached")})
			fmt.Println(err)
			os.Exit(0)
		}
	}
	os.Exit(m.Run())
}

func helperSupervise() int {
	env := snapenv.FromEnviron(os.Getenv)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	var start []string
	var ready *os.File
	for _, a := range os.Args[2:] {
		switch a {
		case "--ready-fd":
			syscall.CloseOnExec(3)
			ready = os.NewFile(3, "ready")
		case "--boot":
			start = Enabled(env)
		}
	}
	s := &Supervisor{
		Env: env, Log: log, Environ: ServiceEnviron(env, os.Environ()),
		MinBackoff: 10 * time.Millisecond, MaxBackoff: 50 * time.Millisecond,
		StopTimeout: 500 * time.Millisecond, LockWait: time.Second,
	}
	if _, err := os.Stat(env.Common + "/long-backoff"); err == nil {
		s.MinBackoff, s.MaxBackoff = time.Hour, time.Hour
	}
	err := s.Run(ctx, start, func() {
		if ready != nil {
			_, _ = ready.WriteString(readyWord)
			ready.Close()
		}
	})
	if errors.Is(err, ErrOther) {
		return 3
	}
	if err != nil {
		log.Error("failed", "err", err)
		return 1
	}
	return 0
}

// sleeper is a service that runs until it is told to end, and says so in order.log.
const sleeper = `trap 'echo $(basename $0) >> $SNAP_COMMON/order.log; exit 0' TERM
echo "$0 started with $SNAP_DATA"
while :; do sleep 0.05; done`

type harness struct {
	*testing.T
	env    snapenv.Env
	client *Client
}

// newHarness makes an installation whose services are sleepers, except for scripts.
func newHarness(t *testing.T, scripts map[string]string) *harness {
	t.Helper()
	// Not t.TempDir: the path of a unix socket has at most 107 bytes.
	root, err := os.MkdirTemp("", "svc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	h := &harness{T: t, env: snapenv.Under(root)}
	for _, dir := range []string{h.env.Snap + "/bin", h.env.Snap + "/svc", h.env.Data, h.env.Common} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, h.env.Bin("microk8s")); err != nil {
		t.Fatal(err)
	}
	for _, n := range Names() {
		text, ok := scripts[n]
		if !ok {
			text = sleeper
		}
		if err := os.WriteFile(filepath.Join(h.env.Snap, "svc", n), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	h.client = NewClient(h.env)
	t.Cleanup(func() {
		if err := h.client.Stop(context.Background()); err != nil {
			t.Errorf("stop at the end: %v", err)
		}
		// The supervisor answers a stop just before it ends itself.
		if !await(context.Background(), 5*time.Second, func() bool { return len(h.left()) == 0 }) {
			t.Errorf("processes left: %v", h.left())
		}
		if t.Failed() {
			logs, _ := filepath.Glob(h.env.LogDir() + "/*.log")
			for _, l := range logs {
				data, _ := os.ReadFile(l)
				t.Logf("%s:\n%s", filepath.Base(l), data)
			}
		}
	})
	return h
}

// left lists processes that run something of this installation.
func (h *harness) left() []string {
	var out []string
	for pid, st := range processes() {
		environ, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		if st.state != 'Z' && pid != os.Getpid() && strings.Contains(string(environ), "SNAP_COMMON="+h.env.Common+"\x00") {
			cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			out = append(out, fmt.Sprintf("%d %q", pid, cmdline))
		}
	}
	return out
}

func (h *harness) start(names ...string) {
	h.Helper()
	if err := h.client.Start(context.Background(), names...); err != nil {
		h.Fatal(err)
	}
}

func (h *harness) state(name string) State {
	h.Helper()
	states, err := h.client.Status(context.Background())
	if err != nil {
		h.Fatal(err)
	}
	for _, s := range states {
		if s.Name == name {
			return s
		}
	}
	h.Fatalf("no state of %s in %+v", name, states)
	return State{}
}

// eventually waits for a condition; the limit is only there to end a test that fails.
func (h *harness) eventually(what string, cond func() bool) {
	h.Helper()
	if !await(h.Context(), 20*time.Second, cond) {
		h.Fatalf("never: %s", what)
	}
}

func (h *harness) readFile(path string) string {
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		h.Fatal(err)
	}
	return string(data)
}

// supervisor returns the pid of the running supervisor.
func (h *harness) supervisor() int {
	h.Helper()
	st, err := readStat(h.state(Containerd).PID)
	if err != nil {
		h.Fatal(err)
	}
	return st.ppid
}

func alive(pid int) bool {
	st, err := readStat(pid)
	return err == nil && st.state != 'Z'
}

func TestStartAndStop(t *testing.T) {
	h := newHarness(t, nil)
	if s := h.state(Kubelite); s.Phase != Stopped || s.Enabled {
		t.Fatalf("before the start: %+v", s)
	}
	h.start()
	for _, n := range Names() {
		s := h.state(n)
		if s.Phase != Running || !s.Enabled || s.PID == 0 || s.Since.IsZero() {
			t.Errorf("state of %s: %+v", n, s)
		}
		if sid, err := unix.Getsid(s.PID); err != nil || sid != s.PID {
			t.Errorf("%s is in session %d (%v), want its own", n, sid, err)
		}
		h.eventually("log of "+n, func() bool {
			return strings.Contains(h.readFile(h.env.ServiceLog(n)), "started with "+h.env.Data)
		})
	}
	if sup := h.supervisor(); func() int { sid, _ := unix.Getsid(sup); return sid }() != sup {
		t.Error("the supervisor is tied to the session of the test")
	}
	before := h.state(Kubelite).PID
	h.start()
	if h.state(Kubelite).PID != before {
		t.Error("starting a running service restarted it")
	}
	if fi, err := os.Stat(h.env.SupervisorSocket()); err != nil || fi.Mode().Perm() != 0o660 {
		t.Errorf("control socket: %v, %v, want mode 0660", fi.Mode(), err)
	}
	if err := h.client.Stop(context.Background()); err != nil {
		t.Fatal(err)
	}
	want := "apiserver-proxy\nkubelite\ncluster-agent\nk8s-dqlite\ncontainerd\n"
	if got := h.readFile(h.env.Common + "/order.log"); got != want {
		t.Errorf("stopped in the order\n%swant\n%s", got, want)
	}
	h.eventually("everything has ended", func() bool { return len(h.left()) == 0 })
	if e := Enabled(h.env); len(e) != 0 {
		t.Errorf("enabled after the stop: %v", e)
	}
	if err := h.client.Stop(context.Background()); err != nil {
		t.Errorf("second stop: %v", err)
	}
	h.start(Kubelite) // right behind a stop
	if s := h.state(Kubelite); s.Phase != Running {
		t.Errorf("started again: %+v", s)
	}
}

func TestOneService(t *testing.T) {
	h := newHarness(t, nil)
	h.start()
	agent := h.state(ClusterAgent).PID
	if err := h.client.Stop(context.Background(), "kubelet"); err != nil {
		t.Fatal(err)
	}
	if s := h.state(Kubelite); s.Phase != Stopped || s.Enabled {
		t.Errorf("stopped through the name of a part: %+v", s)
	}
	if err := h.client.Restart(context.Background()); err != nil {
		t.Fatal(err)
	}
	if s := h.state(Kubelite); s.Phase != Stopped {
		t.Errorf("restart started what is disabled: %+v", s)
	}
	if s := h.state(ClusterAgent); s.Phase != Running || s.PID == agent {
		t.Errorf("not restarted: %+v, was pid %d", s, agent)
	}
	err := h.client.Start(context.Background(), "etcd")
	if !errors.Is(err, ErrUnknown) {
		t.Errorf("start of etcd: %v", err)
	}
}

func TestRestartsAfterFailure(t *testing.T) {
	h := newHarness(t, map[string]string{
		Kubelite:  `echo no luck; exit 7`,
		Proxy:     `echo nothing to do; exit 80`,
		Datastore: `if [ -e $SNAP_COMMON/second ]; then exec sleep 1000; fi; touch $SNAP_COMMON/second; kill -KILL $$`,
	})
	h.start()
	h.eventually("three restarts", func() bool { return h.state(Kubelite).Restarts >= 3 })
	if s := h.state(Kubelite); s.LastExit != "exit status 7" {
		t.Errorf("last exit: %+v", s)
	}
	h.eventually("idle", func() bool { return h.state(Proxy).Phase == Idle })
	if s := h.state(Proxy); s.Restarts != 0 || s.LastExit != "exit status 80" {
		t.Errorf("a service with nothing to do: %+v", s)
	}
	h.eventually("the second try", func() bool { s := h.state(Datastore); return s.Restarts == 1 && s.Phase == Running })
	if s := h.state(Datastore); s.LastExit != "killed by SIGKILL" {
		t.Errorf("last exit: %+v", s)
	}
	if got := LastLine(h.env.ServiceLog(Kubelite)); got != "no luck" {
		t.Errorf("last line: %q", got)
	}
	if s := h.state(Kubelite); s.LastWords != "no luck" {
		t.Errorf("last words: %+v", s)
	}
}

// TestEndedByOthers has services that end well although nobody asked the supervisor for it.
func TestEndedByOthers(t *testing.T) {
	h := newHarness(t, map[string]string{Containerd: `exit 0`})
	h.start()
	h.eventually("restarts", func() bool { return h.state(Containerd).Restarts >= 2 })
	h.eventually("traps are set", func() bool { return strings.Contains(h.readFile(h.env.ServiceLog(Kubelite)), "started with") })
	old := h.state(Kubelite).PID
	if err := unix.Kill(old, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	h.eventually("another process", func() bool { s := h.state(Kubelite); return s.Phase == Running && s.PID != old })
}

// TestStartDoesNotWait mends a service that waits for its next try and asks for it.
func TestStartDoesNotWait(t *testing.T) {
	h := newHarness(t, map[string]string{Kubelite: `[ -e $SNAP_COMMON/mended ] || exit 1; exec sleep 1000`})
	if err := os.WriteFile(h.env.Common+"/long-backoff", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	h.start()
	h.eventually("waits for its next try", func() bool { return h.state(Kubelite).Phase == Backoff })
	if err := os.WriteFile(h.env.Common+"/mended", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	h.start()
	if s := h.state(Kubelite); s.Phase != Running || s.Restarts != 0 {
		t.Errorf("after start: %+v", s)
	}
}

func TestStubbornServiceIsKilled(t *testing.T) {
	h := newHarness(t, map[string]string{Kubelite: `trap '' TERM; echo ready; while :; do sleep 0.05; done`})
	h.start()
	h.eventually("it ignores SIGTERM", func() bool { return LastLine(h.env.ServiceLog(Kubelite)) == "ready" })
	if err := h.client.Stop(context.Background(), Kubelite); err != nil {
		t.Fatal(err)
	}
	if s := h.state(Kubelite); s.Phase != Stopped || s.LastExit != "killed by SIGKILL" {
		t.Errorf("state: %+v", s)
	}
}

// TestFrozenServiceEndsByItself: a process that was stopped by a signal is asked to end as others are, not killed.
func TestFrozenServiceEndsByItself(t *testing.T) {
	h := newHarness(t, map[string]string{Kubelite: `trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done`})
	h.start()
	h.eventually("it takes SIGTERM", func() bool { return LastLine(h.env.ServiceLog(Kubelite)) == "ready" })
	if err := unix.Kill(-h.state(Kubelite).PID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := h.client.Stop(context.Background(), Kubelite); err != nil {
		t.Fatal(err)
	}
	if s := h.state(Kubelite); s.Phase != Stopped || s.LastExit == "killed by SIGKILL" {
		t.Errorf("state: %+v", s)
	}
}

// shim leaves a process behind that has left the session, as containerd's shims do.
const shim = `if [ ! -e $SNAP_COMMON/shim ]; then
	setsid sh -c 'echo $$ > $SNAP_COMMON/shim.new; mv $SNAP_COMMON/shim.new $SNAP_COMMON/shim; exec sleep 1000' &
fi
trap 'exit 0' TERM
while :; do sleep 0.05; done`

func TestContainersSurviveContainerdOnly(t *testing.T) {
	h := newHarness(t, map[string]string{Containerd: shim})
	h.start()
	h.eventually("the shim", func() bool { return h.readFile(h.env.Common+"/shim") != "" })
	pid, err := strconv.Atoi(strings.TrimSpace(h.readFile(h.env.Common + "/shim")))
	if err != nil {
		t.Fatal(err)
	}
	if err := h.client.Restart(context.Background(), Containerd); err != nil {
		t.Fatal(err)
	}
	if !alive(pid) {
		t.Fatal("a restart of containerd ended a container")
	}
	if st, err := readStat(pid); err != nil || st.ppid != h.supervisor() {
		t.Errorf("the orphan's parent is %d (%v), want the supervisor %d", st.ppid, err, h.supervisor())
	}
	if err := h.client.Stop(context.Background()); err != nil {
		t.Fatal(err)
	}
	if alive(pid) {
		t.Error("a container survived the stop of everything")
	}
}

// A join that the agent begins stops the agent, and everything else, and goes on.
func TestDetached(t *testing.T) {
	h := newHarness(t, map[string]string{ClusterAgent: `exec $SNAP/bin/microk8s detach`})
	script := `read line; sleep 1000 & echo "$! $line supervisor:$MICROK8S_SUPERVISOR" > $SNAP_COMMON/new
mv $SNAP_COMMON/new $SNAP_COMMON/begun; wait; echo refused; exit 3`
	if err := os.WriteFile(h.env.Snap+"/detached", []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	h.start()
	h.eventually("the command", func() bool { return h.readFile(h.env.Common+"/begun") != "" })
	text := h.readFile(h.env.Common + "/begun")
	child, rest, _ := strings.Cut(strings.TrimSpace(text), " ")
	pid, err := strconv.Atoi(child)
	if err != nil || rest != "the token supervisor:" {
		t.Fatalf("the command read and has %q (%v)", text, err)
	}
	if err := h.client.Stop(context.Background()); err != nil {
		t.Fatal(err)
	}
	if !alive(pid) {
		t.Error("the command ended with the service that began it")
	}
	_ = unix.Kill(pid, unix.SIGTERM)
	h.eventually("the command has ended", func() bool { return spared(h.env) == 0 })

	// The caller that lives until the end learns how it ended.
	err = detach(t.Context(), h.env, "", []string{"/bin/sh", "-c", "echo no such token; exit 3"})
	if err == nil || err.Error() != "exit status 3: no such token" {
		t.Errorf("a command that fails: %v", err)
	}
}

func TestKilledSupervisor(t *testing.T) {
	h := newHarness(t, nil)
	h.start()
	h.eventually("traps are set", func() bool { return strings.Contains(h.readFile(h.env.ServiceLog(Kubelite)), "started with") })
	old := h.state(Kubelite).PID
	sup := h.supervisor()
	if err := unix.Kill(sup, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	h.eventually("the supervisor is gone", func() bool { return !alive(sup) })
	h.eventually("its services have ended without it", func() bool { return len(h.left()) == 0 })
	h.start()
	s := h.state(Kubelite)
	if s.Phase != Running || s.PID == old {
		t.Errorf("after the crash: %+v, pid before %d", s, old)
	}
	if alive(old) {
		t.Errorf("process %d of the killed supervisor still runs", old)
	}
}

// TestOrphanIsRecognised kills a supervisor whose service does not hear its last words.
func TestOrphanIsRecognised(t *testing.T) {
	h := newHarness(t, map[string]string{Kubelite: `trap '' TERM; echo ready; while :; do sleep 0.05; done`})
	h.start()
	h.eventually("it ignores SIGTERM", func() bool { return LastLine(h.env.ServiceLog(Kubelite)) == "ready" })
	old, sup := h.state(Kubelite).PID, h.supervisor()
	if err := unix.Kill(sup, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	h.eventually("the supervisor is gone", func() bool { return !alive(sup) })
	if !alive(old) {
		t.Fatal("the service did not outlive its supervisor: the test shows nothing")
	}
	if got := Alive(h.env); !slices.Contains(got, Kubelite) {
		t.Errorf("services alive without their supervisor: %v", got)
	}
	if err := h.client.Stop(context.Background()); err != nil {
		t.Fatal(err)
	}
	if alive(old) {
		t.Error("stop left a service of a killed supervisor")
	}
}

func TestTerminatedSupervisorKeepsServicesEnabled(t *testing.T) {
	h := newHarness(t, nil)
	h.start(Containerd, Kubelite)
	sup := h.supervisor()
	if err := unix.Kill(sup, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	h.eventually("everything has ended", func() bool { return len(h.left()) == 0 })
	if got := Enabled(h.env); !slices.Equal(got, []string{Containerd, Kubelite}) {
		t.Errorf("enabled: %v", got)
	}
	boot := exec.Command(h.env.Bin("microk8s"), "supervise", "--boot")
	boot.Env = h.env.Environ(os.Environ())
	if err := boot.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = boot.Wait() }()
	defer func() { _ = h.client.Stop(context.Background()) }()
	h.eventually("services of the last boot", func() bool {
		return h.state(Kubelite).Phase == Running && h.state(ClusterAgent).Phase == Stopped
	})
}

func TestSecondSupervisorGivesUp(t *testing.T) {
	h := newHarness(t, nil)
	h.start()
	second := exec.Command(h.env.Bin("microk8s"), "supervise")
	second.Env = h.env.Environ(os.Environ())
	err := second.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("second supervisor: %v", err)
	}
	if s := h.state(Kubelite); s.Phase != Running {
		t.Errorf("the first one was disturbed: %+v", s)
	}
}

func TestMissingProgram(t *testing.T) {
	h := newHarness(t, nil)
	if err := os.Remove(h.env.Bin("microk8s")); err != nil {
		t.Fatal(err)
	}
	if err := h.client.Start(context.Background()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("start without the program: %v", err)
	}
}
