package console

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	authnv1 "k8s.io/api/authentication/v1"
	authzv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"microk8s/internal/connlimit"
	"microk8s/internal/kube"
)

const (
	// cookieName begins with __Host-, so that browsers take it with Secure, for this host only.
	cookieName = "__Host-microk8s-console"
	csrfHeader = "X-CSRF-Token"

	sessionIdle = 2 * time.Hour  // without a call
	sessionLife = 12 * time.Hour // in all
	maxSessions = 256
	ofOne       = 16 // sessions of one person
	loginsOfOne = 4  // logins of one source that are looked at together
	loginWait   = 10 * time.Second
	rightsAge   = 30 * time.Second // how long an answer about a right is used
	maxRights   = 256
)

// person is somebody who is logged in.
type person struct {
	id, csrf  string
	began     time.Time
	used      time.Time // last
	api       *apiClient
	own       bool // with the code, so with the rights of the person who started the console
	name      string
	groups    []string
	namespace string // to begin with

	mu     sync.Mutex
	rights map[right]verdict
}

type right struct{ verb, group, resource, namespace string }

type verdict struct {
	yes  bool
	when time.Time
}

// sessions are the people who are logged in.
type sessions struct {
	now func() time.Time

	mu  sync.Mutex
	all map[string]*person
}

func (s *sessions) add(p *person) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	p.id, p.csrf, p.began, p.used = rand.Text()+rand.Text(), rand.Text()+rand.Text(), now, now
	p.rights = map[right]verdict{}
	if s.all == nil {
		s.all = map[string]*person{}
	}
	var oldest, oldestOwn *person
	same := 0
	for id, old := range s.all {
		if old.over(now) {
			delete(s.all, id)
			continue
		}
		if oldest == nil || old.used.Before(oldest.used) {
			oldest = old
		}
		if old.name == p.name {
			same++
			if oldestOwn == nil || old.used.Before(oldestOwn.used) {
				oldestOwn = old
			}
		}
	}
	switch { // nobody logs others out by logging in again and again
	case same >= ofOne:
		delete(s.all, oldestOwn.id)
	case len(s.all) >= maxSessions:
		delete(s.all, oldest.id)
	}
	s.all[p.id] = p
}

func (p *person) over(now time.Time) bool {
	return now.Sub(p.used) > sessionIdle || now.Sub(p.began) > sessionLife
}

// of returns the person whose cookie a request has; nil if there is none.
func (s *sessions) of(r *http.Request) *person {
	cookie, err := r.Cookie(cookieName)
	if err != nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p, now := s.all[cookie.Value], s.now()
	if p == nil || p.over(now) {
		return nil
	}
	p.used = now
	return p
}

func (s *sessions) end(p *person) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.all, p.id)
}

// list returns everybody who is logged in.
func (s *sessions) list() []*person {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*person
	for _, p := range s.all {
		if !p.over(s.now()) {
			out = append(out, p)
		}
	}
	return out
}

// logins bounds what people who are not known yet make the console hold: bodies, what is made of them, and
// calls of the API server. Its zero value is ready to use.
type logins struct {
	mu   sync.Mutex
	from map[netip.Addr]int
	read sync.Mutex // held while one kubeconfig is read: it takes a multiple of its size
}

// begin reports whether one more of a source is looked at. If so, end must be called.
func (l *logins) begin(from netip.Addr) (end func(), ok bool) {
	from = connlimit.Source(from)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.from == nil {
		l.from = map[netip.Addr]int{}
	}
	if l.from[from] >= loginsOfOne {
		return nil, false
	}
	l.from[from]++
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.from[from]--; l.from[from] == 0 {
			delete(l.from, from)
		}
	}, true
}

// withSession refuses calls of nobody, and changes without the session's CSRF token.
func (s *Server) withSession(h func(http.ResponseWriter, *http.Request, *person)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		p := s.sessions.of(r)
		if p == nil {
			fail(w, http.StatusUnauthorized, reasonLogin, "log in first")
			return
		}
		if site := r.Header.Get("Sec-Fetch-Site"); site != "" && site != "same-origin" {
			fail(w, http.StatusForbidden, "cross-origin", "another site's page asked for this; open the console itself")
			return
		}
		token := r.Header.Get(csrfHeader)
		if upgrades(r) {
			token = shellToken(r)
		}
		if (r.Method != http.MethodGet && r.Method != http.MethodHead || upgrades(r)) && !same(token, p.csrf) {
			fail(w, http.StatusForbidden, "csrf", "the call lacks the session's token; reload the page")
			return
		}
		if c := connlimit.From(r.Context()); c != nil {
			c.Keep()
		}
		h(w, r, p)
	}
}

