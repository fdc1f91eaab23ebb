package console

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"microk8s/internal/kube"
)

const (
	annToken = "token-of-ann-0123456789"
	theCode  = "CODEOFTHECOMMAND234567"
)

// fakeAPI is the far side: it knows ann, who may list pods, and the administrator, and writes down who asks what.
type fakeAPI struct {
	*httptest.Server
	mu   sync.Mutex
	seen []*http.Request
}

func newAPI(t *testing.T) *fakeAPI {
	f := &fakeAPI{}
	f.Server = httptest.NewTLSServer(http.HandlerFunc(f.serve))
	t.Cleanup(f.Close)
	return f
}

func (f *fakeAPI) serve(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	f.mu.Lock()
	f.seen = append(f.seen, r.Clone(context.Background()))
	f.mu.Unlock()
	name := map[string]string{"Bearer " + annToken: "ann", "Bearer admin-token": "admin"}[r.Header.Get("Authorization")]
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Set-Cookie", "stolen=1")
	switch {
	case name == "":
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","code":401,"reason":"Unauthorized","message":"Unauthorized"}`)
	case strings.HasSuffix(r.URL.Path, "/selfsubjectreviews"):
		fmt.Fprintf(w, `{"status":{"userInfo":{"username":%q,"groups":["people"]}}}`, name)
	case strings.HasSuffix(r.URL.Path, "/selfsubjectaccessreviews"):
		fmt.Fprintf(w, `{"status":{"allowed":%v}}`, name == "admin" || strings.Contains(string(body), `"pods"`))
	default:
		fmt.Fprintf(w, `{"path":%q,"user":%q,"method":%q}`, r.URL.RequestURI(), name, r.Method)
	}
}

func (f *fakeAPI) last() *http.Request {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.seen[len(f.seen)-1]
}

// config reaches it with a token; "" is nobody's.
func (f *fakeAPI) config(token string) func() (*rest.Config, error) {
	return func() (*rest.Config, error) {
		return &rest.Config{Host: f.URL, BearerToken: token, TLSClientConfig: rest.TLSClientConfig{Insecure: true}}, nil
	}
}

type fakeNode struct {
	mu    sync.Mutex
	facts string
}

func (n *fakeNode) Facts(context.Context) any {
	n.mu.Lock()
	defer n.mu.Unlock()
	return map[string]string{"headline": n.facts}
}

func (n *fakeNode) NewToken(context.Context, *kube.Core, TokenRequest) (any, error) {
	return map[string]string{"token": "made"}, nil
}
func (n *fakeNode) Tokens(context.Context, *kube.Core) (any, error) { return map[string]int{}, nil }
func (n *fakeNode) RevokeToken(_ context.Context, _ *kube.Core, id string) error {
	if id != "12345678" {
		return fmt.Errorf("no token has the id %s", id)
	}
	return nil
}

// place is a console with its far side and a browser.
type place struct {
	t    *testing.T
	api  *fakeAPI
	node *fakeNode
	srv  *Server
	web  *httptest.Server
	log  *bytes.Buffer
	http *http.Client
	csrf string
}

func newPlace(t *testing.T) *place {
	p := &place{t: t, api: newAPI(t), node: &fakeNode{facts: "microk8s is running"}, log: &bytes.Buffer{}}
	p.srv = New(Options{API: p.api.config(""), Code: theCode, Own: p.api.config("admin-token"), Node: p.node, Every: 10 * time.Millisecond, Log: slog.New(slog.NewTextHandler(p.log, nil))})
	p.srv.guesses.First = time.Millisecond
	p.web = httptest.NewTLSServer(p.srv.Handler())
	t.Cleanup(p.web.Close)
	p.http = p.browser()
	return p
}

func (p *place) browser() *http.Client {
	jar, err := cookiejar.New(nil)
	if err != nil {
		p.t.Fatal(err)
	}
	return &http.Client{Jar: jar, Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}} //nolint:gosec // a test's own server
}

