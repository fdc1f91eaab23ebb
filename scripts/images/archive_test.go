package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"microk8s/scripts/catalog"
)

func testImage() image {
	return image{archive: "x", refs: []string{"example.test/a/x:1", "example.test/a/x:latest"}, program: "/x", user: "1:1", title: "x", note: "n"}
}

func packed(t *testing.T, content string) []byte {
	t.Helper()
	program := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(program, []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
	data, err := testImage().pack("amd64", program)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestSameProgramGivesTheSameArchive(t *testing.T) {
	if !bytes.Equal(packed(t, "program"), packed(t, "program")) {
		t.Error("two archives of the same program differ")
	}
	if bytes.Equal(packed(t, "program"), packed(t, "another")) {
		t.Error("archives of different programs are equal")
	}
}

// Everything the archive refers to must be in it, under the digest it is referred to by.
func TestArchiveIsComplete(t *testing.T) {
	files := map[string][]byte{}
	r := tar.NewReader(bytes.NewReader(packed(t, "program")))
	for first := true; ; first = false {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if first && h.Name != "index.json" {
			t.Errorf("first file is %s, want index.json", h.Name)
		}
		if !h.ModTime.Equal(time.Unix(0, 0)) {
			t.Errorf("%s is dated %v, want 1970", h.Name, h.ModTime)
		}
		if files[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
	blob := func(h v1.Hash) []byte {
		data, ok := files["blobs/sha256/"+h.Hex]
		if !ok {
			t.Fatalf("blob %s is missing", h)
		}
		if got, _, _ := v1.SHA256(bytes.NewReader(data)); got != h {
			t.Errorf("blob %s holds %s", h, got)
		}
		return data
	}

	var index v1.IndexManifest
	if err := json.Unmarshal(files["index.json"], &index); err != nil {
		t.Fatal(err)
	}
	if len(index.Manifests) != 2 {
		t.Fatalf("%d manifests in the index, want one for each reference", len(index.Manifests))
	}
	for i, want := range testImage().refs {
		if got := index.Manifests[i].Annotations[annotationImageName]; got != want {
			t.Errorf("reference %d is %q, want %q", i, got, want)
		}
	}
	var manifest v1.Manifest
	if err := json.Unmarshal(blob(index.Manifests[0].Digest), &manifest); err != nil {
		t.Fatal(err)
	}
	var cfg v1.ConfigFile
	if err := json.Unmarshal(blob(manifest.Config.Digest), &cfg); err != nil {
		t.Fatal(err)
	}
	if cfg.OS != "linux" || cfg.Architecture != "amd64" || len(cfg.Config.Entrypoint) != 1 || cfg.Config.Entrypoint[0] != "/x" {
		t.Errorf("wrong configuration: %+v", cfg)
	}
	if len(manifest.Layers) != 1 || len(cfg.RootFS.DiffIDs) != 1 {
		t.Fatalf("%d layers, %d diff ids, want one each", len(manifest.Layers), len(cfg.RootFS.DiffIDs))
	}
	layer := manifest.Layers[0]
	if layer.MediaType != types.OCILayerZStd {
		t.Errorf("the layer is %s", layer.MediaType)
	}
	packed := blob(layer.Digest)
	content, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(packed)), nil })
	if err != nil {
		t.Fatal(err)
	}
	if got, err := content.DiffID(); err != nil || got != cfg.RootFS.DiffIDs[0] {
		t.Errorf("the layer unpacks to %s, %v; the configuration says %s", got, err, cfg.RootFS.DiffIDs[0])
	}
}

// TestLinks: one program may have several names.
func TestLinks(t *testing.T) {
	program := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(program, []byte("program"), 0o755); err != nil {
		t.Fatal(err)
	}
	layer, err := programLayer([]string{program}, []string{"/app/x"}, []string{"/app/y"})
	if err != nil {
		t.Fatal(err)
	}
	plain, err := layer.Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for r := tar.NewReader(plain); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got[h.Name] = h.Linkname
	}
	if to, ok := got["app/y"]; !ok || to != "/app/x" {
		t.Errorf("the layer has %v", got)
	}
}

func TestUnchangedArchiveIsNotTouched(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dir", "x.tar")
	for _, step := range []struct {
		data    string
		changed bool
	}{{"one", true}, {"one", false}, {"two", true}} {
		changed, err := writeChanged(path, []byte(step.data))
		if err != nil {
			t.Fatal(err)
		}
		if changed != step.changed {
			t.Errorf("writing %q: changed is %v, want %v", step.data, changed, step.changed)
		}
	}
}

