package setup

import (
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"microk8s/internal/args"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/pki/pkitest"
	"microk8s/internal/snapenv"
)

// machine is a host in a temporary folder with the package unpacked on it.
func machine(t *testing.T) *Installer {
	t.Helper()
	env := snapenv.Under(t.TempDir())
	put := func(path, text string, mode fs.FileMode) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.CopyFS(env.DefaultArgs(), os.DirFS("../../snap/local/default-args")); err != nil {
		t.Fatal(err)
	}
	for _, plugin := range []string{"bridge", "host-local"} {
		put(filepath.Join(env.ShippedCNIBin(), plugin), "plugin", 0o755)
	}
	put(filepath.Join(env.UserCommon, "sideload/mine.tar"), "images of mine", 0o600)
	put(filepath.Join(env.Common, "sideload/ours.tar.gz"), "images of ours", 0o600)
	put(env.HostPath("etc/group"), "root:x:0:\nsystemd-x:x:999:\n", 0o644)
	put(env.HostPath("etc/gshadow"), "root:*::\n", 0o640)
	put(env.HostPath("proc/meminfo"), "MemTotal:        2048000 kB\nMemFree: 1 kB\n", 0o444)
	if err := os.MkdirAll(env.HostPath("var/lib"), 0o755); err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	return &Installer{
		Env:       env,
		Maker:     pkitest.Maker(func() time.Time { return now }),
		Hostname:  func() (string, error) { return "node-a", nil },
		Addresses: func() ([]net.IP, error) { return []net.IP{net.IPv4(10, 0, 0, 5)}, nil },
		Unmount:   func(string) error { return nil },
		Links:     func() error { return nil },
	}
}

// tree describes every file below root: its mode, and its text or target unless it has
// random content.
func tree(t *testing.T, root string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		rel := strings.TrimPrefix(path, root)
		text := ""
		switch {
		case d.Type()&fs.ModeSymlink != 0:
			if text, err = os.Readlink(path); err != nil {
				return err
			}
			text = strings.ReplaceAll(text, root, "")
		case d.Type().IsRegular() && d.Name() != "encryption.yaml" && !slices.Contains([]string{".crt", ".key", ".config"}, filepath.Ext(path)):
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text = strings.ReplaceAll(string(data), root, "")
		}
		files[rel] = fmt.Sprintf("%v %s", st.Mode(), text)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func diff(t *testing.T, want, got map[string]string, what string) {
	t.Helper()
	for path, text := range want {
		if got[path] != text {
			t.Errorf("%s: %s is %q, want %q", what, path, got[path], text)
		}
	}
	for path, text := range got {
		if _, ok := want[path]; !ok {
			t.Errorf("%s: %s (%s) is too many", what, path, text)
		}
	}
}

func TestInstall(t *testing.T) {
	in := machine(t)
	if err := in.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	env := in.Env
	got := tree(t, env.Host)
	for path, want := range map[string]string{
		"/var/snap/microk8s/current":                                       "Lrwxrwxrwx x1",
		"/var/snap/microk8s/x1/var/kubernetes/backend":                     "Lrwxrwxrwx /var/snap/microk8s/common/var/kubernetes/backend",
		"/var/snap/microk8s/common/var/kubernetes/backend/init.yaml":       "-rw-rw---- Address: 127.0.0.1:19001\n",
		"/var/snap/microk8s/common/var/kubernetes/backend/cluster.key":     "-rw------- ",
		"/var/snap/microk8s/common/var/kubernetes/backend/encryption.yaml": "-rw------- ",
		"/var/snap/microk8s/common/var/kubernetes/backend/cluster.crt":     "-rw-rw---- ",
		"/var/lib/kubelet": "Lrwxrwxrwx /var/snap/microk8s/common/var/lib/kubelet",
		"/var/lib/calico":  "Lrwxrwxrwx /var/snap/microk8s/current/var/lib/calico",
		"/etc/cni/net.d":   "Lrwxrwxrwx /var/snap/microk8s/current/args/cni-network",
		"/opt/cni/bin":     "Lrwxrwxrwx /var/snap/microk8s/current/opt/cni/bin",
		"/var/snap/microk8s/x1/opt/cni/bin/bridge": "Lrwxrwxrwx /snap/microk8s/current/opt/cni/bin/bridge",
		"/etc/group":   "-rw-r--r-- root:x:0:\nsystemd-x:x:999:\nmicrok8s:x:998:\n",
		"/etc/gshadow": "-rw-r----- root:*::\nmicrok8s:!::\n",
		"/var/snap/microk8s/x1/credentials/client.config": "-rw-rw---- ",
		"/var/snap/microk8s/x1/var/lock/installed.lock":   "-rw-rw---- ",
		"/var/snap/microk8s/x1/var/lock/ha-cluster":       "-rw-rw---- ",
		"/var/snap/microk8s/x1/var/lock/lite.lock":        "-rw-rw---- ",
		"/var/snap/microk8s/x1/args":                      "drwxrwx--- ",
		"/var/snap/microk8s/common/hooks/remove.d":        "drwxrwx--- ",
	} {
		if got[path] != want {
			t.Errorf("%s: %q, want %q", path, got[path], want)
		}
	}
	if _, ok := got["/var/snap/microk8s/x1/args/certs.d/localhost:32000/hosts.toml"]; !ok {
		t.Error("the registry's directory did not get its colon")
	}
	if _, ok := got["/var/snap/microk8s/x1/var/lock/low-memory-guard.lock"]; ok {
		t.Error("2 GB count as low memory")
	}
	for _, name := range []string{"kubelet", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelite", "k8s-dqlite", "cluster-agent", "containerd"} {
		f, err := args.Load(env.Args(name), args.GrammarFor(name))
		if err != nil || f.Empty() {
			t.Errorf("args/%s: %v", name, err)
		}
	}
}

// TestArgumentsBeforeTheFirstStart has a person write single flags before there is a node.
func TestArgumentsBeforeTheFirstStart(t *testing.T) {
	in := machine(t)
	path := in.Env.Args("kubelet")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("# mine\n--hostname-override=blue\n--fail-swap-on=true"), 0o644); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second run is that of a later version
		if err := in.Install(t.Context()); err != nil {
			t.Fatal(err)
		}
		f, err := args.Load(path, args.GrammarA)
		if err != nil {
			t.Fatal(err)
		}
		none := func(string) (string, bool) { return "", false }
		for flag, want := range map[string]string{"hostname-override": "blue", "fail-swap-on": "true", "anonymous-auth": "false"} {
			if got := f.Values(flag, none); len(got) != 1 || got[0] != want {
				t.Errorf("--%s is %q, want %s", flag, got, want)
			}
		}
	}
}

