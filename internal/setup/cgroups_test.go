package setup

import (
	"os"
	"testing"

	"microk8s/internal/snapenv"
)

func TestRemoveCgroups(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	for _, dir := range []string{
		"sys/fs/cgroup/memory/kubepods/besteffort/pod1", "sys/fs/cgroup/memory/other",
		"sys/fs/cgroup/kubepods/burstable", "sys/fs/cgroup/cpu/kubepods/pod2",
	} {
		if err := os.MkdirAll(env.HostPath(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// A cgroup with processes cannot be removed; a file in a directory has the same effect.
	if err := os.WriteFile(env.HostPath("sys/fs/cgroup/cpu/kubepods/pod2/busy"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := (&Installer{Env: env}).removeCgroups(t.Context()); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]bool{
		"sys/fs/cgroup/memory/kubepods":   false,
		"sys/fs/cgroup/memory/other":      true,
		"sys/fs/cgroup/kubepods":          false,
		"sys/fs/cgroup/cpu/kubepods/pod2": true,
	} {
		if _, err := os.Stat(env.HostPath(path)); (err == nil) != want {
			t.Errorf("%s there: %t, want %t", path, err == nil, want)
		}
	}
}
