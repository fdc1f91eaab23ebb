// Package bootstrap keeps the objects in the cluster that the product itself needs: roles of
// nodes, admission policies. They travel as manifests in $SNAP/manifests; every control-plane
// node applies all of them when its API server has started, by server-side apply, and removes
// those that an earlier version had and this one has not. Objects that others made are neither
// changed nor removed (owner.go).
//
// The same for any other set of objects is [Sync], which the addons use. It does not wait for
// anything: the caller starts it when the API server answers, and again, with growing pauses,
// when it fails.
package bootstrap

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"

	"microk8s/internal/snapenv"
)

const (
	// FieldManager owns the fields that the product sets.
	FieldManager = "microk8s"

	// Label is on every object of the manifests, with the value LabelValue; an object with
	// it that is in no manifest is removed.
	Label      = "app.kubernetes.io/managed-by"
	LabelValue = "microk8s-bootstrap"

	// KeepAnnotation on an object says that it is not removed with the others, because it holds
	// data of people's; its value says which.
	KeepAnnotation = "microk8s.io/keep"

	// TheirsAnnotation on an object in a manifest says that one of that name that others made serves as well: it is
	// neither changed nor refused. Its value says why.
	TheirsAnnotation = "microk8s.io/theirs"

	// FeatureAnnotation on an object in a manifest names the Feature it belongs to.
	FeatureAnnotation = "microk8s.io/feature"
)

// Feature is a part of the product that may be switched off, and its objects with it.
type Feature string

// BuiltinNetwork is the pod network inside kubelite.
const BuiltinNetwork Feature = "builtin-network"

// Absent lists the features that this installation does not use.
func Absent(env snapenv.Env) []Feature {
	if _, err := os.Stat(env.CNIManifest()); err == nil {
		return []Feature{BuiltinNetwork}
	}
	return nil
}

// pruned are the kinds whose objects are looked through for those to remove, besides the
// kinds in the manifests. A kind that a release no longer has any object of must stay here.
var pruned = []schema.GroupVersionKind{
	{Group: "rbac.authorization.k8s.io", Version: "v1", Kind: "ClusterRole"},
	{Group: "rbac.authorization.k8s.io", Version: "v1", Kind: "ClusterRoleBinding"},
	{Group: "rbac.authorization.k8s.io", Version: "v1", Kind: "Role"},
	{Group: "rbac.authorization.k8s.io", Version: "v1", Kind: "RoleBinding"},
	{Group: "admissionregistration.k8s.io", Version: "v1", Kind: "ValidatingAdmissionPolicy"},
	{Group: "admissionregistration.k8s.io", Version: "v1", Kind: "ValidatingAdmissionPolicyBinding"},
}

// Apply makes the cluster have the objects of all manifests in dir, except those of absent
// features, and none with our label besides. It is idempotent. It goes on after an object
// that failed, but removes nothing then.
//
//	err := bootstrap.Apply(ctx, cfg, env.Manifests(), log, bootstrap.Absent(env)...)
func Apply(ctx context.Context, cfg *rest.Config, dir string, log *slog.Logger, absent ...Feature) error {
	objects, err := load(dir, absent)
	if err != nil {
		return err
	}
	_, err = Sync(ctx, cfg, Set{Label: Label, Value: LabelValue, Objects: objects, Kinds: pruned}, log)
	return err
}

// Set is objects that belong together: all that the cluster should have with one value of a
// label.
type Set struct {
	Label, Value string
	Objects      []*unstructured.Unstructured
	// Kinds are looked through for objects to remove, besides the kinds of Objects.
	Kinds []schema.GroupVersionKind
	// Owned and Adopted are the UIDs of objects that the product made, and of those of others that it
	// took over, as an earlier Result had them.
	Owned, Adopted []types.UID
	// Adopt takes over objects that others made. Those of kinds in replaceable stay theirs.
	Adopt bool
	// Everything removes objects with KeepAnnotation too.
	Everything bool
}

