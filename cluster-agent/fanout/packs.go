package fanout

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"

	"microk8s/internal/filewatch"
	"microk8s/internal/kube"
	"microk8s/internal/pack"
)

// packAnnotation begins the annotations of a Node that say which packs of addons it keeps: the rest of
// the key is of the pack's digest, the value the name of its file. They go with the Node object, so a
// node that joins again gets the packs again.
const packAnnotation = "pack.microk8s.io/"

func packKey(m pack.Manifest) string {
	return packAnnotation + strings.TrimPrefix(m.Digest(), "sha256:")[:32]
}

// HasPack reports whether a node keeps a pack, as far as the cluster knows.
func HasPack(n *corev1.Node, m pack.Manifest) bool {
	_, ok := n.Annotations[packKey(m)]
	return ok
}

// PackNodes returns the names of the nodes of a pack's architecture, and of the others, sorted.
func (c *Cluster) PackNodes(ctx context.Context, m pack.Manifest) (fit, others []string, err error) {
	core, err := c.core()
	if err != nil {
		return nil, nil, err
	}
	list, err := core.Nodes(ctx)
	if err != nil {
		return nil, nil, err
	}
	for i := range list {
		if architecture(&list[i]) == m.Architecture {
			fit = append(fit, list[i].Name)
		} else {
			others = append(others, list[i].Name)
		}
	}
	slices.Sort(fit)
	slices.Sort(others)
	return fit, others, nil
}

func architecture(n *corev1.Node) string {
	return cmp.Or(n.Status.NodeInfo.Architecture, n.Labels[corev1.LabelArchStable])
}

// ImportPack sends a pack of addons to the named nodes, which keep it and load its images, and notes in
// their Node objects that they have it. An agent of another build loads the images only: its result
// has no [api.ImportResponse.Pack], and it is sent the pack again later.
func (c *Cluster) ImportPack(ctx context.Context, m pack.Manifest, open func() (io.ReadCloser, error), names ...string) ([]Result, error) {
	if len(names) == 0 {
		return nil, nil
	}
	results, err := c.ImportImage(ctx, open, names...)
	if err != nil {
		return nil, err
	}
	for i, r := range results {
		if r.Err == nil && r.Imported.Pack == m.Digest() {
			results[i].Err = c.notePack(ctx, r.Name, m)
		}
	}
	return results, nil
}

// notePack writes down that a node has a pack.
func (c *Cluster) notePack(ctx context.Context, node string, m pack.Manifest) error {
	core, err := c.core()
	if err != nil {
		return err
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]string{packKey(m): m.File()}}})
	if err != nil {
		return err
	}
	if err := core.Patch(types.MergePatchType).Resource("nodes").Name(node).Body(patch).Do(ctx).Error(); err != nil {
		return fmt.Errorf("it has the pack, and that cannot be noted in its Node object: %w", err)
	}
	return nil
}

const (
	packSettle = time.Second      // after a change in the folder of packs
	packTurn   = time.Minute      // that each control-plane node leaves the ones before it
	packRetry  = 30 * time.Second // after a node did not take a pack
)

// PackController passes on the packs that this control-plane node keeps: to nodes that join, and to all
// where somebody laid a pack into the sideload folder of this node. Of several control-plane nodes with a
// pack the first by name does it; each further one a minute later, if it is still to be done.
type PackController struct {
	Cluster *Cluster
	Node    string // this one
	Log     *slog.Logger
	Turn    time.Duration // for tests; 0 means a minute
	Retry   time.Duration // for tests; 0 means 30 s
}

// Run goes on until ctx ends.
func (k *PackController) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		if err := k.follow(ctx); err != nil && ctx.Err() == nil {
			k.Log.Debug("cannot watch nodes and packs of addons now", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(watchRetry):
		}
	}
	return nil
}

