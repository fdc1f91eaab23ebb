package agreement

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"microk8s/internal/kube/kubetest"
	"microk8s/internal/noderegistry"
	"microk8s/internal/serverargs"
	"microk8s/internal/snapenv"
)

// TestKeeper follows the argument file, and a file that an argument names.
func TestKeeper(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	put := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	elsewhere := t.TempDir() + "/ca.pem"
	put(env.Cert("ca.key"), "the CA's key")
	put(elsewhere, "one")
	put(env.Args("kube-apiserver"), "--feature-gates=A=true\n")
	nodes := noderegistry.Registry{Core: kubetest.New(t).Core}
	if _, err := nodes.Add(t.Context(), noderegistry.Record{Name: "n1", Role: noderegistry.ControlPlane, Secrets: 2}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- (&Controller{Env: env, Node: "n1", Nodes: nodes, Log: slog.New(slog.DiscardHandler)}).Run(ctx)
	}()
	written := func(what string, differs string) {
		t.Helper()
		want, _, err := serverargs.Summarize(env)
		if err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			r, err := nodes.Get(t.Context(), "n1")
			if err == nil && r.ServerArguments == want.String() && r.Secrets == 2 {
				if want.Digests[differs] == "" {
					t.Fatalf("%s: %s", what, r.ServerArguments)
				}
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: the record has %+v, %v", what, r, err)
			}
		}
	}
	written("at the start", "feature-gates")
	put(env.Args("kube-apiserver"), "--feature-gates=A=false\n--oidc-ca-file="+elsewhere+"\n")
	written("after an edit", "oidc-ca-file")
	put(elsewhere, "two")
	written("after an edit of a file elsewhere", "oidc-ca-file")
	if r, err := nodes.Get(t.Context(), "n1"); err != nil || r.AgentPort != 25000 {
		t.Errorf("%+v, %v", r, err)
	}
	put(env.Args("cluster-agent"), "--bind [::]:2379\n")
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		r, err := nodes.Get(t.Context(), "n1")
		if err == nil && r.AgentPort == 2379 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the agent's port is %+v, %v", r, err)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
