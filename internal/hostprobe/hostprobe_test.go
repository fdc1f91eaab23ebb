package hostprobe

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"microk8s/internal/args"
)

// usual is a host that lacks nothing: cgroup version 2, all capabilities, no swap.
func usual() map[string]string {
	return map[string]string{
		"etc/machine-id":                 "0123\n",
		"etc/resolv.conf":                "# by hand\nnameserver 10.0.0.1\n",
		"dev/kmsg":                       "",
		"proc/sys/kernel/random/boot_id": "b00t\n",
		"proc/sys/net/bridge/bridge-nf-call-iptables": "1\n",
		"proc/sys/net/netfilter/nf_conntrack_max":     "262144\n",
		"proc/self/status":                            "Name:\tx\nCapInh:\t0000000000000000\nCapEff:\t000001ffffffffff\n",
		"proc/self/oom_score_adj":                     "0\n",
		"proc/self/uid_map":                           "         0          0 4294967295\n",
		"proc/self/cgroup":                            "0::/system.slice/x.service\n",
		"proc/swaps":                                  "Filename\tType\tSize\tUsed\tPriority\n",
		"proc/filesystems":                            "nodev\tproc\n\text4\nnodev\toverlay\n",
		"proc/net/route":                              routes("eth0 0 10.0.0.1 0", "eth0 10.0.0.0 0.0.0.0 24"),
		"proc/net/fib_trie":                           fibTrie,
		"proc/self/mountinfo":                         mountinfo("/ ext4 rw", "/proc proc rw", "/sys/fs/cgroup cgroup2 rw"),
	}
}

// fibTrie is a host with 10.1.7.1 on a pod bridge and 10.0.0.5 on the network.
const fibTrie = `Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 10.0.0.0
        /24 link UNICAST
Local:
  +-- 10.0.0.0/8 2 0 2
     |-- 10.0.0.5
        /32 host LOCAL
     |-- 10.0.0.255
        /32 link BROADCAST
     |-- 10.1.7.1
        /32 host LOCAL
     |-- 127.0.0.1
        /32 host LOCAL
     |-- 169.254.3.4
        /32 host LOCAL
`

// routes writes lines of "interface destination gateway bits [metric]" as /proc/net/route has them.
func routes(lines ...string) string {
	text := "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
	number := func(b []byte) string { return fmt.Sprintf("%08X", binary.NativeEndian.Uint32(b)) }
	for _, l := range lines {
		f := strings.Fields(l)
		bits, err := strconv.Atoi(f[3])
		if err != nil {
			panic(err)
		}
		dst, gateway := net.ParseIP(f[1]).To4(), net.ParseIP(f[2]).To4()
		if dst == nil {
			dst = net.IPv4zero.To4()
		}
		metric := "0"
		if len(f) > 4 {
			metric = f[4]
		}
		text += strings.Join([]string{f[0], number(dst), number(gateway), "0003", "0", "0", metric, number(net.CIDRMask(bits, 32)), "0", "0", "0"}, "\t") + "\n"
	}
	return text
}

func mountinfo(mounts ...string) string {
	var b strings.Builder
	for i, m := range mounts {
		f := strings.Fields(m)
		fmt.Fprintf(&b, "%d 1 0:%d / %s %s,relatime shared:1 - %s none rw\n", 20+i, 20+i, f[0], f[2], f[1])
	}
	return b.String()
}

func probe(t *testing.T, files map[string]string) Host {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		mode := os.FileMode(0o644)
		if rest, ok := strings.CutPrefix(text, "READONLY"); ok {
			text, mode = rest, 0o444
		}
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	return Probe(root)
}

func flags(list []Override) map[string]string {
	m := map[string]string{}
	for _, o := range list {
		m[o.Flag] = o.Value
	}
	return m
}

