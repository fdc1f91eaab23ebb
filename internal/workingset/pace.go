package workingset

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
)

// Pace limits how far the heap may grow beyond what is in use before it is collected: to headroom bytes,
// or least percent of what is in use where that is more, and at most Go's own 100 percent. It is for
// programs that hold much for long: with 100 percent they would hold as much again that nobody uses.
// A collection looks at what is in use once per headroom allocated, so least bounds what that costs.
//
// Nothing is changed where GOGC is set. stop ends it, and leaves the last percentage.
func Pace(headroom uint64, least int) (stop func()) {
	p := &pacer{headroom: headroom, least: least, last: 100}
	if _, set := os.LookupEnv("GOGC"); !set {
		p.arm()
	}
	return func() { p.stopped.Store(true) }
}

type pacer struct {
	headroom uint64
	least    int
	last     int // percentage
	stopped  atomic.Bool
}

// arm has adjust called after the next collection, which is when an object that nobody has is gone.
func (p *pacer) arm() {
	object := &struct{ self *pacer }{p} // with a pointer: small ones without share a place with others
	runtime.AddCleanup(object, func(p *pacer) {
		if !p.stopped.Load() {
			p.adjust()
			p.arm()
		}
	}, p)
}

func (p *pacer) adjust() {
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(live)
	if live[0].Value.Kind() != metrics.KindUint64 {
		return
	}
	if percent := p.percent(live[0].Value.Uint64()); percent != p.last {
		p.last = percent
		debug.SetGCPercent(percent)
	}
}

// percent is the percentage for so many bytes in use.
func (p *pacer) percent(live uint64) int {
	if live == 0 {
		return 100
	}
	return int(min(100, max(uint64(p.least), 100*p.headroom/live)))
}
