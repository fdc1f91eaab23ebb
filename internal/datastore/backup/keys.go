package backup

import (
	"slices"
	"strings"
)

// Keys that must not come back by accident, where every API server of the product keeps them (ADR 14);
// RecordKey is the prefix of those of nodes.
const (
	TokensKey = "/registry/secrets/kube-system/microk8s-join-tokens"
	SaltKey   = "/registry/secrets/kube-system/microk8s-cluster-agent"
	RoleKey   = "/registry/clusterroles/microk8s:registered-node"
	RecordKey = "/registry/clusterrolebindings/microk8s:node:"
)

// Revoking reports whether a key says what was revoked: join tokens that were used or revoked, and the
// secrets that nodes call each other with (ADR 14). No restore writes it.
func Revoking(key string) bool { return key == TokensKey || key == SaltKey }

// Admitting reports whether a key says which nodes may be in the cluster.
func Admitting(key string) bool { return key == RoleKey || strings.HasPrefix(key, RecordKey) }

// machines are prefixes of the keys that belong to machines and not to the cluster: their nodes, the
// leases by which they live, and the addresses of their API servers. Who still runs writes them again.
var machines = []string{
	"/registry/minions/", "/registry/leases/kube-node-lease/", "/registry/leases/kube-system/apiserver-", "/registry/csinodes/", "/registry/masterleases/",
	"/registry/leases/kube-system/kube-controller-manager", "/registry/leases/kube-system/kube-scheduler", "/registry/leases/kube-system/microk8s-backup",
}

// Elsewhere reports whether a restore on a new machine leaves a key out: what was revoked, which nodes
// were admitted, and what belongs to the machines of before.
func Elsewhere(key string) bool {
	return Revoking(key) || Admitting(key) ||
		slices.ContainsFunc(machines, func(prefix string) bool { return strings.HasPrefix(key, prefix) })
}
