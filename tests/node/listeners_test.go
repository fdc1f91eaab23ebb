package node

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"microk8s/cluster-agent/api"
)

// goldenListeners is what a process in the host's network is answered that has no credentials: a user
// of the machine, or a pod with hostNetwork.
const goldenListeners = "testdata/listeners.txt"

// askedByStrangers is what is tried on every TCP port.
var askedByStrangers = []string{
	"/", "/healthz", "/livez", "/readyz", "/version", "/metrics", "/metrics/cadvisor", "/configz", "/flagz", "/statusz", "/proxyMode", "/debug/pprof/", "/debug/pprof/heap", "/logs/",
	"/api", "/api/v1/secrets", "/apis", "/openapi/v2", "/pods", "/runningpods/", "/exec/x", "/exec/default/x/c?command=id", "/attach/x", "/portforward/x",
	api.PathHealth, api.PathJoin, api.PathConfigure, "/v3/kv/range", "/v1/metrics",
}

// testListeners plays a process in the host's network without credentials: a socket more, or an answer more, is a
// hole until somebody has looked at it.
func (n *node) testListeners(t *testing.T) {
	var got []string
	for _, l := range listeners(t, n.run(t, "cat", "/proc/net/tcp", "/proc/net/tcp6"), "0A") {
		got = append(got, n.asked(t, l)...)
	}
	for _, l := range listeners(t, n.run(t, "cat", "/proc/net/udp", "/proc/net/udp6"), "07") {
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

// listeners are the addresses of the sockets in a table of the kernel that are in a state.
func listeners(t *testing.T, table, state string) (out []netip.AddrPort) {
	t.Helper()
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) < 4 || f[3] != state {
			continue
		}
		host, port, _ := strings.Cut(f[1], ":")
		data, err := hex.DecodeString(host)
		number, portErr := strconv.ParseUint(port, 16, 16)
		if err := errors.Join(err, portErr); err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(data); i += 4 { // words in the byte order of the machine
			slices.Reverse(data[i : i+4])
		}
		address, _ := netip.AddrFromSlice(data)
		out = append(out, netip.AddrPortFrom(address, uint16(number)))
	}
	return out
}

// asked tries a TCP port without credentials, and returns its line with one for each answer that is no refusal.
func (n *node) asked(t *testing.T, at netip.AddrPort) []string {
	t.Helper()
	name := at.String()
	if at.Addr().IsLoopback() && (at.Port() < 10240 || at.Port() > 10260) && at.Port() != 19001 {
		name = "127.0.0.1:any" // containerd's, for exec
	}
	target := net.JoinHostPort("127.0.0.1", strconv.Itoa(int(at.Port())))
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return n.lab.Dial(ctx, n.name, network, target)
		},
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // a stranger does not mind
	}}
	defer client.CloseIdleConnections()
	scheme := "https"
	if res, err := client.Get("http://" + target); err == nil {
		res.Body.Close()
		if res.StatusCode != http.StatusBadRequest { // of a server that wants TLS
			scheme = "http"
		}
	}
	out := []string{"tcp " + name + " " + scheme}
	for _, path := range askedByStrangers {
		for _, method := range []string{http.MethodGet, http.MethodPost} {
			req, err := http.NewRequestWithContext(t.Context(), method, scheme+"://"+target+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			res, err := client.Do(req)
			if err != nil {
				continue // it does not even speak to strangers
			}
			_, _ = io.Copy(io.Discard, res.Body)
			res.Body.Close()
			if res.StatusCode < 400 {
				out = append(out, fmt.Sprintf("tcp %s %s %s %s: %d", name, scheme, method, path, res.StatusCode))
			}
		}
	}
	return out
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
