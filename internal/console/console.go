// Package console is the server of the console, the cluster in a browser: it serves the page, keeps
// who is logged in, and passes the page's calls on to the API server as that person, so that RBAC
// decides about each. It has no rights of its own. What only the local node knows (status, the
// datastore's members, certificates) comes through [Node], also while the API server is down.
//
// The page is built from the folder console/ by `make console` and embedded; see page.go. ADR 54 has
// the design, docs/console.md what people see.
package console

import (
	"context"
	"crypto/subtle"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/mux"
	"k8s.io/client-go/rest"

	"microk8s/cluster-agent/limit"
	"microk8s/internal/connlimit"
	"microk8s/internal/kube"
)

// Limits of the server. A browser has one connection with many calls, and one more for each shell.
const (
	headerTimeout = 10 * time.Second
	idleTimeout   = 2 * time.Minute
	maxHeader     = 16 << 10
	maxStreams    = 128      // calls at the same time on one connection
	maxLogin      = 64 << 10 // bytes of a kubeconfig: who sends them is not known yet
	loginTime     = 10 * time.Second
	maxBody       = 3 << 20 // bytes of an object: what the API server takes
	bodyTime      = 30 * time.Second
	stopTimeout   = 2 * time.Second
)

var connLimits = connlimit.Limits{
	Total: 256, PerSource: 64,
	NewPerSecond: 16, NewBurst: 64,
	CallsPerSecond: 100, CallsBurst: 500,
	Early: 64 << 10,
}

// proxyLimits are those of a proxy, which is the only caller and has a connection for each call.
var proxyLimits = connlimit.Limits{
	Total: 512, PerSource: 512,
	NewPerSecond: 100, NewBurst: 512,
	CallsPerSecond: 500, CallsBurst: 1000,
	Early: 64 << 10,
}

// Node is what the console asks of the node that it runs on. Its methods may be called from any
// goroutine; what they return is encoded as JSON.
type Node interface {
	// Facts returns the state of the node: status, members of the datastore, certificates.
	Facts(ctx context.Context) any
	// NewToken makes a join token with the rights of core, and returns how it is used.
	NewToken(ctx context.Context, core *kube.Core, want TokenRequest) (any, error)
	// Tokens lists the join tokens, without their secret part.
	Tokens(ctx context.Context, core *kube.Core) (any, error)
	// RevokeToken ends one, by its id.
	RevokeToken(ctx context.Context, core *kube.Core, id string) error
}

// TokenRequest is which join token is wanted.
type TokenRequest struct {
	Worker  bool   `json:"worker"`
	Name    string `json:"name"`    // of the node that may join with it; "" for any
	Expires string `json:"expires"` // a duration such as 1h, or never
	Many    bool   `json:"many"`    // any number of nodes may join with it
}

// Options of a Server.
type Options struct {
	// Certificate returns the pair to show; it is called for each handshake.
	Certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)

	// API returns the address and the CA of the API server, without credentials.
	API func() (*rest.Config, error)

	// Code, if set, logs in with the rights of Own. It is a secret.
	Code string
	// Own returns the API server with the rights of the person who started the console; nil where
	// nobody did.
	Own func() (*rest.Config, error)

	Node Node // nil where the console does not run on a node
	Log  *slog.Logger
	Now  func() time.Time // nil means the clock

	// Every is how often the node's state is looked at while somebody watches, and Sample how often
	// usage is read; 0 means the defaults.
	Every, Sample time.Duration
}

// Defaults of Options.
const (
	every  = 2500 * time.Millisecond
	sample = 15 * time.Second
)

// Server is a console. Make it with New and serve it once.
type Server struct {
	opts     Options
	sessions sessions
	guesses  limit.Limiter
	logins   logins
	own      *apiClient // nil without Own
	facts    *facts     // nil without Node
	samples  *samples
	origin   *http.CrossOriginProtection
}

