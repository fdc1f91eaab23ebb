// Package client is the joining node's side of the cluster agent's wire: it makes sure with whom
// it talks before it tells the token, and then asks (cluster-agent.md 3, ADR 10).
//
// For tokens that this product makes, the server proves on the very connection that it knows
// the token; for others the fingerprint in the connection string decides. Both are done again on
// each new connection. Requests go over one connection, one after the other; a connection that
// broke is replaced, with the same checks.
//
// [Post] is one call of any agent, over a connection that its caller trusts already.
//
// What is asked, and what is done with the answers, is up to internal/cluster.
package client

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"microk8s/cluster-agent/api"
	"microk8s/internal/token"
)

const (
	dialTimeout = 10 * time.Second // TCP and TLS
	callTimeout = 30 * time.Second
	// joinTimeout is above the server's limit for one call, 240 s.
	joinTimeout = 250 * time.Second
)

// VerifyError says that the server is not known to be the one that made the token. Nothing
// secret has been sent to it.
type VerifyError struct {
	Server string
	Why    string
}

func (e *VerifyError) Error() string {
	return fmt.Sprintf("cannot verify the identity of %s: %s", e.Server, e.Why)
}

// ConnectError says that no connection could be made, or that it broke.
type ConnectError struct {
	Server string
	Err    error
}

func (e *ConnectError) Error() string { return fmt.Sprintf("cannot reach %s: %v", e.Server, e.Err) }
func (e *ConnectError) Unwrap() error { return e.Err }

// Client talks to one agent. Its methods may not be called concurrently.
type Client struct {
	// SkipVerify switches every check of the server off.
	SkipVerify bool
	// Warn is called with what a person should know about the security of the connection.
	Warn func(text string)
	// Dial makes TCP connections; nil means the host's.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)

	target Target
	conn   *tls.Conn        // the connection below http
	http   *http.ClientConn // nil: none was made yet, or it broke
	warned map[string]bool
}

// New returns a client that connects when it is first used.
func New(t Target) *Client { return &Client{target: t, warned: map[string]bool{}} }

// Close ends the connection, if there is one.
func (c *Client) Close() {
	if c.http != nil {
		c.http.Close()
		c.conn, c.http = nil, nil
	}
}

// Target is what the client talks to.
func (c *Client) Target() Target { return c.target }

func (c *Client) warn(text string) {
	if c.Warn != nil && !c.warned[text] {
		c.warned[text] = true
		c.Warn(text)
	}
}

// LocalAddr is the address from which this node is connected; the zero value without a
// connection.
func (c *Client) LocalAddr() net.IP {
	if c.conn == nil {
		return nil
	}
	if a, ok := c.conn.LocalAddr().(*net.TCPAddr); ok {
		return a.IP
	}
	return nil
}

// RemoteAddr is the server's address.
func (c *Client) RemoteAddr() net.IP {
	if c.conn == nil {
		return nil
	}
	if a, ok := c.conn.RemoteAddr().(*net.TCPAddr); ok {
		return a.IP
	}
	return nil
}

// Preflight asks what would be in the way. Upstream's agents answer 404, as a *ServerError.
func (c *Client) Preflight(ctx context.Context, r api.PreflightRequest) (*api.PreflightResponse, error) {
	r.Token = c.target.Token.Reveal()
	var out api.PreflightResponse
	return &out, c.call(ctx, callTimeout, true, api.PathPreflight, r, &out)
}

// Join asks to be let in. The same node may ask our servers again; upstream's have spent the
// token when they answer.
func (c *Client) Join(ctx context.Context, r api.JoinRequest) (*api.JoinResponse, error) {
	r.Token = c.target.Token.Reveal()
	yes := true
	r.CanHandleX509Auth, r.CanHandleCustomEtcd = &yes, &yes
	var out api.JoinResponse
	return &out, c.call(ctx, joinTimeout, false, api.PathJoin, r, &out)
}

// Sign has a certificate request signed during a worker's join. Suffix is api.SuffixProxy or
// api.SuffixKubelet; upstream wants them in this order.
func (c *Client) Sign(ctx context.Context, suffix string, csr []byte) ([]byte, error) {
	var out api.SignResponse
	err := c.call(ctx, callTimeout, false, api.PathSignCert, api.SignRequest{Token: c.target.Token.Reveal() + suffix, Request: string(csr)}, &out)
	return []byte(out.Certificate), err
}

// Confirm says that this node has joined: the token is spent.
func (c *Client) Confirm(ctx context.Context, hostname string) error {
	return c.call(ctx, callTimeout, true, api.PathConfirm, api.ConfirmRequest{Token: c.target.Token.Reveal(), Hostname: hostname}, &api.Result{})
}

// Release says that this node gave the join up: the token is free again.
func (c *Client) Release(ctx context.Context, hostname string) error {
	return c.call(ctx, callTimeout, true, api.PathRelease, api.ConfirmRequest{Token: c.target.Token.Reveal(), Hostname: hostname}, &api.Result{})
}

