// Package faults is the catalogue of what is broken on purpose to see that `microk8s status` or `microk8s
// inspect` says so, with the next step: one table, used by the test of each check and on real nodes.
package faults

import (
	"context"
	"fmt"
	"io/fs"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"microk8s/internal/nodecheck"
)

// Fault is one thing that is broken.
type Fault struct {
	Name string
	// ID is the check that finds it.
	ID string
	// Inspect is set where `inspect` says it and `status` does not.
	Inspect bool
	// Says and Do are pieces of the sentence, and of the next step.
	Says, Do string

	// Break and Repair are shell scripts that break a running node and repair it. Without Break it can be
	// made at package level only, and Why says why.
	Break, Repair, Why string

	// Files are files of a node that is well but for this one, by path: below the host's root, or below
	// $SNAP_DATA with the prefix DATA/; "-" removes one. Set changes what the check asks for. With neither
	// the fault can be made on a running node only.
	Files map[string]string
	Set   func(*nodecheck.Node)
}

const data = "/var/snap/microk8s/current"

// cover hides a file of /proc or /sys behind another one for the processes of a host.
func cover(path, text string) (breaks, repairs string) {
	copied := "/root/fault-" + strings.NewReplacer("/", "-").Replace(strings.Trim(path, "/"))
	return fmt.Sprintf("printf '%s' >%s; mount --bind %s %s", strings.NewReplacer("\n", `\n`, "\t", `\t`, "%", "%%").Replace(text), copied, copied, path),
		"umount -l " + path
}

// covered is a fault that is a file of the kernel with other text.
func covered(f Fault, path, text string) Fault {
	f.Break, f.Repair = cover("/"+path, text)
	f.Files = map[string]string{path: text}
	return f
}

// limit is a fault that is a limit of the kernel.
func limit(name, path, value string) Fault {
	dotted := strings.ReplaceAll(path, "/", ".")
	return covered(Fault{Name: name, ID: "kernel.limits", Inspect: true, Says: dotted + " is " + value + ": with many pods", Do: "raise it with: sysctl -w " + dotted + "="},
		"proc/sys/"+path, value+"\n")
}

// edited is a fault that is an argument file changed under a running service.
func edited(file, service string) Fault {
	return Fault{Name: "args/" + file + " edited and not restarted", ID: "args.edited",
		Says: "args/" + file + " was changed after service " + service + " was started", Do: "microk8s stop; microk8s start",
		Break:  fmt.Sprintf("cp -a %[1]s/args/%[2]s /root/fault-args 2>/dev/null || rm -f /root/fault-args; echo '# changed' >>%[1]s/args/%[2]s", data, file),
		Repair: fmt.Sprintf("if [ -e /root/fault-args ]; then cp -a /root/fault-args %[1]s/args/%[2]s; else rm -f %[1]s/args/%[2]s; fi", data, file),
		Files:  map[string]string{"DATA/args/" + file: "# changed\n"}}
}

// ranges is a fault that is args/cni-env asking a cluster for other ranges than it has.
func ranges() Fault {
	const text = "IPv4_CLUSTER_CIDR=10.77.0.0/16\n"
	return Fault{Name: "args/cni-env asks for other ranges", ID: "args.ranges",
		Says: "the cluster has 10.1.0.0/16 for pods and 10.152.183.0/24 for Services since its first start", Do: "change the file back",
		Break:  fmt.Sprintf("cp -a %[1]s/args/cni-env /root/fault-args; sed -i 's/^IPv4_CLUSTER_CIDR=.*/IPv4_CLUSTER_CIDR=10.77.0.0\\/16/' %[1]s/args/cni-env", data),
		Repair: fmt.Sprintf("cp -a /root/fault-args %[1]s/args/cni-env", data),
		Files:  map[string]string{"DATA/args/cni-env": text, "DATA/var/lock/no-cert-reissue": ""}}
}

// frozen is a fault that is a service which is stopped in its tracks.
func frozen(service, id, says, do string) Fault {
	return Fault{Name: "frozen " + service, ID: id, Says: says, Do: do,
		Break: "kill -STOP $(pgrep -o -x " + service + ")", Repair: "kill -CONT $(pgrep -o -x " + service + ")"}
}

