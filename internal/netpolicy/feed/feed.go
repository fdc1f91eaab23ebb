// Package feed carries what network policies are made of from the API server to the nodes: of
// pods their labels, addresses and named ports, of namespaces their labels, of nodes their addresses,
// and the policies. Nothing else of a pod leaves the control plane by it (no environment, no
// volumes, no images): a node's credentials may read this feed, and no pods of other nodes.
//
// The server half is part of kubelite's API server, behind its authentication and authorization,
// and reads the API server's own informers. The wire is one GET whose answer does not end: lines of
// JSON, first everything there is, then a line "synced", then each change. A reader that is slow
// gets the last state of what has changed, not each step.
package feed

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"

	"microk8s/internal/netpolicy"
)

// Path is where the API server serves the feed: a path that is no resource, with a right of its own
// in snap/manifests.
const Path = "/microk8s.io/network-policy/v1/inputs"

// Kinds of lines.
const (
	kindPod       = "pod"
	kindNamespace = "namespace"
	kindNode      = "node"
	kindPolicy    = "policy"
	kindCluster   = "clusterPolicy"
	kindSynced    = "synced"
)

// line is one line of the wire. Without an object the thing is gone.
type line struct {
	Kind   string          `json:"kind"`
	Key    string          `json:"key,omitempty"` // "namespace/name" or "name"
	Object json.RawMessage `json:"object,omitempty"`
}

// maxReaders is how many requests of one caller may be open. A node has one, and for a moment a second one when it
// connects again; each holds what its reader has not taken yet, which is up to the whole cluster.
const maxReaders = 8

// Server is the API server's half.
type Server struct {
	// Caller returns who makes a request, of whom maxReaders may be open; nil: all are one caller's. It is set before
	// the first request.
	Caller func(*http.Request) string

	synced []cache.InformerSynced
	done   chan struct{}
	end    sync.Once

	mu      sync.Mutex
	objects map[id]json.RawMessage
	readers map[*reader]struct{}
}

type id struct{ kind, key string }

// reader is one open request: what it has not been sent yet.
type reader struct {
	caller  string
	pending map[id]struct{}
	wake    chan struct{} // holds at most one value
}

// NewServer follows the informers of factories that are not started yet. The kind of the second one,
// ClusterNetworkPolicy, is one that a cluster may be without.
func NewServer(factory informers.SharedInformerFactory, dynamic dynamicinformer.DynamicSharedInformerFactory) (*Server, error) {
	s := &Server{done: make(chan struct{}), objects: map[id]json.RawMessage{}, readers: map[*reader]struct{}{}}
	cluster := dynamic.ForResource(netpolicy.ClusterPolicies).Informer()
	var without atomic.Bool
	err := cluster.SetWatchErrorHandlerWithContext(func(ctx context.Context, r *cache.Reflector, err error) {
		without.Store(apierrors.IsNotFound(err))
		if !without.Load() {
			cache.DefaultWatchErrorHandler(ctx, r, err)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("cannot follow the network policies of the whole cluster: %w", err)
	}
	for kind, informer := range map[string]cache.SharedIndexInformer{
		kindCluster:   cluster,
		kindPod:       factory.Core().V1().Pods().Informer(),
		kindNamespace: factory.Core().V1().Namespaces().Informer(),
		kindNode:      factory.Core().V1().Nodes().Informer(),
		kindPolicy:    factory.Networking().V1().NetworkPolicies().Informer(),
	} {
		registration, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc:    func(o any) { s.set(kind, o) },
			UpdateFunc: func(_, o any) { s.set(kind, o) },
			DeleteFunc: func(o any) { s.remove(kind, o) },
		})
		if err != nil {
			return nil, fmt.Errorf("cannot follow the %ss of the cluster: %w", kind, err)
		}
		synced := registration.HasSynced
		if kind == kindCluster {
			synced = func() bool { return without.Load() || registration.HasSynced() }
		}
		s.synced = append(s.synced, synced)
	}
	return s, nil
}

// Close ends the requests that are open, and refuses later ones.
func (s *Server) Close() { s.end.Do(func() { close(s.done) }) }

