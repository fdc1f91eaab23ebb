// Package fanout makes the calls from a control-plane node to all nodes of its cluster: change
// arguments, restart services, import an image. The client of a join is
// cluster-agent/client.
//
// A call goes on after a node that does not answer and says so in that node's Result. Changes of
// arguments are kept for such a node, which a [Controller] tells when it is back. The
// peer's certificate must be of the cluster's CA and name the node or its address; only then are
// the node's callback secret and this node's certificate for such calls sent.
package fanout

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/callback"
	"microk8s/cluster-agent/client"
	"microk8s/internal/hostinfo"
	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/noderegistry"
	"microk8s/internal/snapenv"
)

const (
	atOnce      = 8                // nodes that are called at the same time
	dialTimeout = 5 * time.Second  // of a connection to a node
	callTimeout = 4 * time.Minute  // of a call that is not an import; the agents' own is as long
	importLimit = 60 * time.Minute // of the import of one image
)

// Target is one node's agent.
type Target struct {
	Name    string // of the node
	Address string // host:port of its agent
}

// Result is how a call to one node ended.
type Result struct {
	Target
	Err error // nil when the node did what it was asked
	// Later the node was not reached; it is called again once it is reachable.
	Later bool
	// Imported is what [Cluster.ImportImage] brought to the node, as it says; an agent of
	// another product says nothing.
	Imported api.ImportResponse
}

// Failed returns one error for all nodes that failed, or nil.
func Failed(results []Result) error {
	var errs []error
	for _, r := range results {
		if r.Err != nil {
			errs = append(errs, fmt.Errorf("node %s (%s): %w", r.Name, r.Address, r.Err))
		}
	}
	return errors.Join(errs...)
}

// Cluster calls the nodes of this node's cluster. It needs the administrator's kubeconfig,
// which control-plane nodes have. Set Env; the other fields are for tests.
type Cluster struct {
	Env  snapenv.Env
	Core func() (*kube.Core, error)
	Port string // of all agents; "" means that of args/cluster-agent
	// RenewWaits are the pauses of RenewSecrets; nil means one and five seconds.
	RenewWaits []time.Duration
	// ReadyTimeout is how long an API server may take to come back; 0 means two minutes.
	ReadyTimeout time.Duration
	// Silence is how long an agent that imports an image may not answer; 0 means half a minute.
	Silence time.Duration
}

func (c *Cluster) core() (*kube.Core, error) {
	if c.Core != nil {
		return c.Core()
	}
	return kube.FromFile(c.Env.AdminKubeconfig())
}

// Targets lists the agents of all nodes, this one included, by name.
func (c *Cluster) Targets(ctx context.Context) ([]Target, error) {
	core, err := c.core()
	if err != nil {
		return nil, err
	}
	nodes, err := core.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	port := c.Port
	if port == "" {
		port = strconv.Itoa(nodeconfig.Load(c.Env).AgentPort)
	}
	var out []Target
	for _, n := range nodes {
		t := Target{Name: n.Name}
		for _, a := range n.Status.Addresses {
			if a.Type == corev1.NodeInternalIP {
				t.Address = net.JoinHostPort(a.Address, port)
				break
			}
		}
		out = append(out, t)
	}
	return out, nil
}

// Configure asks every node for the same: argument changes, then restarts. names limits it to
// some nodes; none means all. Where services are restarted it goes from node to node and waits
// for each node's API server, so that one of them always answers; when one does not come back
// the other nodes are left as they are. A node that is not reached is asked when it is back, and
// each node is also asked for what it has missed. The error is for what stops
// the whole call; see [Failed] for the nodes'.
func (c *Cluster) Configure(ctx context.Context, req api.ConfigureRequest, names ...string) ([]Result, error) {
	missed, err := c.late(ctx)
	if err != nil {
		return nil, err
	}
	rolling := restarts(req)
	for _, l := range missed {
		rolling = rolling || restarts(l.Request)
	}
	width := atOnce
	if rolling {
		width = 1
	}
	var stopped error // only in a rolling call, which is one after the other
	results, err := c.each(ctx, callTimeout, width, names, func(ctx context.Context, http *http.Client, t Target, secret string) error {
		if stopped != nil {
			return stopped
		}
		mine := req
		if l := missed[t.Name]; !l.empty() {
			mine = merge(l.Request, req)
		}
		mine.Callback = secret
		body, err := json.Marshal(mine)
		if err != nil {
			return err
		}
		if !restarts(mine) {
			_, err := post(ctx, http, t, api.PathConfigure, "", bytes.NewReader(body))
			return err
		}
		server := c.apiServer(t)
		served := ready(ctx, http, server)
		if _, err := post(ctx, http, t, api.PathConfigure, "", bytes.NewReader(body)); err != nil || !served {
			return err
		}
		if err := c.waitReady(ctx, http, server); err != nil {
			stopped = fmt.Errorf("it was left as it is, because %s did not come back", t.Name)
			return err
		}
		return nil
	})
	for i := range results {
		c.told(ctx, &results[i], missed[results[i].Name], req)
	}
	return results, err
}