// hosts is a fault that is a hosts.toml.
func hosts(name, text, says string) Fault {
	dir := data + "/args/certs.d/fault.example"
	return Fault{Name: name, ID: "registry.hosts", Says: says, Do: "correct the file, no restart is needed",
		Break: fmt.Sprintf("mkdir -p %[1]s; printf '%[2]s' >%[1]s/hosts.toml", dir, strings.ReplaceAll(text, "\n", `\n`)), Repair: "rm -r " + dir,
		Files: map[string]string{"DATA/args/certs.d/fault.example/hosts.toml": text}}
}

// addresses has the pods' bridge with these addresses.
func addresses(list ...string) func(*nodecheck.Node) {
	return func(n *nodecheck.Node) {
		n.Addresses = func(device string) (out []netip.Prefix, err error) {
			if device != "cni0" {
				return nil, fs.ErrNotExist
			}
			for _, a := range list {
				out = append(out, netip.MustParsePrefix(a))
			}
			return out, nil
		}
	}
}

// disk has a file system of its own at path.
func disk(path string, s unix.Statfs_t) func(*nodecheck.Node) {
	return func(n *nodecheck.Node) {
		well := n.Statfs
		n.Statfs = func(p string) (unix.Statfs_t, error) {
			if strings.HasSuffix(p, path) {
				s.Fsid.Val[0] = 77
				return s, nil
			}
			return well(p)
		}
	}
}

// oom is a line of the kernel's log.
func oom(group, task string) string {
	return fmt.Sprintf("6,1,%d,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=x,mems_allowed=0,oom_memcg=%s,task_memcg=%s,task=%s,pid=7,uid=0\n", 1, group, group, task)
}

// stopped has a script run while kubelite, which would repair what it breaks within a second, stands still.
func stopped(script string) string {
	return "ip link show cni0 >/dev/null; kill -STOP $(pgrep -o -x kubelite); " + script
}

// goesOn lets kubelite repair what was broken.
const goesOn = "kill -CONT $(pgrep -o -x kubelite)"

// logged puts lines, of a second after the start in [oom], into what the kernel's log shows, as of now.
func logged(lines string) string {
	return "now=$(cut -d. -f1 /proc/uptime)000000; printf '" + strings.NewReplacer("6,1,1,-", "6,1,%s,-", "\n", `\n`).Replace(lines) + "'" +
		strings.Repeat(" $now", strings.Count(lines, "6,1,1,-")) + " >/root/fault-kmsg; mount --bind /root/fault-kmsg /dev/kmsg"
}

// oomCounter has the file with the counters of kubelite's control group in $f, of version 1 or 2.
const oomCounter = "g=$(grep -E '^[0-9]+:([a-z_]+,)*memory(,[a-z_]+)*:' /proc/$(pgrep -o -x kubelite)/cgroup | cut -d: -f3); " +
	"if [ -n \"$g\" ]; then f=/sys/fs/cgroup/memory$g/memory.oom_control; else f=/sys/fs/cgroup$(cut -d: -f3 /proc/$(pgrep -o -x kubelite)/cgroup)/memory.events; fi; "

