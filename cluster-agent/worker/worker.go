// Package worker keeps what the control plane gave to a worker: its two certificates, which it
// renews ten days before they end, or later when it was away, or when the node has another address, and its callback secret, which changes
// when a node is removed. It asks an agent of the control plane and shows its kubelet's certificate.
//
// The list of API servers is the business of the API server proxy.
package worker

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"microk8s/apiserver-proxy/config"
	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/callback"
	"microk8s/cluster-agent/client"
	"microk8s/internal/atomicfile"
	"microk8s/internal/backoff"
	"microk8s/internal/certs"
	"microk8s/internal/filewatch"
	"microk8s/internal/hostinfo"
	"microk8s/internal/kubeconfig"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/pki"
	"microk8s/internal/service"
	"microk8s/internal/snapenv"
)

const (
	firstRetry  = 10 * time.Second // after a failure, then twice as long each time
	lastRetry   = 5 * time.Minute  // up to this; a node that just joins is known to the cluster soon
	unconfirmed = time.Minute      // after the control plane said that the join is not confirmed
	longest     = time.Hour        // between two looks: a secret may have changed while this node was cut off
	callTimeout = 30 * time.Second // of one control-plane node
	pause       = 5 * time.Second  // between two questions about the callback secret
)

// Controller is the loop of one worker. Set the first four fields.
type Controller struct {
	Env     snapenv.Env
	Node    string // its name
	Restart func(ctx context.Context, names ...string) error
	Log     *slog.Logger

	Addresses func() ([]net.IP, error) // of this host; nil means the kernel's

	Servers func() ([]string, error) // host:port of control-plane agents; nil means from provider.yaml
	Now     func() time.Time

	mu   sync.Mutex
	idle time.Time // when it asked last without need
	last []string
}

func (k *Controller) now() time.Time {
	if k.Now != nil {
		return k.Now()
	}
	return time.Now()
}

// Run looks at once, then whenever something becomes due or the node gets another address, until ctx ends.
func (k *Controller) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	retries := backoff.New(firstRetry, lastRetry)
	match, folders := filewatch.Files(k.Env.Args(nodeconfig.Kubelet)) // its address is there
	changed, err := filewatch.Watch(ctx, filewatch.Options{Settle: time.Second, Match: match, Missing: true}, folders...)
	if err != nil {
		k.Log.Warn("another address of this node is noticed late", "err", err)
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case _, open := <-changed:
			if !open {
				changed = nil
				continue
			}
		}
		next, err := k.Look(ctx)
		if err != nil && ctx.Err() == nil {
			next = retries.Step()
			k.Log.Warn("cannot renew what the control plane gave to this node; trying again", "err", err, "retry_in", next)
		} else {
			retries = backoff.New(firstRetry, lastRetry)
		}
		timer.Reset(next)
	}
}

// pair is one of the two certificates.
type pair struct {
	name, user string
	org        []string
	names      bool // it serves under the node's name and addresses
}

func (k *Controller) pairs() []pair {
	return []pair{
		{name: "kubelet", user: "system:node:" + k.Node, org: []string{"system:nodes"}, names: true},
		{name: "proxy", user: "system:kube-proxy"},
	}
}

// Look renews what is due and says when to look again.
func (k *Controller) Look(ctx context.Context) (time.Duration, error) {
	next := longest
	req := api.RenewRequest{Secrets: 2}
	due := false
	var moved net.IP
	for _, p := range k.pairs() {
		data, err := os.ReadFile(k.Env.Cert(p.name + ".crt"))
		if err != nil {
			return 0, fmt.Errorf("cannot read a certificate of this worker: %w", err)
		}
		cert, err := pki.ParseCert(data)
		if err != nil {
			return 0, fmt.Errorf("cannot read %s: %w", k.Env.Cert(p.name+".crt"), err)
		}
		wait := pki.RenewalTime(cert).Sub(k.now())
		if p.names && wait > 0 {
			moved = k.moved(cert)
		}
		if wait > 0 && (moved == nil || !p.names) {
			next = min(next, wait)
			continue
		}
		text, err := k.request(p)
		if err != nil {
			return 0, err
		}
		due = true
		if p.name == "kubelet" {
			req.Kubelet = text
		} else {
			req.Proxy = text
		}
	}
	answer, err := k.ask(ctx, req)
	if errors.Is(err, ErrUpstream) && !due {
		return next, nil
	}
	if err != nil {
		return 0, err
	}
	if answer.CallbackToken == "" { // the join is not confirmed yet
		next = min(next, unconfirmed)
	} else if err := callback.Store(k.Env, answer.CallbackToken); err != nil {
		return 0, err
	}
	for _, reason := range answer.Refused {
		k.Log.Warn("the control plane left something out of the certificate of this node", "reason", reason)
	}
	if !due {
		return next, nil
	}
	if moved != nil && answer.Proxy == "" && !serves(answer.Kubelet, moved) {
		k.Log.Warn("the control plane leaves this node's address out of its certificate", "address", moved.String())
		return next, nil // a restart would change nothing
	}
	for _, one := range []struct{ name, text string }{{"kubelet", answer.Kubelet}, {"proxy", answer.Proxy}} {
		if one.text == "" {
			continue
		}
		if err := k.install(one.name, []byte(one.text), nil); err != nil {
			return 0, err
		}
		k.Log.Info("renewed a certificate", "name", one.name)
	}
	return next, k.Restart(ctx, service.Kubelite)
}