// call sends one request over a verified connection. With again set, a connection that was made
// for an earlier request and turns out to be broken is replaced once.
func (c *Client) call(ctx context.Context, limit time.Duration, again bool, path string, request, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	old := c.http != nil && c.http.Err() == nil
	if err := c.connect(ctx); err != nil {
		return err
	}
	err := c.post(ctx, path, request, answer)
	var broken *ConnectError
	if errors.As(err, &broken) && old && again && ctx.Err() == nil {
		if err := c.connect(ctx); err != nil {
			return err
		}
		err = c.post(ctx, path, request, answer)
	}
	return err
}

// connect makes a connection and finds out who is at the other end, unless there is a usable one.
func (c *Client) connect(ctx context.Context) error {
	if c.http != nil && c.http.Err() == nil {
		return nil
	}
	c.Close()
	proves := c.target.proves()
	config := &tls.Config{
		MinVersion: tls.VersionTLS12,
		// The chain says nothing before the cluster's CA is known: fingerprint and proof do.
		InsecureSkipVerify: true, //nolint:gosec // see VerifyConnection and prove
		NextProtos:         []string{"http/1.1"},
		VerifyConnection:   c.verifyFingerprint,
	}
	if proves && !c.SkipVerify {
		config.MinVersion = tls.VersionTLS13 // a proof is tied to such a connection
	}
	dial := c.Dial
	if dial == nil {
		dial = (&net.Dialer{}).DialContext
	}
	var conn *tls.Conn
	transport := &http.Transport{DialTLSContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		raw, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		conn = tls.Client(raw, config)
		if err := conn.HandshakeContext(ctx); err != nil {
			raw.Close()
			return nil, err
		}
		return conn, nil
	}}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	made, err := transport.NewClientConn(ctx, "https", c.target.Address())
	if err != nil {
		var verify *VerifyError
		if errors.As(err, &verify) {
			return verify
		}
		return &ConnectError{c.target.Address(), err}
	}
	c.conn, c.http = conn, made
	if c.SkipVerify {
		c.warn("the identity of the server is NOT verified (--skip-verify): whoever answers at " + c.target.Address() + " learns the token, and can control this node")
		return nil
	}
	if proves {
		if err := c.prove(ctx); err != nil {
			c.Close()
			return err
		}
	}
	return nil
}

// verifyFingerprint is the check for connection strings whose server does not prove itself.
func (c *Client) verifyFingerprint(state tls.ConnectionState) error {
	if c.SkipVerify || len(state.PeerCertificates) == 0 {
		return nil
	}
	sum := sha256.Sum256(state.PeerCertificates[0].Raw)
	matches := strings.HasPrefix(hex.EncodeToString(sum[:]), c.target.Check)
	switch {
	case c.target.proves():
		// The proof decides. Behind a balancer another node may answer than the one that printed
		// the fingerprint.
		return nil
	case c.target.Check == "":
		return &VerifyError{c.target.Address(), fmt.Sprintf("the connection string has no fingerprint after the token, and %v", c.target.Token.Guessable())}
	case !matches:
		return &VerifyError{c.target.Address(), "its certificate does not have the fingerprint of the connection string"}
	case len(c.target.Check) < safeCheck:
		c.warn(fmt.Sprintf("the fingerprint has only %d digits, which can be forged with enough computing power; use 'microk8s add-node' of this product, or %d digits", len(c.target.Check), safeCheck))
	}
	return nil
}

// prove has the server show that it knows the token, without telling it.
func (c *Client) prove(ctx context.Context) error {
	state := c.conn.ConnectionState()
	exporter, err := token.Exporter(&state)
	if err != nil {
		return &VerifyError{c.target.Address(), err.Error()}
	}
	id, key := c.target.Token.Derive()
	nonce := token.Nonce()
	var out api.ProofResponse
	err = c.post(ctx, api.PathProof, api.ProofRequest{ID: id.String(), Nonce: nonce}, &out)
	var refused *ServerError
	switch {
	case errors.As(err, &refused) && refused.Code == api.CodeToken:
		return &VerifyError{c.target.Address(), "it does not know this token: it was used, revoked, has expired, or was made on another cluster"}
	case errors.As(err, &refused) && refused.Code == api.CodeBusy:
		return refused
	case errors.As(err, &refused):
		return &VerifyError{c.target.Address(), c.noProof(refused)}
	case err != nil:
		return err
	case !token.CheckProof(key, exporter, id, nonce, out.Proof):
		return &VerifyError{c.target.Address(), "its proof is wrong: somebody is between this node and the cluster"}
	}
	return nil
}

// noProof says why the answer of a server that does not prove itself is not enough.
func (c *Client) noProof(refused *ServerError) string {
	if c.target.Token.Generated() {
		return fmt.Sprintf("it cannot prove that it knows the token, as the server that made it can (%s)", refused.Text)
	}
	return fmt.Sprintf("it cannot prove that it knows the token (%s); for a server of another version append the fingerprint to the token, as add-node prints it there", refused.Text)
}

// post sends one request over the connection there is. After an error that is not a
// *ServerError there is none any more.
func (c *Client) post(ctx context.Context, path string, request, answer any) error {
	// The address and not the name: agents look for it among their interfaces.
	err := Ask(ctx, c.http, c.conn.RemoteAddr().String(), path, request, answer)
	var refused *ServerError
	switch {
	case err == nil || errors.As(err, &refused):
		return err
	case ctx.Err() != nil:
		err = ctx.Err()
	}
	c.Close()
	return &ConnectError{c.target.Address(), err}
}
