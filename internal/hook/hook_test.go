package hook

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/setup"
	"microk8s/internal/snapenv"
	"microk8s/internal/turn"
)

// fixture is a runner on a machine in a temporary folder; calls records what it did.
type fixture struct {
	*Runner
	calls    []string
	settings map[string]string
	members  []peers.Member
	memErr   error
	health   [2]string
	turn     fakeTurn
	bad      string // what CheckConfig finds in a text that has it
	log      strings.Builder
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{settings: map[string]string{}, bad: "wrong", memErr: peers.ErrNotRunning, health: [2]string{"okay", ""}}
	note := func(what string) { f.calls = append(f.calls, what) }
	env := snapenv.Under(t.TempDir())
	f.Runner = &Runner{
		Env: env,
		Log: slog.New(slog.NewTextHandler(&f.log, nil)),
		Snapctl: func(_ context.Context, args ...string) (string, error) {
			if args[0] == "get" {
				return f.settings[args[1]] + "\n", nil
			}
			note(strings.Join(args, " "))
			return "", nil
		},
		Install: func(context.Context, snapenv.Env, *slog.Logger) error {
			note("install")
			for _, dir := range []string{env.LocksDir(), env.LaunchDir()} {
				if err := os.MkdirAll(dir, 0o755); err != nil {
					return err
				}
			}
			return os.WriteFile(env.Lock(snapenv.LockInstalled), nil, 0o600)
		},
		Configure: func(context.Context, snapenv.Env, *slog.Logger) error { note("configure"); return nil },
		Refresh:   func(context.Context, snapenv.Env, *slog.Logger) error { note("refresh"); return nil },
		Remove:    func(context.Context, snapenv.Env, *slog.Logger) error { note("remove"); return nil },
		Members: func(_ context.Context, dir string) ([]peers.Member, error) {
			if dir != env.BackendLive() {
				t.Errorf("members of %s", dir)
			}
			return f.members, f.memErr
		},
		Turn: &f.turn, TurnWait: 300 * time.Millisecond,
		CheckConfig: func(text []byte, _ bool) error {
			if strings.Contains(string(text), f.bad) {
				return fmt.Errorf("there is %q in it", f.bad)
			}
			return nil
		},
		PreInit: func(_ context.Context, _ snapenv.Env, text []byte) error {
			note("pre-init " + string(text))
			return nil
		},
		Health: func(context.Context) (string, string) { return f.health[0], f.health[1] },
	}
	return f
}

func (f *fixture) run(t *testing.T, name string) {
	t.Helper()
	if err := f.Run(t.Context(), name); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

func (f *fixture) did(t *testing.T, want ...string) {
	t.Helper()
	if !slices.Equal(f.calls, want) {
		t.Errorf("did %q, want %q", f.calls, want)
	}
	f.calls = nil
}

func put(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

// There is a script for each hook, and each does nothing but call this program.
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("../../snap/hooks/*")
	if err != nil || len(files) == 0 {
		t.Fatalf("%v, %d files", err, len(files))
	}
	for _, file := range files {
		name := filepath.Base(file)
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if want := "#!/bin/sh\nexec \"$SNAP/bin/microk8s\" hook " + name + "\n"; string(text) != want {
			t.Errorf("%s is %q, want %q", file, text, want)
		}
		if err := newFixture(t).Run(t.Context(), name); err != nil {
			t.Errorf("hook %s: %v", name, err)
		}
	}
	if err := newFixture(t).Run(t.Context(), "frobnicate"); !errors.Is(err, ErrUnknown) {
		t.Errorf("an unknown hook: %v", err)
	}
}

func TestInstallTakesTheFirstLaunchConfiguration(t *testing.T) {
	f := newFixture(t)
	f.run(t, "install")
	f.did(t, "install")

	f = newFixture(t)
	put(t, filepath.Join(f.Env.UserCommon, ".microk8s.yaml"), "user", 0o600)
	put(t, filepath.Join(f.Env.Common, ".microk8s.yaml"), "common", 0o600)
	f.run(t, "install")
	f.did(t, "install", "pre-init user")
	if text, err := os.ReadFile(f.Env.LaunchFile("install.yaml")); err != nil || string(text) != "user" {
		t.Errorf("for the agent: %q, %v", text, err)
	}
	// After the agent has applied it, an installation that goes on does not bring it back.
	if err := os.Rename(f.Env.LaunchFile("install.yaml"), f.Env.LaunchFile("install.yaml.applied")); err != nil {
		t.Fatal(err)
	}
	f.run(t, "install")
	f.did(t, "install")

	f = newFixture(t)
	put(t, f.Env.HostPath("etc/microk8s.yaml"), "wrong", 0o600)
	put(t, filepath.Join(f.Env.UserCommon, ".microk8s.yaml"), "user", 0o600)
	if err := f.Run(t.Context(), "install"); err == nil || !strings.Contains(err.Error(), "etc/microk8s.yaml") {
		t.Errorf("a wrong file: %v", err)
	}
	f.did(t) // before anything was made
}

func TestConfigIsRefusedAsAWhole(t *testing.T) {
	f := newFixture(t)
	f.run(t, "install")
	f.did(t, "install")
	f.run(t, "configure")
	f.did(t, "configure")
	file := f.Env.LaunchFile(snapSet)
	if _, err := os.Lstat(file); err == nil {
		t.Error("nothing was set, and the agent is told")
	}
	const good = "version: 0.1.0\nextraKubeletArgs:\n  --max-pods: 5\n"
	f.settings["config"] = good
	f.run(t, "configure")
	f.did(t, "configure")
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("for the agent: %v, %v", st, err)
	}
	if text, _ := os.ReadFile(file); string(text) != good {
		t.Errorf("for the agent: %q", text)
	}
	// Applied once, it is not applied by each refresh again.
	if err := os.Rename(file, file+".applied"); err != nil {
		t.Fatal(err)
	}
	f.run(t, "configure")
	f.did(t, "configure")
	if _, err := os.Lstat(file); err == nil {
		t.Error("what was applied is applied again")
	}
	f.settings["config"] = "wrong"
	if err := f.Run(t.Context(), "configure"); err == nil || !strings.Contains(err.Error(), "nothing was changed") || !strings.Contains(err.Error(), `there is "wrong" in it`) {
		t.Errorf("a wrong setting: %v", err)
	}
	f.did(t)
	if _, err := os.Lstat(file); err == nil {
		t.Error("the agent is told of a wrong setting")
	}
}

