// Package snapenv knows where everything of one installed microk8s is: the read-only
// package tree ($SNAP), the per-revision data ($SNAP_DATA), the data that no refresh copies
// ($SNAP_COMMON), and the few paths outside of them that the product owns.
//
// Every path in the program is a method here, so that a test points the whole program at a
// temporary folder with [Under]. The package reads no environment by itself; [FromEnviron]
// takes the lookup function from main.
package snapenv

import (
	"path/filepath"
	"strings"
)

// Env is one installation as a process sees it. It is a value; copies are independent.
type Env struct {
	Snap   string // read-only package root; a revision under snapd, otherwise the installed tree
	Data   string // per-revision data, /var/snap/microk8s/<revision>
	Common string // data that is never copied nor rolled back, /var/snap/microk8s/common

	// UserCommon is the calling user's own data, ~/snap/microk8s/common: root's in hooks and
	// services.
	UserCommon string

	// Host is the root of the file system that holds the paths outside the snap
	// (/var/lib/kubelet and so on): "/" except in tests.
	Host string

	Name     string // snap name, "microk8s" unless snapd says otherwise
	Version  string // SNAP_VERSION, or "" when not known
	Revision string // SNAP_REVISION, or "" when not known

	// Snapd is true when the process was started by snapd (SNAP_COOKIE or SNAP_INSTANCE_NAME
	// is set): services are then snap services, driven with snapctl.
	Snapd bool
}

// Default directories when snapd does not say otherwise (cli.md 0.5).
const (
	DefaultSnap       = "/snap/microk8s/current"
	DefaultData       = "/var/snap/microk8s/current"
	DefaultCommon     = "/var/snap/microk8s/common"
	DefaultUserCommon = "/root/snap/microk8s/common"
)

// FromEnviron makes an Env from SNAP, SNAP_DATA and the other variables of cli.md 0.5, as
// getenv returns them (os.Getenv in main). Missing ones get the documented defaults.
func FromEnviron(getenv func(string) string) Env {
	or := func(key, def string) string {
		if v := getenv(key); v != "" {
			return v
		}
		return def
	}
	return Env{
		Snap:       or("SNAP", DefaultSnap),
		Data:       or("SNAP_DATA", DefaultData),
		Common:     or("SNAP_COMMON", DefaultCommon),
		Host:       "/",
		Name:       or("SNAP_NAME", "microk8s"),
		UserCommon: or("SNAP_USER_COMMON", DefaultUserCommon),
		Version:    getenv("SNAP_VERSION"),
		Revision:   getenv("SNAP_REVISION"),
		Snapd:      getenv("SNAP_COOKIE") != "" || getenv("SNAP_INSTANCE_NAME") != "",
	}
}

// Under returns an Env whose every path, those of the host included, lies below root. For tests.
func Under(root string) Env {
	return Env{
		Snap:       filepath.Join(root, DefaultSnap),
		Data:       filepath.Join(root, DefaultData),
		Common:     filepath.Join(root, DefaultCommon),
		UserCommon: filepath.Join(root, DefaultUserCommon),
		Host:       root,
		Name:       "microk8s",
		Version:    "v0.0.0-test",
		Revision:   "x1",
	}
}

// Group is the Unix group whose members may use the command line without sudo (cli.md 0.6).
const Group = "microk8s"

// Lookup returns the value of the variables that argument files may use (SNAP, SNAP_DATA,
// SNAP_COMMON, SNAP_NAME …); ok is false for any other name, the caller then asks its own
// environment or treats it as empty.
func (e Env) Lookup(name string) (value string, ok bool) {
	switch name {
	case "SNAP":
		return e.Snap, true
	case "SNAP_DATA":
		return e.Data, true
	case "SNAP_COMMON":
		return e.Common, true
	case "SNAP_NAME":
		return e.Name, true
	case "SNAP_VERSION":
		return e.Version, true
	case "SNAP_REVISION":
		return e.Revision, true
	}
	return "", false
}

// Environ returns base (in the form of os.Environ) with the variables of this Env set, for
// starting a program of the product.
func (e Env) Environ(base []string) []string {
	set := map[string]string{
		"SNAP": e.Snap, "SNAP_DATA": e.Data, "SNAP_COMMON": e.Common, "SNAP_NAME": e.Name,
		"SNAP_VERSION": e.Version, "SNAP_REVISION": e.Revision,
	}
	out := make([]string, 0, len(base)+len(set))
	for _, kv := range base {
		k, _, _ := strings.Cut(kv, "=")
		if _, ours := set[k]; !ours {
			out = append(out, kv)
		}
	}
	for _, k := range []string{"SNAP", "SNAP_DATA", "SNAP_COMMON", "SNAP_NAME", "SNAP_VERSION", "SNAP_REVISION"} {
		out = append(out, k+"="+set[k])
	}
	return out
}

// In $SNAP (cli.md 6.1).

// Bin is a program of the package, $SNAP/bin/<name>.
func (e Env) Bin(name string) string { return filepath.Join(e.Snap, "bin", name) }