func TestHosts(t *testing.T) {
	resolv := func(more ...string) map[string]string { // pairs of flag and value beside the usual one
		m := map[string]string{"resolv-conf": "/etc/resolv.conf"}
		for i := 0; i < len(more); i += 2 {
			m[more[i]] = more[i+1]
		}
		return m
	}
	for _, tc := range []struct {
		name           string
		change         func(f map[string]string)
		kubelet, proxy map[string]string
		apiserver      map[string]string
		restrict       bool
		snapshotter    string
		note           string // part of a note, "" if there must be none
		noAddress      bool   // no address of IPv4 is chosen
	}{
		{name: "usual", change: func(map[string]string) {}, kubelet: resolv(), snapshotter: "overlayfs"},
		{
			name: "cgroup version 1, split",
			change: func(f map[string]string) {
				f["proc/self/mountinfo"] = mountinfo("/ ext4 rw", "/sys/fs/cgroup/cpu cgroup rw", "/sys/fs/cgroup/memory cgroup rw")
				f["proc/self/cgroup"] = "5:cpu,cpuacct:/a\n4:memory:/b\n1:name=systemd:/c\n"
				f["sys/fs/cgroup/systemd/system.slice/x"] = ""
			},
			kubelet:     resolv("fail-cgroupv1", "false", "runtime-cgroups", "/systemd/system.slice", "kubelet-cgroups", "/systemd/system.slice"),
			snapshotter: "overlayfs", note: "cgroup version 1",
		},
		{
			name: "cgroup version 1 without systemd",
			change: func(f map[string]string) {
				f["proc/self/mountinfo"] = mountinfo("/ ext4 rw", "/sys/fs/cgroup/cpu cgroup rw")
				f["proc/self/cgroup"] = "5:cpu,cpuacct:/a\n4:memory:/b\n"
			},
			kubelet: resolv("fail-cgroupv1", "false"), snapshotter: "overlayfs", note: "cgroup version 1",
		},
		{
			name: "hybrid",
			change: func(f map[string]string) {
				f["proc/self/mountinfo"] = mountinfo("/ ext4 rw", "/sys/fs/cgroup/cpu cgroup rw", "/sys/fs/cgroup/unified cgroup2 rw")
			},
			kubelet: resolv("fail-cgroupv1", "false"), snapshotter: "overlayfs", note: "hybrid",
		},
		{
			name: "no cgroups", change: func(f map[string]string) { f["proc/self/mountinfo"] = mountinfo("/ ext4 rw") },
			kubelet: resolv("fail-cgroupv1", "false"), snapshotter: "overlayfs", note: "pods cannot run",
		},
		{
			name: "no CAP_SYS_RESOURCE",
			change: func(f map[string]string) {
				f["proc/self/status"] = "CapEff:\t000001fffeffffff\n"
				f["proc/self/oom_score_adj"] = "200\n"
			},
			kubelet: resolv("oom-score-adj", "200"), proxy: map[string]string{"oom-score-adj": "200"},
			restrict: true, snapshotter: "overlayfs", note: "CAP_SYS_RESOURCE",
		},
		{
			name:    "network namespace",
			change:  func(f map[string]string) { f["proc/sys/net/netfilter/nf_conntrack_max"] = "READONLY262144\n" },
			kubelet: resolv(), proxy: map[string]string{"conntrack-max-per-core": "0"}, snapshotter: "overlayfs", note: "nf_conntrack_max",
		},
		{
			name:    "no conntrack",
			change:  func(f map[string]string) { delete(f, "proc/sys/net/netfilter/nf_conntrack_max") },
			kubelet: resolv(), proxy: map[string]string{"conntrack-max-per-core": "0"}, snapshotter: "overlayfs", note: "nf_conntrack_max",
		},
		{
			name: "read-only /proc/sys",
			change: func(f map[string]string) {
				f["proc/self/mountinfo"] = mountinfo("/ ext4 rw", "/proc/sys proc ro", "/sys/fs/cgroup cgroup2 rw")
			},
			kubelet:     resolv("feature-gates", "KubeletInUserNamespace=true"),
			proxy:       map[string]string{"conntrack-max-per-core": "0", "conntrack-tcp-timeout-established": "0s", "conntrack-tcp-timeout-close-wait": "0s"},
			snapshotter: "overlayfs", note: "/proc/sys is read-only",
		},
		{
			name:    "user namespace",
			change:  func(f map[string]string) { f["proc/self/uid_map"] = "0 100000 65536\n" },
			kubelet: resolv("feature-gates", "KubeletInUserNamespace=true"), snapshotter: "overlayfs", note: "user namespace",
		},
		{
			name:    "swap",
			change:  func(f map[string]string) { f["proc/swaps"] += "/dev/sdb partition 1 0 -2\n" },
			kubelet: resolv(), snapshotter: "overlayfs", note: "swap is on",
		},
		{
			name:    "no bridge netfilter",
			change:  func(f map[string]string) { delete(f, "proc/sys/net/bridge/bridge-nf-call-iptables") },
			kubelet: resolv(), snapshotter: "overlayfs", note: "br_netfilter",
		},
		{
			name:    "no overlayfs",
			change:  func(f map[string]string) { f["proc/filesystems"] = "\text4\n" },
			kubelet: resolv(), snapshotter: "native", note: "no overlayfs",
		},
		{
			name: "data on ZFS",
			change: func(f map[string]string) {
				f["proc/self/mountinfo"] = mountinfo("/ ext4 rw", "/var/snap zfs rw", "/sys/fs/cgroup cgroup2 rw")
			},
			kubelet: resolv(), snapshotter: "native",
		},
		{
			name: "root on overlayfs, data elsewhere",
			change: func(f map[string]string) {
				f["proc/self/mountinfo"] = mountinfo("/ overlay rw", "/var/snap ext4 rw", "/sys/fs/cgroup cgroup2 rw")
			},
			kubelet: resolv(), snapshotter: "overlayfs",
		},
		{
			name: "a local resolver with its servers in another file",
			change: func(f map[string]string) {
				f["etc/resolv.conf"] = "nameserver 127.0.0.53\n"
				f["run/systemd/resolve/resolv.conf"] = "nameserver fe80::1%eth0\nnameserver 10.0.0.1\n"
			},
			kubelet: map[string]string{"resolv-conf": "/run/systemd/resolve/resolv.conf"}, snapshotter: "overlayfs",
		},
		{
			name:    "no resolver",
			change:  func(f map[string]string) { f["etc/resolv.conf"] = "search example.org\n" },
			kubelet: map[string]string{"resolv-conf": ""}, snapshotter: "overlayfs", note: "no name server",
		},
		{
			name: "no default route",
			change: func(f map[string]string) {
				f["proc/net/route"] = routes("cni0 10.1.7.0 0.0.0.0 24", "eth0 10.0.0.0 0.0.0.0 24")
			},
			kubelet:   resolv("node-ip", "10.0.0.5"),
			apiserver: map[string]string{"advertise-address": "10.0.0.5"}, snapshotter: "overlayfs", note: "known by its address 10.0.0.5",
		},
		{
			name: "a VPN in front, and two default routes",
			change: func(f map[string]string) {
				f["proc/net/fib_trie"] = strings.Replace(f["proc/net/fib_trie"], "     |-- 10.0.0.5\n", "     |-- 10.0.0.5\n        /32 host LOCAL\n     |-- 100.64.0.9\n        /32 host LOCAL\n     |-- 172.16.0.2\n", 1)
				f["proc/net/route"] = routes("tun0 100.64.0.0 0.0.0.0 10", "wlan0 0.0.0.0 172.16.0.1 0 600", "wlan0 172.16.0.0 0.0.0.0 24", "eth0 0.0.0.0 10.0.0.1 0 100", "eth0 10.0.0.0 0.0.0.0 24")
			},
			kubelet: resolv(), snapshotter: "overlayfs",
		},
		{
			name: "two networks on the interface with the default route",
			change: func(f map[string]string) {
				f["proc/net/fib_trie"] = strings.Replace(f["proc/net/fib_trie"], "     |-- 10.0.0.5\n", "     |-- 192.0.2.5\n        /32 host LOCAL\n     |-- 10.0.0.5\n", 1)
				f["proc/net/route"] = routes("eth0 0.0.0.0 10.0.0.1 0", "eth0 192.0.2.0 0.0.0.0 24", "eth0 10.0.0.0 0.0.0.0 24")
			},
			kubelet: resolv(), snapshotter: "overlayfs",
		},
		{
			name: "a default route of IPv6 only", noAddress: true,
			change: func(f map[string]string) {
				f["proc/net/route"] = routes("eth0 10.0.0.0 0.0.0.0 24")
				zero := strings.Repeat("0", 32)
				f["proc/net/ipv6_route"] = zero + " 00 " + zero + " 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003 eth0\n"
			},
			kubelet: resolv(), snapshotter: "overlayfs",
		},
		{
			name: "an IPv6 route to nowhere, and no network", noAddress: true,
			change: func(f map[string]string) {
				zero := strings.Repeat("0", 32)
				f["proc/net/route"] = routes("cni0 10.1.7.0 0.0.0.0 24")
				f["proc/net/ipv6_route"] = zero + " 00 " + zero + " 00 " + zero + " ffffffff 00000001 00000000 00200200 lo\n"
			},
			kubelet: resolv(), snapshotter: "overlayfs", note: "neither a default route nor an address",
		},
		{
			name: "no kmsg", change: func(f map[string]string) { delete(f, "dev/kmsg") },
			kubelet: resolv(), snapshotter: "overlayfs", note: "/dev/kmsg",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			files := usual()
			tc.change(files)
			h := probe(t, files)
			if tc.proxy == nil {
				tc.proxy = map[string]string{}
			}
			if tc.apiserver == nil {
				tc.apiserver = map[string]string{}
			}
			tc.proxy["nodeport-addresses"] = "all"
			if !tc.noAddress {
				tc.kubelet["node-ip"], tc.apiserver["advertise-address"] = "10.0.0.5", "10.0.0.5"
			}
			if d := cmp.Diff(tc.kubelet, flags(h.Overrides()["kubelet"])); d != "" {
				t.Errorf("kubelet: %s", d)
			}
			if d := cmp.Diff(tc.proxy, flags(h.Overrides()["kube-proxy"])); d != "" {
				t.Errorf("kube-proxy: %s", d)
			}
			if d := cmp.Diff(tc.apiserver, flags(h.Overrides()["kube-apiserver"])); d != "" {
				t.Errorf("kube-apiserver: %s", d)
			}
			if got := h.RestrictOOMScoreAdj(); got != tc.restrict {
				t.Errorf("restrict_oom_score_adj %v, want %v", got, tc.restrict)
			}
			if got := h.Snapshotter("/var/snap/microk8s/common/var/lib/containerd"); got != tc.snapshotter {
				t.Errorf("snapshotter %s, want %s", got, tc.snapshotter)
			}
			notes := strings.Join(h.Notes(), "\n")
			if tc.note == "" && notes != "" || !strings.Contains(notes, tc.note) {
				t.Errorf("notes %q, want one with %q", notes, tc.note)
			}
			if h.MachineID != "0123" || h.BootID != "b00t" {
				t.Errorf("ids %q, %q", h.MachineID, h.BootID)
			}
		})
	}
}