// call asks the console; headers are pairs.
func (p *place) call(method, path, body string, headers ...string) (int, string, *http.Response) {
	p.t.Helper()
	req, err := http.NewRequestWithContext(p.t.Context(), method, p.web.URL+path, strings.NewReader(body))
	if err != nil {
		p.t.Fatal(err)
	}
	req.Header.Set("Sec-Fetch-Site", "same-origin")
	if p.csrf != "" {
		req.Header.Set(csrfHeader, p.csrf)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := p.http.Do(req)
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return resp.StatusCode, string(data), resp
}

func (p *place) login(body string) (int, string) {
	p.t.Helper()
	status, answer, resp := p.call(http.MethodPost, "/api/login", body)
	if status == http.StatusOK {
		var s sessionAnswer
		if err := json.Unmarshal([]byte(answer), &s); err != nil {
			p.t.Fatal(err)
		}
		p.csrf = s.CSRF
		c := resp.Cookies()[0]
		if !c.Secure || !c.HttpOnly || c.SameSite != http.SameSiteStrictMode || !strings.HasPrefix(c.Name, "__Host-") {
			p.t.Errorf("the cookie is %v", c)
		}
	}
	return status, answer
}

func kubeconfig(user string) string {
	data, _ := json.Marshal(map[string]string{"kubeconfig": `{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"x","user":"u","namespace":"shop"}}],
		"clusters":[{"name":"x","cluster":{"server":"https://192.0.2.1:1"}}],"users":[{"name":"u","user":` + user + `}]}`})
	return string(data)
}

func TestLogin(t *testing.T) {
	for _, c := range []struct{ name, body, user, wrong string }{
		{name: "code of the command", body: `{"token":"` + theCode + `"}`, user: "admin"},
		{name: "token", body: `{"token":" ` + annToken + `\n"}`, user: "ann"},
		{name: "kubeconfig with a token, whose server is not asked", body: kubeconfig(`{"token":"` + annToken + `"}`), user: "ann"},
		{name: "wrong token", body: `{"token":"guess"}`, wrong: "the API server does not accept this login"},
		{name: "nothing", body: `{}`, wrong: "enter a token"},
		{name: "words", body: `{"token":"two words"}`, wrong: "not a token"},
		{name: "kubeconfig that runs a program", body: kubeconfig(`{"exec":{"apiVersion":"client.authentication.k8s.io/v1","command":"/bin/sh","interactiveMode":"Never"}}`), wrong: "runs a program"},
		{name: "kubeconfig with a file of this machine", body: kubeconfig(`{"tokenFile":"/etc/passwd"}`), wrong: "names files"},
		{name: "kubeconfig with a certificate's file", body: kubeconfig(`{"client-certificate":"/x","client-key":"/y"}`), wrong: "names files"},
		{name: "kubeconfig that impersonates", body: kubeconfig(`{"token":"` + annToken + `","as":"admin"}`), wrong: "impersonates"},
		{name: "no kubeconfig", body: `{"kubeconfig":"secret: ["}`, wrong: "not a kubeconfig"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPlace(t)
			status, answer := p.login(c.body)
			if c.wrong != "" {
				if status != http.StatusUnauthorized || !strings.Contains(answer, c.wrong) {
					t.Errorf("answers %d %s, want 401 with %q", status, answer, c.wrong)
				}
				if status, _, _ := p.call(http.MethodGet, "/k8s/api/v1/pods", ""); status != http.StatusUnauthorized {
					t.Errorf("a call afterwards has %d", status)
				}
			} else if status != http.StatusOK || !strings.Contains(answer, `"user":"`+c.user+`"`) {
				t.Errorf("answers %d %s, want 200 for %s", status, answer, c.user)
			}
			for _, secret := range []string{theCode, annToken, "guess"} {
				if strings.Contains(p.log.String(), secret) {
					t.Errorf("the log has a secret: %s", p.log)
				}
			}
		})
	}
}

func TestLoginWhileTheAPIServerIsDown(t *testing.T) {
	p := newPlace(t)
	p.api.Close()
	if status, answer := p.login(`{"token":"` + annToken + `"}`); status != http.StatusBadGateway || !strings.Contains(answer, "dashboard-proxy printed logs in also now") {
		t.Errorf("a token: %d %s", status, answer)
	}
	if status, answer := p.login(`{"token":"` + theCode + `"}`); status != http.StatusOK {
		t.Fatalf("the code: %d %s", status, answer)
	}
	status, answer, _ := p.call(http.MethodGet, "/k8s/api/v1/pods", "")
	if status != http.StatusBadGateway || !strings.Contains(answer, reasonNoAPI) {
		t.Errorf("a call: %d %s", status, answer)
	}
	if line := p.firstFact(); !strings.Contains(line, "microk8s is running") {
		t.Errorf("the node says %q", line)
	}
}

