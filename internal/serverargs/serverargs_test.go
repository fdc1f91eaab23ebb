package serverargs

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"microk8s/internal/args"
	"microk8s/internal/encryption"
	"microk8s/internal/snapenv"
)

// node is the arguments of an API server in a temporary folder.
func node(t *testing.T, arguments string, files map[string]string) snapenv.Env {
	t.Helper()
	env := snapenv.Under(t.TempDir())
	put(t, env.Args(service), arguments)
	for name, text := range files {
		if rest, ok := strings.CutPrefix(name, "/"); ok {
			put(t, env.HostPath(rest), text)
			continue
		}
		put(t, filepath.Join(env.Data, name), text)
	}
	return env
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
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

// carry takes the arguments of one node to another.
func carry(t *testing.T, from, to snapenv.Env) []string {
	t.Helper()
	set, problems, err := Read(from)
	if err != nil || len(problems) > 0 {
		t.Fatal(problems, err)
	}
	changed, err := set.Write(to, "")
	if err != nil {
		t.Fatal(err)
	}
	return changed
}

func digests(t *testing.T, env snapenv.Env) map[string]string {
	t.Helper()
	set, _, err := Read(env)
	if err != nil {
		t.Fatal(err)
	}
	return set.Digests()
}

// TestCarried takes what guides set on one API server to another: encryption, issuers, OIDC, audit,
// feature gates, admission with the plugins' files, wherever the files are.
func TestCarried(t *testing.T) {
	const mine = "--tls-cert-file=${SNAP_DATA}/certs/server.crt\n# mine\n--secure-port=16443\n"
	elsewhere := t.TempDir()
	first := node(t, mine+"--encryption-provider-config=${SNAP_DATA}/args/encryption.yaml\n"+
		"--service-account-issuer=https://issuer.example.test\n--service-account-issuer='https://kubernetes.default.svc'\n"+
		"--oidc-issuer-url https://id.example.test --oidc-client-id=k8s\n--oidc-ca-file="+elsewhere+"/ca.pem\n"+
		"--audit-policy-file="+elsewhere+"/audit.yaml\n--audit-log-path=${SNAP_COMMON}/var/log/audit.log\n"+
		"--feature-gates=A=true,B=false\n--enable-admission-plugins=NodeRestriction,EventRateLimit\n"+
		"--admission-control-config-file=$SNAP_DATA/args/admission.yaml\n--service-account-key-file=${SNAP_DATA}/certs/serviceaccount.key\n",
		map[string]string{
			"args/encryption.yaml": "key: 1", "args/admission.yaml": "plugins: [{name: EventRateLimit, path: events.yaml}, {name: PodSecurity, path: " + elsewhere + "/pods.yaml}]",
			"args/events.yaml": "limits",
		})
	put(t, elsewhere+"/ca.pem", "a CA")
	put(t, elsewhere+"/audit.yaml", "a policy")
	put(t, elsewhere+"/pods.yaml", "a standard")
	second := node(t, mine+"--feature-gates=C=true\n--anonymous-auth=false\n--service-account-key-file=${SNAP_DATA}/certs/serviceaccount.key\n--profiling=false\n", nil)

	if d := differences(digests(t, first), digests(t, second)); !slices.Contains(d, "service-account-issuer") || !slices.Contains(d, "anonymous-auth") || slices.Contains(d, "service-account-key-file") {
		t.Errorf("they differ in %v", d)
	}
	changed := carry(t, first, second)
	for _, want := range []string{"encryption-provider-config", "service-account-issuer", "oidc-issuer-url", "oidc-ca-file", "audit-policy-file", "feature-gates", "admission-control-config-file", "anonymous-auth"} {
		if !slices.Contains(changed, want) {
			t.Errorf("--%s was not carried: %v", want, changed)
		}
	}
	if d := differences(digests(t, first), digests(t, second)); len(d) > 0 {
		t.Errorf("after it they differ in %v", d)
	}
	f, err := args.Load(second.Args(service), args.GrammarA)
	if err != nil {
		t.Fatal(err)
	}
	if v := f.Values("service-account-issuer", second.Lookup); !slices.Equal(v, []string{"https://issuer.example.test", "https://kubernetes.default.svc"}) {
		t.Errorf("issuers, the first of which signs: %q", v)
	}
	if _, set := f.Get("anonymous-auth"); set {
		t.Error("a flag that the cluster does not set is kept")
	}
	if v, _ := f.Get("profiling"); v != "false" || !strings.Contains(string(f.Bytes()), mine) {
		t.Errorf("what is this node's own was changed:\n%s", f.Bytes())
	}
	for flag, want := range map[string]string{"oidc-ca-file": "a CA", "audit-policy-file": "a policy", "encryption-provider-config": "key: 1"} {
		path, _ := f.Value(flag, second.Lookup)
		if got := read(t, path); got != want || !strings.HasPrefix(path, second.Data) {
			t.Errorf("--%s: %s has %q", flag, path, got)
		}
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", path, st.Mode(), err)
		}
	}
	path, _ := f.Value("admission-control-config-file", second.Lookup)
	if text := read(t, path); strings.Contains(text, elsewhere) || !strings.Contains(text, "path: pods.yaml") {
		t.Errorf("the admission configuration names files of the other machine: %s", text)
	}
	if read(t, filepath.Join(filepath.Dir(path), "events.yaml")) != "limits" || read(t, filepath.Join(filepath.Dir(path), "pods.yaml")) != "a standard" {
		t.Error("the plugins' files were not carried")
	}
	if changed := carry(t, first, second); len(changed) > 0 {
		t.Errorf("the second time: %v", changed)
	}
}

