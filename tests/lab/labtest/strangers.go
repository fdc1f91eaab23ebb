package labtest

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
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"microk8s/cluster-agent/api"
)

// askedByStrangers is what is tried on every TCP port.
var askedByStrangers = []string{
	"/", "/healthz", "/livez", "/readyz", "/version", "/metrics", "/metrics/cadvisor", "/configz", "/flagz", "/statusz", "/proxyMode", "/debug/pprof/", "/debug/pprof/heap", "/logs/",
	"/api", "/api/v1/secrets", "/apis", "/openapi/v2", "/pods", "/runningpods/", "/exec/x", "/exec/default/x/c?command=id", "/attach/x", "/portforward/x",
	api.PathHealth, api.PathJoin, api.PathConfigure, "/v3/kv/range", "/v1/metrics",
}

// Listeners are the addresses of the sockets in a table of the kernel that are in a state.
func Listeners(t *testing.T, table, state string) (out []netip.AddrPort) {
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

// Asked tries a TCP port, in the network that dial reaches, without credentials, and returns its line with one for each answer that is no refusal.
func Asked(t *testing.T, dial func(ctx context.Context, network, address string) (net.Conn, error), at netip.AddrPort) []string {
	t.Helper()
	name := at.String()
	if at.Addr().IsLoopback() && (at.Port() < 10240 || at.Port() > 10260) && at.Port() != 19001 && at.Port() != 16443 {
		name = "127.0.0.1:any" // containerd's, for exec
	}
	target := net.JoinHostPort("127.0.0.1", strconv.Itoa(int(at.Port())))
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return dial(ctx, network, target)
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
