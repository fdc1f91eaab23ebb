package service

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// fakeSnapctl stands in for snapd's snapctl: it records calls and answers from a table, and
// fails the test on a call that is not in it.
type fakeSnapctl struct {
	t       *testing.T
	answers map[string]string
	calls   []string
}

func (f *fakeSnapctl) run(_ context.Context, argv ...string) (string, error) {
	line := strings.Join(argv, " ")
	f.calls = append(f.calls, line)
	out, ok := f.answers[line]
	if !ok {
		f.t.Errorf("unexpected call: %s", line)
		return "", errors.New("unexpected call")
	}
	return out, nil
}

func TestSnapctlCommands(t *testing.T) {
	for _, tc := range []struct {
		name string
		do   func(Manager) error
		want string
	}{
		{"start all", func(m Manager) error { return m.Start(t.Context()) }, "snapctl start --enable microk8s"},
		{"stop all", func(m Manager) error { return m.Stop(t.Context()) }, "snapctl stop --disable microk8s"},
		{"restart two in order", func(m Manager) error { return m.Restart(t.Context(), "kubelet", "containerd") },
			"snapctl restart microk8s.daemon-containerd microk8s.daemon-kubelite"},
		{"part of kubelite", func(m Manager) error { return m.Stop(t.Context(), "kube-apiserver", "scheduler") },
			"snapctl stop --disable microk8s.daemon-kubelite"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fake := &fakeSnapctl{t: t, answers: map[string]string{tc.want: ""}}
			if err := tc.do(&Snapctl{Snap: "microk8s", Run: fake.run}); err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(fake.calls, []string{tc.want}) {
				t.Errorf("calls: %q", fake.calls)
			}
		})
	}
}

func TestSnapctlStatus(t *testing.T) {
	unit := func(name, active, sub, file, more string) string {
		return fmt.Sprintf("MainPID=0\nNRestarts=0\nExecMainCode=0\nExecMainStatus=0\nId=snap.microk8s.daemon-%s.service\nLoadState=loaded\nActiveState=%s\nSubState=%s\nUnitFileState=%s\nStateChangeTimestamp=\n%s\n", name, active, sub, file, more)
	}
	const show = "env TZ=UTC LC_ALL=C systemctl show --property=" + unitProperties + " snap.microk8s.daemon-containerd.service snap.microk8s.daemon-k8s-dqlite.service" +
		" snap.microk8s.daemon-cluster-agent.service snap.microk8s.daemon-kubelite.service snap.microk8s.daemon-apiserver-proxy.service"
	const journal = "journalctl --quiet --no-pager --output=cat --boot --lines=200 --identifier=microk8s.daemon-"
	fake := &fakeSnapctl{t: t, answers: map[string]string{
		show: strings.Join([]string{
			unit("containerd", "active", "running", "enabled", "MainPID=422\nStateChangeTimestamp=Sat 2026-11-21 01:54:53 UTC"),
			unit("k8s-dqlite", "activating", "auto-restart", "enabled", "NRestarts=7\nExecMainCode=1\nExecMainStatus=3"),
			unit("cluster-agent", "deactivating", "stop-sigterm", "enabled", "MainPID=5"),
			unit("kubelite", "failed", "failed", "disabled", "ExecMainCode=2\nExecMainStatus=9"),
			"Id=snap.microk8s.daemon-apiserver-proxy.service\nLoadState=not-found\nActiveState=inactive\n",
		}, "\n"),
		journal + "k8s-dqlite": "starting\nno space left\n",
		journal + "kubelite":   "",
	}}
	got, err := (&Snapctl{Snap: "microk8s", Run: fake.run}).Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []State{
		{Name: Containerd, Phase: Running, Enabled: true, PID: 422, Since: time.Date(2026, 11, 21, 1, 54, 53, 0, time.UTC)},
		{Name: Datastore, Phase: Backoff, Enabled: true, Restarts: 7, LastExit: "exit status 3", LastWords: "no space left"},
		{Name: ClusterAgent, Phase: Stopping, Enabled: true, PID: 5},
		{Name: Kubelite, Phase: Failed, LastExit: "signal 9"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("- want, + got:\n%s", diff)
	}
	fake = &fakeSnapctl{t: t, answers: map[string]string{show: "Id=other.service\nLoadState=loaded\n"}}
	if _, err := (&Snapctl{Snap: "microk8s", Run: fake.run}).Status(t.Context()); err == nil {
		t.Error("a machine without the services has states")
	}
}

func TestSnapctlErrorsSayWhatFailed(t *testing.T) {
	_, err := runProgram(t.Context(), "sh", "-c", "echo no such unit >&2; exit 3")
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "no such unit") {
		t.Errorf("error: %v", err)
	}
}

func TestResolve(t *testing.T) {
	for in, want := range map[string]string{
		"kubelite": Kubelite, "kubelet": Kubelite, "kube-proxy": Kubelite, "kube-apiserver": Kubelite,
		"apiserver": Kubelite, "controller-manager": Kubelite, "microk8s.daemon-kubelite": Kubelite,
		"snap.microk8s.daemon-containerd.service": Containerd, "k8s-dqlite": Datastore, "apiserver-proxy": Proxy,
		"etcd": "", "flanneld": "", "apiserver-kicker": "", "": "", "nginx": "",
	} {
		got, err := Resolve(in)
		if got != want || (err == nil) != (want != "") || err != nil && !errors.Is(err, ErrUnknown) {
			t.Errorf("Resolve(%q) = %q, %v; want %q", in, got, err, want)
		}
	}
}
