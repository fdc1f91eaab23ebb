package enforcer

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic/dynamicinformer"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/rest"

	"microk8s/internal/hostnet"
	"microk8s/internal/hostwatch"
	"microk8s/internal/leaktest"
	"microk8s/internal/netpolicy"
	"microk8s/internal/netpolicy/feed"
	"microk8s/internal/snapenv"
)

// The enforcer runs nft from any of its threads, so all tests are in a network namespace of their own.
func TestMain(m *testing.M) {
	if os.Getuid() != 0 || os.Getenv("IN_NAMESPACE") != "" {
		leaktest.Main(m) // ends the process
	}
	cmd := exec.Command(os.Args[0], os.Args[1:]...)
	cmd.Env = append(os.Environ(), "IN_NAMESPACE=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// host is a node with the real table and a fake of the API server's informers.
type host struct {
	*fake.Clientset
	t   *testing.T
	env snapenv.Env
	url string

	mu       sync.Mutex
	reported []string
}

func newHost(t *testing.T) *host {
	t.Helper()
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	h := &host{Clientset: fake.NewClientset(), t: t, env: snapenv.Under(t.TempDir())}
	factory := informers.NewSharedInformerFactory(h, 0)
	client := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{netpolicy.ClusterPolicies: "ClusterNetworkPolicyList"})
	clusterFactory := dynamicinformer.NewDynamicSharedInformerFactory(client, 0)
	server, err := feed.NewServer(factory, clusterFactory)
	if err != nil {
		t.Fatal(err)
	}
	factory.Start(t.Context().Done())
	clusterFactory.Start(t.Context().Done())
	factory.WaitForCacheSync(t.Context().Done())
	clusterFactory.WaitForCacheSync(t.Context().Done())
	mux := http.NewServeMux()
	mux.Handle(feed.Path, server)
	h.serve(mux)
	if err := exec.Command("ip", "link", "set", "lo", "up").Run(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = exec.Command("nft", "flush", "ruleset").Run() })
	return h
}

func (h *host) serve(handler http.Handler) {
	s := httptest.NewServer(handler)
	h.url = s.URL
	h.t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
}

func (h *host) new() *Enforcer {
	h.t.Helper()
	e, err := New(h.t.Context(), Options{Env: h.env, NodeName: "n1", Log: slog.New(slog.DiscardHandler), Report: func(why string) {
		h.mu.Lock()
		defer h.mu.Unlock()
		if n := len(h.reported); n == 0 || h.reported[n-1] != why {
			h.reported = append(h.reported, why)
		}
	}})
	if err != nil {
		h.t.Fatal(err)
	}
	return e
}

func (h *host) run(e *Enforcer) (stop func()) {
	ctx, cancel := context.WithCancel(h.t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := e.Run(ctx, &rest.Config{Host: h.url}); err != nil {
			h.t.Error(err)
		}
	})
	watch := hostwatch.New(slog.New(slog.DiscardHandler))
	wg.Go(func() { watch.Run(ctx) })
	owner := watch.Register(ctx, e.Owner())
	stop = func() {
		cancel()
		wg.Wait()
		owner.Close()
	}
	h.t.Cleanup(stop)
	return stop
}

// add makes a pod as the scheduler leaves it, on n1: the kubelet has not said its address.
func (h *host) add(name string, uid types.UID) {
	h.t.Helper()
	_, err := h.CoreV1().Pods("shop").Create(h.t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: uid, Labels: map[string]string{"app": name}, Annotations: map[string]string{}},
		Spec:       corev1.PodSpec{NodeName: "n1"},
	}, metav1.CreateOptions{})
	if err != nil {
		h.t.Fatal(err)
	}
}

// result is what the CNI library writes at the end of ADD.
func (h *host) result(uid, ip string) string {
	h.t.Helper()
	path := filepath.Join(resultsDir(h.env), hostnet.NetworkName+"-"+uid+"-eth0")
	data, err := json.Marshal(map[string]any{
		"kind": "cniCacheV1", "networkName": hostnet.NetworkName, "cniArgs": [][2]string{{"K8S_POD_UID", uid}},
		"result": map[string]any{"cniVersion": "1.0.0", "ips": []any{map[string]any{"address": ip}}},
	})
	if err == nil {
		err = os.MkdirAll(filepath.Dir(path), 0o700)
	}
	if err == nil {
		err = os.WriteFile(path, data, 0o600)
	}
	if err != nil {
		h.t.Fatal(err)
	}
	return path
}

func table() string {
	out, _ := exec.Command("nft", "list", "table", "inet", hostnet.PolicyTable).CombinedOutput()
	return string(out)
}

