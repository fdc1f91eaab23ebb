package main

import (
	"encoding/json"
	"testing"
)

// TestMaterialsAreDistinct: `microk8s version` prints one row for each, which names it.
func TestMaterialsAreDistinct(t *testing.T) {
	data, err := BOM("../..")
	if err != nil {
		t.Fatal(err)
	}
	var bom struct{ Components []Component }
	if err := json.Unmarshal(data, &bom); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, c := range bom.Components {
		if seen[c.Name] {
			t.Errorf("two components are called %s", c.Name)
		}
		seen[c.Name] = true
	}
}
