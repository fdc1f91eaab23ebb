package member

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"microk8s/internal/atomicfile"
	"microk8s/internal/datastore/peers"

	"sigs.k8s.io/yaml"
)

// Names of the files of a storage directory. Raft's own are dqlite's business.
const (
	initFile          = "init.yaml"
	updateFile        = "update.yaml"
	infoFile          = "info.yaml"
	clusterFile       = "cluster.yaml"
	joinFile          = "join"
	failureDomainFile = "failure-domain"
	tuningFile        = "tuning.yaml"
)

// BootstrapID is the fixed id of a cluster's first member.
const BootstrapID uint64 = 3297041220608546238

// Node is a member as info.yaml and cluster.yaml name it.
type Node struct {
	ID      uint64 `json:"ID"`
	Address string `json:"Address"`
	Role    int    `json:"Role"` // 0 voter, 1 stand-by, 2 spare
}

func (n Node) yaml(indent string) string {
	address := n.Address
	if strings.HasPrefix(address, "[") { // IPv6, which would begin a list
		address = "'" + address + "'"
	}
	return fmt.Sprintf("Address: %s\n%sID: %d\n%sRole: %d\n", address, indent, n.ID, indent, n.Role)
}

// initConfig is init.yaml: what a node without data shall become.
type initConfig struct {
	Address string   `json:"Address"`
	Cluster []string `json:"Cluster"`
}

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

func parseInit(data []byte) (c initConfig, err error) {
	if err := yaml.Unmarshal(data, &c); err != nil {
		return c, err
	}
	if err := checkAddress(c.Address); err != nil {
		return c, err
	}
	for _, a := range c.Cluster {
		if err := checkAddress(a); err != nil {
			return c, fmt.Errorf("in Cluster: %w", err)
		}
	}
	return c, nil
}

func checkAddress(a string) error {
	if a == "" {
		return errors.New("Address is empty; it must be host:port, such as 127.0.0.1:19001") //nolint:staticcheck // a key of the file, as it is written
	}
	host, port, err := net.SplitHostPort(a)
	if err != nil {
		return fmt.Errorf("the address %q is not host:port", a)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || host == "" || strings.ContainsAny(host, " \n\t#'\"{}") {
		return fmt.Errorf("the address %q is not host:port", a)
	}
	return nil
}

func parseInfo(data []byte) (n Node, err error) {
	if err := yaml.Unmarshal(data, &n); err != nil {
		return n, err
	}
	// It is the last line. A file that ends within the one before has another node's ID.
	if !bytes.Contains(data, []byte("Role:")) {
		return n, errors.New("Role is missing") //nolint:staticcheck // a key of the file, as it is written
	}
	return n, checkNode(n)
}

func parseCluster(data []byte) (nodes []Node, err error) {
	if err := yaml.Unmarshal(data, &nodes); err != nil {
		return nil, err
	}
	if len(nodes) == 0 {
		return nil, errors.New("it lists no member")
	}
	for _, n := range nodes {
		if err := checkAddress(n.Address); err != nil {
			return nil, err
		}
	}
	return nodes, nil
}

func checkNode(n Node) error {
	if n.ID == 0 {
		return errors.New("ID is missing or 0")
	}
	if n.Role < 0 || n.Role > 2 {
		return fmt.Errorf("Role is %d; it must be 0, 1 or 2", n.Role) //nolint:staticcheck // a key of the file, as it is written
	}
	return checkAddress(n.Address)
}

func parseFailureDomain(data []byte) (uint64, error) {
	text := strings.TrimSpace(string(data))
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is not a whole number", text)
	}
	return n, nil
}

// directory is a storage directory.
type directory struct{ path string }

func (d directory) file(name string) string { return filepath.Join(d.path, name) }

func (d directory) has(name string) bool {
	_, err := os.Lstat(d.file(name))
	return err == nil
}

// read gives a file's content decoded; ok is false when there is no such file.
func read[T any](d directory, name string, decode func([]byte) (T, error)) (v T, ok bool, err error) {
	data, err := os.ReadFile(d.file(name))
	if errors.Is(err, fs.ErrNotExist) {
		return v, false, nil
	}
	if err == nil {
		v, err = decode(data)
	}
	if err != nil {
		return v, true, fmt.Errorf("cannot read %s: %w; correct the file or restore it from a backup", d.file(name), err)
	}
	return v, true, nil
}

func (d directory) write(name, content string) error {
	return atomicfile.Write(d.file(name), []byte(content), 0o660, nil)
}

