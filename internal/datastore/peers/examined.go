package peers

import "microk8s/internal/datastore/storedir"

// Examined is what `k8s-dqlite examine` says of a storage directory.
type Examined struct {
	Member  storedir.Member   `json:"member"`  // whose it is
	Members []storedir.Member `json:"members"` // that it knows
	// Term and Index are of the last entry of its log; of a damaged one what it had at least.
	Term     uint64 `json:"term"`
	Index    uint64 `json:"index"`
	Revision int64  `json:"revision"`          // of the datastore
	Damaged  string `json:"damaged,omitempty"` // why it cannot be used
}
