// Package manifests keeps in the cluster what people lay in args/manifests of a control-plane node:
// objects of Kubernetes and Helm charts. A file that changes is applied again, and what a file brought is
// removed with it.
//
// Objects are applied server-side (internal/bootstrap); charts are installed by the helm that is
// shipped. What each file brought is remembered on the node, since nothing else tells after the file is gone.
package manifests

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"microk8s/internal/atomicfile"
	"microk8s/internal/backoff"
	"microk8s/internal/bootstrap"
	"microk8s/internal/filewatch"
	"microk8s/internal/kube"
	"microk8s/internal/snapenv"
)

const (
	// Label is on each object that came from a file; its value follows from the file's name.
	Label = "microk8s.io/manifest"

	settle  = time.Second // after the last change of a file
	maxFile = 16 << 20    // bytes; a chart may be inside
)

// Controller applies the files of one node. Set all fields but Helm.
type Controller struct {
	Env    snapenv.Env
	Config *rest.Config // of the administrator
	Log    *slog.Logger
	// Report is called with what is wrong with the files, "" when nothing is.
	Report func(why string)
	// Helm runs helm with these arguments and standard input; nil is the shipped one.
	Helm func(ctx context.Context, stdin []byte, argv ...string) error

	checked bool // whether the releases were looked for since the start
}

// brought is what a file has brought to the cluster.
type brought struct {
	Kinds          []schema.GroupVersionKind `json:"kinds,omitempty"`
	Owned, Adopted []types.UID               `json:",omitempty"`
	Releases       []release                 `json:"releases,omitempty"`
}

// release is an installed chart.
type release struct {
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
	Digest    string `json:"digest"` // of everything that it was installed from
}

// record is what the node remembers: of one cluster, since another has none of it.
type record struct {
	Cluster types.UID          `json:"cluster"` // of its namespace kube-system
	Files   map[string]brought `json:"files"`
}

// Run applies the files, and again what changes, until ctx ends. What fails is tried again, with
// growing pauses.
func (c *Controller) Run(ctx context.Context) error {
	dir := c.Env.UserManifests()
	if err := errors.Join(os.MkdirAll(dir, 0o750), os.Chmod(dir, 0o750)); err != nil { // there may be secrets in them
		return fmt.Errorf("cannot make the folder of manifests: %w", err)
	}
	changed, err := filewatch.Watch(ctx, filewatch.Options{Settle: settle, Match: wanted}, dir)
	if err != nil {
		return err
	}
	waits := backoff.New(5*time.Second, 2*time.Minute)
	for {
		var again <-chan time.Time
		if err := c.sync(ctx); ctx.Err() != nil {
			return nil
		} else if err != nil {
			wait := waits.Step()
			c.Log.Warn("cannot apply all manifests", "dir", dir, "err", err, "retry_in", wait)
			c.Report(err.Error())
			again = time.After(wait)
		} else {
			waits = backoff.New(5*time.Second, 2*time.Minute)
			c.Report("")
		}
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-changed:
			if !ok && ctx.Err() == nil {
				return errors.New("the watch of the folder of manifests has ended")
			}
			waits = backoff.New(5*time.Second, 2*time.Minute)
		case <-again:
		}
	}
}

// wanted reports whether a file is read. Editors' and half-written files have other names.
func wanted(path string) bool {
	name := filepath.Base(path)
	return !strings.HasPrefix(name, ".") && slices.Contains([]string{".yaml", ".yml", ".json", ".tgz"}, filepath.Ext(name))
}

