package cluster

import (
	"bytes"
	"crypto/tls"
	"crypto/x509/pkix"
	"encoding/json"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"microk8s/cluster-agent/api"
	membership "microk8s/internal/cluster"
	"microk8s/internal/pki"
	"microk8s/internal/token"
)

// relay is between a joining node and an agent: it answers with a certificate of its own, and passes
// on what it is told.
type relay struct {
	address string // where it listens
	// token is set in one that knows the secret and can prove it, as the agent itself could.
	token *token.Token
	// change may replace an answer; nil leaves all as they are.
	change func(path string, status int, body []byte) (int, []byte)

	mu    sync.Mutex
	heard bytes.Buffer // all that it was told
}

// relay starts one in a host, in front of another host's agent.
func (c *cluster) relay(t *testing.T, r *relay, host, agent string) {
	t.Helper()
	var maker pki.Maker
	key, err := maker.Key(2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := maker.Issue(pki.Request{Subject: pkix.Name{CommonName: "relay"}, IPs: []net.IP{net.ParseIP(c.ip(t, host))}, Days: 1, ServerAuth: true}, key.Public(), nil, key)
	if err != nil {
		t.Fatal(err)
	}
	l, err := c.lab.Listen(t.Context(), host, "tcp", net.JoinHostPort(c.ip(t, host), "0"))
	if err != nil {
		t.Fatal(err)
	}
	r.address = l.Addr().String()
	onward := &http.Client{Transport: &http.Transport{
		DialContext: c.dialer(host), TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // it does what an attacker can do
	}}
	server := &http.Server{
		ReadHeaderTimeout: time.Minute,
		TLSConfig:         &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
		ErrorLog:          log.New(io.Discard, "", 0),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			status, answer, err := r.pass(onward, "https://"+net.JoinHostPort(c.ip(t, agent), c.port), req)
			if err != nil {
				status, answer = http.StatusBadGateway, []byte(err.Error())
			}
			w.WriteHeader(status)
			_, _ = w.Write(answer)
		}),
	}
	go func() { _ = server.ServeTLS(l, "", "") }()
	t.Cleanup(func() { server.Close(); onward.CloseIdleConnections() })
}

func (r *relay) pass(onward *http.Client, agent string, req *http.Request) (int, []byte, error) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return 0, nil, err
	}
	r.mu.Lock()
	r.heard.Write(body)
	r.mu.Unlock()
	resp, err := onward.Post(agent+req.URL.Path, "application/json", bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err == nil && r.token != nil && req.URL.Path == api.PathProof {
		answer, err = r.prove(body, req.TLS)
	}
	status := resp.StatusCode
	if r.change != nil {
		status, answer = r.change(req.URL.Path, status, answer)
	}
	return status, answer, err
}

// prove replaces the agent's proof, which is about another connection.
func (r *relay) prove(body []byte, state *tls.ConnectionState) ([]byte, error) {
	var q api.ProofRequest
	if err := json.Unmarshal(body, &q); err != nil {
		return nil, err
	}
	exporter, err := token.Exporter(state)
	if err != nil {
		return nil, err
	}
	id, key := r.token.Derive()
	return json.Marshal(api.ProofResponse{Proof: token.Proof(key, exporter, id, q.Nonce)})
}

// testMiddle has somebody between the nodes: a join gives nothing away, and the token is still good.
func (c *cluster) testMiddle(t *testing.T, from, host string) {
	good := c.line(t, from)
	_, secret, _ := strings.Cut(good[2], "/")
	digits, _, _ := strings.Cut(secret, "/")
	for _, tc := range []struct {
		name   string
		change func(path string, status int, body []byte) (int, []byte)
		want   string
	}{
		{"one that passes everything on", nil, "its proof is wrong: somebody is between"},
		{"one that poses as upstream's agent", func(path string, status int, body []byte) (int, []byte) {
			if path == api.PathProof || path == api.PathPreflight {
				return http.StatusNotFound, []byte(`{"error":"Not found"}`)
			}
			return status, body
		}, "cannot prove that it knows"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := &relay{change: tc.change}
			c.relay(t, r, host, from)
			for _, flags := range [][]string{nil, {"--worker"}} {
				got := c.try(t, host, append([]string{"microk8s", "join", r.address + "/" + secret}, flags...)...)
				if got.code != 4 || !strings.Contains(got.err, tc.want) || !strings.Contains(got.err, "the token was not sent") {
					t.Errorf("join: %s", got)
				}
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			if r.heard.Len() == 0 || bytes.Contains(r.heard.Bytes(), []byte(digits)) {
				t.Errorf("it was told: %s", &r.heard)
			}
		})
	}
	c.wantMark(t, host, "single")
	t.Run("the token is still good", func(t *testing.T) {
		// For a join that stops short, so that the node stays what it is.
		c.wantKilled(t, host, "join/"+membership.StepSaveState+"/begin", good...)
		c.run(t, host, "microk8s", "leave")
	})
}

// shifted returns the line for a relay that knows the token and whose clock is off.
func (c *cluster) shifted(t *testing.T, from, host string, off time.Duration) []string {
	t.Helper()
	words := c.line(t, from)
	_, secret, _ := strings.Cut(words[2], "/")
	digits, _, _ := strings.Cut(secret, "/")
	tok, err := token.Parse(digits)
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{token: &tok, change: func(path string, status int, body []byte) (int, []byte) {
		var answer map[string]any
		if path != api.PathPreflight || json.Unmarshal(body, &answer) != nil {
			return status, body
		}
		answer["time"] = time.Now().Add(off).UnixMilli()
		body, _ = json.Marshal(answer)
		return status, body
	}}
	c.relay(t, r, host, from)
	return []string{"microk8s", "join", r.address + "/" + secret}
}

// testStrange joins over what looks strange but need not be wrong: another clock, and a machine that
// was copied from the other one.
func (c *cluster) testStrange(t *testing.T, from, host string, flags ...string) {
	for _, off := range []time.Duration{time.Hour, -time.Hour} {
		r := c.try(t, host, append(c.shifted(t, from, host, off), flags...)...)
		if r.code != 1 || !strings.Contains(r.err, "the clocks differ") || !strings.Contains(r.err, "nothing was changed") {
			t.Errorf("a clock that is off by %s: %s", off, r)
		}
	}
	id, err := os.ReadFile(c.lab.Root(from) + "/etc/machine-id")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(c.lab.Root(host)+"/etc/machine-id", id, 0o644); err != nil {
		t.Fatal(err)
	}
	r := c.try(t, host, append(c.shifted(t, from, host, 30*time.Second), flags...)...)
	for _, want := range []string{"WARNING: the clocks differ", "looks like a clone"} {
		if r.code != 0 || !strings.Contains(r.out+r.err, want) {
			t.Errorf("want %q: %s", want, r)
		}
	}
}