// New returns a Server.
func New(opts Options) *Server {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.Now == nil {
		opts.Now = time.Now
	}
	if opts.Every == 0 {
		opts.Every = every
	}
	if opts.Sample == 0 {
		opts.Sample = sample
	}
	s := &Server{opts: opts, origin: http.NewCrossOriginProtection()}
	s.sessions.now = opts.Now
	if opts.Own != nil {
		s.own = &apiClient{config: opts.Own}
	}
	if opts.Node != nil {
		s.facts = &facts{node: opts.Node, every: opts.Every}
	}
	s.samples = newSamples(s.collector, opts.Sample, opts.Now, opts.Log)
	return s
}

// Handler returns the routes.
func (s *Server) Handler() http.Handler {
	r := mux.NewRouter()
	r.UseEncodedPath().SkipClean(true)
	post := func(path string, size int64, h http.HandlerFunc) {
		r.Handle(path, bounded(size, bodyTime, h)).Methods(http.MethodPost)
	}
	r.Handle("/api/login", bounded(maxLogin, loginTime, s.login)).Methods(http.MethodPost)
	post("/api/logout", 1<<10, s.logout)
	r.HandleFunc("/api/session", s.session).Methods(http.MethodGet)
	r.HandleFunc("/api/node", s.withSession(s.watchNode)).Methods(http.MethodGet)
	r.HandleFunc("/api/samples", s.withSession(s.serveSamples)).Methods(http.MethodGet)
	r.HandleFunc("/api/tokens", s.withSession(s.listTokens)).Methods(http.MethodGet)
	post("/api/tokens", 4<<10, s.withSession(s.newToken))
	post("/api/tokens/{id}/revoke", 1<<10, s.withSession(s.revokeToken))
	r.PathPrefix("/api/").HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fail(w, http.StatusNotFound, "", "not found") })
	r.PathPrefix("/k8s/").HandlerFunc(s.withSession(s.proxy))
	r.PathPrefix("/assets/").HandlerFunc(s.asset).Methods(http.MethodGet, http.MethodHead)
	r.PathPrefix("/").HandlerFunc(s.index).Methods(http.MethodGet, http.MethodHead)
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if c := connlimit.From(req.Context()); c != nil {
			if _, err := c.Call(req.Context()); err != nil {
				panic(http.ErrAbortHandler) // the caller has gone, or the console ends
			}
		}
		secure(w.Header())
		if err := s.origin.Check(req); err != nil {
			fail(w, http.StatusForbidden, "cross-origin", "another site's page asked for this; open the console itself")
			return
		}
		r.ServeHTTP(w, req)
	})
}

// secure sets what every answer has. The page's own policy is in index.
func secure(h http.Header) {
	h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; sandbox")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Frame-Options", "DENY")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Strict-Transport-Security", "max-age=31536000")
	h.Set("Cache-Control", "no-store")
}

// bounded limits the size, in bytes, and the time of a body.
func bounded(size int64, most time.Duration, h http.HandlerFunc) http.Handler {
	return http.MaxBytesHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(most)) // not for recorders of tests
		h(w, r)
	}), size)
}

// Serve answers on the listener until ctx ends. It closes the listener.
func (s *Server) Serve(ctx context.Context, l net.Listener) error { return s.ServeBoth(ctx, l, nil) }

