package member

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"time"

	"microk8s/internal/atomicfile"
	"microk8s/internal/datastore/storedir"

	"sigs.k8s.io/yaml"
)

// BootstrapID is the fixed id of a cluster's first member.
const BootstrapID uint64 = 3297041220608546238

// Tuning is tuning.yaml, with defaults for what it does not say.
type Tuning struct {
	Threshold, Trailing uint64 // of Raft snapshots, in log entries
	Dynamic             bool   // keep fewer trailing entries than that when the snapshot is small
	NetworkLatency      time.Duration
}

// DefaultTuning has etcd's class of timers: heartbeats each 99 ms, elections after 990 ms.
func DefaultTuning() Tuning {
	return Tuning{Threshold: 512, Trailing: 4096, Dynamic: true, NetworkLatency: 66 * time.Millisecond}
}

type tuningConfig struct {
	Snapshot struct {
		Threshold *uint64 `json:"threshold"`
		Trailing  *uint64 `json:"trailing"`
		Strategy  string  `json:"strategy"`
	} `json:"snapshot"`
	NetworkLatency  string `json:"network-latency"`
	CompactInterval string `json:"kine-compact-interval"`
	PollInterval    string `json:"kine-poll-interval"`
}

// parseTuning reads tuning.yaml. Warnings are about what is accepted and has no effect.
func parseTuning(data []byte) (t Tuning, warnings []string, err error) {
	var c tuningConfig
	if err := yaml.Unmarshal(data, &c); err != nil {
		return t, nil, err
	}
	t = DefaultTuning()
	if c.Snapshot.Trailing != nil {
		t.Trailing = *c.Snapshot.Trailing
		if t.Trailing < 512 || t.Trailing > 1<<31 {
			return t, nil, fmt.Errorf("snapshot.trailing is %d; it must be at least 512", t.Trailing)
		}
		t.Threshold = min(t.Threshold, t.Trailing)
	}
	if c.Snapshot.Threshold != nil {
		if t.Threshold = *c.Snapshot.Threshold; t.Threshold == 0 {
			t.Threshold = t.Trailing / 4 * 3
		}
		if t.Threshold < 384 || t.Threshold > t.Trailing {
			return t, nil, fmt.Errorf("snapshot.threshold is %d; it must be 0 or from 384 to snapshot.trailing (%d)", t.Threshold, t.Trailing)
		}
	}
	switch c.Snapshot.Strategy {
	case "", "dynamic":
	case "static":
		t.Dynamic = false
	default:
		warnings = append(warnings, fmt.Sprintf("snapshot.strategy %q is neither static nor dynamic; dynamic is used", c.Snapshot.Strategy))
	}
	if c.NetworkLatency != "" {
		t.NetworkLatency, err = time.ParseDuration(c.NetworkLatency)
		if err != nil || t.NetworkLatency <= 0 || t.NetworkLatency > time.Minute {
			return t, nil, fmt.Errorf("network-latency is %q; it must be a duration such as 66ms", c.NetworkLatency)
		}
	}
	for name, v := range map[string]string{"kine-compact-interval": c.CompactInterval, "kine-poll-interval": c.PollInterval} {
		if v != "" {
			warnings = append(warnings, name+" has no effect: this datastore does not poll, and API servers say when to compact")
		}
	}
	return t, warnings, nil
}

func parseFailureDomain(data []byte) (uint64, error) {
	text := strings.TrimSpace(string(data))
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is not a whole number", text)
	}
	return n, nil
}

// directory is a storage directory, as the daemon uses it.
type directory struct{ storedir.Dir }

func at(path string) directory { return directory{storedir.Dir(path)} }

// read returns a file's content decoded; ok is false when there is no such file.
func read[T any](d directory, name string, decode func([]byte) (T, error)) (v T, ok bool, err error) {
	v, err = storedir.Read(d.Dir, name, decode)
	if errors.Is(err, fs.ErrNotExist) {
		return v, false, nil
	}
	return v, true, err
}

func (d directory) write(name, content string) error {
	if err := atomicfile.Write(d.File(name), []byte(content), 0o660, nil); err != nil {
		return err
	}
	if name == storedir.InfoFile || name == storedir.ClusterFile {
		return d.copyIdentity(name, []byte(content))
	}
	return nil
}

