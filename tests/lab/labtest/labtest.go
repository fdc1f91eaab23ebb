// Package labtest is what tests of the lab and of nodes share: a lab of their own that goes
// away with the test, commands that must succeed, waiting, and the logs of a failed test.
package labtest

import (
	"bytes"
	"context"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"microk8s/tests/lab"
	"microk8s/tests/lab/scenario"
)

// NeedRoot skips a test that cannot run without root. On CI that is a failure.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("this test needs root, and CI skips nothing")
	}
	t.Skip("needs root")
}

// Instance is the name of a test's lab: always the same, so that the next run removes what a
// killed one left.
func Instance(t testing.TB) string {
	return fmt.Sprintf("test-%08x", crc32.ChecksumIEEE([]byte(os.Args[0][strings.LastIndexByte(os.Args[0], '/')+1:]+t.Name())))
}

// New returns an empty lab that is removed when the test ends. snap is the product tree of its
// hosts, or "". With KEEP set in the environment, the lab of a failed test stays.
func New(t testing.TB, snap string) *lab.Lab {
	t.Helper()
	NeedRoot(t)
	l, err := lab.New(lab.Config{Instance: Instance(t), Snap: snap})
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.WithoutCancel(t.Context())
	if err := l.Down(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() && os.Getenv("KEEP") != "" {
			t.Logf("kept: lab --instance %s ls", l.Instance())
			return
		}
		if err := l.Down(ctx); err != nil {
			t.Error(err)
		}
	})
	return l
}

// Host is one host of a test.
type Host struct {
	*lab.Lab
	Name string
}

// Node creates and starts a host, without starting the product. If the test fails, its logs are
// kept in build/test-logs/<test>/<host>. An API server on it ends when what it serves from its
// caches is not what is stored, and the test fails.
func Node(t testing.TB, l *lab.Lab, name string, opt lab.Options) Host {
	t.Helper()
	if err := l.Up(t.Context(), name, opt); err != nil {
		t.Fatal(err)
	}
	h := Host{l, name}
	environ := filepath.Join(h.Root(name), "var/snap/microk8s/current/args/kubelite-env")
	err := os.MkdirAll(filepath.Dir(environ), 0o770)
	if err == nil {
		err = os.WriteFile(environ, []byte("KUBE_WATCHCACHE_CONSISTENCY_CHECKER=true\n"), 0o660)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		logs, _ := filepath.Glob(filepath.Join(h.Root(name), "var/snap/microk8s/common/var/log/kubelite*.log"))
		for _, log := range logs {
			if data, err := os.ReadFile(log); err == nil && bytes.Contains(data, []byte("Cache consistency check failed")) {
				t.Errorf("%s: a cache of the API server differs from the datastore", log)
			}
		}
		if t.Failed() {
			h.KeepLogs(t)
		}
	})
	return h
}

// Run runs a command in the host, which must succeed, and gives its standard output.
func (h Host) Run(t testing.TB, args ...string) string {
	t.Helper()
	out, err := h.Output(t.Context(), h.Name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// KeepLogs copies the host's logs, those of every service of the product included, to
// build/test-logs/<test>/<host>.
func (h Host) KeepLogs(t testing.TB) {
	t.Helper()
	root, err := moduleRoot()
	if err != nil {
		t.Log(err)
		return
	}
	dir := filepath.Join(root, "build/test-logs", strings.ReplaceAll(t.Name(), "/", "_"), h.Name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Log(err)
		return
	}
	files := h.Root(h.Name)
	if i, err := h.Info(context.WithoutCancel(t.Context()), h.Name); err == nil && i.PID != 0 {
		files = fmt.Sprintf("/proc/%d/root", i.PID) // with what is mounted in it
	}
	logs := []string{h.LogFile(h.Name)}
	for _, pattern := range []string{"var/snap/microk8s/common/var/log/*", "var/log/microk8s*"} {
		more, _ := filepath.Glob(filepath.Join(files, pattern))
		logs = append(logs, more...)
	}
	for _, log := range logs {
		data, err := os.ReadFile(log)
		if err != nil {
			continue // a directory, or gone
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(log)), data, 0o644); err != nil {
			t.Log(err)
		}
	}
	t.Logf("logs of %s are in %s", h.Name, dir)
}

func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
	}
	return "", fmt.Errorf("cannot find the module's root to keep logs in")
}

// Eventually calls f until it succeeds. The limit is only reached by what is broken, so it may
// be generous; the test fails with the last error then.
func Eventually(t testing.TB, limit time.Duration, f func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("not within %s: %v", limit, err)
		case <-tick.C:
		}
	}
}

// Play plays a scenario (package scenario) whose steps must succeed; t's log has the seed and what was done when.
func Play(t testing.TB, l *lab.Lab, text string) {
	t.Helper()
	s, err := scenario.Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	seed, _ := strconv.ParseUint(os.Getenv("MICROK8S_TEST_SEED"), 10, 64) // 0 where there is none
	var out bytes.Buffer
	err = scenario.Play(t.Context(), l, s, seed, &out)
	t.Log("\n" + out.String())
	if err != nil {
		t.Fatal(err)
	}
}

// Resolver runs a name server on a host of the lab that knows one name only, and gives its
// address. program is the CoreDNS that the product ships.
func Resolver(t testing.TB, l *lab.Lab, host, program, name, address string) string {
	t.Helper()
	ip, err := l.IP(host)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(l.Root(host), "coredns"), data, 0o755); err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf(".:53 {\n  hosts {\n    %s %s\n  }\n  refuse\n}\n", address, name)
	if err := os.WriteFile(filepath.Join(l.Root(host), "Corefile"), []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd, err := l.Spawn(t.Context(), host, lab.Command{Args: []string{"/coredns", "-conf", "/Corefile"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return ip
}