// Encryption hands the named control-plane nodes their keys of encryption at rest and restarts the API
// server of each.
func (c *Cluster) Encryption(ctx context.Context, content string, names ...string) error {
	return c.Roll(ctx, api.ConfigureRequest{Encryption: content, Services: []api.ConfigureService{{Name: "kube-apiserver", Restart: true}}}, names...)
}

// Roll asks the named nodes for the same, one after the other, and waits for the API server of each that is
// restarted, so that one of them always answers. It stops at the first node that fails: the others keep what
// they have. Nothing is kept for a node that is not reached, because keys are not written down where
// they could be read.
func (c *Cluster) Roll(ctx context.Context, req api.ConfigureRequest, names ...string) error {
	var stopped error
	results, err := c.each(ctx, callTimeout, 1, names, func(ctx context.Context, http *http.Client, t Target, secret string) error {
		if stopped != nil {
			return stopped
		}
		mine := req
		mine.Callback = secret
		body, err := json.Marshal(mine)
		server := c.apiServer(t)
		served := err == nil && restarts(req) && (req.Encryption != "" || ready(ctx, http, server))
		if err == nil {
			_, err = post(ctx, http, t, api.PathConfigure, "", bytes.NewReader(body))
		}
		if err == nil && served {
			err = c.waitReady(ctx, http, server)
		}
		if err != nil {
			stopped = fmt.Errorf("it was left as it is, because of %s", t.Name)
		}
		return err
	})
	if err != nil {
		return err
	}
	if len(results) != len(names) {
		return fmt.Errorf("of %s only %d are nodes of the cluster", strings.Join(names, ", "), len(results))
	}
	return Failed(results)
}

// restarts reports whether a request restarts a service.
func restarts(req api.ConfigureRequest) bool {
	return slices.ContainsFunc(req.Services, func(s api.ConfigureService) bool { return bool(s.Restart) })
}

// RenewSecrets changes the salt of callback secrets and shows every node its new one. A worker
// that sees a secret that it does not know asks the control plane for its own; from then on
// the old one is refused. A node that was reached and refused is shown it again, since it may have
// been asked by others just now. The nodes whose Err is not nil still take the old one: those that
// cannot be reached until an hour after they come back, those of upstream's for ever. It is for when
// a node was removed that may know secrets of others.
func (c *Cluster) RenewSecrets(ctx context.Context) ([]Result, error) {
	if err := (callback.Keys{Env: c.Env, Core: c.core}).Rotate(ctx); err != nil {
		return nil, err
	}
	results, err := c.Configure(ctx, api.ConfigureRequest{})
	for _, wait := range c.renewWaits() {
		var again []string
		for _, r := range results {
			if errors.Is(r.Err, errSecret) {
				again = append(again, r.Name)
			}
		}
		if err != nil || len(again) == 0 {
			break
		}
		select {
		case <-ctx.Done():
			return results, ctx.Err()
		case <-time.After(wait):
		}
		var second []Result
		if second, err = c.Configure(ctx, api.ConfigureRequest{}, again...); err != nil {
			return results, err
		}
		for _, r := range second {
			if i := slices.IndexFunc(results, func(o Result) bool { return o.Name == r.Name }); i >= 0 {
				results[i] = r
			}
		}
	}
	return results, err
}

// renewWaits are the pauses before a node that refused its new secret is shown it again. A worker
// that was shown wrong ones asks the control plane again after five seconds.
func (c *Cluster) renewWaits() []time.Duration {
	if c.RenewWaits != nil {
		return c.RenewWaits
	}
	return []time.Duration{time.Second, 5 * time.Second}
}

// SetArgument sets one option of an argument file on all nodes and restarts its service, for
// example ("kubelet", "--cluster-dns", "10.152.183.10"). An empty value removes the option.
func (c *Cluster) SetArgument(ctx context.Context, service, option, value string) ([]Result, error) {
	s := api.ConfigureService{Name: service, Restart: true}
	if value == "" {
		s.Remove = []string{option}
	} else {
		s.Update = []map[string]string{{option: value}}
	}
	return c.Configure(ctx, api.ConfigureRequest{Services: []api.ConfigureService{s}})
}

