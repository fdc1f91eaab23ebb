package inspect

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"microk8s/internal/nodeconfig"
)

func TestHostFindings(t *testing.T) {
	well := map[string]string{
		"dev/kmsg": "",
		"proc/sys/net/bridge/bridge-nf-call-iptables": "1",
		"proc/cgroups":                    "#subsys_name\thierarchy\tnum_cgroups\tenabled\nmemory\t9\t120\t1\n",
		"proc/sys/kernel/osrelease":       "6.1.0-1\n",
		"lib/modules/6.1.0-1/modules.dep": "kernel/drivers/net/vxlan/vxlan.ko: kernel/net/ipv4/udp_tunnel.ko\n",
		"etc/ufw/ufw.conf":                "# on or off\nENABLED=no\n",
		"sys/fs/selinux/enforce":          "0",
		"usr/bin/dockerd":                 "",
		"etc/docker/daemon.json":          `{"insecure-registries": ["localhost:32000"]}`,
	}
	tests := []struct {
		name string
		with map[string]string // added to well, or removed where the text is "-"
		want []string          // a piece of each finding, in order
	}{
		{name: "nothing wrong"},
		{name: "docker without a configuration", with: map[string]string{"etc/docker/daemon.json": "-"}, want: []string{"/etc/docker/daemon.json"}},
		{name: "docker with another registry", with: map[string]string{"etc/docker/daemon.json": `{"insecure-registries": ["a:1"]}`}, want: []string{`["localhost:32000"]`}},
		{name: "docker as a snap", with: map[string]string{"snap/docker/current/bin/dockerd": ""}, want: []string{"snap restart docker"}},
		{name: "ufw", with: map[string]string{"etc/ufw/ufw.conf": "ENABLED=yes\n"}, want: []string{"ufw is active"}},
		{name: "SELinux", with: map[string]string{"sys/fs/selinux/enforce": "1"}, want: []string{"SELinux is enforcing"}},
		{name: "memory cgroup off", with: map[string]string{"proc/cgroups": "memory\t0\t1\t0\n"}, want: []string{"cgroup_enable=memory"}},
		{name: "memory cgroup of version 2", with: map[string]string{"proc/cgroups": "memory\t0\t1\t0\n", "sys/fs/cgroup/cgroup.controllers": "cpu memory pids\n"}},
		{name: "no kmsg, bridges", with: map[string]string{"dev/kmsg": "-", "proc/sys/net/bridge/bridge-nf-call-iptables": "-", "run/systemd/container": "lxc"}, want: []string{"LXD profile", "modprobe br_netfilter"}},
		{name: "no vxlan", with: map[string]string{"lib/modules/6.1.0-1/modules.dep": "kernel/a.ko:\n"}, want: []string{"vxlan is missing"}},
		{name: "no vxlan on a Raspberry Pi", with: map[string]string{"lib/modules/6.1.0-1/modules.dep": "kernel/a.ko:\n", "proc/device-tree/model": "Raspberry Pi 5 Model B"}, want: []string{"linux-modules-extra-raspi"}},
		{name: "vxlan loaded, modules hidden", with: map[string]string{"lib/modules/6.1.0-1/modules.dep": "kernel/a.ko:\n", "sys/module/vxlan/refcnt": "1"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			files := maps.Clone(well)
			maps.Copy(files, tt.with)
			for path, text := range files {
				if text == "-" {
					continue
				}
				path = filepath.Join(root, path)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			got := hostFindings(root, nodeconfig.Config{})
			if len(got) != len(tt.want) {
				t.Fatalf("%d findings, want %d:\n%s", len(got), len(tt.want), strings.Join(got, "\n"))
			}
			for i, w := range tt.want {
				if !strings.Contains(got[i], w) {
					t.Errorf("finding %q lacks %q", got[i], w)
				}
			}
		})
	}
}