func TestReferenceNeedsATag(t *testing.T) {
	img := testImage()
	img.refs = []string{"registry.test:5000/x"}
	program := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(program, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := img.pack("amd64", program); err == nil {
		t.Error("a reference without a tag was accepted")
	}
}

// An addon can use only what is built here: its images are never pulled.
func TestImagesOfAddonsAreBuilt(t *testing.T) {
	built := map[string]bool{}
	for _, img := range images {
		for _, ref := range img.refs {
			built[ref] = !img.test
		}
	}
	manifests, err := filepath.Glob("../../addons/core/addons/*/*.yaml")
	if err != nil || len(manifests) == 0 {
		t.Fatalf("manifests %v, %v", manifests, err)
	}
	for _, path := range manifests {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?m)^\s+image: (\S+)\n\s+imagePullPolicy: (\S+)`).FindAllSubmatch(text, -1) {
			if !built[string(m[1])] || string(m[2]) != "Never" {
				t.Errorf("%s: image %s, policy %s", path, m[1], m[2])
			}
		}
		if got, want := bytes.Count(text, []byte(" image: ")), len(regexp.MustCompile(`(?m)^\s+image: (\S+)\n\s+imagePullPolicy: Never`).FindAll(text, -1)); got != want {
			t.Errorf("%s: %d images, %d of them never pulled", path, got, want)
		}
	}
}

// TestTagsAreTheComponentsVersions: the tag is the version that go.mod pins, and for images
// with a program of ours around it a number.
func TestTagsAreTheComponentsVersions(t *testing.T) {
	for _, img := range images {
		if img.component == "" {
			continue
		}
		c, err := catalog.Find(img.component)
		if err != nil {
			t.Fatal(err)
		}
		version, err := c.Version("../..")
		if err != nil {
			t.Fatal(err)
		}
		want := "microk8s.io/" + img.component + ":" + strings.TrimPrefix(version, "v")
		if rest, ok := strings.CutPrefix(img.refs[0], want); !ok || !regexp.MustCompile(`^(-[0-9]+)?$`).MatchString(rest) {
			t.Errorf("image %s holds version %s", img.refs[0], version)
		}
	}
}

// TestLabels wants those of OCI's specification on every image.
func TestLabels(t *testing.T) {
	for _, img := range images {
		labels, err := img.labels()
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"title", "description", "version", "licenses", "vendor", "base.name"} {
			if labels["org.opencontainers.image."+name] == "" {
				t.Errorf("image %s has no %s", img.archive, name)
			}
		}
		if _, has := labels["org.opencontainers.image.source"]; has != (img.component != "") {
			t.Errorf("image %s: label of the source is there: %v", img.archive, has)
		}
	}
}

// TestBuiltInTwoFolders builds one image of C code and one of Go code in two folders, with the
// sources copied there, and wants the same archives: a sample of scripts/reproducible.
func TestBuiltInTwoFolders(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	var made [2]map[string][]byte
	for i, folder := range []string{"a", "another/folder with a longer name"} {
		dir := filepath.Join(t.TempDir(), folder)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		copySources(t, root, dir)
		t.Chdir(dir)
		made[i] = map[string][]byte{}
		for _, img := range images {
			if img.archive != "pause" && img.archive != "host-access" {
				continue
			}
			out := filepath.Join(t.TempDir(), "program")
			if err := img.build(builder{runtime.GOARCH}, out); err != nil {
				t.Fatal(err)
			}
			if made[i][img.archive], err = img.pack(runtime.GOARCH, out); err != nil {
				t.Fatal(err)
			}
		}
		t.Chdir(root)
	}
	if len(made[0]) != 2 {
		t.Fatalf("%d images were made", len(made[0]))
	}
	for name, data := range made[0] {
		if !bytes.Equal(data, made[1][name]) {
			t.Errorf("image %s depends on the folder in which it was built", name)
		}
	}
}

// copySources copies what the two images need.
func copySources(t *testing.T, root, dir string) {
	t.Helper()
	for _, part := range []string{"go.mod", "go.sum", "cmd/host-access", "scripts/images"} {
		err := filepath.WalkDir(filepath.Join(root, part), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			rel, err := filepath.Rel(root, path)
			if err != nil {
				return err
			}
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			to := filepath.Join(dir, rel)
			return errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, data, 0o644))
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}
