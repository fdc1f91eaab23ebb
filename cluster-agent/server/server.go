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
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/gorilla/mux"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"microk8s/cluster-agent/api"
	"microk8s/internal/defence"
)

// Limits of every connection. A request may not wait longer than its header needs, nor hold
// the line without saying anything.
const (
	headerTimeout = 10 * time.Second
	idleTimeout   = 2 * time.Minute
	maxHeader     = 64 << 10
	// MaxBody bounds the body of requests to routes that are not streams: those carry a few
	// kilobytes of JSON.
	MaxBody = 1 << 20
	// stopTimeout is how long calls may go on after the agent was asked to stop.
	stopTimeout = 5 * time.Second
)

// Options of a Server.
type Options struct {
	CertFile, KeyFile string        // PEM; replaced files are used from the next connection on
	MinTLS            uint16        // tls.VersionTLS12 when 0
	Timeout           time.Duration // of one call; at least what its slowest part needs
	BodyTime          time.Duration // of the body of one call; DefaultBodyTime when 0
	Metrics           bool          // serve /metrics
	Log               *slog.Logger
}

// Server serves the routes. Make it with New, add routes, then Serve once.
type Server struct {
	opts   Options
	router *mux.Router
	cert   *certificate
}

// New gives a Server with /health. The certificate must be readable now.
func New(opts Options) (*Server, error) {
	if opts.MinTLS == 0 {
		opts.MinTLS = tls.VersionTLS12
	}
	if opts.BodyTime == 0 {
		opts.BodyTime = DefaultBodyTime
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
	s.HandleStream(method, path, s.bounded(h))
}

// HandleStream adds a route without a limit of the body; the handler keeps its own.
func (s *Server) HandleStream(method, path string, h http.Handler) {
	s.router.Handle(path, h).Methods(method)
}

// HandleAny is Handle for every method; the handler answers the wrong ones.
func (s *Server) HandleAny(path string, h http.Handler) {
	s.router.Handle(path, s.bounded(h))
}

func health(w http.ResponseWriter, _ *http.Request) {
	WriteJSON(w, http.StatusOK, map[string]string{"status": "OK"})
}

// DefaultBodyTime is how long the body of a request may take, except of streams.
const DefaultBodyTime = 10 * time.Second

// timed gives up a body that trickles.
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
	if errors.Is(err, io.EOF) { // received; who is given up stays so while the rest is thrown away
		_ = t.control.SetReadDeadline(time.Time{})
	}
	return n, err
}

// bounded limits the size and the time of bodies.
func (s *Server) bounded(h http.Handler) http.Handler {
	if defence.On(defence.BodyLimit) {
		h = http.MaxBytesHandler(h, MaxBody)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if defence.On(defence.BodyTime) {
			r.Body = &timed{ReadCloser: r.Body, control: http.NewResponseController(w), limit: s.opts.BodyTime}
		}
		h.ServeHTTP(w, r)
	})
}

// ReadJSON reads the whole body into v. Where that fails it answers, with 400, and gives false.
func ReadJSON(w http.ResponseWriter, r *http.Request, v any) bool {
	data, err := io.ReadAll(r.Body)
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		WriteFailure(w, http.StatusBadRequest, api.CodeRequest, fmt.Sprintf("the request has more than %d bytes", large.Limit))
	case err != nil:
		w.Header().Set("Connection", "close")
		WriteFailure(w, http.StatusBadRequest, api.CodeRequest, "the request was not received whole")
	default:
		if err = json.Unmarshal(data, v); err != nil {
			WriteFailure(w, http.StatusBadRequest, api.CodeRequest, err.Error())
		}
	}
	return err == nil
}

// WriteJSON answers with a value. Answers are never kept by anyone in between: some hold keys.
func WriteJSON(w http.ResponseWriter, status int, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		status, data = http.StatusInternalServerError, []byte(`{"error":"Cannot encode the answer"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	if defence.On(defence.NoStore) {
		w.Header().Set("Cache-Control", "no-store")
	}
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
		counted := &response{ResponseWriter: w}
		defer func() {
			failure := recover()
			if failure != nil && failure != http.ErrAbortHandler { //nolint:errorlint // a value that was panicked with, compared as net/http does
				s.opts.Log.Error("a call broke the agent's code", "method", r.Method, "path", r.URL.Path, "failure", fmt.Sprint(failure))
				if counted.status == 0 {
					WriteError(counted, http.StatusInternalServerError, "internal error; see the log of the cluster agent")
				}
			}
			// The path only: a query could carry a secret.
			s.opts.Log.Info("call", "from", r.RemoteAddr, "method", r.Method, "path", r.URL.Path,
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
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	srv := &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       s.opts.Timeout,
		WriteTimeout:      s.opts.Timeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		TLSConfig: &tls.Config{
			MinVersion: s.opts.MinTLS, GetCertificate: s.cert.get,
			// Nodes that renew their certificates show the present one; who looks at it
			// verifies it. No tickets: a proof needs a full handshake.
			ClientAuth: tls.RequestClientCert, SessionTicketsDisabled: true,
		},
		ErrorLog: slog.NewLogLogger(s.opts.Log.Handler(), slog.LevelDebug), // handshakes of scanners
	}
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