// DefaultArgs is the directory of shipped argument files, $SNAP/default-args.
func (e Env) DefaultArgs() string { return filepath.Join(e.Snap, "default-args") }

// KubeletConfig is the kubelet's configuration file of the product: what is not a flag of the kubelet.
func (e Env) KubeletConfig() string { return filepath.Join(e.Snap, "kubelet.yaml") }

// Images is the directory of the OCI archives that travel with the product.
func (e Env) Images() string { return filepath.Join(e.Snap, "images") }

// Manifests is the directory of the objects that every control plane applies.
func (e Env) Manifests() string { return filepath.Join(e.Snap, "manifests") }

// CoreAddons is the directory of the addon repository that is part of the product.
func (e Env) CoreAddons() string { return filepath.Join(e.Snap, "addons/core") }

// FirstFailure is the file that bash reads before the hook of an addon, so that a failure in it is not lost.
func (e Env) FirstFailure() string { return filepath.Join(e.Snap, "actions/common/first-failure.sh") }

// HelmForHooks is where hooks of earlier versions find helm after they have enabled the addon helm3.
func (e Env) HelmForHooks() string { return filepath.Join(e.Data, "bin/helm3") }

// ShippedCNIBin is the directory of the CNI plugins in the package.
func (e Env) ShippedCNIBin() string { return filepath.Join(e.Snap, "opt/cni/bin") }

// BOM is the bill of materials: names and versions of everything inside.
func (e Env) BOM() string { return filepath.Join(e.Snap, "bom.json") }

// In $SNAP_DATA (cli.md 6.2).

// ArgsDir is $SNAP_DATA/args.
func (e Env) ArgsDir() string { return filepath.Join(e.Data, "args") }

// Args is one argument file, $SNAP_DATA/args/<name>.
func (e Env) Args(name string) string { return filepath.Join(e.Data, "args", name) }

// CNIConf is containerd's CNI configuration directory.
func (e Env) CNIConf() string { return filepath.Join(e.Data, "args/cni-network") }

// CNIManifest is the user's own CNI; where it exists the built-in pod network stands aside.
func (e Env) CNIManifest() string { return filepath.Join(e.CNIConf(), "cni.yaml") }

// UserManifests is the folder whose manifests and charts a control-plane node keeps in the cluster.
func (e Env) UserManifests() string { return filepath.Join(e.Data, "args/manifests") }

// ManifestsState is where a node notes what those have brought.
func (e Env) ManifestsState() string { return filepath.Join(e.Common, "var/manifests.json") }

// CNIBin is the directory from which containerd runs CNI plugins.
func (e Env) CNIBin() string { return filepath.Join(e.Data, "opt/cni/bin") }

// CertsDir is $SNAP_DATA/certs.
func (e Env) CertsDir() string { return filepath.Join(e.Data, "certs") }

// Cert is one certificate or key, $SNAP_DATA/certs/<name>.
func (e Env) Cert(name string) string { return filepath.Join(e.Data, "certs", name) }

// CredentialsDir is $SNAP_DATA/credentials.
func (e Env) CredentialsDir() string { return filepath.Join(e.Data, "credentials") }

// Credential is one kubeconfig or token file, $SNAP_DATA/credentials/<name>.
func (e Env) Credential(name string) string { return filepath.Join(e.Data, "credentials", name) }

// AdminKubeconfig is $SNAP_DATA/credentials/client.config.
func (e Env) AdminKubeconfig() string { return e.Credential("client.config") }

// LocksDir is $SNAP_DATA/var/lock.
func (e Env) LocksDir() string { return filepath.Join(e.Data, "var/lock") }

// Lock is one lock file (cli.md 6.6), $SNAP_DATA/var/lock/<name>.
func (e Env) Lock(name string) string { return filepath.Join(e.Data, "var/lock", name) }

// Names of the locks (cli.md 6.6). What each means is in internal/nodeconfig, which reads and
// writes them.
const (
	LockInstalled = "installed.lock"
	LockLite      = "lite.lock"
	LockHA        = "ha-cluster"
	LockWorker    = "clustered.lock"
	LockStopped   = "stopped.lock"
	LockLowMemory = "low-memory-guard.lock"
	LockNoDqlite  = "no-k8s-dqlite"
	LockCIS       = "cis-hardening"
	LockNoReissue = "no-cert-reissue"
	LockRemount   = "snapdata-mounts-need-reload" // pods that mount an older revision are to be restarted
	LockNoRemount = "no-cni-reload"               // they are not
	LockAddons    = ".microk8s-addon-lock"        // held, by a record lock, while addons are changed
	LockJoining   = "join-in-progress"
	LockResetting = "reset-in-progress"  // from the moment a reset begins to delete until it is done
	LockCNILoaded = "cni-loaded"         // the user's own pod network was applied
	LockNoProxy   = "no-apiserver-proxy" // for other programs, as no-etcd and no-flanneld are

	LockKeepArgs    = "no-arg-sanitisation"
	LockKeepAIO     = "skip-aio-tune.lock"
	LockKeepInotify = "skip-inotify-tune.lock"
	LockKeepLimits  = "skip-limits-tune.lock" // all of them
)