func TestKilledAnywhereAndRunAgain(t *testing.T) {
	whole := machine(t)
	points := 0
	whole.After = func(string) error { points++; return nil }
	if err := whole.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := tree(t, whole.Env.Host)
	if points < 40 {
		t.Fatalf("only %d places to stop at", points)
	}
	killed := errors.New("killed")
	for stop := 1; stop <= points; stop++ {
		in := machine(t)
		n, where := 0, ""
		in.After = func(what string) error {
			if n++; n == stop {
				where = what
				return killed
			}
			return nil
		}
		if err := in.Install(t.Context()); !errors.Is(err, killed) {
			t.Fatalf("stop %d: %v", stop, err)
		}
		in.After = nil
		if err := in.Install(t.Context()); err != nil {
			t.Fatalf("again after %s: %v", where, err)
		}
		diff(t, want, tree(t, in.Env.Host), "after "+where)
	}
}

func TestKilledBetweenKeys(t *testing.T) {
	whole := machine(t)
	var made atomic.Int64 // by two goroutines
	source := whole.Maker.NewKey
	whole.Maker.NewKey = func(bits int) (*rsa.PrivateKey, error) { made.Add(1); return source(bits) }
	if err := whole.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := tree(t, whole.Env.Host)
	killed := errors.New("killed")
	for stop := 1; stop <= int(made.Load()); stop++ {
		in := machine(t)
		var n int
		source := in.Maker.NewKey
		gate := make(chan struct{}, 1) // keys are made by two goroutines
		in.Maker.NewKey = func(bits int) (*rsa.PrivateKey, error) {
			gate <- struct{}{}
			defer func() { <-gate }()
			if n++; n == stop {
				return nil, killed
			}
			return source(bits)
		}
		if err := in.Install(t.Context()); !errors.Is(err, killed) {
			t.Fatalf("key %d: %v", stop, err)
		}
		in.Maker.NewKey = source
		if err := in.Install(t.Context()); err != nil {
			t.Fatalf("again after key %d: %v", stop, err)
		}
		diff(t, want, tree(t, in.Env.Host), fmt.Sprint("after key ", stop))
	}
}

func TestNothingOfTheUsersIsTouched(t *testing.T) {
	in := machine(t)
	env := in.Env
	for path, text := range map[string]string{
		env.Args("containerd-env"):                     "MINE=1\n",
		env.HostPath("etc/cni/net.d/10-mine.conflist"): "{}",
		env.HostPath("var/lib/kubelet/file"):           "x",
		filepath.Join(env.CNIBin(), "bridge"):          "my own",
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := in.Install(t.Context()); err != nil {
			t.Fatal(err)
		}
		for path, text := range map[string]string{
			env.Args("containerd-env"): "MINE=1\n", env.HostPath("etc/cni/net.d/10-mine.conflist"): "{}",
			env.HostPath("var/lib/kubelet/file"): "x", filepath.Join(env.CNIBin(), "bridge"): "my own",
		} {
			if got, err := os.ReadFile(path); err != nil || string(got) != text {
				t.Errorf("%s: %q, %v", path, got, err)
			}
		}
	}
	if target, err := os.Readlink(env.HelmForHooks()); err != nil || !strings.HasSuffix(target, "bin/helm") {
		t.Errorf("helm for hooks leads to %q, %v", target, err)
	}
	if st, err := os.Lstat(env.HostPath("etc/cni/net.d")); err != nil || !st.IsDir() {
		t.Errorf("the directory of CNI configurations was replaced: %v, %v", st, err)
	}
}

