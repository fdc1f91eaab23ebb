package network

import (
	"encoding/json"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// fakeAPI is a fake of an API server, not one: list, watch and status patches of nodes, on a
// Unix socket, which processes in other network namespaces reach. It counts refused requests
// as a test's failure, since a kubelet may do no more than this.
type fakeAPI struct {
	t       *testing.T
	mu      sync.Mutex
	changed *sync.Cond
	version int
	nodes   map[string]*corev1.Node
	log     []event
}

type event struct {
	Type   string       `json:"type"`
	Object *corev1.Node `json:"object"`
}

func newFakeAPI(t *testing.T, socket string) *fakeAPI {
	f := &fakeAPI{t: t, nodes: map[string]*corev1.Node{}}
	f.changed = sync.NewCond(&f.mu)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: f}
	go s.Serve(l)
	t.Cleanup(func() {
		s.Close()
		f.changed.Broadcast()
	})
	return f
}

// set creates or replaces a node; remove deletes one.
func (f *fakeAPI) set(n *corev1.Node) {
	f.mu.Lock()
	defer f.mu.Unlock()
	kind := "MODIFIED"
	if f.nodes[n.Name] == nil {
		kind = "ADDED"
	}
	f.record(kind, n)
	f.nodes[n.Name] = n
}

func (f *fakeAPI) remove(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.nodes[name].DeepCopy()
	delete(f.nodes, name)
	f.record("DELETED", n)
}

func (f *fakeAPI) get(name string) *corev1.Node {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.nodes[name].DeepCopy()
}

func (f *fakeAPI) record(kind string, n *corev1.Node) {
	f.version++
	n.ResourceVersion = strconv.Itoa(f.version)
	n.TypeMeta = metav1.TypeMeta{Kind: "Node", APIVersion: "v1"}
	f.log = append(f.log, event{kind, n.DeepCopy()})
	f.changed.Broadcast()
}

func (f *fakeAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	name, isStatus := strings.CutSuffix(strings.TrimPrefix(r.URL.Path, "/api/v1/nodes/"), "/status")
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case r.URL.Path == "/api/v1/nodes" && r.URL.Query().Get("watch") != "":
		if r.URL.Query().Get("sendInitialEvents") == "true" {
			w.WriteHeader(http.StatusUnprocessableEntity) // the client then lists
			json.NewEncoder(w).Encode(metav1.Status{Status: "Failure", Reason: metav1.StatusReasonInvalid, Code: 422})
			return
		}
		since, _ := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
		flush := w.(http.Flusher).Flush
		flush()
		stop := make(chan struct{})
		defer close(stop)
		go func() {
			select {
			case <-r.Context().Done():
				f.changed.Broadcast()
			case <-stop:
			}
		}()
		for r.Context().Err() == nil {
			for ; since < len(f.log); since++ {
				if json.NewEncoder(w).Encode(f.log[since]) != nil {
					return
				}
			}
			flush()
			f.changed.Wait()
		}
	case r.URL.Path == "/api/v1/nodes":
		list := corev1.NodeList{TypeMeta: metav1.TypeMeta{Kind: "NodeList", APIVersion: "v1"}}
		list.ResourceVersion = strconv.Itoa(f.version)
		for _, n := range f.nodes {
			list.Items = append(list.Items, *n)
		}
		json.NewEncoder(w).Encode(list)
	case r.Method == http.MethodPatch && isStatus && f.nodes[name] != nil:
		var patch struct {
			Metadata struct{ Annotations map[string]string }
		}
		if err := json.NewDecoder(r.Body).Decode(&patch); err != nil {
			f.t.Errorf("patch of node %s: %v", name, err)
		}
		n := f.nodes[name].DeepCopy()
		if n.Annotations == nil {
			n.Annotations = map[string]string{}
		}
		for k, v := range patch.Metadata.Annotations {
			n.Annotations[k] = v
		}
		f.nodes[name] = n
		f.record("MODIFIED", n)
		json.NewEncoder(w).Encode(n)
	default:
		f.t.Errorf("unexpected request %s %s", r.Method, r.URL)
		w.WriteHeader(http.StatusForbidden)
	}
}