func (p *place) firstFact() string {
	ctx, cancel := context.WithTimeout(p.t.Context(), 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.web.URL+"/api/node", nil)
	if err != nil {
		p.t.Fatal(err)
	}
	resp, err := p.http.Do(req)
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	buf := make([]byte, 4096)
	n, _ := resp.Body.Read(buf)
	return string(buf[:n])
}

func TestGuessesAreLate(t *testing.T) {
	p := newPlace(t)
	var waits []time.Duration
	p.srv.guesses.First = 100 * time.Millisecond
	p.srv.guesses.Sleep = func(_ context.Context, d time.Duration) { waits = append(waits, d) }
	for range 4 {
		p.login(`{"token":"guess"}`)
	}
	if fmt.Sprint(waits) != "[100ms 200ms 400ms 800ms]" {
		t.Errorf("wrong logins wait for %v", waits)
	}
}

func TestCallsAreThePersons(t *testing.T) {
	p := newPlace(t)
	p.login(`{"token":"` + annToken + `"}`)
	status, answer, resp := p.call(http.MethodGet, "/k8s/api/v1/pods?watch=true&limit=5", "",
		"Authorization", "Bearer admin-token", "Impersonate-User", "admin", "X-Remote-User", "admin", "X-Forwarded-For", "1.2.3.4", "Accept", "application/yaml")
	if status != http.StatusOK || !strings.Contains(answer, `"user":"ann"`) || !strings.Contains(answer, "/api/v1/pods?watch=true") {
		t.Fatalf("answers %d %s", status, answer)
	}
	got := p.api.last().Header
	for _, name := range []string{"Impersonate-User", "X-Remote-User", "X-Forwarded-For", "Cookie", csrfHeader} {
		if got.Get(name) != "" {
			t.Errorf("the API server sees %s: %q", name, got.Get(name))
		}
	}
	if got.Get("Accept") != "application/yaml" {
		t.Errorf("Accept is %q", got.Get("Accept"))
	}
	if resp.Header.Get("Set-Cookie") != "" {
		t.Error("the API server sets a cookie of the console")
	}
	if policy := resp.Header.Get("Content-Security-Policy"); !strings.Contains(policy, "sandbox") || resp.Header.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("what the API server answers could be a page: %v", resp.Header)
	}
	if status, _, _ := p.call(http.MethodGet, "/api/node", ""); status != http.StatusForbidden {
		t.Errorf("ann, who may not list nodes, has the node's state: %d", status)
	}
	p.call(http.MethodPost, "/api/logout", "")
	if status, _, _ := p.call(http.MethodGet, "/k8s/api/v1/pods", ""); status != http.StatusUnauthorized {
		t.Errorf("after the logout: %d", status)
	}
}

func TestPathsThatAreNotPassedOn(t *testing.T) {
	for path, want := range map[string]bool{
		"/api/v1/namespaces/default/pods/web-1":                       true,
		"/api/v1/namespaces/default/pods/web-1/log":                   true,
		"/api/v1/namespaces/proxy/pods":                               true,
		"/api/v1/namespaces/default/services/proxy":                   true,
		"/api/v1/namespaces/default/pods/proxy/log":                   true,
		"/apis/rbac.authorization.k8s.io/v1/clusterroles/system:node": true,
		"/apis": true, "/version": true,
		"/api/v1/namespaces/default/pods/web-1/proxy":               false,
		"/api/v1/namespaces/default/services/https:web:443/proxy/x": false,
		"/api/v1/nodes/n1/proxy/logs/":                              false,
		"/api/v1/namespaces/default/pods/web-1/portforward":         false,
		"/api/v1/namespaces/default/pods/web-1/attach":              false,
		"/api/v1/proxy/nodes/n1":                                    false,
		"/api/v1/../v1/nodes/n1/proxy":                              false,
		"/api/v1/nodes/n1/%70roxy/":                                 false,
		"/api/v1//nodes/n1":                                         false,
		"/metrics":                                                  false, "/debug/pprof": false, "/openid/v1/jwks": false, "": false,
	} {
		if got := allowed(path); got != want {
			t.Errorf("%q is passed on: %v, want %v", path, got, want)
		}
	}
}

