package fanout

import (
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/callback"
	"microk8s/internal/kube/kubetest"
	"microk8s/internal/noderegistry"
	"microk8s/internal/pki"
	"microk8s/internal/pki/pkitest"
	"microk8s/internal/snapenv"
	"microk8s/internal/token"
)

// agents are fake agents of some nodes, each with a real certificate, on 127.0.0.x and one port.
type agents struct {
	t     *testing.T
	api   *kubetest.Server
	c     *Cluster
	maker pki.Maker
	ca    *x509.Certificate
	caKey *rsa.PrivateKey
	port  string

	mu     sync.Mutex
	calls  map[string][]string // by node: path, secret and body
	onCall func(node, path string) int
	// importing answers an import of images.
	importing func(node string, body []byte) (status int, answer string)
	takes     map[string]func(secret string) bool // by node; none takes all
	frozen    sync.Map                            // names of nodes that answer nothing
}

func newAgents(t *testing.T) *agents {
	t.Helper()
	a := &agents{t: t, api: kubetest.New(t), maker: pkitest.Maker(nil), calls: map[string][]string{}, takes: map[string]func(string) bool{}}
	env := snapenv.Under(t.TempDir())
	if err := os.MkdirAll(env.CertsDir(), 0o755); err != nil {
		t.Fatal(err)
	}
	a.ca, a.caKey = a.newCA()
	if err := os.WriteFile(env.Cert("ca.key"), pki.EncodeKey(a.caKey), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(env.Cert("ca.crt"), pki.EncodeCert(a.ca.Raw), 0o644); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.9:0") // a port that is free on the others too, most likely
	if err != nil {
		t.Fatal(err)
	}
	_, a.port, _ = net.SplitHostPort(l.Addr().String())
	l.Close()
	a.c = &Cluster{Env: env, Core: a.api.Core, Port: a.port}
	return a
}

func (a *agents) newCA() (*x509.Certificate, *rsa.PrivateKey) {
	key, err := a.maker.Key(2048)
	if err != nil {
		a.t.Fatal(err)
	}
	der, err := a.maker.Issue(pki.Request{Subject: pkix.Name{CommonName: "10.152.183.1"}, Days: 1, CA: true}, key.Public(), nil, key)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key
}

// node adds a node to the cluster; with subject it also has an agent with that certificate.
func (a *agents) node(name, address string, ca *x509.Certificate, caKey *rsa.PrivateKey, subject string, ips ...net.IP) {
	a.t.Helper()
	a.api.Set(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{
		Addresses: []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: name}, {Type: corev1.NodeInternalIP, Address: address}},
	}})
	if err := a.registry().Put(a.t.Context(), record(name)); err != nil {
		a.t.Fatal(err)
	}
	if subject != "" {
		a.agent(name, address, ca, caKey, subject, ips...)
	}
}

// record is that of a node.
func record(name string) noderegistry.Record {
	return noderegistry.Record{Name: name, Role: noderegistry.Worker, Join: "00" + name, Secrets: 2}
}

func (a *agents) registry() noderegistry.Registry { return noderegistry.Registry{Core: a.api.Core} }

func (a *agents) key() callback.Key {
	a.t.Helper()
	key, err := callback.Keys{Env: a.c.Env, Core: a.api.Core}.Get(a.t.Context())
	if err != nil {
		a.t.Fatal(err)
	}
	return key
}