// Catalogue is all of them.
var Catalogue = func() []Fault {
	young := "60.00 50.00\n"
	list := []Fault{
		edited("kubelet", "kubelite"),
		edited("kube-apiserver", "kubelite"),
		edited("kube-scheduler", "kubelite"),
		edited("k8s-dqlite", "k8s-dqlite"),
		edited("cluster-agent", "cluster-agent"),
		edited("containerd-env", "containerd"),
		ranges(),

		frozen("cluster-agent", "agent.answers", "service cluster-agent runs and does not answer on port 25000", "see microk8s logs cluster-agent"),
		frozen("containerd", "containerd.answers", "containerd does not answer on its socket", "see microk8s logs containerd"),
		frozen("k8s-dqlite", "datastore.answers", "the datastore does not answer on its socket", "see microk8s logs k8s-dqlite"),
		frozen("kubelite", "api.answers", "the API server did not answer within", "see microk8s logs kubelite"),

		{Name: "bridge with another address", ID: "network.bridge", Says: "the pods' bridge cni0 has the address 10.9.9.1/24 and not", Do: "ip link delete cni0; microk8s stop; microk8s start",
			Break: stopped("ip address flush dev cni0 scope global; ip address add 10.9.9.1/24 dev cni0"), Repair: goesOn, Set: addresses("10.9.9.1/24", "fe80::1/64")},
		{Name: "bridge without an address", ID: "network.bridge", Says: "the pods' bridge cni0 has no address, it should have 10.1.", Do: "ip link delete cni0; microk8s stop; microk8s start",
			Break: stopped("ip address flush dev cni0 scope global"), Repair: goesOn, Set: addresses("fe80::1/64")},

		{Name: "/tmp full", ID: "disk.space", Says: "the file system of /tmp is nearly full", Do: "du -xh /tmp | sort -h | tail",
			Break: "mount -t tmpfs -o size=1m fault /tmp", Repair: "umount -l /tmp", Set: disk("/tmp", unix.Statfs_t{Blocks: 100, Bsize: 4096, Bavail: 10})},
		{Name: "/var/log full", ID: "disk.space", Says: "the file system of /var/log is nearly full", Do: "du -xh /var/log | sort -h | tail",
			Break: "mkdir -p /var/log; mount -t tmpfs -o size=1m fault /var/log", Repair: "umount -l /var/log", Set: disk("/var/log", unix.Statfs_t{Blocks: 100, Bsize: 4096, Bavail: 10})},
		{Name: "few inodes", ID: "disk.inodes", Says: "inodes left: no file can be made without one", Do: "du --inodes -x",
			Break:  "mkdir -p /var/snap/microk8s/common/default-storage; mount -t tmpfs -o nr_inodes=1000 fault /var/snap/microk8s/common/default-storage; cd /var/snap/microk8s/common/default-storage; touch $(seq 990)",
			Repair: "umount -l /var/snap/microk8s/common/default-storage", Set: disk("/common", unix.Statfs_t{Blocks: 1e9, Bsize: 4096, Bavail: 1e9, Files: 1000, Ffree: 5})},

		{Name: "certificate that ends soon", ID: "certs.end", Says: "certificate fault.crt ends on ", Do: "sudo microk8s refresh-certs -e",
			Break:  "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=fault -days 5 -keyout /root/fault.key -out " + data + "/certs/fault.crt -addext basicConstraints=critical,CA:TRUE 2>/dev/null",
			Repair: "rm -f " + data + "/certs/fault.crt"},
		{Name: "certificate that is none", ID: "certs.end", Says: "certs/fault.crt is not a certificate", Do: "remove it and run microk8s stop; microk8s start",
			Break: "echo nothing >" + data + "/certs/fault.crt", Repair: "rm " + data + "/certs/fault.crt", Files: map[string]string{"DATA/certs/fault.crt": "nothing\n"}},

		{Name: "clock ahead", ID: "clock.peers", Says: "the clock of this node is 1m0s ahead of that of 10.0.0.2", Do: "timedatectl set-ntp true", Why: "hosts of the lab have the machine's clock",
			Set: peerClock(-time.Minute)},
		{Name: "clock behind", ID: "clock.peers", Says: "the clock of this node is 2h0m0s behind that of 10.0.0.2", Do: "timedatectl set-ntp true", Why: "hosts of the lab have the machine's clock",
			Set: peerClock(2 * time.Hour)},
		{Name: "clock not kept", ID: "clock.sync", Inspect: true, Says: "no time service keeps the clock", Do: "timedatectl set-ntp true", Why: "hosts of the lab have the machine's clock",
			Set: func(n *nodecheck.Node) { n.Synced = func() (bool, error) { return false, nil } }},

		hosts("hosts.toml that does not parse", "[host.\"http://x\"\n", "certs.d/fault.example/hosts.toml"),
		hosts("hosts.toml with a capability that there is not", "[host.\"http://x\"]\ncapabilities = [\"pul\"]\n", "certs.d/fault.example/hosts.toml"),

		limit("few inotify instances", "fs/inotify/max_user_instances", "128"),
		limit("few inotify watches", "fs/inotify/max_user_watches", "8192"),
		limit("few asynchronous requests", "fs/aio-max-nr", "65536"),
		limit("few process numbers", "kernel/pid_max", "4096"),
		limit("few files", "fs/file-max", "1024"),
		covered(Fault{Name: "asynchronous requests in use", ID: "kernel.limits", Inspect: true, Says: "asynchronous I/O requests of the machine are in use", Do: "sysctl -w fs.aio-max-nr="},
			"proc/sys/fs/aio-nr", "99999999\n"),

		covered(Fault{Name: "files in use", ID: "kernel.exhausted", Says: "990 of at most 1000 files are open on this machine", Do: "sysctl -w fs.file-max=2000"},
			"proc/sys/fs/file-nr", "990\t0\t1000\n"),
		covered(Fault{Name: "processes in use", ID: "kernel.exhausted", Says: "processes and threads run on this machine", Do: "sysctl -w kernel.pid_max="},
			"proc/loadavg", "0.1 0.1 0.1 1/99999999 5\n"),
		covered(Fault{Name: "connections in use", ID: "kernel.exhausted", Says: "the kernel tracks 99999999 of at most", Do: "sysctl -w net.netfilter.nf_conntrack_max="},
			"proc/sys/net/netfilter/nf_conntrack_count", "99999999\n"),

		covered(Fault{Name: "memory cgroup off", ID: "cgroup.controllers", Inspect: true, Says: "the kernel has no control group for memory", Do: "add cgroup_enable=memory cgroup_memory=1"},
			"proc/cgroups", "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t1\t1\t1\ncpuset\t1\t1\t1\npids\t1\t1\t1\nmemory\t0\t1\t0\n"),
		covered(Fault{Name: "two cgroup controllers missing", ID: "cgroup.controllers", Inspect: true, Says: "the kernel has no control group for cpuset, pids", Do: "cgroup_enable=cpuset,pids"},
			"proc/cgroups", "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t1\t1\t1\nmemory\t1\t1\t1\n"),
		covered(Fault{Name: "swap on", ID: "memory.swap", Inspect: true, Says: "swap is on (/swapfile)", Do: "swapoff -a"},
			"proc/swaps", "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n/swapfile                               file\t\t2097148\t\t0\t\t-2\n"),
		{Name: "a pod's process killed", ID: "memory.oom", Inspect: true, Says: "because memory ran out: java (1 times)", Do: "dmesg | grep oom-kill",
			Break: logged(oom("/kubepods/burstable/pod1/2", "java")), Repair: "umount -l /dev/kmsg",
			Files: map[string]string{"dev/kmsg": oom("/kubepods/burstable/pod1/2", "java"), "proc/uptime": young}},
		{Name: "a service killed", ID: "memory.oom", Inspect: true, Says: "because memory ran out: k8s-dqlite (2 times)", Do: "dmesg | grep oom-kill",
			Break: logged(oom("/system.slice/x", "k8s-dqlite") + oom("/system.slice/x", "k8s-dqlite") + oom("/user.slice", "firefox")), Repair: "umount -l /dev/kmsg",
			Files: map[string]string{"dev/kmsg": oom("/system.slice/x", "k8s-dqlite") + oom("/system.slice/x", "k8s-dqlite") + oom("/user.slice", "firefox"), "proc/uptime": young}},
		{Name: "kills in a service's group", ID: "memory.groups", Inspect: true, Says: "3 processes were killed because memory ran out", Do: "MemoryMax",
			Break: oomCounter + "sed 's/^oom_kill .*/oom_kill 3/' $f >/root/fault-oom; grep -q oom_kill /root/fault-oom || echo oom_kill 3 >>/root/fault-oom; mount --bind /root/fault-oom $f", Repair: oomCounter + "umount -l $f",
			Files: map[string]string{"proc/100/cgroup": "0::/system.slice/snap.microk8s.daemon-kubelite.service\n", "sys/fs/cgroup/system.slice/snap.microk8s.daemon-kubelite.service/memory.events": "low 0\noom 3\noom_kill 3\n"}},

		{Name: "name server in a circle", ID: "dns.loop", Inspect: true, Says: "the only name server of this host is the cluster's own, 10.152.183.10", Do: "microk8s enable dns ADDRESS",
			Break: "cp /etc/resolv.conf /root/fault-resolv 2>/dev/null || : >/root/fault-resolv; echo nameserver 10.152.183.10 >/etc/resolv.conf", Repair: "cat /root/fault-resolv >/etc/resolv.conf",
			Files: map[string]string{"etc/resolv.conf": "nameserver 10.152.183.10\n", "run/systemd/resolve/resolv.conf": "-"}},
		{Name: "name server on the loopback", ID: "dns.loop", Inspect: true, Says: "all name servers of this host are on its loopback (127.0.0.53)", Do: "microk8s enable dns ADDRESS",
			Break: "cp /etc/resolv.conf /root/fault-resolv 2>/dev/null || : >/root/fault-resolv; echo nameserver 127.0.0.53 >/etc/resolv.conf", Repair: "cat /root/fault-resolv >/etc/resolv.conf",
			Files: map[string]string{"etc/resolv.conf": "nameserver 127.0.0.53\n", "run/systemd/resolve/resolv.conf": "-"}},
		{Name: "no module vxlan", ID: "kernel.modules", Inspect: true, Says: "the kernel module vxlan is missing: pods of different nodes", Do: "modprobe vxlan",
			// What the kernel has is hidden, and /lib is the machine's: the list of modules on the disk lies elsewhere, where the
			// kernel's release leads.
			Break: "mkdir -p /root/fault-modules; for f in overlay nf_tables nf_conntrack br_netfilter; do echo kernel/fault/$f.ko:; done >/root/fault-modules/modules.dep; " +
				"echo ../../root/fault-modules >/root/fault-release; mount --bind /root/fault-release /proc/sys/kernel/osrelease; mount -t tmpfs fault /sys/module",
			Repair: "umount -l /sys/module; umount -l /proc/sys/kernel/osrelease",
			Files:  map[string]string{"sys/module/vxlan/refcnt": "-"}},
		{Name: "no module br_netfilter", ID: "kernel.modules", Inspect: true, Says: "the kernel module br_netfilter is missing", Do: "modprobe br_netfilter", Why: "the kernel is the machine's, and a mount that hides a folder of /proc/sys does not stay",
			Files: map[string]string{"sys/module/br_netfilter/refcnt": "-", "proc/sys/net/bridge/bridge-nf-call-iptables": "-"}},
		{Name: "no machine ID", ID: "host.machine-id", Inspect: true, Says: "this machine has no machine ID", Do: "systemd-machine-id-setup",
			Break: "if [ -e /etc/machine-id ]; then mv /etc/machine-id /etc/fault-machine-id; fi", Repair: "if [ -e /etc/fault-machine-id ]; then mv /etc/fault-machine-id /etc/machine-id; fi",
			Files: map[string]string{"etc/machine-id": "-"}},

		{Name: "a change that was interrupted", ID: "change.pending", Says: `microk8s leave is under way or was interrupted, at "x"`, Do: "run it again",
			Break:  `mkdir -p /var/snap/microk8s/common/var/cluster; printf '{"operation":"leave","step":"x"}' >/var/snap/microk8s/common/var/cluster/journal`,
			Repair: "rm /var/snap/microk8s/common/var/cluster/journal"},
		{Name: "CoreDNS that does not start", ID: "addons.pods", Says: "addon dns: deployment/coredns has 0 of 1 pods, pod coredns-", Do: "see microk8s kubectl describe deployment -n kube-system coredns",
			Break:  "microk8s kubectl patch deployment -n kube-system coredns --type=json -p '[{\"op\":\"replace\",\"path\":\"/spec/template/spec/containers/0/args\",\"value\":[\"-conf\",\"/nothing\"]},{\"op\":\"replace\",\"path\":\"/spec/strategy\",\"value\":{\"type\":\"Recreate\"}}]'",
			Repair: "microk8s kubectl rollout undo deployment -n kube-system coredns; microk8s kubectl rollout status deployment -n kube-system coredns --timeout=2m"},
		{Name: "addon without its image", ID: "addons.pods", Says: "addon dns: deployment/coredns has 0 of 1 pods, pod coredns-", Do: "microk8s kubectl logs -n kube-system deployment/coredns",
			Break:  "microk8s kubectl patch deployment -n kube-system coredns --type=json -p '[{\"op\":\"replace\",\"path\":\"/spec/template/spec/containers/0/image\",\"value\":\"microk8s.io/nothing:1\"},{\"op\":\"replace\",\"path\":\"/spec/strategy\",\"value\":{\"type\":\"Recreate\"}}]'",
			Repair: "microk8s kubectl rollout undo deployment -n kube-system coredns; microk8s kubectl rollout status deployment -n kube-system coredns --timeout=2m"},
	}
	return list
}()

// peerClock has another node whose clock differs by d.
func peerClock(d time.Duration) func(*nodecheck.Node) {
	return func(n *nodecheck.Node) {
		n.Others = []string{"10.0.0.2"}
		here := n.Date
		n.Date = func(ctx context.Context, host string) (time.Time, error) {
			if host == "10.0.0.2" {
				return n.Now().Add(d), nil
			}
			return here(ctx, host)
		}
	}
}
