package ingresssecrets

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

func annotated(name string, annotations ...string) *networkingv1.Ingress {
	ing := &networkingv1.Ingress{
		TypeMeta:   metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "Ingress"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, ResourceVersion: "7", Annotations: map[string]string{}},
	}
	for _, a := range annotations {
		key, value, _ := strings.Cut(a, "=")
		ing.Annotations[key] = value
	}
	return ing
}

// TestEachIngressHasOneProvider watches as both of Traefik's providers do: each Ingress is seen by one of
// them, also when that changes.
func TestEachIngressHasOneProvider(t *testing.T) {
	list := []*networkingv1.Ingress{
		annotated("plain"), annotated("rewritten", "nginx.ingress.kubernetes.io/rewrite-target=/"),
		annotated("both", "nginx.ingress.kubernetes.io/rewrite-target=/", "traefik.ingress.kubernetes.io/router.middlewares=x@file"),
	}
	subscribers := map[string]chan *networkingv1.Ingress{"0": make(chan *networkingv1.Ingress, 8), "1": make(chan *networkingv1.Ingress, 8)}
	next := make(chan string, 2)
	next <- "0"
	next <- "1"
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if accept := r.Header.Get("Accept"); r.URL.Path != "/apis/networking.k8s.io/v1/ingresses" || accept != runtime.ContentTypeJSON {
			http.Error(w, "asked for "+r.URL.Path+" as "+accept, http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", runtime.ContentTypeJSON)
		send := func(kind watch.EventType, o any) {
			raw, _ := json.Marshal(o)
			_ = json.NewEncoder(w).Encode(metav1.WatchEvent{Type: string(kind), Object: runtime.RawExtension{Raw: raw}})
			_ = http.NewResponseController(w).Flush()
		}
		if r.URL.Query().Get("watch") == "" {
			out := networkingv1.IngressList{TypeMeta: metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "IngressList"}, ListMeta: metav1.ListMeta{ResourceVersion: "7"}}
			for _, i := range list {
				out.Items = append(out.Items, *i)
			}
			_ = json.NewEncoder(w).Encode(out)
			return
		}
		if r.URL.Query().Get("sendInitialEvents") == "true" {
			for _, i := range list {
				send(watch.Added, i)
			}
			mark := annotated("", metav1.InitialEventsAnnotationKey+"=true")
			send(watch.Bookmark, mark)
		}
		mine := subscribers[<-next]
		for {
			select {
			case <-r.Context().Done():
				return
			case i := <-mine:
				send(watch.Modified, i)
			}
		}
	}))
	t.Cleanup(api.Close)
	s, err := New(&rest.Config{Host: api.URL, BearerTokenFile: tokenFile(t, "own")}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	front := httptest.NewServer(s)
	t.Cleanup(front.Close)
	t.Cleanup(front.CloseClientConnections)
	t.Cleanup(api.CloseClientConnections)

	watches := func(path string) cache.Store {
		client, err := kubernetes.NewForConfig(&rest.Config{Host: front.URL + path, BearerToken: "own"})
		if err != nil {
			t.Fatal(err)
		}
		factory := informers.NewSharedInformerFactory(client, 0)
		informer := factory.Networking().V1().Ingresses().Informer()
		stop := make(chan struct{})
		factory.Start(stop)
		t.Cleanup(func() { close(stop); front.CloseClientConnections(); factory.Shutdown() })
		if !cache.WaitForCacheSync(t.Context().Done(), informer.HasSynced) {
			t.Fatal("the Ingresses are not listed")
		}
		return informer.GetStore()
	}
	own, nginx := watches(""), watches(NginxPath)
	await := func(store cache.Store, want string) {
		t.Helper()
		var got string
		for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
			var names []string
			for _, o := range store.List() {
				ing := o.(*networkingv1.Ingress)
				name := ing.Name
				if c := ing.Spec.IngressClassName; c != nil {
					name += ":" + *c
				}
				if ing.ResourceVersion == "" {
					t.Errorf("%s has lost its version, with which its status is written", name)
				}
				names = append(names, name)
			}
			slices.Sort(names)
			if got = fmt.Sprint(names); got == want {
				return
			}
		}
		t.Fatalf("seen: %s, want %s", got, want)
	}
	await(own, "[both plain]")
	await(nginx, "[rewritten]")
	for _, i := range []*networkingv1.Ingress{
		annotated("plain", "nginx.ingress.kubernetes.io/enable-cors=true", "kubernetes.io/ingress.class=public"),
		annotated("rewritten", "kubernetes.io/ingress.class=nginx"),
		annotated("both", "kubernetes.io/ingress.class=haproxy"),
	} {
		subscribers["0"] <- i
		subscribers["1"] <- i
	}
	await(own, "[both rewritten:nginx]")
	await(nginx, "[plain:public]")
}

func TestClassOfAnnotation(t *testing.T) {
	for _, tc := range []struct{ annotation, field, want string }{
		{"public", "", "public"}, {"nginx", "", "nginx"}, {"traefik", "", "traefik"},
		{"haproxy", "", ""}, {"", "", ""}, {"public", "other", "other"},
	} {
		ing := annotated("i")
		if tc.annotation != "" {
			ing.Annotations[classAnnotation] = tc.annotation
		}
		if tc.field != "" {
			ing.Spec.IngressClassName = &tc.field
		}
		withClass(ing)
		got := ""
		if c := ing.Spec.IngressClassName; c != nil {
			got = *c
		}
		if got != tc.want || ing.Annotations[classAnnotation] != tc.annotation {
			t.Errorf("annotation %q, field %q: class %q, want %q; annotations %v", tc.annotation, tc.field, got, tc.want, ing.Annotations)
		}
	}
}
