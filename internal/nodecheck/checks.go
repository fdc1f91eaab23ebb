package nodecheck

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"microk8s/internal/argsdigest"
	"microk8s/internal/hostnet"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/ranges"
	"microk8s/internal/registryhosts"
	"microk8s/internal/service"
	"microk8s/internal/snapenv"
)

// Checks is everything that is looked at, in the order in which it is reported.
var Checks = []Check{
	{ID: "args.edited", Looks: "digests of the files in args/ and of what the running services read", run: argsEdited},
	{ID: "args.ranges", Looks: "args/cni-env and the ranges of pods and Services that the daemons have", run: argsRanges},
	{ID: "agent.answers", Looks: "the cluster agent's answer on its port", run: agentAnswers},
	{ID: "network.bridge", Looks: "addresses of the device cni0 and the pod subnet in args/cni-network", run: bridge},
	{ID: "disk.space", Looks: "free space of the file systems of /var and /tmp", run: diskSpace},
	{ID: "disk.inodes", Looks: "free inodes of the product's file systems", run: diskInodes},
	{ID: "certs.end", Looks: "the ends of the certificates in certs/", run: certsEnd},
	{ID: "clock.peers", Looks: "the Date that the agents of other nodes answer with", run: clockPeers},
	{ID: "registry.hosts", Looks: "args/certs.d/*/hosts.toml, with containerd's parser", run: registryHosts},
	{ID: "kernel.exhausted", Looks: "connections, open files and threads in use, and their limits in /proc/sys", run: exhausted},
	{ID: "dns.loop", Looks: "name servers in /etc/resolv.conf and in what systemd-resolved uses", Slow: true, run: dnsLoop},
	{ID: "cgroup.controllers", Looks: "controllers in /sys/fs/cgroup and /proc/cgroups", Slow: true, run: cgroupControllers},
	{ID: "memory.oom", Looks: "the kernel's log of the last hour", Slow: true, run: oomKills},
	{ID: "memory.groups", Looks: "the out-of-memory counters of the services' control groups", Slow: true, run: oomGroups},
	{ID: "kernel.limits", Looks: "limits of inotify, asynchronous I/O, files and processes in /proc/sys", Slow: true, run: kernelLimits},
	{ID: "kernel.modules", Looks: "what the kernel has of overlay, nf_tables, conntrack and vxlan", Slow: true, run: kernelModules},
	{ID: "clock.sync", Looks: "the kernel's word on whether a time service keeps the clock", Slow: true, run: clockSync},
	{ID: "memory.swap", Looks: "/proc/swaps", Slow: true, run: swap},
	{ID: "host.machine-id", Looks: "/etc/machine-id", Slow: true, run: machineID},
}

// restart is how changed arguments come into force.
const restart = "microk8s stop; microk8s start"

func argsEdited(_ context.Context, n *Node) (out []Finding, err error) {
	for _, s := range n.Services {
		if s.Phase != service.Running {
			continue
		}
		names, err := argsdigest.Changed(n.Env, s.Name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return out, fmt.Errorf("service %s was started by a version that kept no digests", s.Name)
		case err != nil:
			return out, err
		}
		if argsRangesDiffer(n) {
			names = slices.DeleteFunc(names, func(f string) bool { return f == ranges.FileName }) // a restart does not help
		}
		if len(names) > 0 {
			out = append(out, one("bring it into force with "+restart, "%s was changed after service %s was started, which does not know yet",
				strings.Join(prefixed("args/", names), ", "), s.Name)...)
		}
	}
	return out, nil
}

// argsRanges holds that args/cni-env says what the cluster has: a person who changed it later waits for nothing.
func argsRanges(_ context.Context, n *Node) ([]Finding, error) {
	if err := ranges.Differs(n.Env); err != nil {
		return one("change the file back; other ranges need a new cluster", "args/%s has no effect: %v", ranges.FileName, err), nil
	}
	return nil, nil
}

