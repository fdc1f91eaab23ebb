package main

import (
	"log/slog"
	"os"
	"slices"
	"testing"

	"microk8s/cmd/kubelite/daemons"
	"microk8s/internal/hostprobe"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
)

// TestNodeNameOfProxy holds that kube-proxy looks for the Node object that the kubelet makes.
func TestNodeNameOfProxy(t *testing.T) {
	for _, tc := range []struct{ kubelet, proxy string }{
		{"--hostname-override=Blue\n", "--v=2\n"},
		{"--hostname-override=blue\n", "--hostname-override=Blue\n"},
	} {
		env := snapenv.Under(t.TempDir())
		if err := os.MkdirAll(env.ArgsDir(), 0o755); err != nil {
			t.Fatal(err)
		}
		f := &flags{files: map[string]*string{}}
		for name, text := range map[string]string{daemons.Kubelet: tc.kubelet, daemons.Proxy: tc.proxy} {
			path := env.Args(name)
			f.files[name] = &path
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		config := nodeconfig.Load(env)
		if err := config.Err(); err != nil {
			t.Fatal(err)
		}
		words, _, err := readArgs(env, config.NodeName, f, hostprobe.Host{}, slog.New(slog.DiscardHandler))
		if err != nil || !slices.Contains(words[daemons.Proxy], "--hostname-override=blue") {
			t.Errorf("kube-proxy gets %q, %v", words[daemons.Proxy], err)
		}
	}
}
