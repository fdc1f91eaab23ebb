package bootstrap

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"

	"microk8s/internal/kube/kubetest"
	"microk8s/internal/netpolicy/feed"
	"microk8s/internal/snapenv"
)

const manifests = "../../snap/manifests"

var quietly = slog.New(slog.DiscardHandler)

// ours is what an object of the product's has in its metadata.
func ours(name string) map[string]any {
	return map[string]any{"name": name, "uid": "uid of " + name, "labels": map[string]any{Label: LabelValue},
		"managedFields": []any{map[string]any{"manager": FieldManager, "operation": "Apply"}}}
}

// newFake has an API server on which an IngressClass cannot be changed.
func newFake(t *testing.T) (*kubetest.Server, *rest.Config) {
	f := kubetest.New(t)
	f.Check = func(old, fresh metav1.Object) error {
		was, ok := old.(*networkingv1.IngressClass)
		if ok && !cmp.Equal(was.Spec, fresh.(*networkingv1.IngressClass).Spec) {
			return apierrors.NewInvalid(schema.GroupKind{Kind: "IngressClass"}, was.Name, nil)
		}
		return nil
	}
	return f, f.Config()
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
	"apiextensions.k8s.io/v1/customresourcedefinitions/addons.microk8s.io",
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
	f.Set(other, old)
	want := slices.Sorted(slices.Values(append([]string{rbac + "clusterroles/user"}, everything...)))
	for range 2 {
		if err := Apply(t.Context(), cfg, manifests, quietly); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, f.Paths()); diff != "" {
			t.Errorf("objects differ (-want +got):\n%s", diff)
		}
	}
}

// TestKept: what holds data of people's stays when the rest of a set goes, until everything is to go.
func TestKept(t *testing.T) {
	f, cfg := newFake(t)
	object := func() []*unstructured.Unstructured {
		return []*unstructured.Unstructured{{Object: map[string]any{"apiVersion": "v1", "kind": "Namespace",
			"metadata": map[string]any{"name": "ns", "annotations": map[string]any{KeepAnnotation: "data"}}}}}
	}
	for _, everything := range []bool{false, true} {
		set := Set{Label: Label, Value: "x", Objects: object()}
		result, err := Sync(t.Context(), cfg, set, quietly)
		if err != nil {
			t.Fatal(err)
		}
		set = Set{Label: Label, Value: "x", Kinds: []schema.GroupVersionKind{{Version: "v1", Kind: "Namespace"}}, Owned: result.Owned, Everything: everything}
		if _, err := Sync(t.Context(), cfg, set, quietly); err != nil {
			t.Fatal(err)
		}
		if left := f.Paths(); (len(left) == 0) != everything {
			t.Errorf("everything: %v: left are %v", everything, left)
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
	if diff := cmp.Diff(everything, f.Paths()); diff != "" {
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
	if diff := cmp.Diff(without("microk8s:network-policy"), f.Paths()); diff != "" {
		t.Errorf("with cni.yaml objects differ (-want +got):\n%s", diff)
	}
}

func TestNothingIsRemovedWhenSomethingFailed(t *testing.T) {
	f, cfg := newFake(t)
	f.Set(map[string]any{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": ours("old")})
	f.Refuse = func(r *http.Request) int {
		if r.Method == http.MethodPatch && strings.Contains(r.URL.Path, "/validatingadmissionpolicies/") {
			return http.StatusForbidden
		}
		return 0
	}
	err := Apply(t.Context(), cfg, manifests, quietly)
	if err == nil || !strings.Contains(err.Error(), "ValidatingAdmissionPolicy.admissionregistration.k8s.io/node-registration.microk8s.io") {
		t.Errorf("error is %v, want one that names the refused object", err)
	}
	want := slices.Sorted(slices.Values(append([]string{rbac + "clusterroles/old"}, without("validatingadmissionpolicies/")...)))
	if diff := cmp.Diff(want, f.Paths()); diff != "" {
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
			if got := f.Paths(); len(got) > 0 {
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
	known := runtime.NewScheme()
	if err := errors.Join(scheme.AddToScheme(known), apiextensionsv1.AddToScheme(known)); err != nil {
		t.Fatal(err)
	}
	strict := serializer.NewCodecFactory(known, serializer.EnableStrict).UniversalDeserializer()
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

// An object whose manifest names no namespace is in the namespace default, and stays at the next time.
func TestNoNamespaceIsDefault(t *testing.T) {
	f, cfg := newFake(t)
	for range 2 {
		role := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": map[string]any{"name": "r"}}}
		if _, err := Sync(t.Context(), cfg, Set{Label: "set", Value: "x", Objects: []*unstructured.Unstructured{role}}, quietly); err != nil {
			t.Fatal(err)
		}
		if got, want := f.Paths(), []string{rbac + "namespaces/default/roles/r"}; !slices.Equal(got, want) {
			t.Errorf("objects %q, want %q", got, want)
		}
	}
}
