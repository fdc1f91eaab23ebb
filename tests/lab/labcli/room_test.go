package labcli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"microk8s/tests/lab/labtest"
)

// TestLimits holds that what is raised for hosts is written down and restored.
func TestLimits(t *testing.T) {
	root, state := t.TempDir(), filepath.Join(t.TempDir(), "state")
	read := func(k kernelLimit) uint64 {
		t.Helper()
		n, err := readNumber(k.file(root))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for i, text := range []string{"128\n", "99999999\n"} {
		if err := os.MkdirAll(filepath.Dir(kernelLimits[i].file(root)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(kernelLimits[i].file(root), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var said []string
	for _, hosts := range []int{3, 7, 2} {
		if err := raiseLimits(root, state, hosts, func(s string) { said = append(said, s) }); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := read(kernelLimits[0]), kernelLimits[0].need(7); got != want {
		t.Errorf("with seven hosts there are %d instances, want %d", got, want)
	}
	if read(kernelLimits[1]) != 99999999 || len(said) != 2 || !strings.Contains(said[0], "raised fs.inotify.max_user_instances from 128 to") {
		t.Errorf("said %q", said)
	}
	for range 2 {
		if err := restoreLimits(root, state); err != nil {
			t.Fatal(err)
		}
	}
	if read(kernelLimits[0]) != 128 {
		t.Errorf("afterwards there are %d", read(kernelLimits[0]))
	}
}

// TestLabRecordAndPlay records what is done to a real host, and plays it.
func TestLabRecordAndPlay(t *testing.T) {
	labtest.New(t, "")
	file := filepath.Join(t.TempDir(), "met.yaml")
	lab := func(want int, args ...string) string {
		t.Helper()
		code, out, errOut := runLab(t, "", args...)
		if code != want {
			t.Fatalf("lab %q: exit %d, want %d\n%s%s", args, code, want, out, errOut)
		}
		return out + errOut
	}
	lab(1, "record", "--stop")
	lab(0, "up", "--no-start", "n1")
	lab(0, "record", file)
	lab(1, "record", file)
	lab(0, "exec", "n1", "--", "sh", "-c", "echo it\\'s >/there")
	lab(0, "kill", "n1")
	lab(0, "start", "n1")
	lab(3, "exec", "n1", "--", "sh", "-c", "cat /there; exit 3")
	lab(0, "record", "--stop")
	lab(0, "down")
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Replace(string(data), "product: true", "product: false", 1)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	out := lab(0, "play", "--seed", "5", file)
	for _, want := range []string{"seed 5\n", "kill n1\n", "start n1\n", "run on n1:"} {
		if !strings.Contains(out, want) {
			t.Errorf("play said %q, want %q", out, want)
		}
	}
	if got := lab(0, "exec", "n1", "--", "cat", "/there"); got != "it's\n" {
		t.Errorf("the played host has %q", got)
	}
	if err := os.WriteFile(file, []byte(strings.Replace(text, "steps:\n", "steps:\n- kill: n7\n", 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	if out := lab(exitUsage, "play", file); !strings.Contains(out, `steps: number 1: there is no host "n7" in hosts`) {
		t.Errorf("a mistake in a scenario: %s", out)
	}
	if out := lab(0, "room"); !strings.Contains(out, "more control-plane nodes fit") {
		t.Errorf("room: %s", out)
	}
}
