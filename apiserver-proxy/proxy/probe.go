package proxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"syscall"
	"time"

	"k8s.io/client-go/tools/clientcmd"
)

// Verdict is what a check has found out about a server. The zero value is of one that was not
// checked yet, and is taken to be well.
type Verdict struct {
	kind kind
	why  string
}

type kind int

const (
	unknownKind kind = iota
	wellKind
	// The server says that it cannot work, such as without its datastore.
	failingKind
	// It says that it is shutting down: what it has begun it ends by itself.
	drainingKind
	// Its machine answers, and nothing listens there.
	refusingKind
	// Nothing answers: frozen, cut off, or without power. Connections to it are ended after the
	// second such check.
	silentKind
	// Something answers that has not the cluster's certificate. Established connections have
	// been checked by their clients and stay.
	foreignKind
)

func (v Verdict) usable() bool   { return v.kind == unknownKind || v.kind == wellKind }
func (v Verdict) String() string { return v.why }

// verdictOf makes a verdict of an error of a connection.
func verdictOf(err error) Verdict {
	var unknownAuthority x509.UnknownAuthorityError
	var wrongHost x509.HostnameError
	var invalid x509.CertificateInvalidError
	var timeout net.Error
	switch {
	case errors.As(err, &unknownAuthority), errors.As(err, &wrongHost), errors.As(err, &invalid):
		return Verdict{foreignKind, "it is no API server of this cluster: " + err.Error()}
	case errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, context.DeadlineExceeded),
		errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return Verdict{silentKind, "it does not answer: " + err.Error()}
	}
	return Verdict{refusingKind, err.Error()}
}

// Prober checks servers.
type Prober interface {
	// Session begins the checks of one server (host:port).
	Session(address string) Session
}

// Session is the checks of one server, one at a time.
type Session interface {
	// Probe checks; the end of ctx is the time limit of one check.
	Probe(ctx context.Context) Verdict
	Close()
}

// connectProber finds a server well that accepts connections.
type connectProber struct{}

func (connectProber) Session(address string) Session { return connectSession(address) }

type connectSession string

func (a connectSession) Probe(ctx context.Context) Verdict {
	conn, err := dialer.DialContext(ctx, "tcp", string(a))
	if err != nil {
		return verdictOf(err)
	}
	conn.Close()
	return Verdict{kind: wellKind}
}

func (connectSession) Close() {}

// ReadyProber asks the API servers for /readyz over TLS, with the cluster's CA and this node's
// credentials, both from a kubeconfig that is read again when it was replaced. The certificate
// must be good for the name under which clients reach the proxy, since it is they who see it.
// While the kubeconfig cannot be used a server is well that accepts connections.
type ReadyProber struct {
	kubeconfig string
	complain   func(error)

	mu     sync.Mutex
	loaded os.FileInfo
	config *tls.Config // nil as long as the file could not be used
	told   string      // the reason that was complained of last
}

// NewReadyProber makes one for a kubeconfig. complain is called when the file cannot be used,
// once for each reason.
func NewReadyProber(kubeconfig string, complain func(error)) *ReadyProber {
	return &ReadyProber{kubeconfig: kubeconfig, complain: complain}
}

// tls returns the configuration of now: the same pointer as long as the file is the same, that of
// before when the file cannot be used, nil when there was none.
func (p *ReadyProber) tls() *tls.Config {
	p.mu.Lock()
	defer p.mu.Unlock()
	st, err := os.Stat(p.kubeconfig)
	if err == nil && p.loaded != nil && os.SameFile(st, p.loaded) && st.ModTime().Equal(p.loaded.ModTime()) && st.Size() == p.loaded.Size() {
		return p.config
	}
	p.loaded = st
	config, err := loadTLS(p.kubeconfig)
	if err != nil {
		if err.Error() != p.told {
			p.told = err.Error()
			p.complain(err)
		}
		return p.config
	}
	p.config, p.told = config, ""
	return config
}

func loadTLS(kubeconfig string) (*tls.Config, error) {
	rc, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("cannot use %s for health checks: %w", kubeconfig, err)
	}
	u, err := url.Parse(rc.Host)
	if err != nil {
		return nil, fmt.Errorf("cannot use %s for health checks: %w", kubeconfig, err)
	}
	ca, pair := rc.CAData, tls.Certificate{}
	if rc.CAFile != "" {
		if ca, err = os.ReadFile(rc.CAFile); err != nil {
			return nil, fmt.Errorf("cannot use %s for health checks: %w", kubeconfig, err)
		}
	}
	config := &tls.Config{ServerName: u.Hostname(), MinVersion: tls.VersionTLS12, RootCAs: x509.NewCertPool()}
	if rc.ServerName != "" {
		config.ServerName = rc.ServerName
	}
	if !config.RootCAs.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("cannot use %s for health checks: it has no certificate authority", kubeconfig)
	}
	switch {
	case rc.CertFile != "":
		pair, err = tls.LoadX509KeyPair(rc.CertFile, rc.KeyFile)
	case len(rc.CertData) > 0:
		pair, err = tls.X509KeyPair(rc.CertData, rc.KeyData)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot use %s for health checks: %w", kubeconfig, err)
	}
	if pair.Certificate != nil {
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

// Session implements [Prober].
func (p *ReadyProber) Session(address string) Session { return &readySession{p: p, address: address} }

type readySession struct {
	p         *ReadyProber
	address   string
	transport *http.Transport
	config    *tls.Config // that transport was made of
}

// maxReadyz bounds what is read of an answer: a line for each check of the server.
const maxReadyz = 64 << 10

// shuttingDown is in the answer of an API server that is about to end.
var shuttingDown = []byte("[-]shutdown failed")

// probeDialer has limits of its own: a dial of the transport goes on when its request has ended.
var probeDialer = net.Dialer{Timeout: 3 * time.Second, KeepAliveConfig: keepAlive, Control: dialer.Control}

func (r *readySession) Probe(ctx context.Context) Verdict {
	config := r.p.tls()
	if config == nil {
		return connectSession(r.address).Probe(ctx)
	}
	if r.transport == nil || r.config != config {
		r.Close()
		r.config = config
		// HTTP/1.1: a check without an answer then takes its connection with it, and the next
		// one finds out whether a new one works. As long as all is well one is kept.
		r.transport = &http.Transport{
			DialContext: probeDialer.DialContext, TLSClientConfig: config.Clone(), TLSHandshakeTimeout: probeDialer.Timeout,
			MaxIdleConns: 1, IdleConnTimeout: time.Minute, MaxResponseHeaderBytes: maxReadyz,
		}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+r.address+"/readyz", nil)
	if err != nil {
		return Verdict{refusingKind, err.Error()}
	}
	req.Header.Set("User-Agent", "microk8s-apiserver-proxy")
	resp, err := r.transport.RoundTrip(req)
	if err != nil {
		return verdictOf(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxReadyz))
	if err != nil {
		return verdictOf(err)
	}
	switch {
	case resp.StatusCode == http.StatusOK,
		// It answers, and does not say to everybody how it is.
		resp.StatusCode == http.StatusUnauthorized, resp.StatusCode == http.StatusForbidden, resp.StatusCode == http.StatusNotFound:
		return Verdict{kind: wellKind}
	case bytes.Contains(body, shuttingDown):
		return Verdict{drainingKind, "it is shutting down"}
	}
	return Verdict{failingKind, "it is not ready: " + resp.Status}
}

func (r *readySession) Close() {
	if r.transport != nil {
		r.transport.CloseIdleConnections()
		r.transport = nil
	}
}
