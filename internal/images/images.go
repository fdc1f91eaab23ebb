// Package images brings the container images that travel with the product into containerd,
// and takes every container of the node down. It talks to containerd's own API and, where
// pods are concerned, to its CRI API, on the same socket.
//
// Building the images is the business of scripts/images, pulling others that of the kubelet.
package images

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"microk8s/internal/pack"
	"microk8s/internal/snapenv"
)

const (
	// Namespace is where the CRI keeps images and containers.
	Namespace = "k8s.io"

	// The CRI tells the kubelet that an image with this label is never to be collected.
	pinnedLabel = "io.cri-containerd.pinned"
	pinnedValue = "pinned"

	// shippedLabel marks what Load imported, so that a later version can let go of it.
	shippedLabel = "microk8s.io/shipped"
)

// Image is one image as containerd has it.
type Image struct {
	Name   string
	Digest string
	Size   int64 // bytes of the compressed content, 0 if not all of it is here
	Pinned bool

	Shipped bool // with the product
}

// connect opens the node's containerd, with more options of gRPC's. It does not wait for it: calls do, up to their
// context.
func connect(env snapenv.Env, more ...grpc.DialOption) (*client.Client, error) {
	c, err := client.New(env.ContainerdSocket(), client.WithDefaultNamespace(Namespace), client.WithExtraDialOpts(append(more,
		// A starting containerd is there in a second or so; the default pause between
		// attempts would grow well beyond that.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.5, MaxDelay: 500 * time.Millisecond},
			MinConnectTimeout: 2 * time.Second,
		}),
	)))
	if err != nil {
		return nil, fmt.Errorf("cannot connect to containerd: %w", err)
	}
	return c, nil
}

// wait returns when containerd answers.
func wait(ctx context.Context, c *client.Client, log *slog.Logger) error {
	for said := false; ; {
		ok, err := c.IsServing(ctx)
		if ok {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("cannot reach containerd: %w", errors.Join(ctx.Err(), err))
		}
		if !said {
			log.Info("waiting for containerd")
			said = true
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond): // it answers, but its services still start
		}
	}
}

// Load waits for containerd and imports those images of $SNAP/images, and of the packs of addons that
// this node keeps, that it does not have as they are in their archives; all are pinned against the kubelet's garbage collection.
// Images that an earlier version shipped and this one does not are no longer pinned. It is
// idempotent, cheap when there is nothing to do, and goes on after an archive that failed.
func Load(ctx context.Context, env snapenv.Env, log *slog.Logger) error {
	archives, err := filepath.Glob(filepath.Join(env.Images(), "*.tar"))
	if err != nil || len(archives) == 0 {
		return fmt.Errorf("cannot load the product's images: no archives in %s; the installation is damaged, reinstall it", env.Images())
	}
	c, err := connect(env)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := wait(ctx, c, log); err != nil {
		return err
	}
	slices.SortFunc(archives, func(a, b string) int { return rank(a) - rank(b) })
	snapshotter := configuredSnapshotter(env)
	shipped := map[string]bool{}
	var errs []error
	for _, path := range archives {
		names, err := load(ctx, c, path, snapshotter, log)
		if err != nil {
			errs = append(errs, fmt.Errorf("cannot load the images of %s: %w", path, err))
		}
		for _, n := range names {
			shipped[n] = true
		}
	}
	whole := loadPacks(ctx, env, c, snapshotter, shipped, log)
	if len(errs) == 0 && whole {
		errs = append(errs, release(ctx, c, shipped, log))
	}
	return errors.Join(errs...)
}

// loadPacks loads the packs that this node keeps and adds the names of their images. The node works
// without one that cannot be loaded: it is reported, and whole is false.
func loadPacks(ctx context.Context, env snapenv.Env, c *client.Client, snapshotter string, shipped map[string]bool, log *slog.Logger) (whole bool) {
	if err := pack.Clean(env.Packs()); err != nil {
		log.Warn("cannot remove old packs of addons", "err", err)
	}
	kept, broken := pack.List(env.Packs())
	for _, err := range broken {
		log.Error("cannot read a pack of addons; remove it, and import it again with: microk8s addons import FILE", "err", err)
	}
	whole = len(broken) == 0
	for _, k := range kept {
		names, err := load(ctx, c, k.Path, snapshotter, log)
		if err != nil {
			whole = false
			log.Error("cannot load a pack of addons; import it again with: microk8s addons import FILE", "pack", k.Path, "err", err)
		}
		for _, n := range names {
			shipped[n] = true
		}
	}
	return whole
}

// rank orders archives: what every node needs at once comes first, big ones last.
func rank(archive string) int {
	order := []string{"pause.tar", "coredns.tar"}
	if i := slices.Index(order, filepath.Base(archive)); i >= 0 {
		return i - len(order)
	}
	fi, err := os.Stat(archive)
	if err != nil {
		return 0 // opening it will say why
	}
	return int(fi.Size() >> 10)
}

