package feed

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/rest"
	k8stesting "k8s.io/client-go/testing"

	"microk8s/internal/netpolicy"
)

// cluster is a fake of the API server's informers, behind the real server of the feed.
type cluster struct {
	*fake.Clientset
	policies dynamic.NamespaceableResourceInterface // of the whole cluster
	server   *Server
	http     *httptest.Server
	gone     atomic.Bool // the API server is of an earlier version
}

// newCluster is one that has the kind ClusterNetworkPolicy, or is without it.
func newCluster(t *testing.T, without bool) *cluster {
	t.Helper()
	client := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{netpolicy.ClusterPolicies: "ClusterNetworkPolicyList"})
	c := &cluster{Clientset: fake.NewClientset(), policies: client.Resource(netpolicy.ClusterPolicies)}
	factory, clusterFactory := informers.NewSharedInformerFactory(c, 0), dynamicinformer.NewDynamicSharedInformerFactory(client, 0)
	var err error
	if c.server, err = NewServer(factory, clusterFactory); err != nil {
		t.Fatal(err)
	}
	factory.Start(t.Context().Done())
	factory.WaitForCacheSync(t.Context().Done())
	if without {
		client.PrependReactor("list", netpolicy.ClusterPolicies.Resource, func(k8stesting.Action) (bool, runtime.Object, error) {
			return true, nil, apierrors.NewNotFound(netpolicy.ClusterPolicies.GroupResource(), "")
		})
	}
	clusterFactory.Start(t.Context().Done())
	if !without {
		clusterFactory.WaitForCacheSync(t.Context().Done())
	}
	mux := http.NewServeMux()
	mux.HandleFunc(Path, func(w http.ResponseWriter, r *http.Request) {
		if c.gone.Load() {
			http.NotFound(w, r)
			return
		}
		c.server.ServeHTTP(w, r)
	})
	c.http = httptest.NewServer(mux)
	t.Cleanup(func() {
		c.http.CloseClientConnections()
		c.http.Close()
	})
	return c
}

func pod(name, ip string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, Labels: map[string]string{"app": name}, Annotations: map[string]string{"secret": "annotation"}},
		Spec:       corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{Image: "secret-image", Env: []corev1.EnvVar{{Name: "KEY", Value: "secret"}}, Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 80}}}}},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: ip}}},
	}
}

// follow follows until the test ends, and returns a function that waits for a state.
func (c *cluster) follow(t *testing.T) (await func(what string, ok func(netpolicy.Input) bool), failures <-chan error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	inputs, failed := make(chan *State, 1), make(chan error, 64)
	go func() {
		defer close(done)
		err := Follow(ctx, &rest.Config{Host: c.http.URL}, func(s *State) {
			select {
			case inputs <- s:
			default:
			}
		}, func(err error) {
			select {
			case failed <- err:
			default:
			}
		})
		if err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	var state *State
	return func(what string, ok func(netpolicy.Input) bool) {
		t.Helper()
		late := time.After(20 * time.Second)
		for {
			if state != nil && ok(state.Input("n1")) {
				return
			}
			select {
			case state = <-inputs:
			case <-late:
				t.Fatalf("never seen: %s", what)
			}
		}
	}, failed
}

func find(in netpolicy.Input, name string) *netpolicy.Pod {
	for _, p := range in.Pods {
		if p.Name == name {
			return p
		}
	}
	return nil
}

func TestFollow(t *testing.T) {
	c := newCluster(t, false)
	ctx := t.Context()
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(c.CoreV1().Pods("default").Create(ctx, pod("a", "10.1.0.2"), metav1.CreateOptions{}))
	must(c.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default", Labels: map[string]string{"x": "y"}}}, metav1.CreateOptions{}))
	must(c.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "bare"}}, metav1.CreateOptions{}))
	must(c.CoreV1().Nodes().Create(ctx, &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "n1"}, Spec: corev1.NodeSpec{PodCIDRs: []string{"10.1.0.0/24"}},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "10.0.0.1"}, {Type: corev1.NodeHostName, Address: "n1"}}},
	}, metav1.CreateOptions{}))
	await, failed := c.follow(t)
	var first *netpolicy.Pod
	await("everything there is", func(in netpolicy.Input) bool {
		first = find(in, "a")
		return first != nil && len(in.Namespaces) == 2 && in.Namespaces["default"]["x"] == "y" && len(in.Nodes) == 1 && len(in.Nodes[0].Addresses) == 1
	})
	must(c.NetworkingV1().NetworkPolicies("default").Create(ctx, &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "p"}}, metav1.CreateOptions{}))
	await("a policy", func(in netpolicy.Input) bool { return len(in.Policies) == 1 && in.Policies[0].Key() == "default/p" })
	must(nil, c.NetworkingV1().NetworkPolicies("default").Delete(ctx, "p", metav1.DeleteOptions{}))
	await("no policy", func(in netpolicy.Input) bool { return len(in.Policies) == 0 })
	tier := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": netpolicy.ClusterPolicies.GroupVersion().String(), "kind": "ClusterNetworkPolicy", "metadata": map[string]any{"name": "c"},
		"spec": map[string]any{"tier": "Admin", "priority": int64(7), "subject": map[string]any{"namespaces": map[string]any{}}},
	}}
	must(c.policies.Create(ctx, tier, metav1.CreateOptions{}))
	await("a policy of the whole cluster", func(in netpolicy.Input) bool { return len(in.Cluster) == 1 && in.Cluster[0].Spec.Priority == 7 })
	must(nil, c.policies.Delete(ctx, "c", metav1.DeleteOptions{}))
	await("no such policy", func(in netpolicy.Input) bool { return len(in.Cluster) == 0 })
	must(c.CoreV1().Pods("default").Create(ctx, pod("b", "10.1.0.3"), metav1.CreateOptions{}))
	await("another pod", func(in netpolicy.Input) bool { return find(in, "b") != nil })
	ended := pod("b", "10.1.0.3")
	ended.Status.Phase = corev1.PodSucceeded
	must(c.CoreV1().Pods("default").Update(ctx, ended, metav1.UpdateOptions{}))
	await("a pod that has ended", func(in netpolicy.Input) bool { return find(in, "b") == nil })

	// The connection ends, and things go while nobody tells.
	must(c.CoreV1().Pods("default").Create(ctx, pod("c", "10.1.0.4"), metav1.CreateOptions{}))
	await("a third pod", func(in netpolicy.Input) bool { return find(in, "c") != nil })
	c.gone.Store(true)
	c.http.CloseClientConnections()
	for err := range failed {
		if errors.Is(err, ErrUnknown) {
			break
		}
	}
	must(nil, c.CoreV1().Pods("default").Delete(ctx, "c", metav1.DeleteOptions{}))
	c.gone.Store(false)
	await("the third pod gone", func(in netpolicy.Input) bool { return find(in, "c") == nil })
	await("the first as it was", func(in netpolicy.Input) bool { return find(in, "a") == first })
}

