package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/atomicfile"
	"microk8s/internal/kubeconfig"
	"microk8s/internal/pki"
	"microk8s/internal/pki/pkitest"
)

// serverVar makes this test program an API server's stand-in, a process of its own that can be
// killed and frozen. Its value is the address; serverFiles is the folder of its certificate.
const (
	serverVar   = "PROXY_TEST_SERVER"
	serverFiles = "PROXY_TEST_FILES"
)

func TestMain(m *testing.M) {
	if address := os.Getenv(serverVar); address != "" {
		if err := serveStandIn(address, os.Getenv(serverFiles)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// serveStandIn answers /name with its address, /stream with a line every 10 ms, /readyz with
// what the last signal asked for: SIGUSR1 shutting down, SIGUSR2 without datastore, SIGHUP well.
func serveStandIn(address, dir string) error {
	var state atomic.Int32
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGHUP)
	go func() {
		for s := range signals {
			state.Store(map[os.Signal]int32{syscall.SIGUSR1: 1, syscall.SIGUSR2: 2, syscall.SIGHUP: 0}[s])
			fmt.Println("signal")
		}
	}()
	mux := http.NewServeMux()
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, r *http.Request) {
		if len(r.TLS.PeerCertificates) == 0 {
			http.Error(w, "Unauthorized", http.StatusUnauthorized)
			return
		}
		switch state.Load() {
		case 1:
			http.Error(w, "[+]ping ok\n[-]shutdown failed: reason withheld\nreadyz check failed", http.StatusInternalServerError)
		case 2:
			http.Error(w, "[-]etcd failed: reason withheld\nreadyz check failed", http.StatusInternalServerError)
		default:
			fmt.Fprint(w, "ok")
		}
	})
	mux.HandleFunc("/name", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, address) })
	mux.HandleFunc("/stream", func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			fmt.Fprintln(w, address)
			_ = http.NewResponseController(w).Flush()
			time.Sleep(10 * time.Millisecond)
		}
	})
	mux.HandleFunc("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		path := filepath.Join(dir, "endpoints")
		list, err := os.ReadFile(path)
		if err != nil {
			http.NotFound(w, r)
			return
		}
		if r.URL.Query().Get("watch") == "" {
			_, _ = w.Write(list)
			return
		}
		// A change ends the watch, and the client lists again.
		_ = http.NewResponseController(w).Flush()
		for r.Context().Err() == nil {
			now, err := os.ReadFile(path)
			if err == nil && !bytes.Contains(now, fmt.Appendf(nil, `"resourceVersion":%q`, r.URL.Query().Get("resourceVersion"))) {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	})
	pool := x509.NewCertPool()
	ca, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if err != nil {
		return err
	}
	pool.AppendCertsFromPEM(ca)
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	fmt.Println("listening")
	srv := &http.Server{
		Handler:   mux,
		ErrorLog:  slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
		TLSConfig: &tls.Config{ClientCAs: pool, ClientAuth: tls.VerifyClientCertIfGiven},
	}
	return srv.ServeTLS(l, filepath.Join(dir, "server.crt"), filepath.Join(dir, "server.key"))
}

// standIn is such a process.
type standIn struct {
	t       *testing.T
	address string
	dir     string
	cmd     *exec.Cmd
	lines   *bufio.Reader
}

func (s *standIn) start() {
	s.t.Helper()
	s.cmd = exec.Command(os.Args[0])
	s.cmd.Env = append(os.Environ(), serverVar+"="+s.address, serverFiles+"="+s.dir)
	s.cmd.Stderr = os.Stderr
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.lines = bufio.NewReader(out)
	s.line("listening")
}

func (s *standIn) line(want string) {
	s.t.Helper()
	if got, err := s.lines.ReadString('\n'); err != nil || got != want+"\n" {
		s.t.Fatalf("server %s: %q, %v; want %q", s.address, got, err, want)
	}
}

func (s *standIn) signal(sig syscall.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Fatal(err)
	}
	if sig == syscall.SIGUSR1 || sig == syscall.SIGUSR2 || sig == syscall.SIGHUP {
		s.line("signal")
	}
	for sig == syscall.SIGSTOP && !s.stopped() {
		time.Sleep(time.Millisecond)
	}
}

// stopped reports whether every thread of the process has taken SIGSTOP in.
func (s *standIn) stopped() bool {
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", s.cmd.Process.Pid))
	for _, f := range files {
		if data, err := os.ReadFile(f); err == nil && !strings.Contains(string(data), ") T ") {
			return false
		}
	}
	return true
}

func (s *standIn) kill() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

