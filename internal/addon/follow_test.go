package addon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"
)

// TestFollowOwnResolvers is a worker: only DNS servers on it are replaced, and only where they ask its name servers.
func TestFollowOwnResolvers(t *testing.T) {
	pod := func(name, node, app string) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: name, UID: types.UID(name), Labels: map[string]string{"k8s-app": app}}, Spec: corev1.PodSpec{NodeName: node}}
	}
	for given, want := range map[string]string{"forward . 192.0.2.53": "dns other", "import upstream-{$MICROK8S_UPSTREAM}.conf": "other"} {
		t.Run(given, func(t *testing.T) {
			client := fake.NewClientset(pod("dns", "w1", "kube-dns"), pod("other", "w1", "web"), &corev1.ConfigMap{
				ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: "coredns"}, Data: map[string]string{"Corefile": given},
			})
			asked := make(chan string, 100)
			client.PrependReactor("list", "pods", func(a k8stesting.Action) (bool, runtime.Object, error) {
				select {
				case asked <- a.(k8stesting.ListAction).GetListRestrictions().Fields.String():
				default:
				}
				return false, nil, nil
			})
			file := filepath.Join(t.TempDir(), "resolv.conf")
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- FollowOwnResolvers(ctx, client, "w1", slog.New(slog.DiscardHandler), file) }()
			var fields string
			for i := 0; fields == ""; i++ { // the watch may not be there yet
				if err := os.WriteFile(file, fmt.Appendf(nil, "nameserver 192.0.2.%d\n", i%250), 0o644); err != nil {
					t.Fatal(err)
				}
				select {
				case fields = <-asked:
				case <-time.After(2 * resolverPause):
				}
			}
			if fields != "spec.nodeName=w1" {
				t.Errorf("pods are listed with %q, which a kubelet may not", fields)
			}
			time.Sleep(resolverPause / 2)
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
			left, err := client.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{})
			if err != nil {
				t.Fatal(err)
			}
			var names []string
			for _, p := range left.Items {
				names = append(names, p.Name)
			}
			slices.Sort(names)
			if got := strings.Join(names, " "); got != want {
				t.Errorf("left: %s, want %s", got, want)
			}
		})
	}
}

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
