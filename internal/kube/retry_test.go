package kube

import (
	"context"
	"errors"
	"fmt"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

func TestRetryConflict(t *testing.T) {
	secrets := schema.GroupResource{Resource: "secrets"}
	conflict := fmt.Errorf("cannot write: %w", apierrors.NewConflict(secrets, "x", errors.New("changed")))
	exists, other := apierrors.NewAlreadyExists(secrets, "x"), errors.New("no")
	for _, tc := range []struct {
		name    string
		answers []error
		want    error
	}{
		{"at once", []error{nil}, nil},
		{"after others", []error{conflict, exists, conflict, conflict, conflict, conflict, nil}, nil},
		{"another error", []error{conflict, other}, other},
		{"a call that was cancelled", []error{context.Canceled}, context.Canceled},
		{"one that was too slow", []error{conflict, fmt.Errorf("cannot write: %w", context.DeadlineExceeded)}, context.DeadlineExceeded},
	} {
		tries := 0
		err := RetryConflict(t.Context(), func() error { tries++; return tc.answers[tries-1] })
		if !errors.Is(err, tc.want) || tries != len(tc.answers) {
			t.Errorf("%s: %v after %d tries", tc.name, err, tries)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	tries := 0
	err := RetryConflict(ctx, func() error {
		if tries++; tries == 3 {
			cancel()
		}
		return conflict
	})
	if !errors.Is(err, context.Canceled) || tries != 3 {
		t.Errorf("after its context's end: %v, %d tries", err, tries)
	}
}
