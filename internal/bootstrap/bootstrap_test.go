package bootstrap

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"microk8s/internal/netpolicy/feed"
	"microk8s/internal/snapenv"
)

const manifests = "../../snap/manifests"

var quietly = slog.New(slog.DiscardHandler)

// fakeAPI is a fake of an API server, not one: it keeps what is applied to it, knows the
// kinds of this test, and checks only what is said here. Real ones are in the node tests.
type fakeAPI struct {
	mu      sync.Mutex
	objects map[string]map[string]any // by path
	refuse  string                    // part of the path of objects that it does not accept
}

var kinds = map[string][]metav1.APIResource{
	"rbac.authorization.k8s.io/v1": {
		{Name: "clusterroles", Kind: "ClusterRole"}, {Name: "clusterrolebindings", Kind: "ClusterRoleBinding"},
		{Name: "roles", Kind: "Role", Namespaced: true}, {Name: "rolebindings", Kind: "RoleBinding", Namespaced: true},
	},
	"admissionregistration.k8s.io/v1": {
		{Name: "validatingadmissionpolicies", Kind: "ValidatingAdmissionPolicy"},
		{Name: "validatingadmissionpolicybindings", Kind: "ValidatingAdmissionPolicyBinding"},
	},
	"networking.k8s.io/v1": {{Name: "ingressclasses", Kind: "IngressClass"}},
}

// ours is what an object of the product's has in its metadata.
func ours(name string) map[string]any {
	return map[string]any{"name": name, "uid": "uid of " + name, "labels": map[string]any{Label: LabelValue},
		"managedFields": []any{map[string]any{"manager": FieldManager, "operation": "Apply"}}}
}

func (f *fakeAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	answer := func(code int, v any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		json.NewEncoder(w).Encode(v)
	}
	reasons := map[int]metav1.StatusReason{404: metav1.StatusReasonNotFound, 409: metav1.StatusReasonConflict, 422: metav1.StatusReasonInvalid}
	status := func(code int) {
		answer(code, metav1.Status{Status: "Failure", Code: int32(code), Reason: reasons[code], Message: r.URL.Path})
	}
	path := strings.TrimPrefix(r.URL.Path, "/apis/")
	switch {
	case r.URL.Path == "/api":
		answer(200, metav1.APIVersions{Versions: []string{}})
	case r.URL.Path == "/apis":
		list := metav1.APIGroupList{}
		for gv := range kinds {
			group, version, _ := strings.Cut(gv, "/")
			v := metav1.GroupVersionForDiscovery{GroupVersion: gv, Version: version}
			list.Groups = append(list.Groups, metav1.APIGroup{Name: group, Versions: []metav1.GroupVersionForDiscovery{v}, PreferredVersion: v})
		}
		answer(200, list)
	case kinds[path] != nil:
		answer(200, metav1.APIResourceList{GroupVersion: path, APIResources: kinds[path]})
	case r.Method == http.MethodPatch:
		if f.refuse != "" && strings.Contains(path, f.refuse) {
			status(http.StatusForbidden)
			return
		}
		if got := r.Header.Get("Content-Type"); got != "application/apply-patch+yaml" || r.URL.Query().Get("fieldManager") != FieldManager {
			status(http.StatusBadRequest)
			return
		}
		old := f.objects[path]
		if old != nil && r.URL.Query().Get("force") != "true" {
			status(http.StatusConflict)
			return
		}
		body, _ := io.ReadAll(r.Body)
		var o map[string]any
		if yaml.Unmarshal(body, &o) != nil {
			status(http.StatusBadRequest)
			return
		}
		m := o["metadata"].(map[string]any)
		m["uid"] = "uid of " + path
		managers := []any{map[string]any{"manager": FieldManager, "operation": "Apply"}}
		if old != nil {
			if strings.Contains(path, "ingressclasses") && !cmp.Equal(old["spec"], o["spec"]) {
				status(http.StatusUnprocessableEntity)
				return
			}
			u := unstructured.Unstructured{Object: old}
			m["uid"] = string(u.GetUID())
			for _, e := range u.GetManagedFields() {
				if e.Manager != FieldManager {
					managers = append(managers, map[string]any{"manager": e.Manager, "operation": "Update"})
				}
			}
			for k, v := range u.GetAnnotations() {
				if m["annotations"] == nil {
					m["annotations"] = map[string]any{}
				}
				m["annotations"].(map[string]any)[k] = v
			}
		}
		m["managedFields"] = managers
		if r.URL.Query().Get("dryRun") == "" {
			f.objects[path] = o
		}
		answer(200, o)
	case r.Method == http.MethodGet && f.objects[path] != nil:
		answer(200, f.objects[path])
	case r.Method == http.MethodGet && !r.URL.Query().Has("labelSelector"):
		status(http.StatusNotFound)
	case r.Method == http.MethodDelete:
		if f.objects[path] == nil {
			status(http.StatusNotFound)
			return
		}
		delete(f.objects, path)
		answer(200, metav1.Status{Status: "Success"})
	case r.Method == http.MethodGet: // a list over all namespaces
		group, resource := path[:strings.LastIndex(path, "/")+1], path[strings.LastIndex(path, "/")+1:]
		items := []any{}
		for p, o := range f.objects {
			u := unstructured.Unstructured{Object: o}
			want := r.URL.Query().Get("labelSelector")
			if strings.HasPrefix(p, group) && strings.Contains(p, "/"+resource+"/") && want == Label+"="+u.GetLabels()[Label] {
				items = append(items, o)
			}
		}
		answer(200, map[string]any{"apiVersion": "v1", "kind": "List", "items": items})
	default:
		status(http.StatusMethodNotAllowed)
	}
}

