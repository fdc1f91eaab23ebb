package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"k8s.io/client-go/rest"
)

// How long an API server may say nothing: before it answers a read, before it answers a change,
// which its webhooks may hold up for 30 seconds, and in the middle of an answer.
const (
	readSilence   = 20 * time.Second
	changeSilence = 65 * time.Second
)

// SilentError is the error of a request that an API server has taken and not answered. A frozen
// process still accepts connections.
type SilentError struct {
	Server string // host:port
	Wait   time.Duration
}

func (e *SilentError) Error() string {
	return fmt.Sprintf("the API server at %s accepts connections and did not answer within %s; see microk8s status, and microk8s logs kubelite", e.Server, e.Wait)
}

// Bound ends the requests of a configuration's clients that an API server does not answer, with a
// [SilentError]. An answer that goes on may take as long as it needs; a watch may be silent after
// its beginning.
func Bound(cfg *rest.Config) { bound(cfg, readSilence, changeSilence) }

func bound(cfg *rest.Config, read, change time.Duration) {
	cfg.Wrap(func(next http.RoundTripper) http.RoundTripper { return silence{next, read, change} })
}

type silence struct {
	next         http.RoundTripper
	read, change time.Duration
}

// RoundTrip implements http.RoundTripper.
func (s silence) RoundTrip(req *http.Request) (*http.Response, error) {
	wait := s.change
	if req.Method == http.MethodGet || req.Method == http.MethodHead {
		wait = s.read
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	began := time.Now()
	timer := time.AfterFunc(wait, func() { cancel(&SilentError{req.URL.Host, wait}) })
	resp, err := s.next.RoundTrip(req.WithContext(ctx))
	if err != nil {
		timer.Stop()
		var silent net.Error
		switch cause := context.Cause(ctx); {
		case req.Context().Err() != nil:
		case cause != nil:
			err = cause
		case errors.As(err, &silent) && silent.Timeout() && strings.Contains(err.Error(), "TLS handshake"):
			// net/http's own end of a handshake, which comes before ours.
			err = &SilentError{req.URL.Host, time.Since(began).Round(time.Second)}
		}
		cancel(nil)
		return nil, err
	}
	query := req.URL.Query()
	if query.Get("watch") == "true" || query.Get("follow") == "true" {
		timer.Stop()
		timer = nil
	}
	resp.Body = &boundBody{body: resp.Body, ctx: ctx, cancel: cancel, timer: timer, wait: wait}
	return resp, nil
}

// boundBody is an answer whose parts come with no longer gaps than wait, if timer is not nil.
type boundBody struct {
	body   io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer
	wait   time.Duration
}

func (b *boundBody) Read(p []byte) (int, error) {
	if b.timer != nil {
		b.timer.Reset(b.wait)
	}
	n, err := b.body.Read(p)
	if err != nil && err != io.EOF { //nolint:errorlint // a reader returns io.EOF itself
		if cause := context.Cause(b.ctx); cause != nil {
			err = cause
		}
	}
	return n, err
}

func (b *boundBody) Close() error {
	if b.timer != nil {
		b.timer.Stop()
	}
	err := b.body.Close()
	b.cancel(nil)
	return err
}
