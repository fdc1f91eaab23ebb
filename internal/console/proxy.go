package console

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/mux"
	"k8s.io/client-go/rest"

	"microk8s/internal/kube"
)

// apiClient is the API server with somebody's credentials. Its methods may be called from any goroutine.
type apiClient struct {
	config func() (*rest.Config, error)

	mu     sync.Mutex
	made   time.Time
	base   *url.URL
	calls  http.RoundTripper // HTTP/2
	shells http.RoundTripper // HTTP/1.1, which can be upgraded
	small  *kube.Core
}

// clientAge is how long a client is used before the configuration is read again: the administrator's
// certificate is replaced from time to time.
const clientAge = time.Minute

func (c *apiClient) ready() error {
	if c.base != nil && time.Since(c.made) < clientAge {
		return nil
	}
	cfg, err := c.config()
	if err != nil {
		if c.base != nil {
			return nil
		}
		return fmt.Errorf("cannot reach the API server: %w", err)
	}
	cfg = rest.CopyConfig(cfg)
	cfg.UserAgent = "microk8s-console"
	core, err := kube.New(cfg)
	if err != nil {
		return err
	}
	base, _, err := rest.DefaultServerUrlFor(cfg)
	if err != nil {
		return fmt.Errorf("cannot use the address of the API server: %w", err)
	}
	wrap := cfg.WrapTransport
	kube.Bound(cfg)
	calls, err := rest.TransportFor(cfg)
	if err != nil {
		return fmt.Errorf("cannot use the credentials: %w", err)
	}
	cfg.WrapTransport, cfg.NextProtos = wrap, []string{"http/1.1"}
	shells, err := rest.TransportFor(cfg)
	if err != nil {
		return fmt.Errorf("cannot use the credentials: %w", err)
	}
	c.base, c.calls, c.shells, c.small, c.made = base, calls, shells, core, time.Now()
	return nil
}

func (c *apiClient) core() (*kube.Core, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.ready(); err != nil {
		return nil, err
	}
	return c.small, nil
}

func (c *apiClient) transport(upgrade bool) (*url.URL, http.RoundTripper, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.ready(); err != nil {
		return nil, nil, err
	}
	if upgrade {
		return c.base, c.shells, nil
	}
	return c.base, c.calls, nil
}

// apiPath is what the page may ask of the API server.
var apiPath = regexp.MustCompile(`^/(api|apis|version|readyz)(/[A-Za-z0-9._:~-]+)*/?$`)

// relayed are subresources that carry what somebody else serves, such as the pages of a pod, which would
// then be pages of the console, or connections that the page has no use for.
var relayed = []string{"proxy", "portforward", "attach"}

// allowed reports whether a path may be passed on.
func allowed(path string) bool {
	if !apiPath.MatchString(path) {
		return false
	}
	words := strings.Split(path, "/")
	for i, w := range words {
		if w == "." || w == ".." {
			return false
		}
		if i >= 2 && slices.Contains(relayed, w) && slices.Contains([]string{"pods", "services", "nodes"}, words[i-2]) {
			return false
		}
		if w == "proxy" && i > 2 && words[2] == "v1" && i == 3 { // /api/v1/proxy, of long ago
			return false
		}
	}
	return true
}

// passed are the headers of the page's calls that reach the API server; credentials and identities are
// not among them.
var passed = []string{"Accept", "Accept-Encoding", "Content-Type", "Connection", "Upgrade", "Sec-Websocket-Key", "Sec-Websocket-Version", "Sec-Websocket-Extensions"}

// returned are the headers of the API server's answers that reach the page.
var returned = []string{
	"Content-Type", "Content-Encoding", "Content-Length", "Retry-After", "Warning", "Audit-Id",
	"Connection", "Upgrade", "Sec-Websocket-Accept", "Sec-Websocket-Protocol", "Sec-Websocket-Extensions",
}

