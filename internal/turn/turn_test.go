package turn

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/kube/kubetest"
	"microk8s/internal/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func start(t *testing.T) (*kubetest.Server, *clock, Lease) {
	t.Helper()
	api, c := kubetest.New(t), &clock{now: time.Date(2026, 11, 29, 14, 3, 0, 0, time.UTC)}
	return api, c, Lease{Core: api.Core, Now: c.Now}
}

func take(t *testing.T, l Lease, node string) error {
	t.Helper()
	return l.Take(t.Context(), node, ForRefresh, RefreshLimit)
}

func TestOneNodeHasTheTurn(t *testing.T) {
	_, c, l := start(t)
	if has, err := l.Get(t.Context()); has != nil || err != nil {
		t.Fatalf("nobody has taken it: %v, %v", has, err)
	}
	if err := take(t, l, "n1"); err != nil {
		t.Fatal(err)
	}
	c.add(5 * time.Minute)
	err := take(t, l, "n2")
	var held *HeldError
	if !errors.As(err, &held) || held.Turn.Node != "n1" {
		t.Fatalf("two nodes have the turn: %v", err)
	}
	for _, want := range []string{"n1 has the turn to be refreshed since 14:03:00 UTC, until 14:18:00 UTC at most", "run the same command again", "microk8s kubectl -n kube-system delete lease microk8s-turn"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in: %v", want, err)
		}
	}
	// The holder itself may go on, as a hook that is run again does: the end moves, the beginning stays.
	if err := take(t, l, "n1"); err != nil {
		t.Fatal(err)
	}
	if has, err := l.Get(t.Context()); err != nil || has == nil || has.Until.Sub(has.Since) != 20*time.Minute {
		t.Errorf("%+v, %v", has, err)
	}
	if err := l.End(t.Context(), "n2"); err != nil { // it is not n2's
		t.Fatal(err)
	}
	if err := take(t, l, "n2"); err == nil {
		t.Error("n2 has ended the turn of n1")
	}
	if err := l.End(t.Context(), "n1"); err != nil {
		t.Fatal(err)
	}
	if err := take(t, l, "n2"); err != nil {
		t.Errorf("after the end: %v", err)
	}
}

// A node that dies with the turn loses it, not earlier than clocks may differ.
func TestDeadHolder(t *testing.T) {
	_, c, l := start(t)
	if err := take(t, l, "n1"); err != nil {
		t.Fatal(err)
	}
	c.add(RefreshLimit + skew - time.Second)
	if err := take(t, l, "n2"); err == nil {
		t.Error("taken over while the clock of n1 may say that it has not ended")
	}
	c.add(2 * time.Second)
	if has, err := l.Get(t.Context()); has != nil || err != nil {
		t.Errorf("it has ended: %+v, %v", has, err)
	}
	if err := take(t, l, "n2"); err != nil {
		t.Error(err)
	}
}

// Of nodes that ask at the same moment exactly one gets it.
func TestRace(t *testing.T) {
	_, _, l := start(t)
	var all sync.WaitGroup
	var mu sync.Mutex
	var got []string
	for i := range 8 {
		node := fmt.Sprint("n", i)
		all.Go(func() {
			if err := l.Take(t.Context(), node, ForRefresh, RefreshLimit); err == nil {
				mu.Lock()
				defer mu.Unlock()
				got = append(got, node)
			}
		})
	}
	all.Wait()
	if len(got) != 1 {
		t.Errorf("%v have the turn", got)
	}
}

func TestNoAPIServerIsNoHolder(t *testing.T) {
	api, _, l := start(t)
	api.Refuse = func(*http.Request) int { return http.StatusServiceUnavailable }
	err := take(t, l, "n1")
	var held *HeldError
	if err == nil || errors.As(err, &held) {
		t.Errorf("%v", err)
	}
}

func TestHoldKeepsIt(t *testing.T) {
	_, _, l := start(t)
	l.Now = nil
	end, err := l.Hold(t.Context(), "n1", ForKeys, 400*time.Millisecond, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	first, err := l.Get(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		has, err := l.Get(t.Context())
		if err != nil || has == nil {
			t.Fatalf("%v, %v", has, err)
		}
		if has.Until.After(first.Until) && has.Since.Equal(first.Since) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("its end does not move")
		}
	}
	end()
	if has, err := l.Get(t.Context()); has != nil || err != nil {
		t.Errorf("after the end: %+v, %v", has, err)
	}
}

// node writes what a kubelet said at a time.
func node(api *kubetest.Server, ready corev1.ConditionStatus, at time.Time) {
	api.Set(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}, Status: corev1.NodeStatus{
		Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready, LastHeartbeatTime: metav1.NewTime(at)}},
	}})
}

// The turn of a refresh ends when the node is back, and not because of what its kubelet said before.
func TestEndsWhenTheNodeIsBack(t *testing.T) {
	api, c, l := start(t)
	if err := take(t, l, "n1"); err != nil {
		t.Fatal(err)
	}
	node(api, corev1.ConditionTrue, c.Now())
	c.add(time.Minute)
	e := &Ender{Lease: l, Node: "n1", Log: slog.New(slog.DiscardHandler), began: c.Now()}
	want := func(what string, done bool) {
		t.Helper()
		if got, err := e.once(t.Context()); got != done {
			t.Errorf("%s: %v, %v", what, got, err)
		}
	}
	want("the kubelet has not started", false)
	node(api, corev1.ConditionFalse, c.Now())
	want("not Ready", false)
	node(api, corev1.ConditionTrue, c.Now())
	want("Ready", true)
	if has, err := l.Get(t.Context()); has != nil || err != nil {
		t.Errorf("it is back, and has the turn: %+v, %v", has, err)
	}
}

// Turns of others, of other kinds, and one that a hook takes while this agent runs, are left alone.
func TestEndsNothingElse(t *testing.T) {
	api, c, l := start(t)
	node(api, corev1.ConditionTrue, c.Now().Add(time.Hour))
	for what, step := range map[string]func() error{
		"another's":  func() error { return l.Take(t.Context(), "n2", ForRefresh, RefreshLimit) },
		"of keys":    func() error { return l.Take(t.Context(), "n1", ForKeys, RefreshLimit) },
		"just begun": func() error { c.add(time.Minute); return l.Take(t.Context(), "n1", ForRefresh, RefreshLimit) },
	} {
		e := &Ender{Lease: l, Node: "n1", Log: slog.New(slog.DiscardHandler), pause: time.Millisecond}
		if err := step(); err != nil {
			t.Fatal(err)
		}
		if what == "just begun" {
			e.began = c.Now().Add(-time.Second)
			if done, err := e.once(t.Context()); !done || err != nil {
				t.Errorf("%s: %v, %v", what, done, err)
			}
		} else if err := e.Run(t.Context()); err != nil {
			t.Error(err)
		}
		has, err := l.Get(t.Context())
		if err != nil || has == nil {
			t.Errorf("%s was ended: %v", what, err)
			continue
		}
		if err := l.End(t.Context(), has.Node); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := (&Ender{Lease: l, Node: "n1", Log: slog.New(slog.DiscardHandler)}).Run(ctx); err != nil {
		t.Error(err)
	}
}
