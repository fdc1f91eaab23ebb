package addon

import (
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

func TestSpread(t *testing.T) {
	s, f := open(t)
	if err := s.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	node := func(name string, ready, cordoned bool) map[string]any {
		status := "False"
		if ready {
			status = "True"
		}
		return map[string]any{
			"kind": "Node", "apiVersion": "v1", "metadata": map[string]any{"name": name},
			"spec":   map[string]any{"unschedulable": cordoned},
			"status": map[string]any{"conditions": []any{map[string]any{"type": "Ready", "status": status}}},
		}
	}
	set := func(replicas int64) {
		t.Helper()
		f.Edit(dnsObjects[0], func(dns map[string]any) { dns["spec"].(map[string]any)["replicas"] = replicas })
	}
	want := func(what string, replicas int64) {
		t.Helper()
		if err := s.Spread(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got, _, _ := unstructured.NestedInt64(f.Get(dnsObjects[0]).Object, "spec", "replicas"); got != replicas {
			t.Errorf("%s: %v replicas, want %v", what, got, replicas)
		}
	}
	set(1)
	f.Set(node("n1", true, false))
	want("one node", 1)
	f.Set(node("n2", false, false))
	want("the second is not ready", 1)
	f.Set(node("n2", true, true))
	want("the second takes no pods", 1)
	f.Set(node("n2", true, false))
	want("two nodes", 2)
	set(1) // by a person
	want("the person's number stays", 1)
}