func TestPreRefreshKeepsTheQuorum(t *testing.T) {
	voter := func(online, self bool) peers.Member {
		return peers.Member{Address: "10.0.0.9:19001", Role: storedir.Voter, Online: online || self, Self: self}
	}
	me, up, down := voter(true, true), voter(true, false), voter(false, false)
	spare := peers.Member{Role: storedir.Spare, Online: true}
	selfSpare := peers.Member{Role: storedir.Spare, Online: true, Self: true}
	for _, tc := range []struct {
		name    string
		members []peers.Member
		refused bool
	}{
		{"alone", []peers.Member{me}, false},
		{"two nodes, one voter", []peers.Member{me, spare}, false},
		{"two voters", []peers.Member{me, up}, false},
		{"three", []peers.Member{me, up, up}, false},
		{"three, one down", []peers.Member{me, up, down}, true},
		{"three, a spare does not count", []peers.Member{me, up, down, spare}, true},
		{"three, lost already", []peers.Member{me, down, down}, false},
		{"five, one down", []peers.Member{me, up, up, up, down}, false},
		{"five, two down", []peers.Member{me, up, up, down, down}, true},
		{"no voter here", []peers.Member{selfSpare, up, up, down}, false},
	} {
		f := newFixture(t)
		f.run(t, "install")
		put(t, f.Env.Cert("ca.crt"), "A", 0o600)
		f.members, f.memErr = tc.members, nil
		err := f.Run(t.Context(), "pre-refresh")
		if (err != nil) != tc.refused {
			t.Errorf("%s: %v", tc.name, err)
		}
		if err != nil && (!strings.Contains(err.Error(), "10.0.0.9:19001") || !strings.Contains(err.Error(), "wait until")) {
			t.Errorf("%s: the refusal does not say who is missing and what to do: %v", tc.name, err)
		}
	}
	// Whether it can be found out or not: a refresh may be what mends the node.
	f := newFixture(t)
	f.run(t, "install")
	f.memErr = errors.New("broken")
	f.run(t, "pre-refresh")
	if !strings.Contains(f.log.String(), "broken") {
		t.Errorf("nothing is said: %s", &f.log)
	}
}

// fakeTurn is the cluster's turn: another node has it, or nobody can be asked, or it is taken.
type fakeTurn struct {
	held    *turn.HeldError
	waiting int // calls after which the other node's turn has ended; 0 for never
	failing int // calls that fail first; -1 for all
	calls   []string
}

func (f *fakeTurn) Take(_ context.Context, node, why string, _ time.Duration) error {
	if f.failing != 0 {
		f.failing--
		return errors.New("no API server")
	}
	if call := "take " + node + " " + why; !slices.Contains(f.calls, call) {
		f.calls = append(f.calls, call)
	}
	if f.held == nil {
		return nil
	}
	if f.waiting--; f.waiting == 0 {
		f.held = nil
		return nil
	}
	return f.held
}

func (f *fakeTurn) End(_ context.Context, node string) error {
	f.calls = append(f.calls, "end "+node)
	return nil
}