// What nodes may not know does not leave the API server, and what has not changed is not sent again.
// A cluster may be without policies of the whole cluster; the others are served all the same.
func TestWithoutTheKind(t *testing.T) {
	c := newCluster(t, true)
	if _, err := c.CoreV1().Pods("default").Create(t.Context(), pod("a", "10.1.0.2"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	await, _ := c.follow(t)
	await("a pod", func(in netpolicy.Input) bool { return find(in, "a") != nil })
}

func TestWire(t *testing.T) {
	c := newCluster(t, false)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if _, err := c.CoreV1().Pods("default").Create(ctx, pod("a", "10.1.0.2"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.http.URL+Path, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	lines := bufio.NewScanner(res.Body)
	next := func() (out map[string]any) {
		t.Helper()
		if !lines.Scan() {
			t.Fatal("the answer has ended", lines.Err())
		}
		if strings.Contains(lines.Text(), "secret") {
			t.Errorf("nodes are told %s", lines.Text())
		}
		if err := json.Unmarshal(lines.Bytes(), &out); err != nil {
			t.Fatal(err)
		}
		return out
	}
	for saw := false; !saw; { // the pod may come before or after "synced"
		saw = next()["kind"] == kindPod
	}
	busy := pod("a", "10.1.0.2")
	busy.Status.Message = "a change that is of no meaning here"
	busy.Annotations["more"] = "of it"
	if _, err := c.CoreV1().Pods("default").Update(ctx, busy, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.CoreV1().Pods("default").Create(ctx, pod("b", "10.1.0.3"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	got := next()
	for got["kind"] == kindSynced {
		got = next()
	}
	if got["key"] != "default/b" {
		t.Errorf("got %v, want default/b", got)
	}
	c.server.Close()
	if lines.Scan() {
		t.Errorf("the answer goes on after the server was closed: %s", lines.Text())
	}
}

// A reader that does not read is owed each thing once, however often it changes.
func TestSlowReader(t *testing.T) {
	s := &Server{done: make(chan struct{}), objects: map[id]json.RawMessage{}, readers: map[*reader]struct{}{}}
	me := &reader{pending: map[id]struct{}{}, wake: make(chan struct{}, 1)}
	s.readers[me] = struct{}{}
	i := id{kindPod, "default/a"}
	for _, state := range []string{`1`, `2`, `3`} {
		s.change(i, json.RawMessage(state))
	}
	if got := s.take(me); !reflect.DeepEqual(got, []line{{kindPod, "default/a", json.RawMessage(`3`)}}) {
		t.Errorf("got %v", got)
	}
	s.change(i, json.RawMessage(`3`))
	s.change(id{kindPod, "default/never-was"}, nil)
	if got := s.take(me); len(got) != 0 {
		t.Errorf("no change is told as %v", got)
	}
	s.change(i, nil)
	if got := s.take(me); !reflect.DeepEqual(got, []line{{kindPod, "default/a", nil}}) {
		t.Errorf("got %v", got)
	}
}

func TestMethod(t *testing.T) {
	w := httptest.NewRecorder()
	newCluster(t, false).server.ServeHTTP(w, httptest.NewRequest(http.MethodPost, Path, nil))
	if w.Code != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", w.Code)
	}
}
