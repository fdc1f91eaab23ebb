package bootstrap

import (
	"errors"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

func ingressClass(controller string, metadata map[string]any) map[string]any {
	return map[string]any{"apiVersion": "networking.k8s.io/v1", "kind": "IngressClass", "metadata": metadata,
		"spec": map[string]any{"controller": controller}}
}

// TestIngressClassOfOthers has an IngressClass that cannot be changed. Only one that the product made is
// replaced or removed.
func TestIngressClassOfOthers(t *testing.T) {
	const path = "networking.k8s.io/v1/ingressclasses/nginx"
	plain := func(managers ...string) map[string]any {
		m := map[string]any{"name": "nginx", "uid": "first"}
		for _, x := range managers {
			operation := "Update"
			if x == FieldManager {
				operation = "Apply"
				m["labels"] = map[string]any{Label: LabelValue}
			}
			old, _ := m["managedFields"].([]any)
			m["managedFields"] = append(old, map[string]any{"manager": x, "operation": operation})
		}
		return m
	}
	helm := plain("helm", FieldManager)
	helm["annotations"] = map[string]any{helmRelease: "ingress-nginx"}
	for _, tc := range []struct {
		name     string
		there    map[string]any // its metadata
		set      Set            // what is recorded
		error    string         // of Sync, "" for none
		replaced bool
		removed  bool // by a Sync without objects
	}{
		{"made by a person", plain("kubectl-create"), Set{}, "made by others: IngressClass.networking.k8s.io/nginx (made by kubectl-create)", false, false},
		{"adopted", plain("kubectl-create"), Set{Adopt: true}, "it cannot be changed, and is not replaced", false, false},
		{"adopted before", plain("kubectl-create", FieldManager), Set{Adopted: []types.UID{"first"}}, "it cannot be changed, and is not replaced", false, false},
		{"a chart's, taken over by an earlier version", helm, Set{}, "not replaced because others made it (Helm release ingress-nginx)", false, false},
		{"ours, of an earlier version", plain(FieldManager), Set{}, "", true, true},
		{"ours, recorded", plain("kubectl-edit"), Set{Owned: []types.UID{"first"}}, "", true, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f, cfg := newFake(t)
			f.Set(ingressClass("k8s.io/ingress-nginx", tc.there))
			if tc.name == "ours, recorded" {
				tc.there["labels"] = map[string]any{Label: LabelValue}
			}
			set := tc.set
			set.Label, set.Value = Label, LabelValue
			set.Objects = []*unstructured.Unstructured{{Object: ingressClass("traefik.io/ingress-controller", map[string]any{"name": "nginx"})}}
			_, checked := Check(t.Context(), cfg, set, quietly)
			_, err := Sync(t.Context(), cfg, set, quietly)
			if (err == nil) != (tc.error == "") || err != nil && !strings.Contains(err.Error(), tc.error) {
				t.Errorf("error: %v, want %q", err, tc.error)
			}
			var theirs *ForeignError
			if refused := errors.As(err, &theirs) || tc.set.Adopt; refused != (checked != nil) {
				t.Errorf("the check says %v", checked)
			}
			if replaced := f.Get(path).GetUID() != "first"; replaced != tc.replaced {
				t.Errorf("replaced: %t", replaced)
			}
			f.Set(ingressClass("k8s.io/ingress-nginx", tc.there))
			result, err := Sync(t.Context(), cfg, Set{Label: Label, Value: LabelValue, Kinds: []schema.GroupVersionKind{set.Objects[0].GroupVersionKind()}, Owned: tc.set.Owned, Adopted: tc.set.Adopted}, quietly)
			if err != nil {
				t.Error(err)
			}
			if removed := f.Get(path) == nil; removed != tc.removed {
				t.Errorf("removed: %t", removed)
			}
			if labelled := tc.there["labels"] != nil; labelled && !tc.removed && len(result.Left) != 1 {
				t.Errorf("left: %v", result.Left)
			}
		})
	}
}

// TestShippedObjectsOfOthers: the product's own objects do not replace those of a person either, and
// the others are applied all the same.
func TestShippedObjectsOfOthers(t *testing.T) {
	f, cfg := newFake(t)
	const role = rbac + "clusterroles/microk8s:pod-network"
	f.Set(map[string]any{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
		"metadata": map[string]any{"name": "microk8s:pod-network", "uid": "theirs", "managedFields": []any{map[string]any{"manager": "terraform", "operation": "Update"}}}})
	err := Apply(t.Context(), cfg, manifests, quietly)
	if err == nil || !strings.Contains(err.Error(), "ClusterRole.rbac.authorization.k8s.io/microk8s:pod-network (made by terraform)") {
		t.Errorf("error: %v", err)
	}
	if f.Get(role).Object["rules"] != nil {
		t.Error("it was changed")
	}
	if got := len(f.Paths()); got < len(everything) {
		t.Errorf("only %d objects are there", got)
	}
}

// TestObjectsThatOthersMayHaveMade have an annotation that says so: others' objects are neither refused nor
// changed, nor deleted with the rest, and the rest is applied.
func TestObjectsThatOthersMayHaveMade(t *testing.T) {
	f, cfg := newFake(t)
	object := func(name string, annotations map[string]any) *unstructured.Unstructured {
		return &unstructured.Unstructured{Object: map[string]any{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
			"metadata": map[string]any{"name": name, "annotations": annotations}, "rules": []any{}}}
	}
	f.Set(map[string]any{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
		"metadata": map[string]any{"name": "kind", "uid": "theirs", "managedFields": []any{map[string]any{"manager": "helm", "operation": "Update"}}}})
	set := Set{Label: "of", Value: "x", Objects: []*unstructured.Unstructured{object("kind", map[string]any{TheirsAnnotation: "as good"}), object("own", nil)}}
	if _, err := Check(t.Context(), cfg, set, quietly); err != nil {
		t.Errorf("refused: %v", err)
	}
	result, err := Sync(t.Context(), cfg, set, quietly)
	if err != nil {
		t.Fatal(err)
	}
	if f.Get(rbac + "clusterroles/kind").Object["rules"] != nil || f.Get(rbac+"clusterroles/own") == nil {
		t.Errorf("their object was changed, or the other one is not there: %v", f.Paths())
	}
	if _, err := Sync(t.Context(), cfg, Set{Label: "of", Value: "x", Kinds: []schema.GroupVersionKind{set.Objects[0].GroupVersionKind()}, Owned: result.Owned}, quietly); err != nil {
		t.Fatal(err)
	}
	if f.Get(rbac+"clusterroles/kind") == nil || f.Get(rbac+"clusterroles/own") != nil {
		t.Errorf("after the removal there is %v", f.Paths())
	}
}
