package suite

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/broker"
	"microk8s/cluster-agent/callback"
	"microk8s/cluster-agent/limit"
	"microk8s/cluster-agent/node"
	"microk8s/cluster-agent/server"
	"microk8s/internal/certs"
	"microk8s/internal/connlimit"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/images"
	"microk8s/internal/kube/kubetest"
	"microk8s/internal/noderegistry"
	"microk8s/internal/pki"
	"microk8s/internal/pki/pkitest"
	"microk8s/internal/snapenv"
	"microk8s/internal/token"
	"microk8s/internal/tokenstore"
)

// The addresses of the contacted node, of a joining one, and of a worker of the cluster.
const (
	here    = "10.0.0.1"
	there   = "10.0.0.9"
	workers = "10.0.0.5"
)

// siteCalls is how many calls one source may make of a live site.
const siteCalls = 50

func sourceOf(address string) netip.Addr { return netip.MustParseAddr(address) }

// site is a control-plane node's agent, with everything behind it that is not the agent's own
// faked: the API server, the services, the programs.
type site struct {
	t        testing.TB
	env      snapenv.Env
	srv      *server.Server
	tokens   *tokenstore.Store
	cluster  *cluster
	api      *kubetest.Server // has the records of nodes, and the salt of callback secrets
	nodes    noderegistry.Registry
	keys     callback.Keys
	services *services
	limit    *limit.Limiter
	log      *bytes.Buffer
	now      time.Time
	slept    []time.Duration
	node     *node.Node

	mu      sync.Mutex
	ran     [][]string     // programs
	removed []string       // datastore members
	store   []peers.Member // the datastore's members
}

type cluster struct {
	nodes      []corev1.Node
	namespaces []string
	key        func(context.Context) (callback.Key, error)
	err        error
}

func (c *cluster) Nodes(context.Context) ([]corev1.Node, error) { return c.nodes, c.err }
func (c *cluster) APIServers(context.Context) ([]netip.Addr, error) {
	return []netip.Addr{netip.MustParseAddr(here)}, c.err
}
func (c *cluster) CallbackKey(ctx context.Context) (callback.Key, error) { return c.key(ctx) }
func (c *cluster) Namespace(_ context.Context, name string) (bool, error) {
	return slices.Contains(c.namespaces, name), c.err
}

func (c *cluster) DeleteNode(_ context.Context, n *corev1.Node) error {
	c.nodes = slices.DeleteFunc(c.nodes, func(o corev1.Node) bool { return o.Name == n.Name && o.UID == n.UID })
	return c.err
}

type services struct {
	mu       sync.Mutex
	restarts []string
	do       func(name string) error
}

func (s *services) Restart(_ context.Context, names ...string) error {
	s.mu.Lock()
	s.restarts = append(s.restarts, names...)
	do := s.do
	s.mu.Unlock()
	if do != nil {
		return do(names[0])
	}
	return nil
}

func aNode(name, address string, ready bool) corev1.Node {
	status := corev1.ConditionFalse
	if ready {
		status = corev1.ConditionTrue
	}
	return corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{
		Addresses:  []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: address}, {Type: corev1.NodeHostName, Address: name}},
		Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: status}},
	}}
}

