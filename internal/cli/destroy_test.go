package cli

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"microk8s/internal/snapenv"
)

// apiOf stands in for an API server with nodes of these names, the first of which is this one.
func apiOf(t *testing.T, nodes ...string) (kubeconfig string) {
	t.Helper()
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		switch {
		case r.URL.Path == "/api/v1/nodes":
			var items []string
			for _, n := range nodes {
				items = append(items, fmt.Sprintf(`{"metadata":{"name":%q},"status":{"conditions":[{"type":"Ready","status":"True"}]}}`, n))
			}
			fmt.Fprintf(w, `{"kind":"NodeList","apiVersion":"v1","metadata":{"resourceVersion":"1"},"items":[%s]}`, strings.Join(items, ","))
		case r.URL.Path == "/apis/apps/v1/namespaces/default/deployments":
			fmt.Fprint(w, `{"kind":"PartialObjectMetadataList","items":[{"metadata":{"name":"web","namespace":"default"}}]}`)
		case r.Method != http.MethodGet:
			t.Errorf("changed: %s %s", r.Method, r.URL)
			w.WriteHeader(http.StatusForbidden)
		default:
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}`)
		}
	}))
	t.Cleanup(s.Close)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	config, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "c",
		"clusters": []any{map[string]any{"name": "c", "cluster": map[string]any{"server": s.URL, "certificate-authority-data": ca}}},
		"contexts": []any{map[string]any{"name": "c", "context": map[string]any{"cluster": "c", "user": "u"}}},
		"users":    []any{map[string]any{"name": "u", "user": map[string]any{"token": "a-fake-token"}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(config)
}

// TestDestructiveCommands runs each command that can lose something where it would, without a terminal.
// Each refuses with exit code 2, says the reason and what answers or gets around it, and leaves every file,
// service and object as it was. Those of reset are in tests/cli.
func TestDestructiveCommands(t *testing.T) {
	const line = "127.0.0.1:1/0123456789abcdef0123456789abcdef/0123456789ab"
	self, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	member := []string{strings.ToLower(self), "n2"}
	for _, tc := range []struct {
		name    string
		args    []string
		nodes   []string // of the API server; nil: it does not answer
		members bool     // others are in the datastore
		joined  bool     // others have joined
		code    int
		says    []string
	}{
		{"leave, no other voter answers", []string{"leave", "--force"}, nil, true, true, ExitUsage,
			[]string{"may have the last copy", "microk8s recover --dry-run", "with --yes"}},
		{"join, with a worker", []string{"join", line}, member, false, true, ExitUsage,
			[]string{"control plane of other nodes: n2", "microk8s remove-node n2", "with --force"}},
		{"join, in use", []string{"join", line}, member[:1], false, false, ExitUsage,
			[]string{"deployment default/web", ".backup", "with --force"}},
		{"join, others have joined and the API server is down", []string{"join", line}, nil, false, true, ExitUsage,
			[]string{"other nodes have joined this one", "microk8s start", "with --force"}},
		{"a new CA, with a worker", []string{"refresh-certs", "--cert", "ca.crt"}, member, false, true, ExitUsage,
			[]string{"cannot replace the CA or the keys of tokens", "n2", "microk8s leave", "with --force"}},
		{"a CA of one's own, on a member", []string{"refresh-certs", "CA_DIR"}, nil, true, true, ExitUsage,
			[]string{"cannot replace the CA", "192.0.2.2:19001", "with --force"}},
		{"the CA before the last, with a worker", []string{"refresh-certs", "--undo"}, member, false, true, ExitUsage,
			[]string{"cannot replace the CA", "n2", "with --force"}},
		{"the keys of tokens before the last, with a worker", []string{"refresh-certs", "--undo"}, member, false, true, ExitUsage,
			[]string{"or the keys of tokens", "n2", "with --force"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := newApp(t)
			config := "apiVersion: v1\n"
			if tc.nodes != nil {
				config = apiOf(t, tc.nodes...)
			}
			a.write(t, a.Env.AdminKubeconfig(), config)
			a.write(t, a.Env.Lock(snapenv.LockInstalled), "")
			a.write(t, a.Env.Lock(snapenv.LockHA), "")
			a.write(t, a.Env.Cert("ca.crt"), "now")
			a.write(t, a.Env.Cert("serviceaccount.key"), "now")
			backup := filepath.Join(a.Env.Data, "certs-backup/certs")
			a.write(t, filepath.Join(backup, "ca.crt"), "before")
			if strings.HasPrefix(tc.name, "the keys of tokens") {
				a.write(t, filepath.Join(backup, "ca.crt"), "now")
				a.write(t, filepath.Join(backup, "serviceaccount.key"), "before")
			}
			if tc.joined {
				a.write(t, a.Env.Lock(snapenv.LockNoReissue), "")
			}
			live := a.Env.BackendLive()
			a.write(t, filepath.Join(live, "info.yaml"), "Address: 127.0.0.1:19001\nID: 7\nRole: 0\n")
			if tc.members {
				a.write(t, filepath.Join(live, "cluster.yaml"), "- {Address: \"127.0.0.1:19001\", ID: 7, Role: 0}\n- {Address: \"192.0.2.2:19001\", ID: 1, Role: 0}\n")
			}
			for i, arg := range tc.args {
				if arg == "CA_DIR" {
					tc.args[i] = t.TempDir()
				}
			}
			before := everything(t, a)
			code := a.run(t.Context(), tc.args...)
			if code != tc.code {
				t.Errorf("exit code %d, want %d", code, tc.code)
			}
			text := a.out.String() + a.err.String()
			for _, want := range tc.says {
				if !strings.Contains(text, want) {
					t.Errorf("it does not say %q:\n%s", want, text)
				}
			}
			if got := everything(t, a); got != before {
				t.Errorf("the files are\n%s\nand were\n%s", got, before)
			}
			if len(a.services.Calls()) > 0 || len(a.parts) > 0 {
				t.Errorf("services %q, parts %q", a.services.Calls(), a.parts)
			}
		})
	}
}

// everything is the files of an installation with their contents, without the journal's lock.
func everything(t *testing.T, a *testApp) string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(a.Env.Host, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.HasSuffix(path, ".lock") && strings.HasPrefix(path, a.Env.ClusterDir()) {
			return err
		}
		data, err := os.ReadFile(path)
		out = append(out, path+" "+string(data))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(out, "\n")
}

// TestConfirm has a terminal, so the question is asked.
func TestConfirm(t *testing.T) {
	for answer, want := range map[string]int{"y\n": ExitOK, "YES\n": ExitOK, "n\n": ExitUsage, "\n": ExitUsage, "": ExitUsage} {
		a := newApp(t)
		a.Term, a.In = true, strings.NewReader(answer)
		err := a.confirm("All of it goes.", false, "")
		if (err == nil) != (want == ExitOK) || !strings.Contains(a.err.String(), "All of it goes.\nGo on? [y/N] ") {
			t.Errorf("%q: %v, %s", answer, err, a.err.String())
		}
		a.Term = false
		if err := a.confirm("All of it goes.", true, ""); err != nil {
			t.Errorf("--yes: %v", err)
		}
	}
}
