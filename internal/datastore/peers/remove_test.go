package peers

import (
	"errors"
	"testing"

	"github.com/canonical/go-dqlite/v3/client"
)

// TestFind has a member whose address another one has taken meanwhile: an ID never means that one.
func TestFind(t *testing.T) {
	members := []client.NodeInfo{{ID: 1, Address: "10.0.0.1:19001"}, {ID: 7, Address: "10.0.0.3:19001"}}
	for _, tc := range []struct {
		name    string
		id      uint64
		address string
		want    uint64 // 0: none
		err     error
	}{
		{"by address", 0, "10.0.0.3:19001", 7, nil},
		{"by ID", 7, "10.0.0.3:19001", 7, nil},
		{"its address has changed", 7, "10.0.0.9:19001", 7, nil},
		{"gone", 5, "10.0.0.9:19001", 0, nil},
		{"replaced", 5, "10.0.0.3:19001", 0, ErrReplaced},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := find(members, tc.id, tc.address)
			if !errors.Is(err, tc.err) {
				t.Errorf("error: %v", err)
			}
			if (got == nil) != (tc.want == 0) || got != nil && got.ID != tc.want {
				t.Errorf("found %+v, want %d", got, tc.want)
			}
		})
	}
}
