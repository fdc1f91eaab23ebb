package migrator

import (
	"strings"

	"microk8s/internal/datastore/backup"
)

// kept returns the function that says of a key whether a restore leaves it as it is, since the backup
// would undo what was revoked since. The records of nodes are taken from the backup only into a cluster
// that has one node: there they are all that is known of the others.
func kept(have map[string]current) func(key string) bool {
	nodes := 0
	for key := range have {
		if strings.HasPrefix(key, backup.RecordKey) {
			nodes++
		}
	}
	return func(key string) bool {
		return backup.Revoking(key) || nodes > 1 && backup.Admitting(key)
	}
}
