package client

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/server"
	"microk8s/internal/token"
)

const (
	chosen       = "0123456789abcdef0123456789abcdeX" // a token that is not generated, and could be guessed
	randomChosen = "7c1f0e5b93a84d26b0e9f3127ad5c846" // what openssl rand -hex 16 prints
)

func TestParse(t *testing.T) {
	made := token.New().Reveal()
	sum := strings.Repeat("ab", 32)
	for _, tc := range []struct {
		in, host, check, err string
		port                 int
	}{
		{in: "10.0.0.1:25000/" + made, host: "10.0.0.1", port: 25000},
		{in: " 10.0.0.1:25000/" + made + "/0123456789AB\n", host: "10.0.0.1", port: 25000, check: "0123456789ab"},
		{in: "[fd00::1]:25001/" + chosen + "/" + sum, host: "fd00::1", port: 25001, check: sum},
		{in: "[fe80::1%eth0]:25000/" + chosen, host: "fe80::1%eth0", port: 25000},
		{in: "n1.example.com:1/" + chosen, host: "n1.example.com", port: 1},
		{in: "", err: "Expected format"},
		{in: "10.0.0.1:25000", err: "Expected format"},
		{in: "10.0.0.1/" + chosen, err: "Expected format"},
		{in: "fd00::1:25000/" + chosen, err: "Expected format"},
		{in: "10.0.0.1:25000/" + chosen + "/" + sum + "/x", err: "Expected format"},
		{in: "10.0.0.1:x/" + chosen, err: "Master PORT not a number"},
		{in: "10.0.0.1:0/" + chosen, err: "Master PORT not in range 1:65535"},
		{in: "10.0.0.1:65536/" + chosen, err: "Master PORT not in range 1:65535"},
		{in: "10.0.0.300:25000/" + chosen, err: "Invalid master IP"},
		{in: "a b:25000/" + chosen, err: "Invalid master IP"},
		{in: ":25000/" + chosen, err: "Invalid master IP"},
		{in: "10.0.0.1:25000/short", err: "Cluster token size should be at least 32 bytes"},
		{in: "10.0.0.1:25000/" + chosen + "|1", err: "character"},
		{in: "10.0.0.1:25000/" + chosen + "/0123456789a", err: "Fingerprint should be at least 12 bytes"},
		{in: "10.0.0.1:25000/" + chosen + "/0123456789zz", err: "not hex digits"},
		{in: "10.0.0.1:25000/" + chosen + "/" + sum + "0", err: "not hex digits"},
	} {
		got, err := Parse(tc.in)
		if tc.err != "" {
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%q: %v, want %q", tc.in, err, tc.err)
			}
			continue
		}
		if err != nil || got.Host != tc.host || got.Port != tc.port || got.Check != tc.check {
			t.Errorf("%q: %+v, %v", tc.in, got, err)
		}
		if again, err := Parse(got.Reveal()); err != nil || again != got {
			t.Errorf("%q is revealed as %q, which is another: %v", tc.in, got.Reveal(), err)
		}
	}
}

func TestTargetsDoNotShowTokens(t *testing.T) {
	target, err := Parse("10.0.0.1:25000/" + chosen)
	if err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	logger := func(v ...any) { log.WriteString(strings.TrimSpace(strings.Join(texts(v), " "))) }
	logger(target, &target)
	if strings.Contains(log.String(), chosen) {
		t.Errorf("the token is in %q", &log)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("10.0.0.1:25000/" + chosen + "/0123456789ab")
	f.Add("[fd00::1]:25000/" + chosen)
	f.Fuzz(func(t *testing.T, s string) {
		got, err := Parse(s)
		if err != nil {
			return
		}
		if again, err := Parse(got.Reveal()); err != nil || again != got {
			t.Errorf("%q is revealed as %q: %v", s, got.Reveal(), err)
		}
		if strings.Contains(got.String(), got.Token.Reveal()) && !strings.Contains(got.Host, got.Token.Reveal()) {
			t.Errorf("String shows the token: %s", got)
		}
	})
}

// agent is a far side that knows one token, and counts.
type agent struct {
	*httptest.Server
	know  token.Token
	lie   bool // its proofs are wrong
	drop  int  // connections are cut after so many requests; 0 never
	proof bool // it has the proof at all

	mu      sync.Mutex
	conns   int
	served  int
	secrets int // requests that carried a token
}

type connKey struct{}

func startAgent(t *testing.T, know token.Token, change func(*agent)) *agent {
	t.Helper()
	a := &agent{know: know, proof: true}
	if change != nil {
		change(a)
	}
	a.Server = httptest.NewUnstartedServer(http.HandlerFunc(a.serve))
	a.Config.ErrorLog = log.New(io.Discard, "", 0)
	a.Config.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.conns++
		return context.WithValue(ctx, connKey{}, c)
	}
	a.StartTLS()
	t.Cleanup(a.Close)
	return a
}