// Sync makes the cluster have the objects of a set, labels them, and removes what has the
// label, is not among them and was made by the product; with no objects it removes all there are.
// Objects that others made are left alone: the error then wraps a *ForeignError, except with
// Adopt. It is idempotent. It goes on after an object that failed, but removes nothing then.
func Sync(ctx context.Context, cfg *rest.Config, set Set, log *slog.Logger) (Result, error) {
	for _, o := range set.Objects {
		labels := o.GetLabels()
		if labels == nil {
			labels = map[string]string{}
		}
		labels[set.Label] = set.Value
		o.SetLabels(labels)
	}
	c, err := newCluster(cfg, log)
	if err != nil {
		return Result{}, err
	}
	return c.sync(ctx, set)
}

// ApplyFile applies the objects of one manifest as they are: for the user's own CNI at
// args/cni-network/cni.yaml. Nothing is removed when the file changes.
func ApplyFile(ctx context.Context, cfg *rest.Config, path string, log *slog.Logger) error {
	objects, err := read(path)
	if err != nil {
		return err
	}
	c, err := newCluster(cfg, log)
	if err != nil {
		return err
	}
	_, err = c.apply(ctx, Set{Objects: objects, Adopt: true})
	return err
}

// load reads the manifests of a directory.
func load(dir string, absent []Feature) ([]*unstructured.Unstructured, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		// Pruning by an empty set would take the nodes their rights.
		return nil, fmt.Errorf("cannot apply the product's manifests: none in %s; the installation is damaged, reinstall it", dir)
	}
	var out []*unstructured.Unstructured
	for _, file := range files {
		objects, err := read(file)
		if err != nil {
			return nil, err
		}
		for _, o := range objects {
			if slices.Contains(absent, Feature(o.GetAnnotations()[FeatureAnnotation])) {
				continue
			}
			out = append(out, o)
		}
	}
	return out, nil
}

// read returns the objects of a file with one or more YAML documents, in their order.
func read(path string) ([]*unstructured.Unstructured, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read the manifest: %w", err)
	}
	defer f.Close()
	return Decode(f, path)
}

// Decode returns the objects of one or more YAML documents, in their order; path is for errors.
func Decode(r io.Reader, path string) ([]*unstructured.Unstructured, error) {
	var out []*unstructured.Unstructured
	for d := yaml.NewYAMLOrJSONDecoder(r, 4096); ; {
		o := &unstructured.Unstructured{}
		if err := d.Decode(&o.Object); errors.Is(err, io.EOF) {
			return out, nil
		} else if err != nil {
			return nil, fmt.Errorf("cannot read the manifest %s: document %d: %w", path, len(out)+1, err)
		}
		if len(o.Object) == 0 {
			continue // only comments
		}
		if o.GetKind() == "" || o.GetAPIVersion() == "" || o.GetName() == "" {
			return nil, fmt.Errorf("cannot read the manifest %s: document %d lacks apiVersion, kind or metadata.name", path, len(out)+1)
		}
		out = append(out, o)
	}
}

// cluster is the API as far as it is needed.
type cluster struct {
	client dynamic.Interface
	mapper meta.ResettableRESTMapper
	log    *slog.Logger
}

func newCluster(cfg *rest.Config, log *slog.Logger) (*cluster, error) {
	// Some dozens of requests, to our own machine. With client-go's 5 a second they would take
	// longer than everything else of a node's start.
	cfg = rest.CopyConfig(cfg)
	cfg.QPS, cfg.Burst = 100, 200
	client, err := dynamic.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("cannot reach the cluster: %w", err)
	}
	found, err := discovery.NewDiscoveryClientForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("cannot reach the cluster: %w", err)
	}
	return &cluster{client: client, mapper: restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(found)), log: log}, nil
}

