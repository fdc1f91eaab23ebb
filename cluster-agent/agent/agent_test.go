package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"microk8s/internal/certs"
	"microk8s/internal/pki/pkitest"
	"microk8s/internal/snapenv"
)

func TestParse(t *testing.T) {
	for _, tc := range []struct {
		argv string
		says string // "" when it is in order
	}{
		{"--bind 0.0.0.0:25000 --keyfile k --certfile c --timeout 240", ""},
		{"--bind [::]:25000 --keyfile=k --certfile=c --min-tls-version tls13 --enable-metrics", ""},
		{"--keyfile k", "certfile"},
		{"--keyfile k --certfile c --bind 25000", "--bind"},
		{"--keyfile k --certfile c --min-tls-version tls10", "only tls12 and tls13"},
		{"--keyfile k --certfile c --timeout 0", "--timeout"},
		{"--keyfile k --certfile c --nonesuch", "nonesuch"},
		{"--keyfile k --certfile c extra", "extra"},
	} {
		f, err := Parse(strings.Fields(tc.argv), io.Discard)
		switch {
		case tc.says == "" && err != nil:
			t.Errorf("%s: %v", tc.argv, err)
		case tc.says != "" && (err == nil || !strings.Contains(err.Error(), tc.says)):
			t.Errorf("%s: %v, want an error about %s", tc.argv, err, tc.says)
		case tc.says == "" && (f.KeyFile != "k" || f.CertFile != "c" || f.Timeout != 240*time.Second):
			t.Errorf("%s: %+v", tc.argv, f)
		}
	}
	if _, err := Parse([]string{"--help"}, io.Discard); !errors.Is(err, pflag.ErrHelp) {
		t.Errorf("--help: %v", err)
	}
}

type services struct{}

func (services) Restart(context.Context, ...string) error { return nil }

// TestHealth asks the whole agent for its health as a monitor does: with the node's own CA.
func TestHealth(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	if err := os.MkdirAll(env.LocksDir(), 0o755); err != nil {
		t.Fatal(err)
	}
	store := certs.New(env, certs.Options{
		Maker: pkitest.Maker(nil), Hostname: func() (string, error) { return "n", nil }, Addresses: func() ([]net.IP, error) { return nil, nil },
	})
	if _, err := store.Ensure(t.Context()); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0") // find a free port
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	if err := Run(t.Context(), env, Flags{Bind: address, CertFile: env.Cert("server.crt"), KeyFile: env.Cert("server.key"), Timeout: time.Minute}, services{}, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "cannot listen") {
		t.Fatalf("on a port that is taken: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- Run(ctx, env, Flags{Bind: address, CertFile: env.Cert("server.crt"), KeyFile: env.Cert("server.key"), Timeout: time.Minute}, services{}, slog.New(slog.DiscardHandler))
	}()
	ca, err := os.ReadFile(env.Cert("ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}}
	var resp *http.Response
	for tick, limit := time.NewTicker(10*time.Millisecond), time.After(20*time.Second); ; {
		if resp, err = client.Get("https://" + address + "/health"); err == nil {
			break
		}
		select {
		case <-tick.C:
		case <-limit:
			t.Fatal(err)
		}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 || string(body) != `{"status":"OK"}` {
		t.Errorf("%d %q, %v", resp.StatusCode, body, err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("asked to stop, it ends with %v", err)
	}
}
