// Package backoff makes the pauses of loops that try again until they succeed: one policy for all.
package backoff

import (
	"math"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"
)

// New returns pauses, each taken with Step, that begin with first and double until last, at which they
// stay. Each is up to a fifth longer by chance, so that nodes that failed together do not try together.
// Success starts over with a new one.
func New(first, last time.Duration) wait.Backoff {
	return wait.Backoff{Duration: first, Factor: 2, Jitter: 0.2, Steps: math.MaxInt32, Cap: last}
}