// follow watches the nodes and the folder until the API server ends a watch.
func (k *PackController) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	dir := k.Cluster.Env.Packs()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	changed, err := filewatch.Watch(ctx, filewatch.Options{Settle: packSettle}, dir)
	if err != nil {
		return err
	}
	core, err := k.Cluster.core()
	if err != nil {
		return err
	}
	nodes, err := open(ctx, core, "", "nodes", fields.Everything())
	if err != nil {
		return err
	}
	defer nodes.Stop()
	kept, _ := pack.List(dir)
	known := map[string]*corev1.Node{}
	since := map[string]time.Time{} // since when a node lacks a pack, by node and digest
	var again <-chan time.Time
	for {
		select {
		case e, ok := <-nodes.ResultChan():
			if !ok {
				return nil
			}
			n, ok := e.Object.(*corev1.Node)
			if !ok {
				return nil // an error, such as a version that is too old
			}
			before := known[n.Name]
			if known[n.Name] = n; e.Type == "DELETED" {
				delete(known, n.Name)
			}
			if before != nil && kube.Ready(before) == kube.Ready(n) && len(before.Annotations) == len(n.Annotations) && before.UID == n.UID {
				continue // a heartbeat, say
			}
		case _, ok := <-changed:
			if !ok {
				return errors.New("watching the folder of packs has ended")
			}
			kept, _ = pack.List(dir)
		case <-again:
		case <-ctx.Done():
			return nil
		}
		again = nil
		if wait := k.deliver(ctx, kept, known, since); wait > 0 {
			again = time.After(wait)
		}
	}
}

// deliver sends each pack to the nodes that are ready, lack it and are this node's to serve. It returns after what
// time to look again; 0 means when something changes.
func (k *PackController) deliver(ctx context.Context, kept []pack.Kept, nodes map[string]*corev1.Node, since map[string]time.Time) time.Duration {
	var wait time.Duration
	for _, p := range kept {
		// One that came just now is being sent to all nodes, most likely, by who imports it here.
		fresh := time.Time{}
		if fi, err := os.Stat(p.Path); err == nil {
			fresh = fi.ModTime().Add(cmp.Or(k.Turn, packTurn))
		}
		before := 0 // control-plane nodes that come before this one
		var lack []string
		for name, n := range nodes {
			switch {
			case architecture(n) != p.Architecture || !kube.Ready(n):
				continue
			case !HasPack(n, p.Manifest):
				lack = append(lack, name)
				continue
			case name < k.Node && controlPlane(n):
				before++
			}
			delete(since, name+p.Digest())
		}
		slices.Sort(lack)
		for _, name := range lack {
			key := name + p.Digest()
			if _, ok := since[key]; !ok {
				since[key] = time.Now()
			}
			due := since[key].Add(time.Duration(before) * cmp.Or(k.Turn, packTurn))
			if due.Before(fresh) {
				due = fresh
			}
			if d := time.Until(due); d > 0 && name != k.Node {
				if wait == 0 || d < wait {
					wait = d
				}
				continue
			}
			if err := k.send(ctx, p, name); err != nil {
				retry := cmp.Or(k.Retry, packRetry)
				k.Log.Warn("cannot pass a pack of addons to a node", "node", name, "pack", p.File(), "err", err, "retry_in", retry)
				if wait == 0 || retry < wait {
					wait = retry
				}
				continue
			}
			if n := nodes[name].DeepCopy(); n.Annotations[packKey(p.Manifest)] == "" { // its event comes
				if n.Annotations == nil {
					n.Annotations = map[string]string{}
				}
				n.Annotations[packKey(p.Manifest)] = p.File()
				nodes[name] = n
			}
		}
	}
	return wait
}

// send brings one pack to one node. This node has it already.
func (k *PackController) send(ctx context.Context, p pack.Kept, node string) error {
	if node == k.Node {
		return k.Cluster.notePack(ctx, node, p.Manifest)
	}
	results, err := k.Cluster.ImportPack(ctx, p.Manifest, func() (io.ReadCloser, error) { return os.Open(p.Path) }, node)
	if err == nil {
		err = Failed(results)
	}
	switch {
	case err != nil:
		return err
	case len(results) == 1 && results[0].Imported.Pack == "":
		return errors.New("its cluster agent is of an earlier version, which keeps no packs")
	}
	k.Log.Info("passed a pack of addons to a node", "node", node, "pack", p.File())
	return nil
}

func controlPlane(n *corev1.Node) bool {
	_, ok := n.Labels["node.kubernetes.io/microk8s-controlplane"]
	return ok
}