// cluster is a proxy in front of some stand-ins.
type cluster struct {
	t          *testing.T
	dir        string
	kubeconfig string
	ca         *x509.CertPool
	servers    []*standIn
	balancer   *Balancer
	listener   net.Listener
	log        *lockedBuffer
	published  int // lists of endpoints so far
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// quick makes what the tests wait for short, and leaves what they must not run into long.
var quick = Times{
	ProbeEvery: 50 * time.Millisecond, Probe: 500 * time.Millisecond, FirstByte: 5 * time.Second,
	Failing: 300 * time.Millisecond, Drain: 600 * time.Millisecond, Removed: 300 * time.Millisecond,
}

// pickAddresses returns free addresses on loopback for servers in other processes.
func pickAddresses(t *testing.T, n int) []string {
	t.Helper()
	var out []string
	for i := range n {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.%d:0", i+2))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		out = append(out, l.Addr().String())
	}
	return out
}

// newFiles makes a CA, the servers' certificate and a kubeconfig.
func newFiles(t *testing.T, maker pki.Maker, server string) (dir string, ca *x509.CertPool) {
	t.Helper()
	dir = t.TempDir()

	caKey, err := maker.Key(2048)
	if err != nil {
		t.Fatal(err)
	}
	caDER, err := maker.Issue(pki.Request{Subject: pkix.Name{CommonName: "10.152.183.1"}, Days: 10, CA: true}, caKey.Public(), nil, caKey)
	if err != nil {
		t.Fatal(err)
	}
	caCert, err := x509.ParseCertificate(caDER)
	if err != nil {
		t.Fatal(err)
	}
	issue := func(name string, req pki.Request) (cert, keyPEM []byte) {
		k, err := maker.Key(2048)
		if err != nil {
			t.Fatal(err)
		}
		der, err := maker.Issue(req, k.Public(), caCert, caKey)
		if err != nil {
			t.Fatal(err)
		}
		cert, keyPEM = pki.EncodeCert(der), pki.EncodeKey(k)
		for ext, data := range map[string][]byte{".crt": cert, ".key": keyPEM} {
			if err := os.WriteFile(filepath.Join(dir, name+ext), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return cert, keyPEM
	}
	caPEM := pki.EncodeCert(caDER)
	if err := os.WriteFile(filepath.Join(dir, "ca.crt"), caPEM, 0o600); err != nil {
		t.Fatal(err)
	}
	issue("server", pki.Request{Subject: pkix.Name{CommonName: "127.0.0.1"}, Days: 1, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}, ServerAuth: true})
	cert, keyPEM := issue("kubelet", pki.Request{Subject: pkix.Name{CommonName: "system:node:n1", Organization: []string{"system:nodes"}}, Days: 1, ClientAuth: true})
	data, err := kubeconfig.Config{CA: caPEM, Cert: cert, Key: keyPEM, Server: server, User: "system:node:n1"}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "kubelet.config"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	ca = x509.NewCertPool()
	ca.AddCert(caCert)
	return dir, ca
}

// publish makes the endpoints that the servers tell of.
func (c *cluster) publish(addresses []string) {
	c.t.Helper()
	var list discoveryv1.EndpointSliceList
	list.TypeMeta = metav1.TypeMeta{Kind: "EndpointSliceList", APIVersion: "discovery.k8s.io/v1"}
	c.published++
	list.ResourceVersion = strconv.Itoa(c.published)
	for i, a := range addresses {
		ap := netip.MustParseAddrPort(a)
		list.Items = append(list.Items, discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint(i)}, AddressType: discoveryv1.AddressTypeIPv4,
			Endpoints: []discoveryv1.Endpoint{{Addresses: []string{ap.Addr().String()}}},
			Ports:     []discoveryv1.EndpointPort{{Name: new("https"), Port: new(int32(ap.Port()))}},
		})
	}
	data, err := json.Marshal(list)
	if err != nil {
		c.t.Fatal(err)
	}
	if err := atomicfile.Write(filepath.Join(c.dir, "endpoints"), data, 0o600, nil); err != nil {
		c.t.Fatal(err)
	}
}

// newCluster has a balancer in front of its servers.
func newCluster(t *testing.T, n int, times Times) *cluster {
	t.Helper()
	c := newServers(t, n)
	var addresses []string
	for _, s := range c.servers {
		addresses = append(addresses, s.address)
	}
	log := slog.New(slog.NewTextHandler(c.log, nil))
	c.balancer = NewBalancer(NewReadyProber(c.kubeconfig, func(err error) { t.Error(err) }), times, log)
	c.balancer.Set(addresses)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.balancer.Serve(ctx, c.listener, 1000) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		c.balancer.Close()
		if t.Failed() {
			t.Logf("the proxy's log:\n%s", c.log)
		}
	})
	return c
}

