package addon

import (
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"microk8s/internal/bootstrap"
	"microk8s/internal/snapenv"
)

// fakeAPI is a fake of an API server, not one: it keeps what is applied to it and knows the
// kinds of this test. Real ones are in the node tests.
type fakeAPI struct {
	mu      sync.Mutex
	objects map[string]map[string]any // by path
	nodes   []any
	changes int // requests that change something, so far
	limit   int // changes after which everything is refused; 0 is no limit
}

var apis = map[string][]metav1.APIResource{
	"v1": {
		{Name: "configmaps", Kind: "ConfigMap", Namespaced: true}, {Name: "services", Kind: "Service", Namespaced: true},
		{Name: "serviceaccounts", Kind: "ServiceAccount", Namespaced: true},
	},
	"rbac.authorization.k8s.io/v1": {{Name: "clusterroles", Kind: "ClusterRole"}, {Name: "clusterrolebindings", Kind: "ClusterRoleBinding"}},
	"apps/v1":                      {{Name: "deployments", Kind: "Deployment", Namespaced: true}},
}

func (f *fakeAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	answer := func(code int, v any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(v)
	}
	status := func(code int, reason metav1.StatusReason) {
		answer(code, metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Code: int32(code), Reason: reason})
	}
	path := strings.TrimPrefix(strings.TrimPrefix(r.URL.Path, "/apis/"), "/api/")
	if r.Method != http.MethodGet {
		if f.limit > 0 && f.changes >= f.limit {
			status(http.StatusForbidden, metav1.StatusReasonForbidden)
			return
		}
		f.changes++
	}
	switch {
	case r.URL.Path == "/api":
		answer(200, metav1.APIVersions{Versions: []string{"v1"}})
	case r.URL.Path == "/apis":
		list := metav1.APIGroupList{}
		for gv := range apis {
			group, version, ok := strings.Cut(gv, "/")
			if !ok {
				continue
			}
			v := metav1.GroupVersionForDiscovery{GroupVersion: gv, Version: version}
			list.Groups = append(list.Groups, metav1.APIGroup{Name: group, Versions: []metav1.GroupVersionForDiscovery{v}, PreferredVersion: v})
		}
		answer(200, list)
	case path == "v1/nodes":
		answer(200, map[string]any{"apiVersion": "v1", "kind": "NodeList", "items": f.nodes})
	case apis[path] != nil:
		answer(200, metav1.APIResourceList{GroupVersion: path, APIResources: apis[path]})
	case r.Method == http.MethodPatch:
		var o map[string]any
		body, _ := io.ReadAll(r.Body)
		if err := json.Unmarshal(body, &o); err != nil {
			status(http.StatusBadRequest, metav1.StatusReasonBadRequest)
			return
		}
		if old := f.objects[path]; old != nil && r.Header.Get("Content-Type") == string(types.MergePatchType) {
			merge(old, o)
			answer(200, old)
			return
		}
		m := o["metadata"].(map[string]any)
		m["uid"] = "uid of " + path
		managers := []any{map[string]any{"manager": bootstrap.FieldManager, "operation": "Apply"}}
		if old := f.objects[path]; old != nil {
			u := unstructured.Unstructured{Object: old}
			m["uid"] = string(u.GetUID())
			if notes := u.GetAnnotations(); notes != nil && m["annotations"] == nil {
				m["annotations"] = old["metadata"].(map[string]any)["annotations"]
			}
			for _, e := range u.GetManagedFields() {
				if e.Manager != bootstrap.FieldManager {
					managers = append(managers, map[string]any{"manager": e.Manager, "operation": "Update"})
				}
			}
		}
		m["managedFields"] = managers
		f.objects[path] = o
		answer(200, o)
	case r.Method == http.MethodGet && f.objects[path] != nil:
		answer(200, f.objects[path])
	case r.Method == http.MethodDelete && f.objects[path] != nil:
		delete(f.objects, path)
		answer(200, metav1.Status{Status: "Success"})
	case r.Method == http.MethodGet && r.URL.Query().Has("labelSelector"):
		key, value, equals := strings.Cut(r.URL.Query().Get("labelSelector"), "=")
		resource := path[strings.LastIndex(path, "/")+1:]
		items := []any{}
		for _, p := range slices.Sorted(maps.Keys(f.objects)) {
			got, has := (&unstructured.Unstructured{Object: f.objects[p]}).GetLabels()[key]
			if strings.Contains("/"+p, "/"+resource+"/") && has && (!equals || got == value) {
				items = append(items, f.objects[p])
			}
		}
		answer(200, map[string]any{"apiVersion": "v1", "kind": "List", "items": items})
	default:
		status(http.StatusNotFound, metav1.StatusReasonNotFound)
	}
}

