package renewal

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"microk8s/internal/certs"
	"microk8s/internal/snapenv"
)

// node is a Store whose answers a test sets, and the record of what was asked of it.
type node struct {
	mu       sync.Mutex
	answers  []answer // one per look, then nothing is due
	next     time.Time
	restarts [][]string
	failing  int // restarts that fail before one works

	env    snapenv.Env
	looked chan struct{}
	events chan struct{}
}

type answer struct {
	change certs.Change
	err    error
}

func (n *node) Renew(context.Context) (certs.Change, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.answers) == 0 {
		return certs.Change{}, nil
	}
	a := n.answers[0]
	n.answers = n.answers[1:]
	return a.change, a.err
}

func (n *node) NextRenewal() time.Time {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.next
}

func (n *node) restart(_ context.Context, names ...string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.restarts = append(n.restarts, slices.Clone(names))
	if n.failing > 0 {
		n.failing--
		return errors.New("cannot")
	}
	return nil
}

// run starts a Controller with these answers and waits for its first look.
func run(t *testing.T, n *node) {
	t.Helper()
	n.env = snapenv.Under(t.TempDir())
	n.looked, n.events = make(chan struct{}, 100), make(chan struct{})
	if n.next.IsZero() {
		n.next = time.Now().Add(1000 * time.Hour)
	}
	for _, dir := range []string{n.env.CertsDir(), n.env.CredentialsDir(), n.env.LocksDir()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	k := &Controller{
		Env: n.env, Store: n, Restart: n.restart, Log: slog.New(slog.DiscardHandler),
		Addresses: func(context.Context) (<-chan struct{}, error) { return n.events, nil },
		Settle:    time.Millisecond, Retry: time.Millisecond,
		Done: func() { n.looked <- struct{}{} },
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- k.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	n.wait(t)
}

func (n *node) wait(t *testing.T) {
	t.Helper()
	select {
	case <-n.looked:
	case <-time.After(20 * time.Second):
		t.Fatal("it did not look")
	}
}

func (n *node) got() [][]string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.restarts)
}

func kubelite() answer {
	return answer{change: certs.Change{Issued: []string{"proxy"}, Restart: []string{"kubelite"}}}
}

func TestLooksAtEachEvent(t *testing.T) {
	n := &node{}
	run(t, n)
	n.events <- struct{}{}
	n.wait(t)
	if err := os.WriteFile(n.env.Cert("csr.conf.template"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	n.wait(t)
	if err := os.Remove(n.env.Cert("csr.conf.template")); err != nil {
		t.Fatal(err)
	}
	n.wait(t)
	close(n.events) // the kernel stops telling: the rest goes on
	n.wait(t)
	if err := os.WriteFile(n.env.Credential("client.config"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	n.wait(t)
	if got := n.got(); len(got) != 0 {
		t.Errorf("restarted %v without a reason", got)
	}
}

func TestRestartsOnlyWhatMustBe(t *testing.T) {
	n := &node{answers: []answer{{change: certs.Change{Issued: []string{"server"}}}, kubelite()}}
	run(t, n)
	if got := n.got(); len(got) != 0 {
		t.Errorf("restarted %v for a certificate that is read again", got)
	}
	n.events <- struct{}{}
	n.wait(t)
	if got := n.got(); len(got) != 1 || !slices.Equal(got[0], []string{"kubelite"}) {
		t.Errorf("restarted %v", got)
	}
}

func TestTriesAgain(t *testing.T) {
	n := &node{answers: []answer{{err: errors.New("disk full")}, kubelite()}, failing: 2}
	run(t, n)
	for range 3 { // the look that works, and two restarts that do not
		n.wait(t)
	}
	if got := n.got(); len(got) != 3 {
		t.Errorf("tried %d times to restart, want 3", len(got))
	}
}

func TestNoRestartDuringJoin(t *testing.T) {
	n := &node{}
	run(t, n)
	lock := n.env.Lock("join-in-progress")
	if err := os.WriteFile(lock, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	n.mu.Lock()
	n.answers = []answer{kubelite()}
	n.mu.Unlock()
	n.events <- struct{}{}
	n.wait(t)
	n.wait(t)
	if got := n.got(); len(got) != 0 {
		t.Fatalf("restarted %v while the node joins", got)
	}
	if err := os.Remove(lock); err != nil {
		t.Fatal(err)
	}
	for len(n.got()) == 0 {
		n.wait(t)
	}
}

func TestNextLook(t *testing.T) {
	k := &Controller{Log: slog.New(slog.DiscardHandler), Retry: time.Minute, Env: snapenv.Under(t.TempDir())}
	for _, tc := range []struct {
		name     string
		next     time.Duration
		min, max time.Duration
	}{
		{"soon", 2 * time.Hour, time.Hour, 2 * time.Hour},
		{"in a year", 365 * 24 * time.Hour, longest, longest},
		{"long ago", -time.Hour, longest, longest},
	} {
		k.Store = &node{next: time.Now().Add(tc.next)}
		var pending []string
		if got := k.look(t.Context(), &pending); got < tc.min || got > tc.max {
			t.Errorf("%s: looks again in %v", tc.name, got)
		}
	}
}

func TestHostAddressesEnd(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	events, err := hostAddresses(ctx)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	select {
	case _, open := <-events:
		for open {
			_, open = <-events
		}
	case <-time.After(20 * time.Second):
		t.Error("watching goes on after its end")
	}
}