// prepare reads the files that say who this node is, carries out init.yaml and update.yaml,
// and returns the node. reconfigure rewrites Raft's membership to the node alone.
func (d directory) prepare(reconfigure func(storedir.Member) error) (storedir.Member, error) {
	ini, hasInit, err := read(d, storedir.InitFile, storedir.ParseInit)
	if err != nil {
		return storedir.Member{}, err
	}
	if hasInit {
		if err := d.initialize(ini); err != nil {
			return storedir.Member{}, err
		}
	}
	info, hasInfo, err := read(d, storedir.InfoFile, storedir.ParseSelf)
	if err != nil {
		return storedir.Member{}, err
	}
	cluster, hasCluster, err := read(d, storedir.ClusterFile, storedir.ParseMembers)
	if err != nil {
		return storedir.Member{}, err
	}
	switch {
	case !hasInfo && !hasCluster:
		return storedir.Member{}, fmt.Errorf("%s has neither %s nor %s: nothing says which node this is; run: microk8s start (on a new node), or restore the directory from a backup", string(d.Dir), storedir.InitFile, storedir.InfoFile)
	case hasInfo != hasCluster:
		return storedir.Member{}, fmt.Errorf("inconsistent %s and %s in %s: one of them is missing; restore it from a backup", storedir.InfoFile, storedir.ClusterFile, string(d.Dir))
	}
	if !d.Has(storedir.JoinFile) && len(cluster) == 1 && (cluster[0].Address != info.Address || cluster[0].ID != 0 && cluster[0].ID != info.ID) {
		if !d.Has(storedir.UpdateFile) { // an address change that was interrupted half-way is completed below
			return storedir.Member{}, fmt.Errorf("%s and %s disagree about this node (%s and %s); correct the wrong one", d.File(storedir.InfoFile), d.File(storedir.ClusterFile), info.Address, cluster[0].Address)
		}
	}
	update, hasUpdate, err := read(d, storedir.UpdateFile, storedir.ParseInit)
	if err != nil {
		return storedir.Member{}, err
	}
	if hasUpdate && (len(cluster) > 1 || d.Has(storedir.JoinFile)) {
		return storedir.Member{}, fmt.Errorf("%s asks for another address, but %s lists %d members: this node would leave them and go on alone; remove %s, and change the address by leaving the cluster and joining it again",
			d.File(storedir.UpdateFile), d.File(storedir.ClusterFile), len(cluster), d.File(storedir.UpdateFile))
	}
	if hasUpdate {
		// Each step can be repeated; the request goes last.
		info.Address, info.Role = update.Address, 0
		if err := reconfigure(info); err != nil {
			return storedir.Member{}, fmt.Errorf("cannot change this node's address to %s: %w", update.Address, err)
		}
		if err := d.identify(info); err != nil {
			return storedir.Member{}, err
		}
		if err := os.Remove(d.File(storedir.UpdateFile)); err != nil {
			return storedir.Member{}, fmt.Errorf("cannot remove %s: %w", d.File(storedir.UpdateFile), err)
		}
	}
	return info, nil
}

// initialize turns a directory with init.yaml into that of a first member, or of a node that
// is to join a cluster. The file goes last, so that an interrupted start is repeated.
func (d directory) initialize(ini storedir.Init) error {
	node := storedir.Member{ID: BootstrapID, Address: ini.Address}
	if len(ini.Cluster) > 0 {
		node = storedir.Member{ID: newID(), Address: ini.Address, Role: storedir.Spare}
		// The id of an interrupted start may be known to the cluster already.
		if old, ok, err := read(d, storedir.InfoFile, storedir.ParseSelf); err == nil && ok && old.Address == ini.Address && d.Has(storedir.JoinFile) {
			node.ID = old.ID
		}
	}
	files := d.identity(node, ini.Cluster)
	// They may be there from an interrupted start, if they say the same.
	interrupted := true
	for _, f := range files {
		data, err := os.ReadFile(d.File(f.name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cannot read %s: %w", d.File(f.name), err)
		}
		interrupted = interrupted && (err != nil || string(data) == f.content)
	}
	entries, err := os.ReadDir(string(d.Dir))
	if err != nil {
		return fmt.Errorf("cannot list %s: %w", string(d.Dir), err)
	}
	for _, e := range entries {
		switch name := e.Name(); name {
		case storedir.InitFile, storedir.CertFile, storedir.KeyFile, storedir.FailureDomainFile, storedir.TuningFile, storedir.EncryptionFile:
			continue
		case storedir.InfoFile, storedir.ClusterFile, storedir.JoinFile:
			if interrupted {
				continue
			}
			return foreign(d, name)
		default:
			if strings.HasPrefix(name, ".") || e.Type()&fs.ModeSocket != 0 {
				continue // a leftover of a replaced file, or a stale socket
			}
			return foreign(d, name)
		}
	}
	for _, f := range files {
		if err := d.write(f.name, f.content); err != nil {
			return err
		}
	}
	if err := os.Remove(d.File(storedir.InitFile)); err != nil {
		return fmt.Errorf("cannot remove %s: %w", d.File(storedir.InitFile), err)
	}
	return nil
}

func foreign(d directory, name string) error {
	return fmt.Errorf("%s asks for a new node, but %s already has %s: if its data is wanted remove %s, otherwise move the other files away", d.File(storedir.InitFile), string(d.Dir), name, storedir.InitFile)
}

// newID makes the id of a node that joins. A node that leaves and joins again is another one,
// because it has forgotten what it voted.
func newID() uint64 {
	for {
		if id := rand.Uint64(); id != 0 && id != BootstrapID {
			return id
		}
	}
}

type identityFile struct{ name, content string }

// identity returns the files of a single member, or of one that joins the members with these
// addresses, in the order in which they are written.
func (d directory) identity(n storedir.Member, cluster []string) []identityFile {
	self := string(storedir.EncodeSelf(n))
	if len(cluster) == 0 {
		return []identityFile{{storedir.InfoFile, self}, {storedir.ClusterFile, string(storedir.EncodeMembers([]storedir.Member{n}))}}
	}
	var list []storedir.Member
	for _, a := range cluster {
		list = append(list, storedir.Member{Address: a})
	}
	return []identityFile{{storedir.JoinFile, ""}, {storedir.InfoFile, self}, {storedir.ClusterFile, string(storedir.EncodeMembers(list))}}
}

// identify writes info.yaml and cluster.yaml of a single member.
func (d directory) identify(n storedir.Member) error {
	for _, f := range d.identity(n, nil) {
		if err := d.write(f.name, f.content); err != nil {
			return err
		}
	}
	return nil
}
