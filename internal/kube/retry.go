package kube

import (
	"context"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/wait"
)

// conflictBackoff tries for some 10 s: as many nodes as a cluster has may write at the same time.
// It has no Cap, at which a wait.Backoff ends.
var conflictBackoff = wait.Backoff{Steps: 30, Duration: 10 * time.Millisecond, Factor: 1.2, Jitter: 1}

// RetryConflict runs a read, change and write of one object again, after growing pauses, while
// another writer comes in between: while the error is, or wraps, one of a conflict, or says that an
// object exists that was to be created. It returns any other error of try at once, the last one
// when it gives up, and that of ctx when it has ended.
func RetryConflict(ctx context.Context, try func() error) error {
	// Not retry.OnError of client-go, which returns the conflict of a try before where the last one
	// ended with its context (findings/client-go-retry-context.sh).
	var last error
	err := wait.ExponentialBackoffWithContext(ctx, conflictBackoff, func(context.Context) (done bool, err error) {
		if last = try(); again(last) {
			return false, nil
		}
		return true, last
	})
	if again(last) && ctx.Err() == nil {
		return last
	}
	return err
}

func again(err error) bool { return apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) }
