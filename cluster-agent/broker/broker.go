// Package broker lets machines into the cluster. It answers the calls of a joining node on a
// control-plane node: proof, preflight, join, the certificates of a worker, confirm and
// release, and later the renewal of what the node was given.
//
// A call first finds everything that speaks against it, then reserves the token, and only then
// changes anything. What a join changes here is the datastore's address, once, when the first
// member still listens on the loopback; nothing takes that back (ADR 10). A token for a
// node that was reinstalled also removes the dead member that it was before.
//
// Statuses and texts are upstream's (cluster-agent.md 3.3); what is said beside them is in the
// member `code` of an error. What one node is asked to do by others is in cluster-agent/node.
package broker

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/callback"
	"microk8s/cluster-agent/limit"
	"microk8s/cluster-agent/server"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/noderegistry"
	"microk8s/internal/pki"
	"microk8s/internal/snapenv"
	"microk8s/internal/token"
	"microk8s/internal/tokenstore"
)

// Cluster is what the API server knows.
type Cluster interface {
	Nodes(ctx context.Context) ([]corev1.Node, error)
	// APIServers returns the addresses of the API servers.
	APIServers(ctx context.Context) ([]netip.Addr, error)
	// CallbackKey returns the key of callback secrets, and makes it at the first call.
	CallbackKey(ctx context.Context) (callback.Key, error)
	// DeleteNode deletes the Node object that this one is; a missing one is in order.
	DeleteNode(ctx context.Context, n *corev1.Node) error
	// Namespace reports whether there is a namespace of that name.
	Namespace(ctx context.Context, name string) (bool, error)
}

// Restarter restarts services of this node.
type Restarter interface {
	Restart(ctx context.Context, names ...string) error
}

// Interface is one address of this host with its network.
type Interface = netip.Prefix

// Broker answers joining nodes. Set the fields before Register.
type Broker struct {
	Env      snapenv.Env
	Tokens   *tokenstore.Store
	Cluster  Cluster
	Nodes    noderegistry.Registry
	Services Restarter
	Limit    *limit.Limiter
	Log      *slog.Logger
	Version  string // of Kubernetes, such as v1.37.1
	Maker    pki.Maker

	// Live returns the datastore's members as its daemon knows them now. Remove takes one out, by its
	// ID: another one that has its address (host:port) meanwhile stays, see peers.RemoveID.
	Live   func(context.Context) ([]peers.Member, error)
	Remove func(ctx context.Context, id uint64, address string) error

	// Interfaces lists this host's addresses; nil means the kernel's.
	Interfaces func() ([]Interface, error)
	// Resolve looks up a host name; nil means the system's resolver.
	Resolve func(ctx context.Context, name string) ([]netip.Addr, error)
	// Reach connects to a joining node's agent; nil means TCP.
	Reach func(ctx context.Context, address string) error
	Now   func() time.Time

	moving sync.Mutex // the datastore's address
}

// Register adds the routes.
func (b *Broker) Register(s *server.Server) {
	if b.Interfaces == nil {
		b.Interfaces = hostInterfaces
	}
	if b.Resolve == nil {
		b.Resolve = resolve
	}
	if b.Reach == nil {
		b.Reach = reach
	}
	if b.Now == nil {
		b.Now = time.Now
	}
	if b.Limit == nil {
		b.Limit = &limit.Limiter{}
	}
	for path, h := range map[string]http.HandlerFunc{
		api.PathProof: b.proof, api.PathPreflight: b.preflight, api.PathJoin: b.join, api.PathSignCert: b.sign,
		api.PathConfirm: b.confirm, api.PathRelease: b.release, api.PathRenew: b.renew,
	} {
		if path == api.PathRenew { // shows a certificate, not a token
			s.Handle(http.MethodPost, path, h)
			continue
		}
		s.Handle(http.MethodPost, path, server.BusyFirst(b.Limit, h))
	}
}

// failure is an answer other than 200.
type failure struct {
	status int
	code   api.Code
	text   string
}

func (f *failure) Error() string { return f.text }

func fail(status int, code api.Code, format string, a ...any) error {
	return &failure{status, code, fmt.Sprintf(format, a...)}
}

// internal is a failure of our own, with upstream's words before its cause.
func internal(what string, err error) error {
	code := api.CodeInternal
	if errors.Is(err, tokenstore.ErrUnavailable) {
		code = api.CodeUnavailable
	}
	return fail(http.StatusInternalServerError, code, "%s: %v", what, err)
}

// call is one request, with what the log says of it.
type call struct {
	b    *Broker
	w    http.ResponseWriter
	r    *http.Request
	what string
	from netip.Addr
	attr []any // of the audit line
}

func (b *Broker) begin(w http.ResponseWriter, r *http.Request, what string) *call {
	from, _ := netip.ParseAddrPort(r.RemoteAddr)
	return &call{b: b, w: w, r: r, what: what, from: from.Addr().Unmap()}
}