// Shells are WebSockets, whose calls have no headers of the page's. Their CSRF token is a subprotocol, which is
// not passed on.
const shellTokenPrefix = "csrf."

func upgrades(r *http.Request) bool { return strings.EqualFold(r.Header.Get("Upgrade"), "websocket") }

func protocols(r *http.Request) []string {
	var out []string
	for _, line := range r.Header.Values("Sec-Websocket-Protocol") {
		for word := range strings.SplitSeq(line, ",") {
			out = append(out, strings.TrimSpace(word))
		}
	}
	return out
}

func shellToken(r *http.Request) string {
	origin, err := url.Parse(r.Header.Get("Origin"))
	if err != nil || origin.Host != r.Host { // browsers do not hide it from WebSockets of other pages
		return ""
	}
	for _, p := range protocols(r) {
		if token, ok := strings.CutPrefix(p, shellTokenPrefix); ok {
			return token
		}
	}
	return ""
}

// proxy passes a call on to the API server as the person.
func (s *Server) proxy(w http.ResponseWriter, r *http.Request, p *person) {
	path := strings.TrimPrefix(r.URL.EscapedPath(), "/k8s")
	if !allowed(path) {
		fail(w, http.StatusForbidden, "", "the console does not pass this path on")
		return
	}
	upgrade := upgrades(r)
	base, transport, err := p.api.transport(upgrade)
	if err != nil {
		fail(w, http.StatusBadGateway, reasonNoAPI, "%v", err)
		return
	}
	if !upgrade && r.Body != nil && r.Method != http.MethodGet {
		control := http.NewResponseController(w)
		_ = control.SetReadDeadline(time.Now().Add(bodyTime)) // not for recorders of tests
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
		if err != nil {
			fail(w, http.StatusRequestEntityTooLarge, "", "the object was not received whole, or has more than %d MiB", maxBody>>20)
			return
		}
		_ = control.SetReadDeadline(time.Time{})
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	}
	relay := &httputil.ReverseProxy{
		Transport:     transport,
		FlushInterval: -1,
		ErrorLog:      slog.NewLogLogger(s.opts.Log.Handler(), slog.LevelDebug), // streams that are cut off
		Rewrite: func(out *httputil.ProxyRequest) {
			out.Out.URL.Scheme, out.Out.URL.Host = base.Scheme, base.Host
			out.Out.URL.Path, out.Out.URL.RawPath = strings.TrimSuffix(base.Path, "/")+path, ""
			out.Out.Host = base.Host
			header := http.Header{}
			for _, name := range passed {
				if values := out.Out.Header.Values(name); len(values) > 0 {
					header[name] = values
				}
			}
			if upgrade {
				for _, word := range protocols(out.In) {
					if !strings.HasPrefix(word, shellTokenPrefix) {
						header.Add("Sec-Websocket-Protocol", word)
					}
				}
			}
			out.Out.Header = header
		},
		ModifyResponse: func(resp *http.Response) error {
			header := http.Header{}
			for _, name := range returned {
				if values := resp.Header.Values(name); len(values) > 0 {
					header[name] = values
				}
			}
			resp.Header = header
			return nil
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			if errors.Is(err, context.Canceled) {
				return // the page has gone
			}
			fail(w, http.StatusBadGateway, reasonNoAPI, "the API server does not answer: %v", err)
		},
	}
	relay.ServeHTTP(w, r)
}

// lastCall ends each connection with its call.
type lastCall struct{ next http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (l lastCall) RoundTrip(req *http.Request) (*http.Response, error) {
	req = req.Clone(req.Context())
	req.Close = true
	return l.next.RoundTrip(req)
}

func unmarshal(data []byte, v any) error {
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("the API server's answer is not JSON: %w", err)
	}
	return nil
}

func marshal(v any) ([]byte, error) { return json.Marshal(v) }

func pathVar(r *http.Request, name string) string { return mux.Vars(r)[name] }
