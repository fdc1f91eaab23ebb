// Package cli tests the command line as a person meets it: the real program, in an
// installation of its own that lies in a temporary folder, driven by the scripts in testdata.
// Each script begins by saying what it shows.
//
// What is on the far side of the program is faked, and every fake says so in its output or in
// its comment: kubectl, helm, ctr and sudo are shell scripts made by the test scripts, and the
// command `fakenode` (fakenode.go) answers for the services and the API server. Real nodes are
// tested in tests/lab.
//
// Run it with -count=1: go's test cache does not see that the program is built from here.
package cli

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

var update = flag.Bool("update", false, "rewrite the expected outputs of the scripts")

// program is the built microk8s.
var program string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if filepath.Base(os.Args[0]) == datastoreProgram {
		return datastoreTool(os.Args[1:])
	}
	dir, err := os.MkdirTemp("", "mk8s")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	_ = os.Chmod(dir, 0o755) // the scripts run it as another user too
	program = filepath.Join(dir, "microk8s")
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", program, "microk8s/cmd/microk8s")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "cannot build microk8s:", err)
		return 1
	}
	return m.Run()
}

func TestScripts(t *testing.T) {
	t.Parallel()
	root, err := os.MkdirTemp("", "cli") // short: unix sockets below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		WorkdirRoot:         root,
		UpdateScripts:       *update,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup:               setup,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"fakenode": fakeNode,
			"asnobody": asNobody,
			"exits":    exits,
		},
	})
}

// setup makes the installation of one script: $SNAP, $SNAP_DATA and $SNAP_COMMON below its
// work folder, and microk8s in the PATH.
func setup(e *testscript.Env) error {
	e.Setenv("SNAP", e.WorkDir+"/snap")
	e.Setenv("SNAP_DATA", e.WorkDir+"/data")
	e.Setenv("SNAP_COMMON", e.WorkDir+"/common")
	e.Setenv("PATH", e.WorkDir+"/snap/bin:"+os.Getenv("PATH"))
	e.Setenv("USER", "ann")
	e.Setenv("MICROK8S_STATUS_BUDGET", "30s") // no test depends on the machine's speed
	for _, dir := range []string{"snap/bin", "data", "common"} {
		if err := os.MkdirAll(filepath.Join(e.WorkDir, dir), 0o755); err != nil {
			return err
		}
	}
	addons, err := filepath.Abs("../../addons")
	if err != nil {
		return err
	}
	if err := os.Symlink(addons, filepath.Join(e.WorkDir, "snap/addons")); err != nil {
		return err
	}
	return os.Symlink(program, filepath.Join(e.WorkDir, "snap/bin/microk8s"))
}

// asNobody runs a program as a user without any rights: asnobody PROGRAM ARG...
// Its exit code must be 0, or with ! anything else; stdout and stderr are what it printed.
func asNobody(ts *testscript.TestScript, neg bool, args []string) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			ts.Fatalf("asnobody needs root")
		}
		ts.Logf("asnobody needs root")
		return
	}
	path, err := exec.LookPath(args[0])
	if args[0] == "microk8s" {
		path, err = program, nil
	}
	ts.Check(err)
	const nobody = 65534
	cmd := exec.Command(path, args[1:]...)
	cmd.Dir = "/"
	for _, key := range []string{"SNAP", "SNAP_DATA", "SNAP_COMMON", "PATH", "USER"} {
		cmd.Env = append(cmd.Env, key+"="+ts.Getenv(key))
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	cmd.Stdout, cmd.Stderr = ts.Stdout(), ts.Stderr()
	if err := cmd.Run(); (err != nil) != neg {
		ts.Fatalf("%v: %v", args, err)
	}
}

// exits checks the exit code of a program: exits CODE PROGRAM ARG...
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM ARG...")
	}
	err := ts.Exec(args[1], args[2:]...)
	code := 0
	if err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			ts.Fatalf("%v: %v", args[1:], err)
		}
		code = exit.ExitCode()
	}
	if fmt.Sprint(code) != args[0] {
		ts.Fatalf("%v: exit code %d, want %s", args[1:], code, args[0])
	}
	if text := ts.ReadFile("stdout") + ts.ReadFile("stderr"); code != 0 && text != "" && talks(args[1:]) && !steps.MatchString(text) {
		ts.Fatalf("%v: nothing of what it prints is a next step that can be pasted:\n%s", args[1:], text)
	}
	if text := ts.ReadFile("stderr"); code != 0 && ourErrors.MatchString(text) && talks(args[1:]) && !steps.MatchString(ourErrors.ReplaceAllString(text, "$1")) {
		ts.Fatalf("%v: the message has no next step that can be pasted:\n%s", args[1:], text)
	}
}

// ourErrors are messages in our own words; those in upstream's are what scripts know (cli.md 0.6).
var ourErrors = regexp.MustCompile(`(?m)^microk8s: (.*)$`)

// talks reports whether what a command prints are messages of ours to a person: not the log of a service,
// the state of an addon, or what another program says (other is a plugin of the scripts).
func talks(args []string) bool {
	if filepath.Base(args[0]) != "microk8s" || len(args) < 2 {
		return false
	}
	return !slices.Contains([]string{"daemon", "hook", "supervise", "ctr", "kubectl", "helm", "helm3", "other"}, args[1]) &&
		!slices.Contains(args, "-a") && !slices.Contains(args, "--addon")
}

// steps is what a person can type next: a command, or a page to read.
var steps = regexp.MustCompile(`microk8s[. ][a-z-]+|\b(sudo|systemctl|sysctl|sh|rm|chmod|ip|snap|openssl) |docs/|--[a-z]|(?i)\bagain\b`)
