package backoff

import (
	"testing"
	"time"
)

// TestPauses holds that the pauses do not end at the longest one, as those of a wait.Backoff with few steps.
func TestPauses(t *testing.T) {
	b := New(time.Second, 5*time.Second)
	for i, want := range []time.Duration{1, 2, 4, 5, 5, 5, 5} {
		want *= time.Second
		if got := b.Step(); got < want || got > want+want/5 {
			t.Errorf("pause %d is %s, want %s and up to a fifth more", i, got, want)
		}
	}
}
