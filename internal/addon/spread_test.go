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
	dns := &unstructured.Unstructured{Object: f.objects[dnsObjects[0]]}
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
		if err := unstructured.SetNestedField(dns.Object, replicas, "spec", "replicas"); err != nil {
			t.Fatal(err)
		}
	}
	want := func(what string, replicas float64) {
		t.Helper()
		if err := s.Spread(t.Context()); err != nil {
			t.Fatal(err)
		}
		var got float64
		switch n := dns.Object["spec"].(map[string]any)["replicas"].(type) {
		case int64:
			got = float64(n)
		case float64:
			got = n
		}
		if got != replicas {
			t.Errorf("%s: %v replicas, want %v", what, got, replicas)
		}
	}
	set(1)
	f.nodes = []any{node("n1", true, false)}
	want("one node", 1)
	f.nodes = append(f.nodes, node("n2", false, false))
	want("the second is not ready", 1)
	f.nodes[1] = node("n2", true, true)
	want("the second takes no pods", 1)
	f.nodes[1] = node("n2", true, false)
	want("two nodes", 2)
	set(1) // by a person
	want("the person's number stays", 1)
}
