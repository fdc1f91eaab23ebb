package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"

	"github.com/google/go-containerregistry/pkg/compression"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"microk8s/scripts/catalog"
)

// Annotations of a manifest in index.json from which containerd takes the image's name.
const (
	annotationImageName = "io.containerd.image.name"
	annotationRefName   = "org.opencontainers.image.ref.name"
)

// pack returns the OCI archive of an image that holds the programs: files on this machine, of which
// the first becomes img.program and the others those of img.more.
func (img image) pack(arch string, programs ...string) ([]byte, error) {
	layer, err := programLayer(programs, append([]string{img.program}, img.more...), img.links)
	if err != nil {
		return nil, err
	}
	base := mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1)
	made, err := mutate.Append(base, mutate.Addendum{Layer: layer, MediaType: types.OCILayerZStd})
	if err != nil {
		return nil, err
	}
	cfg, err := made.ConfigFile()
	if err != nil {
		return nil, err
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", arch
	cfg.Config.Entrypoint = []string{img.program}
	cfg.Config.User = img.user
	cfg.Config.WorkingDir = "/"
	cfg.Config.Env = []string{"PATH=/"}
	if cfg.Config.Labels, err = img.labels(); err != nil {
		return nil, err
	}
	cfg.History = nil
	if made, err = mutate.ConfigFile(made, cfg); err != nil {
		return nil, err
	}
	return ociArchive(made, img.refs)
}

// labels are those of OCI's image specification (its page on annotations). There is no revision: with the
// commit in it, an image would be another one, and its pods would be renewed, after each
// commit, whatever that changed. Of our own programs no source is published under an address.
func (img image) labels() (map[string]string, error) {
	const prefix = "org.opencontainers.image."
	ref := img.refs[0]
	labels := map[string]string{
		prefix + "title":       img.title,
		prefix + "description": img.note,
		prefix + "version":     ref[strings.LastIndexByte(ref, ':')+1:],
		prefix + "licenses":    cmp.Or(img.licence, "Apache-2.0"),
		prefix + "vendor":      "MicroK8s",
		prefix + "base.name":   "scratch",
	}
	if img.component != "" {
		c, err := catalog.Find(img.component)
		if err != nil {
			return nil, err
		}
		labels[prefix+"source"] = c.Source
		labels[prefix+"licenses"] = c.Licence
	}
	return labels, nil
}

// programLayer is a layer with executable files that belong to root, dated 1970, and links to the first.
func programLayer(sources, targets, links []string) (v1.Layer, error) {
	if len(sources) != len(targets) {
		return nil, fmt.Errorf("%d programs for %d places", len(sources), len(targets))
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for i, target := range targets {
		data, err := os.ReadFile(sources[i])
		if err != nil {
			return nil, err
		}
		h := tar.Header{Typeflag: tar.TypeReg, Name: strings.TrimPrefix(target, "/"), Mode: 0o755, Size: int64(len(data)), Format: tar.FormatPAX}
		if err := w.WriteHeader(&h); err != nil {
			return nil, err
		}
		if _, err := w.Write(data); err != nil {
			return nil, err
		}
	}
	for _, link := range links {
		h := tar.Header{Typeflag: tar.TypeSymlink, Name: strings.TrimPrefix(link, "/"), Linkname: targets[0], Mode: 0o777, Format: tar.FormatPAX}
		if err := w.WriteHeader(&h); err != nil {
			return nil, err
		}
	}
	// /tmp is there for programs that want it: the root file system holds nothing else.
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777, Format: tar.FormatPAX}); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	packed, err := compress(buf.Bytes())
	if err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(packed)), nil
	}, tarball.WithMediaType(types.OCILayerZStd), tarball.WithCompression(compression.ZStd))
}

// compress makes a layer as small as a node can unpack quickly: smaller than the snap's own xz,
// which works on blocks of 128 KiB, would make it. The result does not depend on the number of
// threads. libzstd's higher levels exist in C only.
func compress(data []byte) ([]byte, error) {
	cmd := exec.Command("zstd", "-18", "--threads=0", "--quiet", "--stdout", fmt.Sprintf("--stream-size=%d", len(data)))
	cmd.Stdin = bytes.NewReader(data)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("zstd: %w\n%s", err, &errOut)
	}
	return out.Bytes(), nil
}

// ociArchive writes an image as an OCI layout in a tar. index.json comes first, so that a
// reader knows names and digest without reading the rest.
func ociArchive(img v1.Image, refs []string) ([]byte, error) {
	manifest, err := img.RawManifest()
	if err != nil {
		return nil, err
	}
	digest, err := img.Digest()
	if err != nil {
		return nil, err
	}
	cfg, err := img.RawConfigFile()
	if err != nil {
		return nil, err
	}
	cfgDigest, err := img.ConfigName()
	if err != nil {
		return nil, err
	}
	index := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex}
	for _, ref := range refs {
		_, tag, ok := strings.Cut(ref[strings.LastIndex(ref, "/")+1:], ":")
		if !ok {
			return nil, fmt.Errorf("reference %s has no tag", ref)
		}
		index.Manifests = append(index.Manifests, v1.Descriptor{
			MediaType:   types.OCIManifestSchema1,
			Digest:      digest,
			Size:        int64(len(manifest)),
			Annotations: map[string]string{annotationImageName: ref, annotationRefName: tag},
		})
	}
	indexJSON, err := json.Marshal(index)
	if err != nil {
		return nil, err
	}

	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	add := func(name string, data []byte) error {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(data)), Format: tar.FormatPAX}); err != nil {
			return err
		}
		_, err := w.Write(data)
		return err
	}
	blob := func(h v1.Hash) string { return "blobs/" + h.Algorithm + "/" + h.Hex }
	if err := add("index.json", indexJSON); err != nil {
		return nil, err
	}
	if err := add("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)); err != nil {
		return nil, err
	}
	if err := add(blob(digest), manifest); err != nil {
		return nil, err
	}
	if err := add(blob(cfgDigest), cfg); err != nil {
		return nil, err
	}
	layers, err := img.Layers()
	if err != nil {
		return nil, err
	}
	for _, l := range layers {
		h, err := l.Digest()
		if err != nil {
			return nil, err
		}
		r, err := l.Compressed()
		if err != nil {
			return nil, err
		}
		data, err := io.ReadAll(r)
		if err != nil {
			return nil, err
		}
		if err := add(blob(h), data); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}
