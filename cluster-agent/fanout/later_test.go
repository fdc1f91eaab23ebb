package fanout

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"microk8s/cluster-agent/api"
)

func TestMerge(t *testing.T) {
	service := func(name string, restart bool, remove []string, update ...map[string]string) api.ConfigureRequest {
		return api.ConfigureRequest{Services: []api.ConfigureService{{Name: name, Restart: api.Truth(restart), Remove: remove, Update: update}}}
	}
	type m = map[string]string
	for name, tc := range map[string]struct{ first, second, want api.ConfigureRequest }{
		"nothing before": {
			api.ConfigureRequest{}, service("kubelet", true, nil, m{"--v": "2"}), service("kubelet", true, nil, m{"--v": "2"}),
		},
		"nothing after": {
			service("kubelet", true, nil, m{"v": "2"}), api.ConfigureRequest{}, service("kubelet", true, nil, m{"v": "2"}),
		},
		"the later value": {
			service("kubelet", true, nil, m{"--v": "2"}, m{"--a": "1"}), service("kubelet", false, nil, m{"v": "3"}),
			service("kubelet", true, nil, m{"--a": "1"}, m{"--v": "3"}),
		},
		"removed after it was set": {
			service("kubelet", false, nil, m{"--v": "2"}), service("kubelet", true, []string{"v"}), service("kubelet", true, []string{"--v"}),
		},
		"set after it was removed": {
			service("kubelet", false, []string{"--v"}), service("kubelet", false, nil, m{"--v": "2"}), service("kubelet", false, nil, m{"--v": "2"}),
		},
		"another service": {
			service("kubelet", false, nil, m{"--v": "2"}), service("kube-proxy", true, nil),
			api.ConfigureRequest{Services: []api.ConfigureService{{Name: "kubelet", Update: []map[string]string{{"--v": "2"}}}, {Name: "kube-proxy", Restart: true}}},
		},
		"addons": {
			api.ConfigureRequest{Addons: []api.ConfigureAddon{{Name: "a", Enable: true}, {Name: "b", Enable: true}}},
			api.ConfigureRequest{Addons: []api.ConfigureAddon{{Name: "a", Disable: true}}},
			api.ConfigureRequest{Addons: []api.ConfigureAddon{{Name: "b", Enable: true}, {Name: "a", Disable: true}}},
		},
	} {
		text := func(r api.ConfigureRequest) string {
			data, err := json.Marshal(r)
			if err != nil {
				t.Fatal(err)
			}
			return string(data)
		}
		if diff := cmp.Diff(text(tc.want), text(merge(tc.first, tc.second))); diff != "" {
			t.Errorf("%s:\n%s", name, diff)
		}
	}
}

// TestLater changes arguments while a worker is away: when it is ready again it is told the
// last of them, once, although two agents wait for it.
func TestLater(t *testing.T) {
	a := newAgents(t)
	a.node("n1", "127.0.0.1", a.ca, a.caKey, "x", net.IPv4(127, 0, 0, 1))
	a.node("w1", "127.0.0.2", nil, nil, "")
	a.node("gone", "127.0.0.3", nil, nil, "")
	for _, one := range []struct{ option, value string }{
		{"--cluster-dns", "10.152.183.10"}, {"--cluster-domain", "corp.test"}, {"--cluster-dns", "10.152.183.20"},
	} {
		results, err := a.c.SetArgument(t.Context(), "kubelet", one.option, one.value)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range results {
			if r.Later != (r.Name != "n1") || r.Later != (r.Err != nil) {
				t.Errorf("%s: %v, later: %v", r.Name, r.Err, r.Later)
			}
		}
	}
	if results, err := a.c.Configure(t.Context(), api.ConfigureRequest{}); err != nil || Failed(results) == nil || results[1].Later {
		t.Errorf("there is nothing to tell, and still %v, %v", results, err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	var keepers sync.WaitGroup
	for range 2 {
		keepers.Go(func() {
			if err := (&Controller{Cluster: a.c, Log: slog.New(slog.DiscardHandler), Retry: 10 * time.Millisecond}).Run(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	defer keepers.Wait()
	defer cancel()
	a.api.Remove("v1/nodes/gone")
	a.api.SetReady("w1", true) // not yet: nobody answers there
	left := func() map[string]late {
		l, err := a.c.late(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	wait := func(what string, ok func() bool) {
		t.Helper()
		limit := time.After(30 * time.Second)
		for !ok() {
			select {
			case <-limit:
				t.Fatalf("%s: never; kept is %v", what, left())
			case <-time.After(5 * time.Millisecond):
			}
		}
	}
	wait("the node that is no more is forgotten", func() bool { _, ok := left()["gone"]; return !ok })
	wait("the other one was tried", func() bool { return !left()["w1"].NotBefore.IsZero() })
	a.api.SetReady("w1", false)
	a.agent("w1", "127.0.0.2", a.ca, a.caKey, "system:node:w1")
	a.api.SetReady("w1", true)
	wait("it is told", func() bool { return len(left()) == 0 })
	a.mu.Lock()
	defer a.mu.Unlock()
	const want = `"arguments_update":[{"--cluster-dns":"10.152.183.20"},{"--cluster-domain":"corp.test"}],"restart":true`
	if calls := a.calls["w1"]; len(calls) != 1 || !strings.Contains(calls[0], want) {
		t.Errorf("w1 was told %v, want %s", calls, want)
	}
}

// TestMissedComesFirst asks a node that is back for something else before a Controller tells it.
func TestMissedComesFirst(t *testing.T) {
	a := newAgents(t)
	a.node("w1", "127.0.0.2", nil, nil, "")
	if _, err := a.c.SetArgument(t.Context(), "kubelet", "--a", "old"); err != nil {
		t.Fatal(err)
	}
	a.agent("w1", "127.0.0.2", a.ca, a.caKey, "system:node:w1")
	if results, err := a.c.SetArgument(t.Context(), "kubelet", "--b", "new"); err != nil || Failed(results) != nil {
		t.Fatal(err, Failed(results))
	}
	if calls := a.calls["w1"]; len(calls) != 1 || !strings.Contains(calls[0], `"arguments_update":[{"--a":"old"},{"--b":"new"}]`) {
		t.Errorf("it was told %v", calls)
	}
	if l, err := a.c.late(t.Context()); err != nil || len(l) > 0 {
		t.Errorf("kept is %v, %v", l, err)
	}
}
