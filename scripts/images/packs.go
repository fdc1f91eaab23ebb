package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"microk8s/internal/addon"
	"microk8s/internal/pack"
	"microk8s/internal/snapenv"
	"microk8s/scripts/catalog"
)

// makePacks writes a pack for each addon that has one, and one with all of them, from the archives in
// dir/images. A pack that would not change is not touched.
func makePacks(dir, arch string) error {
	version, err := catalog.Required("go.mod", "k8s.io/kubernetes")
	if err != nil {
		return err
	}
	have := map[string]v1.Image{}
	for _, img := range images {
		if !img.packed {
			continue
		}
		data, err := os.ReadFile(filepath.Join(dir, "images", img.archive+".tar"))
		if err != nil {
			return err
		}
		found, err := pack.Images(bytes.NewReader(data), int64(len(data)), arch)
		if err != nil {
			return fmt.Errorf("%s: %w", img.archive, err)
		}
		for name, i := range found {
			have[name] = i
		}
	}
	catalogue, _, err := addon.Catalogue(snapenv.Env{Snap: "."})
	if err != nil {
		return err
	}
	all := pack.Manifest{Name: pack.All, Version: version, Architecture: arch}
	every := map[string]v1.Image{}
	for _, a := range catalogue {
		if len(a.Images) == 0 {
			continue
		}
		content := map[string]v1.Image{}
		for _, name := range a.Images {
			img, ok := have[name]
			if !ok {
				return fmt.Errorf("addon %s: image %s is not built; add it to the table of images, with packed: true", a.Name, name)
			}
			content[name], every[name] = img, img
		}
		part := pack.Addon{Name: a.Name, Version: a.Version, Images: a.Images}
		all.Addons = append(all.Addons, part)
		if err := writePack(dir, pack.Manifest{Name: a.Name, Version: version, Architecture: arch, Addons: []pack.Addon{part}}, content); err != nil {
			return err
		}
	}
	return writePack(dir, all, every)
}

func writePack(dir string, m pack.Manifest, content map[string]v1.Image) error {
	var buf bytes.Buffer
	m, err := pack.Write(&buf, m, content)
	if err != nil {
		return fmt.Errorf("cannot make the pack %s: %w", m.File(), err)
	}
	if _, err := pack.Verify(bytes.NewReader(buf.Bytes()), ""); err != nil {
		return fmt.Errorf("cannot make the pack %s: %w", m.File(), err)
	}
	path := filepath.Join(dir, m.File())
	changed, err := writeChanged(path, buf.Bytes())
	if err != nil {
		return err
	}
	state := "unchanged"
	if changed {
		state = "written"
	}
	fmt.Printf("%s: %s (%d images, %d KiB)\n", path, state, len(m.Images), buf.Len()/1024)
	return nil
}
