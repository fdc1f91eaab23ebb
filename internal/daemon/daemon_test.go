package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"microk8s/internal/args"
	"microk8s/internal/encryption"
	"microk8s/internal/hostprobe"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/pki/pkitest"
	"microk8s/internal/setup"
	"microk8s/internal/snapenv"
)

// node is an installed node in a temporary folder.
type node struct {
	*Preparer
	env     snapenv.Env
	log     bytes.Buffer
	modules []string
	mounted []string // what was unmounted
}

func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{env: snapenv.Under(t.TempDir())}
	if err := os.CopyFS(n.env.DefaultArgs(), os.DirFS("../../snap/local/default-args")); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"etc/group": "root:x:0:\n", "proc/meminfo": "MemTotal: 2048000 kB\n",
		"proc/sys/kernel/random/boot_id":              "boot-1\n",
		"proc/sys/fs/aio-max-nr":                      "65536\n",
		"proc/sys/fs/inotify/max_user_instances":      "128\n",
		"proc/sys/fs/inotify/max_user_watches":        "9000000\n",
		"proc/sys/net/ipv4/ip_forward":                "0\n",
		"proc/sys/net/ipv6/conf/all/forwarding":       "0\n",
		"proc/sys/net/bridge/bridge-nf-call-iptables": "0\n",
		"proc/sys/net/netfilter/nf_conntrack_max":     "1\n",
		"proc/filesystems":                            "nodev\toverlay\n",
		"proc/self/status":                            "CapEff:\t000001ffffffffff\n",
		"proc/1/stat":                                 "1 (a b) S 0 1 1 0 -1 1 1 1 1 1 1 1 1 1 20 0 1 0 777 1 1\n",
	} {
		n.put(t, n.env.HostPath(name), text)
	}
	in := &setup.Installer{
		Env: n.env, Maker: pkitest.Maker(nil),
		Hostname:  func() (string, error) { return "node-a", nil },
		Addresses: func() ([]net.IP, error) { return nil, nil },
	}
	if err := in.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.put(t, n.env.ContainerdSocket(), "")
	n.again()
	return n
}

// again makes a fresh Preparer, as each start of a service is a process of its own.
func (n *node) again() {
	n.Preparer = &Preparer{
		Env: n.env, Log: slog.New(slog.NewTextHandler(&n.log, nil)),
		Environ: []string{"PATH=/bin", "SNAP=/other", "LANG=C"},
		Modprobe: func(_ context.Context, m string) error {
			n.modules = append(n.modules, m)
			return errors.New("no such module")
		},
		Unmount: func(target string) error { n.mounted = append(n.mounted, target); return nil },
	}
}