// ImportImage sends an OCI or docker archive to the containerd of every node, this one
// included. open is called once for each node; the archive is streamed. names limits it to some nodes; none means all. A node whose agent stops to
// answer questions about its health meanwhile has a [SilentError].
func (c *Cluster) ImportImage(ctx context.Context, open func() (io.ReadCloser, error), names ...string) ([]Result, error) {
	var mu sync.Mutex
	answers := map[Target]api.ImportResponse{}
	results, err := c.each(ctx, importLimit, atOnce, names, func(ctx context.Context, http *http.Client, t Target, secret string) error {
		archive, err := open()
		if err != nil {
			return err
		}
		defer archive.Close()
		ctx, done := attend(ctx, http, t, cmp.Or(c.Silence, silence))
		defer done()
		answer, err := post(ctx, http, t, api.PathImageImport, secret, archive)
		if silent, ok := context.Cause(ctx).(*SilentError); ok && err != nil { //nolint:errorlint // it is the cause itself
			return unreached{silent}
		}
		if err != nil {
			return err
		}
		var said api.ImportResponse
		if err := json.Unmarshal(answer, &said); err != nil {
			return fmt.Errorf("cannot read the answer of its cluster agent: %w", err)
		}
		mu.Lock()
		defer mu.Unlock()
		answers[t] = said
		return nil
	})
	for i := range results {
		results[i].Imported = answers[results[i].Target]
	}
	return results, err
}

// silence is how long an agent may leave a question about its health without an answer.
const silence = 30 * time.Second

// SilentError is the error of an import whose agent stopped to answer. A frozen one still accepts
// connections, and an import may rightly take minutes.
type SilentError struct {
	Address string // host:port of the agent
	Wait    time.Duration
}

func (e *SilentError) Error() string {
	return fmt.Sprintf("its cluster agent at %s did not answer within %s; see on that node: microk8s status, and microk8s logs cluster-agent", e.Address, e.Wait)
}

// attend returns a context that is cancelled, with a *SilentError as its cause, when an agent stops
// to answer. done ends that.
func attend(ctx context.Context, client *http.Client, t Target, limit time.Duration) (_ context.Context, done func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	var asking sync.WaitGroup
	asking.Go(func() {
		for ctx.Err() == nil {
			if !answers(ctx, client, t, limit) && ctx.Err() == nil {
				cancel(&SilentError{t.Address, limit})
			}
			select {
			case <-ctx.Done():
			case <-time.After(limit / 3):
			}
		}
	})
	return ctx, func() {
		cancel(nil)
		asking.Wait()
	}
}

// answers reports whether an agent answers at all within a limit. One that is not there is not
// silent: the call says so.
func answers(ctx context.Context, client *http.Client, t Target, limit time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+t.Address+api.PathHealth, nil)
		if err != nil {
			return false
		}
		resp, err := client.Do(req)
		if err == nil {
			resp.Body.Close()
			return true
		}
		var timeout net.Error
		if !errors.As(err, &timeout) || !timeout.Timeout() {
			return true
		}
		if ctx.Err() != nil {
			return false
		}
	}
}

// apiServer is where a node's API server answers, if it has one.
func (c *Cluster) apiServer(t Target) string {
	port := strconv.Itoa(nodeconfig.Load(c.Env).APIServer.Port)
	host, _, _ := net.SplitHostPort(t.Address)
	return "https://" + net.JoinHostPort(host, port) + "/readyz"
}

// ready asks an API server, or finds none.
func ready(ctx context.Context, client *http.Client, url string) bool {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return false
	}
	resp, err := client.Do(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

const readyTimeout = 2 * time.Minute

// waitReady waits for an API server that was restarted. It cannot be watched from outside.
func (c *Cluster) waitReady(ctx context.Context, client *http.Client, url string) error {
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(c.ReadyTimeout, readyTimeout))
	defer cancel()
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	for !ready(ctx, client, url) {
		select {
		case <-ctx.Done():
			return fmt.Errorf("its API server did not come back: %w", ctx.Err())
		case <-tick.C:
		}
	}
	return nil
}

