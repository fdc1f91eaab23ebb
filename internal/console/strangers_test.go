package console

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/rest"
)

// What people who are not known, and nodes that are not honest, make the console hold.

// TestLoginsOfOneSource: four are looked at together, and others are not kept waiting by them.
func TestLoginsOfOneSource(t *testing.T) {
	p := newPlace(t)
	release, arrived := make(chan struct{}), make(chan struct{}, loginsOfOne)
	api := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		arrived <- struct{}{}
		<-release
		w.WriteHeader(http.StatusUnauthorized)
	}))
	defer api.Close()
	p.srv.opts.API = func() (*rest.Config, error) {
		return &rest.Config{Host: api.URL, TLSClientConfig: rest.TLSClientConfig{Insecure: true}}, nil
	}
	login := func(from string) int {
		r := httptest.NewRequest(http.MethodPost, "/api/login", strings.NewReader(`{"token":"guess"}`))
		r.RemoteAddr = from + ":1"
		w := httptest.NewRecorder()
		p.srv.Handler().ServeHTTP(w, r)
		return w.Code
	}
	var all sync.WaitGroup
	for range loginsOfOne {
		all.Go(func() {
			if code := login("192.0.2.1"); code != http.StatusUnauthorized {
				t.Errorf("one of the first is answered %d", code)
			}
		})
		<-arrived
	}
	if code := login("192.0.2.1"); code != http.StatusTooManyRequests {
		t.Errorf("one more is answered %d", code)
	}
	all.Go(func() {
		if code := login("192.0.2.2"); code != http.StatusUnauthorized {
			t.Errorf("another source is answered %d", code)
		}
	})
	<-arrived
	close(release)
	all.Wait()
	if code := login("192.0.2.1"); code != http.StatusUnauthorized {
		t.Errorf("afterwards it is answered %d", code)
	}
	if n := len(p.srv.logins.from); n != 0 {
		t.Errorf("%d sources are remembered", n)
	}
}

// TestALoginTakesLittle: reading a kubeconfig takes many times its size, so it has a limit.
func TestALoginTakesLittle(t *testing.T) {
	p := newPlace(t)
	if code, answer := p.login(`{"token":"` + strings.Repeat("x", maxLogin) + `"}`); code != http.StatusRequestEntityTooLarge {
		t.Errorf("a body that is too large: %d %s", code, answer)
	}
	for name, text := range map[string]string{
		"users":    `{"users":[{}` + strings.Repeat(`,{}`, maxLogin/3-10) + `]}`,
		"brackets": strings.Repeat("[", maxLogin-100),
		"lists":    "users: \n" + strings.Repeat("- - \n", maxLogin/5-10),
		"aliases":  "a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e]\ng: [*f,*f,*f,*f,*f,*f,*f,*f]\n",
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, _, err := p.srv.logins.credentials(text)
		runtime.ReadMemStats(&after)
		if err == nil {
			t.Errorf("%s are a kubeconfig", name)
		}
		if taken := (after.TotalAlloc - before.TotalAlloc) >> 20; taken > 128 { // in all, of which most is free again
			t.Errorf("%s of %d bytes take %d MiB", name, len(text), taken)
		}
	}
}

// TestRefusedCertificatesKeepNothing: each has connections of its own, which would stay for a minute and a half.
func TestRefusedCertificatesKeepNothing(t *testing.T) {
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	changed := make(chan struct{}, 1000)
	api := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusUnauthorized) }))
	api.Config.ConnState = func(c net.Conn, s http.ConnState) {
		mu.Lock()
		open[c] = true
		if s == http.StateClosed {
			delete(open, c)
		}
		mu.Unlock()
		changed <- struct{}{}
	}
	api.EnableHTTP2 = true
	api.TLS = &tls.Config{ClientAuth: tls.RequestClientCert} //nolint:gosec // a test's own server
	api.StartTLS()
	defer api.Close()
	p := newPlace(t)
	p.srv.opts.API = func() (*rest.Config, error) {
		return &rest.Config{Host: api.URL, TLSClientConfig: rest.TLSClientConfig{Insecure: true}}, nil
	}
	for range 5 {
		user, err := json.Marshal(ownPair(t))
		if err != nil {
			t.Fatal(err)
		}
		if code, answer := p.login(kubeconfig(string(user))); code != http.StatusUnauthorized {
			t.Fatalf("answers %d %s", code, answer)
		}
	}
	for {
		mu.Lock()
		n := len(open)
		mu.Unlock()
		if n == 0 {
			return
		}
		select {
		case <-changed:
		case <-time.After(30 * time.Second):
			t.Fatalf("%d connections stay open", n)
		}
	}
}

