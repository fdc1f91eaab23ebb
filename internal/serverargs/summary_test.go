package serverargs

import (
	"slices"
	"strings"
	"testing"

	"microk8s/internal/snapenv"
)

func summary(t *testing.T, env snapenv.Env, ca string) *Summary {
	t.Helper()
	put(t, env.Cert("ca.key"), ca)
	s, _, err := Summarize(env)
	if err != nil {
		t.Fatal(err)
	}
	again, err := ParseSummary(s.String())
	if err != nil || again.String() != s.String() {
		t.Fatalf("%v, %v", again, err)
	}
	return again
}

// differing are the arguments in which two nodes differ.
func differing(t *testing.T, a, b snapenv.Env) (out []string) {
	t.Helper()
	for _, d := range Compare(map[string]*Summary{"a": summary(t, a, "ca"), "b": summary(t, b, "ca")}) {
		out = append(out, d.Argument)
	}
	return out
}

// TestCompare sets one argument on one of two nodes otherwise than on the other, or only writes it
// otherwise.
func TestCompare(t *testing.T) {
	elsewhere := t.TempDir()
	put(t, elsewhere+"/moved.yaml", "rules:\n- level: None\n")
	put(t, elsewhere+"/ca.pem", "one")
	put(t, elsewhere+"/other.pem", "other")
	put(t, elsewhere+"/hook.yaml", "clusters: [{cluster: {certificate-authority: ca.pem}}]\nusers: [{user: {client-key: /own}}]")
	put(t, elsewhere+"/sub/hook.yaml", "clusters: [{cluster: {certificate-authority: "+elsewhere+"/other.pem}}]\nusers: [{user: {client-key: /own}}]")
	put(t, elsewhere+"/sub/same.yaml", "clusters: [{cluster: {certificate-authority: "+elsewhere+"/ca.pem}}]\nusers: [{user: {client-key: /own}}]")
	for _, tc := range []struct {
		name, a, b string
		files      map[string]string // of b, other than a's
		want       string
	}{
		{"the same", "--feature-gates=A=true", "--feature-gates=A=true", nil, ""},
		{"another order", "--feature-gates=A=true,B=false", "--feature-gates 'B=false,A=true'", nil, ""},
		{"in two parts", "--enable-admission-plugins=X,Y", "--enable-admission-plugins=Y\n--enable-admission-plugins=X", nil, ""},
		{"a gate", "--feature-gates=A=true", "--feature-gates=A=false", nil, "feature-gates"},
		{"on one only", "", "--oidc-issuer-url=https://id", nil, "oidc-issuer-url"},
		{"the last counts", "--event-ttl=1h", "--event-ttl=2h --event-ttl=1h", nil, ""},
		{"the first issuer signs", "--service-account-issuer=a --service-account-issuer=b", "--service-account-issuer=b --service-account-issuer=a", nil, "service-account-issuer"},
		{"the node's own", "--secure-port=1 --advertise-address=1.2.3.4 --profiling=true", "--secure-port=2", nil, ""},
		{"encryption", "--encryption-provider-config=${SNAP_DATA}/args/e.yaml", "--encryption-provider-config=${SNAP_DATA}/args/e.yaml", map[string]string{"args/e.yaml": "resources: [2]"}, "encryption-provider-config"},
		{"its form", "--encryption-provider-config=${SNAP_DATA}/args/e.yaml", "--encryption-provider-config=${SNAP_DATA}/args/e.yaml", map[string]string{"args/e.yaml": "# mine\nresources:\n- 1\n"}, ""},
		{"audit, elsewhere", "--audit-policy-file=${SNAP_DATA}/args/p.yaml", "--audit-policy-file=" + elsewhere + "/moved.yaml", nil, ""},
		{"a plugin's file", "--admission-control-config-file=$SNAP_DATA/args/a.yaml", "--admission-control-config-file=$SNAP_DATA/args/a.yaml", map[string]string{"args/events.yaml": "limits: [2]"}, "admission-control-config-file"},
		{"a plugin's file, elsewhere", "--admission-control-config-file=$SNAP_DATA/args/a.yaml", "--admission-control-config-file=$SNAP_DATA/args/a.yaml", map[string]string{"args/a.yaml": "plugins: [{name: E, path: sub/events.yaml}]", "args/sub/events.yaml": "limits: [1]"}, ""},
		{"a webhook's CA", "--audit-webhook-config-file=" + elsewhere + "/hook.yaml", "--audit-webhook-config-file=" + elsewhere + "/sub/hook.yaml", nil, "audit-webhook-config-file"},
		{"a webhook's CA, elsewhere", "--audit-webhook-config-file=" + elsewhere + "/hook.yaml", "--audit-webhook-config-file=" + elsewhere + "/sub/same.yaml", nil, ""},
		{"a path that is a condition", "--authentication-config=${SNAP_DATA}/args/n.yaml", "--authentication-config=${SNAP_DATA}/args/n.yaml", map[string]string{"args/n.yaml": "anonymous: {conditions: [{path: /readyz}]}"}, "authentication-config"},
		{"the key of tokens", "--service-account-key-file=${SNAP_DATA}/certs/serviceaccount.key", "--service-account-key-file=${SNAP_DATA}/certs/serviceaccount.key", map[string]string{"certs/serviceaccount.key": "2"}, "service-account-key-file"},
		{"keys in another order", "--service-account-key-file=${SNAP_DATA}/certs/serviceaccount.key --service-account-key-file=" + elsewhere + "/ca.pem", "--service-account-key-file=" + elsewhere + "/ca.pem --service-account-key-file=${SNAP_DATA}/certs/serviceaccount.key", nil, ""},
		{"no such file", "--oidc-ca-file=" + elsewhere + "/ca.pem", "--oidc-ca-file=/nowhere/ca.pem", nil, "oidc-ca-file"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			files := map[string]string{
				"args/e.yaml": "resources: [1]", "args/p.yaml": "{rules: [{level: None}]}", "args/events.yaml": "limits: [1]", "certs/serviceaccount.key": "1",
				"args/a.yaml": "plugins: [{name: E, path: events.yaml}]", "args/n.yaml": "anonymous: {conditions: [{path: /livez}]}",
			}
			a := node(t, tc.a+"\n", files)
			for name, text := range tc.files {
				files[name] = text
			}
			b := node(t, tc.b+"\n", files)
			if got := strings.Join(differing(t, a, b), " "); got != tc.want {
				t.Errorf("they differ in %q, want %q", got, tc.want)
			}
		})
	}
}

