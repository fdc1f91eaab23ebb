package migrator

import (
	"slices"
	"testing"
)

// TestKept: a restore brings back no token, no secret of calls between nodes, and no removed node.
func TestKept(t *testing.T) {
	backup := []string{
		tokensKey, saltKey, roleKey, recordKey + "n1", recordKey + "removed",
		"/registry/secrets/kube-system/other", "/registry/secrets/default/microk8s-join-tokens", "/registry/clusterrolebindings/microk8s:nodes", "/registry/minions/n1",
	}
	for what, tc := range map[string]struct {
		have []string
		want []string
	}{
		"a cluster of several nodes":     {[]string{roleKey, recordKey + "n1", recordKey + "w1"}, []string{tokensKey, saltKey, roleKey, recordKey + "n1", recordKey + "removed"}},
		"a new one, or with one node":    {[]string{roleKey, recordKey + "n1"}, []string{tokensKey, saltKey}},
		"one that has no records at all": {nil, []string{tokensKey, saltKey}},
	} {
		have := map[string]current{}
		for _, key := range tc.have {
			have[key] = current{}
		}
		keep := kept(have)
		var got []string
		for _, key := range backup {
			if keep(key) {
				got = append(got, key)
			}
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: %q is left, want %q", what, got, tc.want)
		}
	}
}
