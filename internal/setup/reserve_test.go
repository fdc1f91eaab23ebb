package setup

import (
	"os"
	"strings"
	"testing"

	"microk8s/internal/args"
)

func TestReservations(t *testing.T) {
	const gib = 1 << 20 // KiB
	for _, tc := range []struct {
		cores        int
		memory       uint64
		kube, system string
	}{
		{1, gib / 2, "cpu=50m,memory=61Mi,pid=1000", "cpu=25m,memory=20Mi,pid=1000"},
		{2, gib, "cpu=100m,memory=122Mi,pid=1000", "cpu=50m,memory=40Mi,pid=1000"},
		{4, 4 * gib, "cpu=200m,memory=491Mi,pid=1000", "cpu=100m,memory=163Mi,pid=1000"},
		{64, 256 * gib, "cpu=500m,memory=1024Mi,pid=1000", "cpu=250m,memory=256Mi,pid=1000"},
	} {
		kube, system := reservations(tc.cores, tc.memory)
		if kube != tc.kube || system != tc.system {
			t.Errorf("%d cores, %d KiB: %s and %s, want %s and %s", tc.cores, tc.memory, kube, system, tc.kube, tc.system)
		}
	}
}

// TestReserveOnce shows that an installation reserves what the machine's size asks for, and that
// a node in use keeps what it has.
func TestReserveOnce(t *testing.T) {
	in := machine(t)
	if err := in.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	get := func(flag string) string {
		t.Helper()
		f, err := args.Load(in.Env.Args("kubelet"), args.GrammarA)
		if err != nil {
			t.Fatal(err)
		}
		v, _ := f.Get(flag)
		return v
	}
	if v := get("kube-reserved"); !strings.Contains(v, "memory=240Mi") {
		t.Errorf("kube-reserved is %q on a machine of 2048000 kB", v)
	}
	if v := get("system-reserved"); !strings.Contains(v, "memory=80Mi") {
		t.Errorf("system-reserved is %q on a machine of 2048000 kB", v)
	}
	// An upgraded node keeps what it has.
	if err := os.WriteFile(in.Env.Args("kubelet"), []byte("--v=1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := in.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	if get("kube-reserved") != "" || get("seccomp-default") != "" {
		t.Error("a refresh changed the arguments of a node in use")
	}
}
