package service

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
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
	fake := &fakeSnapctl{t: t, answers: map[string]string{"snapctl services microk8s": `Service                         Startup   Current   Notes
microk8s.daemon-apiserver-proxy disabled  inactive  -
microk8s.daemon-cluster-agent   enabled   active    -
microk8s.daemon-containerd      enabled   active    -
microk8s.daemon-k8s-dqlite      enabled   inactive  -
microk8s.daemon-kubelite        enabled   active    -
microk8s.daemon-other           enabled   active    -
`}}
	got, err := (&Snapctl{Snap: "microk8s", Run: fake.run}).Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []State{
		{Name: Containerd, Phase: Running, Enabled: true},
		{Name: Datastore, Phase: Stopped, Enabled: true},
		{Name: ClusterAgent, Phase: Running, Enabled: true},
		{Name: Kubelite, Phase: Running, Enabled: true},
		{Name: Proxy, Phase: Stopped},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
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
