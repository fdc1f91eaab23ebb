package hostnet

import (
	"context"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

// TestWatchLock has runs of a program that opens a lock: those of others are reported, our own are not, and both together are.
func TestWatchLock(t *testing.T) {
	lock := filepath.Join(t.TempDir(), "lock")
	var own atomic.Int64
	reports := make(chan struct{}, 100)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- watchLock(ctx, lock, &own, func() { reports <- struct{}{} }) }()
	open := func(path string) {
		t.Helper()
		f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	reported := func(what string, want bool) {
		t.Helper()
		limit := 300 * time.Millisecond
		if want {
			limit = 10 * time.Second
		}
		select {
		case <-reports:
			if !want {
				t.Errorf("%s was reported", what)
			}
		case <-time.After(limit):
			if want {
				t.Errorf("%s was not reported", what)
			}
		}
		for len(reports) > 0 {
			<-reports
		}
	}
	for range 100 { // until it watches
		open(lock)
		time.Sleep(10 * time.Millisecond)
		if len(reports) > 0 {
			break
		}
	}
	reported("the run of another program", true)
	time.Sleep(100 * time.Millisecond)
	for len(reports) > 0 {
		<-reports
	}
	open(lock + "2")
	reported("another file", false)
	own.Add(1)
	open(lock)
	reported("an own run", false)
	own.Add(1)
	open(lock)
	open(lock)
	reported("an own run and one of another program", true)
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