func (a *agent) serve(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	a.served++
	cut := a.drop > 0 && a.served%a.drop == 0
	a.mu.Unlock()
	if cut {
		r.Context().Value(connKey{}).(*tls.Conn).NetConn().Close()
		return
	}
	data, _ := io.ReadAll(r.Body)
	if r.URL.Path == api.PathProof {
		var q api.ProofRequest
		_ = json.Unmarshal(data, &q)
		id, key := a.know.Derive()
		exporter, err := token.Exporter(r.TLS)
		if !a.proof {
			server.WriteError(w, http.StatusNotFound, "not found")
			return
		}
		if q.ID != id.String() || err != nil {
			w.WriteHeader(http.StatusInternalServerError)
			_ = json.NewEncoder(w).Encode(api.Error{Message: "Invalid token", Code: api.CodeToken})
			return
		}
		proof := token.Proof(key, exporter, id, q.Nonce)
		if a.lie {
			proof[0] ^= 1
		}
		server.WriteJSON(w, http.StatusOK, api.ProofResponse{Proof: proof})
		return
	}
	a.mu.Lock()
	if strings.Contains(string(data), a.know.Reveal()) {
		a.secrets++
	}
	a.mu.Unlock()
	switch r.URL.Path {
	case api.PathConfirm, api.PathRelease:
		server.WriteJSON(w, http.StatusOK, api.Result{Result: "ok"})
	case api.PathJoin:
		server.WriteJSON(w, http.StatusOK, api.JoinResponse{CA: "the CA", HostnameOverride: r.Host})
	default:
		server.WriteError(w, http.StatusBadGateway, "no such luck")
	}
}

func (a *agent) fingerprint() string {
	sum := sha256.Sum256(a.Certificate().Raw)
	return hex.EncodeToString(sum[:])
}

func (a *agent) client(t *testing.T, tok token.Token, check string) (*Client, *[]string) {
	t.Helper()
	s := a.Listener.Addr().String() + "/" + tok.Reveal()
	if check != "" {
		s += "/" + check
	}
	target, err := Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	c := New(target)
	var warnings []string
	c.Warn = func(text string) { warnings = append(warnings, text) }
	t.Cleanup(c.Close)
	return c, &warnings
}

func mustParse(t *testing.T, s string) token.Token {
	t.Helper()
	tok, err := token.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

// TestWhoGetsTheToken is the heart of the client: a server that is not known never sees it.
func TestWhoGetsTheToken(t *testing.T) {
	made, other := token.New(), token.New()
	custom, random := mustParse(t, chosen), mustParse(t, randomChosen)
	for _, tc := range []struct {
		name   string
		know   token.Token // of the server
		use    token.Token // of the client
		server func(*agent)
		check  func(a *agent) string
		skip   bool
		why    string // of the refusal; "" means that the token is sent
		warn   string
	}{
		{name: "a proof", know: made, use: made},
		{name: "a proof, and the fingerprint of another node behind a balancer", know: made, use: made, check: func(*agent) string { return "0123456789ab" }},
		{name: "a server that does not know the token", know: other, use: made, why: "does not know this token"},
		{name: "a wrong proof", know: made, use: made, server: func(a *agent) { a.lie = true }, why: "proof is wrong"},
		{name: "one that passes for upstream's agent", know: made, use: made, server: func(a *agent) { a.proof = false }, check: func(a *agent) string { return a.fingerprint() }, why: "cannot prove that it knows"},
		{name: "a long fingerprint", know: custom, use: custom, check: func(a *agent) string { return a.fingerprint() }},
		{name: "32 digits", know: custom, use: custom, check: func(a *agent) string { return a.fingerprint()[:32] }},
		{name: "12 digits", know: custom, use: custom, check: func(a *agent) string { return a.fingerprint()[:12] }, warn: "only 12 digits"},
		{name: "a wrong fingerprint", know: custom, use: custom, check: func(a *agent) string { return strings.Repeat("0", 64) }, why: "does not have the fingerprint"},
		{name: "a fingerprint with a wrong end", know: custom, use: custom, check: func(a *agent) string { return a.fingerprint()[:62] + "zz" }, why: "parse"},
		{name: "no fingerprint, and a token that could be guessed", know: custom, use: custom, why: "no fingerprint after the token, and the token could be guessed"},
		{name: "a random chosen token without a fingerprint", know: random, use: random},
		{name: "a random chosen token, unknown to the server", know: other, use: random, why: "does not know this token"},
		{name: "a random chosen token, and a wrong proof", know: random, use: random, server: func(a *agent) { a.lie = true }, why: "proof is wrong"},
		{name: "a random chosen token, and a server without proofs", know: random, use: random, server: func(a *agent) { a.proof = false }, why: "append the fingerprint to the token"},
		{name: "a random chosen token with a fingerprint", know: random, use: random, server: func(a *agent) { a.proof = false }, check: func(a *agent) string { return a.fingerprint() }},
		{name: "a random chosen token with a wrong fingerprint", know: random, use: random, check: func(*agent) string { return strings.Repeat("0", 64) }, why: "does not have the fingerprint"},
		{name: "not verified", know: made, use: made, server: func(a *agent) { a.proof = false }, skip: true, warn: "NOT verified"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := startAgent(t, tc.know, tc.server)
			check := ""
			if tc.check != nil {
				check = tc.check(a)
			}
			if tc.why == "parse" {
				if _, err := Parse(a.Listener.Addr().String() + "/" + tc.use.Reveal() + "/" + check); err == nil {
					t.Error("accepted")
				}
				return
			}
			a.know = tc.use // what is counted as the secret
			if tc.know != tc.use {
				a.know = tc.know
			}
			c, warnings := a.client(t, tc.use, check)
			c.SkipVerify = tc.skip
			_, err := c.Join(t.Context(), api.JoinRequest{Hostname: "n2"})
			var verify *VerifyError
			if tc.why != "" {
				if !errors.As(err, &verify) || !strings.Contains(err.Error(), tc.why) {
					t.Errorf("error: %v", err)
				}
				if a.secrets != 0 {
					t.Error("the token was sent")
				}
				return
			}
			if err != nil || a.secrets != 1 {
				t.Errorf("error %v, %d requests with the token", err, a.secrets)
			}
			if (tc.warn == "") != (len(*warnings) == 0) || tc.warn != "" && !strings.Contains((*warnings)[0], tc.warn) {
				t.Errorf("warnings: %q", *warnings)
			}
		})
	}
}