// ServeBoth is Serve for two listeners: of the second one, if it is not nil, callers are a proxy that ends TLS and
// nobody else, since its word on who calls, and how, is believed (X-Forwarded-For and -Proto). A call that did not come
// to it by HTTPS is refused.
func (s *Server) ServeBoth(ctx context.Context, l, behind net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var all sync.WaitGroup
	all.Go(func() { s.samples.run(ctx) })
	failed := make(chan error, 2)
	serve := func(srv *http.Server, l net.Listener, limits connlimit.Limits) {
		all.Go(func() {
			var err error
			if l = connlimit.Wrap(l, limits); srv.TLSConfig != nil {
				err = srv.ServeTLS(l, "", "")
			} else {
				err = srv.Serve(l)
			}
			if errors.Is(err, http.ErrServerClosed) && ctx.Err() != nil {
				err = nil
			} else {
				err = fmt.Errorf("cannot serve on %s: %w", l.Addr(), err)
			}
			failed <- err
			cancel()
		})
		all.Go(func() {
			<-ctx.Done()
			grace, stop := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
			defer stop()
			if srv.Shutdown(grace) != nil {
				srv.Close() // streams have no end of their own
			}
		})
	}
	web := s.server(ctx, s.Handler())
	web.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: s.opts.Certificate}
	serve(web, l, connLimits)
	if behind != nil {
		serve(s.server(ctx, forwarded(s.Handler())), behind, proxyLimits)
	}
	all.Wait()
	err := <-failed
	if err == nil && behind != nil {
		err = <-failed
	}
	return err
}

func (s *Server) server(ctx context.Context, h http.Handler) *http.Server {
	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	srv := &http.Server{
		Handler:           h,
		Protocols:         protocols,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(s.opts.Log.Handler(), slog.LevelDebug), // handshakes of scanners
	}
	connlimit.Serve(srv)
	return srv
}

// forwarded takes over what a proxy says of a call.
func forwarded(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if proto := r.Header.Get("X-Forwarded-Proto"); proto != "https" && proto != "wss" { // Traefik calls WebSockets so
			secure(w.Header())
			if r.Method == http.MethodGet {
				http.Redirect(w, r, "https://"+r.Host+"/", http.StatusPermanentRedirect)
				return
			}
			fail(w, http.StatusForbidden, "", "use https://%s", r.Host)
			return
		}
		words := strings.Split(r.Header.Get("X-Forwarded-For"), ",") // the last one is the proxy's own word
		if from, err := netip.ParseAddr(strings.TrimSpace(words[len(words)-1])); err == nil {
			r.RemoteAddr = netip.AddrPortFrom(from, 0).String()
		}
		h.ServeHTTP(w, r)
	})
}

// failure is the answer of a call that failed, in the form of the API server's.
type failure struct {
	Kind    string `json:"kind"`
	Code    int    `json:"code"`
	Reason  string `json:"reason,omitempty"`
	Message string `json:"message"`
}

// Reasons of failures that the page looks at.
const (
	reasonLogin = "ConsoleLogin" // nobody is logged in
	reasonNoAPI = "ConsoleNoAPI" // the API server does not answer
)

func fail(w http.ResponseWriter, status int, reason, format string, a ...any) {
	answer(w, status, failure{Kind: "Status", Code: status, Reason: reason, Message: fmt.Sprintf(format, a...)})
}

func answer(w http.ResponseWriter, status int, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		status, data = http.StatusInternalServerError, []byte(`{"kind":"Status","code":500,"message":"the answer cannot be encoded"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(data) // the caller may have gone
}

// readJSON reads the body into v. Where that fails it answers and returns false.
func readJSON(w http.ResponseWriter, r *http.Request, v any) bool {
	data, err := io.ReadAll(r.Body)
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		fail(w, http.StatusRequestEntityTooLarge, "", "the request has more than %d bytes (of a kubeconfig, one context is enough: kubectl config view --raw --flatten --minify)", large.Limit)
	case err != nil:
		fail(w, http.StatusBadRequest, "", "the request was not received whole")
	default:
		if err = json.Unmarshal(data, v); err != nil { // its text may repeat a secret
			fail(w, http.StatusBadRequest, "", "the request is not JSON of the form that is expected")
		}
	}
	return err == nil
}

// source returns the address that a request comes from.
func source(r *http.Request) netip.Addr {
	from, _ := netip.ParseAddrPort(r.RemoteAddr)
	return from.Addr().Unmap()
}

func same(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }
