// Package hostprobe finds out once, at a service's start, what the host can do, and what
// follows for the programs: arguments of the kubelet and of kube-proxy, settings of containerd,
// and sentences for the log.
//
// It only reads, from /proc and /sys below a given root, so that any host can be played by a
// folder of files. It changes nothing on the host and never overrides what a user has set.
package hostprobe

import (
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"microk8s/internal/args"
)

// Host is what was found. Fields of what could not be read have the value that most hosts have.
type Host struct {
	// CgroupV1 and CgroupV2 tell which hierarchies are mounted; both mean a hybrid host, which
	// container programs treat as one with version 1.
	CgroupV1, CgroupV2 bool
	// SplitCPUMemory is true where this process is in different cgroups for cpu and memory.
	SplitCPUMemory bool
	// SystemdSlice is true where systemd keeps its services in /systemd/system.slice.
	SystemdSlice bool

	CapSysResource bool // may lower oom_score_adj
	OOMScoreAdj    int  // of this process

	// InNetNS is true where net.netfilter.nf_conntrack_max may not be written, as in every network
	// namespace but the first.
	InNetNS         bool
	ProcSysReadOnly bool // /proc/sys is mounted read-only, as in many containers
	Swap            bool
	NoBridgeNF      bool // no /proc/sys/net/bridge: the module br_netfilter is missing
	Overlayfs       bool
	UserNS          bool // in a user namespace, without the rights of real root
	NoKmsg          bool // no /dev/kmsg

	// ResolvConf is the first resolver configuration with name servers that pods reach too, ""
	// when there is none.
	ResolvConf string

	// DefaultRoute is true where packets to anywhere have a way, by IPv4 or IPv6.
	DefaultRoute bool
	// Address is an IPv4 address under which neighbours reach this host, "" when it has none.
	Address string
	// Address6 is the same of IPv6.
	Address6 string

	// Pods are the ranges of the cluster's pods, of which each family needs an address of the node; nil for IPv4 alone.
	Pods []netip.Prefix

	MachineID, BootID string

	mounts []mount
}

type mount struct {
	point, fstype string
	readOnly      bool
}

// capSysResource is the bit of the capability in /proc/*/status.
const capSysResource = 24

// Probe looks at the host below root ("/" but in tests).
func Probe(root string) Host {
	read := func(path string) string {
		data, err := os.ReadFile(filepath.Join(root, path))
		if err != nil {
			return ""
		}
		return string(data)
	}
	exists := func(path string) bool {
		_, err := os.Stat(filepath.Join(root, path))
		return err == nil
	}
	h := Host{
		MachineID:      strings.TrimSpace(read("etc/machine-id")),
		BootID:         strings.TrimSpace(read("proc/sys/kernel/random/boot_id")),
		NoBridgeNF:     !exists("proc/sys/net/bridge/bridge-nf-call-iptables"),
		NoKmsg:         !exists("dev/kmsg"),
		SystemdSlice:   exists("sys/fs/cgroup/systemd/system.slice"),
		CapSysResource: true,
		mounts:         mounts(read("proc/self/mountinfo")),
	}
	for line := range strings.Lines(read("proc/self/status")) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			if bits, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64); err == nil {
				h.CapSysResource = bits&(1<<capSysResource) != 0
			}
		}
	}
	h.OOMScoreAdj, _ = strconv.Atoi(strings.TrimSpace(read("proc/self/oom_score_adj")))
	for _, m := range h.mounts {
		switch {
		case m.fstype == "cgroup2":
			h.CgroupV2 = true
		case m.fstype == "cgroup":
			h.CgroupV1 = true
		case m.point == "/proc/sys" && m.readOnly:
			h.ProcSysReadOnly = true
		}
	}
	paths := map[string]string{}
	for line := range strings.Lines(read("proc/self/cgroup")) {
		if fields := strings.SplitN(strings.TrimSpace(line), ":", 3); len(fields) == 3 {
			for _, controller := range strings.Split(fields[1], ",") {
				paths[controller] = fields[2]
			}
		}
	}
	cpu, hasCPU := paths["cpu"]
	memory, hasMemory := paths["memory"]
	h.SplitCPUMemory = hasCPU && hasMemory && cpu != memory

	// As the kernel does, this looks at the mode: root is refused too where nobody may write.
	st, err := os.Stat(filepath.Join(root, "proc/sys/net/netfilter/nf_conntrack_max"))
	h.InNetNS = h.ProcSysReadOnly || err != nil || st.Mode().Perm()&0o200 == 0

	swaps := 0
	for range strings.Lines(read("proc/swaps")) {
		swaps++
	}
	h.Swap = swaps > 1 // the first line is a heading
	for line := range strings.Lines(read("proc/filesystems")) {
		fields := strings.Fields(line)
		if len(fields) > 0 && fields[len(fields)-1] == "overlay" {
			h.Overlayfs = true
		}
	}
	if fields := strings.Fields(read("proc/self/uid_map")); len(fields) == 3 {
		h.UserNS = fields[0] != "0" || fields[1] != "0" || fields[2] != "4294967295"
	} else {
		h.UserNS = len(fields) > 3
	}
	h.ResolvConf = resolvConf(read)
	h.DefaultRoute, h.Address = network(read)
	if root == "/" {
		h.Address = primary(h.Address)
	}
	h.Address6 = address6(read)
	return h
}

