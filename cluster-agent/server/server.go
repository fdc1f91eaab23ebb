// Package server is the HTTPS face of the cluster agent: listener, TLS, limits, the log line of
// each call, the form of errors, and the route table. What the routes of an API version do
// belongs to that version's package, which registers them with [Server.Handle].
//
// Wire details (cluster-agent.md 1.2 and 1.3): an unknown path answers 404 with
// {"error":"Not found"}, a wrong method 404 with an empty body.
package server

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/gorilla/mux"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/limit"
	"microk8s/internal/connlimit"
)

// Limits of every connection. A request may not wait longer than its header needs, nor hold
// the line without saying anything.
const (
	headerTimeout = 10 * time.Second
	idleTimeout   = 2 * time.Minute
	maxHeader     = 16 << 10
	// MaxBody bounds the body of requests, in bytes, unless a route has its own limit
	// ([Server.HandleSized]). Calls of joining nodes carry tokens, names and certificate requests.
	MaxBody = 16 << 10
	// stopTimeout is how long calls may go on after the agent was asked to stop.
	stopTimeout = 5 * time.Second
)

// connLimits bound what the agent holds for strangers. A node's own callers need a handful of
// connections: a join keeps one, a call from node to node makes one. 192 connections that each
// wait with a body of 64 KiB and the buffers of TLS stay below 32 MiB.
var connLimits = connlimit.Limits{
	Total: 192, PerSource: 16,
	NewPerSecond: 8, NewBurst: 32,
	CallsPerSecond: 20, CallsBurst: 100,
	Early: 64 << 10,
}

// Options of a Server.
type Options struct {
	CertFile, KeyFile string           // PEM; replaced files are used from the next connection on
	MinTLS            uint16           // tls.VersionTLS12 when 0
	Timeout           time.Duration    // of one call; at least what its slowest part needs
	BodyTime          time.Duration    // of the body of one call; DefaultBodyTime when 0
	Metrics           bool             // serve /metrics
	Limits            connlimit.Limits // of connections and calls; the agent's when Total is 0
	Log               *slog.Logger
}

// Server serves the routes. Make it with New, add routes, then Serve once.
type Server struct {
	opts   Options
	router *mux.Router
	cert   *certificate
}

// New returns a Server with /health. The certificate must be readable now.
func New(opts Options) (*Server, error) {
	if opts.MinTLS == 0 {
		opts.MinTLS = tls.VersionTLS12
	}
	if opts.BodyTime == 0 {
		opts.BodyTime = DefaultBodyTime
	}
	if opts.Limits.Total == 0 {
		opts.Limits = connLimits
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{opts: opts, router: mux.NewRouter(), cert: &certificate{certFile: opts.CertFile, keyFile: opts.KeyFile, log: opts.Log}}
	if _, err := s.cert.get(nil); err != nil {
		return nil, err
	}
	s.router.NotFoundHandler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		WriteError(w, http.StatusNotFound, "not found")
	})
	s.router.MethodNotAllowedHandler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusNotFound)
	})
	s.Handle(http.MethodGet, "/health", http.HandlerFunc(health))
	if opts.Metrics {
		s.router.Handle("/metrics", promhttp.Handler())
	}
	return s, nil
}

// Handle adds a route whose body is at most MaxBody. The path is matched exactly.
func (s *Server) Handle(method, path string, h http.Handler) {
	s.HandleSized(method, path, MaxBody, h)
}

// HandleSized is Handle for bodies of at most size bytes.
func (s *Server) HandleSized(method, path string, size int64, h http.Handler) {
	s.HandleStream(method, path, s.bounded(size, h))
}

// HandleStream adds a route without a limit of the body; the handler keeps its own.
func (s *Server) HandleStream(method, path string, h http.Handler) {
	s.router.Handle(path, h).Methods(method)
}

// HandleAny is Handle for every method; the handler answers the wrong ones.
func (s *Server) HandleAny(path string, h http.Handler) {
	s.router.Handle(path, s.bounded(MaxBody, h))
}

