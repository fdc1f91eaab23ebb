//go:build !weakened

package suite

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"microk8s/internal/defence"
)

// TestEachDefenceIsNeeded runs the attacks without one defence after the other: an attack on it
// must succeed. Without it an attack would show nothing.
func TestEachDefenceIsNeeded(t *testing.T) {
	t.Parallel()
	program := filepath.Join(t.TempDir(), "attacks")
	build := exec.CommandContext(t.Context(), "go", "test", "-c", "-tags", "weakened", "-trimpath", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("cannot build the weakened agent: %v\n%s", err, out)
	}
	run := func(without defence.Name) (failed []string, out string) {
		cmd := exec.CommandContext(t.Context(), program, "-test.run", "^TestAttacks$/^"+string(without))
		cmd.Env = append(os.Environ(), "MICROK8S_WEAKENED="+string(without))
		text, err := cmd.CombinedOutput()
		for _, m := range regexp.MustCompile(`--- FAIL: TestAttacks/([a-z-]+)/`).FindAllStringSubmatch(string(text), -1) {
			failed = append(failed, m[1])
		}
		if (err != nil) != (len(failed) > 0) {
			t.Errorf("without %q the attacks end with %v:\n%s", without, err, text)
		}
		return failed, string(text)
	}
	if failed, out := run(""); len(failed) > 0 {
		t.Fatalf("with every defence %v fail:\n%s", failed, out)
	}
	t.Run("without", func(t *testing.T) {
		slots := make(chan struct{}, runtime.NumCPU())
		for _, name := range defence.All() {
			t.Run(string(name), func(t *testing.T) {
				t.Parallel()
				slots <- struct{}{}
				defer func() { <-slots }()
				failed, out := run(name)
				if !slices.Contains(failed, string(name)) {
					t.Errorf("no attack on it succeeds; others: %v\n%s", failed, strings.TrimSpace(out))
				}
			})
		}
	})
}
