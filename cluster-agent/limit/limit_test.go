package limit

import (
	"context"
	"net/netip"
	"sync"
	"testing"
	"time"
)

func TestDelays(t *testing.T) {
	now := time.Unix(1e9, 0)
	var slept []time.Duration
	l := &Limiter{Now: func() time.Time { return now }, Sleep: func(_ context.Context, d time.Duration) { slept = append(slept, d) }}
	a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	for range 10 {
		l.Failed(t.Context(), a)
	}
	if slept[0] != First || slept[1] != 2*First || slept[9] != Longest {
		t.Errorf("%v", slept)
	}
	l.Failed(t.Context(), b) // others do not suffer
	if slept[10] != First {
		t.Errorf("another source waits %v", slept[10])
	}
	now = now.Add(Forget + time.Second)
	l.Failed(t.Context(), a)
	if slept[11] != First {
		t.Errorf("after a quiet minute: %v", slept[11])
	}
}

// TestBusy holds back answers until their source has as many as it may.
func TestBusy(t *testing.T) {
	release := make(chan struct{})
	waiting := make(chan struct{}, Waiting)
	l := &Limiter{Sleep: func(context.Context, time.Duration) {
		waiting <- struct{}{}
		<-release
	}}
	a := netip.MustParseAddr("10.0.0.1")
	var group sync.WaitGroup
	for range Waiting {
		if l.Busy(a) {
			t.Fatal("busy too early")
		}
		group.Go(func() { l.Failed(t.Context(), a) })
		<-waiting
	}
	if !l.Busy(a) || l.Busy(netip.MustParseAddr("10.0.0.2")) {
		t.Error("the source may go on, or another may not")
	}
	close(release)
	group.Wait()
	if l.Busy(a) {
		t.Error("busy for ever")
	}
}

func TestForgetsSources(t *testing.T) {
	now := time.Unix(1e9, 0)
	l := &Limiter{Now: func() time.Time { return now }, Sleep: func(context.Context, time.Duration) {}}
	for i := range 3 * sources {
		now = now.Add(time.Millisecond)
		l.Failed(t.Context(), netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}))
	}
	if len(l.sources) > sources {
		t.Errorf("%d sources are remembered", len(l.sources))
	}
}

func TestWaitsNoLongerThanTheCall(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	l := &Limiter{First: time.Hour, Longest: time.Hour}
	l.Failed(ctx, netip.MustParseAddr("10.0.0.1")) // returns
	if l.Busy(netip.MustParseAddr("10.0.0.1")) {
		t.Error("it still counts")
	}
}
