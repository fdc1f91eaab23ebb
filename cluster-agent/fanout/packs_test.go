package fanout

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	corev1 "k8s.io/api/core/v1"

	"microk8s/internal/pack"
)

// aPack makes a pack and keeps it in this node's folder.
func aPack(t *testing.T, a *agents) pack.Kept {
	t.Helper()
	cfg, err := empty.Image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cfg = cfg.DeepCopy()
	cfg.Architecture = runtime.GOARCH
	img, err := mutate.ConfigFile(empty.Image, cfg)
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	if _, err := pack.Write(&buf, pack.Manifest{Name: "thing", Version: "v1", Architecture: runtime.GOARCH}, map[string]v1.Image{"a.test/one:1": img}); err != nil {
		t.Fatal(err)
	}
	in, err := pack.Receive(a.c.Env.Packs(), &buf)
	if err != nil {
		t.Fatal(err)
	}
	if err := in.Commit(); err != nil {
		t.Fatal(err)
	}
	kept, _ := pack.List(a.c.Env.Packs())
	if len(kept) != 1 {
		t.Fatalf("kept: %v", kept)
	}
	return kept[0]
}

// ready makes a node one of an architecture that is ready.
func (a *agents) ready(name, arch string) {
	a.api.Edit("v1/nodes/"+name, func(o map[string]any) {
		status, _ := o["status"].(map[string]any)
		status["nodeInfo"] = map[string]any{"architecture": arch}
		status["conditions"] = []any{map[string]any{"type": "Ready", "status": "True"}}
	})
}

func (a *agents) annotations(name string) map[string]string {
	core, err := a.api.Core()
	if err != nil {
		a.t.Fatal(err)
	}
	nodes, err := core.Nodes(a.t.Context())
	if err != nil {
		a.t.Fatal(err)
	}
	for _, n := range nodes {
		if n.Name == name {
			return n.Annotations
		}
	}
	return nil
}

// TestPacksReachNodesThatJoin: a pack in the folder of a control-plane node comes to each node of its architecture, once,
// also to those that join later and to one that did not take it at first.
func TestPacksReachNodesThatJoin(t *testing.T) {
	a := newAgents(t)
	a.node("n1", "127.0.0.1", a.ca, a.caKey, "x", net.IPv4(127, 0, 0, 1))
	a.node("w1", "127.0.0.2", a.ca, a.caKey, "system:node:w1")
	a.node("arm", "127.0.0.3", a.ca, a.caKey, "system:node:arm")
	a.node("old", "127.0.0.4", a.ca, a.caKey, "system:node:old")
	for _, n := range []string{"n1", "w1", "old"} {
		a.ready(n, runtime.GOARCH)
	}
	a.ready("arm", "other")
	kept := aPack(t, a)
	var mu sync.Mutex
	refused := map[string]int{}
	a.importing = func(node string, body []byte) (int, string) {
		mu.Lock()
		defer mu.Unlock()
		if node == "w1" && refused[node] == 0 {
			refused[node]++
			return 500, `{"error":"the disk of this node is full"}`
		}
		if node == "old" {
			return 200, `{"status":"OK"}` // an earlier version
		}
		m, err := pack.Verify(bytes.NewReader(body), "")
		if err != nil {
			t.Errorf("%s got no pack: %v", node, err)
		}
		return 200, `{"status":"OK","images":["a.test/one:1"],"pack":"` + m.Digest() + `"}`
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		k := &PackController{Cluster: a.c, Node: "n1", Log: slog.New(slog.DiscardHandler), Turn: time.Millisecond, Retry: 20 * time.Millisecond}
		if err := k.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	defer running.Wait()
	defer cancel()
	has := func(node string) {
		t.Helper()
		for a.annotations(node)[packKey(kept.Manifest)] != kept.File() {
			select {
			case <-t.Context().Done():
				t.Fatalf("%s has %v", node, a.annotations(node))
			case <-time.After(5 * time.Millisecond):
			}
		}
	}
	has("n1")
	has("w1")
	a.node("w2", "127.0.0.5", a.ca, a.caKey, "system:node:w2")
	a.ready("w2", runtime.GOARCH)
	has("w2")
	cancel()
	running.Wait()
	a.mu.Lock()
	defer a.mu.Unlock()
	for node, want := range map[string]int{"n1": 0, "w2": 1, "arm": 0, "w1": 2} {
		if got := len(a.calls[node]); got != want {
			t.Errorf("%s was sent a pack %d times, want %d", node, got, want)
		}
	}
	if len(a.calls["old"]) == 0 {
		t.Error("the node of an earlier version was not tried")
	}
}

func TestImportPack(t *testing.T) {
	a := newAgents(t)
	a.node("n1", "127.0.0.1", a.ca, a.caKey, "x", net.IPv4(127, 0, 0, 1))
	a.node("arm", "127.0.0.3", a.ca, a.caKey, "system:node:arm")
	a.ready("n1", runtime.GOARCH)
	a.ready("arm", "other")
	kept := aPack(t, a)
	a.importing = func(string, []byte) (int, string) {
		return 200, `{"status":"OK","pack":"` + kept.Digest() + `"}`
	}
	fit, others, err := a.c.PackNodes(t.Context(), kept.Manifest)
	if err != nil || strings.Join(fit, " ") != "n1" || strings.Join(others, " ") != "arm" {
		t.Fatalf("%v, others %v, %v", fit, others, err)
	}
	open := func() (io.ReadCloser, error) { return os.Open(filepath.Clean(kept.Path)) }
	results, err := a.c.ImportPack(t.Context(), kept.Manifest, open, fit...)
	if err != nil || len(results) != 1 || results[0].Err != nil {
		t.Fatalf("%+v, %v", results, err)
	}
	n := &corev1.Node{}
	n.Annotations = a.annotations("n1")
	if !HasPack(n, kept.Manifest) {
		t.Errorf("n1 has %v", n.Annotations)
	}
	if results, err := a.c.ImportPack(t.Context(), kept.Manifest, open); len(results) > 0 || err != nil {
		t.Errorf("to no node: %+v, %v", results, err)
	}
	if len(a.calls["arm"]) > 0 {
		t.Error("a node of another architecture was sent the pack")
	}
}