func TestUsersFlagsWin(t *testing.T) {
	files := usual()
	files["proc/self/mountinfo"] = mountinfo("/ ext4 rw", "/sys/fs/cgroup/cpu cgroup rw")
	h := probe(t, files)
	f, err := args.Parse([]byte("--resolv-conf /mine\n"), args.GrammarA)
	if err != nil {
		t.Fatal(err)
	}
	added, err := h.Apply("kubelet", f)
	if err != nil || len(added) != 2 || added[0].Flag != "fail-cgroupv1" || added[1].Flag != "node-ip" {
		t.Errorf("added %v, %v", added, err)
	}
	if got, _ := f.Get("resolv-conf"); got != "/mine" {
		t.Errorf("the user's --resolv-conf became %q", got)
	}
	if got, _ := f.Get("fail-cgroupv1"); got != "false" {
		t.Errorf("--fail-cgroupv1 is %q", got)
	}
}

func TestEmptyHost(t *testing.T) {
	h := Probe(t.TempDir())
	if len(h.Notes()) == 0 || !h.CapSysResource || !h.InNetNS || h.Snapshotter("/x") != "native" {
		t.Errorf("%+v", h)
	}
}

func TestMountsBelow(t *testing.T) {
	h := Host{mounts: mounts(mountinfo("/ ext4 rw", "/a ext4 rw", "/a/b\\040c tmpfs rw", "/ab tmpfs rw", "/a/b\\040c/d tmpfs rw"))}
	if d := cmp.Diff([]string{"/a/b c", "/a/b c/d"}, h.MountsBelow("/a/b c")); d != "" {
		t.Error(d)
	}
	if got := h.FSType("/ab/x"); got != "tmpfs" {
		t.Errorf("FSType = %q", got)
	}
	if got := h.FSType("/abc"); got != "ext4" {
		t.Errorf("FSType = %q", got)
	}
}