// sync applies objects and then removes those with the label that are not among them.
func (c *cluster) sync(ctx context.Context, set Set) (Result, error) {
	result, err := c.apply(ctx, set)
	if err != nil {
		return result, err
	}
	keep := map[string]bool{}
	kinds := slices.Clone(set.Kinds)
	for _, o := range set.Objects {
		keep[describe(o)] = true
		if gvk := o.GroupVersionKind(); !slices.Contains(kinds, gvk) {
			kinds = append(kinds, gvk)
		}
	}
	var errs []error
	for _, gvk := range kinds {
		mapping, err := c.mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
		if meta.IsNoMatchError(err) {
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("cannot look for outdated objects of kind %s: %w", gvk.Kind, err))
			continue
		}
		list, err := c.client.Resource(mapping.Resource).List(ctx, metav1.ListOptions{LabelSelector: set.Label + "=" + set.Value})
		if err != nil {
			errs = append(errs, fmt.Errorf("cannot look for outdated objects of kind %s: %w", gvk.Kind, err))
			continue
		}
		for i := range list.Items {
			o := &list.Items[i]
			o.SetGroupVersionKind(gvk)
			if _, stays := o.GetAnnotations()[KeepAnnotation]; stays && !set.Everything || keep[describe(o)] {
				continue
			}
			if set.standing(o) != mine {
				result.Left = append(result.Left, Foreign{Object: describe(o), Owner: owner(o)})
				continue
			}
			uid := o.GetUID()
			err := c.resource(mapping, o).Delete(ctx, o.GetName(), metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}})
			if err != nil && !apierrors.IsNotFound(err) {
				errs = append(errs, fmt.Errorf("cannot remove the outdated %s: %w", describe(o), err))
				continue
			}
			c.log.Info("removed an object that this version does not have", "object", describe(o))
		}
	}
	return result, errors.Join(errs...)
}

// apply applies objects, definitions of kinds first, since others may be of those kinds.
func (c *cluster) apply(ctx context.Context, set Set) (result Result, err error) {
	objects := slices.Clone(set.Objects)
	slices.SortStableFunc(objects, func(a, b *unstructured.Unstructured) int { return rank(a) - rank(b) })
	var errs []error
	for _, o := range objects {
		if err := c.applyOne(ctx, o, set, &result); err != nil {
			errs = append(errs, fmt.Errorf("cannot apply %s: %w", describe(o), err))
		}
		if ctx.Err() != nil {
			break
		}
	}
	return result, errors.Join(errs...)
}

// mapping finds the resource of a kind.
func (c *cluster) mapping(gvk schema.GroupVersionKind) (*meta.RESTMapping, error) {
	mapping, err := c.mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
	if meta.IsNoMatchError(err) {
		c.mapper.Reset() // the kind may have been defined a moment ago
		mapping, err = c.mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
	}
	return mapping, err
}

// establishing bounds the wait for a kind that was defined just now: the API server takes about a second.
const establishing = 20 * time.Second

// established is mapping, and waits for a kind that the set itself defines.
func (c *cluster) established(ctx context.Context, gvk schema.GroupVersionKind, set Set) (*meta.RESTMapping, error) {
	mapping, err := c.mapping(gvk)
	if !meta.IsNoMatchError(err) || !set.defines(gvk.GroupKind()) {
		return mapping, err
	}
	end := wait.PollUntilContextTimeout(ctx, 100*time.Millisecond, establishing, false, func(context.Context) (bool, error) {
		mapping, err = c.mapping(gvk)
		return !meta.IsNoMatchError(err), nil
	})
	return mapping, errors.Join(err, end)
}

// defines reports whether a set brings the definition of a kind.
func (s Set) defines(kind schema.GroupKind) bool {
	return slices.ContainsFunc(s.Objects, func(o *unstructured.Unstructured) bool {
		group, _, _ := unstructured.NestedString(o.Object, "spec", "group")
		name, _, _ := unstructured.NestedString(o.Object, "spec", "names", "kind")
		return o.GetKind() == "CustomResourceDefinition" && group == kind.Group && name == kind.Kind
	})
}