func argsRangesDiffer(n *Node) bool { return ranges.Differs(n.Env) != nil }

func prefixed(prefix string, names []string) []string {
	out := make([]string, len(names))
	for i, name := range names {
		out[i] = prefix + name
	}
	return out
}

// agentAnswers holds that the agent is not frozen: the kernel takes connections for a frozen process too.
func agentAnswers(ctx context.Context, n *Node) ([]Finding, error) {
	if _, runs := n.running(service.ClusterAgent); !runs {
		return nil, nil // said elsewhere
	}
	if _, err := n.Date(ctx, n.Config.AgentHost); err != nil {
		return one("see microk8s logs cluster-agent, and restart it with "+restart,
			"service cluster-agent runs and does not answer on port %d: joins, image imports and changes from other nodes fail (%s)", n.Config.AgentPort, short(err)), nil
	}
	return nil, nil
}

// short is the cause alone.
func short(err error) string {
	if errors.Is(err, context.DeadlineExceeded) || os.IsTimeout(err) {
		return "no answer in time"
	}
	var errno unix.Errno
	if errors.As(err, &errno) {
		return errno.Error()
	}
	return err.Error()
}

// bridge holds that pods get addresses that the bridge routes: the bridge plugin refuses every new pod
// where cni0 has another address than the first of the node's subnet.
func bridge(_ context.Context, n *Node) ([]Finding, error) {
	if _, runs := n.running(service.Kubelite); !runs {
		return nil, nil
	}
	data, err := os.ReadFile(hostnet.Conflist(n.Env))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // a pod network of the user's, or none yet
	}
	if err != nil {
		return nil, err
	}
	var conf struct {
		Plugins []struct {
			Bridge string
			IPAM   struct {
				Ranges [][]struct{ Subnet netip.Prefix }
			}
		}
	}
	if err := json.Unmarshal(data, &conf); err != nil {
		return one("write it again with "+restart, "%s is damaged: %v", hostnet.Conflist(n.Env), err), nil
	}
	for _, p := range conf.Plugins {
		if p.Bridge == "" {
			continue
		}
		have, err := n.Addresses(p.Bridge)
		if errors.Is(err, fs.ErrNotExist) {
			continue // made with the first pod
		}
		if err != nil {
			return nil, err
		}
		for _, set := range p.IPAM.Ranges {
			for _, r := range set {
				if f := wrongBridge(p.Bridge, r.Subnet, have); f != nil {
					return f, nil
				}
			}
		}
	}
	return nil, nil
}

func wrongBridge(device string, subnet netip.Prefix, have []netip.Prefix) []Finding {
	gateway := netip.PrefixFrom(subnet.Masked().Addr().Next(), subnet.Bits())
	var others []string
	for _, a := range have {
		switch {
		case a == gateway:
			return nil
		case a.Addr().Is4() == gateway.Addr().Is4() && !a.Addr().IsLinkLocalUnicast():
			others = append(others, a.String())
		}
	}
	do := fmt.Sprintf("have it made again with: ip link delete %s; %s", device, restart)
	if len(others) > 0 {
		return one(do, "the pods' bridge %s has the address %s and not %s: new pods hang in ContainerCreating", device, strings.Join(others, ", "), gateway)
	}
	return one(do, "the pods' bridge %s has no address, it should have %s: pods reach nothing outside of this node", device, gateway)
}

// nearlyFull is what a file system of the host should have left: logs, images and programs of others go there.
const nearlyFull = 200 << 20

