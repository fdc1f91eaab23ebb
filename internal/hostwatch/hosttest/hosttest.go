// Package hosttest runs a test as a process in a network namespace of its own. A test that only moves its
// goroutine into one cannot test what starts goroutines: those run on threads of the namespace before.
package hosttest

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

const inside = "MICROK8S_TEST_ALONE"

// Alone reports whether the test runs in a network of its own, with lo up. Where it does not, Alone runs the test
// again as a process that does, fails t if that one fails, and returns false: the test returns then. It needs
// root; without it the test is skipped, and fails where CI is "true".
func Alone(t *testing.T) bool {
	t.Helper()
	if os.Getenv(inside) != "" {
		Run(t, "ip", "link", "set", "lo", "up")
		return true
	}
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+strings.ReplaceAll(t.Name(), "/", "$/^")+"$", "-test.v")
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNET}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return false
}

// Run runs a program and fails the test if it fails.
func Run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}
