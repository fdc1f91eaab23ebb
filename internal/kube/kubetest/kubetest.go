// Package kubetest is a small API server for tests: Secrets with resource versions and
// watches, ClusterRoles and their bindings, and the Nodes that a test sets. It knows no
// authorization.
package kubetest

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"microk8s/internal/kube"
)

// Server is the API server. Its fields may be changed with Lock held.
type Server struct {
	sync.Mutex
	Nodes   []corev1.Node
	Secrets map[string]*corev1.Secret // of kube-system, by name
	Writes  int                       // that were done to Secrets
	// RBAC has the ClusterRoles and ClusterRoleBindings, by path.
	RBAC map[string]*unstructured.Unstructured
	Down bool // every call fails

	version  int
	watchers map[chan *corev1.Secret]string
	nodes    map[chan *corev1.Node]bool // who watches them
	url      string
}

// New starts a server that ends with the test.
func New(t testing.TB) *Server {
	t.Helper()
	s := &Server{Secrets: map[string]*corev1.Secret{}, RBAC: map[string]*unstructured.Unstructured{}, watchers: map[chan *corev1.Secret]string{}, nodes: map[chan *corev1.Node]bool{}}
	h := httptest.NewServer(s)
	t.Cleanup(func() {
		h.CloseClientConnections()
		h.Close()
	})
	s.url = h.URL
	return s
}

// Core makes a client.
func (s *Server) Core() (*kube.Core, error) { return kube.New(&rest.Config{Host: s.url}) }

func status(w http.ResponseWriter, code int, reason metav1.StatusReason) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure, Reason: reason, Code: int32(code),
	})
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.Lock()
	defer s.Unlock()
	if s.Down {
		status(w, http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable)
		return
	}
	answer := func(v any) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v)
	}
	const secrets = "/api/v1/namespaces/kube-system/secrets"
	switch {
	case r.URL.Path == "/api/v1/nodes" && r.URL.Query().Get("watch") != "":
		s.watchNodes(w, r)
	case strings.HasSuffix(r.URL.Path, "/endpointslices"): // there is no API server but this one
		answer(map[string]any{"kind": "EndpointSliceList", "apiVersion": "discovery.k8s.io/v1", "items": []any{}})
	case strings.HasPrefix(r.URL.Path, "/apis/rbac.authorization.k8s.io/v1/"):
		s.rbac(w, r, answer)
	case strings.HasPrefix(r.URL.Path, "/api/v1/nodes/") && r.Method == http.MethodDelete:
		name := strings.TrimPrefix(r.URL.Path, "/api/v1/nodes/")
		left := slices.DeleteFunc(slices.Clone(s.Nodes), func(n corev1.Node) bool { return n.Name == name })
		if len(left) == len(s.Nodes) {
			status(w, http.StatusNotFound, metav1.StatusReasonNotFound)
			return
		}
		s.Nodes = left
		answer(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusSuccess})
	case r.URL.Path == "/api/v1/nodes":
		answer(corev1.NodeList{TypeMeta: metav1.TypeMeta{Kind: "NodeList", APIVersion: "v1"}, Items: s.Nodes})
	case r.URL.Path == secrets && r.Method == http.MethodGet:
		s.watch(w, r)
	case strings.HasPrefix(r.URL.Path, secrets) && r.Method == http.MethodGet:
		if have := s.Secrets[strings.TrimPrefix(r.URL.Path, secrets+"/")]; have != nil {
			answer(have)
			return
		}
		status(w, http.StatusNotFound, metav1.StatusReasonNotFound)
	case strings.HasPrefix(r.URL.Path, secrets):
		var in corev1.Secret
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
			status(w, http.StatusBadRequest, metav1.StatusReasonBadRequest)
			return
		}
		old := s.Secrets[in.Name]
		switch {
		case r.Method == http.MethodPost && old != nil:
			status(w, http.StatusConflict, metav1.StatusReasonAlreadyExists)
			return
		case r.Method == http.MethodPut && (old == nil || old.ResourceVersion != in.ResourceVersion):
			status(w, http.StatusConflict, metav1.StatusReasonConflict)
			return
		}
		s.version++
		s.Writes++
		in.ResourceVersion = strconv.Itoa(s.version)
		in.TypeMeta = metav1.TypeMeta{Kind: "Secret", APIVersion: "v1"}
		s.Secrets[in.Name] = &in
		for c, name := range s.watchers {
			if name == in.Name {
				c <- in.DeepCopy()
			}
		}
		answer(&in)
	default:
		status(w, http.StatusNotFound, metav1.StatusReasonNotFound)
	}
}

