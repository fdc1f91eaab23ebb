package pack

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Images returns the images of an archive of OCI's form that is not compressed, a pack for instance, by
// their full names. They read from r as long as they are used. Of an index with several
// platforms the one of the architecture is taken.
func Images(r io.ReaderAt, size int64, arch string) (map[string]v1.Image, error) {
	a := &archive{r: r, at: map[string]section{}}
	counted := &counter{r: io.NewSectionReader(r, 0, size)}
	t := tar.NewReader(counted)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, damaged("%w", noEOF(err))
		}
		a.at[h.Name] = section{counted.n, h.Size}
	}
	raw, err := a.read("index.json")
	if err != nil {
		return nil, err
	}
	var index v1.IndexManifest
	if err := json.Unmarshal(raw, &index); err != nil {
		return nil, damaged("its index.json: %w", err)
	}
	out := map[string]v1.Image{}
	for _, d := range index.Manifests {
		name := d.Annotations[annotationImageName]
		if name == "" {
			continue
		}
		img, err := a.image(d, arch)
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", name, err)
		}
		out[name] = img
	}
	return out, nil
}

// counter counts what is read. It is no Seeker, so that a tar.Reader reads all, and the count after a header is
// where its file begins.
type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

type section struct{ at, size int64 }

type archive struct {
	r  io.ReaderAt
	at map[string]section
}

func blobName(h v1.Hash) string { return "blobs/" + h.Algorithm + "/" + h.Hex }

func (a *archive) open(name string) (io.ReadCloser, int64, error) {
	s, ok := a.at[name]
	if !ok {
		return nil, 0, fmt.Errorf("%s is not in the archive", name)
	}
	return io.NopCloser(io.NewSectionReader(a.r, s.at, s.size)), s.size, nil
}

func (a *archive) read(name string) ([]byte, error) {
	r, size, err := a.open(name)
	if err != nil {
		return nil, err
	}
	if size > maxDocument {
		return nil, fmt.Errorf("%s has %d bytes", name, size)
	}
	return io.ReadAll(r)
}

func (a *archive) image(d v1.Descriptor, arch string) (v1.Image, error) {
	raw, err := a.read(blobName(d.Digest))
	if err != nil {
		return nil, err
	}
	if d.MediaType.IsIndex() {
		index, err := v1.ParseIndexManifest(bytes.NewReader(raw))
		if err != nil {
			return nil, err
		}
		for _, m := range index.Manifests {
			if m.Platform != nil && m.Platform.OS == "linux" && m.Platform.Architecture == arch {
				return a.image(m, arch)
			}
		}
		return nil, fmt.Errorf("it has nothing for linux/%s", arch)
	}
	manifest, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil {
		return nil, err
	}
	return partial.CompressedToImage(&stored{a, raw, manifest})
}

// stored is an image in an archive, as go-containerregistry wants it.
type stored struct {
	a        *archive
	raw      []byte
	manifest *v1.Manifest
}

func (s *stored) RawConfigFile() ([]byte, error) { return s.a.read(blobName(s.manifest.Config.Digest)) }

func (s *stored) MediaType() (types.MediaType, error) { return s.manifest.MediaType, nil }

func (s *stored) RawManifest() ([]byte, error) { return s.raw, nil }

func (s *stored) LayerByDigest(h v1.Hash) (partial.CompressedLayer, error) {
	for _, d := range s.manifest.Layers {
		if d.Digest == h {
			return &storedLayer{s.a, d}, nil
		}
	}
	return nil, fmt.Errorf("there is no layer %s", h)
}

type storedLayer struct {
	a *archive
	d v1.Descriptor
}

func (l *storedLayer) Digest() (v1.Hash, error) { return l.d.Digest, nil }

func (l *storedLayer) Size() (int64, error) { return l.d.Size, nil }

func (l *storedLayer) MediaType() (types.MediaType, error) { return l.d.MediaType, nil }

func (l *storedLayer) Compressed() (io.ReadCloser, error) {
	r, _, err := l.a.open(blobName(l.d.Digest))
	return r, err
}
