package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"microk8s/tests/lab/labtest"
)

// goldenListeners is what a process in the host's network is answered that has no credentials: a user
// of the machine, or a pod with hostNetwork.
const goldenListeners = "testdata/listeners.txt"

// testListeners plays a process in the host's network without credentials: a socket more, or an answer more, is a
// hole until somebody has looked at it.
func (n *node) testListeners(t *testing.T) {
	var got []string
	for _, l := range labtest.Listeners(t, n.run(t, "cat", "/proc/net/tcp", "/proc/net/tcp6"), "0A") {
		got = append(got, labtest.Asked(t, func(ctx context.Context, network, address string) (net.Conn, error) {
			return n.lab.Dial(ctx, n.name, network, address)
		}, l)...)
	}
	for _, l := range labtest.Listeners(t, n.run(t, "cat", "/proc/net/udp", "/proc/net/udp6"), "07") {
		got = append(got, fmt.Sprintf("udp %s", l))
	}
	// Sockets that have no file, and so no mode: everybody in the network namespace may connect.
	for _, m := range regexp.MustCompile(`(?m)^\S+ \S+ \S+ 00010000 \S+ 01 \d+ (@\S+)$`).FindAllStringSubmatch(n.run(t, "cat", "/proc/net/unix"), -1) {
		name := regexp.MustCompile(`\d+-[A-Z0-9]+$`).ReplaceAllString(m[1], "ID")
		got = append(got, fmt.Sprintf("unix %s: %s", name, n.abstract(t, m[1])))
	}
	slices.Sort(got)
	text := strings.Join(slices.Compact(got), "\n") + "\n"
	if *rewrite {
		if err := os.WriteFile(goldenListeners, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(goldenListeners)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), text); diff != "" {
		t.Errorf("what strangers in the host's network are answered is not what is in %s (-want +got):\n%s", goldenListeners, diff)
	}
}

// abstract connects to a socket without a file and reports what comes.
func (n *node) abstract(t *testing.T, name string) string {
	t.Helper()
	conn, err := n.lab.Dial(t.Context(), n.name, "unix", name)
	if err != nil {
		return "refused"
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	_, _ = conn.Write([]byte{1, 0, 0, 0, 0, 0, 0, 0}) // dqlite's protocol
	if _, err := conn.Read(make([]byte, 1)); errors.Is(err, io.EOF) || err != nil && !os.IsTimeout(err) {
		return "closed"
	}
	return "open"
}