// rbac keeps ClusterRoles and ClusterRoleBindings. It is called with the lock held.
func (s *Server) rbac(w http.ResponseWriter, r *http.Request, answer func(any)) {
	path := r.URL.Path
	old := s.RBAC[path]
	named := strings.Count(path, "/") == 5
	switch {
	case r.Method == http.MethodGet && !named:
		list := &unstructured.UnstructuredList{Object: map[string]any{"kind": "List", "apiVersion": "rbac.authorization.k8s.io/v1"}}
		for p, o := range s.RBAC {
			if strings.HasPrefix(p, path+"/") {
				list.Items = append(list.Items, *o)
			}
		}
		answer(list)
	case r.Method == http.MethodPost, r.Method == http.MethodPut:
		in := &unstructured.Unstructured{}
		if err := json.NewDecoder(r.Body).Decode(in); err != nil {
			status(w, http.StatusBadRequest, metav1.StatusReasonBadRequest)
			return
		}
		if r.Method == http.MethodPost {
			path += "/" + in.GetName()
			old = s.RBAC[path]
		}
		s.version++
		switch {
		case r.Method == http.MethodPost && old != nil:
			status(w, http.StatusConflict, metav1.StatusReasonAlreadyExists)
			return
		case r.Method == http.MethodPut && (old == nil || old.GetResourceVersion() != in.GetResourceVersion()):
			status(w, http.StatusConflict, metav1.StatusReasonConflict)
			return
		case old != nil:
			in.SetUID(old.GetUID())
		default:
			in.SetUID(types.UID("uid-" + strconv.Itoa(s.version)))
		}
		in.SetResourceVersion(strconv.Itoa(s.version))
		s.RBAC[path] = in
		answer(in)
	case old == nil:
		status(w, http.StatusNotFound, metav1.StatusReasonNotFound)
	case r.Method == http.MethodDelete:
		var o metav1.DeleteOptions
		_ = json.NewDecoder(r.Body).Decode(&o) // an empty body is none
		if o.Preconditions != nil && o.Preconditions.UID != nil && *o.Preconditions.UID != old.GetUID() {
			status(w, http.StatusConflict, metav1.StatusReasonConflict)
			return
		}
		delete(s.RBAC, path)
		answer(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusSuccess})
	default:
		answer(old)
	}
}

// SetReady makes one of the nodes ready or not, and tells those who watch.
func (s *Server) SetReady(name string, ready bool) {
	s.Lock()
	defer s.Unlock()
	status := corev1.ConditionFalse
	if ready {
		status = corev1.ConditionTrue
	}
	for i := range s.Nodes {
		if s.Nodes[i].Name != name {
			continue
		}
		s.Nodes[i].Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: status}}
		s.Nodes[i].TypeMeta = metav1.TypeMeta{Kind: "Node", APIVersion: "v1"}
		for c := range s.nodes {
			c <- s.Nodes[i].DeepCopy()
		}
	}
}

// watchNodes follows all nodes, from now on. It is called with the lock held.
func (s *Server) watchNodes(w http.ResponseWriter, r *http.Request) {
	events := make(chan *corev1.Node, 100)
	s.nodes[events] = true
	s.Unlock()
	defer func() {
		s.Lock()
		delete(s.nodes, events)
	}()
	stream(w, r, events)
}

// stream sends events as a watch does, until the client goes.
func stream[T any](w http.ResponseWriter, r *http.Request, events <-chan T) {
	w.Header().Set("Content-Type", "application/json")
	w.(http.Flusher).Flush()
	for {
		select {
		case <-r.Context().Done():
			return
		case object := <-events:
			_ = json.NewEncoder(w).Encode(map[string]any{"type": "MODIFIED", "object": object})
			w.(http.Flusher).Flush()
		}
	}
}

// watch follows one Secret, from what there is on. It is called with the lock held.
func (s *Server) watch(w http.ResponseWriter, r *http.Request) {
	name := strings.TrimPrefix(r.URL.Query().Get("fieldSelector"), "metadata.name=")
	events := make(chan *corev1.Secret, 100)
	s.watchers[events] = name
	if have := s.Secrets[name]; have != nil {
		events <- have.DeepCopy()
	}
	s.Unlock()
	defer func() {
		s.Lock()
		delete(s.watchers, events)
	}()
	stream(w, r, events)
}