// BusyFirst refuses callers whose source has too many wrong secrets waiting, before any of the
// body is read.
func BusyFirst(l *limit.Limiter, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if from := Source(r); l.Busy(from) {
			w.Header().Set("Connection", "close")
			WriteFailure(w, http.StatusTooManyRequests, api.CodeBusy,
				fmt.Sprintf("too many wrong tokens came from %s just now; try again in a few seconds", from))
			return
		}
		h.ServeHTTP(w, r)
	})
}

// Source returns the address that a request comes from.
func Source(r *http.Request) netip.Addr {
	from, _ := netip.ParseAddrPort(r.RemoteAddr)
	return from.Addr().Unmap()
}

// Authenticated notes that the caller has shown a secret: the connection keeps its place when
// there are too many.
func Authenticated(r *http.Request) {
	if c := connlimit.From(r.Context()); c != nil {
		c.Keep()
	}
}

func health(w http.ResponseWriter, _ *http.Request) {
	WriteJSON(w, http.StatusOK, map[string]string{"status": "OK"})
}

// DefaultBodyTime is how long the body of a request may take, except of streams.
const DefaultBodyTime = 10 * time.Second

// timed abandons a body that trickles.
type timed struct {
	io.ReadCloser
	control *http.ResponseController
	limit   time.Duration
	began   bool
}

func (t *timed) Read(p []byte) (int, error) {
	if !t.began {
		t.began = true
		_ = t.control.SetReadDeadline(time.Now().Add(t.limit)) // not for recorders of tests
	}
	n, err := t.ReadCloser.Read(p)
	if errors.Is(err, io.EOF) { // received; a body that was given up stays so while the rest is thrown away
		_ = t.control.SetReadDeadline(time.Time{})
	}
	return n, err
}

// bounded limits the size, in bytes, and the time of bodies.
func (s *Server) bounded(size int64, h http.Handler) http.Handler {
	h = http.MaxBytesHandler(h, size)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Body = &timed{ReadCloser: r.Body, control: http.NewResponseController(w), limit: s.opts.BodyTime}
		h.ServeHTTP(w, r)
	})
}

// ReadJSON reads the whole body into v. Where that fails it answers, with 400, and returns false.
// v must be flat: a stranger's body is decoded into it. For requests with lists use ReadBody, and
// Decode after the caller has shown a secret.
func ReadJSON(w http.ResponseWriter, r *http.Request, v any) bool {
	data, ok := ReadBody(w, r)
	return ok && Decode(w, data, v)
}

// ReadBody reads the whole body. Where that fails it answers, with 400, and returns false.
func ReadBody(w http.ResponseWriter, r *http.Request) ([]byte, bool) {
	data, err := io.ReadAll(r.Body)
	var large *http.MaxBytesError
	switch {
	case err == nil:
		return data, true
	case errors.As(err, &large):
		WriteFailure(w, http.StatusBadRequest, api.CodeRequest, fmt.Sprintf("the request has more than %d bytes", large.Limit))
	default:
		w.Header().Set("Connection", "close")
		WriteFailure(w, http.StatusBadRequest, api.CodeRequest, "the request was not received whole")
	}
	return nil, false
}

// Decode reads JSON into v. Where that fails it answers, with 400, and returns false. Fields that
// v does not have cost no memory, whatever is in them.
func Decode(w http.ResponseWriter, data []byte, v any) bool {
	if err := json.Unmarshal(data, v); err != nil {
		WriteFailure(w, http.StatusBadRequest, api.CodeRequest, err.Error())
		return false
	}
	return true
}