// agent starts the agent of a node.
func (a *agents) agent(name, address string, ca *x509.Certificate, caKey *rsa.PrivateKey, subject string, ips ...net.IP) {
	a.t.Helper()
	key, err := a.maker.Key(2048)
	if err != nil {
		a.t.Fatal(err)
	}
	der, err := a.maker.Issue(pki.Request{Subject: pkix.Name{CommonName: subject}, Days: 1, IPs: ips, ServerAuth: true}, key.Public(), ca, caKey)
	if err != nil {
		a.t.Fatal(err)
	}
	l, err := tls.Listen("tcp", net.JoinHostPort(address, a.port), &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, ClientAuth: tls.RequestClientCert,
	})
	if err != nil {
		a.t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if _, frozen := a.frozen.Load(name); frozen {
			<-r.Context().Done()
			return
		}
		if r.URL.Path == api.PathHealth {
			return
		}
		secret := r.Header.Get(api.HeaderCallback)
		var req api.ConfigureRequest
		if json.Unmarshal(body, &req) == nil && req.Callback != "" {
			secret = req.Callback
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		if _, err := callback.CheckCaller(r.TLS, pki.EncodeCert(a.ca.Raw), time.Now()); err != nil {
			a.t.Errorf("%s is called without the certificate of a control-plane node: %v", name, err)
		}
		if takes, ok := a.takes[name]; ok && r.URL.Path != "/readyz" && !takes(secret) {
			w.WriteHeader(http.StatusInternalServerError)
			_, _ = io.WriteString(w, `{"error":"Invalid token"}`)
			return
		}
		if a.onCall != nil {
			w.WriteHeader(a.onCall(name, r.URL.Path))
			return
		}
		if r.URL.Path == "/readyz" { // there is an agent only
			w.WriteHeader(http.StatusNotFound)
			return
		}
		a.calls[name] = append(a.calls[name], r.URL.Path+" "+secret+" "+string(body))
		if a.importing != nil && r.URL.Path == api.PathImageImport {
			status, answer := a.importing(name, body)
			w.WriteHeader(status)
			_, _ = io.WriteString(w, answer)
			return
		}
		if strings.Contains(string(body), "refuse") {
			w.WriteHeader(http.StatusInternalServerError)
			_, _ = io.WriteString(w, `{"error":"It says no"}`)
			return
		}
		_, _ = io.WriteString(w, `{"result":"ok"}`)
	})}
	go func() { _ = srv.Serve(l) }()
	a.t.Cleanup(func() { srv.Close() })
}

func TestEveryNode(t *testing.T) {
	a := newAgents(t)
	other, otherKey := a.newCA()
	a.node("n1", "127.0.0.1", a.ca, a.caKey, "127.0.0.1", net.IPv4(127, 0, 0, 1)) // a control-plane node's names its addresses
	a.node("w1", "127.0.0.2", a.ca, a.caKey, "system:node:w1")                    // a worker's is its kubelet's
	a.node("dead", "127.0.0.3", nil, nil, "")
	a.node("foreign", "127.0.0.4", other, otherKey, "system:node:foreign", net.IPv4(127, 0, 0, 4))
	a.node("liar", "127.0.0.5", a.ca, a.caKey, "system:node:w1") // another node's certificate
	results, err := a.c.SetArgument(t.Context(), "kubelet", "--cluster-dns", "10.152.183.10")
	if err != nil {
		t.Fatal(err)
	}
	key := a.key()
	for _, r := range results {
		want := map[string]string{"n1": "", "w1": "", "dead": "cannot reach its cluster agent", "foreign": "its certificate is not of this cluster", "liar": "not of the node liar"}[r.Name]
		if (r.Err == nil) != (want == "") || r.Err != nil && !strings.Contains(r.Err.Error(), want) {
			t.Errorf("%s: %v, want %q", r.Name, r.Err, want)
		}
		calls := a.calls[r.Name]
		if want != "" {
			if len(calls) > 0 {
				t.Errorf("%s was told %v", r.Name, calls)
			}
			continue
		}
		if len(calls) != 1 || !strings.HasPrefix(calls[0], api.PathConfigure+" "+key.Secret(record(r.Name))+" ") || !strings.Contains(calls[0], `"arguments_update":[{"--cluster-dns":"10.152.183.10"}]`) {
			t.Errorf("%s was told %v", r.Name, calls)
		}
	}
	if err := Failed(results); err == nil || strings.Count(err.Error(), "node ") < 3 {
		t.Errorf("%v", err)
	}
}