// TestManInTheMiddle has somebody relay everything, with a certificate of his own. He asks the real
// server for the proof, which is for another connection than ours.
func TestManInTheMiddle(t *testing.T) {
	made := token.New()
	real := startAgent(t, made, nil)
	seen := ""
	middle := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		data, _ := io.ReadAll(r.Body)
		seen += string(data)
		resp, err := real.Client().Post(real.URL+r.URL.Path, "application/json", strings.NewReader(string(data)))
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		w.WriteHeader(resp.StatusCode)
		_, _ = io.Copy(w, resp.Body)
	}))
	middle.StartTLS()
	t.Cleanup(middle.Close)
	target, err := Parse(middle.Listener.Addr().String() + "/" + made.Reveal() + "/" + real.fingerprint())
	if err != nil {
		t.Fatal(err)
	}
	_, err = New(target).Join(t.Context(), api.JoinRequest{Hostname: "n2"})
	var verify *VerifyError
	if !errors.As(err, &verify) || !strings.Contains(err.Error(), "proof is wrong") {
		t.Errorf("error: %v", err)
	}
	if seen == "" || strings.Contains(seen, made.Reveal()) || real.secrets != 0 {
		t.Errorf("he saw %q", seen)
	}
}

func TestOneConnection(t *testing.T) {
	made := token.New()
	a := startAgent(t, made, nil)
	c, _ := a.client(t, made, "")
	resp, err := c.Join(t.Context(), api.JoinRequest{Hostname: "n2"})
	if err != nil {
		t.Fatal(err)
	}
	if resp.HostnameOverride != a.Listener.Addr().String() {
		t.Errorf("the Host header is %q", resp.HostnameOverride)
	}
	for range 3 {
		if err := c.Confirm(t.Context(), "n2"); err != nil {
			t.Fatal(err)
		}
	}
	if a.conns != 1 {
		t.Errorf("%d connections", a.conns)
	}
}

// TestBrokenConnections has the server cut a connection: the call is repeated over a new one,
// with a proof, if that can do no harm.
func TestBrokenConnections(t *testing.T) {
	made := token.New()
	a := startAgent(t, made, func(a *agent) { a.drop = 4 }) // proof, release, release, cut
	c, _ := a.client(t, made, "")
	for range 3 {
		if err := c.Release(t.Context(), "n2"); err != nil {
			t.Fatal(err)
		}
	}
	if a.conns != 2 {
		t.Errorf("%d connections", a.conns)
	}
}

func TestFailures(t *testing.T) {
	made := token.New()
	a := startAgent(t, made, nil)
	c, _ := a.client(t, made, "")
	_, err := c.Preflight(t.Context(), api.PreflightRequest{})
	var refused *ServerError
	if !errors.As(err, &refused) || refused.Status != http.StatusBadGateway || refused.Text != "No such luck" {
		t.Errorf("refusal: %v", err)
	}
	a.Close()
	c, _ = a.client(t, made, "")
	var connect *ConnectError
	if err := c.Confirm(t.Context(), "n2"); !errors.As(err, &connect) {
		t.Errorf("nobody listens: %v", err)
	}
}

func TestCanceled(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") // takes connections and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	target, err := Parse(l.Addr().String() + "/" + token.New().Reveal())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	accepted := make(chan struct{})
	go func() {
		if conn, err := l.Accept(); err == nil {
			defer conn.Close()
			close(accepted)
			_, _ = io.Copy(io.Discard, conn)
		}
	}()
	go func() { <-accepted; cancel() }()
	if err := New(target).Confirm(ctx, "n2"); !errors.Is(err, context.Canceled) {
		t.Errorf("error: %v", err)
	}
}

func texts(v []any) []string {
	var out []string
	for x := range slices.Values(v) {
		if s, ok := x.(interface{ String() string }); ok {
			out = append(out, s.String())
		}
	}
	return out
}
