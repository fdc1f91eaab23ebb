package images

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"

	"microk8s/internal/snapenv"
)

// Check reads an archive of images, of OCI's or docker's form, to its end and says what is
// wrong with it: every blob of an OCI archive must be what its name, the digest, says.
func Check(r io.Reader) error {
	index := false
	for t := tar.NewReader(r); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			if !index {
				return errors.New("it holds no images: neither index.json nor manifest.json is in it")
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("it is damaged, or no archive of images: %w", err)
		}
		name := path.Clean(h.Name)
		index = index || name == "index.json" || name == "manifest.json"
		digest, ok := strings.CutPrefix(name, "blobs/sha256/")
		if !ok || h.Typeflag != tar.TypeReg {
			continue
		}
		sum := sha256.New()
		if _, err := io.Copy(sum, t); err != nil {
			return fmt.Errorf("it is damaged: %w", err)
		}
		if hex.EncodeToString(sum.Sum(nil)) != digest {
			return fmt.Errorf("it is damaged: blob %s has another content", digest)
		}
	}
}

// Export writes images of this node, all that have a name where none is given, as one OCI
// archive for this machine's platform. It calls say before each image it looks for.
func Export(ctx context.Context, env snapenv.Env, w io.Writer, names []string, say func(name string)) error {
	c, err := connect(env)
	if err != nil {
		return err
	}
	defer c.Close()
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
		img, err := store.Get(ctx, name)
		if errdefs.IsNotFound(err) {
			return fmt.Errorf("image %s is not on this node", name)
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