func TestImport(t *testing.T) {
	a := newAgents(t)
	a.node("n1", "127.0.0.1", a.ca, a.caKey, "x", net.IPv4(127, 0, 0, 1))
	a.node("w1", "127.0.0.2", a.ca, a.caKey, "system:node:w1")
	results, err := a.c.ImportImage(t.Context(), func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("an archive")), nil })
	if err != nil || Failed(results) != nil {
		t.Fatal(err, Failed(results))
	}
	for _, name := range []string{"n1", "w1"} {
		if len(a.calls[name]) != 1 || !strings.HasSuffix(a.calls[name][0], " an archive") || len(strings.Fields(a.calls[name][0])[1]) != 66 {
			t.Errorf("%s: %v", name, a.calls[name])
		}
	}
	results, err = a.c.ImportImage(t.Context(), func() (io.ReadCloser, error) { return nil, errors.New("no such file") })
	if err != nil || Failed(results) == nil {
		t.Errorf("%v, %v", err, results)
	}
}

// TestImportOfFrozenAgent imports on two nodes, of which one takes the archive and answers nothing.
func TestImportOfFrozenAgent(t *testing.T) {
	a := newAgents(t)
	a.node("n1", "127.0.0.1", a.ca, a.caKey, "x", net.IPv4(127, 0, 0, 1))
	a.node("w1", "127.0.0.2", a.ca, a.caKey, "system:node:w1")
	a.frozen.Store("w1", true)
	a.c.Silence = 300 * time.Millisecond
	results, err := a.c.ImportImage(t.Context(), func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("an archive")), nil })
	if err != nil || len(results) != 2 {
		t.Fatal(results, err)
	}
	var silent *SilentError
	if results[0].Err != nil || !errors.As(results[1].Err, &silent) || !strings.Contains(silent.Error(), a.port+" did not answer") {
		t.Errorf("%+v", results)
	}
}

func TestSomeNodesAndRefusals(t *testing.T) {
	a := newAgents(t)
	a.node("n1", "127.0.0.1", a.ca, a.caKey, "x", net.IPv4(127, 0, 0, 1))
	a.node("w1", "127.0.0.2", a.ca, a.caKey, "system:node:w1")
	results, err := a.c.Configure(t.Context(), api.ConfigureRequest{Services: []api.ConfigureService{{Name: "refuse"}}}, "w1")
	if err != nil || len(results) != 1 || results[0].Err == nil || results[0].Err.Error() != "It says no (500)" {
		t.Errorf("%v, %v", results, err)
	}
	if len(a.calls["n1"]) > 0 {
		t.Error("a node that was not meant was asked")
	}
}

