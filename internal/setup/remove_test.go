package setup

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"microk8s/internal/snapenv"
)

// outside is the part of a tree that is not the product's own data.
func outside(files map[string]string) map[string]string {
	kept := map[string]string{}
	for path, text := range files {
		if !strings.HasPrefix(path, "/var/snap") && !strings.HasPrefix(path, "/snap") && path != "/etc/group" && path != "/etc/gshadow" && path != "/etc/.pwd.lock" {
			kept[path] = text
		}
	}
	return kept
}

func TestRemoveLeavesTheHostAsItWas(t *testing.T) {
	in := machine(t)
	for _, dir := range []string{"opt", "run", "var/log"} {
		if err := os.MkdirAll(in.Env.HostPath(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	before := outside(tree(t, in.Env.Host))
	for range 2 {
		if err := os.RemoveAll(in.Env.Lock("installed.lock")); err != nil { // as when reinstalled
			t.Fatal(err)
		}
		if err := in.Install(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, dir := range []string{"var/log/pods/ns_pod_uid", "var/lib/cni/results", "run/containerd/s"} { // as the node's programs do
			if err := os.MkdirAll(in.Env.HostPath(dir), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		installed := outside(tree(t, in.Env.Host))
		if _, ok := installed["/etc/cni/net.d"]; !ok {
			t.Fatal("there is nothing to remove")
		}
		for range 2 { // removing twice is removing
			if err := in.Remove(t.Context()); err != nil {
				t.Fatal(err)
			}
			diff(t, before, outside(tree(t, in.Env.Host)), "after removal")
		}
	}
}

func TestRemoveKeepsWhatOthersPutThere(t *testing.T) {
	in := machine(t)
	if err := os.MkdirAll(in.Env.HostPath("opt/cni"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/elsewhere", in.Env.HostPath("opt/cni/bin")); err != nil {
		t.Fatal(err)
	}
	logs := in.Env.HostPath("var/log/pods/of-another")
	if err := os.MkdirAll(logs, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := in.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(in.Env.HostPath("etc/cni/other"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := in.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if target, err := os.Readlink(in.Env.HostPath("opt/cni/bin")); err != nil || target != "/elsewhere" {
		t.Errorf("a foreign link: %q, %v", target, err)
	}
	if _, err := os.Stat(in.Env.HostPath("etc/cni/other")); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(logs); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(in.Env.AdminKubeconfig()); err != nil {
		t.Errorf("the node's data went: %v", err)
	}
}

func TestRemoveTriesEverything(t *testing.T) {
	in := machine(t)
	if err := in.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	root := in.Env.KubeletRoot()
	info := "1 0 0:1 / / rw - ext4 /dev/sda rw\n" +
		"2 1 0:2 / " + root + "/pods/a/volumes/x rw - tmpfs tmpfs rw\n" +
		"3 2 0:3 / " + root + "/pods/a/volumes/x/inner rw - tmpfs tmpfs rw\n" +
		"4 1 0:4 / " + root + "er rw - tmpfs tmpfs rw\n"
	if err := os.MkdirAll(in.Env.HostPath("proc/self"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(in.Env.HostPath("proc/self/mountinfo"), []byte(info), 0o444); err != nil {
		t.Fatal(err)
	}
	var unmounted []string
	boom := errors.New("busy")
	in.Unmount = func(target string) error {
		unmounted = append(unmounted, strings.TrimPrefix(target, root))
		return boom
	}
	in.Links = func() error { return boom }
	if err := in.Remove(t.Context()); !errors.Is(err, boom) {
		t.Errorf("%v", err)
	}
	if want := []string{"/pods/a/volumes/x/inner", "/pods/a/volumes/x"}; !slices.Equal(unmounted, want) {
		t.Errorf("unmounted %q, want %q", unmounted, want)
	}
	if _, err := os.Lstat(in.Env.HostPath("var/lib/kubelet")); err == nil {
		t.Error("a failed step kept the others from being tried")
	}
}

func TestConfigure(t *testing.T) {
	in := machine(t)
	before := tree(t, in.Env.Host)
	if err := in.Configure(t.Context()); err != nil {
		t.Fatal(err)
	}
	diff(t, before, tree(t, in.Env.Host), "Configure on a machine without a node")

	if err := in.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := tree(t, in.Env.Host)
	for _, path := range []string{in.Env.Args("kubectl-env"), in.Env.HostPath("opt/cni/bin"), filepath.Join(in.Env.CNIBin(), "host-local"), in.Env.Cert("proxy.crt")} {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(in.Env.Args("kubelet"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := in.Configure(t.Context()); err != nil {
		t.Fatal(err)
	}
	diff(t, want, tree(t, in.Env.Host), "Configure")
}

func TestHardenedNode(t *testing.T) {
	in := machine(t)
	if err := in.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(in.Env.Lock(snapenv.LockCIS), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := in.Configure(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{in.Env.ArgsDir(), in.Env.CertsDir(), in.Env.CredentialsDir(), in.Env.LocksDir(), in.Env.BackendLive()} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			st, err := d.Info()
			if err == nil && st.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s is %v on a hardened node", path, st.Mode())
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}