// TestShippedArguments carries those of a new node, whose key is in the datastore's folder.
func TestShippedArguments(t *testing.T) {
	text, err := os.ReadFile("../../snap/local/default-args/kube-apiserver")
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{"var/kubernetes/backend/" + encryption.FileName: string(encryption.New())}
	for _, name := range []string{"audit-policy.yaml", "authentication-config.yaml", "admission-control-config-file.yaml", "pod-security.yaml", "eventconfig.yaml"} {
		data, err := os.ReadFile("../../snap/local/default-args/" + name)
		if err != nil {
			t.Fatal(err)
		}
		files["args/"+name] = string(data)
	}
	first := node(t, string(text), files)
	files["var/kubernetes/backend/"+encryption.FileName] = string(encryption.New())
	second := node(t, string(text), files)
	if d := differences(digests(t, first), digests(t, second)); !slices.Equal(d, []string{encryption.Flag}) {
		t.Fatalf("two new nodes differ in %v", d)
	}
	set, problems, err := Read(first)
	if err != nil || len(problems) > 0 || set.Encryption() == nil || set.Encryption().Name != encryption.Argument {
		t.Fatal(set.Encryption(), problems, err)
	}
	before := read(t, encryption.Path(second))
	if changed, err := set.Write(second, encryption.Path(second)); err != nil || len(changed) > 0 {
		t.Errorf("%v, %v", changed, err)
	}
	if read(t, encryption.Path(second)) != before {
		t.Error("the key of a datastore that is still there was replaced")
	}
}

