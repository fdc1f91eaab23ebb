package pack

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// image makes an image of layers with these contents.
func image(t *testing.T, arch string, layers ...string) v1.Image {
	t.Helper()
	img := mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1)
	for _, text := range layers {
		made, err := mutate.AppendLayers(img, static.NewLayer([]byte(text), types.OCIUncompressedLayer))
		if err != nil {
			t.Fatal(err)
		}
		img = made
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", arch
	made, err := mutate.ConfigFile(img, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

func manifest(arch string) Manifest {
	return Manifest{Name: "thing", Version: "v1.2.3", Architecture: arch, Addons: []Addon{{"thing", "1.0", []string{"a.test/one:1"}}}}
}

// write makes a pack of two images that share a layer.
func write(t *testing.T, arch string) ([]byte, Manifest) {
	t.Helper()
	var buf bytes.Buffer
	m, err := Write(&buf, manifest(arch), map[string]v1.Image{
		"a.test/one:1": image(t, arch, "shared", "only of one"),
		"a.test/two:1": image(t, arch, "shared"),
	})
	if err != nil {
		t.Fatal(err)
	}
	return buf.Bytes(), m
}

func TestWriteAndVerify(t *testing.T) {
	data, made := write(t, "amd64")
	again, _ := write(t, "amd64")
	if !bytes.Equal(data, again) {
		t.Error("the same images make different packs")
	}
	if len(made.Blobs) != 6 { // two manifests, two configurations, two layers
		t.Errorf("%d blobs, and the shared layer is there once: %v", len(made.Blobs), made.Blobs)
	}
	m, err := Verify(bytes.NewReader(data), "amd64")
	if err != nil {
		t.Fatal(err)
	}
	if m.Digest() != made.Digest() || m.File() != "microk8s-addons-thing_v1.2.3_amd64.tar" || !m.Has("a.test/two:1") || m.Has("a.test/two:2") {
		t.Errorf("the pack says %+v", m)
	}
	var foreign *ForeignError
	if _, err := Verify(bytes.NewReader(data), "arm64"); !errors.As(err, &foreign) || !strings.Contains(err.Error(), "it is for amd64, and this is arm64") {
		t.Errorf("on arm64: %v", err)
	}
	images, err := Images(bytes.NewReader(data), int64(len(data)), "amd64")
	if err != nil {
		t.Fatal(err)
	}
	var copied bytes.Buffer
	if _, err := Write(&copied, manifest("amd64"), images); err != nil || !bytes.Equal(copied.Bytes(), data) {
		t.Errorf("a pack of the images of a pack is another one: %v", err)
	}
	if !Is(data[:512]) || !IsFile(bytes.NewReader(data)) || IsFile(bytes.NewReader(data[:100])) {
		t.Error("it is not known by its beginning")
	}
}

// change rewrites the entries of a pack.
func change(t *testing.T, data []byte, f func(h *tar.Header, content []byte) ([]byte, bool), more ...tar.Header) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		content, keep := f(h, content)
		if !keep {
			continue
		}
		h.Size = int64(len(content))
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	for _, h := range more {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// Each of these leaves nothing behind and says in one line what is wrong.
func TestDamaged(t *testing.T) {
	good, _ := write(t, runtime.GOARCH)
	all := func(_ *tar.Header, c []byte) ([]byte, bool) { return c, true }
	in := func(part, from, to string) []byte {
		return change(t, good, func(h *tar.Header, c []byte) ([]byte, bool) {
			if h.Name == part || part == "" {
				c = bytes.ReplaceAll(c, []byte(from), []byte(to))
			}
			return c, true
		})
	}
	for name, tc := range map[string]struct {
		data []byte
		want string
	}{
		"empty":             {nil, "it is not a pack of addons"},
		"text":              {[]byte(strings.Repeat("text\n", 400)), "it is not a pack of addons"},
		"cut in a blob":     {good[:len(good)-1700], "cut off"},
		"cut at the start":  {good[:700], "cut off"},
		"cut between files": {change(t, good, func(h *tar.Header, c []byte) ([]byte, bool) { return c, !strings.HasPrefix(h.Name, "blobs/") }), "0 of its 6 blobs are there"},
		"a bit of a layer":  {in("", "only of one", "only of onE"), "does not match its digest"},
		"index":             {in("index.json", "two:1", "two:2"), "index.json does not match its digest"},
		"no JSON":           {in(ManifestFile, "{", "["), "it is damaged"},
		"later form":        {in(ManifestFile, "microk8s.io/v1", "microk8s.io/v9"), "of a form that this version cannot read"},
		"a name as a path":  {in(ManifestFile, `"thing"`, `"../thing"`), "it is damaged"},
		"version as a path": {in(ManifestFile, "v1.2.3", "/etc/x"), "it is damaged"},
		"image not there":   {in(ManifestFile, "two:1", "two:9"), "is not listed"},
		"addon not there":   {in(ManifestFile, "one:1\"\n      ]", "six:1\"\n      ]"), "image a.test/six:1 of addon thing is not in it"},
		"something else":    {change(t, good, all, tar.Header{Name: "../../etc/passwd", Typeflag: tar.TypeReg}), "is not listed"},
		"a link":            {change(t, good, all, tar.Header{Name: "blobs/sha256/x", Linkname: "/etc/passwd", Typeflag: tar.TypeSymlink}), "is not a file"},
		"data after it":     {append(bytes.Clone(good), bytes.Repeat([]byte{1}, 14<<20)...), "data follows its end"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "packs")
			in, err := Receive(dir, bytes.NewReader(tc.data))
			if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error is %v, want one line with %q", err, tc.want)
			}
			if in != nil {
				t.Error("something was received")
			}
			if left, _ := os.ReadDir(dir); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

func TestImageOfAnotherArchitecture(t *testing.T) {
	var buf bytes.Buffer
	if _, err := Write(&buf, manifest("arm64"), map[string]v1.Image{"a.test/one:1": image(t, "amd64", "x")}); err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(&buf, ""); err == nil || !strings.Contains(err.Error(), "is for amd64, and the pack for arm64") {
		t.Errorf("error is %v", err)
	}
}

func TestKeep(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "packs")
	data, _ := write(t, runtime.GOARCH)
	for range 2 { // the second takes the place of the first
		in, err := Receive(dir, bytes.NewReader(data))
		if err != nil {
			t.Fatal(err)
		}
		if err := Clean(dir); err != nil { // kubelite starts while the agent receives a pack
			t.Fatal(err)
		}
		if err := in.Commit(); err != nil {
			t.Fatal(err)
		}
		in.Discard()
	}
	for name, text := range map[string]string{".incoming-1": "left", "other.tar": "no pack"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := Clean(dir); err != nil {
		t.Fatal(err)
	}
	kept, broken := List(dir)
	if len(kept) != 1 || kept[0].Name != "thing" || filepath.Base(kept[0].Path) != kept[0].File() {
		t.Errorf("kept %+v", kept)
	}
	if len(broken) != 1 || !strings.Contains(broken[0].Error(), "other.tar") {
		t.Errorf("broken: %v", broken)
	}
	if left, _ := os.ReadDir(dir); len(left) != 2 {
		t.Errorf("the folder has %v", left)
	}
	if stored, err := os.ReadFile(kept[0].Path); err != nil || !bytes.Equal(stored, data) {
		t.Errorf("the file is another one: %v", err)
	}
}

// Of several versions of one pack the latest two stay, for a version of the product that goes back.
func TestOldVersionsGo(t *testing.T) {
	dir := t.TempDir()
	for i, version := range []string{"v1.9.0", "v1.10.0", "v1.11.0"} {
		m := manifest(runtime.GOARCH)
		m.Version = version
		var buf bytes.Buffer
		if _, err := Write(&buf, m, map[string]v1.Image{"a.test/one:1": image(t, runtime.GOARCH, version)}); err != nil {
			t.Fatal(err)
		}
		in, err := Receive(dir, &buf)
		if err != nil {
			t.Fatal(err)
		}
		if err := in.Commit(); err != nil {
			t.Fatal(err)
		}
		when := time.Unix(int64(1000+i), 0)
		if err := os.Chtimes(filepath.Join(dir, in.File()), when, when); err != nil {
			t.Fatal(err)
		}
	}
	if err := Clean(dir); err != nil {
		t.Fatal(err)
	}
	kept, _ := List(dir)
	if len(kept) != 2 || kept[0].Version != "v1.10.0" || kept[1].Version != "v1.11.0" {
		t.Errorf("kept %+v", kept)
	}
}

// FuzzVerify: whatever comes, Verify ends, and accepts nothing that Images cannot read.
func FuzzVerify(f *testing.F) {
	t := &testing.T{}
	good, _ := write(t, "amd64")
	f.Add(good)
	f.Add(good[:2000])
	f.Add([]byte("text"))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := Verify(bytes.NewReader(data), "")
		if err != nil {
			return
		}
		images, err := Images(bytes.NewReader(data), int64(len(data)), m.Architecture)
		if err != nil || len(images) != len(m.Images) {
			t.Errorf("a pack that was accepted has %d of %d images: %v", len(images), len(m.Images), err)
		}
	})
}
