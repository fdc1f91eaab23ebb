package addon

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

func TestFollowResolvers(t *testing.T) {
	s, f := open(t)
	if err := s.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "resolv.conf")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file+".new", []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	write("nameserver 192.0.2.1\n")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.FollowResolvers(ctx, file) }()
	changed := func() bool {
		v, _, _ := unstructured.NestedString(f.Get(dnsObjects[0]).Object, "spec", "template", "metadata", "annotations", resolversAnnotation)
		return v != ""
	}
	// The watch may not be there yet: each round is another change.
	again := time.NewTicker(2 * resolverPause)
	defer again.Stop()
	for i := 0; !changed(); i++ {
		if i > 60 {
			t.Fatal("CoreDNS was not started anew")
		}
		write(fmt.Sprintf("search a.test\nnameserver 192.0.2.%d\n", 2+i%7))
		<-again.C
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