// note adds to the audit line.
func (c *call) note(attr ...any) { c.attr = append(c.attr, attr...) }

// noteToken adds which token it was: its id, which tells nothing of it.
func (c *call) noteToken(t token.Token) {
	id, _ := t.Derive()
	c.note("token", id.String())
}

// end writes the audit line and the answer.
func (c *call) end(answer any, err error) {
	line := append([]any{"call", c.what, "from", c.from.String()}, c.attr...)
	if err == nil {
		c.b.Log.Info("audit", append(line, "result", "ok")...)
		server.WriteJSON(c.w, http.StatusOK, answer)
		return
	}
	var f *failure
	if !errors.As(err, &f) {
		f = &failure{http.StatusInternalServerError, api.CodeInternal, err.Error()}
	}
	c.b.Log.Warn("audit", append(line, "result", "refused", "status", f.status, "code", string(f.code), "reason", f.text)...)
	server.WriteFailure(c.w, f.status, f.code, f.text)
}

// busy refuses to look at a token while too many wrong ones of this source wait.
func (c *call) busy() error {
	if c.b.Limit.Busy(c.from) {
		return fail(http.StatusTooManyRequests, api.CodeBusy, "too many wrong tokens came from %s just now; try again in a few seconds", c.from)
	}
	return nil
}

// tokenFailure turns what a store said into an answer. Wrong tokens are answered late.
func (c *call) tokenFailure(err error) error {
	codes := map[error]api.Code{
		tokenstore.ErrUsed: api.CodeTokenUsed, tokenstore.ErrExpired: api.CodeTokenExpired, tokenstore.ErrRevoked: api.CodeTokenRevoked,
		tokenstore.ErrHeld: api.CodeTokenHeld, tokenstore.ErrRole: api.CodeTokenRole, tokenstore.ErrName: api.CodeTokenName, tokenstore.ErrBound: api.CodeTokenName,
		tokenstore.ErrSigned: api.CodeCertificate,
	}
	for reason, code := range codes {
		if errors.Is(err, reason) {
			return fail(http.StatusInternalServerError, code, "invalid token: %v", reason)
		}
	}
	if errors.Is(err, tokenstore.ErrUnknown) {
		c.b.Limit.Failed(c.r.Context(), c.from)
		return fail(http.StatusInternalServerError, api.CodeToken, "invalid token")
	}
	var f *failure
	if errors.As(err, &f) {
		return f
	}
	return internal("Cannot check the token", err)
}

// token reads a token from a request.
func (c *call) token(text string) (token.Token, error) {
	if err := c.busy(); err != nil {
		return token.Token{}, err
	}
	t, err := token.Parse(text)
	if err != nil {
		return token.Token{}, c.tokenFailure(tokenstore.ErrUnknown)
	}
	c.noteToken(t)
	return t, nil
}

// proof shows that this node knows a generated token.
func (b *Broker) proof(w http.ResponseWriter, r *http.Request) {
	var req api.ProofRequest
	if !server.ReadJSON(w, r, &req) {
		return
	}
	c := b.begin(w, r, "proof")
	answer, err := c.prove(req)
	c.end(answer, err)
}

func (c *call) prove(req api.ProofRequest) (*api.ProofResponse, error) {
	if err := c.busy(); err != nil {
		return nil, err
	}
	id, err := token.ParseID(req.ID)
	if err != nil || len(req.Nonce) != token.NonceSize {
		return nil, fail(http.StatusBadRequest, api.CodeRequest, "a proof needs the id of a token and %d random bytes", token.NonceSize)
	}
	c.note("token", id.String())
	exporter, err := token.Exporter(c.r.TLS)
	if err != nil {
		return nil, fail(http.StatusBadRequest, api.CodeNoProof, "%v", err)
	}
	key, err := c.b.Tokens.Key(c.r.Context(), id)
	if err != nil {
		return nil, c.tokenFailure(err)
	}
	return &api.ProofResponse{Proof: token.Proof(key, exporter, id, req.Nonce)}, nil
}

// confirm spends the token of a node that is in. Its record comes first: when the node must say it
// again, the token still knows which join it was.
func (b *Broker) confirm(w http.ResponseWriter, r *http.Request) {
	b.finish(w, r, "confirm", func(c *call, t token.Token, name string) error {
		hold, ok, err := b.Tokens.Hold(r.Context(), t, name)
		if err != nil {
			return c.tokenFailure(err)
		}
		if ok {
			if err := b.registered(r.Context(), hold); err != nil {
				return err
			}
		}
		if hold, err = b.Tokens.Confirm(r.Context(), t, name); err != nil {
			return c.tokenFailure(err)
		}
		c.note("worker", hold.Worker)
		return b.clustered()
	})
}