// WriteJSON answers with a value. Answers are never kept by anyone in between: some hold keys.
func WriteJSON(w http.ResponseWriter, status int, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		status, data = http.StatusInternalServerError, []byte(`{"error":"Cannot encode the answer"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(data) // the client may have gone
}

// WriteError answers with {"error": message}, its first letter in upper case as clients
// have always seen it.
func WriteError(w http.ResponseWriter, status int, message string) {
	WriteFailure(w, status, "", message)
}

// WriteFailure is WriteError with a code for programs.
func WriteFailure(w http.ResponseWriter, status int, code api.Code, message string) {
	first, size := utf8.DecodeRuneInString(message)
	if size > 0 {
		message = string(unicode.ToUpper(first)) + message[size:]
	}
	WriteJSON(w, status, api.Error{Message: message, Code: code})
}

// Handler is the route table with what surrounds every call.
func (s *Server) Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		began := time.Now()
		if s.opts.Timeout > 0 {
			ctx, cancel := context.WithTimeout(r.Context(), s.opts.Timeout)
			defer cancel()
			r = r.WithContext(ctx)
		}
		level := slog.LevelInfo
		if c := connlimit.From(r.Context()); c != nil {
			waited, err := c.Call(r.Context())
			if err != nil {
				panic(http.ErrAbortHandler) // the caller has gone, or the agent ends
			}
			if waited { // a flood must not fill the disk with lines
				level = slog.LevelDebug
			}
		}
		counted := &response{ResponseWriter: w}
		defer func() {
			failure := recover()
			if failure != nil && failure != http.ErrAbortHandler { //nolint:errorlint // a value that was panicked with, compared as net/http does
				s.opts.Log.Error("panic while handling a request", "method", r.Method, "path", r.URL.Path, "failure", fmt.Sprint(failure))
				if counted.status == 0 {
					WriteError(counted, http.StatusInternalServerError, "internal error; see the log of the cluster agent")
				}
			}
			// The path only: a query could carry a secret.
			s.opts.Log.Log(context.WithoutCancel(r.Context()), level, "call", "from", r.RemoteAddr, "method", r.Method, "path", r.URL.Path,
				"status", counted.code(), "bytes", counted.bytes, "took", time.Since(began).Round(time.Microsecond))
			if failure == http.ErrAbortHandler { //nolint:errorlint // a value that was panicked with, compared as net/http does
				panic(failure)
			}
		}()
		s.router.ServeHTTP(counted, r)
	})
}

// response counts what was answered.
type response struct {
	http.ResponseWriter
	status int
	bytes  int64
}

func (r *response) code() int {
	if r.status == 0 {
		return http.StatusOK
	}
	return r.status
}

func (r *response) WriteHeader(status int) {
	if r.status == 0 {
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

func (r *response) Write(p []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	n, err := r.ResponseWriter.Write(p)
	r.bytes += int64(n)
	return n, err
}

// Unwrap lets http.ResponseController reach the connection.
func (r *response) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// Serve answers on the listener until ctx ends, then finishes the calls that are going on for a
// few seconds. It closes the listener.
//
// It speaks HTTP/1.1 only, as every client of the wire can: one connection is then one call at
// a time, and what bounds connections bounds calls.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	l = connlimit.Wrap(l, s.opts.Limits)
	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	srv := &http.Server{
		Handler:           s.Handler(),
		Protocols:         protocols,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       s.opts.Timeout,
		WriteTimeout:      s.opts.Timeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		TLSConfig: &tls.Config{
			MinVersion: s.opts.MinTLS, GetCertificate: s.cert.get,
			// Nodes that renew their certificates show their current one; the handler must
			// verify it. No tickets: a proof needs a full handshake.
			ClientAuth: tls.RequestClientCert, SessionTicketsDisabled: true,
		},
		ErrorLog: slog.NewLogLogger(s.opts.Log.Handler(), slog.LevelDebug), // handshakes of scanners
	}
	connlimit.Serve(srv)
	var done sync.WaitGroup
	stop := context.AfterFunc(ctx, func() {
		done.Add(1)
		defer done.Done()
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		if err := srv.Shutdown(grace); err != nil {
			s.opts.Log.Warn("calls were cut off", "err", err)
			if err := srv.Close(); err != nil {
				s.opts.Log.Warn("cannot close", "err", err)
			}
		}
	})
	defer stop()
	err := srv.ServeTLS(l, "", "")
	done.Wait()
	if errors.Is(err, http.ErrServerClosed) && ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("cannot serve on %s: %w", l.Addr(), err)
}