func (f *fakeAPI) names() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []string
	for p := range f.objects {
		out = append(out, p)
	}
	slices.Sort(out)
	return out
}

func newFake(t *testing.T) (*fakeAPI, *rest.Config) {
	f := &fakeAPI{objects: map[string]map[string]any{}}
	s := httptest.NewServer(f)
	t.Cleanup(s.Close)
	return f, &rest.Config{Host: s.URL}
}

const (
	rbac      = "rbac.authorization.k8s.io/v1/"
	admission = "admissionregistration.k8s.io/v1/"
)

var everything = []string{
	admission + "validatingadmissionpolicies/node-addresses.microk8s.io",
	admission + "validatingadmissionpolicies/node-claims.microk8s.io",
	admission + "validatingadmissionpolicies/node-registration.microk8s.io",
	admission + "validatingadmissionpolicies/node-role.microk8s.io",
	admission + "validatingadmissionpolicies/node-service-addresses.microk8s.io",
	admission + "validatingadmissionpolicybindings/node-addresses.microk8s.io",
	admission + "validatingadmissionpolicybindings/node-claims.microk8s.io",
	admission + "validatingadmissionpolicybindings/node-registration.microk8s.io",
	admission + "validatingadmissionpolicybindings/node-role.microk8s.io",
	admission + "validatingadmissionpolicybindings/node-service-addresses.microk8s.io",
	rbac + "clusterrolebindings/microk8s:network-policy",
	rbac + "clusterrolebindings/microk8s:pod-network",
	rbac + "clusterroles/microk8s:network-policy",
	rbac + "clusterroles/microk8s:pod-network",
	rbac + "namespaces/default/rolebindings/microk8s:apiserver-proxy",
	rbac + "namespaces/default/roles/microk8s:apiserver-proxy",
}