// sync makes the cluster have what the files say. It goes on after a file that fails.
func (c *Controller) sync(ctx context.Context) error {
	entries, err := os.ReadDir(c.Env.UserManifests())
	if err != nil {
		return fmt.Errorf("cannot read the manifests: %w", err)
	}
	known, err := c.load(ctx)
	if err != nil {
		return err
	}
	var errs []error
	there := map[string]bool{}
	for _, e := range entries {
		name := e.Name()
		if e.IsDir() || !wanted(name) || strings.HasSuffix(name, valuesSuffix) {
			continue
		}
		there[name] = true
		if err := c.file(ctx, name, known); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(known.Files)) {
		if there[name] {
			continue
		}
		if err := c.remove(ctx, name, known); err != nil {
			errs = append(errs, fmt.Errorf("%s is gone, but not all that came from it: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// file applies one file.
func (c *Controller) file(ctx context.Context, name string, known *record) error {
	objects, charts, err := c.read(name)
	if err != nil {
		return err
	}
	was := known.Files[name]
	result, err := bootstrap.Sync(ctx, c.Config, bootstrap.Set{
		Label: Label, Value: label(name), Objects: objects, Kinds: was.Kinds, Owned: was.Owned, Adopted: was.Adopted, Adopt: true,
	}, c.Log)
	now := brought{Kinds: kinds(objects), Owned: result.Owned, Adopted: result.Adopted, Releases: was.Releases}
	if err != nil { // nothing was removed
		now.Kinds = union(was.Kinds, now.Kinds)
		now.Owned, now.Adopted = union(was.Owned, now.Owned), union(was.Adopted, now.Adopted)
	}
	errs := []error{err, c.keep(known, name, now)}
	for _, ch := range charts {
		if slices.Contains(now.Releases, ch.release) {
			continue
		}
		now.Releases = slices.DeleteFunc(slices.Clone(now.Releases), func(r release) bool { return r.same(ch.release) })
		failed := ch.release
		failed.Digest = "" // is installed again, and removed with the file
		if err := c.install(ctx, ch); err != nil {
			errs = append(errs, err)
			now.Releases = append(now.Releases, failed)
		} else {
			c.Log.Info("installed a chart", "file", name, "release", ch.Name, "namespace", ch.Namespace)
			now.Releases = append(now.Releases, ch.release)
		}
		errs = append(errs, c.keep(known, name, now))
	}
	for _, r := range now.Releases {
		if slices.ContainsFunc(charts, func(ch chart) bool { return ch.same(r) }) {
			continue
		}
		if err := c.uninstall(ctx, r); err != nil {
			errs = append(errs, err)
			continue
		}
		now.Releases = slices.DeleteFunc(slices.Clone(now.Releases), r.same)
		errs = append(errs, c.keep(known, name, now))
	}
	return errors.Join(errs...)
}

// remove removes what a file has brought that is gone.
func (c *Controller) remove(ctx context.Context, name string, known *record) error {
	was := known.Files[name]
	var errs []error
	for _, r := range was.Releases {
		errs = append(errs, c.uninstall(ctx, r))
	}
	_, err := bootstrap.Sync(ctx, c.Config, bootstrap.Set{Label: Label, Value: label(name), Kinds: was.Kinds, Owned: was.Owned, Adopted: was.Adopted}, c.Log)
	if err := errors.Join(append(errs, err)...); err != nil {
		return err
	}
	delete(known.Files, name)
	c.Log.Info("removed what came from a manifest", "file", name)
	return c.save(known)
}

// read returns the objects and the charts of a file.
func (c *Controller) read(name string) (objects []*unstructured.Unstructured, charts []chart, err error) {
	path := filepath.Join(c.Env.UserManifests(), name)
	fi, err := os.Stat(path)
	switch {
	case err != nil:
		return nil, nil, fmt.Errorf("cannot read it: %w", err)
	case fi.Size() > maxFile:
		return nil, nil, fmt.Errorf("it has %d bytes; at most %d are read: split it", fi.Size(), maxFile)
	case filepath.Ext(name) == ".tgz":
		ch, err := c.archive(path)
		return nil, []chart{ch}, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read it: %w", err)
	}
	defer f.Close()
	all, err := bootstrap.Decode(f, path)
	if err != nil {
		return nil, nil, err
	}
	for _, o := range all {
		if !isChart(o) {
			objects = append(objects, o)
			continue
		}
		ch, err := c.chartOf(o)
		if err != nil {
			return nil, nil, err
		}
		charts = append(charts, ch)
	}
	return objects, charts, nil
}

// label is a value for a file: its name as far as a label may have it, and a digest of all of it.
func label(name string) string {
	sum := sha256.Sum256([]byte(name))
	plain := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '.' {
			return r
		}
		return '-'
	}, name)
	return "f-" + plain[:min(len(plain), 40)] + "-" + hex.EncodeToString(sum[:4])
}

func kinds(objects []*unstructured.Unstructured) (out []schema.GroupVersionKind) {
	for _, o := range objects {
		out = union(out, []schema.GroupVersionKind{o.GroupVersionKind()})
	}
	return out
}

func union[T comparable](a, b []T) []T {
	out := slices.Clone(a)
	for _, x := range b {
		if !slices.Contains(out, x) {
			out = append(out, x)
		}
	}
	return out
}

// load reads what the node remembers of this cluster. Releases that somebody removed meanwhile, as reset does,
// lose their digest, so that they are installed again.
func (c *Controller) load(ctx context.Context) (*record, error) {
	core, err := kube.New(c.Config)
	if err != nil {
		return nil, err
	}
	var system corev1.Namespace
	if err := core.Get().Resource("namespaces").Name(metav1.NamespaceSystem).Do(ctx).Into(&system); err != nil {
		return nil, fmt.Errorf("cannot read which cluster this is: %w", err)
	}
	known := &record{}
	data, err := os.ReadFile(c.Env.ManifestsState())
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("cannot read what manifests have brought: %w", err)
	default:
		if err := json.Unmarshal(data, known); err != nil {
			return nil, fmt.Errorf("cannot read what manifests have brought: %w; delete %s, and what should go by hand", err, c.Env.ManifestsState())
		}
	}
	if known.Cluster != system.UID || known.Files == nil {
		known = &record{Cluster: system.UID, Files: map[string]brought{}}
	}
	for _, f := range known.Files {
		for i, r := range f.Releases {
			if !c.checked && c.helm(ctx, nil, "status", "--namespace", r.Namespace, "--", r.Name) != nil {
				f.Releases[i].Digest = ""
			}
		}
	}
	c.checked = true
	return known, ctx.Err()
}

// keep notes what a file has brought.
func (c *Controller) keep(known *record, name string, now brought) error {
	known.Files[name] = now
	return c.save(known)
}

func (c *Controller) save(known *record) error {
	data, err := json.MarshalIndent(known, "", "  ")
	if err == nil {
		err = atomicfile.Write(c.Env.ManifestsState(), append(data, '\n'), 0o600, nil)
	}
	if err != nil {
		return fmt.Errorf("cannot note what manifests have brought: %w", err)
	}
	return nil
}
