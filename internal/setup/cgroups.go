package setup

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// removeCgroups removes the cgroups that the kubelet made for pods, which it leaves behind
// when it ends: kubepods in each hierarchy, or in the only one. Those of pods that still run
// are not empty and stay.
func (in *Installer) removeCgroups(context.Context) error {
	tops, _ := filepath.Glob(in.Env.HostPath("sys/fs/cgroup/*/kubepods"))
	for _, top := range append(tops, in.Env.HostPath("sys/fs/cgroup/kubepods")) {
		var dirs []string
		_ = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil // one that went away meanwhile is what is wanted
		})
		for _, dir := range slices.Backward(dirs) { // the innermost first
			os.Remove(dir)
		}
	}
	return nil
}