// moved returns the node's own address where its kubelet's certificate does not have it, because the node got another one
// since; nil where it has.
func (k *Controller) moved(cert *x509.Certificate) net.IP {
	chosen := nodeconfig.Load(k.Env).NodeIPs
	own, err := k.addresses()
	if err != nil || len(chosen) == 0 {
		return nil
	}
	address := net.IP(chosen[0].AsSlice())
	if !slices.ContainsFunc(own, address.Equal) || slices.ContainsFunc(cert.IPAddresses, address.Equal) {
		return nil
	}
	return address
}

// serves reports whether a certificate, in PEM, is for an address.
func serves(text string, address net.IP) bool {
	cert, err := pki.ParseCert([]byte(text))
	return err == nil && slices.ContainsFunc(cert.IPAddresses, address.Equal)
}

func (k *Controller) addresses() ([]net.IP, error) {
	if k.Addresses == nil {
		return hostinfo.Addresses()
	}
	return k.Addresses()
}

// request makes a certificate request with the key that the node has, for the addresses that the
// host has now.
func (k *Controller) request(p pair) (string, error) {
	data, err := os.ReadFile(k.Env.Cert(p.name + ".key"))
	if err != nil {
		return "", fmt.Errorf("cannot renew %s.crt: %w", p.name, err)
	}
	key, err := pki.ParseKey(data)
	if err != nil {
		return "", fmt.Errorf("cannot renew %s.crt: %w", p.name, err)
	}
	return k.requestWith(p, key)
}

func (k *Controller) requestWith(p pair, key *rsa.PrivateKey) (string, error) {
	template := &x509.CertificateRequest{Subject: pkix.Name{CommonName: p.user, Organization: p.org}}
	if p.names {
		template.DNSNames = []string{k.Node}
		var err error
		if template.IPAddresses, err = k.addresses(); err != nil {
			return "", err
		}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		return "", fmt.Errorf("cannot renew %s.crt: %w", p.name, err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), nil
}

// install puts a certificate into its file, and into the kubeconfig that holds it, with its key where that is a
// new one. What was there before is replaced only by one that fits its key.
func (k *Controller) install(name string, text, keyText []byte) error {
	fresh := keyText != nil
	if !fresh {
		var err error
		if keyText, err = os.ReadFile(k.Env.Cert(name + ".key")); err != nil {
			return err
		}
	}
	if _, err := tls.X509KeyPair(text, keyText); err != nil {
		return fmt.Errorf("the control plane answered with a certificate that does not fit %s.key: %w", name, err)
	}
	path := k.Env.Credential(name + ".config")
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	config, err := kubeconfig.Decode(data)
	if err != nil {
		return err
	}
	config.Cert, config.Key = text, keyText
	out, err := config.Encode()
	if err != nil {
		return err
	}
	if fresh {
		return certs.ReplacePair(k.Env, name, text, keyText, out)
	}
	if err := replace(path, out); err != nil {
		return err
	}
	return replace(k.Env.Cert(name+".crt"), text)
}

// replace keeps the mode of the file.
func replace(path string, data []byte) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	return atomicfile.Write(path, data, st.Mode().Perm(), nil)
}

// Change makes new keys in place of those with the IDs in a change of certificates, and has the control plane
// sign them. It may be repeated: what is replaced has another ID. The caller restarts the services.
func (k *Controller) Change(ctx context.Context, change api.CertificateChange) error {
	if change.FrontProxy != "" || change.SigningKeys != "" || change.DatastoreCert != "" {
		return errors.New("this node is a worker: it has no front proxy and no datastore, and signs no tokens")
	}
	if err := certs.Finish(k.Env); err != nil {
		return err
	}
	req := api.RenewRequest{Secrets: 2}
	keys := map[string]*rsa.PrivateKey{}
	for _, p := range k.pairs() {
		text, err := os.ReadFile(k.Env.Cert(p.name + ".crt"))
		if err != nil {
			return fmt.Errorf("cannot read a certificate of this worker: %w", err)
		}
		cert, err := pki.ParseCert(text)
		if err != nil {
			return fmt.Errorf("cannot read %s: %w", k.Env.Cert(p.name+".crt"), err)
		}
		if !slices.Contains(change.Leaves, certs.KeyID(cert.PublicKey)) {
			continue
		}
		key, err := pki.Maker{}.Key(2048)
		if err != nil {
			return err
		}
		if text, err := k.requestWith(p, key); err != nil {
			return err
		} else if p.name == "kubelet" {
			req.Kubelet = text
		} else {
			req.Proxy = text
		}
		keys[p.name] = key
	}
	if len(keys) == 0 {
		return nil
	}
	answer, err := k.ask(ctx, req)
	if err != nil {
		return err
	}
	for _, one := range []struct{ name, text string }{{"proxy", answer.Proxy}, {"kubelet", answer.Kubelet}} {
		key := keys[one.name]
		if key == nil {
			continue
		}
		if one.text == "" {
			return fmt.Errorf("the control plane did not sign %s.crt", one.name)
		}
		if err := k.install(one.name, []byte(one.text), pki.EncodeKey(key)); err != nil {
			return err
		}
		k.Log.Info("replaced a certificate and its key", "name", one.name)
	}
	return nil
}

