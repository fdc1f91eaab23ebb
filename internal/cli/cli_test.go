package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"microk8s/internal/nodeconfig"
	"microk8s/internal/service"
	"microk8s/internal/service/servicetest"
	"microk8s/internal/snapenv"
)

type testApp struct {
	*App
	out, err bytes.Buffer
	services *servicetest.Manager
	execs    []string
	parts    []string // which parts were called
	failPart map[string]error
}

// newApp makes the program with fakes on its far side, in an installation of its own that has
// been set up.
func newApp(t *testing.T) *testApp {
	t.Helper()
	a := &testApp{services: &servicetest.Manager{}, failPart: map[string]error{}}
	part := func(name string) error {
		a.parts = append(a.parts, name)
		return a.failPart[name]
	}
	a.App = &App{
		Env: snapenv.Under(t.TempDir()), Out: &a.out, Err: &a.err, UID: 0, Group: "microk8s",
		Now: func() time.Time { return time.Now() }, Environ: []string{"USER=ann"}, Services: a.services,
		Exec: func(path string, argv, _ []string) error {
			a.execs = append(a.execs, strings.Join(argv, " "))
			return nil
		},
		Parts: Parts{
			Install: func(context.Context, snapenv.Env, *slog.Logger) error { return part("install") },
			Hook: func(_ context.Context, _ snapenv.Env, n string, _ *slog.Logger) error {
				return part("hook " + n)
			},
			RunDaemon: func(_ context.Context, _ snapenv.Env, n string, _ *slog.Logger) error {
				return part("daemon " + n)
			},
			StopContainers: func(context.Context, snapenv.Env) error { return part("stop containers") },
		},
	}
	a.write(t, a.Env.AdminKubeconfig(), "apiVersion: v1\n")
	return a
}

func (a *testApp) write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (a *testApp) run(ctx context.Context, args ...string) int {
	a.out.Reset()
	a.err.Reset()
	return a.Main(ctx, append([]string{"microk8s"}, args...))
}

// walk visits every command of the tree.
func walk(c *cobra.Command, visit func(*cobra.Command)) {
	visit(c)
	for _, sub := range c.Commands() {
		walk(sub, visit)
	}
}

func TestTree(t *testing.T) {
	a := newApp(t)
	table := a.commands()
	for i, c := range table {
		if i > 0 && !c.hidden && !table[i-1].hidden && table[i-1].name >= c.name {
			t.Errorf("%s stands after %s", c.name, table[i-1].name)
		}
	}
	seen := 0
	walk(a.root(), func(cmd *cobra.Command) {
		if cmd.HasParent() && cmd.Name() != "no-help" {
			if cmd.Short == "" {
				t.Errorf("%s has no short help", cmd.CommandPath())
			}
			if cmd.Parent().HasParent() {
				return // the table has those of the first level
			}
			seen++
			i := slices.IndexFunc(table, func(c command) bool { return c.name == cmd.Name() })
			if i < 0 {
				t.Errorf("%s is not in the table", cmd.Name())
			} else if cmd.Hidden != table[i].hidden {
				t.Errorf("%s: hidden is %t in the tree and %t in the table", cmd.Name(), cmd.Hidden, table[i].hidden)
			}
		}
		// A library that is linked in may add flags of its own to every command.
		if cmd.PersistentFlags().HasFlags() {
			t.Errorf("%s has persistent flags:\n%s", cmd.Name(), cmd.PersistentFlags().FlagUsages())
		}
	})
	if seen != len(table) {
		t.Errorf("%d commands in the tree, %d in the table", seen, len(table))
	}
}

// TestHelpAndStrayArguments passes every command --help and, where it takes none, an argument.
func TestHelpAndStrayArguments(t *testing.T) {
	anyArgs := []string{"version", "find-resolv-conf"} // upstream ignores them; files
	for _, c := range newApp(t).commands() {
		t.Run(c.name, func(t *testing.T) {
			a := newApp(t)
			if c.raw {
				t.Logf("%s hands everything on, --help too", c.name)
				return
			}
			for _, help := range [][]string{{c.name, "--help"}, {c.name, "-h"}, {"help", c.name}} {
				if code := a.run(t.Context(), help...); code != ExitOK || !strings.Contains(a.out.String(), "Usage:\n  microk8s "+c.name) || a.err.Len() > 0 {
					t.Errorf("%v: code %d, stdout %q, stderr %q", help, code, a.out.String(), a.err.String())
				}
			}
			if slices.Contains(anyArgs, c.name) {
				return
			}
			code := a.run(t.Context(), c.name, "stray-1", "stray-2")
			if code == ExitOK || a.out.Len() > 0 || !strings.Contains(a.err.String(), "stray-") {
				t.Errorf("stray arguments: code %d, stdout %q, stderr %q", code, a.out.String(), a.err.String())
			}
			if len(a.services.Calls())+len(a.execs)+len(a.parts) > 0 {
				t.Errorf("something was done: %v %v %v", a.services.Calls(), a.execs, a.parts)
			}
			code = a.run(t.Context(), c.name, "--no-such-flag")
			if code == ExitOK || a.out.Len() > 0 || !strings.Contains(a.err.String(), "--no-such-flag") {
				t.Errorf("unknown flag: code %d, stdout %q, stderr %q", code, a.out.String(), a.err.String())
			}
		})
	}
}

