package migrator

import (
	"slices"
	"testing"

	"microk8s/internal/datastore/backup"
)

// TestKept: a restore brings back no token, no secret of calls between nodes, and no removed node.
func TestKept(t *testing.T) {
	archived := []string{
		backup.TokensKey, backup.SaltKey, backup.RoleKey, backup.RecordKey + "n1", backup.RecordKey + "removed",
		"/registry/secrets/kube-system/other", "/registry/secrets/default/microk8s-join-tokens", "/registry/clusterrolebindings/microk8s:nodes", "/registry/minions/n1",
	}
	for what, tc := range map[string]struct {
		have []string
		want []string
	}{
		"a cluster of several nodes":     {[]string{backup.RoleKey, backup.RecordKey + "n1", backup.RecordKey + "w1"}, []string{backup.TokensKey, backup.SaltKey, backup.RoleKey, backup.RecordKey + "n1", backup.RecordKey + "removed"}},
		"a new one, or with one node":    {[]string{backup.RoleKey, backup.RecordKey + "n1"}, []string{backup.TokensKey, backup.SaltKey}},
		"one that has no records at all": {nil, []string{backup.TokensKey, backup.SaltKey}},
	} {
		have := map[string]current{}
		for _, key := range tc.have {
			have[key] = current{}
		}
		keep := kept(have)
		var got []string
		for _, key := range archived {
			if keep(key) {
				got = append(got, key)
			}
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: %q is left, want %q", what, got, tc.want)
		}
	}
}