// Callback asks the control plane for the callback secrets that this node takes: its own and, where
// there are control-plane nodes of the build before, theirs. After a question that was none, because
// the secret had not changed, it asks for a few seconds no more, and returns what it was told last:
// who shows wrong secrets cannot have the control plane asked at will. A secret that did change may
// change again at once.
func (k *Controller) Callback(ctx context.Context) ([]string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.now().Sub(k.idle) < pause {
		return k.last, nil
	}
	answer, err := k.ask(ctx, api.RenewRequest{Secrets: 2})
	if err != nil {
		k.idle = k.now()
		return nil, err
	}
	told := []string{answer.CallbackToken, answer.LegacyCallback}
	if slices.Equal(told, k.last) {
		k.idle = k.now()
	}
	k.last = told
	if answer.CallbackToken == "" {
		return told, nil
	}
	return told, callback.Store(k.Env, answer.CallbackToken)
}

// caFile is the CA of the cluster: a worker keeps its own beside it.
func (k *Controller) caFile() string {
	remote := k.Env.Cert("ca.remote.crt")
	if _, err := os.Stat(remote); err == nil {
		return remote
	}
	return k.Env.Cert("ca.crt")
}

// ErrUpstream is returned where the control plane is upstream's and does not renew.
var ErrUpstream = errors.New("the control plane does not renew certificates; join again before they end")

// ask tries one control-plane node after the other. One of this build is preferred to one of the build
// before, which knows other secrets and refuses a request as a whole.
func (k *Controller) ask(ctx context.Context, req api.RenewRequest) (*api.RenewResponse, error) {
	list := k.Servers
	if list == nil {
		list = k.provider
	}
	servers, err := list()
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(k.caFile())
	if err != nil {
		return nil, fmt.Errorf("cannot ask the control plane: %w", err)
	}
	own, err := tls.LoadX509KeyPair(k.Env.Cert("kubelet.crt"), k.Env.Cert("kubelet.key"))
	if err != nil {
		return nil, fmt.Errorf("cannot ask the control plane: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	transport := &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{own}, MinVersion: tls.VersionTLS12},
	}
	defer transport.CloseIdleConnections()
	errs := []error{errors.New("cannot ask the control plane")}
	if req.Kubelet+req.Proxy != "" {
		present := func(address string) bool {
			answer, err := renew(ctx, transport, address, api.RenewRequest{Secrets: req.Secrets})
			return err == nil && answer.Secrets >= 2
		}
		if i := slices.IndexFunc(servers, present); i > 0 {
			servers = slices.Concat(servers[i:], servers[:i])
		}
	}
	var earlier *api.RenewResponse
	for _, address := range servers {
		answer, err := renew(ctx, transport, address, req)
		if err == nil && (answer.Secrets >= 2 || answer.Kubelet+answer.Proxy != "") {
			return answer, nil
		}
		if err == nil {
			earlier = answer
			continue
		}
		errs = append(errs, fmt.Errorf("%s: %w", address, err))
	}
	if earlier != nil {
		return earlier, nil
	}
	return nil, errors.Join(errs...)
}

func renew(ctx context.Context, over http.RoundTripper, address string, req api.RenewRequest) (*api.RenewResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var answer api.RenewResponse
	err := client.Ask(ctx, over, address, api.PathRenew, req, &answer)
	var refused *client.ServerError
	if errors.As(err, &refused) && refused.Status == http.StatusNotFound {
		return nil, ErrUpstream
	}
	return &answer, err
}

// provider reads the API servers' hosts from the proxy's configuration; their agents have the
// port of this node's.
func (k *Controller) provider() ([]string, error) {
	path, err := config.ProviderFile(k.Env)
	if err != nil {
		return nil, fmt.Errorf("cannot find the control plane: %w", err)
	}
	servers, err := config.ReadProvider(path)
	if err != nil { // the proxy goes on with the list that it could use last
		var lastErr error
		if servers, lastErr = config.ReadProvider(config.LastGood(path)); lastErr != nil {
			return nil, fmt.Errorf("cannot find the control plane: %w", err)
		}
	}
	port := strconv.Itoa(nodeconfig.Load(k.Env).AgentPort)
	var out []string
	for _, s := range servers {
		if host, _, err := net.SplitHostPort(s); err == nil {
			out = append(out, net.JoinHostPort(host, port))
		}
	}
	return out, nil
}
