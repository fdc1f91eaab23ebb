package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"microk8s/internal/args"
	"microk8s/internal/certs"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/encryption"
	"microk8s/internal/fileaccess"
	"microk8s/internal/filewatch"
	"microk8s/internal/nodecheck"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/ranges"
	"microk8s/internal/setup"
	"microk8s/internal/snapenv"
)

// Argument files that kubelite reads, on every node and on the control plane.
var (
	workerFiles       = []string{"kubelet", "kube-proxy"}
	controlPlaneFiles = []string{"kube-apiserver", "kube-controller-manager", "kube-scheduler"}
)

// socketWait is how long kubelite's start waits for containerd; the kubelet would end without
// it, and everything else with the kubelet.
const socketWait = 20 * time.Second

func (p *Preparer) kubelite(ctx context.Context, cmd *Command) error {
	config := nodeconfig.Load(p.Env)
	if !config.Kubelite {
		return nothingToDo("the lock " + snapenv.LockLite + " is missing")
	}
	if err := p.lowMemory(); err != nil {
		return err
	}
	f, err := p.load("kubelite")
	if err != nil {
		return err
	}
	if err := f.Set("start-control-plane", strconv.FormatBool(!config.Worker)); err != nil {
		return err
	}
	if err := f.Save(p.Env.Args("kubelite")); err != nil {
		return err
	}
	cmd.Args = f.Words(p.lookup)

	files := workerFiles
	if !config.Worker {
		files = slices.Concat(workerFiles, controlPlaneFiles)
	}
	var errs []error
	for _, name := range files {
		f, err := p.load(name)
		if err == nil && !config.KeepObsoleteArgs {
			err = p.dropObsolete(name, f)
		}
		errs = append(errs, err)
	}
	if err := errors.Join(append(errs, config.Err(nodeconfig.PartName, nodeconfig.PartRenamed), certs.Check(p.Env), setup.Ranges(ctx, p.Env, p.Log))...); err != nil {
		return err
	}
	if err := ranges.Begin(p.Env); err != nil {
		return err
	}
	config = nodeconfig.Load(p.Env) // with the ranges that were chosen
	if err := nodeconfig.KeepName(p.Env, config.NodeName); err != nil {
		return fmt.Errorf("cannot note the node's name: %w", err)
	}
	if err := p.ownAddress(config); err != nil {
		return err
	}
	if !config.Worker {
		if err := errors.Join(p.ownAuthentication(), p.encryptionKey()); err != nil {
			return err
		}
	}
	if err := p.failureDomain(config); err != nil {
		return err
	}
	p.kernel(ctx, config)
	return p.waitForSocket(ctx, p.Env.ContainerdSocket(), socketWait)
}

// ownAddress has a worker whose address is not on the host any more use the one that is: the join wrote it down once, and
// DHCP has others since. Nothing in the cluster knows a worker by its address. An address that somebody may have to come,
// because the host has none yet, is waited for by the kubelet.
func (p *Preparer) ownAddress(config nodeconfig.Config) error {
	if !config.Worker || len(config.NodeIPs) != 1 {
		return nil
	}
	own, err := p.addresses()
	now := p.host().Address
	if config.NodeIPs[0].Is6() {
		now = p.host().Address6
	}
	if err != nil || now == "" || slices.ContainsFunc(own, func(ip net.IP) bool { return ip.Equal(config.NodeIPs[0].AsSlice()) }) {
		return nil
	}
	p.Log.Info("this node has another address now", "before", config.NodeIPs[0], "now", now)
	_, err = nodeconfig.SetFlags(p.Env, nodeconfig.Kubelet, map[string]string{"node-ip": now})
	return err
}

// logFileFlags are those of the Kubernetes logging library that were dropped everywhere.
var logFileFlags = []string{
	"log-dir", "log-file", "log-file-max-size", "logtostderr", "alsologtostderr", "stderrthreshold",
	"skip-headers", "skip-log-headers", "one-output", "add-dir-header", "log-backtrace-at",
}

// obsolete lists, by argument file, flags that today's programs refuse (cli.md 7.2).
var obsolete = map[string][]string{
	"kube-apiserver": {
		"insecure-port", "insecure-bind-address", "port", "address", "service-account-api-audiences",
		"experimental-encryption-provider-config", "target-ram-mb",
	},
	"kubelet": {
		"container-runtime", "containerd", "pod-infra-container-image", "non-masquerade-cidr", "network-plugin", "cni-bin-dir",
		"cni-conf-dir", "cni-cache-dir", "network-plugin-mtu", "docker-endpoint", "image-pull-progress-deadline",
		"experimental-dockershim-root-directory", "experimental-kernel-memcg-notification", "experimental-check-node-capabilities-before-mount",
		"experimental-allocatable-ignore-eviction", "experimental-mounter-path", "experimental-bootstrap-kubeconfig",
	},
	"kube-controller-manager": {"address", "port", "experimental-cluster-signing-duration"},
	"kube-scheduler":          {"address", "port"},
}