func diskSpace(_ context.Context, n *Node) (out []Finding, err error) {
	seen := map[unix.Fsid]bool{}
	for _, dir := range Storage(n.Env) { // said in words of its own
		if s, err := n.Statfs(dir); err == nil {
			seen[s.Fsid] = true
		}
	}
	for _, dir := range []string{"/var", "/var/log", "/tmp"} {
		s, err := n.Statfs(n.Env.HostPath(dir))
		if errors.Is(err, fs.ErrNotExist) || err == nil && (seen[s.Fsid] || s.Blocks == 0) {
			continue
		}
		if err != nil {
			return out, err
		}
		seen[s.Fsid] = true
		if free := s.Bavail * uint64(s.Bsize); free < nearlyFull {
			out = append(out, one("free some space there; find it with: du -xh "+dir+" | sort -h | tail",
				"the file system of %s is nearly full (%d MiB left)", dir, free>>20)...)
		}
	}
	return out, nil
}

// Storage returns the folders of the product that may be on file systems of their own, where services and pods write.
// Those that do not exist are among them.
func Storage(env snapenv.Env) []string {
	return []string{env.Data, env.Common, env.ContainerdRoot(), env.KubeletRoot(), env.BackendLive(), env.DefaultStorage()}
}

// fewInodes is the share of free inodes, in per cent, below which their end is near.
const fewInodes = 3

func diskInodes(_ context.Context, n *Node) (out []Finding, err error) {
	seen := map[unix.Fsid]bool{}
	for _, dir := range Storage(n.Env) {
		s, err := n.Statfs(dir)
		if errors.Is(err, fs.ErrNotExist) || err == nil && (seen[s.Fsid] || s.Files == 0) {
			continue
		}
		if err == nil && s.Ffree == 0 && (dir == n.Env.Data || dir == n.Env.Common) {
			seen[s.Fsid] = true
			continue // said by status itself
		}
		if err != nil {
			return out, err
		}
		seen[s.Fsid] = true
		if s.Ffree*100 < s.Files*fewInodes {
			out = append(out, one("remove many small files; find them with: du --inodes -x "+dir+" | sort -n | tail",
				"the file system of %s has %d of %d inodes left: no file can be made without one", dir, s.Ffree, s.Files)...)
		}
	}
	return out, nil
}

// endsSoon is the rest of a certificate's life in which it should have been renewed by itself, or the CA
// been replaced by a person.
func endsSoon(c *x509.Certificate) time.Duration {
	if c.IsCA {
		return 60 * 24 * time.Hour
	}
	return min(14*24*time.Hour, c.NotAfter.Sub(c.NotBefore)/6)
}

func certsEnd(_ context.Context, n *Node) (out []Finding, err error) {
	paths, _ := filepath.Glob(filepath.Join(n.Env.CertsDir(), "*.crt")) // the only error is a bad pattern
	now := n.Now()
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			return out, err
		}
		block, _ := pem.Decode(data)
		if block == nil {
			out = append(out, one("put the right file back, or have it made again: remove it and run "+restart, "%s is not a certificate", path)...)
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			out = append(out, one("put the right file back, or have it made again: remove it and run "+restart, "%s is not a certificate: %v", path, err)...)
			continue
		}
		left := c.NotAfter.Sub(now)
		if left <= 0 || left > endsSoon(c) {
			continue // status says what has ended
		}
		name := filepath.Base(path)
		do := "renew it with sudo microk8s refresh-certs -e " + name
		if c.IsCA || name != "server.crt" && name != "front-proxy-client.crt" {
			do = "renew it with sudo microk8s refresh-certs -e ca.crt"
		}
		out = append(out, one(do, "certificate %s ends on %s, in %d days", name, c.NotAfter.UTC().Format(time.DateOnly), int(left.Hours()/24))...)
	}
	return out, nil
}

// clockApart is how far two clocks may be apart. Certificates and tokens tolerate minutes; leases and logs
// suffer earlier. Dates of answers have whole seconds.
const clockApart = 10 * time.Second

// comparedClocks bounds how many nodes are asked: what status costs does not grow with the cluster.
const comparedClocks = 2

