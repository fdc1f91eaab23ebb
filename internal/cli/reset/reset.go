// Package reset empties a cluster: it deletes every object that people, addons and workloads
// have made, in every API that the server has, and leaves what Kubernetes makes for itself
// (protected.go). It works from what the server lists, not from a list of kinds, so that
// custom resources and kinds of later versions are covered.
//
// The node's services, files and volumes' data are up to the caller.
package reset

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	addons "microk8s/internal/addon/object"
)

// Limits. Objects get Patience to end in order (pods to stop, finalizers to be worked off);
// then pods are removed without waiting for the kubelet and finalizers, whose owners may have
// been deleted as well, are taken away. What is left after Force more is an error.
const (
	Patience = 45 * time.Second
	Force    = 45 * time.Second

	round    = time.Second // between two looks at what is left
	podGrace = 5           // seconds
	workers  = 16
)

// Cleaner empties one cluster.
type Cleaner struct {
	Discovery discovery.DiscoveryInterface
	Dynamic   dynamic.Interface

	// KeepVolumes keeps the data behind PersistentVolumes: their reclaim policy becomes
	// Retain before they are deleted.
	KeepVolumes bool

	// Say tells a person what is being done; nil is silence.
	Say func(format string, a ...any)

	// Patience, Force and Round replace the constants; 0 means them.
	Patience, Force, Round time.Duration

	said   map[string]bool
	remade map[string]map[types.UID]bool // by kind, namespace and name
}

// remadeAfter is how many times an object must have come back to be taken for one that
// Kubernetes, or the product itself, recreates whenever it is missing. Such an object is part
// of the initial state.
const remadeAfter = 3

// New makes a Cleaner for the cluster of cfg.
func New(cfg *rest.Config) (*Cleaner, error) {
	cfg = rest.CopyConfig(cfg)
	cfg.QPS, cfg.Burst = 200, 400 // thousands of small requests to our own machine
	cfg.WarningHandler = rest.NoWarnings{}
	d, err := discovery.NewDiscoveryClientForConfig(cfg)
	if err != nil {
		return nil, err
	}
	dyn, err := dynamic.NewForConfig(cfg)
	if err != nil {
		return nil, err
	}
	return &Cleaner{Discovery: d, Dynamic: dyn}, nil
}

// Clean deletes until nothing is left. It may be interrupted and run again.
func (c *Cleaner) Clean(ctx context.Context) error {
	c.said, c.remade = map[string]bool{}, map[string]map[types.UID]bool{}
	or := func(d, def time.Duration) time.Duration {
		if d == 0 {
			return def
		}
		return d
	}
	if c.Say == nil {
		c.Say = func(string, ...any) {}
	}
	began := time.Now()
	patience := or(c.Patience, Patience)
	limit := patience + or(c.Force, Force)
	for {
		force := time.Since(began) > patience
		left, err := c.sweep(ctx, force)
		if err != nil {
			return fmt.Errorf("cannot empty the cluster: %w", err)
		}
		if len(left) == 0 {
			return nil
		}
		if time.Since(began) > limit {
			return fmt.Errorf("cannot empty the cluster: %s left after %s", shorten(left), limit)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(or(c.Round, round)):
		}
	}
}

// shorten names the first few of many.
func shorten(left []string) string {
	const some = 5
	slices.Sort(left)
	if len(left) > some {
		return fmt.Sprintf("%s and %d more are", strings.Join(left[:some], ", "), len(left)-some)
	}
	return strings.Join(left, ", ") + " are"
}

// resource is a kind of objects as the server lists it.
type resource struct {
	gvr        schema.GroupVersionResource
	kind       string
	namespaced bool
}

// resources lists the kinds whose objects can be listed and deleted, in the order in which
// they should go.
func (c *Cleaner) resources() ([]resource, error) {
	lists, err := discovery.ServerPreferredResources(c.Discovery)
	// An API served by a pod that is gone cannot be listed. The others are known, and its
	// registration is among what is deleted.
	if err != nil && len(lists) == 0 {
		return nil, fmt.Errorf("cannot list the APIs: %w", err)
	}
	var out []resource
	for _, l := range lists {
		gv, err := schema.ParseGroupVersion(l.GroupVersion)
		if err != nil {
			continue
		}
		for _, r := range l.APIResources {
			if strings.Contains(r.Name, "/") || !slices.Contains(r.Verbs, "list") || !slices.Contains(r.Verbs, "delete") {
				continue
			}
			res := resource{gvr: gv.WithResource(r.Name), kind: r.Kind, namespaced: r.Namespaced}
			if !kept(res) {
				out = append(out, res)
			}
		}
	}
	slices.SortStableFunc(out, func(x, y resource) int { return stage(x) - stage(y) })
	return out, nil
}

// stage orders the kinds: first what could refuse the deletion of other things, then what
// makes pods, then volumes' policies, then the rest.
func stage(r resource) int {
	switch r.gvr.Resource {
	case "validatingwebhookconfigurations", "mutatingwebhookconfigurations", "apiservices",
		"validatingadmissionpolicybindings", "validatingadmissionpolicies",
		"mutatingadmissionpolicybindings", "mutatingadmissionpolicies":
		return 0
	case "cronjobs", "jobs", "deployments", "daemonsets", "statefulsets", "replicasets",
		"replicationcontrollers", "horizontalpodautoscalers":
		return 1
	case "persistentvolumes":
		return 2
	}
	return 3
}

