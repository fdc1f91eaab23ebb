// Package kube makes small clients of the API server: typed for the core group only, since
// the generated client for everything costs every process that links it megabytes.
package kube

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// SystemNamespace is where the product keeps its own objects.
const SystemNamespace = "kube-system"

// callTimeout bounds each call of the methods below; a shorter one can come with the context.
const callTimeout = 30 * time.Second

// Core talks to the core group, version v1. Its methods may be called from any goroutine.
type Core struct{ rest.Interface }

// FromFile makes a client from a kubeconfig, such as the administrator's.
func FromFile(path string) (*Core, error) {
	cfg, err := clientcmd.BuildConfigFromFlags("", path)
	if err != nil {
		return nil, fmt.Errorf("cannot use the kubeconfig %s: %w", path, err)
	}
	return New(cfg)
}

// File makes a client from a kubeconfig and keeps it as long as the file is the same: programs
// that go on for long use it, and follow credentials that are replaced. Set Path. Its methods may
// be called from any goroutine.
type File struct {
	Path string

	mu   sync.Mutex
	seen os.FileInfo
	core *Core
}

// Core returns the client for the file as it is now.
func (f *File) Core() (*Core, error) {
	st, err := os.Stat(f.Path)
	if err != nil {
		return nil, fmt.Errorf("cannot use the kubeconfig %s: %w", f.Path, err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.seen != nil && os.SameFile(f.seen, st) && f.seen.ModTime().Equal(st.ModTime()) && f.seen.Size() == st.Size() {
		return f.core, nil
	}
	core, err := FromFile(f.Path)
	if err != nil {
		return nil, err
	}
	f.core, f.seen = core, st
	return core, nil
}

// New makes a client. The configuration is copied.
func New(cfg *rest.Config) (*Core, error) {
	c, err := For(cfg, "/api", corev1.SchemeGroupVersion, corev1.AddToScheme)
	if err != nil {
		return nil, err
	}
	return &Core{c}, nil
}

// For makes a client of one group's kinds, which add tells a scheme, below a path of the API. The configuration is copied.
func For(cfg *rest.Config, path string, group schema.GroupVersion, add func(*runtime.Scheme) error) (rest.Interface, error) {
	scheme := runtime.NewScheme()
	if err := add(scheme); err != nil {
		return nil, err
	}
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	cfg = rest.CopyConfig(cfg)
	cfg.GroupVersion = &group
	cfg.APIPath = path
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	cfg.QPS, cfg.Burst = 50, 100
	cfg.Timeout = 0 // watches have none; the methods below set theirs
	Bound(cfg)
	if cfg.UserAgent == "" {
		cfg.UserAgent = "microk8s"
	}
	c, err := rest.RESTClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("cannot make a client of the API server: %w", err)
	}
	return c, nil
}

// Nodes lists all nodes.
func (c *Core) Nodes(ctx context.Context) ([]corev1.Node, error) {
	var list corev1.NodeList
	if err := c.Get().Resource("nodes").Timeout(callTimeout).Do(ctx).Into(&list); err != nil {
		return nil, fmt.Errorf("cannot list the nodes: %w", err)
	}
	return list.Items, nil
}

// Ready reports whether a node's kubelet calls it ready.
func Ready(n *corev1.Node) bool {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// Secret reads a Secret of the system namespace.
func (c *Core) Secret(ctx context.Context, name string) (*corev1.Secret, error) {
	var s corev1.Secret
	err := c.Get().Namespace(SystemNamespace).Resource("secrets").Name(name).Timeout(callTimeout).Do(ctx).Into(&s)
	return &s, err
}

// CreateSecret creates one in the system namespace.
func (c *Core) CreateSecret(ctx context.Context, s *corev1.Secret) (*corev1.Secret, error) {
	var out corev1.Secret
	s.Namespace = SystemNamespace
	err := c.Post().Namespace(SystemNamespace).Resource("secrets").Body(s).Timeout(callTimeout).Do(ctx).Into(&out)
	return &out, err
}

// UpdateSecret replaces one; a conflict is the API server's error.
func (c *Core) UpdateSecret(ctx context.Context, s *corev1.Secret) (*corev1.Secret, error) {
	var out corev1.Secret
	err := c.Put().Namespace(SystemNamespace).Resource("secrets").Name(s.Name).Body(s).Timeout(callTimeout).Do(ctx).Into(&out)
	return &out, err
}