// TestSummarySaysNothing: digests of the same value are others in a cluster with another key, and
// what cannot be compared is left out.
func TestSummarySaysNothing(t *testing.T) {
	env := node(t, "--anonymous-auth=false\n--oidc-client-id=shop\n", nil)
	one, two := summary(t, env, "ca"), summary(t, env, "another")
	for flag, d := range one.Digests {
		if len(d) != 16 || d == two.Digests[flag] || strings.Contains(one.String(), "shop") {
			t.Errorf("--%s: %s and %s", flag, d, two.Digests[flag])
		}
	}
	if d := Compare(map[string]*Summary{"a": one, "b": two, "c": one}); len(d) > 0 {
		t.Errorf("they differ in %v", d)
	}
	for _, text := range []string{"", "{", "[]", strings.Repeat(" ", maxSummary+1)} {
		if _, err := ParseSummary(text); err == nil {
			t.Errorf("%.10q is a summary", text)
		}
	}
}

// TestGroups has three nodes of which one does not set an argument, and one cannot read its file.
func TestGroups(t *testing.T) {
	first := node(t, "--oidc-ca-file=${SNAP_DATA}/args/ca.pem\n--event-ttl=1h\n", map[string]string{"args/ca.pem": "x"})
	broken := node(t, "--oidc-ca-file=/nowhere\n--event-ttl=1h\n", nil)
	nodes := map[string]*Summary{"n1": summary(t, first, "ca"), "n2": summary(t, first, "ca"), "n3": summary(t, node(t, "\n", nil), "ca"), "n4": summary(t, broken, "ca")}
	all := Compare(nodes)
	if len(all) != 2 || all[0].Argument != "event-ttl" || all[1].Argument != "oidc-ca-file" {
		t.Fatalf("%+v", all)
	}
	if g := all[0].Groups; len(g) != 2 || !slices.Equal(g[0].Nodes, []string{"n1", "n2", "n4"}) || !g[0].Set || g[1].Set {
		t.Errorf("%+v", g)
	}
	if g := all[1].Groups; len(g) != 3 || !slices.Equal(g[0].Nodes, []string{"n1", "n2"}) || g[1].Set || !g[2].Unreadable || g[2].Nodes[0] != "n4" {
		t.Errorf("%+v", g)
	}
}

// TestFilesUsed names the files on which a summary depends, so that they can be watched.
func TestFilesUsed(t *testing.T) {
	env := node(t, "--admission-control-config-file=${SNAP_DATA}/args/a.yaml\n--oidc-ca-file=/nowhere/ca.pem\n", map[string]string{
		"args/a.yaml": "plugins: [{name: E, path: events.yaml}]", "args/events.yaml": "limits: [1]", "certs/ca.key": "ca",
	})
	_, used, err := Summarize(env)
	want := []string{"/nowhere/ca.pem", env.Args("a.yaml"), env.Args("events.yaml"), env.Args(service), env.Cert("ca.key")}
	slices.Sort(want)
	if err != nil || !slices.Equal(used, want) {
		t.Errorf("%v, %v", used, err)
	}
}