func clockPeers(ctx context.Context, n *Node) (out []Finding, err error) {
	for _, host := range n.Others[:min(len(n.Others), comparedClocks)] {
		there, askErr := n.Date(ctx, host)
		if askErr != nil {
			err = errors.Join(err, fmt.Errorf("the agent of %s: %s", host, short(askErr)))
			continue
		}
		apart := n.Now().Sub(there)
		if apart.Abs() <= clockApart {
			continue
		}
		word := "ahead of"
		if apart < 0 {
			word = "behind"
		}
		out = append(out, one("set both by a time service: timedatectl set-ntp true; compare with: date -u",
			"the clock of this node is %s %s that of %s", apart.Abs().Round(time.Second), word, host)...)
	}
	return out, err
}

func registryHosts(_ context.Context, n *Node) (out []Finding, err error) {
	for _, e := range registryhosts.CheckAll(n.Env.Args("certs.d")) {
		out = append(out, one("correct the file, no restart is needed, and try: microk8s ctr images pull IMAGE",
			"%v; containerd pulls as if the file were not there, or fails", e)...)
	}
	return out, nil
}

// resolvers reads the name servers of a file of the form of resolv.conf.
func resolvers(text string) (out []netip.Addr) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		address, _, _ := strings.Cut(f[1], "%")
		if a, err := netip.ParseAddr(address); err == nil {
			out = append(out, a.Unmap())
		}
	}
	return out
}

// dnsLoop finds name servers that lead back to the cluster, or that pods cannot reach.
func dnsLoop(_ context.Context, n *Node) ([]Finding, error) {
	list := resolvers(n.text("etc/resolv.conf"))
	behind := resolvers(n.text("run/systemd/resolve/resolv.conf"))
	own := netip.Addr{}
	if f, err := nodeconfig.File(n.Env, nodeconfig.Kubelet); err == nil {
		text, _ := f.Get("cluster-dns")
		first, _, _ := strings.Cut(text, ",")
		own, _ = netip.ParseAddr(first)
	}
	switch {
	case own.IsValid() && slices.Contains(list, own) && !slices.ContainsFunc(append(list, behind...), func(a netip.Addr) bool { return a != own && !a.IsLoopback() }):
		return one("name another one there, or give the cluster one: microk8s enable dns ADDRESS",
			"the only name server of this host is the cluster's own, %s: names outside of the cluster lead in a circle, and are refused", own), nil
	case len(list) > 0 && !slices.ContainsFunc(append(list, behind...), func(a netip.Addr) bool { return !a.IsLoopback() }):
		return one("give the cluster one that pods can reach: microk8s enable dns ADDRESS",
			"all name servers of this host are on its loopback (%s), where pods do not reach them: names outside of the cluster are refused", list[0]), nil
	}
	return nil, nil
}

func cgroupControllers(_ context.Context, n *Node) ([]Finding, error) {
	v2, v1 := strings.Fields(n.text("sys/fs/cgroup/cgroup.controllers")), n.text("proc/cgroups")
	if len(v2) == 0 && v1 == "" {
		return nil, errors.New("neither /sys/fs/cgroup/cgroup.controllers nor /proc/cgroups can be read")
	}
	on := map[string]bool{}
	for _, c := range v2 {
		on[c] = true
	}
	for line := range strings.Lines(v1) {
		if f := strings.Fields(line); len(f) == 4 && f[3] == "1" {
			on[f[0]] = true
		}
	}
	var missing []string
	for _, c := range []string{"cpu", "cpuset", "memory", "pids"} {
		if !on[c] {
			missing = append(missing, c)
		}
	}
	if len(missing) == 0 {
		return nil, nil
	}
	do := "add " + "cgroup_enable=" + strings.Join(missing, ",") + " to the kernel's command line and reboot; see what is there with: cat /proc/cgroups"
	if slices.Contains(missing, "memory") {
		do = "add cgroup_enable=memory cgroup_memory=1 to the kernel's command line and reboot; see what is there with: cat /proc/cgroups"
	}
	return one(do, "the kernel has no control group for %s, which the kubelet needs", strings.Join(missing, ", ")), nil
}

