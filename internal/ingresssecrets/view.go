package ingresssecrets

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
)

const (
	// NginxPath begins the paths of requests by the provider for annotations of ingress-nginx.
	NginxPath = "/nginx"

	nginxPrefix     = "nginx.ingress.kubernetes.io/"
	traefikPrefix   = "traefik.ingress.kubernetes.io/"
	classAnnotation = "kubernetes.io/ingress.class"
)

// classes are the names of the addon's IngressClasses. An Ingress that names one of them in the annotation
// gets it as its class; the class's controller then decides whether it is served.
var classes = []string{"public", "nginx", "traefik"}

// view says which Ingresses a provider sees.
type view struct{ nginx bool }

var (
	ownAnnotations   = &view{}
	nginxAnnotations = &view{nginx: true}
)

type viewKey struct{}

func (v *view) in(ctx context.Context) context.Context { return context.WithValue(ctx, viewKey{}, v) }

// viewOf returns the view of a request, or nil where the answer is handed on as it is.
func viewOf(ctx context.Context) *view {
	v, _ := ctx.Value(viewKey{}).(*view)
	return v
}

// shows reports whether the provider sees an Ingress. Those with an annotation of ingress-nginx are for its
// provider, unless they have one of Traefik's: each Ingress is routed once.
func (v *view) shows(ing *networkingv1.Ingress) bool {
	var nginx, traefik bool
	for name := range ing.Annotations {
		nginx = nginx || strings.HasPrefix(name, nginxPrefix)
		traefik = traefik || strings.HasPrefix(name, traefikPrefix)
	}
	return v.nginx == (nginx && !traefik)
}

// withClass moves the class of the annotation to where both providers look first. The annotation stays:
// Traefik writes the object back when it sets its status.
func withClass(ing *networkingv1.Ingress) {
	if name := ing.Annotations[classAnnotation]; ing.Spec.IngressClassName == nil && slices.Contains(classes, name) {
		ing.Spec.IngressClassName = &name
	}
}

// rewrite changes the API server's answer to a list or watch of Ingresses. Other answers, errors for
// instance, stay.
func (v *view) rewrite(r *http.Response) error {
	if r.StatusCode != http.StatusOK {
		return nil
	}
	if on, _ := strconv.ParseBool(r.Request.URL.Query().Get("watch")); on {
		in, out := io.Pipe()
		upstream := r.Body
		go func() { out.CloseWithError(v.events(upstream, out)) }()
		r.Body = struct {
			io.Reader
			io.Closer
		}{in, closers{in, upstream}}
		r.ContentLength = -1
		r.Header.Del("Content-Length")
		return nil
	}
	defer r.Body.Close()
	var list networkingv1.IngressList
	if err := json.NewDecoder(r.Body).Decode(&list); err != nil {
		return err
	}
	list.Items = slices.DeleteFunc(list.Items, func(ing networkingv1.Ingress) bool { return !v.shows(&ing) })
	for i := range list.Items {
		withClass(&list.Items[i])
	}
	if list.Items == nil {
		list.Items = []networkingv1.Ingress{}
	}
	data, err := json.Marshal(list)
	if err != nil {
		return err
	}
	r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(data)), int64(len(data))
	r.Header.Set("Content-Length", strconv.Itoa(len(data)))
	return nil
}

type closers []io.Closer

func (c closers) Close() error {
	for _, one := range c {
		_ = one.Close() // of reading ends
	}
	return nil
}

// events copies the events of a watch, until in ends. An Ingress that is not shown is deleted, since it may
// have been seen before; clients ignore the deletion of what they do not have.
func (v *view) events(in io.Reader, out io.Writer) error {
	decoder, encoder := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var e metav1.WatchEvent
		if err := decoder.Decode(&e); err != nil {
			return err
		}
		switch watch.EventType(e.Type) {
		case watch.Added, watch.Modified, watch.Deleted:
			var ing networkingv1.Ingress
			if err := json.Unmarshal(e.Object.Raw, &ing); err != nil {
				return err
			}
			if !v.shows(&ing) {
				e.Type = string(watch.Deleted)
			}
			withClass(&ing)
			raw, err := json.Marshal(&ing)
			if err != nil {
				return err
			}
			e.Object = runtime.RawExtension{Raw: raw}
		}
		if err := encoder.Encode(e); err != nil {
			return err
		}
	}
}
