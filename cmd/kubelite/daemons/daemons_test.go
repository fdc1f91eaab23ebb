package daemons

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"
)

var quiet = slog.New(slog.DiscardHandler)

// Feature gates are set once in a process, so the good case and the bad ones share a test.
func TestParse(t *testing.T) {
	for name := range parsers {
		_, err := Parse(map[string][]string{name: {"--no-such-flag=1"}})
		if err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "no-such-flag") {
			t.Errorf("%s with an unknown flag: %v; want an error that names both", name, err)
		}
	}
	_, err := Parse(map[string][]string{Scheduler: {"--bad-a"}, ControllerManager: {"--bad-b"}})
	if err == nil || !strings.Contains(err.Error(), "bad-a") || !strings.Contains(err.Error(), "bad-b") {
		t.Errorf("two wrong files: %v; want both errors at once", err)
	}
	_, err = Parse(map[string][]string{APIServer: {"word"}})
	if err == nil || !strings.Contains(err.Error(), "word") {
		t.Errorf("a stray word: %v; want an error that shows it", err)
	}

	got, err := Parse(map[string][]string{
		APIServer:         {"--secure-port=16443", "--authorization-mode=Node,RBAC"},
		ControllerManager: {"--allocate-node-cidrs=true", "--cluster-cidr=10.1.0.0/16"},
		Scheduler:         {"--leader-elect-lease-duration=60s"},
		Proxy:             {"--proxy-mode=nftables"},
		Kubelet:           {"--fail-cgroupv1=false", "--read-only-port=0"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != len(parsers) {
		t.Fatalf("parsed %d daemons, want %d", len(got), len(parsers))
	}
}

func TestGroupNamesTheDaemonThatEnded(t *testing.T) {
	for _, tc := range []struct {
		name string
		err  error
		want string
	}{
		{"with an error", errors.New("port in use"), "kube-proxy: port in use"},
		{"without", nil, "kube-proxy: ended by itself"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := NewGroup(t.Context(), quiet)
			stopped := make(chan struct{})
			g.Go(Kubelet, func(ctx context.Context) error { <-ctx.Done(); close(stopped); return ctx.Err() })
			g.Go(Proxy, func(context.Context) error { return tc.err })
			if err := g.Wait(time.Minute); err == nil || err.Error() != tc.want {
				t.Fatalf("Wait: %v, want %q", err, tc.want)
			}
			<-stopped
		})
	}
}

func TestGroupStopsInGoodOrder(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	g := NewGroup(ctx, quiet)
	g.Go(Kubelet, func(ctx context.Context) error { <-ctx.Done(); return errors.New("while stopping") })
	cancel()
	if err := g.Wait(time.Minute); err != nil {
		t.Fatalf("an orderly stop ended with %v", err)
	}
}

// A job that does not heed its context holds the others up for the grace time only, and a
// daemon of the kind that never heeds it not at all.
func TestGroupDoesNotWaitForever(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var log strings.Builder
	g := NewGroup(ctx, slog.New(slog.NewTextHandler(&log, nil)))
	g.Go("stuck", func(context.Context) error { select {} })
	cancel()
	if err := g.Wait(time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "daemons=stuck") {
		t.Errorf("the log does not name what did not stop:\n%s", log.String())
	}

	ctx, cancel = context.WithCancel(t.Context())
	g = NewGroup(ctx, quiet)
	heard := make(chan error, 1)
	g.Start(&Daemon{Name: Proxy, EndsProcess: true, Run: func(ctx context.Context) error {
		<-t.Context().Done()
		heard <- ctx.Err()
		select {}
	}})
	cancel()
	if err := g.Wait(time.Hour); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := <-heard; err != nil {
			t.Errorf("the daemon's context ended with the group's: %v", err)
		}
	})
}
