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
		"etc/ufw/ufw.conf":                            "# on or off\nENABLED=no\n",
		"sys/fs/selinux/enforce":                      "0",
		"usr/bin/dockerd":                             "",
		"etc/docker/daemon.json":                      `{"insecure-registries": ["localhost:32000"]}`,
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
		{name: "no kmsg", with: map[string]string{"dev/kmsg": "-", "run/systemd/container": "lxc"}, want: []string{"LXD profile"}},
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
