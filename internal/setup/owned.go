package setup

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"

	"microk8s/internal/hostnet"
	"microk8s/internal/hostprobe"
	"microk8s/internal/images"
	"microk8s/internal/podledger"
	"microk8s/internal/snapenv"
)

// Directories such as /run/containerd and /var/log/pods have one place on a host, and every container
// runtime and kubelet on it uses them. What in them is this node's follows from what its programs
// wrote down in the node's own folders before they put it there: the kubelet a directory for each pod,
// by UID, which the cluster agent notes (internal/podledger), and containerd one for each container, by
// ID. Everything else is somebody else's and stays.

// owned is what the node's programs have written down.
type owned struct {
	pods       map[string]bool // UIDs
	containers map[string]bool // IDs, of pods' sandboxes too
}

// containerdNamespace is where the CRI keeps its containers.
const containerdNamespace = "k8s.io"

// readOwned reads the ledger. Directories that are missing have nothing in them.
func readOwned(env snapenv.Env) owned {
	o := owned{pods: podledger.Read(env), containers: map[string]bool{}}
	names := func(into map[string]bool, dir string) {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if e.IsDir() {
				into[e.Name()] = true
			}
		}
	}
	for _, root := range []string{env.ContainerdState(), env.ContainerdRoot()} {
		names(o.containers, filepath.Join(root, "io.containerd.runtime.v2.task", containerdNamespace))
		names(o.containers, filepath.Join(root, "io.containerd.grpc.v1.cri", "sandboxes"))
		names(o.containers, filepath.Join(root, "io.containerd.grpc.v1.cri", "containers"))
	}
	return o
}

// A sharedDir is a directory of the host that several products use, and what in it is the node's.
type sharedDir struct {
	path   string
	remove func(o owned) error
	// ours are directories in it that this node's programs make; they go when they are empty and the
	// tree was not there before the node.
	ours []string
}

func (in *Installer) sharedDirs() []sharedDir {
	env := in.Env
	logs, links, cni, run := env.HostPath("var/log/pods"), env.HostPath("var/log/containers"), env.HostPath("var/lib/cni"), env.HostPath("run/containerd")
	return []sharedDir{
		{path: links, remove: func(o owned) error { return removeLogLinks(links, logs, o) }},
		{path: logs, remove: func(o owned) error { return in.removeLogs(logs, o) }},
		{path: cni, remove: func(o owned) error { return removeCNIResults(cni, o) }, ours: []string{"results", "networks", "cache"}},
		{path: run, remove: func(o owned) error { return removeShims(env, o) }, ours: []string{"s", "runc/" + containerdNamespace, "runc", "fifo"}},
	}
}

// podLogs is the name of a pod's directory of logs: NAMESPACE_NAME_UID.
var podLogs = regexp.MustCompile(`^[^_]+_[^_]+_([^_]+)$`)

// removeLogs removes the logs of the node's pods, and directories of pods that have none in them.
func (in *Installer) removeLogs(dir string, o owned) error {
	entries, _ := os.ReadDir(dir)
	var errs []error
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		switch m := podLogs.FindStringSubmatch(e.Name()); {
		case m == nil || !e.IsDir():
		case o.pods[m[1]]:
			errs = append(errs, os.RemoveAll(path))
		default:
			os.Remove(path) // only an empty one
		}
	}
	return errors.Join(errs...)
}

// removeLogLinks removes the links to logs of the node's pods.
func removeLogLinks(dir, logs string, o owned) error {
	entries, _ := os.ReadDir(dir)
	var errs []error
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		target, err := os.Readlink(path)
		if err != nil {
			continue
		}
		pod := filepath.Base(filepath.Dir(filepath.Dir(target))) // …/NAMESPACE_NAME_UID/CONTAINER/0.log
		if m := podLogs.FindStringSubmatch(pod); m != nil && o.pods[m[1]] {
			errs = append(errs, os.Remove(path))
		}
	}
	return errors.Join(errs...)
}

// removeCNIResults removes what the CNI library remembers of the node's containers.
func removeCNIResults(dir string, o owned) error {
	files, _ := filepath.Glob(filepath.Join(dir, "results", "*"))
	var errs []error
	for _, path := range files {
		var result struct{ NetworkName, ContainerID string }
		data, err := os.ReadFile(path)
		if err != nil || json.Unmarshal(data, &result) != nil {
			continue
		}
		if result.NetworkName == hostnet.NetworkName || o.containers[result.ContainerID] {
			errs = append(errs, os.Remove(path))
		}
	}
	return errors.Join(errs...)
}

// removeShims removes what the shims of the node's containers, and runc, have there.
func removeShims(env snapenv.Env, o owned) error {
	var errs []error
	for id := range o.containers {
		errs = append(errs, images.Forget(env, id))
	}
	return errors.Join(errs...)
}

// removeOwned removes what is the node's from the directories that it shares, and those of them that were
// not there before it and are empty now. What is left is logged.
func (in *Installer) removeOwned(noted []string) error {
	o := readOwned(in.Env)
	host := hostprobe.Probe(in.Env.Host)
	var errs []error
	for _, t := range in.sharedDirs() {
		if points := host.MountsBelow(t.path); len(points) > 0 {
			errs = append(errs, errMounted(t.path, points[0]))
			continue
		}
		errs = append(errs, t.remove(o))
		if !slices.Contains(noted, t.path) {
			continue
		}
		for _, d := range t.ours {
			os.Remove(filepath.Join(t.path, d)) // only an empty one
		}
		if err := os.Remove(t.path); err == nil || errors.Is(err, fs.ErrNotExist) {
			continue
		}
		var left []string
		entries, _ := os.ReadDir(t.path)
		for _, e := range entries {
			left = append(left, e.Name())
		}
		if len(left) > 0 {
			in.Log.Warn("a directory stays, because not all of it is known to be this node's", "path", t.path, "left", shortList(left))
		}
	}
	return errors.Join(errs...)
}

func shortList(names []string) string {
	const most = 5
	if len(names) > most {
		names = append(slices.Clone(names[:most]), "…")
	}
	return strings.Join(names, ", ")
}

// userInterfaces are those that pod networks commonly make which users put in the place of the built-in
// one: Calico's and Cilium's tunnels. The ends of pods go with the pods.
var userInterfaces = []string{"vxlan.calico", "vxlan-v6.calico", "cilium_host", "cilium_net", "cilium_vxlan"}

var networks = regexp.MustCompile(`[0-9a-fA-F:.]+/[0-9]{1,3}`)

// removeInterfaces removes the interfaces of a pod network that the user has brought, if they have an
// address of a range that its manifest names. Those of another cluster's Calico or Cilium stay. The
// built-in network's are hostnet's business.
func (in *Installer) removeInterfaces() error {
	data, err := os.ReadFile(in.Env.CNIManifest())
	if err != nil {
		return nil //nolint:nilerr // it has brought none
	}
	var ranges []netip.Prefix
	for _, text := range networks.FindAllString(string(data), -1) {
		if p, err := netip.ParsePrefix(text); err == nil && p.Bits() > 0 {
			ranges = append(ranges, p)
		}
	}
	var errs []error
	for _, name := range userInterfaces {
		l, err := netlink.LinkByName(name)
		if err != nil {
			continue
		}
		if !hostnet.OwnNetwork(l, ranges) {
			in.Log.Warn("an interface stays, because it is not known to be this node's; if it is, remove it with: ip link delete "+name, "interface", name)
			continue
		}
		if err := netlink.LinkDel(l); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