func TestUsedDatastoreIsKept(t *testing.T) {
	t.Run("ours", func(t *testing.T) {
		in := machine(t)
		if err := os.MkdirAll(in.Env.BackendLive(), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(in.Env.BackendLive(), "info.yaml"), []byte("ID: 1\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := in.Install(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(in.Env.BackendLive(), "init.yaml")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a datastore in use is started anew: %v", err)
		}
	})
	t.Run("a directory at the documented place", func(t *testing.T) {
		in := machine(t)
		if err := os.MkdirAll(in.Env.Backend(), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(in.Env.Backend(), "metadata1"), []byte("m"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := in.Install(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, dir := range []string{in.Env.Backend(), in.Env.BackendLive()} {
			if got, err := os.ReadFile(filepath.Join(dir, "metadata1")); err != nil || string(got) != "m" {
				t.Errorf("%s: %q, %v", dir, got, err)
			}
		}
	})
	t.Run("two of them", func(t *testing.T) {
		in := machine(t)
		for _, dir := range []string{in.Env.Backend(), in.Env.BackendLive()} {
			if err := os.MkdirAll(filepath.Join(dir, "x"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := in.Install(t.Context()); err == nil || !strings.Contains(err.Error(), "two datastores") {
			t.Errorf("%v", err)
		}
	})
}

func TestLowMemory(t *testing.T) {
	for kB, locked := range map[int]bool{524288: true, 524289: false} {
		in := machine(t)
		path := in.Env.HostPath("proc/meminfo")
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, fmt.Appendf(nil, "MemTotal: %d kB\n", kB), 0o444); err != nil {
			t.Fatal(err)
		}
		if err := in.Install(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := nodeconfig.ReadState(in.Env).LowMemory; got != locked {
			t.Errorf("%d kB: guarded %v, want %v", kB, got, locked)
		}
	}
}

func TestRefusals(t *testing.T) {
	t.Run("LXC without kmsg", func(t *testing.T) {
		in := machine(t)
		if err := os.MkdirAll(in.Env.HostPath("proc/1"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(in.Env.HostPath("proc/1/environ"), []byte("a=b\x00container=lxc\x00"), 0o444); err != nil {
			t.Fatal(err)
		}
		before := tree(t, in.Env.Host)
		if err := in.Install(t.Context()); err == nil || !strings.Contains(err.Error(), "LXC profile") {
			t.Errorf("%v", err)
		}
		diff(t, before, tree(t, in.Env.Host), "a refused installation")
	})
	t.Run("no package", func(t *testing.T) {
		in := machine(t)
		if err := os.RemoveAll(in.Env.Snap); err != nil {
			t.Fatal(err)
		}
		if err := in.Install(t.Context()); err == nil {
			t.Error("installed without a package")
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		in := machine(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := in.Install(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
	})
}

// A node of a release that had the datastore in $SNAP_DATA, refreshed, undone, and refreshed
// again.
func TestRefreshMovesTheDatastore(t *testing.T) {
	in := machine(t)
	if err := in.Refresh(t.Context()); err != nil {
		t.Fatalf("a machine without a node: %v", err)
	}
	if err := in.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	asBefore := func(text string) {
		t.Helper()
		if err := os.RemoveAll(in.Env.Backend()); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(in.Env.Backend(), 0o755); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"info.yaml", "metadata1"} {
			if err := os.WriteFile(filepath.Join(in.Env.Backend(), name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.RemoveAll(in.Env.BackendLive()); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"first", "second"} {
		asBefore(text)
		for range 2 { // again after a crash
			if err := in.Refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
			if target, err := os.Readlink(in.Env.Backend()); err != nil || target != in.Env.BackendLive() {
				t.Errorf("the documented path leads to %q, %v", target, err)
			}
			if data, err := os.ReadFile(filepath.Join(in.Env.BackendLive(), "metadata1")); err != nil || string(data) != text {
				t.Errorf("the datastore is %q, %v; want %q", data, err, text)
			}
		}
	}
	if data, err := os.ReadFile(filepath.Join(in.Env.BackendLive()+".undone", "metadata1")); err != nil || string(data) != "first" {
		t.Errorf("of the undone refresh there is %q, %v", data, err)
	}
}

// Archives of images that were there before are taken over, for internal/images to load.
func TestSideload(t *testing.T) {
	in := machine(t)
	if err := in.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"mine.tar": "images of mine", "ours.tar.gz": "images of ours"} {
		if got, err := os.ReadFile(filepath.Join(in.Env.SideloadDir(), name)); err != nil || string(got) != want {
			t.Errorf("%s is %q, %v", name, got, err)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(in.Env.SideloadDir(), "*.part")); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}
