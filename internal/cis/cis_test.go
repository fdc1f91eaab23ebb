package cis

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"

	"microk8s/internal/args"
	"microk8s/internal/kubelitestate"
	"microk8s/internal/pki/pkitest"
	"microk8s/internal/setup"
	"microk8s/internal/snapenv"
)

// installed is a new node in a temporary folder, as the package's own installation makes it.
func installed(t *testing.T) *Node {
	t.Helper()
	env := snapenv.Under(t.TempDir())
	shipped := "../../snap/local/default-args"
	if other := os.Getenv("CIS_DEFAULT_ARGS"); other != "" { // those of another release, to compare
		shipped = other
	}
	if err := os.CopyFS(env.DefaultArgs(), os.DirFS(shipped)); err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string]string{
		"etc/group": "root:x:0:\n", "etc/gshadow": "root:*::\n", "proc/meminfo": "MemTotal: 4000000 kB\n", "var/lib/x": "",
	} {
		write(t, env.HostPath(path), text, 0o644)
	}
	now := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	in := &setup.Installer{
		Env: env, Maker: pkitest.Maker(func() time.Time { return now }),
		Hostname:  func() (string, error) { return "n1", nil },
		Addresses: func() ([]net.IP, error) { return []net.IP{net.IPv4(10, 0, 0, 5)}, nil },
	}
	if err := in.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	write(t, env.DatastoreSocket(), "", 0o600) // stands for the socket; its mode is looked at
	return &Node{Env: env, Bindings: bindings("cluster-admin"), Get: lists(nil)}
}

// lists stands for the API server of a new cluster, with other lists by their resources' names.
func lists(more map[string]string) func(context.Context, string) ([]byte, error) {
	items := map[string]string{
		"clusterroles": `{"metadata":{"name":"cluster-admin","labels":{"kubernetes.io/bootstrapping":"rbac-defaults"}},"rules":[{"apiGroups":["*"],"resources":["*"],"verbs":["*"]}]},
			{"metadata":{"name":"edit","labels":{"kubernetes.io/bootstrapping":"rbac-defaults"}},"rules":[{"apiGroups":[""],"resources":["secrets"],"verbs":["get"]}]},
			{"metadata":{"name":"makes-pods"},"rules":[{"apiGroups":[""],"resources":["pods"],"verbs":["create"]}]}`,
		"clusterrolebindings": `{"metadata":{"name":"cluster-admin"},"roleRef":{"kind":"ClusterRole","name":"cluster-admin"},"subjects":[{"kind":"Group","name":"system:masters"}]},
			{"metadata":{"name":"system:x"},"roleRef":{"kind":"ClusterRole","name":"makes-pods"},"subjects":[{"kind":"ServiceAccount","name":"x","namespace":"kube-system"}]}`,
		"namespaces": `{"metadata":{"name":"default"}},{"metadata":{"name":"kube-system"}}`,
		"pods":       `{"metadata":{"name":"coredns","namespace":"kube-system"},"spec":{"serviceAccountName":"coredns"}}`,
	}
	maps.Copy(items, more)
	return func(_ context.Context, path string) ([]byte, error) {
		resource := path[strings.LastIndexByte(path, '/')+1:]
		return []byte(`{"items":[` + items[resource] + `]}`), nil
	}
}