func (c *cluster) applyOne(ctx context.Context, o *unstructured.Unstructured, set Set, result *Result) error {
	mapping, err := c.established(ctx, o.GroupVersionKind(), set)
	if err != nil {
		return err
	}
	if mapping.Scope.Name() == meta.RESTScopeNameNamespace && o.GetNamespace() == "" {
		o.SetNamespace(metav1.NamespaceDefault) // as it is listed, later
	}
	resource := c.resource(mapping, o)
	now, err := resource.Get(ctx, o.GetName(), metav1.GetOptions{})
	exists := err == nil
	if err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	is := mine
	if exists {
		if is = set.standing(now); is == foreign {
			if serves(o) {
				return nil
			}
			if !set.Adopt {
				return &ForeignError{[]Foreign{{Object: describe(o), Owner: owner(now)}}}
			}
			if is = mine; replaceable[o.GetKind()] {
				is = shared
			}
		}
	}
	apply := func(force bool) error {
		got, err := resource.Apply(ctx, o.GetName(), o, metav1.ApplyOptions{FieldManager: FieldManager, Force: force})
		if err == nil {
			result.add(is, got.GetUID())
		}
		return err
	}
	// What was not there is not taken from somebody who makes it at this moment.
	err = apply(exists)
	switch {
	case apierrors.IsConflict(err) && !exists:
		return &ForeignError{[]Foreign{{Object: describe(o), Owner: err.Error()}}}
	case !apierrors.IsInvalid(err) || !replaceable[o.GetKind()] && !movedService(ctx, resource, o):
		return err
	case is != mine:
		return fmt.Errorf("it cannot be changed, and is not replaced because others made it (%s): %w", owner(now), err)
	}
	uid := now.GetUID()
	gone := resource.Delete(ctx, o.GetName(), metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}})
	if gone != nil && !apierrors.IsNotFound(gone) {
		return err
	}
	return apply(false)
}

// serves reports whether an object of the same name that others made takes the place of o.
func serves(o *unstructured.Unstructured) bool {
	_, ok := o.GetAnnotations()[TheirsAnnotation]
	return ok
}

// movedService reports whether o is a Service that is there with another address: it cannot be
// changed, and a Service holds nothing.
func movedService(ctx context.Context, resource dynamic.ResourceInterface, o *unstructured.Unstructured) bool {
	want, _, _ := unstructured.NestedString(o.Object, "spec", "clusterIP")
	if o.GetKind() != "Service" || want == "" {
		return false
	}
	now, err := resource.Get(ctx, o.GetName(), metav1.GetOptions{})
	if err != nil {
		return false
	}
	have, _, _ := unstructured.NestedString(now.Object, "spec", "clusterIP")
	return have != want
}

// replaceable are kinds whose fields cannot be changed, and which hold nothing: an object with
// other fields takes the place of the old one.
var replaceable = map[string]bool{"StorageClass": true, "IngressClass": true}

func (c *cluster) resource(m *meta.RESTMapping, o *unstructured.Unstructured) dynamic.ResourceInterface {
	if m.Scope.Name() != meta.RESTScopeNameNamespace {
		return c.client.Resource(m.Resource)
	}
	return c.client.Resource(m.Resource).Namespace(cmp.Or(o.GetNamespace(), metav1.NamespaceDefault))
}

// rank orders what others need before what needs it.
func rank(o *unstructured.Unstructured) int {
	switch o.GetKind() {
	case "CustomResourceDefinition", "Namespace":
		return 0
	case "ServiceAccount", "ConfigMap", "Secret", "ClusterRole", "Role":
		return 1
	}
	return 2
}

// describe names an object uniquely within a cluster.
func describe(o *unstructured.Unstructured) string {
	parts := []string{o.GetKind()}
	if group := o.GroupVersionKind().Group; group != "" {
		parts[0] += "." + group
	}
	if o.GetNamespace() != "" {
		parts = append(parts, o.GetNamespace())
	}
	return strings.Join(append(parts, o.GetName()), "/")
}