// merge does what a merge patch without deletions does.
func merge(into, patch map[string]any) {
	for k, v := range patch {
		old, isMap := into[k].(map[string]any)
		if fresh, ok := v.(map[string]any); ok && isMap {
			merge(old, fresh)
			continue
		}
		into[k] = v
	}
}

func (f *fakeAPI) names() []string { return slices.Sorted(maps.Keys(f.objects)) }

func open(t *testing.T) (*Set, *fakeAPI) {
	t.Helper()
	f := &fakeAPI{objects: map[string]map[string]any{}}
	server := httptest.NewServer(f)
	t.Cleanup(server.Close)
	env := snapenv.Under(t.TempDir())
	env.Snap = "../.."
	s, err := Open(env, &rest.Config{Host: server.URL, QPS: -1}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s, f
}

const (
	inSystem = "v1/namespaces/kube-system/"
	marker   = inSystem + "configmaps/" + DefaultsRecord
	record   = inSystem + "configmaps/microk8s-addon-dns"
)

var dnsObjects = []string{
	"apps/v1/namespaces/kube-system/deployments/coredns",
	"rbac.authorization.k8s.io/v1/clusterrolebindings/coredns",
	"rbac.authorization.k8s.io/v1/clusterroles/coredns",
	inSystem + "configmaps/coredns",
	inSystem + "serviceaccounts/coredns",
	inSystem + "services/kube-dns",
}

func with(more ...string) []string {
	return slices.Sorted(slices.Values(append(slices.Clone(dnsObjects), more...)))
}

func (f *fakeAPI) want(t *testing.T, what string, want []string) {
	t.Helper()
	if diff := cmp.Diff(want, f.names()); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func TestDefaultsOnceOnly(t *testing.T) {
	s, f := open(t)
	for range 2 {
		if err := s.Reconcile(t.Context()); err != nil {
			t.Fatal(err)
		}
		f.want(t, "after the first start", with(marker, record))
	}
	if err := s.Disable(t.Context(), "dns"); err != nil {
		t.Fatal(err)
	}
	f.want(t, "disabled", []string{marker})
	if err := s.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.want(t, "after another start", []string{marker})
	if err := s.Disable(t.Context(), "dns"); err != nil {
		t.Errorf("disabling it again: %v", err)
	}
}

// Wherever an enable or a disable is cut off, the next start leaves all or nothing.
func TestCutOffAnywhere(t *testing.T) {
	dns := func(s *Set) Addon {
		a, _, err := Find(s.catalog, "core/dns")
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	for _, tc := range []struct {
		name string
		on   bool // before
		do   func(s *Set) error
		want []string // if it was begun
	}{
		{"enable", false, func(s *Set) error { _, err := s.Enable(t.Context(), dns(s), nil); return err }, with(marker, record)},
		{"disable", true, func(s *Set) error { return s.Disable(t.Context(), "dns") }, []string{marker}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for n := 1; ; n++ {
				s, f := open(t)
				if err := s.Reconcile(t.Context()); err != nil {
					t.Fatal(err)
				}
				if !tc.on {
					if err := s.Disable(t.Context(), "dns"); err != nil {
						t.Fatal(err)
					}
				}
				f.changes, f.limit = 0, n
				err := tc.do(s)
				f.limit = 0
				if err := s.Reconcile(t.Context()); err != nil {
					t.Fatal(err)
				}
				f.want(t, "cut off", tc.want)
				if err == nil {
					if n < 5 {
						t.Fatalf("only %d changes", n)
					}
					return
				}
				if n > 50 {
					t.Fatal("no end")
				}
			}
		})
	}
}

// The user's arguments stay when a newer version of the product applies its manifests, and
// what the older one had and this one has not goes.
func TestUpgradeKeepsArguments(t *testing.T) {
	s, f := open(t)
	a, _, err := Find(s.catalog, "dns")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Enable(t.Context(), a, []string{"192.0.2.53"}); err != nil {
		t.Fatal(err)
	}
	f.objects[record]["data"].(map[string]any)["record"] = `{"version":"1.0","arguments":["192.0.2.53"],"applied":"another","kinds":[{"apiVersion":"v1","kind":"ConfigMap"}]}`
	old := *configMap("old", map[string]string{Label: "dns"}, nil)
	old.SetManagedFields([]metav1.ManagedFieldsEntry{{Manager: bootstrap.FieldManager, Operation: metav1.ManagedFieldsOperationApply}})
	f.objects[inSystem+"configmaps/old"] = old.Object
	delete(f.objects, inSystem+"services/kube-dns")
	if err := s.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.want(t, "after the upgrade", with(marker, record))
	corefile, _, _ := unstructured.NestedString(f.objects[inSystem+"configmaps/coredns"], "data", "Corefile")
	if !strings.Contains(corefile, "forward . 192.0.2.53\n") {
		t.Errorf("the Corefile lost the servers:\n%s", corefile)
	}
	got, on, err := s.Enabled(t.Context(), "dns")
	if err != nil || !on || !got.Complete() || !slices.Equal(got.Args, []string{"192.0.2.53"}) {
		t.Errorf("recorded: %+v, %v, %v", got, on, err)
	}
}

// Objects that others made are refused before anything is applied. Adopted, they are the addon's;
// what an earlier version took over in silence stays when the addon is disabled.
func TestObjectsOfOthers(t *testing.T) {
	chart := func(name string) map[string]any {
		return map[string]any{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": map[string]any{
			"name": name, "namespace": "kube-system", "uid": "theirs",
			"annotations":   map[string]any{"meta.helm.sh/release-name": "metrics", "meta.helm.sh/release-namespace": "kube-system"},
			"managedFields": []any{map[string]any{"manager": "helm", "operation": "Update"}},
		}}
	}
	const account = inSystem + "serviceaccounts/coredns"
	t.Run("refused", func(t *testing.T) {
		s, f := open(t)
		f.objects[account] = chart("coredns")
		a, _ := s.Find("dns")
		_, err := s.Enable(t.Context(), a, nil)
		var theirs *bootstrap.ForeignError
		if !errors.As(err, &theirs) || err.Error() != "made by others: ServiceAccount/kube-system/coredns (Helm release metrics in kube-system)" {
			t.Errorf("error: %v", err)
		}
		f.want(t, "refused", []string{account})
		if f.changes != 0 {
			t.Errorf("%d changes", f.changes)
		}
		// The default addon is not tried again at each start.
		for range 2 {
			if err := s.Reconcile(t.Context()); err != nil {
				t.Error(err)
			}
			f.want(t, "started", []string{marker, account})
		}
	})
	t.Run("adopted", func(t *testing.T) {
		s, f := open(t)
		f.objects[account] = chart("coredns")
		a, _ := s.Find("dns")
		s.Adopt = true
		if _, err := s.Enable(t.Context(), a, nil); err != nil {
			t.Fatal(err)
		}
		s.Adopt = false
		if _, err := s.Enable(t.Context(), a, []string{"192.0.2.1"}); err != nil {
			t.Errorf("changed later: %v", err)
		}
		if err := s.Disable(t.Context(), "dns"); err != nil {
			t.Fatal(err)
		}
		f.want(t, "disabled", nil)
	})
	t.Run("taken over by an earlier version", func(t *testing.T) {
		s, f := open(t)
		if err := s.Reconcile(t.Context()); err != nil {
			t.Fatal(err)
		}
		theirs := chart("coredns")
		m := theirs["metadata"].(map[string]any)
		m["labels"] = map[string]any{Label: "dns"}
		m["managedFields"] = append(m["managedFields"].([]any), map[string]any{"manager": "microk8s", "operation": "Apply"})
		f.objects[account] = theirs
		f.objects[record]["data"].(map[string]any)["record"] = `{"version":"1.0","arguments":[],"applied":"another","kinds":[{"apiVersion":"v1","kind":"ServiceAccount"}]}`
		if err := s.Reconcile(t.Context()); err != nil {
			t.Errorf("the upgrade: %v", err)
		}
		var left []bootstrap.Foreign
		s.Left = func(o bootstrap.Foreign) { left = append(left, o) }
		if err := s.Disable(t.Context(), "dns"); err != nil {
			t.Fatal(err)
		}
		f.want(t, "disabled", []string{marker, account})
		if len(left) != 1 || left[0].Object != "ServiceAccount/kube-system/coredns" {
			t.Errorf("left: %v", left)
		}
	})
}

// What a person has changed stays at the next start of the same version.
func TestChangesOfThePersonStay(t *testing.T) {
	s, f := open(t)
	if err := s.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.objects[inSystem+"configmaps/coredns"]["data"] = map[string]any{"Corefile": "mine"}
	f.changes = 0
	if err := s.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	if f.changes != 0 {
		t.Errorf("%d changes were made", f.changes)
	}
}

// Pods are renewed when the configuration is another one, and only then.
func TestPodsAreRenewedWithTheConfiguration(t *testing.T) {
	s, f := open(t)
	a, _, err := Find(s.catalog, "dns")
	if err != nil {
		t.Fatal(err)
	}
	annotation := func(args ...string) string {
		if _, err := s.Enable(t.Context(), a, args); err != nil {
			t.Fatal(err)
		}
		v, _, _ := unstructured.NestedString(f.objects[dnsObjects[0]], "spec", "template", "metadata", "annotations", configurationAnnotation)
		return v
	}
	one, two, again := annotation(), annotation("192.0.2.1"), annotation()
	if one == "" || one == two || one != again {
		t.Errorf("annotations %q, %q, %q", one, two, again)
	}
}

func TestReady(t *testing.T) {
	object := func(kind, text string) *unstructured.Unstructured {
		o := &unstructured.Unstructured{}
		if err := o.UnmarshalJSON([]byte(`{"apiVersion":"apps/v1","kind":"` + kind + `",` + text + `}`)); err != nil {
			t.Fatal(err)
		}
		return o
	}
	for _, tc := range []struct {
		kind, text string
		want       bool
	}{
		{"Deployment", `"metadata":{"generation":2},"spec":{"replicas":1},"status":{"observedGeneration":1,"replicas":1,"updatedReplicas":1,"availableReplicas":1}`, false},
		{"Deployment", `"metadata":{"generation":2},"spec":{"replicas":1},"status":{"observedGeneration":2,"replicas":2,"updatedReplicas":1,"availableReplicas":1}`, false},
		{"Deployment", `"metadata":{"generation":2},"spec":{"replicas":1},"status":{"observedGeneration":2,"replicas":1,"updatedReplicas":1}`, false},
		{"Deployment", `"metadata":{"generation":2},"spec":{"replicas":1},"status":{"observedGeneration":2,"replicas":1,"updatedReplicas":1,"availableReplicas":1}`, true},
		{"DaemonSet", `"metadata":{"generation":1},"status":{"observedGeneration":1}`, false},
		{"DaemonSet", `"metadata":{"generation":1},"status":{"observedGeneration":1,"desiredNumberScheduled":2,"updatedNumberScheduled":2,"numberAvailable":1}`, false},
		{"DaemonSet", `"metadata":{"generation":1},"status":{"observedGeneration":1,"desiredNumberScheduled":2,"updatedNumberScheduled":2,"numberAvailable":2}`, true},
	} {
		if got := ready(object(tc.kind, tc.text)); got != tc.want {
			t.Errorf("%s %s: got %v", tc.kind, tc.text, got)
		}
	}
}

func TestPodObstacle(t *testing.T) {
	for text, want := range map[string]string{
		`{"status":{"containerStatuses":[{"state":{"waiting":{"reason":"CrashLoopBackOff","message":"back-off"}},"lastState":{"terminated":{"message":"one\ntwo\n"}}}]}}`: "CrashLoopBackOff: its last words: two, for good",
		`{}`: "",
		`{"status":{"containerStatuses":[{"state":{"waiting":{"reason":"ContainerCreating"}}}]}}`:                                          "",
		`{"status":{"containerStatuses":[{"state":{"running":{}}},{"state":{"waiting":{"reason":"ErrImagePull","message":"no route"}}}]}}`: "ErrImagePull: no route",
		`{"status":{"initContainerStatuses":[{"state":{"waiting":{"reason":"CrashLoopBackOff"}}}]}}`:                                       "CrashLoopBackOff, for good",
		`{"status":{"conditions":[{"type":"PodScheduled","status":"False","message":"0/1 nodes are available"}]}}`:                         "no node can take it: 0/1 nodes are available",
		`{"status":{"phase":"Failed","reason":"Evicted","message":"The node was low on resource: ephemeral-storage. "}}`:                   "Evicted: The node was low on resource: ephemeral-storage.",
		`{"status":{"conditions":[{"type":"PodScheduled","status":"True"}]}}`:                                                              "",
	} {
		o := &unstructured.Unstructured{}
		if err := json.Unmarshal([]byte(text), &o.Object); err != nil {
			t.Fatal(err)
		}
		got, over := PodObstacle(o)
		if over {
			got += ", for good"
		}
		if got != want {
			t.Errorf("%s: got %q, want %q", text, got, want)
		}
	}
}
