// Package console tries the console in a real browser, headless Chromium, against a node of the lab. What is
// tried is in console/test, in the browser's own language; this package serves it a node.
package console

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"microk8s/tests/lab"
	"microk8s/tests/lab/labtest"
)

// port is where the console serves in the host.
const port = "10443"

// browser is where Debian's package has it.
const browser = "/usr/bin/chromium"

// image is of the pods that are made; build/test-images has it.
const image = "microk8s.test/web:1"

// Run starts microk8s dashboard-proxy on a node that is Ready and has the image of the tests, and goes through the
// console's pages in a browser, in a namespace of its own. build is the folder build/ as the test sees it. With
// long everything is tried; otherwise the short part, which takes half a minute. Pictures of the pages are left in
// build/screenshots.
func Run(t *testing.T, node labtest.Host, build string, long bool) {
	t.Helper()
	if _, err := os.Stat(browser); err != nil {
		t.Fatalf("%v; install it with: make deps", err)
	}
	build, err := filepath.Abs(build)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(build, "console/node_modules/playwright-core")); err != nil {
		t.Fatalf("%v; run: make console", err)
	}
	code := serve(t, node)
	url := relay(t, node)
	viewer := output(t, node, "microk8s", "config", "--user", "console-viewer", "--role", "view")
	out := filepath.Join(build, "screenshots")
	options, err := json.Marshal(map[string]any{
		"url": url, "code": code, "viewer": viewer, "image": image, "node": node.Name, "out": out, "long": long,
		"exec": []string{filepath.Join(build, "bin/lab"), "--instance", node.Instance(), "exec", node.Name, "--"},
	})
	if err != nil {
		t.Fatal(err)
	}
	scripts, err := filepath.Abs(filepath.Join(build, "../console/test"))
	if err != nil {
		t.Fatal(err)
	}
	at := filepath.Join(build, "console/test") // beside node_modules
	if err := os.RemoveAll(at); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(at, os.DirFS(scripts)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "node", filepath.Join(at, "page.mjs"), string(options)) //nolint:gosec // a test's own
	said, err := cmd.CombinedOutput()
	t.Logf("%s", said)
	if err != nil {
		t.Errorf("the console in the browser: %v; pictures of what failed are in %s", err, out)
	}
}

// serve starts the console in the node, until the test ends, and returns the token that it prints.
func serve(t *testing.T, node labtest.Host) string {
	t.Helper()
	out, in := io.Pipe()
	var says bytes.Buffer
	cmd, err := node.Spawn(context.WithoutCancel(t.Context()), node.Name, lab.Command{Args: []string{"microk8s", "dashboard-proxy", "--address", "127.0.0.1", "--port", port}, Stdout: in, Stderr: &says})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		ended <- cmd.Wait()
		in.Close()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		go func() { _, _ = io.Copy(io.Discard, out) }()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("dashboard-proxy ended with %v after it was interrupted\n%s", err, &says)
			}
		case <-time.After(30 * time.Second):
			t.Error("dashboard-proxy goes on after it was interrupted")
			_ = cmd.Process.Kill()
		}
	})
	lines := bufio.NewScanner(out)
	var printed []string
	for len(printed) < 3 && lines.Scan() {
		printed = append(printed, lines.Text())
	}
	if len(printed) != 3 || printed[0] != "Dashboard will be available at https://127.0.0.1:"+port || printed[1] != "Use the following token to login:" {
		t.Fatalf("dashboard-proxy prints %q\n%s", printed, &says)
	}
	if !regexp.MustCompile(`^[A-Z2-7]{26}$`).MatchString(printed[2]) {
		t.Fatalf("the token is %q", printed[2])
	}
	return printed[2]
}

// relay makes the console of the node reachable on this machine's loopback, and returns its address.
func relay(t *testing.T, node labtest.Host) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		all.Wait()
	})
	all.Go(func() {
		for {
			conn, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				continue
			}
			all.Go(func() {
				defer conn.Close()
				far, err := node.Dial(t.Context(), node.Name, "tcp", "127.0.0.1:"+port)
				if err != nil {
					return
				}
				defer far.Close()
				go func() {
					_, _ = io.Copy(far, conn)
					far.Close()
				}()
				_, _ = io.Copy(conn, far)
			})
		}
	})
	return "https://" + l.Addr().String()
}

// output runs a command in the node and returns what it prints on standard output.
func output(t *testing.T, node labtest.Host, args ...string) string {
	t.Helper()
	var out, says bytes.Buffer
	if err := node.Exec(t.Context(), node.Name, lab.Command{Args: args, Stdout: &out, Stderr: &says}); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, &says)
	}
	return out.String()
}