// registered notes that the join of a reservation is confirmed. Where its record has ended in the
// meantime it is made again, unless the name is somebody else's now.
func (b *Broker) registered(ctx context.Context, h tokenstore.Hold) error {
	if h.Join == "" { // reserved through a node of the build before
		return nil
	}
	err := b.Nodes.Change(ctx, h.Name, func(r *noderegistry.Record) error {
		if r.Join != h.Join {
			return fail(http.StatusInternalServerError, api.CodeNameTaken, "the node %s has joined with another request since", h.Name)
		}
		r.Until = time.Time{}
		return nil
	})
	if errors.Is(err, noderegistry.ErrNone) {
		record := b.record(h.Joiner)
		record.Until = time.Time{}
		err = b.Nodes.Put(ctx, record)
	}
	var refused *failure
	if err != nil && !errors.As(err, &refused) {
		return fail(http.StatusServiceUnavailable, api.CodeUnavailable, "cannot record that the node has joined, try again: %v", err)
	}
	return err
}

// record is that of a join that was reserved now.
func (b *Broker) record(j tokenstore.Joiner) noderegistry.Record {
	r := noderegistry.Record{Name: j.Name, Join: j.Join, Role: noderegistry.ControlPlane, Since: b.Now(), Until: b.Now().Add(tokenstore.Reservation)}
	if j.Worker {
		r.Role = noderegistry.Worker
	}
	return r
}

// release frees the token of a node that gave its join up, and takes its record and its Node back.
func (b *Broker) release(w http.ResponseWriter, r *http.Request) {
	b.finish(w, r, "release", func(c *call, t token.Token, name string) error {
		hold, ok, err := b.Tokens.Hold(r.Context(), t, name)
		if err != nil {
			return c.tokenFailure(err)
		}
		if ok {
			if err := b.takeBack(r.Context(), hold); err != nil {
				return fail(http.StatusServiceUnavailable, api.CodeUnavailable, "cannot undo the join now, try again: %v", err)
			}
		}
		if err := b.Tokens.Release(r.Context(), t, name); err != nil {
			return c.tokenFailure(err)
		}
		return nil
	})
}

// takeBack ends a join that is not confirmed: the certificates of it count no more, and the Node that
// its kubelet has made goes. A Node that was there before the join stays.
func (b *Broker) takeBack(ctx context.Context, h tokenstore.Hold) error {
	record, err := b.Nodes.Get(ctx, h.Name)
	if errors.Is(err, noderegistry.ErrNone) || err == nil && (record.Join != h.Join || !record.Pending()) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := b.Nodes.DeleteOf(ctx, record); err != nil {
		return err
	}
	nodes, err := b.Cluster.Nodes(ctx)
	if err != nil {
		return err
	}
	for i := range nodes {
		if n := &nodes[i]; n.Name == h.Name && !n.CreationTimestamp.Time.Before(h.Began.Truncate(time.Second)) {
			return b.Cluster.DeleteNode(ctx, n)
		}
	}
	return nil
}

func (b *Broker) finish(w http.ResponseWriter, r *http.Request, what string, do func(*call, token.Token, string) error) {
	var req api.ConfirmRequest
	if !server.ReadJSON(w, r, &req) {
		return
	}
	c := b.begin(w, r, what)
	t, err := c.token(req.Token)
	if err == nil {
		err = checkName(req.Hostname)
	}
	if err == nil {
		c.note("node", req.Hostname)
		err = do(c, t, req.Hostname)
	}
	c.end(api.Result{Result: "ok"}, err)
}

// clustered notes that this node is not alone any more.
func (b *Broker) clustered() error {
	if b.config().Clustered {
		return nil
	}
	if err := nodeconfig.Lock(b.Env, snapenv.LockNoReissue); err != nil {
		return internal("Failed to create lock file to disable certificate reissuing", err)
	}
	return nil
}

func (b *Broker) config() nodeconfig.Config { return nodeconfig.Load(b.Env) }

// agentPort is the port that the agents of all nodes of a cluster have in common.
func (b *Broker) agentPort() string { return strconv.Itoa(b.config().AgentPort) }

// apiPort is the port of the API servers.
func (b *Broker) apiPort() string { return strconv.Itoa(b.config().APIServer.Port) }

// external reports whether the datastore is an etcd of the user's.
func (b *Broker) external() bool { return b.config().Datastore.Owner == nodeconfig.ExternalEtcd }

func fingerprint(pemText []byte) string {
	cert, err := pki.ParseCert(pemText)
	if err != nil {
		return "unreadable"
	}
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}

func hostInterfaces() ([]Interface, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	var out []Interface
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			out = append(out, netip.PrefixFrom(p.Addr().Unmap(), p.Bits()))
		}
	}
	return out, nil
}

func resolve(ctx context.Context, name string) ([]netip.Addr, error) {
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", name)
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	return addrs, err
}

// reachTimeout bounds one attempt to connect to a joining node.
const reachTimeout = 2 * time.Second

func reach(ctx context.Context, address string) error {
	conn, err := (&net.Dialer{Timeout: reachTimeout}).DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	return conn.Close()
}
