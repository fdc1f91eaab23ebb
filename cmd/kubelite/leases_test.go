package main

import "testing"

func TestHeldBy(t *testing.T) {
	for holder, want := range map[string]bool{
		"n1_4a68fb71-1ab9-42d5-bfe5-81cc36ce5a62":   true,
		"n11_4a68fb71-1ab9-42d5-bfe5-81cc36ce5a62":  false,
		"n1_x_4a68fb71-1ab9-42d5-bfe5-81cc36ce5a62": false,
		"n1":  false,
		"n1_": false,
		"":    false,
	} {
		if got := heldBy(&holder, "n1"); got != want {
			t.Errorf("heldBy(%q, n1) = %t", holder, got)
		}
	}
	if heldBy(nil, "n1") {
		t.Error("a lease without a holder is nobody's")
	}
}