// obsoleteValues are flags that are refused with one value only.
var obsoleteValues = map[string]map[string]string{
	"kube-apiserver": {"feature-gates": "RemoveSelfLink=false"},
	"kube-proxy":     {"proxy-mode": "userspace"},
}

func (p *Preparer) dropObsolete(name string, f *args.File) error {
	drop := slices.Concat(logFileFlags, obsolete[name])
	for flag, value := range obsoleteValues[name] {
		if got, _ := f.Get(flag); got == value {
			drop = append(drop, flag)
		}
	}
	changed := false
	for _, flag := range drop {
		if f.Unset(flag) {
			p.Log.Info("Removing argument: --"+flag+" from "+name, "file", p.Env.Args(name))
			changed = true
		}
	}
	if !changed {
		return nil
	}
	return f.Save(p.Env.Args(name))
}

// ownAuthentication leaves the shipped configuration of authentication out where somebody has
// set flags that the API server refuses beside it (--oidc-*, --anonymous-auth): what was
// set counts. A configuration of the user's own stays, and the API server says what clashes.
func (p *Preparer) ownAuthentication() error {
	const flag, shipped = "authentication-config", "authentication-config.yaml"
	f, err := p.load("kube-apiserver")
	if err != nil {
		return err
	}
	if path, set := f.Value(flag, p.lookup); !set || path != p.Env.Args(shipped) {
		return nil
	}
	for _, name := range f.Flags() {
		if strings.HasPrefix(name, "oidc-") || name == "anonymous-auth" {
			p.Log.Warn("--"+flag+" is left out, because --"+name+" does not go together with it: requests without credentials reach what RBAC lets them", "file", p.Env.Args("kube-apiserver"))
			f.Unset(flag)
			return f.Save(p.Env.Args("kube-apiserver"))
		}
	}
	return nil
}

// encryptionKey makes the key of encryption at rest where the arguments name the one in the
// datastore's folder and it is not there: the folder was replaced by one without, such as an
// older release's. What is plain in it can be read with any key.
func (p *Preparer) encryptionKey() error {
	f, err := p.load("kube-apiserver")
	if err != nil {
		return err
	}
	path, set := f.Value(encryption.Flag, p.lookup)
	if !set || path != encryption.Path(p.Env) {
		return nil
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if _, err := os.Stat(p.Env.BackendLive()); errors.Is(err, fs.ErrNotExist) {
		return nil // the API server says that it has no datastore
	}
	p.Log.Warn("the key of encryption at rest was missing, and a new one is made; if Secrets were encrypted with another, put its file back", "file", path)
	return fileaccess.For(p.Env).WriteSecret(path, encryption.New())
}

// failureDomain carries the number of args/ha-conf into the datastore's directory.
func (p *Preparer) failureDomain(config nodeconfig.Config) error {
	if !config.Datastore.Own() {
		return nil
	}
	path := p.Env.Args("ha-conf")
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot read the failure domain: %w", err)
	}
	domain, set := "", false
	for line := range strings.Lines(string(data)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "failure-domain="); ok {
			domain, set = v, true
		}
	}
	if !set {
		return nil
	}
	if _, err := strconv.ParseUint(domain, 10, 64); err != nil {
		return fmt.Errorf("cannot use %s: failure-domain=%q is not a number; write for example failure-domain=1", path, domain)
	}
	target := storedir.Dir(p.Env.BackendLive()).File(storedir.FailureDomainFile)
	if old, err := os.ReadFile(target); err == nil && strings.TrimSpace(string(old)) == domain {
		return nil
	}
	if _, err := os.Stat(p.Env.BackendLive()); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return fileaccess.For(p.Env).WriteShared(target, []byte(domain+"\n"))
}