// TestRolling restarts from node to node, and stops where an API server does not come back.
func TestRolling(t *testing.T) {
	a := newAgents(t)
	a.c.ReadyTimeout = 300 * time.Millisecond
	var order []string
	up := map[string]bool{"n1": true, "n2": true, "n3": true}
	for i, name := range []string{"n1", "n2", "n3"} {
		ip := net.IPv4(127, 0, 0, byte(i+1))
		a.node(name, ip.String(), a.ca, a.caKey, "x", ip)
		a.onCall = func(node, path string) int {
			if path == "/readyz" {
				if up[node] {
					return http.StatusOK
				}
				return http.StatusServiceUnavailable
			}
			order = append(order, node)
			up[node] = node != "n2" // which does not come back
			return http.StatusOK
		}
	}
	if err := os.MkdirAll(a.c.Env.ArgsDir(), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(a.c.Env.Args("kube-apiserver"), []byte("--secure-port="+a.port+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	results, err := a.c.SetArgument(t.Context(), "kubelet", "--v", "2")
	if err != nil {
		t.Fatal(err)
	}
	if results[0].Err != nil || results[1].Err == nil || results[2].Err == nil || !strings.Contains(results[2].Err.Error(), "because n2 did not come back") {
		t.Errorf("%v", results)
	}
	if strings.Join(order, " ") != "n1 n2" {
		t.Errorf("asked %v", order)
	}
}

func TestRenewSecrets(t *testing.T) {
	a := newAgents(t)
	a.node("w1", "127.0.0.2", a.ca, a.caKey, "system:node:w1")
	old := a.key()
	results, err := a.c.RenewSecrets(t.Context())
	if err != nil || Failed(results) != nil {
		t.Fatal(err, Failed(results))
	}
	now := a.key().Secret(record("w1"))
	if now == old.Secret(record("w1")) {
		t.Fatal("the secret did not change")
	}
	if calls := a.calls["w1"]; len(calls) != 1 || !strings.Contains(calls[0], now) || strings.Contains(calls[0], old.Secret(record("w1"))) {
		t.Errorf("the node was told %v", calls)
	}
}

// TestRenewSecretsAgain: a node that does not take its new secret at once is shown it again, and one
// that never does is named.
func TestRenewSecretsAgain(t *testing.T) {
	a := newAgents(t)
	a.c.RenewWaits = []time.Duration{time.Millisecond, time.Millisecond}
	a.node("busy", "127.0.0.2", a.ca, a.caKey, "system:node:busy")
	a.node("upstream", "127.0.0.3", a.ca, a.caKey, "system:node:upstream")
	a.node("w3", "127.0.0.4", a.ca, a.caKey, "system:node:w3")
	shown := 0
	a.takes["busy"] = func(string) bool { shown++; return shown == 3 }
	a.takes["upstream"] = func(string) bool { return false }
	results, err := a.c.RenewSecrets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range results {
		if (r.Err != nil) != (r.Name == "upstream") {
			t.Errorf("%s: %v", r.Name, r.Err)
		}
	}
	if shown != 3 || len(a.calls["w3"]) != 1 {
		t.Errorf("busy was shown it %d times, w3 %d times", shown, len(a.calls["w3"]))
	}
}

// TestTwoBuilds: while control-plane nodes of the build before are in the cluster, nodes are called
// with the secret that they take; afterwards with the present one only.
func TestTwoBuilds(t *testing.T) {
	a := newAgents(t)
	before := token.NewCallbackKey()
	a.api.Set(&corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: callback.SecretName, Namespace: "kube-system"}, Data: map[string][]byte{"callback-key": before},
	})
	legacy := func(name string) string { return token.LegacyCallback(before, name) }
	a.node("present", "127.0.0.2", a.ca, a.caKey, "system:node:present")
	a.node("earlier", "127.0.0.3", a.ca, a.caKey, "system:node:earlier")
	a.node("adopted", "127.0.0.4", a.ca, a.caKey, "system:node:adopted")
	if err := a.registry().Change(t.Context(), "adopted", func(r *noderegistry.Record) error { r.Secrets = 0; return nil }); err != nil {
		t.Fatal(err)
	}
	if err := a.registry().Delete(t.Context(), "earlier"); err != nil { // it came through a node of the build before
		t.Fatal(err)
	}
	key := a.key()
	a.takes["present"] = func(s string) bool { return s == key.Secret(record("present")) }
	a.takes["earlier"] = func(s string) bool { return s == legacy("earlier") }
	a.takes["adopted"] = func(s string) bool { return s == key.Secret(record("adopted")) } // it asked a node of this build
	for range 2 {
		results, err := a.c.Configure(t.Context(), api.ConfigureRequest{})
		if err != nil || Failed(results) != nil {
			t.Fatal(err, Failed(results))
		}
		// And the other way round.
		a.takes["present"] = func(s string) bool { return s == legacy("present") }
		a.takes["adopted"] = func(s string) bool { return s == legacy("adopted") }
	}
	if err := (callback.Keys{Env: a.c.Env, Core: a.api.Core}).Seal(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"present", "earlier", "adopted"} {
		a.takes[name] = func(s string) bool {
			if s == legacy(name) || !token.IsCallback(s) {
				t.Errorf("%s is shown the secret of the build before", name)
			}
			return true
		}
	}
	results, err := a.c.Configure(t.Context(), api.ConfigureRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range results {
		if (r.Err != nil) != (r.Name == "earlier") {
			t.Errorf("%s: %v", r.Name, r.Err)
		}
	}
}