// loginRequest has one of the two.
type loginRequest struct {
	Token      string `json:"token"`
	Kubeconfig string `json:"kubeconfig"`
}

// sessionAnswer is what the page knows of its session.
type sessionAnswer struct {
	User      string   `json:"user"`
	Groups    []string `json:"groups"`
	Own       bool     `json:"own"`
	Namespace string   `json:"namespace,omitempty"`
	CSRF      string   `json:"csrf"`
	Node      bool     `json:"node"` // the console runs on a node, and knows it
}

func (s *Server) sessionOf(p *person) sessionAnswer {
	return sessionAnswer{User: p.name, Groups: p.groups, Own: p.own, Namespace: p.namespace, CSRF: p.csrf, Node: s.opts.Node != nil}
}

// session answers who is logged in.
func (s *Server) session(w http.ResponseWriter, r *http.Request) {
	if p := s.sessions.of(r); p != nil && r.Header.Get("Sec-Fetch-Site") != "cross-site" {
		answer(w, http.StatusOK, s.sessionOf(p))
		return
	}
	answer(w, http.StatusUnauthorized, struct {
		failure
		Code bool `json:"loginCode"` // the command has printed one
	}{failure{Kind: "Status", Code: http.StatusUnauthorized, Reason: reasonLogin, Message: "log in first"}, s.opts.Code != ""})
}

// login starts a session. What is wrong is answered late, later each time.
func (s *Server) login(w http.ResponseWriter, r *http.Request) {
	from := source(r)
	if s.guesses.Busy(from) {
		fail(w, http.StatusTooManyRequests, "", "too many wrong logins came from %s just now; try again in a few seconds", from)
		return
	}
	end, ok := s.logins.begin(from)
	if !ok {
		fail(w, http.StatusTooManyRequests, "", "%d logins from %s are being looked at; try again in a few seconds", loginsOfOne, from)
		return
	}
	p, err := s.readLogin(w, r)
	end()
	if p == nil && err == nil {
		return
	}
	var wrong *wrongLogin
	switch {
	case errors.As(err, &wrong):
		s.opts.Log.Warn("a login was refused", "from", from.String(), "err", err)
		s.guesses.Failed(r.Context(), from)
		fail(w, http.StatusUnauthorized, "", "%v", err)
		return
	case err != nil:
		message := fmt.Sprintf("the API server does not answer, so nobody can be checked: %v", err)
		if s.opts.Code != "" {
			message += "; the token that microk8s dashboard-proxy printed logs in also now"
		}
		fail(w, http.StatusBadGateway, reasonNoAPI, "%s", message)
		return
	}
	if old := s.sessions.of(r); old != nil {
		s.sessions.end(old)
	}
	s.sessions.add(p)
	s.opts.Log.Info("logged in", "from", from.String(), "user", p.name)
	if c := connlimit.From(r.Context()); c != nil {
		c.Keep()
	}
	http.SetCookie(w, &http.Cookie{Name: cookieName, Value: p.id, Path: "/", Secure: true, HttpOnly: true, SameSite: http.SameSiteStrictMode, MaxAge: int(sessionLife.Seconds())})
	answer(w, http.StatusOK, s.sessionOf(p))
}