func TestHelpPhrases(t *testing.T) {
	a := newApp(t)
	for name, phrase := range map[string]string{
		"reset":         "Return the MicroK8s node to the default initial state",
		"refresh-certs": "Replace the CA certificates with the ca.crt and ca.key",
	} {
		a.run(t.Context(), name, "--help")
		if !strings.Contains(a.out.String(), phrase) {
			t.Errorf("help of %s lacks %q:\n%s", name, phrase, a.out.String())
		}
	}
}

func TestStop(t *testing.T) {
	a := newApp(t)
	if code := a.run(t.Context(), "stop"); code != ExitOK {
		t.Fatalf("code %d: %s", code, a.err.String())
	}
	if want := []string{"stop kubelite", "stop"}; !slices.Equal(a.services.Calls(), want) {
		t.Errorf("calls %q, want %q", a.services.Calls(), want)
	}
	if !slices.Equal(a.parts, []string{"stop containers"}) {
		t.Errorf("parts %q", a.parts)
	}
	if !nodeconfig.ReadState(a.Env).Stopped {
		t.Error("no stopped.lock")
	}
	if a.out.Len() > 0 {
		t.Errorf("stdout: %q", a.out.String())
	}
	if !strings.HasSuffix(a.err.String(), "Start it again with: microk8s start\n") {
		t.Errorf("no next step: %q", a.err.String())
	}
}

func TestStopGoesOnWithoutContainerd(t *testing.T) {
	a := newApp(t)
	a.failPart["stop containers"] = errors.New("containerd does not answer")
	if code := a.run(t.Context(), "stop"); code != ExitOK || !nodeconfig.ReadState(a.Env).Stopped {
		t.Errorf("code %d: %s", code, a.err.String())
	}
	if !strings.Contains(a.err.String(), "containerd does not answer") {
		t.Errorf("not told: %q", a.err.String())
	}
}

func TestStopFails(t *testing.T) {
	a := newApp(t)
	a.services.Answer = servicetest.Failing("stop kubelite", errors.New("no answer"))
	if code := a.run(t.Context(), "stop"); code != ExitError || nodeconfig.ReadState(a.Env).Stopped {
		t.Errorf("code %d, locked %t: %s", code, nodeconfig.ReadState(a.Env).Stopped, a.err.String())
	}
}

// TestStartErrors: one clear line, the next step, exit code 1, and the node stays as it was.
func TestStartErrors(t *testing.T) {
	for _, tc := range []struct {
		name string
		err  error
		want []string
	}{
		{"full disk", &fs.PathError{Op: "write", Path: "/x", Err: syscall.ENOSPC}, []string{"microk8s: cannot set up the node: write /x: no space left on device", "  free some space"}},
		{"read only", &fs.PathError{Op: "open", Path: "/x", Err: syscall.EROFS}, []string{"mount it for writing"}},
		{"permission", &fs.PathError{Op: "open", Path: "/x", Err: syscall.EACCES}, []string{"permission denied", "  run it again as root"}},
		{"other", errors.New("boom"), []string{"microk8s: cannot set up the node: boom"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := newApp(t)
			a.write(t, a.Env.Lock(snapenv.LockStopped), "")
			a.failPart["install"] = fmt.Errorf("%w", tc.err)
			if code := a.run(t.Context(), "start"); code != ExitError {
				t.Errorf("code %d", code)
			}
			for _, w := range tc.want {
				if !strings.Contains(a.err.String(), w) {
					t.Errorf("stderr lacks %q:\n%s", w, a.err.String())
				}
			}
			if len(a.services.Calls()) > 0 || !nodeconfig.ReadState(a.Env).Stopped {
				t.Errorf("the node was started: %v", a.services.Calls())
			}
		})
	}
}

