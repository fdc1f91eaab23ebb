package migrator

import "strings"

// Keys that a restore leaves as they are, since the backup would undo what was revoked since: join
// tokens that were used or revoked, the secrets that nodes call each other with, and the records of
// nodes that have been removed (ADR 14). They are where every API server of the product keeps them.
const (
	tokensKey = "/registry/secrets/kube-system/microk8s-join-tokens"
	saltKey   = "/registry/secrets/kube-system/microk8s-cluster-agent"
	roleKey   = "/registry/clusterroles/microk8s:registered-node"
	recordKey = "/registry/clusterrolebindings/microk8s:node:"
)

// kept returns the function that says of a key whether a restore leaves it as it is. The records of
// nodes are taken from the backup only into a cluster that has one node: there they are all that is
// known of the others.
func kept(have map[string]current) func(key string) bool {
	nodes := 0
	for key := range have {
		if strings.HasPrefix(key, recordKey) {
			nodes++
		}
	}
	return func(key string) bool {
		switch {
		case key == tokensKey, key == saltKey:
			return true
		case key == roleKey, strings.HasPrefix(key, recordKey):
			return nodes > 1
		}
		return false
	}
}
