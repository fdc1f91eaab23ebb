package setup

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestRemoveBesideOtherRuntimes plants, for each directory that runtimes and kubelets share, something of
// the node's and something of Docker's, k3s' or kubeadm's that came later. The first goes and the
// second stays, whether the directory was there before the node or not.
func TestRemoveBesideOtherRuntimes(t *testing.T) {
	const uid, gone, id = "0b8ff1a4-7f9d-4c52-9d2e-6a1f33a0c001", "0b8ff1a4-7f9d-4c52-9d2e-6a1f33a0c002", "f00dfeed"
	for _, before := range []bool{false, true} {
		t.Run(map[bool]string{false: "after the node", true: "before the node"}[before], func(t *testing.T) {
			in := machine(t)
			if before {
				for _, dir := range hostTrees(in.Env) {
					if err := os.MkdirAll(dir, 0o755); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := in.Install(t.Context()); err != nil {
				t.Fatal(err)
			}
			socket := func(path string) string {
				sum := sha256.Sum256([]byte(path))
				return "run/containerd/s/" + hex.EncodeToString(sum[:])
			}
			ours := []string{
				"var/log/pods/shop_web-1_" + uid + "/web/0.log",
				"var/log/pods/shop_job-1_" + gone + "/job/0.log", // deleted since
				"var/log/containers/web-1_shop_web-" + id + ".log -> /var/log/pods/shop_web-1_" + uid + "/web/0.log",
				`var/lib/cni/results/k8s-pod-network-` + id + `-eth0: {"networkName":"k8s-pod-network","containerId":"` + id + `"}`,
				`var/lib/cni/results/microk8s-1-eth0: {"networkName":"microk8s","containerId":"gone"}`,
				socket(filepath.Join(in.Env.ContainerdSocket(), "k8s.io", id)),
				"run/containerd/runc/k8s.io/" + id + "/state.json",
			}
			theirs := []string{
				"run/containerd/containerd.sock", "run/containerd/containerd.sock.ttrpc",
				"run/containerd/io.containerd.runtime.v2.task/moby/x/config.json",
				"run/containerd/runc/moby/x/state.json", "run/containerd/runc/k8s.io/beef/state.json",
				socket(filepath.Join("/run/containerd/containerd.sock", "k8s.io", id)), socket("/run/containerd/containerd.sock/moby/x"),
				"var/log/pods/kube-system_coredns_of-k3s/coredns/0.log",
				"var/log/pods/something-else",
				"var/log/containers/coredns_kube-system_coredns-beef.log -> /var/log/pods/kube-system_coredns_of-k3s/coredns/0.log",
				`var/lib/cni/results/cbr0-beef-eth0: {"networkName":"cbr0","containerId":"beef"}`,
				"var/lib/cni/networks/cbr0/10.42.0.7",
				"run/netns/cni-0000-of-another", "etc/cni/other",
			}
			for _, item := range slices.Concat(ours, theirs) {
				plant(t, in.Env.Host, item)
			}
			// The ledger: what kubelet and containerd wrote in the node's folders first.
			plant(t, "", filepath.Join(in.Env.KubeletRoot(), "pods", uid, "etc-hosts"))
			plant(t, "", filepath.Join(in.Env.Common, "var/pods.ledger")+": "+gone+"\n")
			plant(t, "", filepath.Join(in.Env.ContainerdState(), "io.containerd.runtime.v2.task/k8s.io", id, "config.json"))
			var unmounted []string
			in.Unmount = func(p string) error { unmounted = append(unmounted, p); return nil }
			for range 2 {
				if err := in.Remove(t.Context()); err != nil {
					t.Fatal(err)
				}
				for _, item := range ours {
					if path := planted(item); exists(in.Env.HostPath(path)) {
						t.Errorf("left behind: %s", path)
					}
				}
				for _, item := range theirs {
					if path := planted(item); !exists(in.Env.HostPath(path)) {
						t.Errorf("removed from others: %s", path)
					}
				}
			}
			if len(unmounted) > 0 {
				t.Errorf("unmounted %q", unmounted)
			}
		})
	}
}

// planted is the path in "PATH", "PATH: CONTENT" and "PATH -> TARGET".
func planted(item string) string {
	path, _, _ := strings.Cut(item, ": ")
	path, _, _ = strings.Cut(path, " -> ")
	return path
}

func plant(t *testing.T, root, item string) {
	t.Helper()
	path := filepath.Join(root, planted(item))
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		if _, target, ok := strings.Cut(item, " -> "); ok {
			err = os.Symlink(target, path)
		} else {
			_, text, _ := strings.Cut(item, ": ")
			err = os.WriteFile(path, []byte(text), 0o600)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// TestRemoveInterfaces has Calico's and Cilium's interfaces of the node's own pod network, and of
// another cluster on the machine.
func TestRemoveInterfaces(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	for _, tc := range []struct {
		name, manifest, address string
		stays                   bool
	}{
		{"ours", "- name: CALICO_IPV4POOL_CIDR\n  value: \"10.1.0.0/16\"\n", "10.1.7.1/32", false},
		{"another range", "- name: CALICO_IPV4POOL_CIDR\n  value: \"10.1.0.0/16\"\n", "192.168.3.1/32", true},
		{"no network of the user's", "", "10.1.7.1/32", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in := machine(t)
			if err := in.Install(t.Context()); err != nil {
				t.Fatal(err)
			}
			if tc.manifest != "" {
				plant(t, "", in.Env.CNIManifest()+": "+tc.manifest)
			}
			in.Links = nil
			runtime.LockOSThread() // never unlocked: the thread ends with the test, and its namespace with it
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{"vxlan.calico", "cali0123456789a", "cilium_host"} {
				l := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}} // not every kernel has dummies
				if err := netlink.LinkAdd(l); err != nil {
					t.Fatal(err)
				}
				if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: netlink.NewIPNet(netip.MustParsePrefix(tc.address).Addr().AsSlice())}); err != nil {
					t.Fatal(err)
				}
			}
			if err := in.Remove(context.Background()); err != nil {
				t.Fatal(err)
			}
			for name, stays := range map[string]bool{"vxlan.calico": tc.stays, "cilium_host": tc.stays, "cali0123456789a": true} {
				if _, err := netlink.LinkByName(name); (err == nil) != stays {
					t.Errorf("%s is there: %t", name, err == nil)
				}
			}
		})
	}
}
