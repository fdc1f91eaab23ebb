package daemon

import (
	"os"
	"path/filepath"
	"testing"
)

func TestMemoryLimit(t *testing.T) {
	const group = "sys/fs/cgroup/system.slice/k8s-dqlite.service"
	for name, tc := range map[string]struct {
		files map[string]string
		limit int64 // 0: none
		used  int64
		low   bool
	}{
		"none": {files: map[string]string{"proc/self/cgroup": "0::/system.slice/k8s-dqlite.service\n", group + "/memory.max": "max\n"}},
		"of the service": {files: map[string]string{
			"proc/self/cgroup": "0::/system.slice/k8s-dqlite.service\n", group + "/memory.max": "1000000\n",
			group + "/memory.current": "900000\n", group + "/memory.stat": "anon 1\ninactive_file 300000\nactive_file 100000\n",
		}, limit: 1000000, used: 500000},
		"nearly used": {files: map[string]string{
			"proc/self/cgroup": "1:name=x:/y\n0::/system.slice/k8s-dqlite.service\n", group + "/memory.max": "1000000\n",
			group + "/memory.current": "900000\n", group + "/memory.stat": "inactive_file 10\n",
		}, limit: 1000000, used: 899990, low: true},
		"of a group above": {files: map[string]string{
			"proc/self/cgroup": "0::/system.slice/k8s-dqlite.service\n", group + "/memory.max": "9000000\n",
			"sys/fs/cgroup/system.slice/memory.max": "2000000\n", "sys/fs/cgroup/system.slice/memory.current": "7\n", "sys/fs/cgroup/system.slice/memory.stat": "",
		}, limit: 2000000, used: 7},
		"version 1": {files: map[string]string{"proc/self/cgroup": "4:memory:/x\n", "sys/fs/cgroup/memory.max": "5\n"}},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			for f, text := range tc.files {
				if err := os.MkdirAll(filepath.Join(root, filepath.Dir(f)), 0o700); err != nil {
					t.Fatal(err)
				}
				writeFile(t, filepath.Join(root, f), []byte(text))
			}
			m := findMemory(root)
			if (m == nil) != (tc.limit == 0) {
				t.Fatalf("%+v", m)
			}
			if m == nil {
				return
			}
			got, err := m.read()
			if err != nil || got.Limit != tc.limit || got.Used != tc.used || got.Low != tc.low {
				t.Errorf("%+v, %v", got, err)
			}
		})
	}
}
