#!/bin/sh
# retry.OnError of client-go does not return the error of its last try when that is one of a context
# (context.Canceled, context.DeadlineExceeded, also wrapped) and a try before it met a conflict: it
# returns the conflict. So a write that was cancelled or too slow looks like one that is worth another
# try, and a caller that tries again on a conflict never sees that its time is over.
#
# Seen with k8s.io/client-go v0.37.1: "IsConflict: true, is the context's error: false, tries: 2".
# Exits non-zero when that changes.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
cat > go.mod <<'EOF'
module example.org/retry
go 1.26
require k8s.io/client-go v0.37.1
EOF
cat > main.go <<'EOF'
package main

import (
	"context"
	"errors"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/util/retry"
)

func main() {
	conflict := apierrors.NewConflict(schema.GroupResource{Resource: "secrets"}, "x", errors.New("changed"))
	ended := fmt.Errorf("cannot write the object: %w", context.DeadlineExceeded)
	tries := 0
	err := retry.RetryOnConflict(retry.DefaultRetry, func() error {
		if tries++; tries == 1 {
			return conflict
		}
		return ended
	})
	fmt.Printf("IsConflict: %t, is the context's error: %t, tries: %d\n", apierrors.IsConflict(err), errors.Is(err, context.DeadlineExceeded), tries)
}
EOF
export GOFLAGS=-mod=mod
go mod tidy >/dev/null 2>&1
go run . | tee out
grep -qx "IsConflict: true, is the context's error: false, tries: 2" out
