package podledger

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"microk8s/internal/snapenv"
)

// TestPodsThatAreGone has pods come and go while the ledger is kept: they stay known as long as there are logs
// of theirs, over a restart and a line that was cut off by a crash.
func TestPodsThatAreGone(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	pod := func(uid string) string { return filepath.Join(env.KubeletRoot(), "pods", uid) }
	must(os.MkdirAll(pod("before"), 0o750))
	run := func(during func()) {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- Run(ctx, env) }()
		during()
		cancel()
		must(<-ended)
	}
	wait := func(uid string) {
		t.Helper()
		for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
			if data, err := os.ReadFile(file(env)); err == nil && slices.Contains(strings.Split(string(data), "\n"), uid) {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%s is not written down", uid)
			}
		}
	}
	run(func() {
		wait("before")
		must(os.Mkdir(pod("short"), 0o750))
		wait("short")
		must(os.MkdirAll(env.HostPath("var/log/pods/ns_web_short/web"), 0o755))
		must(os.Remove(pod("short")))
		must(os.Mkdir(pod("forgotten"), 0o750))
		wait("forgotten")
		must(os.Remove(pod("forgotten"))) // it has no logs
	})
	f, err := os.OpenFile(file(env), os.O_WRONLY|os.O_APPEND, 0)
	must(err)
	_, err = f.WriteString("cut-of")
	must(err)
	must(f.Close())
	if got := slices.Sorted(maps.Keys(Read(env))); !slices.Equal(got, []string{"before", "forgotten", "short"}) {
		t.Errorf("known: %q", got)
	}
	run(func() {
		must(os.Mkdir(pod("later"), 0o750))
		wait("later")
	})
	if got := slices.Sorted(maps.Keys(Read(env))); !slices.Equal(got, []string{"before", "later", "short"}) {
		t.Errorf("after a restart: %q", got)
	}
}
