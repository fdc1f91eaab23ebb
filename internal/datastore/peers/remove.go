package peers

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"microk8s/internal/datastore/storedir"

	"github.com/canonical/go-dqlite/v3/client"
)

// ErrNotMember says that no member has the address that was to be removed.
var ErrNotMember = errors.New("no member has the address")

// ErrReplaced says that another member has the address meanwhile: the one that was to be removed is
// gone already.
var ErrReplaced = errors.New("another member has the address meanwhile")

// ErrOnlyMember says that the last member of a cluster cannot be removed from it.
var ErrOnlyMember = errors.New("it is the only member of the datastore; removing it would leave none")

// Remove takes the member with an address out of the cluster that a storage directory belongs
// to. It asks the other members of the directory's cluster.yaml, with the directory's key
// pair, so the daemon of the directory itself need not run. A leader gives up leadership
// first, an only voter its vote as well. It is done when the error is nil or ErrNotMember.
func Remove(ctx context.Context, dir, address string) error {
	return RemoveMember(ctx, dir, 0, address)
}

// RemoveMember is [Remove] for the member with an ID; see [RemoveID].
func RemoveMember(ctx context.Context, dir string, id uint64, address string) error {
	store, dial, err := reach(dir)
	if err != nil {
		return err
	}
	return RemoveID(ctx, store, dial, id, address)
}

// reach returns the members that a storage directory lists, and how to dial them.
func reach(dir string) (client.NodeStore, client.DialFunc, error) {
	store, err := client.NewYamlNodeStore(filepath.Join(dir, storedir.ClusterFile))
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read the list of members: %w", err)
	}
	_, config, err := KeyPair(dir, tls.VersionTLS12, 0)
	if err != nil {
		return nil, nil, err
	}
	return store, client.DialFuncWithTLS(client.DefaultDialFunc, config), nil
}

// Known returns the members as their leader knows them. It asks the members in the cluster.yaml of
// a storage directory, so the daemon of the directory itself need not run.
func Known(ctx context.Context, dir string) ([]storedir.Member, error) {
	store, dial, err := reach(dir)
	if err != nil {
		return nil, err
	}
	leader, err := client.FindLeader(ctx, store, client.WithDialFunc(dial), client.WithLogFunc(func(client.LogLevel, string, ...any) {}))
	if err != nil {
		return nil, fmt.Errorf("no leader of the datastore was found: %w; are a majority of the voters running?", err)
	}
	defer leader.Close()
	nodes, err := leader.Cluster(ctx)
	if err != nil {
		return nil, fmt.Errorf("cannot list the members: %w", err)
	}
	var out []storedir.Member
	for _, n := range nodes {
		out = append(out, storedir.Member{ID: n.ID, Address: n.Address, Role: storedir.Role(n.Role)})
	}
	return out, nil
}

// RemoveFrom is [Remove] for callers that have a list of members and a way to reach them.
func RemoveFrom(ctx context.Context, store client.NodeStore, dial client.DialFunc, address string) error {
	return RemoveID(ctx, store, dial, 0, address)
}

// RemoveID is [RemoveFrom] for the member with an ID. Where that member is gone and another one
// has its address, it removes nothing and returns ErrReplaced. An id of 0 means whichever member
// has the address.
func RemoveID(ctx context.Context, store client.NodeStore, dial client.DialFunc, id uint64, address string) error {
	// Leadership may move meanwhile, and membership changes one at a time: try again until
	// the context ends.
	const pause = 300 * time.Millisecond
	for {
		again, err := tryRemove(ctx, store, dial, id, address)
		if err == nil || !again {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}
	}
}

func tryRemove(ctx context.Context, store client.NodeStore, dial client.DialFunc, id uint64, address string) (again bool, err error) {
	quiet := client.WithLogFunc(func(client.LogLevel, string, ...any) {})
	leader, err := client.FindLeader(ctx, store, client.WithDialFunc(dial), quiet)
	if err != nil {
		var tried []string
		nodes, _ := store.Get(ctx)
		for _, n := range nodes {
			tried = append(tried, n.Address)
		}
		return false, fmt.Errorf("cannot remove %s: no leader of the datastore was found, asking %s: %w; are a majority of the voters running?", address, strings.Join(tried, ", "), err)
	}
	defer leader.Close()
	who, err := leader.Leader(ctx)
	if err != nil {
		return true, fmt.Errorf("cannot ask the leader: %w", err)
	}
	members, err := leader.Cluster(ctx)
	if err != nil {
		return true, fmt.Errorf("cannot list the members: %w", err)
	}
	victim, err := find(members, id, address)
	switch {
	case err != nil:
		return false, err
	case victim == nil:
		return false, fmt.Errorf("%w %s", ErrNotMember, address)
	case len(members) == 1:
		return false, fmt.Errorf("cannot remove %s: %w", address, ErrOnlyMember)
	case victim.ID != who.ID:
		if err := leader.Remove(ctx, victim.ID); err != nil {
			return true, fmt.Errorf("cannot remove %s: %w", address, err)
		}
		return false, nil
	}
	// Voters first, then who has to become one.
	for role := client.Voter; role <= client.Spare; role++ {
		for _, m := range members {
			if m.Role != role || m.ID == victim.ID || !answers(ctx, m.Address, dial) {
				continue
			}
			if role != client.Voter {
				if err := leader.Assign(ctx, m.ID, client.Voter); err != nil {
					return true, fmt.Errorf("cannot make %s a voter in place of %s: %w", m.Address, address, err)
				}
			}
			if err := leader.Transfer(ctx, m.ID); err != nil {
				return true, fmt.Errorf("cannot move leadership from %s to %s: %w", address, m.Address, err)
			}
			return true, errors.New("leadership was moved, but the new leader did not answer in time")
		}
	}
	return true, fmt.Errorf("cannot remove %s: it leads, and no other member answers that could", address)
}

// find returns the member to remove, nil where there is none, or ErrReplaced.
func find(members []client.NodeInfo, id uint64, address string) (*client.NodeInfo, error) {
	var there *client.NodeInfo
	for i, m := range members {
		if id != 0 && m.ID == id {
			return &members[i], nil
		}
		if m.Address == address {
			there = &members[i]
		}
	}
	if id != 0 && there != nil {
		return nil, fmt.Errorf("%w: %s is member %x now, and was %x", ErrReplaced, address, there.ID, id)
	}
	return there, nil
}

// Answers reports whether a member answers at an address, within two seconds. dial must use the
// key pair that the members share, see [KeyPair].
func Answers(ctx context.Context, address string, dial client.DialFunc) bool {
	return answers(ctx, address, dial)
}

func answers(ctx context.Context, address string, dial client.DialFunc) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	c, err := client.New(ctx, address, client.WithDialFunc(dial), client.WithLogFunc(func(client.LogLevel, string, ...any) {}))
	if err != nil {
		return false
	}
	defer c.Close()
	_, err = c.Describe(ctx)
	return err == nil
}
