package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"microk8s/internal/certs"
	"microk8s/internal/keyrotation"
	"microk8s/internal/longtest"
	"microk8s/tests/snippet"
)

// TestKeys replaces the keys of a cluster of three and a worker while a pod's token writes, without a
// write that fails. The command is killed at every step of its journal. It takes a quarter of an hour, so
// the gate leaves it out (scripts/test); internal/keyrotation has every point with real files.
func TestKeys(t *testing.T) {
	longtest.Only(t)
	nodes := []string{"n1", "n2", "n3", "w1"}
	c := newCluster(t, nodes...)
	step := steps(t)
	step("start", func(t *testing.T) {
		c.start(t, "n1")
		c.join(t, "n1", "n2")
		c.join(t, "n1", "n3")
		c.join(t, "n1", "w1", "--worker")
		for _, h := range nodes {
			c.waitReady(t, "n1", h)
		}
		c.wantHA(t, "n1", "yes", 3)
	})
	w := c.reloadingWriter(t, "w1", nodes[:3])
	step("what the runbook says", func(t *testing.T) {
		out := c.runbook(t, "n2", "certs look")
		for _, want := range append(slices.Clone(nodes), "serviceaccount", "front-proxy-ca", "the members of the datastore") {
			if !strings.Contains(out, want) {
				t.Errorf("%q is not in\n%s", want, out)
			}
		}
		if out := c.runbook(t, "n2", "certs plan"); !strings.Contains(out, "Nothing was changed.") || !strings.Contains(out, "leaves, on n1, n2, n3, w1:") {
			t.Errorf("%s", out)
		}
		c.run(t, "n2", "microk8s", "config", "--user", "ann")
	})
	before := c.inventories(t, "n2")
	for _, n := range before {
		for _, l := range n.Items {
			if l.Problem != "" {
				t.Errorf("%s: %s: %s", n.Node, l.Name, l.Problem)
			}
		}
	}
	for _, kind := range keyrotation.Kinds() {
		step(kind, func(t *testing.T) {
			w.goOn(t, 20)
			for i, id := range keyrotation.IDs(kind) {
				began := time.Now()
				at := []string{"end", "begin"}[i%2]
				c.wantKilled(t, "n2", "certs-"+kind+"/"+id+"/"+at, "microk8s", "certs", "rotate", kind, "--yes")
				t.Logf("killed at %s %s after %s", id, at, time.Since(began).Round(time.Second))
				w.goOn(t, 5)
			}
			r := c.try(t, "n2", "microk8s", "certs", "rotate", kind, "--yes")
			if r.code != 0 {
				t.Fatalf("%s", r)
			}
			if ends := strings.Contains(r.out, "ann: microk8s config --user ann"); ends != (kind == keyrotation.ServiceAccount) {
				t.Errorf("who must fetch a kubeconfig: %s", r.out)
			}
			w.goOn(t, 20)
			for _, h := range nodes {
				c.waitReady(t, "n1", h)
			}
			c.wantHA(t, "n1", "yes", 3)
			c.wantReplaced(t, kind, before, c.inventories(t, "n2"))
		})
	}
	step("end", func(t *testing.T) {
		w.end(t)
		c.joinAgain(t)
	})
}

// joinAgain has a node leave and join again, with what the cluster has now.
func (c *cluster) joinAgain(t *testing.T) {
	c.run(t, "w1", "microk8s", "leave")
	c.run(t, "n1", "microk8s", "remove-node", "w1")
	c.join(t, "n3", "w1", "--worker")
	c.waitReady(t, "n1", "w1")
}

// runbook runs a snippet of docs/operations.md on a host.
func (c *cluster) runbook(t *testing.T, host, name string) string {
	t.Helper()
	list, err := snippet.Read("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range list {
		if s.Name == name {
			return c.run(t, host, "sh", "-ec", "sudo() { \"$@\"; }\n"+s.Text)
		}
	}
	t.Fatalf("docs/operations.md has no snippet %q", name)
	return ""
}

// inventories is what `microk8s certs` says on a node.
func (c *cluster) inventories(t *testing.T, host string) []certs.Inventory {
	t.Helper()
	var doc struct {
		Nodes  []certs.Inventory
		Silent []struct{ Node, Why string }
	}
	if err := json.Unmarshal([]byte(c.run(t, host, "microk8s", "certs", "-o", "json")), &doc); err != nil {
		t.Fatal(err)
	}
	if len(doc.Silent) > 0 {
		t.Errorf("these say nothing: %v", doc.Silent)
	}
	return doc.Nodes
}

// wantReplaced checks that of one kind nothing of before is left, and nothing is wrong.
func (c *cluster) wantReplaced(t *testing.T, kind string, before, now []certs.Inventory) {
	t.Helper()
	of := map[string][]string{
		keyrotation.Leaves:     {certs.Server, certs.Kubelet, "proxy", certs.Admin, "controller", "scheduler", "apiserver-kubelet-client"},
		keyrotation.FrontProxy: {certs.FrontProxyCA, certs.FrontProxyClient}, keyrotation.Datastore: {certs.Datastore}, keyrotation.ServiceAccount: {certs.ServiceAccount},
	}[kind]
	old := map[string]bool{}
	for _, n := range before {
		for _, l := range n.Items {
			old[n.Node+" "+l.ID] = true
		}
	}
	for _, n := range now {
		for _, l := range n.Items {
			if l.Problem != "" {
				t.Errorf("%s: %s: %s", n.Node, l.Name, l.Problem)
			}
			if slices.Contains(of, l.Name) && old[n.Node+" "+l.ID] && (n.Role != "worker" || l.Name == certs.Kubelet || l.Name == "proxy") {
				t.Errorf("%s: %s has the key of before", n.Node, l.Name)
			}
		}
	}
}