// recent is how old a line of the kernel's log may be to count.
const recent = time.Hour

// oomKills reads the kernel's log for processes that were killed because memory ran out: our services, and
// containers of pods.
func oomKills(_ context.Context, n *Node) ([]Finding, error) {
	log, err := kernelLog(n.Env.HostPath("dev/kmsg"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errors.New("there is no /dev/kmsg")
	}
	if err != nil {
		return nil, err
	}
	first, _, _ := strings.Cut(n.text("proc/uptime"), " ")
	up, err := strconv.ParseFloat(first, 64)
	if err != nil {
		return nil, errors.New("/proc/uptime cannot be read")
	}
	count := map[string]int{}
	var names []string
	for line := range strings.Lines(log) {
		head, text, ok := strings.Cut(line, ";")
		if !ok || !strings.HasPrefix(text, "oom-kill:") {
			continue
		}
		fields := strings.Split(head, ",")
		if len(fields) < 3 {
			continue
		}
		usec, err := strconv.ParseUint(fields[2], 10, 64)
		if at := time.Duration(usec) * time.Microsecond; err != nil || time.Duration(up*float64(time.Second))-at > recent {
			continue
		}
		task, group := value(text, "task"), value(text, "task_memcg")
		if !slices.Contains(service.Names(), task) && !strings.Contains(group, "kubepods") {
			continue
		}
		if count[task] == 0 {
			names = append(names, task)
		}
		count[task]++
	}
	if len(names) == 0 {
		return nil, nil
	}
	for i, name := range names {
		names[i] = fmt.Sprintf("%s (%d times)", name, count[name])
	}
	return one("see whose with: dmesg | grep oom-kill; give pods a larger limit (resources.limits.memory), or the machine more memory",
		"within the last hour the kernel killed, because memory ran out: %s", strings.Join(names, ", ")), nil
}

// value returns the value of a field of an oom-kill line: constraint=…,task_memcg=/…,task=NAME,pid=1,uid=0.
func value(text, name string) string {
	for _, f := range strings.Split(strings.TrimSpace(strings.TrimPrefix(text, "oom-kill:")), ",") {
		if v, ok := strings.CutPrefix(f, name+"="); ok {
			return v
		}
	}
	return ""
}

// kernelLog reads what the kernel's log holds now, in the form of /dev/kmsg.
func kernelLog(path string) (string, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var b strings.Builder
	buf := make([]byte, 8192) // one record for each read
	for b.Len() < 16<<20 {
		size, err := unix.Read(fd, buf)
		switch {
		case errors.Is(err, unix.EPIPE): // overwritten meanwhile; the next one follows
			continue
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN), err == nil && size == 0:
			return b.String(), nil
		case err != nil:
			return b.String(), err
		}
		b.Write(buf[:size])
	}
	return b.String(), nil
}

// exhausted finds limits of the kernel that are nearly reached.
func exhausted(_ context.Context, n *Node) (out []Finding, err error) {
	near := func(used, limit uint64) bool { return limit > 0 && used > limit/10*9 }
	used, ok1, err1 := n.number("proc/sys/net/netfilter/nf_conntrack_count")
	limit, ok2, err2 := n.number("proc/sys/net/netfilter/nf_conntrack_max")
	if ok1 && ok2 && near(used, limit) {
		out = append(out, one(fmt.Sprintf("raise it with: sysctl -w net.netfilter.nf_conntrack_max=%d, and --conntrack-max-per-core in args/kube-proxy", limit*2),
			"the kernel tracks %d of at most %d connections: new ones are dropped at the limit", used, limit)...)
	}
	err = errors.Join(err1, err2)
	if f := strings.Fields(n.text("proc/sys/fs/file-nr")); len(f) == 3 {
		open, e1 := strconv.ParseUint(f[0], 10, 64)
		limit, e2 := strconv.ParseUint(f[2], 10, 64)
		if e1 == nil && e2 == nil && near(open, limit) {
			out = append(out, one("raise it with: sysctl -w fs.file-max="+strconv.FormatUint(limit*2, 10),
				"%d of at most %d files are open on this machine", open, limit)...)
		}
	}
	limit, ok1, err1 = n.number("proc/sys/kernel/pid_max")
	if f := strings.Fields(n.text("proc/loadavg")); ok1 && len(f) > 3 {
		_, total, _ := strings.Cut(f[3], "/")
		if threads, e := strconv.ParseUint(total, 10, 64); e == nil && near(threads, limit) {
			out = append(out, one("raise it with: sysctl -w kernel.pid_max="+strconv.FormatUint(limit*2, 10),
				"%d of at most %d processes and threads run on this machine", threads, limit)...)
		}
	}
	return out, errors.Join(err, err1)
}