// reduce returns what is sent of an object: nil for a pod that has ended.
func reduce(o any) any {
	switch o := o.(type) {
	case *corev1.Pod:
		if p := netpolicy.PodOf(o); p != nil {
			return p
		}
	case *corev1.Namespace:
		return o.Labels
	case *corev1.Node:
		return netpolicy.NodeOf(o)
	case *networkingv1.NetworkPolicy:
		return netpolicy.PolicyOf(o)
	case *unstructured.Unstructured:
		if p, err := netpolicy.ClusterPolicyOf(o); err == nil {
			return p
		}
	}
	return nil
}

func (s *Server) set(kind string, o any) {
	reduced := reduce(o)
	if reduced == nil {
		s.remove(kind, o)
		return
	}
	key, err := cache.MetaNamespaceKeyFunc(o)
	if err != nil {
		return // it has no metadata: no object of these kinds
	}
	data, err := json.Marshal(reduced)
	if err != nil {
		return // cannot happen: strings, numbers and addresses
	}
	s.change(id{kind, key}, data)
}

func (s *Server) remove(kind string, o any) {
	if key, err := cache.DeletionHandlingMetaNamespaceKeyFunc(o); err == nil {
		s.change(id{kind, key}, nil)
	}
}

// change notes a new state and tells the readers, if it is one: most changes of pods and nodes are
// of what is not sent.
func (s *Server) change(i id, data json.RawMessage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old, had := s.objects[i]
	if had == (data != nil) && bytes.Equal(old, data) {
		return
	}
	if data == nil {
		delete(s.objects, i)
	} else {
		s.objects[i] = data
	}
	for r := range s.readers {
		r.pending[i] = struct{}{}
		select {
		case r.wake <- struct{}{}:
		default:
		}
	}
}

// ServeHTTP answers until the request or the server ends.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet {
		w.Header().Set("Allow", http.MethodGet)
		http.Error(w, "only GET", http.StatusMethodNotAllowed)
		return
	}
	for _, synced := range s.synced {
		if !synced() {
			w.Header().Set("Retry-After", "1")
			http.Error(w, "the API server is starting and does not know the cluster yet", http.StatusServiceUnavailable)
			return
		}
	}
	caller := ""
	if s.Caller != nil {
		caller = s.Caller(r)
	}
	me := s.open(caller)
	if me == nil {
		w.Header().Set("Retry-After", "5")
		http.Error(w, fmt.Sprintf("%d requests of this caller are open already", maxReaders), http.StatusTooManyRequests)
		return
	}
	// However it ends, the reader asks again.
	_ = s.serve(r.Context(), w, me)
}

// open adds a reader; nil where its caller has too many.
func (s *Server) open(caller string) *reader {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for r := range s.readers {
		if r.caller == caller {
			n++
		}
	}
	if n >= maxReaders {
		return nil
	}
	me := &reader{caller: caller, pending: map[id]struct{}{}, wake: make(chan struct{}, 1)}
	for i := range s.objects {
		me.pending[i] = struct{}{}
	}
	s.readers[me] = struct{}{}
	return me
}

func (s *Server) serve(ctx context.Context, w http.ResponseWriter, me *reader) error {
	defer func() {
		s.mu.Lock()
		delete(s.readers, me)
		s.mu.Unlock()
	}()
	w.Header().Set("Content-Type", "application/jsonl")
	w.Header().Set("Cache-Control", "no-store")
	out, control := json.NewEncoder(w), http.NewResponseController(w)
	for first := true; ; first = false {
		for _, l := range s.take(me) {
			if err := out.Encode(l); err != nil {
				return err
			}
		}
		if first {
			if err := out.Encode(line{Kind: kindSynced}); err != nil {
				return err
			}
		}
		if err := control.Flush(); err != nil {
			return err
		}
		select {
		case <-me.wake:
		case <-ctx.Done():
			return ctx.Err()
		case <-s.done:
			return nil
		}
	}
}

// take returns what a reader has not been sent yet.
func (s *Server) take(me *reader) []line {
	s.mu.Lock()
	defer s.mu.Unlock()
	lines := make([]line, 0, len(me.pending))
	for i := range me.pending {
		lines = append(lines, line{i.kind, i.key, s.objects[i]})
	}
	clear(me.pending)
	return lines
}
