// Package ingresssecrets stands between the controller of the addon ingress and the API server, in
// the same pod. Traefik lists and watches the Secrets and ConfigMaps of all namespaces and does not start
// without; its account may read those only that its Ingresses and its own kinds name, each by its name (package
// ingressrights). So Traefik is pointed to this program, which answers list and watch of Secrets and ConfigMaps
// from those that may be read.
//
// Of Traefik's two providers for Ingresses one reads Traefik's annotations and one those of ingress-nginx. Each
// Ingress is shown to one of them, and a class that is named by an annotation is shown as spec.ingressClassName
// (view.go). Every other request is handed on to the API server unchanged.
//
// It listens on the pod's loopback and takes requests with the pod's own token only: nothing that
// Traefik might be led to connect to can be asked without it.
package ingresssecrets

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"microk8s/internal/kube"
)

// Where the list of the Secrets that may be read is; package ingressrights writes it.
const (
	Namespace = "ingress"
	ListName  = "microk8s-tls-secrets"
	ListKey   = "secrets"
	// MapsKey of the same ConfigMap lists the ConfigMaps that may be read.
	MapsKey = "configmaps"
)

// stopGrace is how long requests may take to end after the program was asked to stop.
const stopGrace = 2 * time.Second

// Run is the program: it reads its flags and serves until ctx ends.
func Run(ctx context.Context, args []string, out io.Writer) error {
	flags := pflag.NewFlagSet("ingress-secrets", pflag.ContinueOnError)
	flags.SetOutput(out)
	listen := flags.String("listen", "127.0.0.1:8001", "address to listen on; others than the pod's loopback give the account's rights to whoever has its token")
	if err := flags.Parse(args); err != nil {
		return err
	}
	cfg, err := rest.InClusterConfig()
	if err != nil {
		return fmt.Errorf("cannot reach the cluster: %w", err)
	}
	s, err := New(cfg, slog.New(slog.NewTextHandler(out, nil)))
	if err != nil {
		return err
	}
	server := &http.Server{Addr: *listen, Handler: s, ReadHeaderTimeout: 10 * time.Second}
	stop := context.AfterFunc(ctx, func() {
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopGrace)
		defer cancel()
		_ = server.Shutdown(late) // watches do not end by themselves
		_ = server.Close()
	})
	defer stop()
	var followers sync.WaitGroup
	followers.Go(func() { s.Follow(ctx) })
	err = server.ListenAndServe()
	if errors.Is(err, http.ErrServerClosed) && ctx.Err() != nil {
		err = nil
		followers.Wait()
	}
	return err
}

// Server answers Traefik's requests.
type Server struct {
	core  *kube.Core
	log   *slog.Logger
	feed  *feed // of Secrets
	maps  *feed // of ConfigMaps
	proxy *httputil.ReverseProxy
	token *ownToken
}

// New makes a server that reads with the credentials of cfg.
func New(cfg *rest.Config, log *slog.Logger) (*Server, error) {
	core, err := kube.New(cfg)
	if err != nil {
		return nil, err
	}
	transport, err := rest.TransportFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("cannot reach the cluster: %w", err)
	}
	target, _, err := rest.DefaultServerUrlFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("cannot reach the cluster: %w", err)
	}
	return &Server{
		core: core, log: log, feed: newFeed("Secret", time.Now().UnixMilli()), maps: newFeed("ConfigMap", time.Now().UnixMilli()),
		token: &ownToken{file: cfg.BearerTokenFile, fixed: cfg.BearerToken},
		proxy: &httputil.ReverseProxy{
			FlushInterval: -1, // watches
			Transport:     transport,
			Rewrite: func(r *httputil.ProxyRequest) {
				r.SetURL(&url.URL{Scheme: target.Scheme, Host: target.Host})
				r.Out.Header.Del("Authorization") // the transport sets the present one
				if viewOf(r.Out.Context()) != nil {
					r.Out.Header.Set("Accept", runtime.ContentTypeJSON)
					r.Out.Header.Del("Accept-Encoding") // the transport decodes its own
				}
			},
			ModifyResponse: func(r *http.Response) error {
				if v := viewOf(r.Request.Context()); v != nil {
					return v.rewrite(r)
				}
				return nil
			},
			ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
				if r.Context().Err() == nil {
					log.Warn("the API server does not answer", "path", r.URL.Path, "err", err)
				}
				refuse(w, http.StatusBadGateway, metav1.StatusReasonServiceUnavailable, "the API server does not answer")
			},
		},
	}, nil
}

