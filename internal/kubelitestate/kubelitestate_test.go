package kubelitestate

import (
	"errors"
	"log/slog"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"microk8s/internal/snapenv"
)

func TestState(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	now := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	w := NewWriter(env, slog.New(slog.DiscardHandler))
	w.now = func() time.Time { return now }
	check := func(what string, want State) {
		t.Helper()
		got, err := Read(env)
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("%s: %v (-want +got):\n%s", what, err, diff)
		}
	}
	check("at the start", State{})
	w.Up("kube-scheduler")
	check("up and never down", State{})

	again := now.Add(time.Minute)
	w.Down("kube-scheduler", errors.New("no\nlease"), again)
	now = now.Add(time.Hour)
	w.Down("kube-scheduler", errors.New("still none"), again)
	w.Down("kube-controller-manager", errors.New("bad CIDR"), again)
	w.Refused("removed")
	scheduler := Daemon{Name: "kube-scheduler", Why: "still none", Since: now.Add(-time.Hour), Times: 2, Again: again}
	manager := Daemon{Name: "kube-controller-manager", Why: "bad CIDR", Since: now, Times: 1, Again: again}
	check("two down", State{Down: []Daemon{manager, scheduler}, Refused: "removed"})

	w.Without("kube-controller-manager", errors.New("without its half: bad CIDR"), again)
	half := manager
	half.Why, half.Runs = "without its half: bad CIDR", true
	check("one runs in part", State{Down: []Daemon{half, scheduler}, Refused: "removed"})
	w.Down("kube-controller-manager", errors.New("bad CIDR"), again)
	manager.Times = 2

	w.Up("kube-scheduler")
	w.Refused("")
	check("one up again", State{Down: []Daemon{manager}})
	w.Policies("no\nnft")
	check("policies not enforced", State{Down: []Daemon{manager}, Policies: "no nft"})
	w.Policies("")
	check("policies enforced", State{Down: []Daemon{manager}})

	NewWriter(env, slog.New(slog.DiscardHandler))
	check("after kubelite was started again", State{})
	if _, err := os.Stat(Path(env)); !os.IsNotExist(err) {
		t.Errorf("the file is left: %v", err)
	}

	if err := os.WriteFile(Path(env), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(env); err == nil {
		t.Error("half a file is read without an error")
	}
}