// readLogin returns who logs in; nobody and no error where it has answered.
func (s *Server) readLogin(w http.ResponseWriter, r *http.Request) (*person, error) {
	var want loginRequest
	if !readJSON(w, r, &want) {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(r.Context(), loginWait)
	defer cancel()
	return s.identify(ctx, want)
}

func (s *Server) logout(w http.ResponseWriter, r *http.Request) {
	if p := s.sessions.of(r); p != nil && same(r.Header.Get(csrfHeader), p.csrf) {
		s.sessions.end(p)
	}
	http.SetCookie(w, &http.Cookie{Name: cookieName, Path: "/", Secure: true, HttpOnly: true, SameSite: http.SameSiteStrictMode, MaxAge: -1})
	answer(w, http.StatusOK, struct{}{})
}

// wrongLogin is why somebody cannot log in with what was shown. Its text has no secret.
type wrongLogin struct{ why string }

func (e *wrongLogin) Error() string { return e.why }

// identify finds out who shows a token or a kubeconfig.
func (s *Server) identify(ctx context.Context, want loginRequest) (*person, error) {
	token := strings.TrimSpace(want.Token)
	switch {
	case token != "" && s.opts.Code != "" && same(token, s.opts.Code):
		p := &person{api: s.own, own: true, name: "the person who started dashboard-proxy"}
		if name, groups, err := p.api.whoami(ctx); err == nil {
			p.name, p.groups = name, groups
		}
		return p, nil
	case token != "":
		if strings.ContainsAny(token, " \t\r\n") || len(token) > 64<<10 {
			return nil, &wrongLogin{"this is not a token: it has spaces or lines"}
		}
		return s.check(ctx, func(cfg *rest.Config) { cfg.BearerToken = token }, "")
	case strings.TrimSpace(want.Kubeconfig) != "":
		use, namespace, err := s.logins.credentials(want.Kubeconfig)
		if err != nil {
			return nil, err
		}
		return s.check(ctx, use, namespace)
	}
	return nil, &wrongLogin{"enter a token, or choose a kubeconfig"}
}

// check asks the API server who has the credentials that use adds.
func (s *Server) check(ctx context.Context, use func(*rest.Config), namespace string) (*person, error) {
	config := func() (*rest.Config, error) {
		cfg, err := s.opts.API()
		if err != nil {
			return nil, err
		}
		cfg = rest.AnonymousClientConfig(cfg)
		use(cfg)
		return cfg, nil
	}
	p := &person{namespace: namespace, api: &apiClient{config: config}}
	// Each certificate has connections of its own. Those of one that is refused would stay for a minute and a half.
	ask := &apiClient{config: func() (*rest.Config, error) {
		cfg, err := config()
		if err == nil && len(cfg.CertData) > 0 {
			cfg.Wrap(func(next http.RoundTripper) http.RoundTripper { return lastCall{next} })
		}
		return cfg, err
	}}
	name, groups, err := ask.whoami(ctx)
	switch {
	case apierrors.IsUnauthorized(err):
		return nil, &wrongLogin{"the API server does not accept this login: it is wrong, has expired, or is of another cluster"}
	case err != nil:
		return nil, err
	case name == "system:anonymous":
		return nil, &wrongLogin{"the API server does not know who this is"}
	}
	p.name, p.groups = name, groups
	return p, nil
}

// credentials takes the token or the client certificate of a kubeconfig's current context, and
// nothing else: neither the server's address, nor programs to run, nor files of this machine.
func (l *logins) credentials(text string) (use func(*rest.Config), namespace string, err error) {
	l.read.Lock()
	defer l.read.Unlock()
	cfg, err := clientcmd.Load([]byte(text))
	if err != nil {
		return nil, "", &wrongLogin{"this is not a kubeconfig"} // the parser's words could repeat a secret
	}
	current := cfg.Contexts[cfg.CurrentContext]
	if current == nil {
		return nil, "", &wrongLogin{"the kubeconfig has no current context"}
	}
	user := cfg.AuthInfos[current.AuthInfo]
	if user == nil {
		user = &clientcmdapi.AuthInfo{}
	}
	switch {
	case user.Impersonate != "":
		return nil, "", &wrongLogin{"the kubeconfig impersonates somebody; the console does not"}
	case user.Token != "":
		return func(c *rest.Config) { c.BearerToken = user.Token }, current.Namespace, nil
	case len(user.ClientCertificateData) > 0 && len(user.ClientKeyData) > 0:
		return func(c *rest.Config) {
			c.CertData, c.KeyData = bytes.Clone(user.ClientCertificateData), bytes.Clone(user.ClientKeyData)
		}, current.Namespace, nil
	case user.Exec != nil || user.AuthProvider != nil:
		return nil, "", &wrongLogin{"the kubeconfig runs a program to log in, which the console does not; use a token"}
	case user.ClientCertificate != "" || user.TokenFile != "":
		return nil, "", &wrongLogin{"the kubeconfig names files of another machine; write them into it with: kubectl config view --raw --flatten"}
	}
	return nil, "", &wrongLogin{"the kubeconfig has neither a token nor a client certificate for its current context"}
}

// whoami asks the API server for the name and groups of the credentials.
func (c *apiClient) whoami(ctx context.Context) (string, []string, error) {
	core, err := c.core()
	if err != nil {
		return "", nil, err
	}
	var review authnv1.SelfSubjectReview
	data, err := core.Post().AbsPath("/apis/authentication.k8s.io/v1/selfsubjectreviews").SetHeader("Content-Type", "application/json").SetHeader("Accept", "application/json").
		Body([]byte(`{"apiVersion":"authentication.k8s.io/v1","kind":"SelfSubjectReview"}`)).DoRaw(ctx)
	if err == nil {
		err = unmarshal(data, &review)
	}
	return review.Status.UserInfo.Username, review.Status.UserInfo.Groups, err
}

// may reports whether the person has a right on a resource, or on one of its subresources as
// resource/subresource. While the API server does not answer, what it said last counts; the person
// who started the console may know the node in any case.
func (p *person) may(ctx context.Context, want right, now time.Time) bool {
	p.mu.Lock()
	known, ok := p.rights[want]
	p.mu.Unlock()
	if ok && now.Sub(known.when) < rightsAge {
		return known.yes
	}
	yes, err := p.api.may(ctx, want)
	if err != nil && (p.own || !apierrors.IsUnauthorized(err)) { // credentials that have ended have no rights
		return known.yes || p.own
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.rights) >= maxRights {
		clear(p.rights)
	}
	p.rights[want] = verdict{yes, now}
	return yes
}

func (c *apiClient) may(ctx context.Context, want right) (bool, error) {
	core, err := c.core()
	if err != nil {
		return false, err
	}
	resource, sub, _ := strings.Cut(want.resource, "/")
	body, err := marshal(&authzv1.SelfSubjectAccessReview{Spec: authzv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &authzv1.ResourceAttributes{
		Verb: want.verb, Group: want.group, Resource: resource, Subresource: sub, Namespace: want.namespace,
	}}})
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, rightsWait)
	defer cancel()
	var review authzv1.SelfSubjectAccessReview
	data, err := core.Post().AbsPath("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews").SetHeader("Content-Type", "application/json").SetHeader("Accept", "application/json").Body(body).DoRaw(ctx)
	if err == nil {
		err = unmarshal(data, &review)
	}
	return review.Status.Allowed, err
}