// resolvConf finds a configuration whose name servers are not on a loopback address, as that of
// a local cache is: in a pod that would be the pod itself.
func resolvConf(read func(string) string) string {
	for _, path := range []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"} {
		servers, usable := 0, true
		for line := range strings.Lines(read(path)) {
			fields := strings.Fields(line)
			if len(fields) < 2 || fields[0] != "nameserver" {
				continue
			}
			servers++
			address, _, _ := strings.Cut(fields[1], "%") // IPv6 scope
			ip, err := netip.ParseAddr(address)
			usable = usable && err == nil && !ip.IsLoopback()
		}
		if servers > 0 && usable {
			return path
		}
	}
	return ""
}

// mounts reads the format of /proc/self/mountinfo.
func mounts(text string) []mount {
	var found []mount
	for line := range strings.Lines(text) {
		before, after, ok := strings.Cut(line, " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 6 || len(right) < 3 {
			continue
		}
		m := mount{point: unescape(left[4]), fstype: right[0]}
		for _, opts := range []string{left[5], right[2]} {
			for _, o := range strings.Split(opts, ",") {
				m.readOnly = m.readOnly || o == "ro"
			}
		}
		found = append(found, m)
	}
	return found
}

// unescape undoes the octal escapes of blanks in mount points.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// FSType is the type of the file system that holds path, "" when unknown.
func (h Host) FSType(path string) string {
	best, fstype := -1, ""
	for _, m := range h.mounts {
		point := strings.TrimSuffix(m.point, "/")
		if (path == m.point || strings.HasPrefix(path, point+"/")) && len(point) >= best {
			best, fstype = len(point), m.fstype // the last of several on one point is on top
		}
	}
	return fstype
}

// An Override is an argument that the host makes necessary.
type Override struct {
	Flag, Value string // without dashes
	Why         string
}

// Overrides returns the arguments that the host makes necessary, by argument file. They count only
// where the user has not set the flag: see [Host.Apply].
func (h Host) Overrides() map[string][]Override {
	var kubelet, proxy []Override
	if h.CgroupV1 || !h.CgroupV2 {
		kubelet = append(kubelet, Override{"fail-cgroupv1", "false", "the host has cgroup version 1"})
		if h.SplitCPUMemory && h.SystemdSlice {
			why := "the host has cpu and memory in different cgroups"
			kubelet = append(kubelet,
				Override{"runtime-cgroups", "/systemd/system.slice", why},
				Override{"kubelet-cgroups", "/systemd/system.slice", why})
		}
	}
	kubelet = append(kubelet, Override{"resolv-conf", h.ResolvConf, "name servers that pods can reach"})
	var apiserver []Override
	if known := h.NodeIPs(); len(known) > 0 { // the kubelet would take what the host's name resolves to
		why := "the address of the interface with the default route"
		if !h.DefaultRoute {
			why = "the host has no default route"
		}
		apiserver = append(apiserver, Override{"advertise-address", known[0], why})
		kubelet = append(kubelet, Override{"node-ip", strings.Join(known, ","), why})
	}
	if h.UserNS || h.ProcSysReadOnly {
		kubelet = append(kubelet, Override{"feature-gates", "KubeletInUserNamespace=true", "kernel settings may not be written here"})
	}
	if !h.CapSysResource {
		why := "without CAP_SYS_RESOURCE no process can be shielded from the out-of-memory killer"
		score := strconv.Itoa(h.OOMScoreAdj)
		kubelet = append(kubelet, Override{"oom-score-adj", score, why})
		proxy = append(proxy, Override{"oom-score-adj", score, why})
	}
	if h.InNetNS {
		why := "net.netfilter.nf_conntrack_max cannot be written here"
		proxy = append(proxy, Override{"conntrack-max-per-core", "0", why})
		if h.ProcSysReadOnly {
			proxy = append(proxy,
				Override{"conntrack-tcp-timeout-established", "0s", why},
				Override{"conntrack-tcp-timeout-close-wait", "0s", why})
		}
	}
	proxy = append(proxy, Override{"nodeport-addresses", "all", "node ports answer on every address of the node"})
	return map[string][]Override{"kubelet": kubelet, "kube-proxy": proxy, "kube-apiserver": apiserver}
}

