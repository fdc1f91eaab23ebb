package addon

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"microk8s/internal/bootstrap"
	"microk8s/internal/kube/kubetest"
	"microk8s/internal/snapenv"
)

func open(t *testing.T) (*Set, *kubetest.Server) {
	t.Helper()
	f := kubetest.New(t)
	env := snapenv.Under(t.TempDir())
	env.Snap = "../.."
	s, err := Open(env, f.Config(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s, f
}

// cut refuses changes after so many, 0 for none.
func cut(f *kubetest.Server, after int) {
	f.Lock()
	defer f.Unlock()
	done := 0
	f.Refuse = func(r *http.Request) int {
		if r.Method == http.MethodGet || after == 0 {
			return 0
		}
		if done++; done > after {
			return http.StatusForbidden
		}
		return 0
	}
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
	"rbac.authorization.k8s.io/v1/namespaces/kube-system/rolebindings/microk8s:coredns-custom",
	"rbac.authorization.k8s.io/v1/namespaces/kube-system/roles/microk8s:coredns-custom",
	inSystem + "configmaps/coredns",
	inSystem + "configmaps/coredns-custom-ignored",
	inSystem + "serviceaccounts/coredns",
	inSystem + "services/kube-dns",
}

func with(more ...string) []string {
	return slices.Sorted(slices.Values(append(slices.Clone(dnsObjects), more...)))
}

func wantObjects(t *testing.T, f *kubetest.Server, what string, want []string) {
	t.Helper()
	got := slices.DeleteFunc(f.Paths(), func(path string) bool { return strings.HasPrefix(path, "microk8s.io/") })
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// setRecord is what another version of the product has recorded for dns.
func setRecord(f *kubetest.Server, text string) {
	f.Edit(record, func(o map[string]any) { o["data"] = map[string]any{"record": text} })
}

func TestDefaultsOnceOnly(t *testing.T) {
	s, f := open(t)
	for range 2 {
		if err := s.Reconcile(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantObjects(t, f, "after the first start", with(marker, record))
	}
	if err := s.Disable(t.Context(), "dns"); err != nil {
		t.Fatal(err)
	}
	wantObjects(t, f, "disabled", []string{marker})
	if err := s.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantObjects(t, f, "after another start", []string{marker})
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
				cut(f, n)
				err := tc.do(s)
				cut(f, 0)
				if err := s.Reconcile(t.Context()); err != nil {
					t.Fatal(err)
				}
				wantObjects(t, f, "cut off", tc.want)
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
	setRecord(f, `{"version":"1.0","arguments":["192.0.2.53"],"applied":"another","kinds":[{"apiVersion":"v1","kind":"ConfigMap"}]}`)
	old := *configMap("old", map[string]string{Label: "dns"}, nil)
	old.SetManagedFields([]metav1.ManagedFieldsEntry{{Manager: bootstrap.FieldManager, Operation: metav1.ManagedFieldsOperationApply}})
	f.Set(&old)
	f.Remove(inSystem + "services/kube-dns")
	if err := s.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantObjects(t, f, "after the upgrade", with(marker, record))
	corefile, _, _ := unstructured.NestedString(f.Get(inSystem+"configmaps/coredns").Object, "data", "Corefile")
	if !strings.Contains(corefile, "forward . 192.0.2.53 {\n") {
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
		f.Set(chart("coredns"))
		a, _ := s.Find("dns")
		_, err := s.Enable(t.Context(), a, nil)
		var theirs *bootstrap.ForeignError
		if !errors.As(err, &theirs) || err.Error() != "made by others: ServiceAccount/kube-system/coredns (Helm release metrics in kube-system)" {
			t.Errorf("error: %v", err)
		}
		wantObjects(t, f, "refused", []string{account})
		if n := f.Changes(); n != 0 {
			t.Errorf("%d changes", n)
		}
		// The default addon is not tried again at each start.
		for range 2 {
			if err := s.Reconcile(t.Context()); err != nil {
				t.Error(err)
			}
			wantObjects(t, f, "started", []string{marker, account})
		}
	})
	t.Run("adopted", func(t *testing.T) {
		s, f := open(t)
		f.Set(chart("coredns"))
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
		wantObjects(t, f, "disabled", []string{})
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
		f.Set(theirs)
		setRecord(f, `{"version":"1.0","arguments":[],"applied":"another","kinds":[{"apiVersion":"v1","kind":"ServiceAccount"}]}`)
		if err := s.Reconcile(t.Context()); err != nil {
			t.Errorf("the upgrade: %v", err)
		}
		var left []bootstrap.Foreign
		s.Left = func(o bootstrap.Foreign) { left = append(left, o) }
		if err := s.Disable(t.Context(), "dns"); err != nil {
			t.Fatal(err)
		}
		wantObjects(t, f, "disabled", []string{marker, account})
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
	f.Edit(inSystem+"configmaps/coredns", func(o map[string]any) { o["data"] = map[string]any{"Corefile": "mine"} })
	before := f.Changes()
	if err := s.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := f.Changes() - before; n != 0 {
		t.Errorf("%d changes were made", n)
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
		v, _, _ := unstructured.NestedString(f.Get(dnsObjects[0]).Object, "spec", "template", "metadata", "annotations", configurationAnnotation)
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