// reloading writes with the token of a pod, through any of several API servers: it reads the token again
// once a minute, as client-go does. An API server that is there and refuses it is a failure.
type reloading struct {
	cancel context.CancelFunc
	all    sync.WaitGroup

	mu      sync.Mutex
	written int
	last    error // why a write was tried again
	failed  error
	gap     time.Duration
}

const tokenAgain = time.Minute

func (c *cluster) reloadingWriter(t *testing.T, worker string, servers []string) *reloading {
	t.Helper()
	k := c.client(t, servers[0])
	c.loadWebImage(t, worker)
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "writer"}}
	if _, err := k.CoreV1().ServiceAccounts(writesNamespace).Create(t.Context(), account, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := k.RbacV1().RoleBindings(writesNamespace).Create(t.Context(), &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "writer"}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "edit"},
		Subjects: []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: writesNamespace, Name: "writer"}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	pod, err := k.CoreV1().Pods(writesNamespace).Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "writer"},
		Spec:       corev1.PodSpec{ServiceAccountName: "writer", NodeName: worker, Containers: []corev1.Container{{Name: "web", Image: webImage, ImagePullPolicy: corev1.PullNever}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	read := func() (string, error) {
		r := c.tryContext(context.WithoutCancel(t.Context()), t, worker, "sh", "-c", "cat /var/snap/microk8s/common/var/lib/kubelet/pods/"+string(pod.UID)+"/volumes/kubernetes.io~projected/*/token")
		if r.code != 0 || r.out == "" {
			return "", fmt.Errorf("there is no token: %s", r)
		}
		return r.out, nil
	}
	eventually(t, 2*time.Minute, func() error { _, err := read(); return err })
	var mu sync.Mutex
	var token string
	var at time.Time
	current := func() (string, error) {
		mu.Lock()
		defer mu.Unlock()
		if time.Since(at) < tokenAgain {
			return token, nil
		}
		fresh, err := read()
		if err == nil {
			token, at = fresh, time.Now()
		}
		return token, err
	}
	var clients []*kubernetes.Clientset
	for _, h := range servers {
		one, err := kubernetes.NewForConfig(&rest.Config{
			Host: "https://" + net.JoinHostPort(c.ip(t, h), "16443"), Dial: c.dialer(worker), QPS: -1, Timeout: 10 * time.Second,
			TLSClientConfig: rest.TLSClientConfig{Insecure: true},
			WrapTransport: func(next http.RoundTripper) http.RoundTripper {
				return roundTrip(func(r *http.Request) (*http.Response, error) {
					text, err := current()
					if err != nil {
						return nil, err
					}
					r = r.Clone(r.Context())
					r.Header.Set("Authorization", "Bearer "+text)
					return next.RoundTrip(r)
				})
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, one)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	w := &reloading{cancel: cancel}
	t.Cleanup(cancel)
	w.all.Go(func() { w.run(ctx, clients) })
	return w
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func (w *reloading) run(ctx context.Context, clients []*kubernetes.Clientset) {
	at, last := 0, time.Now()
	for i := 0; ctx.Err() == nil; i++ {
		name := fmt.Sprintf("reloading-%d", i)
		_, err := clients[at].CoreV1().ConfigMaps(writesNamespace).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		if err == nil || apierrors.IsAlreadyExists(err) {
			w.mu.Lock()
			w.written++
			w.gap = max(w.gap, time.Since(last))
			w.mu.Unlock()
			last = time.Now()
		} else {
			w.mu.Lock()
			w.last = err
			w.mu.Unlock()
			if (apierrors.IsUnauthorized(err) || apierrors.IsForbidden(err)) && ctx.Err() == nil {
				w.mu.Lock()
				w.failed = errors.Join(w.failed, err)
				w.mu.Unlock()
			}
			at, i = (at+1)%len(clients), i-1
		}
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (w *reloading) goOn(t *testing.T, n int) {
	t.Helper()
	count := func() (int, error) {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.written, w.failed
	}
	from, _ := count()
	eventually(t, 2*time.Minute, func() error {
		got, err := count()
		if err != nil {
			t.Fatalf("a token that is read again each minute is refused: %v", err)
		}
		if got-from < n {
			w.mu.Lock()
			defer w.mu.Unlock()
			return fmt.Errorf("%d writes of %d, the last error: %w", got-from, n, w.last)
		}
		return nil
	})
}

func (w *reloading) end(t *testing.T) {
	t.Helper()
	w.cancel()
	w.all.Wait()
	t.Logf("%d writes with a pod's token, the longest gap was %s", w.written, w.gap.Round(10*time.Millisecond))
	if w.failed != nil {
		t.Error(w.failed)
	}
}