// ServeHTTP answers list and watch of all Secrets and ConfigMaps, shows each provider its Ingresses, and hands
// everything else on.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !s.token.is(strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")) {
		refuse(w, http.StatusUnauthorized, metav1.StatusReasonUnauthorized, "this is for the pod's own account")
		return
	}
	show := ownAnnotations
	if rest, ok := strings.CutPrefix(r.URL.Path, NginxPath+"/"); ok {
		show = nginxAnnotations
		r = r.Clone(r.Context())
		r.URL.Path, r.URL.RawPath = "/"+rest, ""
	}
	if r.Method == http.MethodGet {
		switch r.URL.Path {
		case "/api/v1/secrets":
			s.feed.ServeHTTP(w, r)
			return
		case "/api/v1/configmaps":
			s.maps.ServeHTTP(w, r)
			return
		case "/apis/networking.k8s.io/v1/ingresses":
			r = r.WithContext(show.in(r.Context()))
		}
	}
	s.proxy.ServeHTTP(w, r)
}

// ownToken is the pod's token. It is replaced in its file from time to time, and a client may use
// the old one a little longer.
type ownToken struct {
	file, fixed string

	mu    sync.Mutex
	known [2][sha256.Size]byte // the last two
}

// is reports whether a token is the pod's own.
func (o *ownToken) is(token string) bool {
	if token == "" {
		return false
	}
	sum := sha256.Sum256([]byte(token))
	o.mu.Lock()
	defer o.mu.Unlock()
	if sum == o.known[0] || sum == o.known[1] {
		return true
	}
	now := o.fixed
	if o.file != "" {
		data, err := os.ReadFile(o.file)
		if err != nil {
			return false
		}
		now = strings.TrimSpace(string(data))
	}
	if sum != sha256.Sum256([]byte(now)) {
		return false
	}
	o.known = [2][sha256.Size]byte{sum, o.known[0]}
	return true
}

// Follow keeps the Secrets and ConfigMaps in line with the list until ctx ends.
func (s *Server) Follow(ctx context.Context) {
	secrets, maps := s.follower("secrets", &corev1.Secret{}, s.feed), s.follower("configmaps", &corev1.ConfigMap{}, s.maps)
	defer maps.end()
	defer secrets.end()
	s.one(ctx, "configmaps", Namespace, ListName, &corev1.ConfigMap{}, func(o any) {
		data := o.(*corev1.ConfigMap).Data
		secrets.update(ctx, data[ListKey])
		maps.update(ctx, data[MapsKey])
	}, func() {
		secrets.update(ctx, "")
		maps.update(ctx, "")
	})
}

// follower watches the listed objects of one kind for a feed. Its methods are called one after the other.
type follower struct {
	server    *Server
	resource  string
	kind      runtime.Object
	feed      *feed
	following map[string]func() // by NAMESPACE/NAME; ends the watch, and waits for that
}

func (s *Server) follower(resource string, kind runtime.Object, f *feed) *follower {
	return &follower{server: s, resource: resource, kind: kind, feed: f, following: map[string]func(){}}
}

// update follows what text lists, and nothing else.
func (f *follower) update(ctx context.Context, text string) {
	if ctx.Err() != nil {
		return
	}
	want := map[string]bool{}
	for key := range strings.FieldsSeq(text) {
		if strings.Count(key, "/") == 1 {
			want[key] = true
		}
	}
	for key, stop := range f.following {
		if !want[key] {
			delete(f.following, key)
			stop()
			f.feed.remove(key)
		}
	}
	for key := range want {
		if f.following[key] != nil {
			continue
		}
		ctx, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		f.following[key] = func() { cancel(); <-done }
		ns, name, _ := strings.Cut(key, "/")
		go func() {
			defer close(done)
			f.server.one(ctx, f.resource, ns, name, f.kind, func(o any) { f.feed.set(o.(item)) }, func() { f.feed.remove(key) })
		}()
	}
}

// end ends all watches.
func (f *follower) end() {
	for _, stop := range f.following {
		stop()
	}
}

// one watches one object by its name, with no more rights than that, until ctx ends.
func (s *Server) one(ctx context.Context, resource, ns, name string, kind runtime.Object, set func(any), remove func()) {
	_, controller := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: cache.NewListWatchFromClient(s.core, resource, ns, fields.OneTermEqualSelector(metav1.ObjectNameField, name)),
		ObjectType:    kind,
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    set,
			UpdateFunc: func(_, o any) { set(o) },
			DeleteFunc: func(any) { remove() },
		},
	})
	controller.RunWithContext(ctx)
}
