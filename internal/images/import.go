package images

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"microk8s/internal/pack"
	"microk8s/internal/snapenv"
)

// Imported is what an import brought.
type Imported struct {
	// Names are the images' full names, sorted.
	Names []string
	// Skipped says of each other image of the archive why it is of no use here.
	Skipped []string
	// Pack is the digest of the pack of addons that the archive is, which is kept on this node; ""
	// for other archives.
	Pack string
}

// Import reads an archive of images, of OCI's or docker's form, plain or compressed with gzip or
// zstd, into this node's containerd and unpacks those that this machine can run. Their names
// are made full ones, as pods ask for them. An archive of which nothing can be used is an error
// that says why. Import needs nothing but the stream: it is read once.
// A pack of addons is checked as a whole before containerd gets any of it, and kept in the node's folder
// of packs, so that [Load] loads it at each start.
// A containerd that stops to answer ends it with a [SilentError].
func Import(ctx context.Context, env snapenv.Env, r io.Reader) (Imported, error) {
	buffered := bufio.NewReader(r)
	if start, err := buffered.Peek(512); err == nil && pack.Is(start) {
		return importPack(ctx, env, buffered)
	}
	plain, err := decompress(buffered)
	if err != nil {
		return Imported{}, err
	}
	defer plain.Close()
	ctx, c, explain, end, err := attended(ctx, env, silence)
	if err != nil {
		return Imported{}, err
	}
	defer end()
	out, err := importInto(ctx, env, c, plain)
	return out, explain(err)
}

// importPack keeps a pack and loads its images.
func importPack(ctx context.Context, env snapenv.Env, r io.Reader) (Imported, error) {
	if err := Answers(ctx, env, silence); err != nil {
		return Imported{}, err
	}
	in, err := pack.Receive(env.Packs(), r)
	if err != nil {
		return Imported{}, err
	}
	defer in.Discard()
	ctx, c, explain, end, err := attended(ctx, env, silence)
	if err != nil {
		return Imported{}, err
	}
	defer end()
	if _, err := load(ctx, c, in.Path, configuredSnapshotter(env), slog.New(slog.DiscardHandler)); err != nil {
		return Imported{}, explain(err)
	}
	if err := in.Commit(); err != nil {
		return Imported{}, fmt.Errorf("cannot keep the pack: %w", err)
	}
	out := Imported{Pack: in.Digest()}
	for _, img := range in.Images {
		out.Names = append(out.Names, img.Name)
	}
	slices.Sort(out.Names)
	return out, nil
}

// leaseEnd is how long the end of a lease may take. One that is left ends by itself a day later.
const leaseEnd = 10 * time.Second

func importInto(ctx context.Context, env snapenv.Env, c *client.Client, plain io.Reader) (Imported, error) {
	// What is not yet named would be collected as garbage.
	ctx, done, err := c.WithLease(ctx)
	if err != nil {
		return Imported{}, fmt.Errorf("containerd does not answer: %w", err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaseEnd)
		defer cancel()
		_ = done(ctx)
	}()
	store := c.ContentStore()
	index, err := archive.ImportIndex(ctx, store, plain)
	if err != nil {
		return Imported{}, err
	}
	platform := platforms.Default()
	found, skipped, err := usable(ctx, store, index, platform)
	if err != nil {
		return Imported{}, err
	}
	if len(found) == 0 {
		return Imported{}, nothing(skipped)
	}
	out := Imported{Skipped: skipped}
	snapshotter := configuredSnapshotter(env)
	for _, img := range found {
		// The labels by which the image keeps its layers.
		handler := images.SetChildrenLabels(store, images.FilterPlatforms(images.ChildrenHandler(store), platform))
		if err := images.Dispatch(ctx, handler, nil, img.Target); err != nil {
			return Imported{}, fmt.Errorf("%s is not complete: %w", img.Name, err)
		}
		_, err := c.ImageService().Update(ctx, img, "target")
		if errdefs.IsNotFound(err) {
			_, err = c.ImageService().Create(ctx, img)
		}
		if err != nil {
			return Imported{}, fmt.Errorf("cannot name %s: %w", img.Name, err)
		}
		if err := client.NewImageWithPlatform(c, img, platform).Unpack(ctx, snapshotter); err != nil {
			return Imported{}, fmt.Errorf("cannot unpack %s: %w", img.Name, err)
		}
		out.Names = append(out.Names, img.Name)
	}
	slices.Sort(out.Names)
	return out, nil
}

