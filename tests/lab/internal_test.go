package lab

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseHierarchies(t *testing.T) {
	for _, tc := range []struct {
		name, mountinfo string
		want            []hierarchy
	}{
		{"v2", "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
			[]hierarchy{{Mount: "/sys/fs/cgroup", V2: true}}},
		{"v1 under systemd", `31 23 0:28 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro
32 31 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
33 31 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
34 31 0:31 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory
`,
			[]hierarchy{
				{Mount: "/sys/fs/cgroup/unified", Dir: "unified", V2: true},
				{Mount: "/sys/fs/cgroup/systemd", Dir: "systemd", Options: "name=systemd"},
				{Mount: "/sys/fs/cgroup/cpu,cpuacct", Dir: "cpu,cpuacct", Options: "cpu,cpuacct"},
				{Mount: "/sys/fs/cgroup/memory", Dir: "memory", Options: "memory"},
			}},
		{"somebody's private mount", `31 23 0:28 / /sys/fs/cgroup rw - cgroup2 none rw
32 31 0:29 / /run/box/cgroup rw - cgroup2 none rw
`,
			[]hierarchy{{Mount: "/sys/fs/cgroup", V2: true}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := parseHierarchies([]byte(tc.mountinfo))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	if _, err := parseHierarchies([]byte("22 27 0:21 / /proc rw - proc proc rw\n")); err == nil || !strings.Contains(err.Error(), "mount one") {
		t.Errorf("a machine without cgroups: %v", err)
	}
}
