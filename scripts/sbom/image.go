package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/zstd"
)

// image adds an OCI archive that scripts/images made, and the programs in it.
func (c *collector) image(name string, archive []byte) error {
	files := map[string][]byte{}
	if err := eachFile(bytes.NewReader(archive), func(name string, data []byte) error {
		files[name] = data
		return nil
	}); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	var index v1.IndexManifest
	if err := json.Unmarshal(files["index.json"], &index); err != nil {
		return fmt.Errorf("%s: index.json: %w", name, err)
	}
	blob := func(h v1.Hash) []byte { return files["blobs/"+h.Algorithm+"/"+h.Hex] }
	for i, m := range index.Manifests {
		var manifest v1.Manifest
		if err := json.Unmarshal(blob(m.Digest), &manifest); err != nil {
			return fmt.Errorf("%s: %s: %w", name, m.Digest, err)
		}
		var config v1.ConfigFile
		if err := json.Unmarshal(blob(manifest.Config.Digest), &config); err != nil {
			return fmt.Errorf("%s: %s: %w", name, manifest.Config.Digest, err)
		}
		ref := m.Annotations["io.containerd.image.name"]
		c.Images = append(c.Images, Image{Ref: ref, Digest: m.Digest.String(), Licence: config.Config.Labels["org.opencontainers.image.licenses"]})
		if i > 0 && m.Digest == index.Manifests[0].Digest {
			continue // another name of the same
		}
		for _, layer := range manifest.Layers {
			plain, err := zstd.NewReader(bytes.NewReader(blob(layer.Digest)))
			if err != nil {
				return err
			}
			err = eachFile(plain, func(path string, data []byte) error { return c.file(ref, "/"+path, data) })
			plain.Close()
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	return nil
}

// eachFile calls do for each regular file of a tar.
func eachFile(r io.Reader, do func(name string, data []byte) error) error {
	for t := tar.NewReader(r); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		data, err := io.ReadAll(t)
		if err != nil {
			return err
		}
		if err := do(h.Name, data); err != nil {
			return err
		}
	}
}
