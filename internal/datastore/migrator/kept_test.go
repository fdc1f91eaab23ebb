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

// TestElsewhere: an archive that becomes a cluster brings back neither tokens nor nodes, and everything else.
func TestElsewhere(t *testing.T) {
	for key, left := range map[string]bool{
		backup.TokensKey: true, backup.SaltKey: true, backup.RoleKey: true, backup.RecordKey + "w1": true,
		"/registry/minions/n1": true, "/registry/leases/kube-node-lease/n1": true, "/registry/csinodes/n1": true, "/registry/masterleases/10.0.0.1": true,
		"/registry/secrets/default/x": false, "/registry/leases/shop/x": false, "/registry/clusterrolebindings/microk8s:nodes": false,
		"/registry/configmaps/kube-system/microk8s-backup": false, "/registry/persistentvolumes/pvc-1": false,
	} {
		if got := backup.Elsewhere(key); got != left {
			t.Errorf("%s is left out: %v", key, got)
		}
	}
}