func newServers(t *testing.T, n int) *cluster {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, listener: l, log: &lockedBuffer{}}
	c.dir, c.ca = newFiles(t, pkitest.Maker(nil), "https://"+l.Addr().String())
	c.kubeconfig = filepath.Join(c.dir, "kubelet.config")
	addresses := pickAddresses(t, n)
	for _, a := range addresses {
		s := &standIn{t: t, address: a, dir: c.dir}
		s.start()
		t.Cleanup(s.kill)
		c.servers = append(c.servers, s)
	}
	return c
}

// client makes a new connection for each request.
func (c *cluster) client() *http.Client {
	return &http.Client{
		Timeout:   30 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: c.ca}, DisableKeepAlives: true},
	}
}

// name asks through a new connection which server answers.
func (c *cluster) name() (string, error) {
	resp, err := c.client().Get("https://" + c.listener.Addr().String() + "/name")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

func (c *cluster) mustName() string {
	c.t.Helper()
	n, err := c.name()
	if err != nil {
		c.t.Fatalf("a connection failed while a server lives: %v", err)
	}
	return n
}

// names asks until all of the servers wanted, and in a row no others, have answered.
func (c *cluster) names(want ...*standIn) {
	c.t.Helper()
	for limit := time.Now().Add(time.Minute); time.Now().Before(limit); {
		seen := map[string]int{}
		for range 4 * len(c.servers) {
			seen[c.mustName()]++
		}
		ok := len(seen) == len(want)
		for _, s := range want {
			ok = ok && seen[s.address] > 0
		}
		if ok {
			return
		}
	}
	c.t.Fatalf("connections do not go to these servers only: %v", want)
}

// stream is an established connection to one server.
type stream struct {
	server string
	lines  *bufio.Reader
	close  func() error
}

// stream opens one to the server s.
func (c *cluster) stream(s *standIn) *stream {
	c.t.Helper()
	for range 1000 {
		client := c.client()
		client.Timeout = 0
		resp, err := client.Get("https://" + c.listener.Addr().String() + "/stream")
		if err != nil {
			c.t.Fatal(err)
		}
		st := &stream{lines: bufio.NewReader(resp.Body), close: resp.Body.Close}
		if st.server, err = st.line(); err != nil {
			c.t.Fatal(err)
		}
		if st.server == s.address {
			c.t.Cleanup(func() { st.close() })
			return st
		}
		st.close()
	}
	c.t.Fatalf("no connection goes to %s", s.address)
	return nil
}

func (s *stream) line() (string, error) {
	l, err := s.lines.ReadString('\n')
	if err != nil {
		return "", err
	}
	return l[:len(l)-1], nil
}

// ends reads until the connection has ended; nothing else ends it than the proxy or its server.
func (s *stream) ends() {
	for {
		if _, err := s.line(); err != nil {
			return
		}
	}
}

// failedSeeds are those with which a test of this package ever failed; they always run.
var failedSeeds []int64

// withSeeds runs a random test once for each seed that ever failed, and once with that of
// MICROK8S_TEST_SEED, or with a new one; the subtest's name is the seed.
func withSeeds(t *testing.T, test func(t *testing.T, rnd *rand.Rand)) {
	n := time.Now().UnixNano()
	if s := os.Getenv("MICROK8S_TEST_SEED"); s != "" {
		var err error
		if n, err = strconv.ParseInt(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range append(append([]int64(nil), failedSeeds...), n) {
		t.Run(fmt.Sprintf("seed-%d", n), func(t *testing.T) { test(t, rand.New(rand.NewPCG(uint64(n), 0))) })
	}
}

// handshake makes one TLS connection.
func (c *cluster) handshake() (*tls.Conn, error) {
	d := tls.Dialer{Config: &tls.Config{RootCAs: c.ca, ServerName: "127.0.0.1"}}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	conn, err := d.DialContext(ctx, "tcp", c.listener.Addr().String())
	if err != nil {
		return nil, err
	}
	return conn.(*tls.Conn), nil
}

// waitLog waits until the proxy has logged something.
func (c *cluster) waitLog(text string) {
	c.t.Helper()
	for limit := time.Now().Add(time.Minute); time.Now().Before(limit); time.Sleep(5 * time.Millisecond) {
		if strings.Contains(c.log.String(), text) {
			return
		}
	}
	c.t.Fatalf("the log never says %q", text)
}