// prepare reads the files that say who this node is, carries out init.yaml and update.yaml,
// and gives the node. reconfigure rewrites Raft's membership to the node alone.
func (d directory) prepare(reconfigure func(Node) error) (Node, error) {
	ini, hasInit, err := read(d, initFile, parseInit)
	if err != nil {
		return Node{}, err
	}
	if hasInit {
		if err := d.initialize(ini); err != nil {
			return Node{}, err
		}
	}
	info, hasInfo, err := read(d, infoFile, parseInfo)
	if err != nil {
		return Node{}, err
	}
	cluster, hasCluster, err := read(d, clusterFile, parseCluster)
	if err != nil {
		return Node{}, err
	}
	switch {
	case !hasInfo && !hasCluster:
		return Node{}, fmt.Errorf("%s has neither %s nor %s: nothing says which node this is; run: microk8s start (on a new node), or restore the directory from a backup", d.path, initFile, infoFile)
	case hasInfo != hasCluster:
		return Node{}, fmt.Errorf("inconsistent %s and %s in %s: one of them is missing; restore it from a backup", infoFile, clusterFile, d.path)
	}
	if !d.has(joinFile) && len(cluster) == 1 && (cluster[0].Address != info.Address || cluster[0].ID != 0 && cluster[0].ID != info.ID) {
		if !d.has(updateFile) { // an address change that was interrupted half-way is completed below
			return Node{}, fmt.Errorf("%s and %s disagree about this node (%s and %s); correct the wrong one", d.file(infoFile), d.file(clusterFile), info.Address, cluster[0].Address)
		}
	}
	update, hasUpdate, err := read(d, updateFile, parseInit)
	if err != nil {
		return Node{}, err
	}
	if hasUpdate && (len(cluster) > 1 || d.has(joinFile)) {
		return Node{}, fmt.Errorf("%s asks for another address, but %s lists %d members: this node would leave them and go on alone; remove %s, and change the address by leaving the cluster and joining it again",
			d.file(updateFile), d.file(clusterFile), len(cluster), d.file(updateFile))
	}
	if hasUpdate {
		// Each step can be repeated; the request goes last.
		info.Address, info.Role = update.Address, 0
		if err := reconfigure(info); err != nil {
			return Node{}, fmt.Errorf("cannot change this node's address to %s: %w", update.Address, err)
		}
		if err := d.identify(info); err != nil {
			return Node{}, err
		}
		if err := os.Remove(d.file(updateFile)); err != nil {
			return Node{}, fmt.Errorf("cannot remove %s: %w", d.file(updateFile), err)
		}
	}
	return info, nil
}

// initialize turns a directory with init.yaml into that of a first member, or of a node that
// is to join a cluster. The file goes last, so that an interrupted start is repeated.
func (d directory) initialize(ini initConfig) error {
	node := Node{ID: BootstrapID, Address: ini.Address}
	if len(ini.Cluster) > 0 {
		node = Node{ID: newID(), Address: ini.Address, Role: int(peers.Spare)}
		// The id of an interrupted start may be known to the cluster already.
		if old, ok, err := read(d, infoFile, parseInfo); err == nil && ok && old.Address == ini.Address && d.has(joinFile) {
			node.ID = old.ID
		}
	}
	files := d.identity(node, ini.Cluster)
	// They may be there from an interrupted start, if they say the same.
	interrupted := true
	for _, f := range files {
		data, err := os.ReadFile(d.file(f.name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cannot read %s: %w", d.file(f.name), err)
		}
		interrupted = interrupted && (err != nil || string(data) == f.content)
	}
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return fmt.Errorf("cannot list %s: %w", d.path, err)
	}
	for _, e := range entries {
		switch name := e.Name(); name {
		case initFile, peers.CertFile, peers.KeyFile, failureDomainFile, tuningFile:
			continue
		case infoFile, clusterFile, joinFile:
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
	if err := os.Remove(d.file(initFile)); err != nil {
		return fmt.Errorf("cannot remove %s: %w", d.file(initFile), err)
	}
	return nil
}

func foreign(d directory, name string) error {
	return fmt.Errorf("%s asks for a new node, but %s already has %s: if its data is wanted remove %s, otherwise move the other files away", d.file(initFile), d.path, name, initFile)
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

// identity gives the files of a single member, or of one that joins the members with these
// addresses, in the order in which they are written.
func (d directory) identity(n Node, cluster []string) []identityFile {
	if len(cluster) == 0 {
		return []identityFile{{infoFile, n.yaml("")}, {clusterFile, "- " + n.yaml("  ")}}
	}
	var list strings.Builder
	for _, a := range cluster {
		list.WriteString("- " + Node{Address: a}.yaml("  "))
	}
	return []identityFile{{joinFile, ""}, {infoFile, n.yaml("")}, {clusterFile, list.String()}}
}

// identify writes info.yaml and cluster.yaml of a single member.
func (d directory) identify(n Node) error {
	for _, f := range d.identity(n, nil) {
		if err := d.write(f.name, f.content); err != nil {
			return err
		}
	}
	return nil
}
