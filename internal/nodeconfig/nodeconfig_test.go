package nodeconfig

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"microk8s/internal/args"
	"microk8s/internal/snapenv"
)

func node(t *testing.T, files map[string]string, locks ...string) snapenv.Env {
	t.Helper()
	env := snapenv.Under(t.TempDir())
	for _, dir := range []string{env.ArgsDir(), env.LocksDir()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range files {
		if err := os.WriteFile(env.Args(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range locks {
		if err := os.WriteFile(env.Lock(name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return env
}

func host(name string) func() (string, error) {
	return func() (string, error) { return name, nil }
}

// TestShippedArguments reads the default argument files: they mean what the constants say.
func TestShippedArguments(t *testing.T) {
	files := map[string]string{}
	for _, name := range []string{Kubelet, KubeProxy, APIServer, agentFile} {
		data, err := os.ReadFile(filepath.Join("../../snap/local/default-args", name))
		if err != nil {
			t.Fatal(err)
		}
		files[name] = string(data)
	}
	shipped, bare := load(node(t, files), host("n1")), load(node(t, nil), host("n1"))
	for _, c := range []Config{shipped, bare} {
		if err := c.Err(); err != nil {
			t.Error(err)
		}
		got := fmt.Sprintf("%s %d %v 0.0.0.0:%d %v %s", c.NodeName, c.APIServer.Port, c.APIServer.ServiceCIDRs, c.AgentPort, c.Datastore.Own(), c.ClusterDomain)
		if want := "n1 16443 [10.152.183.0/24] " + DefaultAgentBind + " true cluster.local"; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	if c := shipped.ClusterCIDRs; len(c) != 1 || c[0].String() != "10.1.0.0/16" {
		t.Errorf("pods: %v", c)
	}
}

func TestValues(t *testing.T) {
	env := node(t, map[string]string{
		Kubelet:   "--node-ip=10.0.0.1,fd00::1\n--cluster-domain=\"example.org\"\n",
		KubeProxy: "--cluster-cidr=10.1.0.0/16,fd01::/64\n",
		APIServer: "--secure-port 6443\n--service_cluster_ip_range=10.3.0.0/16,fd02::/112\n--authorization-mode=Node,RBAC\n" +
			"--kubelet-preferred-address-types=InternalIP,Hostname\n",
		agentFile: "--bind=[::]:26000\n",
	})
	c := load(env, host("n1"))
	if err := c.Err(); err != nil {
		t.Error(err)
	}
	got := fmt.Sprintf("%v %v %v %v %d", c.NodeIPs, c.ClusterDomain, c.ClusterCIDRs, c.APIServer, c.AgentPort)
	want := "[10.0.0.1 fd00::1] example.org [10.1.0.0/16 fd01::/64] {6443 [10.3.0.0/16 fd02::/112] Node,RBAC  [InternalIP Hostname]} 26000"
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// TestUnusable holds that a wrong value is reported with file, flag and value for its part, and
// that the field is usable all the same.
func TestUnusable(t *testing.T) {
	c := load(node(t, map[string]string{
		Kubelet:   "--node-ip=here\n",
		KubeProxy: "--cluster-cidr=10.1.0.0/33\n",
		APIServer: "--secure-port=0\n--service-cluster-ip-range=10.152.183.0\n",
		agentFile: "--bind=0.0.0.0\n",
	}), host("n1"))
	for part, want := range map[Part]string{
		PartNodeIP: "--node-ip=here in ", PartClusterCIDRs: "--cluster-cidr=10.1.0.0/33 in ", PartAPIPort: "--secure-port=0 in ",
		PartServiceCIDRs: "--service-cluster-ip-range=10.152.183.0 in ", PartAgent: "--bind=0.0.0.0 in ",
	} {
		if err := c.Err(part); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", part, err, want)
		}
		if err := c.Err(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s is not among all: %v", part, err)
		}
	}
	if err := c.Err(PartName); err != nil {
		t.Error(err)
	}
	if got := fmt.Sprint(c.APIServer.Port, c.APIServer.ServiceCIDRs, c.AgentPort, c.ClusterCIDRs, c.NodeIPs); got != "16443 [10.152.183.0/24] 25000 [] []" {
		t.Error(got)
	}

	c = load(node(t, map[string]string{APIServer: "--secure-port=6443\n\x01\n"}), host("n1"))
	if c.Err(PartAPIPort) != nil || c.APIServer.Port != DefaultAPIServerPort {
		t.Errorf("a damaged file is not one without flags: %v, port %d", c.Err(PartAPIPort), c.APIServer.Port)
	}
	var bad *args.SyntaxError
	if !errors.As(c.Err(), &bad) {
		t.Errorf("a damaged file is not reported: %v", c.Err())
	}
}

func TestNodeName(t *testing.T) {
	long := strings.Repeat("a", 63)
	for _, tc := range []struct {
		name, host, kubelet, proxy string
		want                       string // "" for an error
		message                    string // part of it
	}{
		{"the host's", "node-1", "", "", "node-1", ""},
		{"in lower case", " Node-1.Example.ORG", "", "", "node-1.example.org", ""},
		{"of the kubelet", "node-1", "--hostname-override=Blue\n", "", "blue", ""},
		{"the last one counts", "node-1", "--hostname-override=a\n--hostname-override=b\n", "", "b", ""},
		{"an empty one does not", "node-1", "--hostname-override=\n", "", "node-1", ""},
		{"of both", "node-1", "--hostname-override=blue\n", "--hostname-override=Blue\n", "blue", ""},
		{"of kube-proxy, the same", "node-1", "", "--hostname-override=node-1\n", "node-1", ""},
		{"of kube-proxy alone", "node-1", "", "--hostname-override=blue\n", "", "is not the name of this node, node-1; remove it there"},
		{"they differ", "node-1", "--hostname-override=blue\n", "--hostname-override=red\n", "", "is not the name of this node, blue"},
		{"of the greatest length", long, "", "", long, ""},
		{"too long for the label", long + "a", "", "", "", "63"},
		{"underscore", "my_host", "", "", "", "hostnamectl set-hostname"},
		{"an override corrects it", "my_host", "--hostname-override=my-host\n", "", "my-host", ""},
		{"a wrong override", "node-1", "--hostname-override=-x-\n", "", "", "--hostname-override in "},
		{"nothing left", " ", "", "", "", "cannot be the name of a node"},
		{"umlaut", "müller", "", "", "", `"müller" cannot be the name of a node`},
		{"a damaged file", "node-1", "--hostname-override=blue\n\x01", "", "node-1", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			files := map[string]string{}
			if tc.kubelet != "" {
				files[Kubelet] = tc.kubelet
			}
			if tc.proxy != "" {
				files[KubeProxy] = tc.proxy
			}
			env := node(t, files)
			got, err := NodeName(env, host(tc.host))
			if got != tc.want || (err == nil) != (tc.want != "") || err != nil && (!strings.Contains(err.Error(), tc.message) || !strings.Contains(err.Error(), "microk8s start")) {
				t.Errorf("got %q, %v; want %q, an error with %q", got, err, tc.want, tc.message)
			}
			c := load(env, host(tc.host))
			if c.NodeName != got || fmt.Sprint(c.Err(PartName)) != fmt.Sprint(err) {
				t.Errorf("Load has %q, %v", c.NodeName, c.Err(PartName))
			}
		})
	}
}

func TestDatastore(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		locks      []string
		want       Owner
		endpoints  []string
	}{
		{"no file", "", nil, OwnDatastore, nil},
		{"own", "--etcd-servers=\"" + OwnEtcdServers + "\"\n", nil, OwnDatastore, nil},
		{"no flag", "--secure-port=16443\n", nil, OwnDatastore, nil},
		{"another flag", "--etcd-servers-overrides=/events#https://10.0.0.9:2379\n", nil, OwnDatastore, nil},
		{"one", "--etcd-servers=https://10.0.0.1:2379\n", nil, ExternalEtcd, []string{"10.0.0.1:2379"}},
		{"three", "--etcd-servers \"https://a:2379,https://b:2379/,http://[fd00::1]:2379\"\n", nil, ExternalEtcd, []string{"a:2379", "b:2379", "[fd00::1]:2379"}},
		{"nothing", "--etcd-servers=\n", nil, OwnDatastore, nil},
		{"switched off", "", []string{snapenv.LockNoDqlite}, NoDatastore, nil},
		{"one, after a join", "--etcd-servers=https://10.0.0.1:2379\n", []string{snapenv.LockNoDqlite}, ExternalEtcd, []string{"10.0.0.1:2379"}},
		{"worker", "--etcd-servers=https://10.0.0.1:2379\n", []string{snapenv.LockWorker, snapenv.LockNoDqlite}, NoDatastore, nil},
	} {
		files := map[string]string{}
		if tc.text != "" {
			files[APIServer] = tc.text
		}
		d := load(node(t, files, tc.locks...), host("n1")).Datastore
		if d.Owner != tc.want || !slices.Equal(d.Endpoints, tc.endpoints) || d.Own() != (tc.want == OwnDatastore) {
			t.Errorf("%s: %+v; want %v, %q", tc.name, d, tc.want, tc.endpoints)
		}
	}
	env := node(t, map[string]string{APIServer: "--etcd-servers=https://a:2379\n--etcd-cafile=${SNAP_DATA}/certs/remote-etcd-ca.crt\n"})
	if d := Load(env).Datastore; d.Servers != "https://a:2379" || d.CAFile != env.Cert("remote-etcd-ca.crt") || d.CertFile != "" {
		t.Errorf("%+v", d)
	}
}

// TestLocks holds that each lock has one meaning, and each meaning one lock.
func TestLocks(t *testing.T) {
	field := map[string]func(State) bool{
		"installed.lock": func(s State) bool { return s.Installed }, "stopped.lock": func(s State) bool { return s.Stopped },
		"lite.lock": func(s State) bool { return s.Kubelite }, "ha-cluster": func(s State) bool { return s.HA },
		"clustered.lock": func(s State) bool { return s.Worker }, "no-cert-reissue": func(s State) bool { return s.Clustered },
		"join-in-progress": func(s State) bool { return s.Changing }, "reset-in-progress": func(s State) bool { return s.Resetting }, "low-memory-guard.lock": func(s State) bool { return s.LowMemory },
		"cis-hardening": func(s State) bool { return s.RootOnly }, "no-cni-reload": func(s State) bool { return s.KeepPods },
		"no-arg-sanitisation": func(s State) bool { return s.KeepObsoleteArgs }, "skip-aio-tune.lock": func(s State) bool { return s.KeepAIO },
		"skip-inotify-tune.lock": func(s State) bool { return s.KeepInotify }, "no-k8s-dqlite": func(s State) bool { return s.datastoreOff },
	}
	for name := range field {
		env := node(t, nil)
		if s := ReadState(env); s != (State{}) {
			t.Fatalf("without locks: %+v", s)
		}
		if err := Lock(env, name); err != nil {
			t.Fatal(err)
		}
		s := ReadState(env)
		for other, is := range field {
			if is(s) != (other == name) {
				t.Errorf("the lock %s: the field of %s is %v", name, other, is(s))
			}
		}
		if err := Unlock(env, name, name); err != nil || ReadState(env) != (State{}) {
			t.Errorf("unlock %s: %v", name, err)
		}
	}
}

func TestEdit(t *testing.T) {
	const text = "# mine\n--v=2   --x=\"a\"\n"
	env := node(t, map[string]string{Kubelet: text})
	read := func(name string) string {
		data, _ := os.ReadFile(env.Args(name))
		return string(data)
	}
	if changed, err := SetFlags(env, Kubelet, map[string]string{"v": "2", "none": ""}); changed || err != nil || read(Kubelet) != text || read("kubelet.backup") != "" {
		t.Errorf("a change that is none: %v, %v, %q", changed, err, read(Kubelet))
	}
	if changed, err := SetFlags(env, Kubelet, map[string]string{"x": "", "node-ip": "10.0.0.1", "cluster-dns": "10.0.0.2"}); !changed || err != nil {
		t.Fatal(changed, err)
	}
	if got, want := read(Kubelet), "# mine\n--v=2\n--cluster-dns=10.0.0.2\n--node-ip=10.0.0.1\n"; got != want || read("kubelet.backup") != text {
		t.Errorf("got %q, want %q", got, want)
	}
	if changed, err := SetFlags(env, "new-file", map[string]string{"a": "b"}); !changed || err != nil || read("new-file") != "--a=b\n" {
		t.Errorf("a new file: %v, %v, %q", changed, err, read("new-file"))
	}
	before := read(Kubelet)
	if _, err := SetFlags(env, Kubelet, map[string]string{"a": "b", "x": "two words\nand lines"}); err == nil || read(Kubelet) != before {
		t.Errorf("a value that cannot be written: %v, %q", err, read(Kubelet))
	}
}

// TestEditsDoNotLoseEachOther has many edits at the same time, as the agent and the command line
// make them.
func TestEditsDoNotLoseEachOther(t *testing.T) {
	env := node(t, nil)
	var all sync.WaitGroup
	const n = 20
	for i := range n {
		all.Go(func() {
			if _, err := SetFlags(env, Kubelet, map[string]string{fmt.Sprintf("flag-%d", i): "x"}); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	f, err := File(env, Kubelet)
	if err != nil || len(f.Flags()) != n {
		t.Errorf("%v; %d flags are left of %d", err, len(f.Flags()), n)
	}
}
