package images

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"microk8s/internal/snapenv"
)

// maxIndex is the largest index.json or manifest.json that is looked at, in bytes.
const maxIndex = 20 << 20

// Check reads an archive of images, of OCI's or docker's form, plain or compressed with gzip or
// zstd, to its end and says what is wrong with it: every blob of an OCI archive must be what its
// name, the digest, says, and one image at least must have a name.
func Check(r io.Reader) error {
	plain, err := decompress(r)
	if err != nil {
		return err
	}
	defer plain.Close()
	var oci, docker []byte
	for t := tar.NewReader(plain); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return checkNames(oci, docker)
		}
		if err != nil {
			return fmt.Errorf("it is damaged, or not an archive of images: %w", err)
		}
		name := path.Clean(h.Name)
		switch name {
		case ocispec.ImageIndexFile:
			oci, err = io.ReadAll(io.LimitReader(t, maxIndex))
		case "manifest.json":
			docker, err = io.ReadAll(io.LimitReader(t, maxIndex))
		default:
			if digest, ok := strings.CutPrefix(name, "blobs/sha256/"); ok && h.Typeflag == tar.TypeReg {
				err = checkBlob(t, digest)
			}
		}
		if err != nil {
			return fmt.Errorf("it is damaged: %w", err)
		}
	}
}

func checkBlob(r io.Reader, digest string) error {
	sum := sha256.New()
	if _, err := io.Copy(sum, r); err != nil {
		return err
	}
	if hex.EncodeToString(sum.Sum(nil)) != digest {
		return fmt.Errorf("blob %s does not match its digest", digest)
	}
	return nil
}

// checkNames wants a name for one image at least. Where both forms are there OCI's counts, as
// for containerd.
func checkNames(oci, docker []byte) error {
	var why error
	switch {
	case oci != nil:
		var index ocispec.Index
		if err := json.Unmarshal(oci, &index); err != nil {
			return fmt.Errorf("its index.json is damaged: %w", err)
		}
		for _, m := range index.Manifests {
			_, err := FullName(m.Annotations)
			if err == nil {
				return nil
			}
			why = err
		}
	case docker != nil:
		var list []struct{ RepoTags []string }
		if err := json.Unmarshal(docker, &list); err != nil {
			return fmt.Errorf("its manifest.json is damaged: %w", err)
		}
		for _, img := range list {
			if len(img.RepoTags) > 0 {
				return nil
			}
			_, why = FullName(nil)
		}
	default:
		return errors.New("it holds no images: it has neither index.json nor manifest.json")
	}
	if why == nil {
		return errors.New("there is no image in it")
	}
	return fmt.Errorf("its image %w", why)
}

// Export writes images of this node, all that have a name where none is given, as one OCI
// archive for this machine's platform. It calls say before each image it looks for. A containerd
// that stops to answer ends it with a [SilentError].
func Export(ctx context.Context, env snapenv.Env, w io.Writer, names []string, say func(name string)) error {
	ctx, c, explain, done, err := attended(ctx, env, silence)
	if err != nil {
		return err
	}
	defer done()
	return explain(export(ctx, c, w, names, say))
}

// named returns the image of that name, or of the full name that is meant: as pods name it, web:1 is
// docker.io/library/web:1.
func named(ctx context.Context, store images.Store, name string) (images.Image, error) {
	img, err := store.Get(ctx, name)
	if errdefs.IsNotFound(err) {
		if full, e := reference.ParseDockerRef(name); e == nil && full.String() != name {
			return store.Get(ctx, full.String())
		}
	}
	return img, err
}

func export(ctx context.Context, c *client.Client, w io.Writer, names []string, say func(name string)) error {
	store := c.ImageService()
	var chosen []images.Image
	if len(names) == 0 {
		all, err := store.List(ctx)
		if err != nil {
			return fmt.Errorf("cannot list images: %w", err)
		}
		for _, img := range all {
			if !strings.HasPrefix(img.Name, "sha256:") {
				chosen = append(chosen, img)
			}
		}
	}
	for _, name := range names {
		img, err := named(ctx, store, name)
		if errdefs.IsNotFound(err) {
			return fmt.Errorf("image %s is not on this node; see those that are with: microk8s images list", name)
		}
		if err != nil {
			return fmt.Errorf("cannot look for image %s: %w", name, err)
		}
		chosen = append(chosen, img)
	}
	if len(chosen) == 0 {
		return errors.New("there is no image on this node")
	}
	slices.SortFunc(chosen, func(a, b images.Image) int { return strings.Compare(a.Name, b.Name) })
	platform := platforms.Default()
	for _, img := range chosen {
		say(img.Name)
		ok, _, _, missing, err := images.Check(ctx, c.ContentStore(), img.Target, platform)
		if err != nil || !ok || len(missing) > 0 {
			return fmt.Errorf("image %s is not complete on this node (%d blobs are missing): pull it again, or name the images to export", img.Name, len(missing))
		}
	}
	if err := c.Export(ctx, w, archive.WithImages(chosen), archive.WithPlatform(platform)); err != nil {
		return fmt.Errorf("cannot export: %w", err)
	}
	return nil
}