// Backend is the documented path of the datastore directory, $SNAP_DATA/var/kubernetes/backend:
// a link to [Env.BackendLive].
func (e Env) Backend() string { return filepath.Join(e.Data, "var/kubernetes/backend") }

// BackendLive is where the datastore really lives. It is in $SNAP_COMMON so that no snap
// revert can bring an old log and vote back (ADR 9).
func (e Env) BackendLive() string { return filepath.Join(e.Common, "var/kubernetes/backend") }

// BackendMarker says how far the datastore's directory has come, so that an old copy of it does
// not start.
func (e Env) BackendMarker() string { return filepath.Join(e.Common, "var/kubernetes/backend.marker") }

// NewestArchive says which archive of the cluster is the newest that was proven, for when the cluster itself
// cannot be asked any more.
func (e Env) NewestArchive() string {
	return filepath.Join(e.Common, "var/kubernetes/newest-archive.json")
}

// DatastoreSocket is the etcd API socket; the file's name really ends in ":12379".
func (e Env) DatastoreSocket() string { return filepath.Join(e.Backend(), "kine.sock:12379") }

// In $SNAP_COMMON.

// UserLaunchFile is where a person puts a launch configuration for the first start of the node,
// $SNAP_COMMON/.microk8s.yaml.
func (e Env) UserLaunchFile() string { return filepath.Join(e.Common, ".microk8s.yaml") }

// LaunchDir is where the cluster agent finds launch configurations, $SNAP_COMMON/etc/launcher.
func (e Env) LaunchDir() string { return filepath.Join(e.Common, "etc/launcher") }

// LaunchFile is one of them.
func (e Env) LaunchFile(name string) string { return filepath.Join(e.LaunchDir(), name) }

// LaunchInstall is the one that came with the installation. Its name with .applied behind it
// is what it is called when all of it was applied.
const LaunchInstall = "install.yaml"

// IdentityFile says as part of which cluster the services were started last.
func (e Env) IdentityFile() string { return filepath.Join(e.Common, "var/identity.json") }

// RunDir is $SNAP_COMMON/run: sockets and state that do not outlive a boot.
func (e Env) RunDir() string { return filepath.Join(e.Common, "run") }

// ContainerdSocket is the CRI and containerd API socket.
func (e Env) ContainerdSocket() string { return filepath.Join(e.Common, "run/containerd.sock") }

// ContainerdRoot is containerd's persistent directory.
func (e Env) ContainerdRoot() string { return filepath.Join(e.Common, "var/lib/containerd") }

// ContainerdState is containerd's directory of state that does not outlive a boot.
func (e Env) ContainerdState() string { return filepath.Join(e.Common, "run/containerd") }

// KubeletRoot is the kubelet's directory.
func (e Env) KubeletRoot() string { return filepath.Join(e.Common, "var/lib/kubelet") }

// SideloadDir takes archives of images that containerd is to have.
func (e Env) SideloadDir() string { return filepath.Join(e.Common, "etc/sideload") }

// Packs is the folder of the packs of addons that this node keeps.
func (e Env) Packs() string { return filepath.Join(e.Common, "packs") }

// SideloadArchives lists the archives of images in a folder, by their names' endings.
func SideloadArchives(dir string) []string {
	var all []string
	for _, ending := range []string{"tar", "tar.gz", "tgz", "tar.zst"} {
		found, _ := filepath.Glob(filepath.Join(dir, "*."+ending)) // the only error is a bad pattern
		all = append(all, found...)
	}
	return all
}

// DefaultStorage is where the hostpath provisioner keeps volumes.
func (e Env) DefaultStorage() string { return filepath.Join(e.Common, "default-storage") }

// AddonRepositories is the directory of the addon repositories that people have added.
func (e Env) AddonRepositories() string { return filepath.Join(e.Common, "addons") }

// AddonRepository is one of them.
func (e Env) AddonRepository(name string) string { return filepath.Join(e.AddonRepositories(), name) }

// PluginsDir holds executables that addons add as subcommands.
func (e Env) PluginsDir() string { return filepath.Join(e.Common, "plugins") }

// SupervisorSocket is the control socket of our own supervisor (machines without snapd).
func (e Env) SupervisorSocket() string { return filepath.Join(e.Common, "run/supervisor.sock") }

// LogDir is the folder of the service logs on machines without snapd.
func (e Env) LogDir() string { return filepath.Join(e.Common, "var/log") }

// ServiceLog is the log file that the supervisor writes for a service.
func (e Env) ServiceLog(service string) string {
	return filepath.Join(e.Common, "var/log", service+".log")
}

// ClusterDir holds, for root alone, what a change of this node's membership needs.
func (e Env) ClusterDir() string { return filepath.Join(e.Common, "var/cluster") }

// Journal says which change of this node's membership is under way.
func (e Env) Journal() string { return filepath.Join(e.ClusterDir(), "journal") }

// HostPath is a path outside the snap, such as HostPath("etc/cni/net.d").
func (e Env) HostPath(path string) string { return filepath.Join(e.Host, path) }
