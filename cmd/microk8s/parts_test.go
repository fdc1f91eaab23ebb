package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
)

// TestFirstStartTakesTheLaunchConfiguration sets a node up as `microk8s start` does where there
// is no snapd, with a configuration that was left for it.
func TestFirstStartTakesTheLaunchConfiguration(t *testing.T) {
	for _, path := range []string{"etc/microk8s.yaml", snapenv.DefaultUserCommon + "/.microk8s.yaml", "var/snap/microk8s/common/.microk8s.yaml"} {
		t.Run(path, func(t *testing.T) {
			root := t.TempDir()
			env := snapenv.Under(root)
			put(t, filepath.Join(root, path), "version: 0.1.0\nextraKubeletArgs:\n  --max-pods: 61\n")
			put(t, filepath.Join(root, "proc/meminfo"), "MemTotal:        2048000 kB\nMemFree: 1 kB\n")
			put(t, filepath.Join(root, "etc/group"), "root:x:0:\n")
			put(t, filepath.Join(root, "var/lib/empty"), "")
			if err := os.CopyFS(env.DefaultArgs(), os.DirFS("../../snap/local/default-args")); err != nil {
				t.Fatal(err)
			}
			if err := os.MkdirAll(env.ShippedCNIBin(), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := install(t.Context(), env, slog.New(slog.DiscardHandler)); err != nil {
				t.Fatal(err)
			}
			if text, err := os.ReadFile(env.Args("kubelet")); err != nil || !strings.Contains(string(text), "--max-pods=61") {
				t.Errorf("args/kubelet holds %q, %v", text, err)
			}
			if _, err := os.Stat(env.LaunchFile(snapenv.LaunchInstall)); err != nil {
				t.Errorf("the agent does not find the configuration: %v", err)
			}
		})
	}
}

// TestFirstStartRefusesABadLaunchConfiguration leaves the machine as it was.
func TestFirstStartRefusesABadLaunchConfiguration(t *testing.T) {
	root := t.TempDir()
	env := snapenv.Under(root)
	put(t, env.UserLaunchFile(), "version: 7.0.0\n")
	err := install(t.Context(), env, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), env.UserLaunchFile()) || !strings.Contains(err.Error(), "7.0.0") {
		t.Errorf("install: %v", err)
	}
	if nodeconfig.ReadState(env).Installed {
		t.Error("the node was set up")
	}
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
