package setup

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"microk8s/internal/atomicfile"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
)

// identity says as part of which cluster the node's services were started last: in
// $SNAP_COMMON, which no revert takes back, as $SNAP_DATA with its certificates is.
type identity struct {
	Revision string `json:"revision"`
	CA       string `json:"ca"` // SHA-256 of the certificate, hexadecimal
}

// ErrOtherCluster is wrapped by the error of [CheckIdentity].
var ErrOtherCluster = errors.New("the data of this revision is from before the node joined or left a cluster, or got another CA")

// CheckIdentity refuses a node that came back, by snap revert, to a $SNAP_DATA from before it
// last joined or left a cluster: the certificates there are another cluster's than the
// datastore's. A CA that changed while the revision stayed is a join, a leave or a renewal, and
// is noted. It must be called before a service of the node runs.
func CheckIdentity(env snapenv.Env) error {
	now, err := currentIdentity(env)
	if err != nil || now.CA == "" {
		return err
	}
	data, err := os.ReadFile(env.IdentityFile())
	if errors.Is(err, fs.ErrNotExist) {
		return writeIdentity(env, now)
	}
	if err != nil {
		return fmt.Errorf("cannot find out which cluster this node belongs to: %w", err)
	}
	var last identity
	if err := json.Unmarshal(data, &last); err != nil {
		return fmt.Errorf("cannot find out which cluster this node belongs to: %s: %w; if the snap was not reverted since the node joined or left a cluster, remove the file", env.IdentityFile(), err)
	}
	switch {
	case last == now:
		return nil
	case last.CA != now.CA && last.Revision != now.Revision:
		return fmt.Errorf("%w: its certificates are not of the cluster that revision %s was part of; go back to that revision with: sudo snap revert %s --revision=%[2]s "+
			"(docs/upgrade.md says how to stay with this one)", ErrOtherCluster, last.Revision, env.Name)
	}
	return writeIdentity(env, now)
}

// NoteIdentity notes the cluster that the node is part of now.
func NoteIdentity(env snapenv.Env) error {
	now, err := currentIdentity(env)
	if err != nil || now.CA == "" {
		return err
	}
	return writeIdentity(env, now)
}

// currentIdentity has no CA on a node without certificates.
func currentIdentity(env snapenv.Env) (identity, error) {
	// A worker has the cluster's CA beside one of its own.
	for _, name := range []string{"ca.remote.crt", "ca.crt"} {
		if name == "ca.remote.crt" && !nodeconfig.ReadState(env).Worker {
			continue
		}
		data, err := os.ReadFile(env.Cert(name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return identity{}, fmt.Errorf("cannot find out which cluster this node belongs to: %w", err)
		}
		if block, _ := pem.Decode(data); block != nil { // not the text around it
			data = block.Bytes
		}
		sum := sha256.Sum256(data)
		return identity{env.Revision, hex.EncodeToString(sum[:])}, nil
	}
	return identity{}, nil
}

func writeIdentity(env snapenv.Env, id identity) error {
	data, err := json.Marshal(id)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(env.IdentityFile()), 0o755); err != nil {
		return err
	}
	return atomicfile.Write(env.IdentityFile(), append(data, '\n'), 0o600, nil)
}