func (n *node) put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func (n *node) prepare(t *testing.T, name string) *Command {
	t.Helper()
	cmd, err := n.Prepare(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return cmd
}

func TestCommandLines(t *testing.T) {
	n := newNode(t)
	n.put(t, n.env.Lock(snapenv.LockWorker), "")
	for _, tc := range []struct {
		name   string
		worker bool
		want   []string
	}{
		{"containerd", false, []string{
			"--config", "DATA/args/containerd.toml", "--root", "COMMON/var/lib/containerd",
			"--state", "COMMON/run/containerd", "--address", "COMMON/run/containerd.sock",
		}},
		{"k8s-dqlite", false, []string{"--storage-dir=DATA/var/kubernetes/backend/", "--listen=unix://DATA/var/kubernetes/backend/kine.sock:12379"}},
		{"cluster-agent", false, []string{"--bind", "0.0.0.0:25000", "--keyfile", "DATA/certs/server.key", "--certfile", "DATA/certs/server.crt", "--timeout", "240"}},
		{"kubelite", false, []string{
			"--scheduler-args-file=DATA/args/kube-scheduler", "--controller-manager-args-file=DATA/args/kube-controller-manager",
			"--proxy-args-file=DATA/args/kube-proxy", "--kubelet-args-file=DATA/args/kubelet", "--apiserver-args-file=DATA/args/kube-apiserver",
			"--kubeconfig-file=DATA/credentials/client.config", "--start-control-plane=true",
		}},
		{"kubelite", true, []string{
			"--scheduler-args-file=DATA/args/kube-scheduler", "--controller-manager-args-file=DATA/args/kube-controller-manager",
			"--proxy-args-file=DATA/args/kube-proxy", "--kubelet-args-file=DATA/args/kubelet", "--apiserver-args-file=DATA/args/kube-apiserver",
			"--kubeconfig-file=DATA/credentials/client.config", "--start-control-plane=false",
		}},
		{"apiserver-proxy", true, []string{
			"--traefik-config", "DATA/args/traefik/traefik.yaml", "--kubeconfig", "DATA/credentials/kubelet.config", "--refresh-interval", "30s",
		}},
	} {
		t.Run(fmt.Sprint(tc.name, tc.worker), func(t *testing.T) {
			n.again()
			if err := os.Remove(n.env.Lock(snapenv.LockWorker)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
			if tc.worker {
				n.put(t, n.env.Lock(snapenv.LockWorker), "")
			}
			cmd := n.prepare(t, tc.name)
			var got []string
			for _, a := range cmd.Args {
				got = append(got, strings.NewReplacer(n.env.Data, "DATA", n.env.Common, "COMMON").Replace(a))
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("got  %q\nwant %q", got, tc.want)
			}
			if cmd.Path != n.env.Bin(tc.name) || cmd.Dir != n.env.Data {
				t.Errorf("%s in %s", cmd.Path, cmd.Dir)
			}
			for _, kv := range []string{"SNAP=" + n.env.Snap, "SNAP_DATA=" + n.env.Data, "LANG=C", "XDG_RUNTIME_DIR=" + n.env.RunDir(), "HOME=" + n.env.Data + "/var/tmp"} {
				if !slices.Contains(cmd.Env, kv) {
					t.Errorf("the environment lacks %s: %q", kv, cmd.Env)
				}
			}
			i := slices.IndexFunc(cmd.Env, func(kv string) bool { return strings.HasPrefix(kv, "PATH=") })
			if !strings.HasPrefix(cmd.Env[i], "PATH="+n.env.Snap+"/usr/sbin:") || !strings.HasSuffix(cmd.Env[i], n.env.Snap+"/bin:/bin") {
				t.Errorf("%s", cmd.Env[i])
			}
		})
	}
}

func TestProxyConfigurationIsRendered(t *testing.T) {
	n := newNode(t)
	n.put(t, n.env.Lock(snapenv.LockWorker), "")
	n.prepare(t, "apiserver-proxy")
	got := read(t, n.env.Args("traefik/traefik.yaml"))
	if want := "filename: " + n.env.Args("traefik/provider.yaml") + "\n"; !strings.Contains(got, want) {
		t.Errorf("no %q in:\n%s", want, got)
	}
}

func TestNothingToDo(t *testing.T) {
	for _, tc := range []struct {
		service string
		change  func(t *testing.T, n *node)
		wanted  bool
	}{
		{"apiserver-proxy", func(*testing.T, *node) {}, false},
		{"apiserver-proxy", func(t *testing.T, n *node) { n.put(t, n.env.Lock(snapenv.LockWorker), "") }, true},
		{"apiserver-proxy", func(t *testing.T, n *node) {
			n.put(t, n.env.Lock(snapenv.LockWorker), "")
			remove(t, n.env.Args("apiserver-proxy"))
		}, false},
		{"k8s-dqlite", func(t *testing.T, n *node) { n.put(t, n.env.Lock(snapenv.LockNoDqlite), "") }, false},
		{"k8s-dqlite", func(t *testing.T, n *node) { n.put(t, n.env.Lock(snapenv.LockLowMemory), "") }, false},
		{"k8s-dqlite", func(t *testing.T, n *node) {
			n.put(t, n.env.Args("kube-apiserver"), "--etcd-servers=https://10.0.0.1:2379\n")
		}, false},
		{"k8s-dqlite", func(t *testing.T, n *node) { remove(t, n.env.Args("k8s-dqlite")) }, false},
		{"kubelite", func(t *testing.T, n *node) { remove(t, n.env.Lock(snapenv.LockLite)) }, false},
		{"kubelite", func(t *testing.T, n *node) { n.put(t, n.env.Lock(snapenv.LockLowMemory), "") }, false},
		{"kubelite", func(t *testing.T, n *node) {
			n.put(t, n.env.Lock(snapenv.LockLowMemory), "")
			n.put(t, n.env.Lock(snapenv.LockWorker), "")
		}, true},
		{"containerd", func(t *testing.T, n *node) { n.put(t, n.env.Lock(snapenv.LockLowMemory), "") }, true},
		{"cluster-agent", func(t *testing.T, n *node) { n.put(t, n.env.Lock(snapenv.LockLowMemory), "") }, true},
	} {
		n := newNode(t)
		tc.change(t, n)
		_, err := n.Prepare(t.Context(), tc.service)
		if wanted := err == nil; wanted != tc.wanted || !wanted && !errors.Is(err, ErrNothingToDo) {
			t.Errorf("%s: %v, want it wanted: %v", tc.service, err, tc.wanted)
		}
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func TestClearErrors(t *testing.T) {
	for _, tc := range []struct {
		name, service string
		spoil         func(t *testing.T, n *node)
		says          []string
	}{
		{"an unknown service", "etcd", func(*testing.T, *node) {}, []string{"not a service of this product"}},
		{"not set up", "kubelite", func(t *testing.T, n *node) { remove(t, n.env.Lock(snapenv.LockInstalled)) }, []string{"microk8s start"}},
		{"empty arguments", "kubelite", func(t *testing.T, n *node) { n.put(t, n.env.Args("kubelet"), "\n# nothing\n") }, []string{"args/kubelet", "no arguments", "default-args"}},
		{"two damaged files", "kubelite", func(t *testing.T, n *node) {
			n.put(t, n.env.Args("kube-proxy"), "--a=1\n\x00\n")
			n.put(t, n.env.Args("kube-scheduler"), "--labels=a, b\n")
		}, []string{"kube-proxy: line 2", "kube-scheduler: line 1"}},
		{"missing arguments", "cluster-agent", func(t *testing.T, n *node) { remove(t, n.env.Args("cluster-agent")) }, []string{"does not exist", "default-args/cluster-agent"}},
		{"a certificate for another key", "kubelite", func(t *testing.T, n *node) {
			n.put(t, n.env.Cert("server.key"), read(t, n.env.Cert("kubelet.key")))
		}, []string{"server.crt", "refresh-certs --undo"}},
		{"a damaged certificate", "cluster-agent", func(t *testing.T, n *node) { n.put(t, n.env.Cert("server.crt"), "x") }, []string{"server.crt"}},
		{"an empty template", "containerd", func(t *testing.T, n *node) { n.put(t, n.env.Args("containerd-template.toml"), " \n") }, []string{"containerd-template.toml", "empty"}},
		{"no template", "containerd", func(t *testing.T, n *node) { remove(t, n.env.Args("containerd-template.toml")) }, []string{"containerd-template.toml"}},
		{"a program in -env", "containerd", func(t *testing.T, n *node) { n.put(t, n.env.Args("containerd-env"), "A=1\nrm -rf /\n") }, []string{"containerd-env: line 2"}},
		{"a failure domain that is no number", "k8s-dqlite", func(t *testing.T, n *node) { n.put(t, n.env.Args("ha-conf"), "failure-domain=rack\n") }, []string{"ha-conf", "rack"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t)
			tc.spoil(t, n)
			_, err := n.Prepare(t.Context(), tc.service)
			if err == nil || errors.Is(err, ErrNothingToDo) {
				t.Fatalf("got %v, want an error", err)
			}
			for _, say := range tc.says {
				if !strings.Contains(err.Error(), say) {
					t.Errorf("the error %q lacks %q", err, say)
				}
			}
		})
	}
}

func TestContainerdConfig(t *testing.T) {
	n := newNode(t)
	n.put(t, n.env.HostPath("proc/self/status"), "CapEff:\t000001fffeffffff\n")
	cmd := n.prepare(t, "containerd")
	text := read(t, n.env.Args("containerd.toml"))
	for _, want := range []string{
		"restrict_oom_score_adj = true", `snapshotter = "overlayfs"`, `runtime_type = "io.containerd.runc.v2"`,
		`BinaryName = "` + n.env.Snap + `/bin/runc"`, `conf_dir = "` + n.env.Data + `/args/cni-network"`, `config_path = "` + n.env.Data + `/args/certs.d"`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("containerd.toml lacks %s", want)
		}
	}
	_, body, _ := strings.Cut(text, "version = 3")
	if strings.Contains(body, "${") {
		t.Errorf("something was not filled in:\n%s", body)
	}
	if cmd.NoFile != 65536 || cmd.MemLock != 16384*1024 {
		t.Errorf("limits %d, %d", cmd.NoFile, cmd.MemLock)
	}
}

func TestStateOfAnEarlierBoot(t *testing.T) {
	n := newNode(t)
	left := filepath.Join(n.env.ContainerdState(), "task/left")
	restart := func(gone bool, why string) {
		t.Helper()
		n.put(t, left, "x")
		n.again()
		n.prepare(t, "containerd")
		if _, err := os.Stat(left); errors.Is(err, fs.ErrNotExist) != gone {
			t.Errorf("%s: %v, want it gone: %v", why, err, gone)
		}
	}
	restart(true, "the first start")
	restart(false, "a restart in the same boot")
	n.put(t, n.env.HostPath("proc/sys/kernel/random/boot_id"), "boot-2\n")
	n.put(t, n.env.HostPath("proc/self/mountinfo"),
		"1 0 0:1 / "+n.env.ContainerdState()+"/a rw - tmpfs tmpfs rw\n2 1 0:2 / "+n.env.ContainerdState()+"/a/b rw - tmpfs tmpfs rw\n")
	restart(true, "another boot")
	if want := []string{n.env.ContainerdState() + "/a/b", n.env.ContainerdState() + "/a"}; !slices.Equal(n.mounted, want) {
		t.Errorf("unmounted %q, want %q", n.mounted, want)
	}
	restart(false, "a restart in the same boot")
	n.put(t, n.env.HostPath("proc/1/stat"), "1 (a) b) S 0 1 1 0 -1 1 1 1 1 1 1 1 1 1 20 0 1 0 778 1 1\n")
	restart(true, "another first process under the same kernel")

	n.put(t, n.env.HostPath("proc/sys/kernel/random/boot_id"), "boot-3\n")
	n.put(t, left, "x")
	n.again()
	n.Unmount = func(string) error { return errors.New("busy") }
	if _, err := n.Prepare(t.Context(), "containerd"); err == nil {
		t.Error("files behind a mount that stays would have been deleted")
	}
	if _, err := os.Stat(left); err != nil {
		t.Errorf("files behind a mount that stays were deleted: %v", err)
	}
}

func TestKernelSettingsOnlyUpwards(t *testing.T) {
	n := newNode(t)
	get := func(name string) string { return strings.TrimSpace(read(t, n.env.HostPath("proc/sys/"+name))) }
	n.put(t, n.env.Lock("skip-aio-tune.lock"), "")
	n.prepare(t, "k8s-dqlite")
	for name, want := range map[string]string{"fs/aio-max-nr": "65536", "fs/inotify/max_user_instances": "1024", "fs/inotify/max_user_watches": "9000000"} {
		if got := get(name); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	remove(t, n.env.Lock("skip-aio-tune.lock"))
	n.put(t, n.env.Lock("skip-inotify-tune.lock"), "")
	n.put(t, n.env.HostPath("proc/sys/fs/inotify/max_user_instances"), "not a number")
	n.again()
	n.prepare(t, "k8s-dqlite")
	if got := get("fs/aio-max-nr"); got != "1048576" {
		t.Errorf("aio-max-nr is %s", got)
	}
	remove(t, n.env.HostPath("proc/sys/net/netfilter/nf_conntrack_max"))
	n.again()
	n.prepare(t, "kubelite")
	for name, want := range map[string]string{"net/ipv4/ip_forward": "1", "net/bridge/bridge-nf-call-iptables": "1", "net/ipv6/conf/all/forwarding": "0"} {
		if got := get(name); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	if !slices.Equal(n.modules, []string{"nf_conntrack"}) || !strings.Contains(n.log.String(), "cannot load a kernel module") {
		t.Errorf("modules %q, log %s", n.modules, n.log.String())
	}
}

func TestObsoleteFlags(t *testing.T) {
	n := newNode(t)
	n.put(t, n.env.Args("kubelet"), "# mine\n--container-runtime=remote\n--kubeconfig=k\n--log-dir /x\n")
	n.put(t, n.env.Args("kube-proxy"), "--proxy-mode=userspace\n--kubeconfig=k\n")
	n.put(t, n.env.Args("kube-apiserver"), "--feature-gates=RemoveSelfLink=false\n--insecure-port=0\n--etcd-servers=s\n")
	n.put(t, n.env.Lock("no-arg-sanitisation"), "")
	n.prepare(t, "kubelite")
	if got := read(t, n.env.Args("kubelet")); !strings.Contains(got, "container-runtime") {
		t.Errorf("changed although the user forbade it: %q", got)
	}
	remove(t, n.env.Lock("no-arg-sanitisation"))
	n.again()
	n.prepare(t, "kubelite")
	for name, want := range map[string]string{"kubelet": "# mine\n--kubeconfig=k\n", "kube-proxy": "--kubeconfig=k\n", "kube-apiserver": "--etcd-servers=s\n"} {
		if got := read(t, n.env.Args(name)); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if !strings.Contains(n.log.String(), "Removing argument: --container-runtime from kubelet") {
		t.Errorf("not said: %s", n.log.String())
	}
	for _, name := range append(workerFiles, controlPlaneFiles...) {
		f, err := args.Load(filepath.Join(n.env.DefaultArgs(), name), args.GrammarA)
		if err != nil {
			t.Fatal(err)
		}
		before := string(f.Bytes())
		if err := n.dropObsolete(name, f); err != nil || string(f.Bytes()) != before {
			t.Errorf("the shipped args/%s has obsolete flags: %v", name, err)
		}
	}
}

// TestOwnAuthentication shows that guides that set --oidc-* or --anonymous-auth work on a node whose
// arguments name the shipped configuration, which the API server refuses beside them.
func TestOwnAuthentication(t *testing.T) {
	const shipped = "--authentication-config=${SNAP_DATA}/args/authentication-config.yaml\n"
	for _, tc := range []struct{ name, before, want string }{
		{"nothing set", shipped + "--v=1\n", shipped + "--v=1\n"},
		{"an issuer", shipped + "--oidc-issuer-url=https://x\n--oidc-client-id=y\n", "--oidc-issuer-url=https://x\n--oidc-client-id=y\n"},
		{"anonymous requests", shipped + "--anonymous-auth=false\n", "--anonymous-auth=false\n"},
		{"the user's own", "--authentication-config=/etc/mine.yaml\n--oidc-client-id=y\n", "--authentication-config=/etc/mine.yaml\n--oidc-client-id=y\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t)
			n.put(t, n.env.Args("kube-apiserver"), tc.before)
			n.prepare(t, "kubelite")
			if got := read(t, n.env.Args("kube-apiserver")); got != tc.want {
				t.Errorf("%q, want %q", got, tc.want)
			}
			if said := strings.Contains(n.log.String(), "authentication-config is left out"); said != (tc.before != tc.want) {
				t.Errorf("said %v: %s", said, n.log.String())
			}
		})
	}
}

// TestEncryptionKey shows that an API server whose arguments name the shipped place of the key finds one
// there, that a key is never replaced, and that a file of the user's own is left to the user.
func TestEncryptionKey(t *testing.T) {
	n := newNode(t)
	n.put(t, n.env.Args("kube-apiserver"), "--encryption-provider-config="+encryption.Argument+"\n")
	if err := os.RemoveAll(encryption.Path(n.env)); err != nil { // the installation's
		t.Fatal(err)
	}
	n.prepare(t, "kubelite")
	made := read(t, encryption.Path(n.env))
	if _, err := encryption.Parse([]byte(made)); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(n.log.String(), "a new one is made") {
		t.Error("not said:", n.log.String())
	}
	n.again()
	n.prepare(t, "kubelite")
	if read(t, encryption.Path(n.env)) != made {
		t.Error("the key was replaced")
	}
	remove(t, encryption.Path(n.env))
	n.put(t, n.env.Args("kube-apiserver"), "--encryption-provider-config=/etc/mine.yaml\n")
	n.again()
	n.prepare(t, "kubelite")
	if _, err := os.Stat(encryption.Path(n.env)); err == nil {
		t.Error("a key was made that nothing names")
	}
}

func TestFailureDomain(t *testing.T) {
	n := newNode(t)
	n.put(t, n.env.Args("ha-conf"), "# which rack\nfailure-domain=42\n")
	n.prepare(t, "kubelite")
	if got := read(t, filepath.Join(n.env.Backend(), "failure-domain")); got != "42\n" {
		t.Errorf("failure-domain is %q", got)
	}
}

func TestReaddress(t *testing.T) {
	const own, lost, other = "10.0.0.1:19001", "10.0.0.9:19001", "10.0.0.2:19001"
	entry := func(address string) string { return "- {Address: \"" + address + "\", ID: 1, Role: 0}\n" }
	for _, tc := range []struct {
		name, address, cluster string
		more                   []string
		moves                  bool
	}{
		{name: "never joined", address: "127.0.0.1:19001", cluster: entry("127.0.0.1:19001")},
		{name: "its own address", address: own, cluster: entry(own)},
		{name: "a lost one", address: lost, cluster: entry(lost), moves: true},
		{name: "a lost one, IPv6", address: "[fd00::9]:19001", cluster: entry("[fd00::9]:19001"), moves: true},
		{name: "a lost one, with others", address: lost, cluster: entry(lost) + entry(other)},
		{name: "while it joins", address: lost, cluster: entry(lost), more: []string{"join"}},
		{name: "while it moves", address: lost, cluster: entry(lost), more: []string{"update.yaml"}},
		{name: "files that disagree", address: lost, cluster: entry(other)},
		{name: "broken files", address: lost, cluster: "}"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t)
			n.Addresses = func() ([]net.IP, error) { return []net.IP{net.ParseIP("10.0.0.1")}, nil }
			dir := n.env.BackendLive()
			n.put(t, filepath.Join(dir, "info.yaml"), "Address: \""+tc.address+"\"\nID: 1\nRole: 0\n")
			n.put(t, filepath.Join(dir, "cluster.yaml"), tc.cluster)
			for _, name := range tc.more {
				n.put(t, filepath.Join(dir, name), "")
			}
			n.prepare(t, "k8s-dqlite")
			data, err := os.ReadFile(filepath.Join(dir, "update.yaml"))
			if moved := err == nil && len(data) > 0; moved != tc.moves || moved && string(data) != "Address: 127.0.0.1:19001\n" {
				t.Errorf("update.yaml: %q, %v", data, err)
			}
		})
	}
}

func TestEnvironmentFiles(t *testing.T) {
	n := newNode(t)
	n.put(t, n.env.Args("kubelite-env"), "HTTPS_PROXY=http://p\nexport PATH=\"/mine:$PATH\"\nLANG=de\n")
	n.put(t, n.env.Args("fips-env"), "GOFIPS=1\n")
	cmd := n.prepare(t, "kubelite")
	for _, want := range []string{"HTTPS_PROXY=http://p", "GOFIPS=1", "LANG=de"} {
		if !slices.Contains(cmd.Env, want) {
			t.Errorf("the environment lacks %s", want)
		}
	}
	seen := map[string]bool{}
	for _, kv := range cmd.Env {
		k, v, _ := strings.Cut(kv, "=")
		if seen[k] {
			t.Errorf("%s is there twice", k)
		}
		seen[k] = true
		if k == "PATH" && (!strings.HasPrefix(v, "/mine:"+n.env.Snap) || !strings.HasSuffix(v, ":/bin")) {
			t.Errorf("PATH is %s", v)
		}
	}
}

func TestWaitForContainerd(t *testing.T) {
	n := newNode(t)
	remove(t, n.env.ContainerdSocket())
	ended := make(chan error, 1)
	go func() { ended <- n.waitForSocket(t.Context(), n.env.ContainerdSocket(), time.Hour) }()
	n.put(t, filepath.Join(n.env.RunDir(), "another"), "")
	n.put(t, n.env.ContainerdSocket(), "")
	if err := <-ended; err != nil {
		t.Error(err)
	}
	remove(t, n.env.ContainerdSocket())
	if err := n.waitForSocket(t.Context(), n.env.ContainerdSocket(), time.Millisecond); err != nil {
		t.Errorf("after the limit: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := n.waitForSocket(ctx, n.env.ContainerdSocket(), time.Hour); !errors.Is(err, context.Canceled) {
		t.Errorf("when asked to stop: %v", err)
	}
}

func TestHostIsProbedOnce(t *testing.T) {
	n := newNode(t)
	n.Host = &hostprobe.Host{BootID: "given"}
	if got := n.host().BootID; got != "given" {
		t.Errorf("BootID = %q", got)
	}
}

// TestServicesOutlivePods has a score for every service, below that of a guaranteed pod (-997).
func TestServicesOutlivePods(t *testing.T) {
	file := filepath.Join(t.TempDir(), "oom_score_adj")
	for _, name := range []string{"containerd", "k8s-dqlite", "kubelite", "cluster-agent", "apiserver-proxy"} {
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := protect(file, name); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(file)
		if score, bad := strconv.Atoi(string(text)); err != nil || bad != nil || score >= -997 {
			t.Errorf("%s has the score %q (%v)", name, text, err)
		}
	}
	if err := protect(filepath.Join(t.TempDir(), "nonesuch", "file"), "kubelite"); err == nil {
		t.Error("a score that cannot be written is not reported")
	}
}

// TestOwnAddress has a worker come back with another address, and nodes whose address is none of the start's business.
func TestOwnAddress(t *testing.T) {
	const file = "--node-ip=192.0.2.7\n"
	for _, tc := range []struct {
		name   string
		worker bool
		host   string // its address now
		own    string // an address of an interface
		want   string
	}{
		{"a worker with another address", true, "192.0.2.8", "192.0.2.8", "192.0.2.8"},
		{"a worker with its address, and a default route elsewhere", true, "198.51.100.9", "192.0.2.7", "192.0.2.7"},
		{"a worker that has no address yet", true, "", "198.51.100.1", "192.0.2.7"},
		{"a control plane", false, "192.0.2.8", "192.0.2.8", "192.0.2.7"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t)
			n.put(t, n.env.Args("kubelet"), file)
			n.Host = &hostprobe.Host{Address: tc.host}
			n.Addresses = func() ([]net.IP, error) { return []net.IP{net.ParseIP(tc.own)}, nil }
			config := nodeconfig.Load(n.env)
			config.Worker = tc.worker
			if err := n.ownAddress(config); err != nil {
				t.Fatal(err)
			}
			if got := nodeconfig.Load(n.env).NodeIPs; len(got) != 1 || got[0].String() != tc.want {
				t.Errorf("--node-ip is %v, want %s", got, tc.want)
			}
		})
	}
}
