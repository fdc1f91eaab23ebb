package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"microk8s/internal/pki"
	"microk8s/internal/pki/pkitest"
)

// lockedBuffer is a log that a test reads while the server writes.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// site is a server on a loopback port, with the authority that signs its certificates.
type site struct {
	*Server
	maker     pki.Maker
	ca        *x509.Certificate
	issue     func(name string)
	crt, key  string
	url       string
	log       *lockedBuffer
	pool      *x509.CertPool
	stop      func() error
	transport *http.Transport
}

func start(t *testing.T, change func(*Options), routes func(*Server)) *site {
	t.Helper()
	dir := t.TempDir()
	s := &site{maker: pkitest.Maker(nil), crt: filepath.Join(dir, "server.crt"), key: filepath.Join(dir, "server.key"), log: &lockedBuffer{}, pool: x509.NewCertPool()}
	caKey, err := s.maker.Key(2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := s.maker.Issue(pki.Request{Subject: pkix.Name{CommonName: "ca"}, Days: 10, CA: true}, caKey.Public(), nil, caKey)
	if err != nil {
		t.Fatal(err)
	}
	if s.ca, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	s.pool.AddCert(s.ca)
	s.issue = func(name string) {
		key, err := s.maker.Key(2048)
		if err != nil {
			t.Fatal(err)
		}
		der, err := s.maker.Issue(pki.Request{Subject: pkix.Name{CommonName: name}, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}, Days: 5, ServerAuth: true}, key.Public(), s.ca, caKey)
		if err != nil {
			t.Fatal(err)
		}
		for path, data := range map[string][]byte{s.key: pki.EncodeKey(key), s.crt: pki.EncodeCert(der)} {
			if err := os.WriteFile(path+".new", data, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(path+".new", path); err != nil {
				t.Fatal(err)
			}
		}
	}
	s.issue("first")
	opts := Options{CertFile: s.crt, KeyFile: s.key, Timeout: 10 * time.Second, Log: slog.New(slog.NewTextHandler(s.log, nil))}
	if change != nil {
		change(&opts)
	}
	if s.Server, err = New(opts); err != nil {
		t.Fatal(err)
	}
	if routes != nil {
		routes(s.Server)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.url = "https://" + l.Addr().String()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	s.stop = sync.OnceValue(func() error { cancel(); return <-ended })
	t.Cleanup(func() {
		if err := s.stop(); err != nil {
			t.Error(err)
		}
	})
	s.transport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.pool}, DisableKeepAlives: true}
	return s
}

func (s *site) do(t *testing.T, method, path string, body io.Reader) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, s.url+path, body)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := s.transport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(data)
}

func TestRoutes(t *testing.T) {
	s := start(t, nil, nil)
	for _, tc := range []struct {
		method, path string
		status       int
		body         string
	}{
		{"GET", "/health", 200, `{"status":"OK"}`},
		{"HEAD", "/health", 404, ""},
		{"POST", "/health", 404, ""},
		{"GET", "/health/", 404, `{"error":"Not found"}`},
		{"GET", "/", 404, `{"error":"Not found"}`},
		{"GET", "/metrics", 404, `{"error":"Not found"}`},
		{"POST", "/cluster/api/v9.0/x", 404, `{"error":"Not found"}`},
	} {
		resp, body := s.do(t, tc.method, tc.path, nil)
		if resp.StatusCode != tc.status || body != tc.body {
			t.Errorf("%s %s: %d %q, want %d %q", tc.method, tc.path, resp.StatusCode, body, tc.status, tc.body)
		}
		if body != "" && resp.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s %s: type %q", tc.method, tc.path, resp.Header.Get("Content-Type"))
		}
	}
}

func TestMetricsOnlyWhenAskedFor(t *testing.T) {
	s := start(t, func(o *Options) { o.Metrics = true }, nil)
	if resp, body := s.do(t, "GET", "/metrics", nil); resp.StatusCode != 200 || !strings.Contains(body, "go_goroutines") {
		t.Errorf("%d %q", resp.StatusCode, body)
	}
}