// kernel switches on what pods need of the kernel. What is not allowed is said, and left.
func (p *Preparer) kernel(ctx context.Context, config nodeconfig.Config) {
	for feature, module := range map[string]string{
		"proc/sys/net/bridge/bridge-nf-call-iptables": "br_netfilter",
		"proc/sys/net/netfilter/nf_conntrack_max":     "nf_conntrack",
	} {
		if _, err := os.Stat(p.Env.HostPath(feature)); errors.Is(err, fs.ErrNotExist) {
			if err := p.Modprobe(ctx, module); err != nil {
				p.Log.Warn("cannot load a kernel module", "err", err)
			} else {
				p.Host = nil // look again
			}
		}
	}
	p.limits(config) // a worker has no datastore, which does it elsewhere
	want := []string{"net/ipv4/ip_forward", "net/bridge/bridge-nf-call-iptables"}
	// Forwarding IPv6 makes a host ignore router advertisements, so only where pods have it.
	if slices.ContainsFunc(config.ClusterCIDRs, func(c netip.Prefix) bool { return c.Addr().Is6() }) {
		want = append(want, "net/ipv6/conf/all/forwarding", "net/bridge/bridge-nf-call-ip6tables")
	}
	for _, name := range want {
		p.sysctl(name, 1)
	}
}

// limits raises the kernel's limits to what the datastore and many pods need (cli.md 7.3). Its locks
// are how a person keeps them (docs/install.md).
func (p *Preparer) limits(config nodeconfig.Config) {
	for _, l := range nodecheck.Limits {
		switch {
		case config.KeepLimits, config.KeepAIO && strings.HasPrefix(l.Name, "fs/aio"), config.KeepInotify && strings.HasPrefix(l.Name, "fs/inotify"):
		default:
			p.sysctl(l.Name, l.Min)
		}
	}
}

// sysctl raises a kernel setting to at least the value.
func (p *Preparer) sysctl(name string, value uint64) {
	path := p.Env.HostPath(filepath.Join("proc/sys", name))
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return // said by hostprobe where it matters
	}
	var now uint64
	if err == nil {
		now, err = strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
	}
	if err == nil && now < value {
		err = os.WriteFile(path, []byte(strconv.FormatUint(value, 10)), 0o644)
	}
	if err != nil {
		p.Log.Warn("cannot change a kernel setting", "setting", strings.ReplaceAll(name, "/", "."), "wanted", value, "err", err)
	}
}

// waitForSocket returns when the socket is there, and after the limit with a warning: the
// program then says what is wrong.
func (p *Preparer) waitForSocket(ctx context.Context, path string, limit time.Duration) error {
	there := func() bool { _, err := os.Stat(path); return err == nil }
	if there() {
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	changed, err := filewatch.Watch(ctx, filewatch.Options{}, filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("cannot wait for containerd: %w", err)
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for !there() {
		select {
		case _, open := <-changed:
			if !open && ctx.Err() == nil {
				return errors.New("cannot wait for containerd: watching its folder has ended")
			}
		case <-timer.C:
			p.Log.Warn("containerd is not running yet; if this lasts, see its log", "socket", path, "waited", limit)
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (p *Preparer) k8sDqlite(context.Context, *Command) error {
	config := nodeconfig.Load(p.Env)
	switch config.Datastore.Owner {
	case nodeconfig.NoDatastore:
		return nothingToDo("this node is not a member of the datastore")
	case nodeconfig.ExternalEtcd:
		return nothingToDo("the datastore is the etcd at " + strings.Join(config.Datastore.Endpoints, ", "))
	case nodeconfig.OwnDatastore:
	}
	if err := p.lowMemory(); err != nil {
		return err
	}
	if _, err := os.Stat(p.Env.Args("k8s-dqlite")); errors.Is(err, fs.ErrNotExist) {
		return nothingToDo(p.Env.Args("k8s-dqlite") + " does not exist")
	}
	p.limits(config)
	if err := certs.Finish(p.Env); err != nil {
		return err
	}
	if err := p.readdress(); err != nil {
		return err
	}
	return p.failureDomain(config)
}

// readdress moves the datastore of a node that is alone to the loopback when the host has lost
// the address that it listened on. With other members that cannot be done: status says so.
func (p *Preparer) readdress() error {
	dir := storedir.Dir(p.Env.BackendLive())
	self, err := dir.Self()
	members, err2 := dir.Members()
	if err != nil || err2 != nil || dir.Has(storedir.JoinFile) || dir.Has(storedir.UpdateFile) {
		return nil //nolint:nilerr // the datastore says what is wrong with its own files
	}
	host, port, err := net.SplitHostPort(self.Address)
	if err != nil || len(members) != 1 || members[0].Address != self.Address {
		return nil //nolint:nilerr // not a node that is alone
	}
	ip := net.ParseIP(host)
	own, err := p.addresses()
	if err != nil || ip == nil || ip.IsLoopback() || slices.ContainsFunc(own, ip.Equal) {
		return err
	}
	p.Log.Info("the datastore's address is no longer one of this host's: moving it to the loopback", "from", self.Address)
	return dir.Move(net.JoinHostPort(storedir.Loopback, port), fileaccess.For(p.Env).WriteShared)
}