func TestNotCarried(t *testing.T) {
	for _, tc := range []struct{ name, arguments, file, why string }{
		{"no such file", "--audit-policy-file=/nowhere\n", "", "/nowhere does not exist"},
		{"a folder", "--oidc-ca-file=/\n", "", "is not a file"},
		{"files in turn", "--audit-webhook-config-file=${SNAP_DATA}/args/hook.yaml\n", "clusters: [{cluster: {certificate-authority: /x}}]", "the file names others"},
		{"a KMS", "--encryption-provider-config=${SNAP_DATA}/args/hook.yaml\n", "providers: [{kms: {name: x}}]", "a KMS plugin"},
		{"twice", "--service-account-key-file=/a\n--service-account-key-file=/b\n", "", "more than once"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			env := node(t, tc.arguments, map[string]string{"args/hook.yaml": tc.file})
			set, problems, err := Read(env)
			if err != nil || len(problems) != 1 || !strings.Contains(problems[0].String(), tc.why) {
				t.Fatalf("%v, %v", problems, err)
			}
			if left := set.Reconcile(problems, map[string]string{}); len(left) != 1 {
				t.Errorf("a node without it is let in: %v", left)
			}
			if tc.file == "" {
				return
			}
			// A node on which somebody has set the same is let in, and keeps what it has.
			set, problems, err = Read(env)
			if err != nil {
				t.Fatal(err)
			}
			if left := set.Reconcile(problems, digests(t, env)); len(left) > 0 {
				t.Errorf("a node with the same is refused: %v", left)
			}
			if changed, err := set.Write(env, ""); err != nil || len(changed) > 0 {
				t.Errorf("%v, %v", changed, err)
			}
		})
	}
}

// TestHostileSets is about a cluster that sends what none would.
func TestHostileSets(t *testing.T) {
	for name, set := range map[string]Set{
		"another flag":       {Flags: map[string][]string{"etcd-servers": {"x"}}},
		"a command":          {Flags: map[string][]string{"feature-gates": {"$(touch /x)"}}},
		"a line":             {Flags: map[string][]string{"feature-gates": {"A=true\n--etcd-servers=x"}}},
		"outside":            {Files: []File{{Flag: "oidc-ca-file", Name: "/etc/passwd"}}},
		"up":                 {Files: []File{{Flag: "oidc-ca-file", Name: "${SNAP_DATA}/args/../../x.yaml"}}},
		"an argument file":   {Files: []File{{Flag: "oidc-ca-file", Name: "${SNAP_DATA}/args/containerd-env"}}},
		"the CNI":            {Files: []File{{Flag: "oidc-ca-file", Name: "${SNAP_DATA}/args/cni-network/cni.yaml"}}},
		"the CA's key":       {Files: []File{{Flag: "oidc-ca-file", Name: "${SNAP_DATA}/certs/ca.key"}}},
		"of no flag":         {Files: []File{{Flag: "x", Name: "${SNAP_DATA}/args/x.yaml"}}},
		"a huge file":        {Files: []File{{Flag: "oidc-ca-file", Name: Folder + "x", Content: strings.Repeat("x", maxFile+1)}}},
		"very many files":    {Files: make([]File, maxFiles+1)},
		"the datastore's ID": {Files: []File{{Flag: encryption.Flag, Name: "${SNAP_DATA}/var/kubernetes/backend/info.yaml"}}},
	} {
		env := node(t, "--secure-port=1\n", nil)
		if _, err := set.Write(env, ""); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if got := read(t, env.Args(service)); got != "--secure-port=1\n" {
			t.Errorf("%s: the arguments are %q", name, got)
		}
	}
}

func TestDigestsAreOfMeaning(t *testing.T) {
	a := digests(t, node(t, "--enable-admission-plugins=A,B\n--service-account-issuer=x\n--service-account-issuer=y\n", nil))
	b := digests(t, node(t, "--enable-admission-plugins=\"B,A\"\n--service-account-issuer=y\n--service-account-issuer=x\n", nil))
	if d := differences(a, b); !slices.Equal(d, []string{"service-account-issuer"}) {
		t.Errorf("they differ in %v", d)
	}
}

// differences lists the flags in which two nodes differ, by name.
func differences(a, b map[string]string) (flags []string) {
	for flag, d := range a {
		if b[flag] != d {
			flags = append(flags, flag)
		}
	}
	for flag := range b {
		if _, both := a[flag]; !both {
			flags = append(flags, flag)
		}
	}
	slices.Sort(flags)
	return flags
}