// oomGroups reads the counters of the services' control groups.
func oomGroups(_ context.Context, n *Node) (out []Finding, err error) {
	seen := map[string]bool{}
	for _, s := range n.Services {
		if s.Phase != service.Running || s.PID == 0 {
			continue
		}
		file := memoryEvents(n.text(fmt.Sprintf("proc/%d/cgroup", s.PID)))
		if file == "" || seen[file] {
			continue
		}
		seen[file] = true
		for line := range strings.Lines(n.text(file)) {
			if f := strings.Fields(line); len(f) == 2 && f[0] == "oom_kill" && f[1] != "0" {
				out = append(out, one("see what with: dmesg | grep oom-kill; the limit is in the unit of the service (MemoryMax), or the machine is too small",
					"in the control group of service %s %s processes were killed because memory ran out", s.Name, f[1])...)
			}
		}
	}
	return out, nil
}

// memoryEvents returns the file with the counters, from /proc/PID/cgroup: of version 2, or of version 1.
func memoryEvents(cgroup string) string {
	for line := range strings.Lines(cgroup) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		switch {
		case len(f) != 3:
		case slices.Contains(strings.Split(f[1], ","), "memory"):
			return filepath.Join("sys/fs/cgroup/memory", f[2], "memory.oom_control")
		case f[0] == "0" && f[1] == "" && f[2] != "/":
			return filepath.Join("sys/fs/cgroup", f[2], "memory.events")
		}
	}
	return ""
}

// Limits of the kernel below which a node with many pods runs into trouble; a start raises them
// (internal/daemon).
const (
	MinInotifyInstances = 1024
	MinInotifyWatches   = 1048576
	MinAIO              = 1048576
	MinPIDs             = 32768
	MinFiles            = 1 << 18
)

// Limits are the settings below /proc/sys with what a node needs of each.
var Limits = []struct {
	Name string // with slashes
	Min  uint64
	Why  string // what happens without
}{
	{"fs/inotify/max_user_instances", MinInotifyInstances, `the kubelet and containers end with "too many open files"`},
	{"fs/inotify/max_user_watches", MinInotifyWatches, `programs in pods fail with "no space left on device"`},
	{"fs/aio-max-nr", MinAIO, "the datastore and databases in pods do not start"},
	{"kernel/pid_max", MinPIDs, `pods fail with "resource temporarily unavailable"`},
	{"fs/file-max", MinFiles, `everything fails with "too many open files in system"`},
}

