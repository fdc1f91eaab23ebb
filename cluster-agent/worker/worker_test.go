package worker

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"crypto/rsa"

	"microk8s/apiserver-proxy/config"
	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/callback"
	"microk8s/internal/certs"
	"microk8s/internal/kubeconfig"
	"microk8s/internal/pki"
	"microk8s/internal/pki/pkitest"
	"microk8s/internal/snapenv"
)

// control is a fake control-plane node that signs what it is asked to.
type control struct {
	t     *testing.T
	maker pki.Maker
	ca    *x509.Certificate
	caKey *rsa.PrivateKey
	url   string

	mu     sync.Mutex
	asked  int
	secret string
	status int
	client string // subject of the last client certificate
	junk   bool   // answers with a certificate for another key
	legacy string // secret that callers of the build before show
	before bool   // is of the build before
}

func (c *control) issue(req pki.Request, pub any) []byte {
	c.t.Helper()
	der, err := c.maker.Issue(req, pub, c.ca, c.caKey)
	if err != nil {
		c.t.Fatal(err)
	}
	return pki.EncodeCert(der)
}

func (c *control) key() *rsa.PrivateKey {
	c.t.Helper()
	key, err := c.maker.Key(2048)
	if err != nil {
		c.t.Fatal(err)
	}
	return key
}

func (c *control) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked++
	if r.URL.Path != api.PathRenew || c.status != 0 {
		w.WriteHeader(c.status)
		_, _ = w.Write([]byte(`{"error":"Not now"}`))
		return
	}
	c.client = r.TLS.PeerCertificates[0].Subject.String()
	var req api.RenewRequest
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		c.t.Error(err)
	}
	sign := func(text string) string {
		if text == "" {
			return ""
		}
		block, _ := pem.Decode([]byte(text))
		csr, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil {
			c.t.Error(err)
			return ""
		}
		pub := csr.PublicKey
		if c.junk {
			pub = c.key().Public()
		}
		return string(c.issue(pki.Request{Subject: csr.Subject, DNSNames: csr.DNSNames, IPs: csr.IPAddresses, Days: 365, ServerAuth: true, ClientAuth: true}, pub))
	}
	_ = json.NewEncoder(w).Encode(api.RenewResponse{Kubelet: sign(req.Kubelet), Proxy: sign(req.Proxy), CallbackToken: c.secret, LegacyCallback: c.legacy, Secrets: map[bool]int{false: 2}[c.before]})
}

// newWorker makes a worker whose certificates are good for so many days.
func newWorker(t *testing.T, days int) (*Controller, *control, *[]string) {
	t.Helper()
	c := &control{t: t, maker: pkitest.Maker(nil), secret: strings.Repeat("ab", 32)}
	c.caKey = c.key()
	der, err := c.maker.Issue(pki.Request{Subject: pkix.Name{CommonName: "10.152.183.1"}, Days: 3650, CA: true}, c.caKey.Public(), nil, c.caKey)
	if err != nil {
		t.Fatal(err)
	}
	if c.ca, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	env := snapenv.Under(t.TempDir())
	for _, dir := range []string{env.CertsDir(), env.CredentialsDir(), env.Args("traefik")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write := func(path string, data []byte) {
		t.Helper()
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(env.Cert("ca.remote.crt"), pki.EncodeCert(c.ca.Raw))
	for name, subject := range map[string]pkix.Name{"kubelet": {CommonName: "system:node:w1", Organization: []string{"system:nodes"}}, "proxy": {CommonName: "system:kube-proxy"}} {
		key := c.key()
		cert := c.issue(pki.Request{Subject: subject, Days: days, DNSNames: []string{"w1"}, IPs: []net.IP{net.IPv4(10, 0, 0, 5)}, ClientAuth: true, ServerAuth: true}, key.Public())
		write(env.Cert(name+".crt"), cert)
		write(env.Cert(name+".key"), pki.EncodeKey(key))
		text, err := kubeconfig.Config{CA: pki.EncodeCert(c.ca.Raw), Cert: cert, Key: pki.EncodeKey(key), Server: "https://127.0.0.1:16443", User: name}.Encode()
		if err != nil {
			t.Fatal(err)
		}
		write(env.Credential(name+".config"), text)
	}
	serverKey := c.key()
	cert := c.issue(pki.Request{Subject: pkix.Name{CommonName: "127.0.0.1"}, Days: 1, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}, ServerAuth: true}, serverKey.Public())
	pair, err := tls.X509KeyPair(cert, pki.EncodeKey(serverKey))
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(c)
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAnyClientCert}
	srv.StartTLS()
	t.Cleanup(srv.Close)
	c.url = srv.Listener.Addr().String()
	restarts := &[]string{}
	return &Controller{
		Addresses: func() ([]net.IP, error) { return []net.IP{net.IPv4(10, 0, 0, 6)}, nil }, // not those of the old certificate
		Env:       env, Node: "w1", Log: slog.New(slog.DiscardHandler),
		Restart: func(_ context.Context, names ...string) error {
			*restarts = append(*restarts, names...)
			return nil
		},
		Servers: func() ([]string, error) { return []string{"127.0.0.1:1", c.url}, nil }, // the first does not answer
	}, c, restarts
}