// Two nodes of a cluster are never refreshed at once.
func TestPreRefreshTakesTheTurn(t *testing.T) {
	me := peers.Member{Address: "10.0.0.1:19001", Role: storedir.Voter, Self: true, Online: true}
	up := peers.Member{Address: "10.0.0.2:19001", Role: storedir.Voter, Online: true}
	down := peers.Member{Address: "10.0.0.9:19001", Role: storedir.Voter}
	start := func(members ...peers.Member) *fixture {
		f := newFixture(t)
		f.run(t, "install")
		put(t, f.Env.Args("kubelet"), "--hostname-override=n1\n", 0o600)
		f.members, f.memErr = members, nil
		return f
	}
	want := func(what string, f *fixture, calls ...string) {
		t.Helper()
		if !slices.Equal(f.turn.calls, calls) {
			t.Errorf("%s: %q, want %q", what, f.turn.calls, calls)
		}
	}
	const take = "take n1 " + turn.ForRefresh
	f := start(me)
	f.run(t, "pre-refresh")
	want("alone", f)

	f = start(me, up)
	f.run(t, "pre-refresh")
	want("two", f, take)

	f = start(me, up, up)
	f.turn.held = &turn.HeldError{Turn: turn.Turn{Node: "n2", Why: turn.ForRefresh}}
	if err := f.Run(t.Context(), "pre-refresh"); err == nil || !strings.Contains(err.Error(), "cannot refresh this node now: n2 has the turn to be refreshed") {
		t.Errorf("another has the turn: %v", err)
	}
	want("another has the turn", f, take)

	f = start(me, up, up)
	f.turn.held, f.turn.waiting = &turn.HeldError{Turn: turn.Turn{Node: "n2", Why: turn.ForRefresh}}, 3
	f.run(t, "pre-refresh")
	want("the other one comes back just now", f, take)

	// Refused by the quorum: the others may have it.
	f = start(me, up, down)
	if err := f.Run(t.Context(), "pre-refresh"); err == nil {
		t.Error("the quorum is lost with it")
	}
	want("quorum", f, take, "end n1")

	f = start(me, up, up)
	f.turn.failing = 2
	f.run(t, "pre-refresh")
	want("an API server that comes back", f, take)

	// Without an API server the quorum alone decides.
	f = start(me, up, up)
	f.turn.failing = -1
	f.run(t, "pre-refresh")
	if !strings.Contains(f.log.String(), "the datastore's quorum alone decides") {
		t.Errorf("nothing is said: %s", &f.log)
	}
	f = start(me, up, down)
	f.turn.failing = -1
	if err := f.Run(t.Context(), "pre-refresh"); err == nil {
		t.Error("the quorum is lost with it, and no API server")
	}
}

func TestPreRefreshNotesTheCluster(t *testing.T) {
	f := newFixture(t)
	f.run(t, "install")
	put(t, f.Env.Cert("ca.crt"), "A", 0o600)
	f.Env.Revision = "x1"
	f.run(t, "pre-refresh")
	f.Env.Revision = "x2"
	put(t, f.Env.Cert("ca.crt"), "B", 0o600)
	if err := setup.CheckIdentity(f.Env); !errors.Is(err, setup.ErrOtherCluster) {
		t.Errorf("another CA under another revision: %v", err)
	}
}

func TestDropIns(t *testing.T) {
	f := newFixture(t)
	f.run(t, "install")
	f.calls = nil
	out := filepath.Join(t.TempDir(), "out")
	dir := filepath.Join(f.Env.Common, "hooks")
	put(t, filepath.Join(dir, "post-refresh.d/20-b"), "#!/bin/sh\necho b $SNAP_DATA >>"+out+"\n", 0o755)
	put(t, filepath.Join(dir, "post-refresh.d/10-a"), "#!/bin/sh\necho a >>"+out+"; echo oh; exit 3\n", 0o755)
	put(t, filepath.Join(dir, "post-refresh.d/30-c"), "#!/bin/sh\necho c >>"+out+"\n", 0o644)
	put(t, filepath.Join(dir, "remove.d/10-r"), "#!/bin/sh\necho r >>"+out+"\n", 0o755)
	f.run(t, "post-refresh")
	f.did(t, "refresh")
	f.run(t, "remove")
	f.did(t, "remove")
	if text, _ := os.ReadFile(out); string(text) != "a\nb "+f.Env.Data+"\nr\n" {
		t.Errorf("the programs did %q", text)
	}
	if log := f.log.String(); !strings.Contains(log, "exit status 3") || !strings.Contains(log, "output=oh") {
		t.Errorf("the log says nothing of a failure: %s", log)
	}
}

func TestHealth(t *testing.T) {
	f := newFixture(t)
	f.run(t, "check-health")
	f.did(t) // there is no node
	f.run(t, "install")
	f.calls = nil
	f.run(t, "check-health")
	f.did(t, "set-health okay")
	for in, want := range map[string]string{
		"no":                    "the node: no",
		"the disk is full":      "the disk is full",
		strings.Repeat("ä", 71): strings.Repeat("ä", 69) + "…",
		strings.Repeat("ä", 70): strings.Repeat("ä", 70),
	} {
		f.health = [2]string{"error", in}
		f.run(t, "check-health")
		f.did(t, "set-health error "+want)
		if n := utf8.RuneCountInString(want); n < 7 || n > 70 {
			t.Fatalf("%d characters", n)
		}
	}
}