// NodeIPs are the addresses by which the node is known unless somebody chooses others: one for each family of the pods, in
// their order; none where the host has not all of them.
func (h Host) NodeIPs() (out []string) {
	for _, p := range h.Pods {
		address := h.Address
		if p.Addr().Is6() {
			address = h.Address6
		}
		if address == "" {
			return nil
		}
		out = append(out, address)
	}
	if len(h.Pods) == 0 && h.Address != "" {
		return []string{h.Address}
	}
	return out
}

// Apply adds the overrides of the argument file called name to f, in memory, where f does not
// set the flag itself, and returns those that were added.
func (h Host) Apply(name string, f *args.File) ([]Override, error) {
	var added []Override
	for _, o := range h.Overrides()[name] {
		if _, set := f.Get(o.Flag); set {
			continue
		}
		if err := f.Set(o.Flag, o.Value); err != nil {
			return added, err
		}
		added = append(added, o)
	}
	return added, nil
}

// RestrictOOMScoreAdj is containerd's setting restrict_oom_score_adj: without the capability a
// container whose score is below containerd's own does not start.
func (h Host) RestrictOOMScoreAdj() bool { return !h.CapSysResource }

// Snapshotter is containerd's for a root directory: overlayfs, or native where overlayfs is
// missing or dir is on a file system on which it does not work.
func (h Host) Snapshotter(dir string) string {
	switch h.FSType(dir) {
	case "zfs", "overlay", "ecryptfs":
		return "native"
	}
	if !h.Overlayfs {
		return "native"
	}
	return "overlayfs"
}

// Notes are sentences for the log about what this host lacks, and what is done about it.
func (h Host) Notes() []string {
	var notes []string
	add := func(when bool, note string) {
		if when {
			notes = append(notes, note)
		}
	}
	add(h.CgroupV1 && h.CgroupV2, "hybrid cgroup hierarchies: version 1 is used")
	add(h.CgroupV1 && !h.CgroupV2, "cgroup version 1: Kubernetes supports it for some time yet, version 2 is better")
	add(!h.CgroupV1 && !h.CgroupV2, "no cgroup hierarchy is mounted: pods cannot run")
	add(!h.CapSysResource, "no CAP_SYS_RESOURCE: containers and daemons get no lower oom_score_adj than "+strconv.Itoa(h.OOMScoreAdj))
	add(h.InNetNS && !h.ProcSysReadOnly, "net.netfilter.nf_conntrack_max cannot be written: the host's limit of connections stays")
	add(h.ProcSysReadOnly, "/proc/sys is read-only: kernel settings stay as they are")
	add(h.Swap, "swap is on: pods do not use it unless the kubelet is told so")
	add(h.NoBridgeNF, "no bridge netfilter (module br_netfilter): a pod does not reach a Service whose answering pod is on its own node")
	add(!h.Overlayfs, "no overlayfs: images are copied for each container, which takes space and time")
	add(h.UserNS, "inside a user namespace: the kubelet tolerates what it may not do")
	known := strings.Join(h.NodeIPs(), ", ")
	add(!h.DefaultRoute && known != "", "no default route: this node is known by its address "+known)
	add(!h.DefaultRoute && known == "", "neither a default route nor an address: give the host one, or set --advertise-address and --node-ip")
	add(h.ResolvConf == "", "no name server that pods could reach in /etc/resolv.conf: pods resolve names of the cluster only")
	add(h.NoKmsg, "no /dev/kmsg: the kubelet cannot report processes killed for want of memory")
	return notes
}

// MountsBelow lists the mount points in and below dir in the order in which they were mounted.
func (h Host) MountsBelow(dir string) []string {
	var points []string
	for _, m := range h.mounts {
		if m.point == dir || strings.HasPrefix(m.point, strings.TrimSuffix(dir, "/")+"/") {
			points = append(points, m.point)
		}
	}
	return points
}