// rightsWait bounds the question for a right: the node's state is shown also when the API server is silent.
const rightsWait = 2 * time.Second

// Tokens are only for people who may read and change the Secrets in which they are kept; the API server says so
// itself.
func (s *Server) listTokens(w http.ResponseWriter, r *http.Request, p *person) {
	s.nodeCall(w, r, p, func(ctx context.Context, core *kube.Core) (any, error) { return s.opts.Node.Tokens(ctx, core) })
}

func (s *Server) newToken(w http.ResponseWriter, r *http.Request, p *person) {
	var want TokenRequest
	if !readJSON(w, r, &want) {
		return
	}
	s.nodeCall(w, r, p, func(ctx context.Context, core *kube.Core) (any, error) { return s.opts.Node.NewToken(ctx, core, want) })
}

func (s *Server) revokeToken(w http.ResponseWriter, r *http.Request, p *person) {
	id := pathVar(r, "id")
	s.nodeCall(w, r, p, func(ctx context.Context, core *kube.Core) (any, error) {
		return struct{}{}, s.opts.Node.RevokeToken(ctx, core, id)
	})
}

// tokenWait bounds a call about tokens.
const tokenWait = 20 * time.Second

func (s *Server) nodeCall(w http.ResponseWriter, r *http.Request, p *person, do func(context.Context, *kube.Core) (any, error)) {
	if s.opts.Node == nil {
		fail(w, http.StatusNotFound, "", "this console does not run on a node; use microk8s dashboard-proxy on a control-plane node")
		return
	}
	core, err := p.api.core()
	if err != nil {
		fail(w, http.StatusBadGateway, reasonNoAPI, "%v", err)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), tokenWait)
	defer cancel()
	out, err := do(ctx, core)
	var refused apierrors.APIStatus
	switch {
	case errors.As(err, &refused):
		fail(w, int(cmp.Or(refused.Status().Code, http.StatusBadGateway)), string(refused.Status().Reason), "%v", err)
	case err != nil:
		fail(w, http.StatusBadRequest, "", "%v", err)
	default:
		answer(w, http.StatusOK, out)
	}
}