// each calls every node, some at a time, and returns the results in the order of the targets.
func (c *Cluster) each(ctx context.Context, limit time.Duration, width int, names []string, call func(context.Context, *http.Client, Target, string) error) ([]Result, error) {
	targets, err := c.Targets(ctx)
	if err != nil {
		return nil, err
	}
	if len(names) > 0 {
		targets = slices.DeleteFunc(targets, func(t Target) bool { return !slices.Contains(names, t.Name) })
	}
	key, err := callback.Keys{Env: c.Env, Core: c.core}.Get(ctx)
	if err != nil {
		return nil, err
	}
	registry := noderegistry.Registry{Core: c.core}
	list, err := registry.List(ctx)
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(c.Env.Cert("ca.crt"))
	if err != nil {
		return nil, fmt.Errorf("cannot call the other nodes: %w", err)
	}
	own, err := nodeconfig.NodeName(c.Env, hostinfo.Hostname)
	if err != nil {
		return nil, err
	}
	pair, err := callback.Caller(c.Env, own)
	if err != nil {
		return nil, fmt.Errorf("cannot call the other nodes: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	results := make([]Result, len(targets))
	var group errgroup.Group
	group.SetLimit(width)
	for i, t := range targets {
		results[i].Target = t
		group.Go(func() error {
			if t.Address == "" {
				results[i].Err = unreached{errors.New("it has no address")}
				return nil
			}
			ctx, cancel := context.WithTimeout(ctx, limit)
			defer cancel()
			transport := Transport(roots, t)
			transport.TLSClientConfig.Certificates = []tls.Certificate{pair}
			client := &http.Client{Transport: transport}
			defer client.CloseIdleConnections()
			results[i].Err = errUnregistered
			for _, secret := range secrets(key, list, t.Name) {
				results[i].Err = call(ctx, client, t, secret)
				if !errors.Is(results[i].Err, errSecret) {
					break
				}
			}
			return nil
		})
	}
	_ = group.Wait() // the functions give no errors
	return results, nil
}

var (
	errUnregistered = errors.New("it is not registered in this cluster: let it join again, or remove it with microk8s remove-node")
	errSecret       = errors.New("it does not take the secret of this cluster")
)

// secrets are those that a node may take, the likelier first. While control-plane nodes of the build
// before are in the cluster, a node has either the present one or theirs.
func secrets(key callback.Key, list []noderegistry.Record, name string) (out []string) {
	legacy := key.Legacy(name)
	i := slices.IndexFunc(list, func(r noderegistry.Record) bool { return r.Name == name })
	if i >= 0 {
		out = append(out, key.Secret(list[i]))
	}
	switch {
	case legacy == "":
	case i >= 0 && list[i].Secrets >= 2:
		out = append(out, legacy)
	default:
		out = append([]string{legacy}, out...)
	}
	return out
}

// Transport connects to one agent, and to nobody else: the certificate must be of the
// cluster's CA, and be that node's own or name the address that was dialled.
func Transport(roots *x509.CertPool, t Target) *http.Transport {
	host, _, _ := net.SplitHostPort(t.Address)
	return &http.Transport{
		DialContext:           (&net.Dialer{Timeout: dialTimeout}).DialContext,
		TLSHandshakeTimeout:   dialTimeout,
		ResponseHeaderTimeout: importLimit,
		TLSClientConfig: &tls.Config{
			MinVersion:         tls.VersionTLS12,
			InsecureSkipVerify: true, // the names are checked below, where a node's own counts too
			VerifyConnection: func(s tls.ConnectionState) error {
				return verify(s.PeerCertificates[0], roots, t.Name, host)
			},
		},
	}
}

func verify(cert *x509.Certificate, roots *x509.CertPool, node, host string) error {
	opts := x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	if _, err := cert.Verify(opts); err != nil {
		return fmt.Errorf("its certificate is not of this cluster: %w", err)
	}
	if cert.Subject.CommonName == "system:node:"+node || cert.VerifyHostname(host) == nil {
		return nil
	}
	return fmt.Errorf("its certificate is that of %s, not of the node %s", cert.Subject, node)
}

// post sends one call and returns its answer.
func post(ctx context.Context, over *http.Client, t Target, path, secret string, body io.Reader) ([]byte, error) {
	header := http.Header{}
	if secret != "" {
		header.Set(api.HeaderCallback, secret)
	}
	answer, err := client.Post(ctx, over.Transport, t.Address, path, header, body)
	var refused *client.ServerError
	switch {
	case err == nil:
		return answer, nil
	case !errors.As(err, &refused):
		return nil, unreached{fmt.Errorf("cannot reach its cluster agent: %w", err)}
	case refused.Code == api.CodeToken || refused.Code == "" && strings.EqualFold(refused.Text, "invalid token"):
		return nil, fmt.Errorf("%w (%d)", errSecret, refused.Status)
	}
	return nil, refused
}
