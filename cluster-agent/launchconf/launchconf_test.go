package launchconf

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"microk8s/internal/journal"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/ranges"
	"microk8s/internal/snapenv"
	"microk8s/internal/token"
	"microk8s/internal/tokenstore"
)

// host is a node whose services and programs are faked.
type host struct {
	*Applier
	ran      []string // programs with their arguments, and what came through standard input
	restarts []string
	fail     string // a program or service that fails
}

func (h *host) Restart(_ context.Context, names ...string) error {
	if names[0] == h.fail {
		return errors.New("it does not start")
	}
	h.restarts = append(h.restarts, names...)
	return nil
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{}
	env := snapenv.Under(t.TempDir())
	for _, dir := range []string{env.ArgsDir(), env.CertsDir(), env.CredentialsDir()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	h.Applier = &Applier{Env: env, Services: h, Log: slog.New(slog.DiscardHandler)}
	h.Run = func(_ context.Context, stdin io.Reader, argv ...string) error {
		line := strings.Join(append([]string{filepath.Base(argv[0])}, argv[1:]...), " ")
		if stdin != nil {
			data, err := io.ReadAll(stdin)
			if err != nil {
				return err
			}
			line += " < " + strings.TrimSpace(string(data))
		}
		if h.fail != "" && strings.Contains(line, h.fail) {
			return errors.New("it says no")
		}
		h.ran = append(h.ran, line)
		return nil
	}
	h.Join = func(ctx context.Context, stdin string, args ...string) error {
		return h.Run(ctx, strings.NewReader(stdin), append([]string{"microk8s"}, args...)...)
	}
	return h
}

func (h *host) put(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(h.Env.Args(name), []byte(text), 0o660); err != nil {
		t.Fatal(err)
	}
}

func (h *host) args(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(h.Env.Args(name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// refusal is how a program ends.
type refusal struct{ code int }

func (r refusal) Error() string { return "exit status" }
func (r refusal) ExitCode() int { return r.code }

// TestArgumentsNobodyTakes: what a daemon would not start with is refused, and all files are as they were, before
// anything is restarted. Where kubelite cannot say, a start does.
func TestArgumentsNobodyTakes(t *testing.T) {
	for _, code := range []int{exitArguments, 1} {
		for _, pre := range []bool{false, true} {
			h := newHost(t)
			h.PreInit = pre
			h.put(t, "kubelet", "--v=1\n")
			h.put(t, "kube-scheduler", "--v=2\n")
			program := filepath.Join(h.Env.Snap, "kubelite")
			if err := os.MkdirAll(h.Env.Snap, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(program, nil, 0o755); err != nil {
				t.Fatal(err)
			}
			run := h.Run
			h.Run = func(ctx context.Context, stdin io.Reader, argv ...string) error {
				if argv[0] != program {
					return run(ctx, stdin, argv...)
				}
				if got := h.args(t, "kubelet") + h.args(t, "kube-scheduler"); got != "--v=1\n--nosuch=1\n--v=3\n" {
					t.Errorf("asked about %q", got)
				}
				return fmt.Errorf("%w: kubelet: unknown flag: --nosuch", refusal{code})
			}
			config := []byte("version: 0.2.0\nextraKubeletArgs: {--nosuch: 1}\nextraKubeSchedulerArgs: {--v: 3}\n")
			if code == 1 {
				if err := h.Apply(t.Context(), config); err != nil || len(h.restarts) == 0 && !pre {
					t.Errorf("kubelite cannot say: %v, restarts %q", err, h.restarts)
				}
				continue
			}
			for range 2 { // it is not taken for applied
				err := h.Apply(t.Context(), config)
				if err == nil || !strings.Contains(err.Error(), "kubelet: unknown flag: --nosuch; ") || !strings.Contains(err.Error(), "docs/launch.md") {
					t.Errorf("%v", err)
				}
				if got := h.args(t, "kubelet") + h.args(t, "kube-scheduler"); got != "--v=1\n--v=2\n" || len(h.restarts) > 0 {
					t.Errorf("left %q, restarts %q", got, h.restarts)
				}
			}
		}
	}
}

// TestRangesLater holds that a configuration which asks a running node for other ranges is refused before anything is done, and that one
// with more addresses for pods, or what the node has, is not.
func TestRangesLater(t *testing.T) {
	for _, tc := range []struct{ env, says string }{
		{"IPv4_CLUSTER_CIDR: 10.9.0.0/16", "the cluster has 10.1.0.0/16 for pods and 10.152.183.0/24 for Services since its first start"},
		{"IPv6_SUPPORT: true", "which cannot be changed to 10.1.0.0/16,fd01::/64 for pods"},
		{"IPv4_CLUSTER_CIDR: here", "IPv4_CLUSTER_CIDR=here: not a range"},
		{"IPv4_CLUSTER_CIDR: 10.0.0.0/15", ""},
		{"IPv4_SUPPORT: true", ""},
	} {
		h := newHost(t)
		h.put(t, "kube-proxy", "--cluster-cidr=10.1.0.0/16\n")
		h.put(t, "kubelet", "")
		if err := ranges.MarkStarted(h.Env); err != nil {
			t.Fatal(err)
		}
		err := h.Apply(t.Context(), []byte("version: 0.2.0\nextraCNIEnv: {"+tc.env+"}\nextraKubeletArgs: {--v: 1}\n"))
		if tc.says == "" {
			if err != nil || h.args(t, "kubelet") != "--v=1\n" {
				t.Errorf("%s: %v", tc.env, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), tc.says) || strings.Contains(err.Error(), "\n") || h.args(t, "kubelet") != "" {
			t.Errorf("%s: got %v and %q, want %q and nothing changed", tc.env, err, h.args(t, "kubelet"), tc.says)
		}
		if _, err := os.Stat(h.Env.Args(ranges.FileName)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the file was written: %v", tc.env, err)
		}
	}
}

// TestApply has the cases of cluster-agent.md 7.5: each with and without pre-init.
func TestApply(t *testing.T) {
	const connection = "10.0.0.1:25000/0123456789abcdef0123456789abcdef/0123456789ab"
	for _, tc := range []struct {
		name, text    string
		ran, restarts []string
		files         map[string]string // in args
	}{
		{"addons", `
version: 0.1.0
addons:
- name: dns
- name: mayastor
  args: [--default-pool-size, 20GB]
- {name: registry, disable: true}
`, []string{"microk8s enable dns", "microk8s enable mayastor --default-pool-size 20GB", "microk8s disable registry"}, nil, nil},
		{"repositories", `
version: 0.1.0
addonRepositories:
- {name: core, url: /snap/microk8s/current/addons/core}
- {name: community, url: 'https://github.com/canonical/microk8s-community-addons', reference: 1.26}
`, []string{
			"microk8s addons repo add core /snap/microk8s/current/addons/core --force",
			"microk8s addons repo add community https://github.com/canonical/microk8s-community-addons --reference 1.26 --force",
		}, nil, nil},
		{"registries", `
version: 0.1.0
containerdRegistryConfigs:
  docker.io: |
    server = "http://my.proxy:5000"
  localhost:32000: x = 1
`, nil, nil, map[string]string{"certs.d/docker.io/hosts.toml": "server = \"http://my.proxy:5000\"\n", "certs.d/localhost:32000/hosts.toml": "x = 1"}},
		{"five daemons, one restart", `
version: 0.1.0
extraKubeAPIServerArgs: {--a: 1}
extraKubeletArgs: {--keep: new, --old: null, --empty: ""}
extraKubeProxyArgs: {--b: 1.10}
extraKubeControllerManagerArgs: {--c: true}
extraKubeSchedulerArgs: {--d: x}
`, nil, []string{"kubelite"}, map[string]string{
			"kubelet": "# a comment\n--keep=new\n--empty=\n", "kube-apiserver": "--a=1\n", "kube-proxy": "--b=1.10\n",
			"kube-controller-manager": "--c=true\n", "kube-scheduler": "--d=x\n",
		}},
		{"services and variables", `
version: 0.2.0
extraKubeliteEnv: {A: b c}
extraContainerdEnv: {HTTPS_PROXY: "http://proxy:3128"}
extraContainerdArgs: {--log-level: debug}
extraDqliteArgs: {--debug: "true"}
extraMicroK8sClusterAgentArgs: {--timeout: 300}
extraMicroK8sAPIServerProxyArgs: {--refresh-interval: 0s}
extraCNIEnv: {IPv4_SUPPORT: true, IPv4_CLUSTER_CIDR: 10.2.0.0/16}
`, nil, []string{"containerd", "k8s-dqlite", "kubelite", "apiserver-proxy", "cluster-agent"}, map[string]string{
			"kubelite-env": "A=\"b c\"\n", "containerd-env": "# mine\nHTTPS_PROXY=http://proxy:3128\n", "cni-env": "IPv4_CLUSTER_CIDR=10.2.0.0/16\nIPv4_SUPPORT=true\n",
			"containerd": "--log-level=debug\n", "apiserver-proxy": "--refresh-interval=0s\n",
		}},
		{"fips", "version: 0.2.0\nextraFIPSEnv: {GOFIPS: 1}\n", nil, []string{"k8s-dqlite", "kubelite", "cluster-agent"}, map[string]string{"fips-env": "GOFIPS=1\n"}},
		{"files", "version: 0.1.0\nextraConfigFiles:\n  my.yaml: |\n    text\n", nil, nil, map[string]string{"my.yaml": "text\n"}},
		{"manifests", "version: 0.1.0\nextraConfigFiles:\n  manifests/my.yaml: |\n    text\n", nil, nil, map[string]string{"manifests/my.yaml": "text\n"}},
		{"join", "version: 0.1.0\njoin: {url: " + connection + "}\n", []string{"microk8s join - < " + connection}, nil, nil},
		{"join as a worker", "version: 0.1.0\njoin: {url: " + connection + ", worker: true}\n", []string{"microk8s join - --worker < " + connection}, nil, nil},
		{"two documents", "# head\n---\nversion: 0.1.0\naddons: [{name: dns}]\n---\n---\nversion: 0.1.0\nextraKubeletArgs: {--keep: later}\n",
			[]string{"microk8s enable dns"}, []string{"kubelite"}, map[string]string{"kubelet": "# a comment\n--keep=later\n--old=1\n"}},
	} {
		for _, pre := range []bool{false, true} {
			h := newHost(t)
			h.PreInit = pre
			h.put(t, "kubelet", "# a comment\n--keep=old\n--old=1\n")
			h.put(t, "containerd-env", "# mine\nHTTPS_PROXY=x\n")
			ran, restarts := tc.ran, tc.restarts
			if pre {
				ran, restarts = nil, nil
			}
			for run := range 3 { // the second and third find everything done
				if err := h.Apply(t.Context(), []byte(tc.text)); err != nil {
					t.Fatalf("%s, pre-init %v, run %d: %v", tc.name, pre, run, err)
				}
			}
			if !slices.Equal(h.ran, ran) {
				t.Errorf("%s, pre-init %v: ran %q, want %q", tc.name, pre, h.ran, ran)
			}
			if !slices.Equal(slices.Sorted(slices.Values(h.restarts)), slices.Sorted(slices.Values(restarts))) {
				t.Errorf("%s, pre-init %v: restarted %v, want %v", tc.name, pre, h.restarts, restarts)
			}
			if n := len(h.restarts); n > 0 && slices.Contains(h.restarts[:n-1], "cluster-agent") {
				t.Errorf("%s: the agent is restarted before others: %v", tc.name, h.restarts)
			}
			for name, want := range tc.files {
				if got := h.args(t, name); got != want {
					t.Errorf("%s, pre-init %v: %s is %q, want %q", tc.name, pre, name, got, want)
				}
			}
			if pre { // the first start is done, and the rest follows
				h.PreInit = false
				if err := h.Apply(t.Context(), []byte(tc.text)); err != nil {
					t.Fatal(err)
				}
				if !slices.Equal(h.ran, tc.ran) {
					t.Errorf("%s, after pre-init: ran %q, want %q", tc.name, h.ran, tc.ran)
				}
			}
		}
	}
}

// A join stops the agent that began it. The next one finds it done, to be gone on with, or
// refused because the node was a member of another cluster before.
func TestJoinEndsTheAgent(t *testing.T) {
	text := []byte("version: 0.1.0\njoin: {url: 10.0.0.1:25000/0123456789abcdef0123456789abcdef/0123456789ab}\naddons: [{name: dns}]\n")
	h := newHost(t)
	var begun int
	answer := context.Canceled
	h.Join = func(context.Context, string, ...string) error { begun++; return answer }
	apply := func(what string, wantBegun int, want error) {
		t.Helper()
		if err := h.Apply(t.Context(), text); !errors.Is(err, want) || begun != wantBegun {
			t.Errorf("%s: %v, begun %d times", what, err, begun)
		}
	}
	apply("the agent is stopped", 1, context.Canceled)
	if err := nodeconfig.Lock(h.Env, snapenv.LockNoReissue, snapenv.LockJoining); err != nil {
		t.Fatal(err)
	}
	apply("the join still runs", 2, context.Canceled)
	// The join has started the agent again and has not ended: it is waited for, and not begun again.
	running, err := journal.Open(h.Env.Journal())
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		time.Sleep(changePoll) // the agent looks while it runs
		ended <- errors.Join(nodeconfig.Unlock(h.Env, snapenv.LockJoining), running.Close())
	}()
	apply("the join is done", 2, nil)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(h.ran, []string{"microk8s enable dns"}) {
		t.Errorf("ran %q", h.ran)
	}

	h = newHost(t)
	if err := nodeconfig.Lock(h.Env, snapenv.LockNoReissue); err != nil {
		t.Fatal(err)
	}
	begun, answer = 0, errors.New("this node already belongs to a cluster")
	h.Join = func(context.Context, string, ...string) error { begun++; return answer }
	apply("a member of another cluster", 1, answer)
	apply("and it stays one", 2, answer)
}

// TestInvalid wants everything that is wrong to be said at once, and nothing done.
func TestInvalid(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		says       []string
	}{
		{"no YAML", "a: [", []string{"could not parse configuration"}},
		{"addons as texts", "version: 0.1.0\naddons: [dns]\n", []string{"could not parse configuration: line 2: an addon is written as {name: NAME}"}},
		{"addons as a map", "version: 0.1.0\naddons: {dns: true}\n", []string{"line 2: addons are a list, each written as - name: NAME"}},
		{"join as a text", "version: 0.1.0\njoin: 10.0.0.1:25000/0123456789abcdef0123456789abcdef\n", []string{"line 2: join is written as {url: "}},
		{"arguments as a list", "version: 0.1.0\nextraKubeletArgs: [--v=3]\n", []string{"line 2: options are written as --name: value"}},
		{"worker as a word", "version: 0.1.0\njoin: {url: x, worker: perhaps}\n", []string{"line 2: true or false is required here"}},
		{"names as a text", "version: 0.1.0\nextraSANs: a.example\n", []string{"line 2: a list is required here, each entry written as - TEXT"}},
		{"files as a list", "version: 0.1.0\nextraConfigFiles: [a]\n", []string{"line 2: files are written as NAME: TEXT"}},
		{"a list", "- version: 0.1.0\n", []string{"line 1: a document is a list of fields"}},
		{"where to read more", "version: 0.2\n", []string{"such as 0.2.0", "docs/launch.md"}},
		{"no version", "addons: [{name: dns}]\n", []string{`could not parse config file version ""`}},
		{"no semantic version", "version: abc\n", []string{`could not parse config file version "abc"`}},
		{"too new", "version: 0.3.0\n", []string{"config file version is 0.3.0 but the maximum version supported is 0.2.0"}},
		{"too old", "version: 0.0.1\n", []string{"config file version is 0.0.1 but the minimum version required is 0.1.0"}},
		{"a list for a text, and more", "version: 7.1.0\nextraKubeletArgs: {max-pods: [1], v: {}}\nextraSANs: [\"bad name\"]\n", []string{"line 2: a string is required here", "version is 7.1.0", `"bad name" is neither`}},
		{"many things", `
version: 0.1.0
addons: [{name: --help}, {name: ../x}]
addonRepositories: [{name: 'a b', url: x}, {name: ok, url: '--upload-pack=x'}]
persistentClusterToken: short
extraConfigFiles: {../evil: x, ..: x, a/b: x, manifests/../kubelet: x}
containerdRegistryConfigs: {../certs.d2: x, docker.io: 'server = ['}
extraKubeletArgs: {--v: "1\n--anonymous-auth", "no good": x}
extraKubeliteEnv: {"A B": x, C: $(reboot)}
extraSANs: [10.0.0.1, ok.example.com, "bad name", "x\n[v3_ext]"]
join: {url: nonsense}
---
version: 9.9.9
`, []string{
			`"--help" is not the name of an addon`, `"../x" is not the name of an addon`, `"a b" is not the name of a repository`, `"--upload-pack=x" is neither`,
			"persistentClusterToken: the token must have 32 characters", "openssl rand -hex 16", `"../evil" is not the name of a file`, `".." is not`, `"a/b" is not`, `"../certs.d2" is not the name of a registry`, "containerdRegistryConfigs: docker.io/hosts.toml:1: ",
			"the value of --v is not one line", `"no good" is not the name of an option`, `"A B" is not the name of a variable`, "the value of C",
			`"bad name" is neither`, "x\\n[v3_ext]", "join: Invalid connection", "document 2: config file version is 9.9.9",
		}},
	} {
		h := newHost(t)
		h.put(t, "kubelet", "--keep=old\n")
		err := h.Apply(t.Context(), []byte(tc.text))
		if err == nil {
			t.Errorf("%s: accepted", tc.name)
			continue
		}
		for _, s := range tc.says {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("%s: it does not say %q:\n%v", tc.name, s, err)
			}
		}
		if got := h.args(t, "kubelet"); got != "--keep=old\n" || len(h.ran)+len(h.restarts) > 0 {
			t.Errorf("%s: %q, ran %v, restarted %v", tc.name, got, h.ran, h.restarts)
		}
		if err := Validate(t.Context(), h.Env, []byte(tc.text)); err == nil {
			t.Errorf("%s: valid", tc.name)
		}
	}
}

func TestUnknownFieldsWarn(t *testing.T) {
	docs, warnings, err := Parse([]byte("version: 0.1.0\nextraCoffee: yes\naddons: [{name: dns}]\n"))
	if err != nil || len(docs) != 1 || len(warnings) != 1 || !strings.Contains(warnings[0], "extraCoffee") {
		t.Errorf("%v, %v, %v", docs, warnings, err)
	}
}

func TestSANs(t *testing.T) {
	for _, tc := range []struct {
		text string
		want []string // lines, nil: no file
	}{
		{"version: 0.1.0\n", nil},
		{"version: 0.1.0\nextraSANs: []\n", []string{"DNS.5 = kubernetes.default.svc.cluster.local", "#MOREIPS"}},
		{"version: 0.1.0\nextraSANs: [10.10.10.10, microk8s.example.com, 'fd00::1']\n", []string{"IP.100 = 10.10.10.10", "DNS.6 = microk8s.example.com", "IP.101 = fd00::1", "#MOREIPS"}},
	} {
		h := newHost(t)
		if err := h.Apply(t.Context(), []byte(tc.text)); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(h.Env.Cert("csr.conf.template"))
		if tc.want == nil {
			if err == nil {
				t.Error("a template without names")
			}
			continue
		}
		for _, line := range tc.want {
			if !slices.Contains(strings.Split(string(data), "\n"), line) {
				t.Errorf("%q is missing in\n%s", line, data)
			}
		}
	}
}

// TestGoesOnWhereItFailed shows that steps are done once, whatever happens after them.
func TestGoesOnWhereItFailed(t *testing.T) {
	text := []byte("version: 0.1.0\nextraKubeletArgs: {--v: 2}\naddons: [{name: one}, {name: two}, {name: three}]\n")
	h := newHost(t)
	h.fail = "kubelite"
	if err := h.Apply(t.Context(), text); err == nil || !strings.Contains(err.Error(), "cannot restart kubelite") {
		t.Fatal(err)
	}
	h.fail = "enable two"
	if err := h.Apply(t.Context(), text); err == nil || !strings.Contains(err.Error(), "enable two") {
		t.Fatal(err)
	}
	h.fail = ""
	for range 2 {
		if err := h.Apply(t.Context(), text); err != nil {
			t.Fatal(err)
		}
	}
	if want := []string{"microk8s enable one", "microk8s enable two", "microk8s enable three"}; !slices.Equal(h.ran, want) {
		t.Errorf("ran %v", h.ran)
	}
	if !slices.Equal(h.restarts, []string{"kubelite"}) {
		t.Errorf("restarted %v", h.restarts)
	}
}

func TestPersistentToken(t *testing.T) {
	tok := token.New()
	h := newHost(t)
	h.PreInit = true
	if err := h.Apply(t.Context(), []byte("version: 0.1.0\npersistentClusterToken: "+tok.Reveal()+"\n")); err != nil {
		t.Fatal(err)
	}
	path := h.Env.Credential(tokenstore.PersistentFile)
	data, err := os.ReadFile(path)
	if err != nil || strings.Contains(string(data), tok.Reveal()) {
		t.Errorf("the token itself is kept, or nothing: %v", err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	store := &tokenstore.Store{Backends: []tokenstore.Backend{tokenstore.File{Path: path}}}
	for _, name := range []string{"n2", "n3", "n4"} {
		if _, err := store.Reserve(t.Context(), tok, tokenstore.Joiner{Name: name}); err != nil {
			t.Error(err)
		}
		if _, err := store.Confirm(t.Context(), tok, name); err != nil {
			t.Error(err)
		}
	}
}

// TestWatch puts files into the folder of a running agent.
func TestWatch(t *testing.T) {
	h := newHost(t)
	if err := os.MkdirAll(Dir(h.Env), 0o755); err != nil {
		t.Fatal(err)
	}
	good, bad := filepath.Join(Dir(h.Env), "10-good.yaml"), filepath.Join(Dir(h.Env), "20-bad.yaml")
	yml, other := filepath.Join(Dir(h.Env), "05.yml"), filepath.Join(Dir(h.Env), "05.json")
	for path, text := range map[string]string{good: "version: 0.1.0\naddons: [{name: dns}]\n", yml: "version: 0.2.0\n", other: `{"version": "0.2.0"}`, bad: "version: 7\n"} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- h.Watch(ctx) }()
	waitFor(t, func() bool { _, err := os.Stat(bad + Failed); return err == nil })
	if st, err := os.Stat(good + Applied); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the good one: %v", err)
	}
	for _, path := range []string{yml, other} {
		if _, err := os.Stat(path + Applied); err != nil {
			t.Error(err)
		}
	}
	text, err := os.ReadFile(bad + Failed)
	if err != nil || !strings.Contains(string(text), `could not parse config file version "7"`) || !strings.Contains(string(text), "docs/launch.md; see this node with: microk8s status") {
		t.Errorf("%q, %v", text, err)
	}
	if err := os.WriteFile(bad, []byte("version: 0.2.0\n"), 0o644); err != nil { // mended
		t.Fatal(err)
	}
	waitFor(t, func() bool { _, err := os.Stat(bad + Applied); return err == nil })
	waitFor(t, func() bool { _, err := os.Stat(bad + Failed); return err != nil })
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if !slices.Equal(h.ran, []string{"microk8s enable dns"}) {
		t.Errorf("ran %v", h.ran)
	}
}

func waitFor(t *testing.T, done func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for limit := time.After(30 * time.Second); !done(); {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatal("it does not happen")
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("version: 0.1.0\nextraKubeletArgs:\n  --cluster-domain: cluster.local\naddons:\n  - name: dns\n"))
	f.Add([]byte("---\n# x\n---\nversion: 0.2.0\nextraSANs: []\nextraConfigFiles: {a: &x b, c: *x}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		docs, _, err := Parse(data)
		if err != nil {
			return
		}
		for _, d := range docs {
			for name := range d.ExtraConfigFiles {
				if name := strings.TrimPrefix(name, "manifests/"); strings.ContainsAny(name, "/\\\n\x00") || name == ".." {
					t.Errorf("the file name %q", name)
				}
			}
			for _, f := range d.files() {
				for key, value := range f.changes {
					if value != nil && strings.ContainsAny(string(*value)+key, "\n\x00") {
						t.Errorf("%s: %q = %q", f.name, key, *value)
					}
				}
			}
		}
	})
}

// TestJSON reads configurations as json.dumps, jq --tab and Go's encoder write them.
func TestJSON(t *testing.T) {
	for name, text := range map[string]string{
		"one line": `{"version": "0.1.0", "extraKubeletArgs": {"--v": "3", "--max-pods": 60, "--node-labels": null}, "extraSANs": ["a.example"]}`,
		"tabs":     "{\n\t\"version\": \"0.1.0\",\n\t\"extraKubeletArgs\": {\n\t\t\"--v\": \"3\",\n\t\t\"--max-pods\": 60,\n\t\t\"--node-labels\": null\n\t},\n\t\"extraSANs\": [\n\t\t\"a.example\"\n\t]\n}\n",
		"compact":  `{"version":"0.1.0","extraKubeletArgs":{"--v":"3","--max-pods":60,"--node-labels":null},"extraSANs":["a.example"]}`,
		"escapes":  `{"version":"0.1.0","extraKubeletArgs":{"\u002d-v":"3","--max-pods":60,"--node-labels":null},"extraSANs":["a\u002eexample"]}`,
	} {
		docs, warnings, err := Parse([]byte(text))
		if err != nil || len(warnings) > 0 || len(docs) != 1 {
			t.Errorf("%s: %v, %q, %d documents", name, err, warnings, len(docs))
			continue
		}
		k := docs[0].KubeletArgs
		if k["--v"] == nil || *k["--v"] != "3" || *k["--max-pods"] != "60" || k["--node-labels"] != nil || (*docs[0].ExtraSANs)[0] != "a.example" {
			t.Errorf("%s: read as %v, %v", name, k, *docs[0].ExtraSANs)
		}
	}
	// Numbers keep their digits, and pairs of surrogates are one character.
	docs, _, err := Parse([]byte("{\"version\":\"0.1.0\",\n\t\"extraConfigFiles\":{\"a\":1.10,\"b\":\"\\ud83d\\udc33\"}}"))
	if err != nil || docs[0].ExtraConfigFiles["a"] != "1.10" || docs[0].ExtraConfigFiles["b"] != "\U0001F433" {
		t.Errorf("%v, %v", docs, err)
	}
}