func TestTLSVersions(t *testing.T) {
	for _, tc := range []struct {
		server, client uint16
		ok             bool
	}{
		{0, tls.VersionTLS11, false}, {0, tls.VersionTLS12, true}, {0, tls.VersionTLS13, true},
		{tls.VersionTLS13, tls.VersionTLS12, false}, {tls.VersionTLS13, tls.VersionTLS13, true},
	} {
		s := start(t, func(o *Options) { o.MinTLS = tc.server }, nil)
		conn, err := tls.Dial("tcp", strings.TrimPrefix(s.url, "https://"), &tls.Config{RootCAs: s.pool, MinVersion: tls.VersionTLS10, MaxVersion: tc.client})
		if (err == nil) != tc.ok {
			t.Errorf("server from %x, client up to %x: %v", tc.server, tc.client, err)
		}
		if err == nil {
			conn.Close()
		}
	}
}

func TestNewCertificateWithoutRestart(t *testing.T) {
	s := start(t, nil, nil)
	name := func() string {
		resp, _ := s.do(t, "GET", "/health", nil)
		return resp.TLS.PeerCertificates[0].Subject.CommonName
	}
	if got := name(); got != "first" {
		t.Fatalf("serves %q", got)
	}
	s.issue("second")
	if got := name(); got != "second" {
		t.Errorf("after a renewal it serves %q", got)
	}
	if err := os.WriteFile(s.key, []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := name(); got != "second" {
		t.Errorf("with a damaged key it serves %q", got)
	}
	if err := os.Remove(s.crt); err != nil {
		t.Fatal(err)
	}
	if got := name(); got != "second" {
		t.Errorf("without the file it serves %q", got)
	}
	if _, err := New(Options{CertFile: s.crt, KeyFile: s.key}); err == nil {
		t.Error("a server starts without a certificate")
	}
}

func TestLimitsAndFailures(t *testing.T) {
	deadline := make(chan bool, 1)
	s := start(t, nil, func(s *Server) {
		s.Handle("POST", "/read", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, ok := r.Context().Deadline()
			deadline <- ok
			n, err := io.Copy(io.Discard, r.Body)
			var tooLarge *http.MaxBytesError
			if errors.As(err, &tooLarge) {
				WriteError(w, http.StatusBadRequest, "too large")
				return
			}
			WriteJSON(w, 200, n)
		}))
		s.Handle("GET", "/broken", http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("secret detail") }))
	})
	if resp, body := s.do(t, "POST", "/read", bytes.NewReader(make([]byte, MaxBody))); resp.StatusCode != 200 {
		t.Errorf("the largest body: %d %s", resp.StatusCode, body)
	}
	if !<-deadline {
		t.Error("a call has no deadline")
	}
	if resp, body := s.do(t, "POST", "/read", bytes.NewReader(make([]byte, MaxBody+1))); resp.StatusCode != 400 || body != `{"error":"Too large"}` {
		t.Errorf("a body too large: %d %s", resp.StatusCode, body)
	}
	<-deadline
	resp, body := s.do(t, "GET", "/broken", nil)
	if resp.StatusCode != 500 || strings.Contains(body, "secret") {
		t.Errorf("a panic: %d %s", resp.StatusCode, body)
	}
	if resp, _ := s.do(t, "GET", "/health", nil); resp.StatusCode != 200 {
		t.Error("the server did not survive a panic")
	}
}

func TestEveryCallIsLogged(t *testing.T) {
	s := start(t, nil, nil)
	s.do(t, "GET", "/health?token=hidden", nil)
	s.do(t, "GET", "/a%0ab", nil)
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	log := s.log.String()
	for _, want := range []string{"method=GET path=/health status=200 bytes=15", `path="/a\nb" status=404`} {
		if !strings.Contains(log, want) {
			t.Errorf("the log lacks %q:\n%s", want, log)
		}
	}
	if strings.Contains(log, "hidden") {
		t.Errorf("the log has the query:\n%s", log)
	}
}

func TestWriteError(t *testing.T) {
	for in, want := range map[string]string{"invalid token": "Invalid token", "": "", "über": "Über", "API down": "API down"} {
		w := &recorder{header: http.Header{}}
		WriteError(w, 500, in)
		var got struct{ Error string }
		if err := json.Unmarshal(w.body.Bytes(), &got); err != nil || got.Error != want || w.status != 500 {
			t.Errorf("%q: %d %q, %v", in, w.status, got.Error, err)
		}
	}
}

type recorder struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(status int)      { r.status = status }
func (r *recorder) Write(p []byte) (int, error) { return r.body.Write(p) }