// load imports one archive unless everything in it is there, and gives the names it holds.
func load(ctx context.Context, c *client.Client, path, snapshotter string, log *slog.Logger) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	index, err := readIndex(f)
	if err != nil {
		return nil, err
	}
	names, complete := []string{}, true
	for _, m := range index.Manifests {
		name := m.Annotations[images.AnnotationImageName]
		if name == "" {
			return nil, fmt.Errorf("the manifest %s has no image name", m.Digest)
		}
		ids, ok, err := present(ctx, c, name, m, snapshotter)
		if err != nil {
			return nil, err
		}
		names = append(names, name)
		names = append(names, ids...)
		complete = complete && ok
	}
	if complete {
		return names, nil
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	began := time.Now()
	labels := map[string]string{pinnedLabel: pinnedValue, shippedLabel: "true"}
	imported, err := c.Import(ctx, f, client.WithImageLabels(labels))
	if err != nil {
		return nil, err
	}
	for _, img := range imported {
		full := client.NewImage(c, img)
		if err := full.Unpack(ctx, snapshotter); err != nil {
			return nil, fmt.Errorf("cannot unpack %s: %w", img.Name, err)
		}
		// The CRI refers to an image by the digest of its configuration, and asks this
		// reference, too, whether the image is pinned.
		cfg, err := full.Config(ctx)
		if err != nil {
			return nil, err
		}
		id := images.Image{Name: cfg.Digest.String(), Target: img.Target, Labels: labels}
		if err := put(ctx, c.ImageService(), id); err != nil {
			return nil, err
		}
		names = append(names, id.Name)
		log.Info("loaded image", "name", img.Name, "after", time.Since(began).Round(time.Millisecond))
	}
	return names, nil
}

// put creates an image or makes it refer to the target, and sets our labels; others stay.
func put(ctx context.Context, store images.Store, img images.Image) error {
	_, err := store.Create(ctx, img)
	if !errdefs.IsAlreadyExists(err) {
		return err
	}
	_, err = store.Update(ctx, img, "target", "labels."+pinnedLabel, "labels."+shippedLabel)
	return err
}

// present reports whether an image is there, complete, and pinned under its name and its id;
// then ids is the name of the latter.
func present(ctx context.Context, c *client.Client, name string, want ocispec.Descriptor, snapshotter string) (ids []string, ok bool, err error) {
	have, err := c.GetImage(ctx, name)
	if errdefs.IsNotFound(err) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	if have.Target().Digest != want.Digest || have.Labels()[pinnedLabel] != pinnedValue || have.Labels()[shippedLabel] == "" {
		return nil, false, nil
	}
	// What cannot be read is imported again, which repairs it.
	if unpacked, err := have.IsUnpacked(ctx, snapshotter); err != nil || !unpacked {
		return nil, false, ctx.Err()
	}
	cfg, err := have.Config(ctx)
	if err != nil {
		return nil, false, ctx.Err()
	}
	id, err := c.ImageService().Get(ctx, cfg.Digest.String())
	if err != nil || id.Labels[pinnedLabel] != pinnedValue {
		return nil, false, ctx.Err()
	}
	return []string{id.Name}, true, nil
}

// release lets go of images that were shipped once: the kubelet may then collect them.
func release(ctx context.Context, c *client.Client, shipped map[string]bool, log *slog.Logger) error {
	old, err := c.ImageService().List(ctx, fmt.Sprintf("labels.%q==true", shippedLabel))
	if err != nil {
		return fmt.Errorf("cannot list images: %w", err)
	}
	var errs []error
	for _, img := range old {
		if shipped[img.Name] {
			continue
		}
		img.Labels = map[string]string{pinnedLabel: "", shippedLabel: ""} // "" deletes
		if _, err := c.ImageService().Update(ctx, img, "labels."+pinnedLabel, "labels."+shippedLabel); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("cannot release image %s: %w", img.Name, err))
			continue
		}
		log.Info("an image of an earlier version is no longer pinned", "name", img.Name)
	}
	return errors.Join(errs...)
}

// readIndex reads index.json of an OCI archive; our builder puts it first.
func readIndex(r io.Reader) (ocispec.Index, error) {
	var index ocispec.Index
	for t := tar.NewReader(r); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return index, errors.New("it is not an OCI archive: index.json is missing")
		}
		if err != nil {
			return index, fmt.Errorf("it is damaged: %w", err)
		}
		if filepath.Clean(h.Name) != ocispec.ImageIndexFile {
			continue
		}
		if err := json.NewDecoder(t).Decode(&index); err != nil {
			return index, fmt.Errorf("its index.json is damaged: %w", err)
		}
		if len(index.Manifests) == 0 {
			return index, errors.New("there is no image in it")
		}
		return index, nil
	}
}

var snapshotterLine = regexp.MustCompile(`(?m)^\s*snapshotter\s*=\s*"([^"]+)"`)

// configuredSnapshotter is the one that pods of this node use: images must be unpacked there.
func configuredSnapshotter(env snapenv.Env) string {
	if data, err := os.ReadFile(env.Args("containerd.toml")); err == nil {
		if m := snapshotterLine.FindSubmatch(data); m != nil {
			return string(m[1])
		}
	}
	return "overlayfs" // containerd's default
}

// List returns the images of the node that have a name, sorted by it. A containerd that stops to
// answer ends it with a [SilentError].
func List(ctx context.Context, env snapenv.Env) ([]Image, error) {
	ctx, c, explain, done, err := attended(ctx, env, silence)
	if err != nil {
		return nil, err
	}
	defer done()
	all, err := c.ListImages(ctx)
	if err != nil {
		return nil, explain(fmt.Errorf("cannot list images: %w", err))
	}
	var out []Image
	for _, img := range all {
		if strings.HasPrefix(img.Name(), "sha256:") {
			continue // the CRI's second reference to an image
		}
		size, _ := img.Size(ctx)
		out = append(out, Image{Name: img.Name(), Digest: img.Target().Digest.String(), Size: size, Pinned: img.Labels()[pinnedLabel] == pinnedValue, Shipped: img.Labels()[shippedLabel] != ""})
	}
	slices.SortFunc(out, func(a, b Image) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}