func TestInterrupted(t *testing.T) {
	a := newApp(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	a.failPart["install"] = context.Canceled
	if code := a.run(ctx, "start"); code != exitInterrupted || !strings.HasSuffix(a.err.String(), "microk8s: interrupted\n") {
		t.Errorf("code %d: %s", code, a.err.String())
	}
}

func TestStartRefusesToRunBeforeItsTime(t *testing.T) {
	a := newApp(t)
	a.write(t, a.Env.Cert("ca.crt"), testCA)
	a.Now = func() time.Time { return time.Unix(0, 0) }
	code := a.run(t.Context(), "start")
	if code != ExitError || !strings.Contains(a.err.String(), "microk8s: cannot start: the clock says 1970-01-01T00:00:00Z") {
		t.Errorf("code %d: %s", code, a.err.String())
	}
	if len(a.parts)+len(a.services.Calls()) > 0 {
		t.Errorf("something was done: %v %v", a.parts, a.services.Calls())
	}
}

func TestSudo(t *testing.T) {
	a := newApp(t)
	a.UID = 1000
	bin := t.TempDir()
	a.write(t, filepath.Join(bin, "sudo"), "#!/bin/sh\n")
	if err := os.Chmod(filepath.Join(bin, "sudo"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin)
	for _, args := range [][]string{{"stop"}, {"inspect"}, {"ctr", "images", "ls"}} {
		a.execs = nil
		a.run(t.Context(), args...)
		want := "sudo -E " + a.Env.Bin("microk8s") + " " + strings.Join(args, " ")
		if len(a.execs) == 0 || a.execs[0] != want {
			t.Errorf("%v ran %q, want %q", args, a.execs, want)
		}
	}
	t.Setenv("PATH", t.TempDir())
	a.execs = nil
	if code := a.run(t.Context(), "stop"); code != ExitError || !strings.Contains(a.err.String(), "there is no sudo") || len(a.execs) > 0 {
		t.Errorf("without sudo: code %d, %q", code, a.err.String())
	}
	if code := a.run(t.Context(), "reset"); code != ExitRoot {
		t.Errorf("reset: code %d", code)
	}
}

func TestLogsUnderSnapd(t *testing.T) {
	a := newApp(t)
	a.Env.Snapd = true
	bin := t.TempDir()
	a.write(t, filepath.Join(bin, "journalctl"), "#!/bin/sh\n")
	if err := os.Chmod(filepath.Join(bin, "journalctl"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin)
	if code := a.run(t.Context(), "logs", "-f", "-n", "7", "kubelet", "containerd"); code != ExitOK {
		t.Fatalf("code %d: %s", code, a.err.String())
	}
	want := "journalctl --no-pager -n 7 -f -u snap.microk8s.daemon-kubelite -u snap.microk8s.daemon-containerd"
	if !slices.Equal(a.execs, []string{want}) {
		t.Errorf("ran %q, want %q", a.execs, want)
	}
}

func TestFollow(t *testing.T) {
	a := newApp(t)
	path := a.Env.ServiceLog(service.Kubelite)
	a.write(t, path, "old\n")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	w := &watchedWriter{got: make(chan string, 16)}
	a.Out = w
	done := make(chan int, 1)
	go func() { done <- a.Main(ctx, []string{"microk8s", "logs", "-f", "kubelite"}) }()
	next := func(want string) {
		t.Helper()
		select {
		case got := <-w.got:
			if got != want {
				t.Fatalf("got %q, want %q", got, want)
			}
		case <-ctx.Done():
			t.Fatalf("never: %q", want)
		}
	}
	next("old\n")
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(f, "new")
	f.Close()
	next("new\n")
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	a.write(t, path, "x\n") // shorter: a rotated file
	next("x\n")
	cancel()
	if code := <-done; code != ExitOK {
		t.Errorf("code %d: %s", code, a.err.String())
	}
}

// watchedWriter hands what is written to a test.
type watchedWriter struct{ got chan string }

func (w *watchedWriter) Write(p []byte) (int, error) {
	if len(p) > 0 {
		w.got <- string(p)
	}
	return len(p), nil
}

func TestTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	var long strings.Builder
	for i := range 40000 {
		fmt.Fprintf(&long, "line %d\n", i)
	}
	for _, tc := range []struct {
		text string
		n    int
		want string
	}{
		{"", 3, ""}, {"a\n", 3, "a\n"}, {"a\nb\nc\n", 2, "b\nc\n"}, {"a\nb\nc\n", 3, "a\nb\nc\n"},
		{"a\nb", 1, "b"}, {"\n\n\n", 2, "\n\n"}, {"a\n", 0, ""}, {long.String(), 1, "line 39999\n"}, {long.String(), 40000, long.String()},
	} {
		if err := os.WriteFile(path, []byte(tc.text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, end, err := tail(path, tc.n)
		if err != nil || string(got) != tc.want || end != int64(len(tc.text)) {
			t.Errorf("tail of %.20q, %d lines: %.40q, %d, %v", tc.text, tc.n, got, end, err)
		}
	}
}

func TestProgressOnTerminal(t *testing.T) {
	var b bytes.Buffer
	p := &progress{w: &b, term: true, now: func() time.Time { return time.Unix(0, 0) }}
	_ = p.step("One", func() error { return nil })
	_ = p.step("Two", func() error { return errors.New("no") })
	if want := "… One\r✓ One (0s)\n… Two\r✗ Two (0s)\n"; b.String() != want {
		t.Errorf("got %q, want %q", b.String(), want)
	}
}