func newSite(t testing.TB) *site {
	t.Helper()
	s := &site{t: t, env: snapenv.Under(t.TempDir()), log: &bytes.Buffer{}, now: time.Now()}
	for _, dir := range []string{s.env.LocksDir(), s.env.ArgsDir(), s.env.CredentialsDir(), s.env.Backend(), s.env.HostPath("capi/etc")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	store := certs.New(s.env, certs.Options{
		Maker: pkitest.Maker(nil), Hostname: func() (string, error) { return "n1", nil },
		Addresses: func() ([]net.IP, error) { return []net.IP{net.ParseIP(here)}, nil },
	})
	if _, err := store.Ensure(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.write(s.env.Lock(snapenv.LockHA), "")
	s.write(s.env.Args("kubelet"), "--root-dir=${SNAP_COMMON}/var/lib/kubelet\n--cluster-domain=cluster.local\n")
	s.write(s.env.Args("kube-apiserver"), "--secure-port=16443\n--authorization-mode=Node,RBAC\n--service-cluster-ip-range=10.152.183.0/24\n"+
		"--etcd-servers=\"unix://${SNAP_DATA}/var/kubernetes/backend/kine.sock:12379\"\n--kubelet-preferred-address-types=InternalIP,Hostname\n")
	s.write(s.env.Args("kube-proxy"), "--cluster-cidr=10.1.0.0/16\n")
	s.write(s.env.Args("cluster-agent"), "--bind 0.0.0.0:25000\n")
	s.write(filepath.Join(s.env.Backend(), "cluster.crt"), "the datastore's certificate")
	s.write(filepath.Join(s.env.Backend(), "cluster.key"), "the datastore's key")
	s.members(here+":19001", 0)
	s.api = kubetest.New(t)
	s.nodes, s.keys = noderegistry.Registry{Core: s.api.Core}, callback.Keys{Env: s.env, Core: s.api.Core}
	for _, r := range []noderegistry.Record{
		{Name: "n1", Role: noderegistry.ControlPlane, Secrets: 2}, {Name: "w1", Role: noderegistry.Worker, Join: joinOfW1, Secrets: 2},
	} {
		if _, err := s.nodes.Add(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	if complete, err := s.nodes.Adopt(t.Context(), nil); !complete || err != nil {
		t.Fatal(complete, err)
	}
	if err := s.keys.Seal(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.write(s.env.Credential(callback.FileName), s.secret("n1"))
	s.cluster = &cluster{key: s.keys.Get, namespaces: []string{"default", "kube-system", "shop"}, nodes: []corev1.Node{aNode("n1", here, true), aNode("w1", workers, true)}}
	s.services = &services{}
	s.limit = &limit.Limiter{Sleep: func(_ context.Context, d time.Duration) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.slept = append(s.slept, d)
	}}
	log := slog.New(slog.NewTextHandler(&locked{w: s.log}, nil))
	srv, err := server.New(server.Options{
		CertFile: s.env.Cert("server.crt"), KeyFile: s.env.Cert("server.key"), Timeout: time.Minute, BodyTime: 200 * time.Millisecond, Log: log,
		Limits: connlimit.Limits{Total: 100, PerSource: 16, NewPerSecond: 1000, NewBurst: 1000, CallsPerSecond: 0.001, CallsBurst: siteCalls, Early: 64 << 10},
	})
	if err != nil {
		t.Fatal(err)
	}
	s.srv = srv
	s.tokens = &tokenstore.Store{Backends: []tokenstore.Backend{tokenstore.File{Path: s.env.Credential("tokens.json")}}, Now: func() time.Time { return s.now }}
	remove := func(_ context.Context, address string) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.removed = append(s.removed, address)
		return nil
	}
	(&broker.Broker{
		Live: func(context.Context) ([]peers.Member, error) { return s.store, nil },
		Remove: func(ctx context.Context, id uint64, address string) error {
			if !slices.ContainsFunc(s.store, func(m peers.Member) bool { return m.ID == id && m.Address == address }) {
				return peers.ErrReplaced
			}
			return remove(ctx, address)
		},
		Nodes: s.nodes, Now: func() time.Time { return s.now },
		Env: s.env, Tokens: s.tokens, Cluster: s.cluster, Services: s.services, Limit: s.limit, Log: log, Version: "v1.37.1",
		Interfaces: func() ([]broker.Interface, error) {
			return []broker.Interface{netip.MustParsePrefix("127.0.0.1/8"), netip.MustParsePrefix(here + "/16"), netip.MustParsePrefix("10.0.100.100/32"), netip.MustParsePrefix("192.168.100.100/32")}, nil
		},
		Resolve: func(context.Context, string) ([]netip.Addr, error) { return nil, errors.New("no such host") },
		Reach:   func(context.Context, string) error { return nil },
	}).Register(srv)
	n := &node.Node{
		Env: s.env, Services: s.services, Limit: s.limit, Log: log,
		Run: func(_ context.Context, stdin io.Reader, argv ...string) error {
			if stdin != nil {
				if _, err := io.Copy(io.Discard, stdin); err != nil {
					return err
				}
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			s.ran = append(s.ran, argv)
			return nil
		},
		Remove:  remove,
		Examine: func(context.Context) (*peers.Examined, error) { return &peers.Examined{}, nil },
		Certificates: func() (certs.Inventory, error) {
			return certs.Inventory{Node: "n1", Items: []certs.Listed{{Name: certs.CA}}}, nil
		},
		Import: func(_ context.Context, archive io.Reader) (images.Imported, error) {
			text, err := io.ReadAll(archive)
			s.mu.Lock()
			defer s.mu.Unlock()
			s.ran = append(s.ran, []string{"import", string(text)})
			if string(text) == "nothing" {
				return images.Imported{}, errors.New("no image in it can be used: x is for linux/s390x")
			}
			return images.Imported{Names: []string{"docker.io/library/x:1"}, Skipped: []string{"y has no name"}}, err
		},
	}
	s.node = n
	n.Register(srv, true)
	t.Cleanup(n.Wait)
	return s
}

// joinOfW1 is the nonce of the join by which the worker w1 has come.
const joinOfW1 = "0123456789abcdef0123456789abcdef"

// secret is the callback secret of a node that has a record.
func (s *site) secret(name string) string {
	s.t.Helper()
	record, err := s.nodes.Get(s.t.Context(), name)
	if err != nil {
		s.t.Fatal(err)
	}
	key, err := s.keys.Get(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	return key.Secret(*record)
}

// caller is the certificate that a control-plane node shows to others.
func (s *site) caller() *x509.Certificate {
	s.t.Helper()
	pair, err := callback.Caller(s.env, "n2")
	if err != nil {
		s.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		s.t.Fatal(err)
	}
	return cert
}

// locked makes a buffer fit for several goroutines.
type locked struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

func (s *site) write(path, text string) {
	s.t.Helper()
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil { // as the product replaces files
		s.t.Fatal(err)
	}
}

// members writes what the datastore's daemon keeps: address and role, in turns. The IDs are 1, 2 and
// so on.
func (s *site) members(list ...any) {
	var text strings.Builder
	s.store = nil
	for i := 0; i < len(list); i += 2 {
		s.store = append(s.store, peers.Member{ID: uint64(i/2 + 1), Address: list[i].(string), Role: storedir.Role(list[i+1].(int)), Online: true})
		text.WriteString("- Address: " + list[i].(string) + "\n  ID: " + string(rune('1'+i/2)) + "\n  Role: " + string(rune('0'+list[i+1].(int))) + "\n")
	}
	s.write(filepath.Join(s.env.Backend(), "cluster.yaml"), text.String())
}

// add makes a token.
func (s *site) add(o tokenstore.Options) token.Token {
	s.t.Helper()
	if o.Uses == 0 {
		o.Uses = 1
	}
	tok := token.New()
	if _, err := s.tokens.Add(s.t.Context(), tok, o); err != nil {
		s.t.Fatal(err)
	}
	return tok
}

// from is where a call comes from, and with what.
type from struct {
	address string // "" means there
	local   string // where it came in; "" means here
	host    string
	header  map[string]string
	cert    *x509.Certificate // that the connection showed
}

// call posts a body, a string as it is and anything else as JSON.
func (s *site) call(f from, path string, body any) (status int, answer []byte, header http.Header) {
	s.t.Helper()
	var data []byte
	switch b := body.(type) {
	case string:
		data = []byte(b)
	default:
		var err error
		if data, err = json.Marshal(b); err != nil {
			s.t.Fatal(err)
		}
	}
	if f.address == "" {
		f.address = there
	}
	if f.local == "" {
		f.local = here
	}
	if f.host == "" {
		f.host = f.local + ":25000"
	}
	req := httptest.NewRequestWithContext(s.t.Context(), http.MethodPost, "https://"+f.host+path, bytes.NewReader(data))
	req.RemoteAddr = net.JoinHostPort(f.address, "40000")
	req = req.WithContext(context.WithValue(req.Context(), http.LocalAddrContextKey, net.Addr(&net.TCPAddr{IP: net.ParseIP(f.local), Port: 25000})))
	for k, v := range f.header {
		req.Header.Set(k, v)
	}
	if f.cert != nil {
		req.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{f.cert}}
	}
	rec := httptest.NewRecorder()
	s.srv.Handler().ServeHTTP(rec, req)
	return rec.Code, rec.Body.Bytes(), rec.Header()
}

var yes = true

// request is a join request of this product.
func request(tok, name string, worker bool) api.JoinRequest {
	return api.JoinRequest{
		Token: tok, Hostname: name, Port: "25000", Worker: api.Worker(worker), CanHandleX509Auth: &yes, CanHandleCustomEtcd: &yes,
		Product: api.Product, Version: "v1.37.1", DatastoreProtocol: api.DatastoreProtocol, Secrets: 2,
	}
}

// upstream is one of upstream's client.
func upstream(tok, name string, worker bool) api.JoinRequest {
	return api.JoinRequest{Token: tok, Hostname: name, Port: "25000", Worker: api.Worker(worker), CanHandleX509Auth: &yes, CanHandleCustomEtcd: &yes}
}

// join asks and decodes either answer.
func (s *site) join(f from, r api.JoinRequest) (*api.JoinResponse, int, api.Error) {
	s.t.Helper()
	status, body, _ := s.call(f, api.PathJoin, r)
	var ok api.JoinResponse
	var bad api.Error
	if status == http.StatusOK {
		if err := json.Unmarshal(body, &ok); err != nil {
			s.t.Fatal(err)
		}
		return &ok, status, bad
	}
	if err := json.Unmarshal(body, &bad); err != nil {
		s.t.Fatalf("%d %q: %v", status, body, err)
	}
	return nil, status, bad
}

// refused wants a join to fail with this code.
func (s *site) refused(f from, r api.JoinRequest, status int, code api.Code) api.Error {
	s.t.Helper()
	_, got, e := s.join(f, r)
	if got != status || e.Code != code {
		s.t.Errorf("%d %s (%s), want %d %s", got, e.Code, e.Message, status, code)
	}
	return e
}

// joined wants it to succeed.
func (s *site) joined(f from, r api.JoinRequest) *api.JoinResponse {
	s.t.Helper()
	ok, status, e := s.join(f, r)
	if status != http.StatusOK {
		s.t.Fatalf("%d %s: %s", status, e.Code, e.Message)
	}
	return ok
}

// confirm or release.
func (s *site) finish(path, tok, name string) (int, api.Error) {
	s.t.Helper()
	status, body, _ := s.call(from{}, path, api.ConfirmRequest{Token: tok, Hostname: name})
	var e api.Error
	_ = json.Unmarshal(body, &e)
	return status, e
}

// csr makes a certificate request with a new key.
func csr(t testing.TB, subject pkix.Name, dns []string, ips ...string) string {
	t.Helper()
	text, _ := csrKey(t, subject, dns, ips...)
	return text
}

func csrKey(t testing.TB, subject pkix.Name, dns []string, ips ...string) (string, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.CertificateRequest{Subject: subject, DNSNames: dns}
	for _, ip := range ips {
		template.IPAddresses = append(template.IPAddresses, net.ParseIP(ip))
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), key
}

func kubeletName(host string) pkix.Name {
	return pkix.Name{CommonName: "system:node:" + host, Organization: []string{"system:nodes"}}
}

// sign asks for a certificate.
func (s *site) sign(tok, request string) (*x509.Certificate, int, api.Error) {
	s.t.Helper()
	status, body, _ := s.call(from{}, api.PathSignCert, api.SignRequest{Token: tok, Request: request})
	var e api.Error
	if status != http.StatusOK {
		if err := json.Unmarshal(body, &e); err != nil {
			s.t.Fatalf("%d %q: %v", status, body, err)
		}
		return nil, status, e
	}
	var ok api.SignResponse
	if err := json.Unmarshal(body, &ok); err != nil {
		s.t.Fatal(err)
	}
	cert, err := pki.ParseCert([]byte(ok.Certificate))
	if err != nil {
		s.t.Fatal(err)
	}
	return cert, status, e
}

func newRecorder() *httptest.ResponseRecorder { return httptest.NewRecorder() }

func contextOf(t testing.TB) (context.Context, context.CancelFunc) {
	return context.WithCancel(context.WithoutCancel(t.Context()))
}

// freshCA makes a CA that has the same name as the cluster's and another key.
func freshCA(t *testing.T) (*x509.Certificate, any) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "10.152.183.1"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func issueWith(ca *x509.Certificate, caKey any, subject pkix.Name, pub *ecdsa.PublicKey) ([]byte, error) {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: subject, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	return x509.CreateCertificate(rand.Reader, template, ca, pub, caKey)
}

// secretValues has all values of all Secrets in the API.
func (s *site) secretValues() (all [][]byte) {
	for _, path := range s.api.Paths("secrets") {
		for _, value := range kubetest.As[corev1.Secret](s.api, path).Data {
			all = append(all, value)
		}
	}
	return all
}