func TestApplyAndPrune(t *testing.T) {
	f, cfg := newFake(t)
	other := map[string]any{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": map[string]any{"name": "user"}}
	old := map[string]any{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": ours("old")}
	f.objects[rbac+"clusterroles/user"] = other
	f.objects[rbac+"clusterroles/old"] = old
	want := slices.Sorted(slices.Values(append([]string{rbac + "clusterroles/user"}, everything...)))
	for range 2 {
		if err := Apply(t.Context(), cfg, manifests, quietly); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, f.names()); diff != "" {
			t.Errorf("objects differ (-want +got):\n%s", diff)
		}
	}
}

// without is everything but the objects whose path has a part.
func without(part string) []string {
	return slices.DeleteFunc(slices.Clone(everything), func(path string) bool { return strings.Contains(path, part) })
}

// With a CNI of the user's own, nodes do not enforce policies and need no right to read them.
func TestPoliciesStandAside(t *testing.T) {
	f, cfg := newFake(t)
	env := snapenv.Under(t.TempDir())
	if err := Apply(t.Context(), cfg, manifests, quietly, Absent(env)...); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(everything, f.names()); diff != "" {
		t.Errorf("without cni.yaml objects differ (-want +got):\n%s", diff)
	}
	if err := os.MkdirAll(env.CNIConf(), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(env.CNIManifest(), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := Apply(t.Context(), cfg, manifests, quietly, Absent(env)...); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(without("microk8s:network-policy"), f.names()); diff != "" {
		t.Errorf("with cni.yaml objects differ (-want +got):\n%s", diff)
	}
}

func TestNothingIsRemovedWhenSomethingFailed(t *testing.T) {
	f, cfg := newFake(t)
	f.objects[rbac+"clusterroles/old"] = map[string]any{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
		"metadata": ours("old")}
	f.refuse = "validatingadmissionpolicies"
	err := Apply(t.Context(), cfg, manifests, quietly)
	if err == nil || !strings.Contains(err.Error(), "ValidatingAdmissionPolicy.admissionregistration.k8s.io/node-registration.microk8s.io") {
		t.Errorf("error is %v, want one that names the refused object", err)
	}
	want := slices.Sorted(slices.Values(append([]string{rbac + "clusterroles/old"}, without("validatingadmissionpolicies/")...)))
	if diff := cmp.Diff(want, f.names()); diff != "" {
		t.Errorf("objects differ (-want +got):\n%s", diff)
	}
}

func TestBadManifests(t *testing.T) {
	for name, tc := range map[string]struct{ files map[string]string }{
		"none":        {map[string]string{}},
		"not yaml":    {map[string]string{"a.yaml": "{"}},
		"no kind":     {map[string]string{"a.yaml": "apiVersion: v1\nmetadata: {name: x}\n"}},
		"no name":     {map[string]string{"a.yaml": "apiVersion: v1\nkind: ConfigMap\n"}},
		"second only": {map[string]string{"a.yaml": "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\n---\nkind: 7\n"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for file, text := range tc.files {
				if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			f, cfg := newFake(t)
			if err := Apply(t.Context(), cfg, dir, quietly); err == nil {
				t.Error("no error")
			}
			if got := f.names(); len(got) > 0 {
				t.Errorf("applied %v", got)
			}
		})
	}
}

// decode reads the manifests as the API server does: unknown or doubled fields are errors.
func decode(t *testing.T) map[string]any {
	t.Helper()
	objects, err := load(manifests, nil)
	if err != nil {
		t.Fatal(err)
	}
	strict := serializer.NewCodecFactory(scheme.Scheme, serializer.EnableStrict).UniversalDeserializer()
	out := map[string]any{}
	for _, o := range objects {
		data, err := o.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		typed, _, err := strict.Decode(data, nil, nil)
		if err != nil {
			t.Errorf("%s: %v", describe(o), err)
		}
		out[o.GetKind()+"/"+o.GetName()] = typed
	}
	return out
}

// Credentials of a node get exactly these rights beyond the Node authorizer's.
func TestRightsOfNodes(t *testing.T) {
	var got []string
	for _, o := range decode(t) {
		var where string
		var rules []rbacv1.PolicyRule
		switch o := o.(type) {
		case *rbacv1.ClusterRole:
			where, rules = "everywhere", o.Rules
		case *rbacv1.Role:
			where, rules = "in "+o.Namespace, o.Rules
		case *rbacv1.ClusterRoleBinding:
			if len(o.Subjects) != 1 || o.Subjects[0].Kind != "Group" || o.Subjects[0].Name != "system:nodes" {
				t.Errorf("%s has subjects %v", o.Name, o.Subjects)
			}
		case *rbacv1.RoleBinding:
			if len(o.Subjects) != 1 || o.Subjects[0].Kind != "Group" || o.Subjects[0].Name != "system:nodes" {
				t.Errorf("%s has subjects %v", o.Name, o.Subjects)
			}
		}
		for _, r := range rules {
			got = append(got, fmt.Sprintf("%v %v/%v%v %s", r.Verbs, r.APIGroups, r.Resources, r.NonResourceURLs, where))
		}
	}
	slices.Sort(got)
	want := []string{
		"[get] []/[][" + feed.Path + "] everywhere",
		"[list watch] []/[nodes][] everywhere", "[list watch] [discovery.k8s.io]/[endpointslices][] in default",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("rights differ (-want +got):\n%s", diff)
	}
}