// nothing is the error of an archive without an image that can be used.
func nothing(skipped []string) error {
	if len(skipped) == 0 {
		return errors.New("there is no image in it")
	}
	return fmt.Errorf("no image in it can be used: %s", strings.Join(skipped, "; "))
}

// usable returns the images of an archive's index that have a name and can run on platform, and
// says of each other one why not.
func usable(ctx context.Context, store content.Store, index ocispec.Descriptor, platform platforms.MatchComparer) (found []images.Image, skipped []string, err error) {
	manifests, err := images.Children(ctx, store, index)
	if err != nil {
		return nil, nil, err
	}
	for _, m := range manifests {
		if _, attached := m.Annotations[images.AnnotationManifestSubject]; attached || isAttestation(m) {
			continue // a signature, say: of use with its image only
		}
		name, err := FullName(m.Annotations)
		label := name
		if err != nil {
			label = m.Digest.String()[:min(19, len(m.Digest))]
		}
		if why := unusable(ctx, store, m, platform); why != "" {
			skipped = append(skipped, label+" "+why)
			continue
		}
		if err != nil {
			skipped = append(skipped, label+" "+err.Error())
			continue
		}
		// One name for several platforms: the best one is first in the order of the archive.
		if !slices.ContainsFunc(found, func(i images.Image) bool { return i.Name == name }) {
			found = append(found, images.Image{Name: name, Target: m})
		}
	}
	return found, skipped, nil
}

// isAttestation reports whether an entry of an index is what builders put beside an image.
func isAttestation(m ocispec.Descriptor) bool {
	return m.Platform != nil && m.Platform.OS == "unknown"
}

// unusable says why an image cannot run here, "" if it can.
func unusable(ctx context.Context, store content.Store, m ocispec.Descriptor, platform platforms.MatchComparer) string {
	switch {
	case images.IsIndexType(m.MediaType):
		ok, _, _, missing, err := images.Check(ctx, store, m, platform)
		switch {
		case errdefs.IsNotFound(err) || err == nil && !ok:
			return "is not for " + here(platform) + pullFor(platform)
		case err != nil:
			return "cannot be read: " + err.Error()
		case len(missing) > 0:
			return fmt.Sprintf("is not complete: %d of its blobs are not in the archive", len(missing))
		}
	case images.IsManifestType(m.MediaType):
		runs, err := images.Platforms(ctx, store, m)
		if err != nil {
			return "cannot be read: " + err.Error()
		}
		if !slices.ContainsFunc(runs, platform.Match) && len(runs) > 0 {
			return "is for " + platforms.Format(runs[0]) + ", not for " + here(platform) + pullFor(platform)
		}
		if _, _, _, missing, err := images.Check(ctx, store, m, platforms.All); err != nil || len(missing) > 0 {
			return fmt.Sprintf("is not complete: %d of its blobs are not in the archive", max(1, len(missing)))
		}
	default:
		return "is not an image but " + m.MediaType
	}
	return ""
}

// pullFor says how an image for this machine is had.
func pullFor(platform platforms.MatchComparer) string {
	return ": before saving it, docker pull --platform " + here(platform) + " NAME:TAG"
}

// here names the platform that a matcher is for, as far as this machine is concerned.
func here(platform platforms.MatchComparer) string {
	for _, arch := range []string{"amd64", "arm64"} {
		if p := (ocispec.Platform{OS: "linux", Architecture: arch}); platform.Match(platforms.Normalize(p)) {
			return platforms.Format(p)
		}
	}
	return platforms.DefaultString()
}

// FullName returns the name of an image from the annotations of its entry in an index, in the
// form that containerd's CRI looks for: with registry, repository and tag. The annotation of
// containerd holds a name; OCI's holds a name or a mere tag, of which nothing follows.
func FullName(annotations map[string]string) (string, error) {
	name := annotations[images.AnnotationImageName]
	if name == "" {
		name = annotations[ocispec.AnnotationRefName]
		if !strings.ContainsAny(name, "/:@") {
			if name != "" {
				return "", fmt.Errorf("has a tag (%s), but no name: save it by its full name, for instance registry.example/app:%s", name, name)
			}
			return "", errors.New("has no name: save it by its name, not by its ID (docker save NAME:TAG)")
		}
	}
	full, err := reference.ParseDockerRef(name)
	if err != nil {
		return "", fmt.Errorf("has the name %q, which is none: %w", name, err)
	}
	return full.String(), nil
}