func TestChangesNeedTheToken(t *testing.T) {
	p := newPlace(t)
	p.login(`{"token":"` + theCode + `"}`)
	for _, c := range []struct {
		name, method, path string
		headers            []string
		want               int
	}{
		{"with the token", http.MethodDelete, "/k8s/api/v1/namespaces/default/pods/a", nil, http.StatusOK},
		{"without", http.MethodDelete, "/k8s/api/v1/namespaces/default/pods/a", []string{csrfHeader, ""}, http.StatusForbidden},
		{"with another", http.MethodPost, "/api/tokens", []string{csrfHeader, "x"}, http.StatusForbidden},
		{"from another site", http.MethodPost, "/api/tokens", []string{"Sec-Fetch-Site", "cross-site"}, http.StatusForbidden},
		{"from another origin", http.MethodPost, "/api/tokens", []string{"Sec-Fetch-Site", "", "Origin", "https://evil.example"}, http.StatusForbidden},
		{"read by another site", http.MethodGet, "/k8s/api/v1/secrets", []string{"Sec-Fetch-Site", "cross-site"}, http.StatusForbidden},
		{"login by another site", http.MethodPost, "/api/login", []string{"Sec-Fetch-Site", "cross-site"}, http.StatusForbidden},
		{"shell without the token", http.MethodGet, "/k8s/api/v1/namespaces/default/pods/a/exec?command=sh", []string{"Connection", "Upgrade", "Upgrade", "websocket", csrfHeader, ""}, http.StatusForbidden},
		{"shell of another origin", http.MethodGet, "/k8s/api/v1/namespaces/default/pods/a/exec?command=sh", []string{"Connection", "Upgrade", "Upgrade", "websocket", "Origin", "https://evil.example", "Sec-WebSocket-Protocol", "v5.channel.k8s.io, csrf." + p.csrf}, http.StatusForbidden},
		{"revoking", http.MethodPost, "/api/tokens/12345678/revoke", nil, http.StatusOK},
		{"revoking nothing", http.MethodPost, "/api/tokens/1/revoke", nil, http.StatusBadRequest},
		{"large object", http.MethodPost, "/k8s/api/v1/namespaces/default/configmaps", nil, http.StatusRequestEntityTooLarge},
	} {
		body := "{}"
		if c.want == http.StatusRequestEntityTooLarge {
			body = strings.Repeat("x", maxBody+1)
		}
		if status, answer, _ := p.call(c.method, c.path, body, c.headers...); status != c.want {
			t.Errorf("%s: %d %s, want %d", c.name, status, answer, c.want)
		}
	}
}

func TestSessionsEnd(t *testing.T) {
	now := time.Now()
	s := sessions{now: func() time.Time { return now }}
	first := &person{name: "first"}
	s.add(first)
	req := func(p *person) *http.Request {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.AddCookie(&http.Cookie{Name: cookieName, Value: p.id})
		return r
	}
	now = now.Add(sessionIdle - time.Second)
	if s.of(req(first)) == nil {
		t.Error("it ended early")
	}
	for i := range maxSessions {
		now = now.Add(time.Millisecond)
		s.add(&person{name: fmt.Sprint(i)})
	}
	if s.of(req(first)) != nil {
		t.Error("the one that was used longest ago stays when there are too many")
	}
	if n := len(s.list()); n != maxSessions {
		t.Errorf("%d sessions", n)
	}
	last := &person{}
	s.add(last)
	now = now.Add(sessionIdle + time.Second)
	if s.of(req(last)) != nil {
		t.Error("it goes on although nobody used it")
	}
}

