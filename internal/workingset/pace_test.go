package workingset

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"testing"
	"time"
)

func TestPercent(t *testing.T) {
	p := &pacer{headroom: 32 << 20, least: 25}
	for live, want := range map[uint64]int{0: 100, 1 << 20: 100, 32 << 20: 100, 64 << 20: 50, 128 << 20: 25, 1 << 30: 25} {
		if got := p.percent(live); got != want {
			t.Errorf("%d bytes in use: %d %%, want %d", live, got, want)
		}
	}
}

// TestPace holds that the percentage follows what is in use, down and up.
func TestPace(t *testing.T) {
	t.Setenv("GOGC", "") // restored at the end
	if err := os.Unsetenv("GOGC"); err != nil {
		t.Fatal(err)
	}
	defer debug.SetGCPercent(debug.SetGCPercent(100))
	defer Pace(4<<20, 25)()
	held := [][]byte{make([]byte, 64<<20)}
	await(t, func(percent uint64) bool { return percent == 25 })
	held[0] = nil
	await(t, func(percent uint64) bool { return percent > 25 })
	runtime.KeepAlive(held)
}

// await collects until the percentage is as wanted: cleanups run some time after a collection.
func await(t *testing.T, ok func(percent uint64) bool) {
	t.Helper()
	now := []metrics.Sample{{Name: "/gc/gogc:percent"}}
	for range 1000 {
		runtime.GC()
		metrics.Read(now)
		if ok(now[0].Value.Uint64()) {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("the percentage stays %d", now[0].Value.Uint64())
}
