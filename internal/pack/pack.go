// Package pack is the file in which images of addons travel that are not in the snap: an archive of
// images in OCI's form, with a manifest in front that lists everything in it with its digest.
//
// A pack is checked as a whole before anything is done with it ([Verify]), and kept on each node in a
// folder of its own ([Keep]), from which the node loads it at each start and a control-plane node
// passes it on to nodes that join. Loading the images is the business of internal/images, sending
// packs to nodes that of cluster-agent/fanout.
package pack

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	// ManifestFile is the first entry of a pack, by which it is known from other archives of images.
	ManifestFile = "pack.json"

	apiVersion = "microk8s.io/v1"
	kind       = "AddonPack"

	annotationImageName = "io.containerd.image.name" // containerd's
	annotationRefName   = "org.opencontainers.image.ref.name"

	maxManifest = 4 << 20  // bytes of pack.json, and of index.json
	maxDocument = 4 << 20  // bytes of the manifest or configuration of an image
	maxBlobs    = 10_000   // entries
	maxSize     = 64 << 30 // bytes of all blobs
)

// Manifest lists what is in a pack.
type Manifest struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	// Name is the addon's, or that of a bundle of several. With Version and Architecture it is the
	// name of the file in which the pack is kept.
	Name         string  `json:"name"`
	Version      string  `json:"version"`      // of the product that it was made for
	Architecture string  `json:"architecture"` // in Go's spelling
	Addons       []Addon `json:"addons,omitempty"`
	Images       []Image `json:"images"`
	// Index is the digest of index.json. With Blobs, which are all others of the archive, the digest
	// of the manifest is one of everything.
	Index string `json:"index"`
	Blobs []Blob `json:"blobs"`

	digest string
}

// Addon is an addon whose images are in a pack.
type Addon struct {
	Name    string   `json:"name"`
	Version string   `json:"version"`
	Images  []string `json:"images"` // their full names
}

// Image is a name in a pack, and what it means.
type Image struct {
	Name   string `json:"name"`   // full
	Digest string `json:"digest"` // of its manifest
}

// Blob is a file of a pack.
type Blob struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"` // bytes
}

// Digest identifies the pack and everything in it: sha256 and the sum of its manifest.
func (m Manifest) Digest() string { return m.digest }

// Size is that of all blobs in bytes.
func (m Manifest) Size() int64 {
	var n int64
	for _, b := range m.Blobs {
		n += b.Size
	}
	return n
}

// Has reports whether an image of that full name is in the pack.
func (m Manifest) Has(name string) bool {
	return slices.ContainsFunc(m.Images, func(i Image) bool { return i.Name == name })
}

// File is the name of the file that the pack of an addon has, or with addon "" that of all addons.
func File(addon, version, arch string) string {
	if addon != "" {
		addon = "-" + addon
	}
	return "microk8s-addons" + addon + "_" + version + "_" + arch + ".tar"
}

// All is the name of the pack with the images of all addons.
const All = "all"

// File is the name of the file in which the pack is kept.
func (m Manifest) File() string {
	if m.Name == All {
		return File("", m.Version, m.Architecture)
	}
	return File(m.Name, m.Version, m.Architecture)
}

// Is reports whether the beginning of a file, of 512 bytes, is that of a pack.
func Is(start []byte) bool {
	name := []byte(ManifestFile)
	return len(start) > len(name) && bytes.HasPrefix(start, name) && start[len(name)] == 0
}

// IsFile reports whether a file begins as a pack does.
func IsFile(r io.Reader) bool {
	start := make([]byte, 512)
	_, err := io.ReadFull(r, start)
	return err == nil && Is(start)
}

// ForeignError is a pack for another architecture.
type ForeignError struct{ Pack, Here string }

func (e *ForeignError) Error() string {
	return fmt.Sprintf("it is for %s, and this is %s: get the file for %s", e.Pack, e.Here, e.Here)
}

// ErrNoPack is of files that are something else.
var ErrNoPack = errors.New("it is not a pack of addons: it does not begin with " + ManifestFile + "; images without addons are imported with: microk8s images import FILE")