// TestClusterControls shows what section 5 finds in clusters that are used.
func TestClusterControls(t *testing.T) {
	n := installed(t)
	find := func(id string) Result {
		for _, r := range Run(t.Context(), n) {
			if r.ID == id {
				return r
			}
		}
		t.Fatalf("there is no control %s", id)
		return Result{}
	}
	const ann = `{"metadata":{"name":"of-ann"},"roleRef":{"kind":"ClusterRole","name":"ROLE"},"subjects":[{"kind":"User","name":"ann"}]}`
	pod := func(spec string) string {
		return `{"metadata":{"name":"p","namespace":"shop"},"spec":` + spec + `}`
	}
	for _, c := range []struct{ id, resource, items, found string }{
		{"5.1.2", "clusterrolebindings", strings.Replace(ann, "ROLE", "edit", 1), "ann (of-ann)"},
		{"5.1.4", "clusterrolebindings", strings.Replace(ann, "ROLE", "makes-pods", 1), "ann (of-ann)"},
		{"5.1.13", "clusterrolebindings", strings.Replace(ann, "ROLE", "cluster-admin", 1), "ann (of-ann)"},
		{"5.1.2", "rolebindings", `{"metadata":{"name":"b","namespace":"shop"},"roleRef":{"kind":"ClusterRole","name":"edit"},"subjects":[{"kind":"ServiceAccount","name":"ci","namespace":"shop"}]}`, "ci (shop/b)"},
		{"5.1.3", "roles", `{"metadata":{"name":"all","namespace":"shop"},"rules":[{"apiGroups":[""],"resources":["pods"],"verbs":["*"]}]}`, "shop/all"},
		{"5.1.5", "rolebindings", `{"metadata":{"name":"b","namespace":"shop"},"roleRef":{"kind":"ClusterRole","name":"x"},"subjects":[{"kind":"ServiceAccount","name":"default","namespace":"shop"}]}`, "binding shop/b"},
		{"5.1.5", "pods", pod(`{"serviceAccountName":"default","volumes":[{"name":"t","projected":{"sources":[{"serviceAccountToken":{"path":"token"}}]}}]}`), "pod shop/p"},
		{"5.3.2", "pods", pod(`{}`), "none in shop"},
		{"5.4.1", "pods", pod(`{"containers":[{"env":[{"name":"A","valueFrom":{"secretKeyRef":{"name":"s","key":"k"}}}]}]}`), "shop/p"},
		{"5.6.4", "pods", `{"metadata":{"name":"p","namespace":"default"},"spec":{}}`, "p"},
		{"5.2.2", "namespaces", `{"metadata":{"name":"default"}}`, "not refused in default"},
		{"5.2.8", "namespaces", `{"metadata":{"name":"default","labels":{"pod-security.kubernetes.io/enforce":"baseline"}}}`, "not refused in default"},
	} {
		n.Get = lists(map[string]string{c.resource: c.items})
		if r := find(c.id); r.Status != Manual || r.Found != c.found || r.Reason == "" {
			t.Errorf("%s with %s: %+v", c.id, c.items, r)
		}
	}
	n.Get = lists(map[string]string{"namespaces": `{"metadata":{"name":"default","labels":{"pod-security.kubernetes.io/enforce":"baseline"}}},{"metadata":{"name":"kube-system"}}`})
	if r := find("5.2.2"); r.Status != Pass {
		t.Errorf("where baseline is enforced: %+v", r)
	}
	// A cluster with one of everything: no control of the cluster passes.
	n.Get = lists(map[string]string{
		"clusterrolebindings": strings.Replace(ann, "ROLE", "cluster-admin", 1) + "," + strings.Replace(strings.Replace(ann, "ROLE", "x", 1), `"kind":"User","name":"ann"`, `"kind":"ServiceAccount","name":"default","namespace":"shop"`, 1),
		"roles":               `{"metadata":{"name":"all","namespace":"shop"},"rules":[{"apiGroups":[""],"resources":["*"],"verbs":["get"]}]}`,
		"namespaces":          `{"metadata":{"name":"default"}}`,
		"pods":                `{"metadata":{"name":"p","namespace":"default"},"spec":{"containers":[{"envFrom":[{"secretRef":{"name":"s"}}]}]}}`,
	})
	for _, r := range Run(t.Context(), n) {
		if strings.HasPrefix(r.ID, "5.") && r.Status == Pass && !slices.Contains([]string{"5.1.1", "5.2.1", "5.3.1", "5.6.2"}, r.ID) {
			t.Errorf("%s passes in a cluster with everything: %s", r.ID, r.Found)
		}
	}
	// A right to one object is no right to all.
	n.Get = lists(map[string]string{"roles": `{"metadata":{"name":"one","namespace":"shop"},"rules":[{"apiGroups":[""],"resources":["secrets"],"resourceNames":["a"],"verbs":["get"]}]}`,
		"rolebindings": `{"metadata":{"name":"b","namespace":"shop"},"roleRef":{"kind":"Role","name":"one"},"subjects":[{"kind":"User","name":"ann"}]}`})
	if r := find("5.1.2"); r.Status != Pass {
		t.Errorf("a right to one Secret: %+v", r)
	}
	asked := 0
	n.Get = func(context.Context, string) ([]byte, error) { asked++; return nil, errors.New("silent") }
	if r := find("5.1.2"); r.Status != Manual || r.Found != "the API server did not answer" || asked != 1 {
		t.Errorf("a silent API server, asked %d times: %+v", asked, r)
	}
}