func (h *host) await(what string, ok func(table string) bool) {
	h.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(table()); {
		if time.Now().After(deadline) {
			h.t.Fatalf("never: %s\n%s", what, table())
		}
		time.Sleep(5 * time.Millisecond) // between looks; the condition is what counts
	}
}

func has(s string) func(string) bool {
	return func(table string) bool { return strings.Contains(table, s) }
}

func lacks(s string) func(string) bool {
	return func(table string) bool { return !strings.Contains(table, s) }
}

func TestEnforcer(t *testing.T) {
	h := newHost(t)
	e := h.new()
	e.Partial("not the moon")
	if err := e.SetSubnets(t.Context(), []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24")}); err != nil {
		t.Fatal(err)
	}
	if got := table(); !strings.Contains(got, "elements = { 10.1.0.0/24 }") {
		t.Fatalf("pods are not closed before anything is known:\n%s", got)
	}
	stop := h.run(e)
	h.add("web", "uid-x")
	gone := h.result("uid-x", "10.1.0.7/24")
	h.await("the address that the CNI has given", has("10.1.0.7 : return"))
	h.await("what this host cannot judge, reported", func(string) bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return slices.Equal(h.reported, []string{"not the moon"})
	})
	policy := &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "deny"},
		Spec:       networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}},
	}
	if _, err := h.NetworkingV1().NetworkPolicies("shop").Create(t.Context(), policy, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	h.await("the policy", has("10.1.0.7 : goto ingress-"))
	if out, err := exec.Command("nft", "flush", "ruleset").CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	h.await("the table, after somebody has flushed it", has("10.1.0.7 : goto ingress-"))
	if out, err := exec.Command("nft", "flush", "chain", "inet", hostnet.PolicyTable, "ingress").CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	h.await("the chain, after somebody has emptied it", has("vmap @ingress4"))

	// The process ends and comes again: the rules stay meanwhile.
	stop()
	before := table()
	e = h.new()
	if err := e.SetSubnets(t.Context(), []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24")}); err != nil {
		t.Fatal(err)
	}
	if got := table(); got != before {
		t.Errorf("a new process has changed the rules before it knows better:\n%s", got)
	}
	h.run(e)
	if err := os.Remove(gone); err != nil {
		t.Fatal(err)
	}
	h.await("the address that the CNI has taken back", lacks("10.1.0.7 :"))
}

// Control-plane nodes of an earlier version know nothing to enforce: pods are not closed for ever.
func TestEarlierControlPlane(t *testing.T) {
	h := newHost(t)
	h.serve(http.NotFoundHandler())
	e := h.new()
	if err := e.SetSubnets(t.Context(), []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24")}); err != nil {
		t.Fatal(err)
	}
	h.run(e)
	h.await("no table", lacks("chain"))
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.reported) != 1 || !strings.Contains(h.reported[0], "upgrade the control-plane nodes") {
		t.Errorf("reported %q", h.reported)
	}
}

// A node that is told nothing says so.
func TestNothingComes(t *testing.T) {
	h := newHost(t)
	h.serve(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no right", http.StatusForbidden) }))
	e := h.new()
	e.patience = 0
	h.run(e)
	h.await("the reason", func(string) bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return len(h.reported) > 0 && strings.Contains(h.reported[0], "do not reach this node") && strings.Contains(h.reported[0], "no right")
	})
}

func TestParseResult(t *testing.T) {
	for name, data := range map[string]string{
		"empty":           "",
		"half":            `{"networkName":"microk8s","cniArgs":[["K8S_POD_UID","x"]],"result":{"ips":[{"addr`,
		"another network": `{"networkName":"other","cniArgs":[["K8S_POD_UID","x"]],"result":{"ips":[{"address":"10.1.0.2/24"}]}}`,
		"no pod":          `{"networkName":"microk8s","cniArgs":[["IgnoreUnknown","1"]],"result":{"ips":[{"address":"10.1.0.2/24"}]}}`,
		"wrong address":   `{"networkName":"microk8s","cniArgs":[["K8S_POD_UID","x"]],"result":{"ips":[{"address":"x"}]}}`,
	} {
		if uid, ips := parseResult([]byte(data)); uid != "" {
			t.Errorf("%s: pod %q with %v", name, uid, ips)
		}
	}
	uid, ips := parseResult([]byte(`{"networkName":"microk8s","cniArgs":[["K8S_POD_UID","x"]],"result":{"ips":[{"address":"10.1.0.2/24"},{"address":"fd01::2/64"}]}}`))
	if uid != "x" || fmt.Sprint(ips) != "[10.1.0.2 fd01::2]" {
		t.Errorf("got %q %v", uid, ips)
	}
}
