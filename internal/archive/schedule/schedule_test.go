package schedule

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/archive"
	"microk8s/internal/kube"
	"microk8s/internal/kube/kubetest"
)

func settings() *Settings {
	return &Settings{To: "/b", Every: metav1.Duration{Duration: 12 * time.Hour}, Keep: 3}
}

func TestDueAndAge(t *testing.T) {
	now := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	for name, tc := range map[string]struct {
		record *Record
		due    time.Time
		age    time.Duration
		old    bool
	}{
		"never":      {nil, time.Time{}, 0, true},
		"fresh":      {&Record{Attempt: ago(time.Hour), Proven: &archive.Note{Created: ago(time.Hour)}}, now.Add(11 * time.Hour), time.Hour, false},
		"old":        {&Record{Attempt: ago(time.Hour), Error: "x", Proven: &archive.Note{Created: ago(19 * time.Hour)}}, now.Add(-45 * time.Minute), 19 * time.Hour, true},
		"never good": {&Record{Attempt: ago(time.Minute), Error: "x"}, now.Add(14 * time.Minute), 0, true},
	} {
		s := &State{Settings: settings(), Record: tc.record}
		age, old, ok := s.Age(now)
		if due := s.Due(); !due.Equal(tc.due) || age != tc.age || old != tc.old || ok != (tc.age > 0) {
			t.Errorf("%s: due %s, age %s, old %v, known %v", name, due, age, old, ok)
		}
	}
}

func TestExpired(t *testing.T) {
	var names []string
	name := func(cluster string, day int) string {
		return archive.NewName(cluster, time.Date(2026, 11, day, 0, 0, 0, 0, time.UTC))
	}
	for day := 1; day <= 5; day++ {
		names = append(names, name("01234567", day), name("01234567", day)+archive.NoteSuffix, name("89abcdef", day), name("89abcdef", day)+archive.NoteSuffix)
	}
	unproven, newer := archive.NewName("01234567", time.Date(2026, 11, 4, 12, 0, 0, 0, time.UTC)), name("01234567", 6)
	names = append(names, unproven, newer, "other.txt")
	got := Expired(names, "01234567", 3)
	if want := []string{name("01234567", 1), name("01234567", 2), unproven}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	// Whatever fails, the last ones that were proven stay.
	if got := Expired([]string{unproven, newer}, "01234567", 1); got != nil {
		t.Errorf("%q", got)
	}
}

// node is one that runs the controller. maker plays the command.
func node(t *testing.T, api *kubetest.Server, name string, maker func(ctx context.Context, node string) error) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	c := &Controller{
		Node: name, Core: api.Core, Log: slog.New(slog.DiscardHandler), claim: 600 * time.Millisecond,
		Exec: func(ctx context.Context, _ io.Reader, _ ...string) error { return maker(ctx, name) },
	}
	wg.Go(func() { _ = c.Run(ctx) })
	stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	t.Cleanup(stop)
	return stop
}

func proven(core *kube.Core, node string) error {
	return Change(context.Background(), core, func(s *State) error {
		s.Record = &Record{Attempt: time.Now(), Node: node, Proven: &archive.Note{Created: time.Now()}}
		return nil
	})
}

// TestOneNodeMakesIt: of three nodes one makes each archive.
func TestOneNodeMakesIt(t *testing.T) {
	api := kubetest.New(t)
	core, err := api.Core()
	if err != nil {
		t.Fatal(err)
	}
	var at, most, made atomic.Int32
	done := make(chan struct{}, 10)
	for _, name := range []string{"n1", "n2", "n3"} {
		node(t, api, name, func(_ context.Context, node string) error {
			most.Store(max(most.Load(), at.Add(1)))
			time.Sleep(20 * time.Millisecond)
			err := proven(core, node)
			at.Add(-1)
			made.Add(1)
			done <- struct{}{}
			return err
		})
	}
	if err := Change(t.Context(), core, func(s *State) error { s.Settings = settings(); return nil }); err != nil {
		t.Fatal(err)
	}
	<-done
	// The others have seen it when they have seen that the claim is gone.
	for {
		s, err := Load(t.Context(), core)
		if err != nil {
			t.Fatal(err)
		}
		if s.Claim == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if made.Load() != 1 || most.Load() != 1 {
		t.Errorf("%d were made, %d at a time", made.Load(), most.Load())
	}
}

// TestTakenOver: a node that dies while it makes an archive is followed by another one.
func TestTakenOver(t *testing.T) {
	api := kubetest.New(t)
	core, err := api.Core()
	if err != nil {
		t.Fatal(err)
	}
	if err := Change(t.Context(), core, func(s *State) error {
		s.Settings, s.Claim = settings(), &Claim{"n1", time.Now().Add(300 * time.Millisecond)} // n1 died with it
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	by := make(chan string, 1)
	node(t, api, "n2", func(_ context.Context, node string) error { by <- node; return proven(core, node) })
	if got := <-by; got != "n2" {
		t.Error(got)
	}
}

// TestFailureIsRecorded: what the command could not write itself.
func TestFailureIsRecorded(t *testing.T) {
	api := kubetest.New(t)
	core, err := api.Core()
	if err != nil {
		t.Fatal(err)
	}
	if err := Change(t.Context(), core, func(s *State) error { s.Settings = settings(); return nil }); err != nil {
		t.Fatal(err)
	}
	node(t, api, "n1", func(context.Context, string) error { return errors.New("killed") })
	for {
		s, err := Load(t.Context(), core)
		if err != nil {
			t.Fatal(err)
		}
		if s.Record != nil {
			if s.Record.Error != "killed" || s.Record.Node != "n1" || s.Claim != nil {
				t.Errorf("%+v %+v", s.Record, s.Claim)
			}
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestSecrets(t *testing.T) {
	api := kubetest.New(t)
	core, err := api.Core()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []Secrets{{Passphrase: "p"}, {ID: "i", Secret: "s"}, {}, {}} {
		if err := StoreSecrets(t.Context(), core, want); err != nil {
			t.Fatal(err)
		}
		if got, err := LoadSecrets(t.Context(), core); err != nil || got != want {
			t.Errorf("%+v, %v, want %+v", got, err, want)
		}
	}
}