func bindings(names ...string) func(context.Context) ([]rbacv1.ClusterRoleBinding, error) {
	return func(context.Context) (out []rbacv1.ClusterRoleBinding, err error) {
		for _, n := range names {
			b := rbacv1.ClusterRoleBinding{RoleRef: rbacv1.RoleRef{Name: "cluster-admin"}}
			b.Name = n
			out = append(out, b)
		}
		return out, nil
	}
}

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

func set(t *testing.T, n *Node, service, name, value string) {
	t.Helper()
	f, err := args.Load(n.Env.Args(service), args.GrammarFor(service))
	if err != nil {
		t.Fatal(err)
	}
	if value == "" {
		f.Unset(name)
	} else if err := f.Set(name, value); err != nil {
		t.Fatal(err)
	}
	if err := f.Save(n.Env.Args(service)); err != nil {
		t.Fatal(err)
	}
}

// snapshot returns what puts everything below some folders back.
func snapshot(t *testing.T, roots ...string) (restore func()) {
	t.Helper()
	type entry struct {
		mode os.FileMode
		data []byte
	}
	saved := map[string]entry{}
	for _, root := range roots {
		root, err := filepath.EvalSymlinks(root)
		if err != nil {
			t.Fatal(err)
		}
		err = filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
			if err != nil || d.Type()&os.ModeSymlink != 0 {
				return err
			}
			st, err := d.Info()
			e := entry{mode: st.Mode().Perm()}
			if err == nil && !d.IsDir() {
				e.data, err = os.ReadFile(path)
			}
			saved[path] = e
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return func() {
		for path, e := range saved {
			if now, err := os.ReadFile(path); e.data != nil && (err != nil || !bytes.Equal(now, e.data)) {
				write(t, path, string(e.data), e.mode)
			}
			if err := os.Chmod(path, e.mode); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestNewNode(t *testing.T) {
	results := Run(t.Context(), installed(t))
	for _, r := range results {
		if r.Status == Fail {
			t.Errorf("%s %s: wanted %s, found %s", r.ID, r.Title, r.Wanted, r.Found)
		}
		if r.Status == Fail && r.Do == "" {
			t.Errorf("%s fails, and nothing says what to do", r.ID)
		}
		if (r.Status == Accepted || r.Status == None || r.Status == Manual) && r.Reason == "" {
			t.Errorf("%s is %s without a reason", r.ID, r.Status)
		}
	}
	t.Log(Count(results))
}

// TestHardened shows that the lock cis-hardening leaves no file to the group.
func TestHardened(t *testing.T) {
	n := installed(t)
	write(t, n.Env.Lock(snapenv.LockCIS), "", 0o600)
	if err := (&setup.Installer{Env: n.Env, Maker: pkitest.Maker(nil), Hostname: func() (string, error) { return "n1", nil },
		Addresses: func() ([]net.IP, error) { return []net.IP{net.IPv4(10, 0, 0, 5)}, nil }}).Configure(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, r := range Run(t.Context(), n) {
		if r.Reason == groupReason {
			t.Errorf("%s: %s", r.ID, r.Found)
		}
		if strings.HasPrefix(r.ID, "1.1.") && r.Status == Fail {
			t.Errorf("%s: %s", r.ID, r.Found)
		}
	}
}

func TestWorker(t *testing.T) {
	n := installed(t)
	write(t, n.Env.Lock(snapenv.LockWorker), "", 0o600)
	for _, r := range Run(t.Context(), n) {
		if applies := strings.HasPrefix(r.ID, "4.") || r.ID == "M.1" || r.ID == "M.2"; !applies && r.Status != None {
			t.Errorf("%s is %s on a worker", r.ID, r.Status)
		}
	}
}

// TestEachCanFail takes what each control wants away from a new node.
func TestEachCanFail(t *testing.T) {
	flags := func(service, name, value string) func(*testing.T, *Node) {
		return func(t *testing.T, n *Node) { set(t, n, service, name, value) }
	}
	loose := func(path func(snapenv.Env) string) func(*testing.T, *Node) {
		return func(t *testing.T, n *Node) {
			if err := os.Chmod(path(n.Env), 0o777); err != nil {
				t.Fatal(err)
			}
		}
	}
	argument := func(name string) func(*testing.T, *Node) {
		return loose(func(e snapenv.Env) string { return e.Args(name) })
	}
	secret := func(name string) func(*testing.T, *Node) {
		return loose(func(e snapenv.Env) string { return e.Credential(name) })
	}
	file := func(name, text string) func(*testing.T, *Node) {
		return func(t *testing.T, n *Node) { write(t, n.Env.Args(name), text, 0o600) }
	}
	backend := func(name string) func(*testing.T, *Node) {
		return func(t *testing.T, n *Node) {
			if err := os.Remove(filepath.Join(n.Env.BackendLive(), name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	breaks := map[string]func(*testing.T, *Node){
		"1.1.1": argument(apiServer), "1.1.2": argument(apiServer), "1.1.3": argument(manager), "1.1.4": argument(manager),
		"1.1.5": argument(scheduler), "1.1.6": argument(scheduler), "1.1.7": argument("k8s-dqlite"), "1.1.8": argument("k8s-dqlite"),
		"1.1.11": loose(snapenv.Env.BackendLive), "1.1.13": secret("client.config"), "1.1.14": secret("client.config"),
		"1.1.15": secret("scheduler.config"), "1.1.16": secret("scheduler.config"), "1.1.17": secret("controller.config"), "1.1.18": secret("controller.config"),
		"1.1.19": loose(snapenv.Env.CertsDir), "1.1.20": loose(func(e snapenv.Env) string { return e.Cert("server.crt") }), "1.1.21": loose(func(e snapenv.Env) string { return e.Cert("ca.key") }),
		"1.2.1": flags(apiServer, "authentication-config", ""), "1.2.2": flags(apiServer, "token-auth-file", "/x"), "1.2.4": flags(apiServer, "kubelet-client-key", ""),
		"1.2.5": flags(apiServer, "kubelet-certificate-authority", "/nowhere"), "1.2.6": flags(apiServer, "authorization-mode", "RBAC,AlwaysAllow"), "1.2.7": flags(apiServer, "authorization-mode", "RBAC"),
		"1.2.8": flags(apiServer, "authorization-mode", "Node"), "1.2.9": flags(apiServer, "enable-admission-plugins", "NodeRestriction"), "1.2.10": flags(apiServer, "enable-admission-plugins", "AlwaysAdmit"),
		"1.2.12": flags(apiServer, "disable-admission-plugins", "ServiceAccount"), "1.2.13": flags(apiServer, "disable-admission-plugins", "NamespaceLifecycle"), "1.2.14": flags(apiServer, "enable-admission-plugins", "EventRateLimit"),
		"1.2.15": flags(apiServer, "profiling", ""), "1.2.16": flags(apiServer, "audit-log-path", ""), "1.2.17": flags(apiServer, "audit-log-maxage", "1"), "1.2.18": flags(apiServer, "audit-log-maxbackup", ""),
		"1.2.19": flags(apiServer, "audit-log-maxsize", "none"), "1.2.20": flags(apiServer, "request-timeout", "0"), "1.2.21": flags(apiServer, "service-account-lookup", "false"),
		"1.2.22": flags(apiServer, "service-account-key-file", ""), "1.2.23": loose(snapenv.Env.DatastoreSocket), "1.2.24": flags(apiServer, "tls-cert-file", ""), "1.2.25": flags(apiServer, "client-ca-file", ""),
		"1.2.26": flags(apiServer, "etcd-servers", "http://10.0.0.9:2379"), "1.2.27": flags(apiServer, "encryption-provider-config", ""), "1.2.28": flags(apiServer, "encryption-provider-config", ""),
		"1.2.3": flags(apiServer, "enable-admission-plugins", "NodeRestriction"), "1.2.29": flags(apiServer, "tls-cipher-suites", "TLS_RSA_WITH_AES_128_CBC_SHA"), "1.2.30": flags(apiServer, "service-account-extend-token-expiration", ""),
		"1.3.1": flags(manager, "terminated-pod-gc-threshold", "0"), "1.3.2": flags(manager, "profiling", "true"), "1.3.3": flags(manager, "use-service-account-credentials", ""), "1.3.4": flags(manager, "service-account-private-key-file", ""),
		"1.3.5": flags(manager, "root-ca-file", ""), "1.3.6": flags(manager, "feature-gates", "RotateKubeletServerCertificate=false"), "1.3.7": flags(manager, "bind-address", "0.0.0.0"),
		"1.4.1": flags(scheduler, "profiling", ""), "1.4.2": flags(scheduler, "bind-address", ""),
		"2.1": loose(snapenv.Env.DatastoreSocket), "2.2": loose(snapenv.Env.DatastoreSocket), "2.4": backend("cluster.key"), "2.5": backend("cluster.crt"),
		"2.7": func(t *testing.T, n *Node) {
			data, err := os.ReadFile(n.Env.Cert("ca.crt"))
			if err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(n.Env.BackendLive(), "cluster.crt"), string(data), 0o600)
		},
		"3.2.1": flags(apiServer, "audit-policy-file", ""),
		"3.2.2": file("audit-policy.yaml", "apiVersion: audit.k8s.io/v1\nkind: Policy\nrules: [{level: RequestResponse}]\n"),
		"4.1.1": argument(kubelet), "4.1.2": argument(kubelet), "4.1.3": secret("proxy.config"), "4.1.4": secret("proxy.config"), "4.1.5": secret("kubelet.config"), "4.1.6": secret("kubelet.config"),
		"4.1.7": loose(func(e snapenv.Env) string { return e.Cert("ca.crt") }), "4.1.8": loose(func(e snapenv.Env) string { return e.Cert("ca.crt") }),
		"4.2.1": flags(kubelet, "anonymous-auth", ""), "4.2.2": flags(kubelet, "authorization-mode", ""), "4.2.3": flags(kubelet, "client-ca-file", ""), "4.2.4": flags(kubelet, "read-only-port", ""),
		"4.2.5": flags(kubelet, "streaming-connection-idle-timeout", "0"), "4.2.8": flags(kubelet, "event-qps", "0"), "4.2.9": flags(kubelet, "tls-cert-file", ""), "4.2.10": flags(kubelet, "rotate-certificates", "false"),
		"4.2.11": flags(kubelet, "feature-gates", "RotateKubeletServerCertificate=false"), "4.2.12": flags(kubelet, "tls-cipher-suites", ""), "4.2.13": flags(kubelet, "pod-max-pids", "-1"), "4.2.14": flags(kubelet, "seccomp-default", ""),
		"4.3.1": flags(proxy, "metrics-bind-address", "0.0.0.0:10249"), "5.2.1": flags(apiServer, "admission-control-config-file", ""), "5.6.2": flags(kubelet, "seccomp-default", "false"),
		"5.3.1": func(t *testing.T, n *Node) {
			write(t, kubelitestate.Path(n.Env), `{"policies":"the kernel does not filter bridged packets"}`, 0o600)
		},
		"M.1": flags(kubelet, "kube-reserved", ""), "M.2": file("containerd-template.toml", "[metrics]\n  address = \"127.0.0.1:1338\"\n"),
		"M.3": file("eventconfig.yaml", "limits:\n  - type: Server\n"),
	}
	// Not by what a test may do to a tree.
	never := map[string]bool{"1.1.9": true, "1.1.10": true, "1.2.11": true, "4.2.7": true, "5.1.1": true}
	n := installed(t)
	restore := snapshot(t, n.Env.Data, n.Env.Common)
	for _, c := range Controls() {
		if c.check == nil || never[c.ID] || breaks[c.ID] == nil && strings.HasPrefix(c.ID, "5.") { // of the cluster: TestClusterControls
			continue
		}
		t.Run(c.ID, func(t *testing.T) {
			spoil := breaks[c.ID]
			if spoil == nil {
				t.Fatal("nothing here makes it fail")
			}
			defer restore()
			spoil(t, n)
			for _, r := range Run(t.Context(), n) {
				if r.ID == c.ID && r.Status != Fail {
					t.Errorf("%s: %s, found %s", c.Title, r.Status, r.Found)
				}
			}
		})
	}
}

// TestForPersons is about controls that a program cannot decide.
func TestForPersons(t *testing.T) {
	n := installed(t)
	get := func(id string) Result {
		t.Helper()
		for _, r := range Run(t.Context(), n) {
			if r.ID == id {
				return r
			}
		}
		t.Fatal("no control ", id)
		return Result{}
	}
	if r := get("5.1.1"); r.Status != Pass {
		t.Errorf("only Kubernetes' own binding: %+v", r)
	}
	n.Bindings = bindings("cluster-admin", "of-a-chart")
	if r := get("5.1.1"); r.Status != Manual || r.Found != "of-a-chart" {
		t.Errorf("a binding of somebody: %+v", r)
	}
	n.Bindings = func(context.Context) ([]rbacv1.ClusterRoleBinding, error) { return nil, errors.New("down") }
	if r := get("5.1.1"); r.Status != Manual || !strings.Contains(r.Found, "did not answer") {
		t.Errorf("the API server is down: %+v", r)
	}
	set(t, n, kubelet, "hostname-override", "other")
	if r := get("4.2.7"); r.Status != Manual {
		t.Errorf("a node with another name: %+v", r)
	}
	if r := get("1.2.11"); r.Status != Accepted {
		t.Errorf("AlwaysPullImages: %+v", r)
	}
}

var update = flag.Bool("update", false, "write docs/cis.md")

// TestDocs keeps docs/cis.md what the table says.
func TestDocs(t *testing.T) {
	const path, from = "../../docs/cis.md", "<!-- table -->\n"
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	head, _, found := strings.Cut(string(data), from)
	if !found {
		t.Fatalf("%s has no mark %q", path, from)
	}
	var b strings.Builder
	b.WriteString(head + from + "| number | title | how it is checked | wanted | new node | why |\n| --- | --- | --- | --- | --- | --- |\n")
	for _, r := range Run(t.Context(), installed(t)) {
		var c Control
		for _, x := range Controls() {
			if x.ID == r.ID {
				c = x
			}
		}
		reason := r.Reason
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s |\n", r.ID, r.Title, c.How, c.Wanted, r.Status, reason)
	}
	if *update {
		write(t, path, b.String(), 0o644)
		return
	}
	if string(data) != b.String() {
		t.Errorf("%s is not what the table says; run: go test ./internal/cis -run TestDocs -update", path)
	}
}

// TestNumbers compares the table's numbers with the edition's: none is left out, none is there twice.
func TestNumbers(t *testing.T) {
	last := map[string]int{"1.1": 21, "1.2": 30, "1.3": 7, "1.4": 2, "2": 7, "3.1": 3, "3.2": 2, "4.1": 10, "4.2": 14, "4.3": 1, "5.1": 13, "5.2": 12, "5.3": 2, "5.4": 2, "5.5": 1, "5.6": 4}
	seen := map[string]int{}
	for _, c := range Controls() {
		if !regexp.MustCompile(`^([1-5](\.[0-9])?|M)\.[0-9]+$`).MatchString(c.ID) {
			t.Errorf("%s is no number", c.ID)
		}
		seen[c.ID]++
	}
	for section, n := range last {
		for i := 1; i <= n; i++ {
			if id := fmt.Sprintf("%s.%d", section, i); seen[id] != 1 {
				t.Errorf("%s is there %d times", id, seen[id])
			}
		}
	}
}