// TestSamples reads the summary of a kubelet and metrics, as they are in the API.
func TestSamples(t *testing.T) {
	round := 0
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/api/v1/nodes":
			fmt.Fprint(w, `{"items":[{"metadata":{"name":"n1"}}]}`)
		case strings.HasSuffix(r.URL.Path, "/stats/summary"):
			fmt.Fprintf(w, `{"node":{"cpu":{"usageNanoCores":250000000},"memory":{"workingSetBytes":1000},"network":{"rxBytes":%d},"fs":{"usedBytes":5,"capacityBytes":9}},
				"pods":[{"podRef":{"name":"web","namespace":"shop"},"cpu":{"usageNanoCores":5000000},"memory":{}},{"podRef":{"name":"db","namespace":"shop"},"cpu":{"usageNanoCores":1000000}}]}`, 6000*round)
		default:
			fmt.Fprintf(w, "# HELP x\netcd_request_duration_seconds_sum{operation=\"list\",type=\"x\"} %d\netcd_request_duration_seconds_count{operation=\"list\",type=\"x\"} %d\n", round, 100*round)
		}
	}))
	defer api.Close()
	client := &apiClient{config: func() (*rest.Config, error) { return &rest.Config{Host: api.URL}, nil }}
	now := time.Unix(60*1000, 0)
	s := newSamples(func(context.Context) *apiClient { return client }, sample, func() time.Time { return now }, slog.New(slog.DiscardHandler))
	for range 5 {
		round++
		s.read(t.Context())
		now = now.Add(4 * sample)
	}
	now = now.Add(-4 * sample)
	value := func(a samplesAnswer, name, what string) string {
		line := a.Lines[name][what]
		if len(line) == 0 || line[len(line)-1] == nil {
			return "none"
		}
		return fmt.Sprint(*line[len(line)-1])
	}
	node := s.answer("node/n1", true, 1)
	if got := value(node, "n1", cpuCores) + " " + value(node, "n1", receiveBytes) + " " + value(node, "n1", diskLimit); got != "0.25 100 9" {
		t.Errorf("the node: %s", got)
	}
	pods := s.answer("pod/shop/", false, 10)
	if pods.sum("shop"); value(pods, "shop", cpuCores) != "0.006" {
		t.Errorf("the namespace: %s", value(pods, "shop", cpuCores))
	}
	if cluster := s.answer("cluster", true, 1); value(cluster, "cluster", readMillis) != "10" {
		t.Errorf("a read takes %s ms", value(cluster, "cluster", readMillis))
	}
	if n := len(pods.Times); n != 5 {
		t.Errorf("%d times of pods, want one for each minute", n)
	}
	now = now.Add(nodeSteps * sample * 2)
	s.forget(s.step())
	if len(s.things) != 0 || s.pods != 0 {
		t.Errorf("what is gone is kept: %d, %d pods", len(s.things), s.pods)
	}
}

func TestFactsAreToldWhenTheyChange(t *testing.T) {
	p := newPlace(t)
	p.login(`{"token":"` + theCode + `"}`)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.web.URL+"/api/node", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := p.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	read := json.NewDecoder(resp.Body)
	for _, want := range []string{"microk8s is running", "microk8s is not running"} {
		p.node.mu.Lock()
		p.node.facts = want
		p.node.mu.Unlock()
		var got map[string]string
		if err := read.Decode(&got); err != nil || got["headline"] != want {
			t.Fatalf("it says %v, %v, want %s", got, err, want)
		}
	}
}

// TestServeBoth serves a browser over TLS and a proxy over HTTP, and ends although a stream goes on.
func TestServeBoth(t *testing.T) {
	p := newPlace(t)
	ctx, cancel := context.WithCancel(t.Context())
	certificate := p.web.TLS.Certificates[0]
	p.srv.opts.Certificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &certificate, nil }
	listen := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	web, behind := listen(), listen()
	ended := make(chan error, 1)
	go func() { ended <- p.srv.ServeBoth(ctx, web, behind) }()
	p.http.Transport = &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true} //nolint:gosec // a test's own server
	p.http.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	p.web.URL = "https://" + web.Addr().String()
	if status, answer := p.login(`{"token":"` + theCode + `"}`); status != http.StatusOK {
		t.Fatalf("the browser: %d %s", status, answer)
	}
	if line := p.firstFact(); !strings.Contains(line, "running") {
		t.Errorf("over HTTP/2 the node says %q", line)
	}
	p.srv.guesses.Sleep = func(context.Context, time.Duration) {}
	p.web.URL = "http://" + behind.Addr().String()
	for _, c := range []struct {
		method, proto string
		want          int
	}{{http.MethodGet, "", http.StatusPermanentRedirect}, {http.MethodPost, "http", http.StatusForbidden}, {http.MethodPost, "https", http.StatusUnauthorized}} {
		if status, answer, _ := p.call(c.method, "/api/login", `{"token":"guess"}`, "X-Forwarded-Proto", c.proto, "X-Forwarded-For", "192.0.2.9, 198.51.100.7"); status != c.want {
			t.Errorf("through the proxy, by %q: %d %s, want %d", c.proto, status, answer, c.want)
		}
	}
	if !strings.Contains(p.log.String(), "from=198.51.100.7") {
		t.Errorf("the log does not name the caller of the proxy: %s", p.log)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("it ended with %v", err)
	}
}
