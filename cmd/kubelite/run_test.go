package main

import (
	"log/slog"
	"os"
	"slices"
	"testing"

	"microk8s/cmd/kubelite/daemons"
	"microk8s/internal/args"
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

// TestKubeletConfig holds who decides about the kubelet's configuration file.
func TestKubeletConfig(t *testing.T) {
	for _, tc := range []struct {
		name, kubelet, scheduler string
		want                     string // "" is none
	}{
		{"nothing of the user's", "--v=2\n", "", "/snap/kubelet.yaml"},
		{"a file of the user's", "--config=/etc/mine.yaml\n", "", "/etc/mine.yaml"},
		{"drop-ins of the user's", "--config-dir=/etc/kubelet.d\n", "", "/snap/kubelet.yaml"},
		{"the feature is off", "--feature-gates=A=true,KubeletEnsureSecretPulledImages=false\n", "", ""},
		{"the feature is off in the process", "", "--feature-gates=KubeletEnsureSecretPulledImages=false\n", ""},
		{"all beta features are off", "--feature-gates=\"AllBeta=false\"\n", "", ""},
		{"all but this", "--feature-gates=AllBeta=false,KubeletEnsureSecretPulledImages=true\n", "", "/snap/kubelet.yaml"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			kubelet, err := args.Parse([]byte(tc.kubelet), args.GrammarA)
			if err != nil {
				t.Fatal(err)
			}
			scheduler, err := args.Parse([]byte(tc.scheduler), args.GrammarA)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := defaultKubeletConfig(kubelet, []*args.File{scheduler, kubelet}, "/snap/kubelet.yaml"); err != nil {
				t.Fatal(err)
			}
			if got, _ := kubelet.Get("config"); got != tc.want {
				t.Errorf("the kubelet reads %q, want %q", got, tc.want)
			}
		})
	}
}
