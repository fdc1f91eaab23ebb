package addon

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"

	"microk8s/internal/kube/kubetest"
)

// TestFollowOwnResolvers is a worker: only DNS servers on it are replaced, and only where they ask its name servers.
func TestFollowOwnResolvers(t *testing.T) {
	pod := func(name, node, app string) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: name, UID: types.UID(name), Labels: map[string]string{"k8s-app": app}}, Spec: corev1.PodSpec{NodeName: node}}
	}
	for given, want := range map[string]string{"forward . 192.0.2.53": "dns dns2 other", "import upstream-{$MICROK8S_UPSTREAM}.conf": "dns2 other"} {
		t.Run(given, func(t *testing.T) {
			api := kubetest.New(t)
			api.Set(pod("dns", "w1", "kube-dns"), pod("dns2", "n1", "kube-dns"), pod("other", "w1", "web"), &corev1.ConfigMap{
				ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: "coredns"}, Data: map[string]string{"Corefile": given},
			})
			core, err := api.Core()
			if err != nil {
				t.Fatal(err)
			}
			asked := make(chan string, 100)
			api.Refuse = func(r *http.Request) int {
				if strings.HasSuffix(r.URL.Path, "/pods") {
					select {
					case asked <- r.URL.Query().Get("fieldSelector"):
					default:
					}
				}
				return 0
			}
			file := filepath.Join(t.TempDir(), "resolv.conf")
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- FollowOwnResolvers(ctx, core, "w1", slog.New(slog.DiscardHandler), file) }()
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
			var names []string
			for _, path := range api.Paths("pods") {
				names = append(names, filepath.Base(path))
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