var (
	nameForm    = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)
	versionForm = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9.+~-]{0,61}[a-zA-Z0-9])?$`)
	digestForm  = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
)

// ReadManifest reads the first entry of a pack and checks its form.
func ReadManifest(r io.Reader) (Manifest, error) { return readManifest(tar.NewReader(r)) }

func readManifest(t *tar.Reader) (Manifest, error) {
	h, err := t.Next()
	if err != nil || h.Name != ManifestFile || h.Typeflag != tar.TypeReg {
		return Manifest{}, ErrNoPack
	}
	data, err := limited(t, h, maxManifest)
	if err != nil {
		return Manifest{}, err
	}
	m := Manifest{digest: sum(data)}
	if err := json.Unmarshal(data, &m); err != nil {
		return Manifest{}, damaged("its %s: %w", ManifestFile, err)
	}
	return m, m.check()
}

// check is of what the manifest says by itself. What it does not know of a later form is no error.
func (m *Manifest) check() error {
	switch {
	case m.APIVersion != apiVersion || m.Kind != kind:
		return fmt.Errorf("it is of a form that this version cannot read (%s %s)", m.APIVersion, m.Kind)
	case !nameForm.MatchString(m.Name) || !versionForm.MatchString(m.Version) || !nameForm.MatchString(m.Architecture):
		return damaged("its %s has name %q, version %q, architecture %q", ManifestFile, m.Name, m.Version, m.Architecture)
	case len(m.Images) == 0:
		return damaged("its %s lists no image", ManifestFile)
	case len(m.Blobs) > maxBlobs || len(m.Images) > maxBlobs:
		return fmt.Errorf("it lists more than %d files", maxBlobs)
	case !digestForm.MatchString(m.Index):
		return damaged("its %s has the index %q", ManifestFile, m.Index)
	}
	var size int64
	for _, b := range m.Blobs {
		if !digestForm.MatchString(b.Digest) || b.Size < 0 || b.Size > maxSize {
			return damaged("its %s lists blob %q of %d bytes", ManifestFile, b.Digest, b.Size)
		}
		if size += b.Size; size > maxSize {
			return fmt.Errorf("its images are larger than %d GiB", maxSize>>30)
		}
	}
	for _, a := range m.Addons {
		for _, name := range a.Images {
			if !m.Has(name) {
				return damaged("image %s of addon %s is not in it", name, a.Name)
			}
		}
	}
	return nil
}

// Verify reads a pack to its end: everything that its manifest lists must be there once, with the digest it is
// listed by, and nothing else; each image must be complete and for the pack's architecture. arch is
// that of this machine, "" accepts any; another one is a *ForeignError. Errors are
// about the file, such as "it is damaged: …".
func Verify(r io.Reader, arch string) (Manifest, error) {
	t := tar.NewReader(r)
	m, err := readManifest(t)
	if err != nil {
		return m, err
	}
	if arch != "" && m.Architecture != arch {
		return m, &ForeignError{m.Architecture, arch}
	}
	left := map[string]int64{}
	for _, b := range m.Blobs {
		left[b.Digest] = b.Size
	}
	total := len(left)
	var index []byte
	documents := map[string][]byte{} // of the blobs that may be manifests and configurations
	kept := 0
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return m, damaged("%d of its %d blobs are there: %w", total-len(left), total, noEOF(err))
		}
		switch digest, blob := strings.CutPrefix(h.Name, "blobs/sha256/"); {
		case h.Typeflag != tar.TypeReg:
			return m, damaged("%q is not a file", h.Name)
		case h.Name == "index.json" && index == nil:
			if index, err = limited(t, h, maxManifest); err != nil {
				return m, err
			}
			if sum(index) != m.Index {
				return m, damaged("index.json does not match its digest")
			}
		case h.Name == "oci-layout":
			if _, err := limited(t, h, 1<<10); err != nil {
				return m, err
			}
		case blob:
			digest = "sha256:" + digest
			size, listed := left[digest]
			if !listed || size != h.Size {
				return m, damaged("%q is not what its %s lists", h.Name, ManifestFile)
			}
			delete(left, digest)
			hash := sha256.New()
			var document bytes.Buffer
			var to io.Writer = hash
			if size <= maxDocument && kept+int(size) <= 16*maxDocument {
				kept += int(size)
				to = io.MultiWriter(hash, &document)
			}
			if _, err := io.Copy(to, t); err != nil {
				return m, damaged("%q: %w", h.Name, noEOF(err))
			}
			if "sha256:"+hex.EncodeToString(hash.Sum(nil)) != digest {
				return m, damaged("%q does not match its digest", h.Name)
			}
			documents[digest] = document.Bytes()
		default:
			return m, damaged("%q is not listed in its %s", path.Clean(h.Name), ManifestFile)
		}
	}
	if len(left) > 0 || index == nil {
		return m, damaged("it is cut off, or not complete: %d of its %d blobs are there", total-len(left), total)
	}
	return m, m.checkImages(index, documents)
}

// checkImages wants the images of the index to be those of the manifest, each with all its blobs.
func (m Manifest) checkImages(index []byte, documents map[string][]byte) error {
	var top v1.IndexManifest
	if err := json.Unmarshal(index, &top); err != nil {
		return damaged("its index.json: %w", err)
	}
	if len(top.Manifests) != len(m.Images) {
		return damaged("its index.json has %d images and its %s %d", len(top.Manifests), ManifestFile, len(m.Images))
	}
	for _, d := range top.Manifests {
		name := d.Annotations[annotationImageName]
		if !slices.Contains(m.Images, Image{name, d.Digest.String()}) {
			return damaged("image %q is not listed in its %s", name, ManifestFile)
		}
		var manifest v1.Manifest
		if err := json.Unmarshal(documents[d.Digest.String()], &manifest); err != nil {
			return damaged("the manifest of image %s: %w", name, err)
		}
		var config v1.ConfigFile
		if err := json.Unmarshal(documents[manifest.Config.Digest.String()], &config); err != nil {
			return damaged("the configuration of image %s: %w", name, err)
		}
		if config.Architecture != m.Architecture {
			return fmt.Errorf("its image %s is for %s, and the pack for %s", name, config.Architecture, m.Architecture)
		}
		for _, l := range manifest.Layers {
			if _, ok := documents[l.Digest.String()]; !ok {
				return damaged("image %s is not complete", name)
			}
		}
	}
	return nil
}

func limited(t *tar.Reader, h *tar.Header, limit int64) ([]byte, error) {
	if h.Size > limit {
		return nil, damaged("%s has %d bytes", h.Name, h.Size)
	}
	data, err := io.ReadAll(t)
	if err != nil {
		return nil, damaged("%s: %w", h.Name, noEOF(err))
	}
	return data, nil
}

func damaged(format string, args ...any) error {
	return fmt.Errorf("it is damaged: "+format, args...)
}

// noEOF words the end of a file that is too short.
func noEOF(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("the file is cut off")
	}
	return err
}

func sum(data []byte) string {
	s := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(s[:])
}

// Write writes a pack with these images, by their full names. It sets Images, Index and Blobs of the manifest that it
// returns. What several images share is written once. The same images make the same file.
func Write(w io.Writer, m Manifest, images map[string]v1.Image) (Manifest, error) {
	m.APIVersion, m.Kind = apiVersion, kind
	m.Images, m.Blobs = nil, nil
	index := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex}
	type part struct {
		Blob
		open func() (io.ReadCloser, error)
	}
	var documents, layers []part
	seen := map[string]bool{}
	add := func(list *[]part, digest v1.Hash, size int64, open func() (io.ReadCloser, error)) {
		if !seen[digest.String()] {
			seen[digest.String()] = true
			*list = append(*list, part{Blob{digest.String(), size}, open})
		}
	}
	data := func(b []byte) func() (io.ReadCloser, error) {
		return func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
	}
	for _, name := range sortedNames(images) {
		img := images[name]
		raw, err := img.RawManifest()
		if err != nil {
			return m, fmt.Errorf("image %s: %w", name, err)
		}
		manifest, err := img.Manifest()
		if err != nil {
			return m, fmt.Errorf("image %s: %w", name, err)
		}
		digest, err := img.Digest()
		if err != nil {
			return m, fmt.Errorf("image %s: %w", name, err)
		}
		config, err := img.RawConfigFile()
		if err != nil {
			return m, fmt.Errorf("image %s: %w", name, err)
		}
		add(&documents, digest, int64(len(raw)), data(raw))
		add(&documents, manifest.Config.Digest, int64(len(config)), data(config))
		for _, l := range manifest.Layers {
			layer, err := img.LayerByDigest(l.Digest)
			if err != nil {
				return m, fmt.Errorf("image %s: %w", name, err)
			}
			add(&layers, l.Digest, l.Size, layer.Compressed)
		}
		_, tag, _ := strings.Cut(name[strings.LastIndexByte(name, '/')+1:], ":")
		index.Manifests = append(index.Manifests, v1.Descriptor{
			MediaType: manifest.MediaType, Digest: digest, Size: int64(len(raw)),
			Annotations: map[string]string{annotationImageName: name, annotationRefName: tag},
		})
		m.Images = append(m.Images, Image{name, digest.String()})
	}
	indexJSON, err := json.Marshal(index)
	if err != nil {
		return m, err
	}
	m.Index = sum(indexJSON)
	for _, p := range append(documents, layers...) {
		m.Blobs = append(m.Blobs, p.Blob)
	}
	if err := m.check(); err != nil {
		return m, err
	}
	manifest, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return m, err
	}
	m.digest = sum(manifest)
	t := tar.NewWriter(w)
	entry := func(name string, size int64, r io.Reader) error {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size, Format: tar.FormatPAX}
		if err := t.WriteHeader(h); err != nil {
			return err
		}
		_, err := io.Copy(t, r)
		return err
	}
	for _, f := range []struct {
		name string
		data []byte
	}{{ManifestFile, manifest}, {"index.json", indexJSON}, {"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)}} {
		if err := entry(f.name, int64(len(f.data)), bytes.NewReader(f.data)); err != nil {
			return m, err
		}
	}
	for _, p := range append(documents, layers...) {
		r, err := p.open()
		if err != nil {
			return m, fmt.Errorf("blob %s: %w", p.Digest, err)
		}
		err = entry("blobs/"+strings.Replace(p.Digest, ":", "/", 1), p.Size, r)
		if err = errors.Join(err, r.Close()); err != nil {
			return m, fmt.Errorf("blob %s: %w", p.Digest, err)
		}
	}
	return m, t.Close()
}

func sortedNames(images map[string]v1.Image) []string {
	var names []string
	for n := range images {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}