// ownPair is a certificate that nobody has signed, as in a kubeconfig.
func ownPair(t *testing.T) map[string][]byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "somebody"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]byte{
		"client-certificate-data": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		"client-key-data":         pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}),
	}
}

// TestSessionsOfOnePerson: who logs in again and again logs nobody else out.
func TestSessionsOfOnePerson(t *testing.T) {
	now := time.Now()
	s := sessions{now: func() time.Time { return now }}
	s.add(&person{name: "ann"})
	for range 2 * maxSessions {
		now = now.Add(time.Millisecond)
		s.add(&person{name: "mallory"})
	}
	names := map[string]int{}
	for _, p := range s.list() {
		names[p.name]++
	}
	if names["ann"] != 1 || names["mallory"] != ofOne {
		t.Errorf("logged in are %v", names)
	}
}

// TestRightsEndWithTheCredentials: what was allowed counts while the API server is silent, and not when it says that
// the credentials are none.
func TestRightsEndWithTheCredentials(t *testing.T) {
	list := right{verb: "list", resource: "pods"}
	for _, c := range []struct {
		name string
		do   func(*fakeAPI, *string)
		want bool
	}{
		{"a silent API server", func(f *fakeAPI, _ *string) { f.Close() }, true},
		{"a token that was revoked", func(_ *fakeAPI, token *string) { *token = "revoked" }, false},
	} {
		api, token, now := newAPI(t), annToken, time.Now()
		p := &person{rights: map[right]verdict{}, api: &apiClient{config: func() (*rest.Config, error) { return api.config(token)() }}}
		if !p.may(t.Context(), list, now) {
			t.Fatal("ann may not list pods")
		}
		c.do(api, &token)
		p.api.made = time.Time{} // it is read again after a while
		if got := p.may(t.Context(), list, now.Add(2*rightsAge)); got != c.want {
			t.Errorf("with %s: %t", c.name, got)
		}
	}
}

// TestSamplesOfALiar: a kubelet that is not honest takes no memory of the console, and breaks no chart.
func TestSamplesOfALiar(t *testing.T) {
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/api/v1/nodes":
			fmt.Fprint(w, `{"items":[{"metadata":{"name":"liar"}},{"metadata":{"name":"n1"}}]}`)
		case strings.Contains(r.URL.Path, "liar"):
			fmt.Fprintf(w, `{"node":{"cpu":{"usageNanoCores":1e300}},"pods":[{"podRef":{"name":%q,"namespace":"x"},"cpu":{"usageNanoCores":1}}%s]}`,
				strings.Repeat("x", 1<<20), strings.Repeat(`,{}`, 1<<20))
		default:
			fmt.Fprint(w, `{"node":{"cpu":{"usageNanoCores":250000000}},"pods":null}`)
		}
	}))
	defer api.Close()
	client := &apiClient{config: func() (*rest.Config, error) { return &rest.Config{Host: api.URL}, nil }}
	now := time.Unix(60*1000, 0)
	s := newSamples(func(context.Context) *apiClient { return client }, sample, func() time.Time { return now }, slog.New(slog.DiscardHandler))
	s.read(t.Context())
	for key := range s.things {
		if len(key) > 100 {
			t.Errorf("a name of %d bytes is kept", len(key))
		}
	}
	if s.pods > podsOfNode {
		t.Errorf("%d pods of one node are kept", s.pods)
	}
	if _, err := json.Marshal(s.answer("node/", false, 10)); err != nil {
		t.Errorf("the chart of all nodes: %v", err)
	}
	var list podList
	if err := json.Unmarshal([]byte(`[`+strings.Repeat(`{},`, 10*podsOfNode)+`{}]`), &list); err != nil || len(list) != podsOfNode || cap(list) > 2*podsOfNode {
		t.Errorf("%d pods are read, with room for %d: %v", len(list), cap(list), err)
	}
}