func kernelLimits(_ context.Context, n *Node) (out []Finding, err error) {
	for _, l := range Limits {
		value, ok, readErr := n.number("proc/sys/" + l.Name)
		if readErr != nil {
			err = errors.Join(err, readErr)
			continue
		}
		name := strings.ReplaceAll(l.Name, "/", ".")
		if ok && value < l.Min {
			out = append(out, one(fmt.Sprintf("raise it with: sysctl -w %s=%d", name, l.Min), "%s is %d: with many pods %s", name, value, l.Why)...)
		}
	}
	used, ok1, err1 := n.number("proc/sys/fs/aio-nr")
	limit, ok2, err2 := n.number("proc/sys/fs/aio-max-nr")
	if ok1 && ok2 && used >= limit {
		out = append(out, one(fmt.Sprintf("raise it with: sysctl -w fs.aio-max-nr=%d", max(MinAIO, 2*limit)), "all %d asynchronous I/O requests of the machine are in use", limit)...)
	}
	return out, errors.Join(err, err1, err2)
}

// kernelModules looks for what pods need. A module that is built in has no folder of its own in
// /sys/module, but what it brings is there.
func kernelModules(_ context.Context, n *Node) (out []Finding, err error) {
	release := strings.TrimSpace(n.text("proc/sys/kernel/osrelease"))
	modules := n.text("lib/modules/"+release+"/modules.dep") + n.text("lib/modules/"+release+"/modules.builtin")
	for _, m := range []struct{ name, brings, harm string }{
		{"overlay", "", "images are copied for each container"},
		{"nf_tables", "", "Services and masquerading of pods do not work"},
		{"nf_conntrack", "proc/sys/net/netfilter/nf_conntrack_max", "Services do not work"},
		{"br_netfilter", "proc/sys/net/bridge/bridge-nf-call-iptables", "a pod does not reach a Service whose endpoint is on its own node"},
		{"vxlan", "", "pods of different nodes do not reach each other"},
	} {
		_, loaded := os.Stat(n.Env.HostPath("sys/module/" + m.name))
		there := loaded == nil || strings.Contains(modules, "/"+m.name+".ko") || m.name == "overlay" && strings.Contains(n.text("proc/filesystems"), "\toverlay\n")
		if m.brings != "" && !there {
			_, e := os.Stat(n.Env.HostPath(m.brings))
			there = e == nil
		}
		if there {
			continue
		}
		if modules == "" && m.brings == "" {
			err = errors.Join(err, fmt.Errorf("whether the kernel has %s: /lib/modules/%s cannot be read", m.name, release))
			continue
		}
		do := "load it with: modprobe " + m.name + "; if there is none, install the kernel modules of your distribution that contain it"
		if m.name == "vxlan" && strings.Contains(n.text("proc/device-tree/model"), "Raspberry Pi") {
			do = "on Ubuntu for the Raspberry Pi: apt install linux-modules-extra-raspi; reboot"
		}
		out = append(out, one(do, "the kernel module %s is missing: %s", m.name, m.harm)...)
	}
	return out, err
}

func clockSync(_ context.Context, n *Node) ([]Finding, error) {
	synced, err := n.Synced()
	if err != nil || synced {
		return nil, err
	}
	return one("have it kept with: timedatectl set-ntp true", "no time service keeps the clock of this machine: certificates and leases of a cluster need clocks that agree"), nil
}

func swap(_ context.Context, n *Node) ([]Finding, error) {
	text, err := os.ReadFile(n.Env.HostPath("proc/swaps"))
	if err != nil {
		return nil, err
	}
	var on []string
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) == 5 && f[0] != "Filename" {
			on = append(on, f[0])
		}
	}
	if len(on) == 0 {
		return nil, nil
	}
	return one("turn it off with: swapoff -a, and its line in /etc/fstab; or leave it, if nothing is slow",
		"swap is on (%s): pods do not use it, but the datastore and the API server get slow when they are swapped out", strings.Join(on, ", ")), nil
}

func machineID(_ context.Context, n *Node) ([]Finding, error) {
	data, err := os.ReadFile(n.Env.HostPath("etc/machine-id"))
	if id := strings.TrimSpace(string(data)); err == nil && id != "" && id != "uninitialized" {
		return nil, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return one("make one with: systemd-machine-id-setup", "this machine has no machine ID (/etc/machine-id), by which it is told from others"), nil
}