// sweep deletes everything once and names what is still there.
func (c *Cleaner) sweep(ctx context.Context, force bool) ([]string, error) {
	all, err := c.resources()
	if err != nil {
		return nil, err
	}
	system, err := c.systemAccounts(ctx)
	if err != nil {
		return nil, err
	}
	var left []string
	for _, r := range all {
		list, err := c.Dynamic.Resource(r.gvr).List(ctx, metav1.ListOptions{})
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case gone(err):
			continue // deleted together with its kind
		case r.gvr.Group == "" || apierrors.IsUnauthorized(err) || apierrors.IsForbidden(err):
			return nil, fmt.Errorf("cannot list %s: %w", r.gvr.Resource, err)
		default: // an API whose server has gone away with what was deleted
			continue
		}
		var found []unstructured.Unstructured
		for _, o := range list.Items {
			if !protected(r, &o, system) && !c.comesBack(r, &o) {
				found = append(found, o)
			}
		}
		if len(found) == 0 {
			continue
		}
		c.announce(r, len(found))
		if err := c.deleteAll(ctx, r, found, force); err != nil {
			return nil, err
		}
		for _, o := range found {
			left = append(left, fullName(r, &o))
		}
	}
	return left, nil
}

func fullName(r resource, o *unstructured.Unstructured) string {
	return strings.TrimPrefix(o.GetNamespace()+"/", "/") + r.gvr.Resource + "/" + o.GetName()
}

// comesBack notes that an object was seen and reports whether it is one that cannot be got rid of.
func (c *Cleaner) comesBack(r resource, o *unstructured.Unstructured) bool {
	name := fullName(r, o)
	if c.remade[name] == nil {
		c.remade[name] = map[types.UID]bool{}
	}
	c.remade[name][o.GetUID()] = true
	return len(c.remade[name]) > remadeAfter
}

func (c *Cleaner) announce(r resource, n int) {
	if !c.said[r.gvr.Resource] {
		c.said[r.gvr.Resource] = true
		c.Say("Removing %d %s", n, r.gvr.Resource)
	}
}

func (c *Cleaner) deleteAll(ctx context.Context, r resource, objects []unstructured.Unstructured, force bool) error {
	var group errgroup.Group
	group.SetLimit(workers)
	var failed atomic.Pointer[error]
	for _, o := range objects {
		group.Go(func() error {
			if err := c.delete(ctx, r, &o, force); err != nil && !gone(err) {
				failed.Store(&err)
			}
			return nil
		})
	}
	_ = group.Wait()
	if err := ctx.Err(); err != nil {
		return err
	}
	// Early on the next round tries again; a conflict or a slow webhook is nothing to tell.
	if err := failed.Load(); err != nil && force {
		c.Say("some %s cannot be deleted: %v", r.gvr.Resource, *err)
	}
	return nil
}

func (c *Cleaner) delete(ctx context.Context, r resource, o *unstructured.Unstructured, force bool) error {
	client := c.objects(r, o)
	if r.gvr.Resource == "persistentvolumes" && c.KeepVolumes {
		keep := []byte(`{"spec":{"persistentVolumeReclaimPolicy":"Retain"}}`)
		if _, err := client.Patch(ctx, o.GetName(), types.MergePatchType, keep, metav1.PatchOptions{}); err != nil {
			return err
		}
	}
	opts := metav1.DeleteOptions{}
	background := metav1.DeletePropagationBackground
	opts.PropagationPolicy = &background
	if r.gvr.Group == "" && r.gvr.Resource == "pods" {
		grace := int64(podGrace)
		if force {
			grace = 0
		}
		opts.GracePeriodSeconds = &grace
	}
	if o.GetDeletionTimestamp() == nil || force {
		if err := client.Delete(ctx, o.GetName(), opts); err != nil {
			return err
		}
	}
	if !force && r.gvr != addons.Resource { // of addons nothing is left that its finalizer waits for
		return nil
	}
	if r.gvr.Resource == "namespaces" && r.gvr.Group == "" {
		return c.finalizeNamespace(ctx, o)
	}
	if len(o.GetFinalizers()) == 0 {
		return nil
	}
	_, err := client.Patch(ctx, o.GetName(), types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{})
	return err
}

// finalizeNamespace ends a namespace whose content cannot be found out any more, because an
// API server of an extension has gone.
func (c *Cleaner) finalizeNamespace(ctx context.Context, o *unstructured.Unstructured) error {
	o = o.DeepCopy()
	_ = unstructured.SetNestedSlice(o.Object, []any{}, "spec", "finalizers")
	_, err := c.Dynamic.Resource(schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}).
		Update(ctx, o, metav1.UpdateOptions{}, "finalize")
	return err
}

func (c *Cleaner) objects(r resource, o *unstructured.Unstructured) dynamic.ResourceInterface {
	if r.namespaced {
		return c.Dynamic.Resource(r.gvr).Namespace(o.GetNamespace())
	}
	return c.Dynamic.Resource(r.gvr)
}

// gone reports whether an object or its whole kind does not exist any more.
func gone(err error) bool {
	return apierrors.IsNotFound(err) || apierrors.IsMethodNotSupported(err)
}