func TestNothingIsDue(t *testing.T) {
	k, c, restarts := newWorker(t, 365)
	next, err := k.Look(t.Context())
	if err != nil || next != longest || len(*restarts) > 0 {
		t.Errorf("%v, %v, restarted %v", next, err, *restarts)
	}
	if secret, err := callback.Load(k.Env); err != nil || secret != c.secret {
		t.Errorf("the callback secret: %q, %v", secret, err)
	}
	if c.client != "CN=system:node:w1,O=system:nodes" {
		t.Errorf("it was %s that asked", c.client)
	}
}

// TestMoved has a worker with another address than its kubelet's certificate has.
func TestMoved(t *testing.T) {
	k, _, restarts := newWorker(t, 365)
	write := func(address string) {
		t.Helper()
		if err := os.WriteFile(k.Env.Args("kubelet"), []byte("--node-ip="+address+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, address := range []string{"10.0.0.5", "10.0.0.9"} { // the certificate's own, and one that the host has not
		write(address)
		if _, err := k.Look(t.Context()); err != nil || len(*restarts) > 0 {
			t.Errorf("with --node-ip=%s: %v, restarted %v", address, err, *restarts)
		}
	}
	write("10.0.0.6")
	for range 2 { // the second time everything is in order
		if _, err := k.Look(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(k.Env.Cert("kubelet.crt"))
	if err != nil {
		t.Fatal(err)
	}
	if cert, err := pki.ParseCert(data); err != nil || !slices.ContainsFunc(cert.IPAddresses, net.IPv4(10, 0, 0, 6).Equal) || len(*restarts) != 1 {
		t.Errorf("the certificate is for %v (%v), restarted %v", cert.IPAddresses, err, *restarts)
	}
}

func TestRenews(t *testing.T) {
	k, _, restarts := newWorker(t, 100)
	k.Now = func() time.Time { return time.Now().AddDate(0, 0, 80) }
	if _, err := k.Look(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"kubelet", "proxy"} {
		data, err := os.ReadFile(k.Env.Cert(name + ".crt"))
		if err != nil {
			t.Fatal(err)
		}
		cert, err := pki.ParseCert(data)
		if err != nil || cert.NotAfter.Before(time.Now().AddDate(0, 11, 0)) {
			t.Errorf("%s ends %v, %v", name, cert.NotAfter, err)
		}
		if name == "kubelet" && (cert.DNSNames[0] != "w1" || len(cert.IPAddresses) != 1 || !cert.IPAddresses[0].Equal(net.IPv4(10, 0, 0, 6))) {
			t.Errorf("names %v %v", cert.DNSNames, cert.IPAddresses)
		}
		text, err := os.ReadFile(k.Env.Credential(name + ".config"))
		if err != nil {
			t.Fatal(err)
		}
		config, err := kubeconfig.Decode(text)
		if err != nil || string(config.Cert) != string(data) || config.Server != "https://127.0.0.1:16443" || config.User != name {
			t.Errorf("%s.config has another certificate, or lost something: %v", name, err)
		}
	}
	if len(*restarts) != 1 || (*restarts)[0] != "kubelite" {
		t.Errorf("restarted %v", *restarts)
	}
}

func TestKeepsWhatItHas(t *testing.T) {
	k, c, restarts := newWorker(t, 100)
	k.Now = func() time.Time { return time.Now().AddDate(0, 0, 80) }
	before, err := os.ReadFile(k.Env.Cert("kubelet.crt"))
	if err != nil {
		t.Fatal(err)
	}
	for name, set := range map[string]func(){
		"a certificate for another key": func() { c.junk = true },
		"a refusal":                     func() { c.status = http.StatusUnauthorized },
		"an upstream control plane":     func() { c.status = http.StatusNotFound },
	} {
		c.junk, c.status = false, 0
		set()
		if _, err := k.Look(t.Context()); err == nil {
			t.Errorf("%s: no error", name)
		}
		after, err := os.ReadFile(k.Env.Cert("kubelet.crt"))
		if err != nil || string(before) != string(after) || len(*restarts) > 0 {
			t.Errorf("%s: it changed the certificate or restarted %v: %v", name, *restarts, err)
		}
	}
	// In an upstream cluster nothing is wrong as long as nothing is due.
	k.Now, c.junk, c.status = nil, false, http.StatusNotFound
	if next, err := k.Look(t.Context()); err != nil || next <= 0 {
		t.Errorf("%v, %v", next, err)
	}
}

// TestCallbackIsAskedRarely: whoever knocks cannot make this node ask all the time.
func TestCallbackIsAskedRarely(t *testing.T) {
	k, c, _ := newWorker(t, 365)
	now := time.Now()
	k.Now = func() time.Time { return now }
	for range 10 {
		if secrets, err := k.Callback(t.Context()); err != nil || secrets[0] != c.secret {
			t.Fatal(secrets, err)
		}
	}
	if c.asked != 2 {
		t.Errorf("asked %d times", c.asked)
	}
	c.mu.Lock()
	c.secret = strings.Repeat("cd", 32)
	c.mu.Unlock()
	now = now.Add(pause)
	if secrets, err := k.Callback(t.Context()); err != nil || secrets[0] != strings.Repeat("cd", 32) {
		t.Error(secrets, err)
	}
}

// TestSecretChangesAgainAtOnce: two nodes are removed one right after the other, and this one is shown
// each new secret.
func TestSecretChangesAgainAtOnce(t *testing.T) {
	k, c, _ := newWorker(t, 365)
	now := time.Now()
	k.Now = func() time.Time { return now }
	for _, secret := range []string{"first", "second", "third"} {
		c.mu.Lock()
		c.secret = secret
		c.mu.Unlock()
		if got, err := k.Callback(t.Context()); err != nil || got[0] != secret {
			t.Errorf("%v, %v, want %s", got, err, secret)
		}
		if file, err := callback.Load(k.Env); err != nil || file != secret {
			t.Errorf("%s is kept, %v, want %s", file, err, secret)
		}
	}
}

// TestJoinIsNotConfirmed: the node has no secret yet, and asks again soon.
func TestJoinIsNotConfirmed(t *testing.T) {
	k, c, _ := newWorker(t, 365)
	c.secret = ""
	next, err := k.Look(t.Context())
	if err != nil || next > unconfirmed {
		t.Errorf("%v, %v", next, err)
	}
	if secrets, err := k.Callback(t.Context()); err != nil || secrets[0] != "" {
		t.Errorf("%v, %v", secrets, err)
	}
	if file, err := callback.Load(k.Env); err != nil || file != "" {
		t.Errorf("%q, %v", file, err)
	}
}

// TestServersOfTwoBuilds: while a cluster is refreshed node by node, this worker asks one of its own
// build first, which knows what both kinds of callers show.
func TestServersOfTwoBuilds(t *testing.T) {
	k, present, _ := newWorker(t, 100)
	_, earlier, _ := newWorker(t, 100)
	earlier.before, earlier.secret = true, "of the build before"
	present.secret, present.legacy = "2-present", "of the build before"
	// Both are of one cluster.
	pemCA := slices.Concat(pki.EncodeCert(present.ca.Raw), pki.EncodeCert(earlier.ca.Raw))
	if err := os.WriteFile(k.Env.Cert("ca.remote.crt"), pemCA, 0o600); err != nil {
		t.Fatal(err)
	}
	k.Servers = func() ([]string, error) { return []string{earlier.url, present.url}, nil }
	if secrets, err := k.Callback(t.Context()); err != nil || !slices.Equal(secrets, []string{"2-present", "of the build before"}) {
		t.Errorf("%v, %v", secrets, err)
	}
	k.Now = func() time.Time { return time.Now().AddDate(0, 0, 80) }
	if _, err := k.Look(t.Context()); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(k.Env.Cert("kubelet.crt"))
	if err != nil {
		t.Fatal(err)
	}
	if cert, err := pki.ParseCert(data); err != nil || pki.IssuedBy(cert, present.ca) != nil {
		t.Errorf("the server of the build before signed it: %v", err)
	}
	k.Servers = func() ([]string, error) { return []string{earlier.url}, nil }
	if secrets, err := k.Callback(t.Context()); err != nil || secrets[0] != "of the build before" {
		t.Errorf("%v, %v", secrets, err)
	}
}

func TestProvider(t *testing.T) {
	k, _, _ := newWorker(t, 365)
	path := k.Env.Args("traefik/provider.yaml")
	for _, tc := range []struct {
		text, want string
	}{
		{"tcp:\n  services:\n    kube-apiserver:\n      loadBalancer:\n        servers:\n        - address: 10.0.0.1:16443\n        - address: '[fd00::1]:16443'\n", "10.0.0.1:25001 [fd00::1]:25001"},
		{"tcp: {}\n", ""},
		{"x: [", ""},
	} {
		if err := os.WriteFile(path, []byte(tc.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(k.Env.ArgsDir(), "cluster-agent"), []byte("--bind=0.0.0.0:25001\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := k.provider()
		if strings.Join(got, " ") != tc.want || (err == nil) != (tc.want != "") {
			t.Errorf("%v, %v", got, err)
		}
	}
}

// TestMovedProvider has the list of servers where traefik.yaml says, as the proxy reads it.
func TestMovedProvider(t *testing.T) {
	k, _, _ := newWorker(t, 365)
	const servers = "tcp:\n  services:\n    kube-apiserver:\n      loadBalancer:\n        servers:\n        - address: "
	moved := filepath.Join(t.TempDir(), "servers.yaml")
	for path, text := range map[string]string{
		k.Env.Args("traefik/provider.yaml"): servers + "10.0.0.1:16443\n", // of before it was moved
		moved:                               servers + "10.0.0.2:16443\n",
		k.Env.Args("traefik/traefik.yaml"):  "providers:\n  file:\n    filename: " + moved + "\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := k.provider(); err != nil || strings.Join(got, " ") != "10.0.0.2:25000" {
		t.Errorf("got %v, %v", got, err)
	}
	for path, text := range map[string]string{moved: "x: [", config.LastGood(moved): servers + "10.0.0.3:16443\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := k.provider(); err != nil || strings.Join(got, " ") != "10.0.0.3:25000" {
		t.Errorf("with a damaged list: %v, %v", got, err)
	}
}

func TestRunRetries(t *testing.T) {
	k, c, _ := newWorker(t, 365)
	c.status = http.StatusServiceUnavailable
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- k.Run(ctx) }()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for limit := time.After(20 * time.Second); ; {
		c.mu.Lock()
		asked := c.asked
		c.mu.Unlock()
		if asked > 0 {
			break
		}
		select {
		case <-tick.C:
		case <-limit:
			t.Fatal("it does not ask")
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// A change of keys makes new ones, which the control plane signs, for the pairs that are named, once.
func TestChangeMakesNewKeys(t *testing.T) {
	k, c, _ := newWorker(t, 30)
	id := func(name string) string {
		t.Helper()
		text, err := os.ReadFile(k.Env.Cert(name + ".crt"))
		if err != nil {
			t.Fatal(err)
		}
		cert, err := pki.ParseCert(text)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tls.LoadX509KeyPair(k.Env.Cert(name+".crt"), k.Env.Cert(name+".key")); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		config, err := os.ReadFile(k.Env.Credential(name + ".config"))
		if err != nil {
			t.Fatal(err)
		}
		if decoded, err := kubeconfig.Decode(config); err != nil || !slices.Equal(decoded.Cert, text) {
			t.Errorf("%s.config has another certificate: %v", name, err)
		}
		return certs.KeyID(cert.PublicKey)
	}
	kubelet, proxy := id("kubelet"), id("proxy")
	change := api.CertificateChange{Leaves: []string{kubelet, proxy, "of another node"}}
	c.junk = true
	if err := k.Change(t.Context(), change); err == nil {
		t.Error("a certificate for another key was taken")
	}
	c.junk = false
	if id("kubelet") != kubelet || id("proxy") != proxy {
		t.Error("a refused change has changed something")
	}
	if err := k.Change(t.Context(), change); err != nil {
		t.Fatal(err)
	}
	if id("kubelet") == kubelet || id("proxy") == proxy {
		t.Error("the keys are those of before")
	}
	asked := c.asked
	if err := k.Change(t.Context(), change); err != nil || c.asked != asked {
		t.Errorf("again: %v, asked %d times more", err, c.asked-asked)
	}
	for _, wrong := range []api.CertificateChange{{FrontProxy: certs.FrontProxyAdd}, {SigningKeys: "x"}, {DatastoreCert: "x"}} {
		if err := k.Change(t.Context(), wrong); err == nil {
			t.Errorf("a worker took %+v", wrong)
		}
	}
}
