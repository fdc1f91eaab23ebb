package agent

import (
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"microk8s/cluster-agent/launchconf"
	"microk8s/internal/snapenv"
)

// TestInit calls the sub-command as the Juju charm and cloud-init recipes do.
func TestInit(t *testing.T) {
	const config = `{"version": "0.1.0", "extraKubeletArgs": {"--v": "3"}}`
	env := snapenv.Under(t.TempDir())
	kubelet := env.Args("kubelet")
	for path, text := range map[string]string{kubelet: "--v=1\n", env.Lock(snapenv.LockInstalled): ""} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(stdin string, argv ...string) error {
		return Init(t.Context(), env, argv, strings.NewReader(stdin), io.Discard, slog.New(slog.DiscardHandler))
	}
	for _, argv := range [][]string{
		{"--config-file", "-", "--pre-init"}, {"--config-file=-", "-p"}, {"-c", "-", "-p"}, {"--config-file", file, "--pre-init"},
	} {
		// What was applied before and changed by hand since is applied again.
		if err := os.WriteFile(kubelet, []byte("--v=1\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := run(config, argv...); err != nil {
			t.Errorf("%q: %v", argv, err)
		}
		if text, err := os.ReadFile(kubelet); err != nil || !strings.Contains(string(text), "--v=3") {
			t.Errorf("%q: args/kubelet holds %q, %v", argv, text, err)
		}
	}
	if left, _ := os.ReadDir(launchconf.StateDir(env)); len(left) > 0 {
		t.Errorf("%s is left behind", left[0].Name())
	}
	for _, tc := range []struct {
		stdin string
		argv  []string
		says  string
	}{
		{"", nil, "no config file specified"},
		{"", []string{"-c", "-"}, "it is empty"},
		{"", []string{"-c", file + ".absent"}, "failed to read config file"},
		{"version: 9.0.0\n", []string{"-c", "-"}, "failed to parse config file: document 1: config file version is 9.0.0"},
		{config, []string{"-c", "-", "more"}, "unknown argument"},
		{config, []string{"--confg", "-"}, "init --help"},
		{strings.Repeat("#", launchconf.MaxSize+1), []string{"-c", "-"}, "more than"},
	} {
		if err := run(tc.stdin, tc.argv...); err == nil || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%q: %v, want an error with %q", tc.argv, err, tc.says)
		}
	}
	if err := run("", "--help"); !errors.Is(err, pflag.ErrHelp) {
		t.Errorf("--help: %v", err)
	}
	if err := os.Remove(env.Lock(snapenv.LockInstalled)); err != nil {
		t.Fatal(err)
	}
	if err := run(config, "-c", "-"); err == nil || !strings.Contains(err.Error(), "microk8s start") {
		t.Errorf("on a node that is not set up: %v", err)
	}
}
