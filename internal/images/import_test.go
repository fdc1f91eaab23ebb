package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// tarOf makes an archive of name, content, name, content…
func tarOf(t *testing.T, files ...string) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for i := 0; i+1 < len(files); i += 2 {
		if err := w.WriteHeader(&tar.Header{Name: files[i], Mode: 0o644, Size: int64(len(files[i+1]))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(files[i+1])); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func sha(text string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(text))) }

func toJSON(t *testing.T, v any) string {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// entry is an image of one platform in an OCI archive.
type entry struct {
	arch        string
	annotations map[string]string
	lost        bool // its layer is not in the archive
}

const (
	containerdName = "io.containerd.image.name"
	ociName        = "org.opencontainers.image.ref.name"
)

func ociArchiveOf(t *testing.T, entries ...entry) []byte {
	t.Helper()
	files := []string{"oci-layout", `{"imageLayoutVersion":"1.0.0"}`}
	blob := func(mediaType, text string) ocispec.Descriptor {
		files = append(files, "blobs/sha256/"+sha(text), text)
		return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromString(text), Size: int64(len(text))}
	}
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex}
	index.SchemaVersion = 2
	for i, e := range entries {
		layer := fmt.Sprintf("layer %d", i)
		manifest := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest}
		manifest.SchemaVersion = 2
		config := fmt.Sprintf(`{"os":"linux","architecture":%q,"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}`, e.arch, sha(layer))
		manifest.Config = blob(ocispec.MediaTypeImageConfig, config)
		l := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Size: int64(len(layer)), Digest: digest.FromString(layer)}
		if !e.lost {
			blob(l.MediaType, layer)
		}
		manifest.Layers = []ocispec.Descriptor{l}
		text := toJSON(t, manifest)
		m := blob(ocispec.MediaTypeImageManifest, text)
		m.Annotations = e.annotations
		index.Manifests = append(index.Manifests, m)
	}
	return tarOf(t, append(files, "index.json", toJSON(t, index))...)
}

func dockerArchiveOf(t *testing.T, arch string, tags ...string) []byte {
	t.Helper()
	config := fmt.Sprintf(`{"os":"linux","architecture":%q,"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}`, arch, sha("layer"))
	manifest := toJSON(t, []map[string]any{{"Config": "config.json", "RepoTags": tags, "Layers": []string{"layer.tar"}}})
	return tarOf(t, "config.json", config, "layer.tar", "layer", "manifest.json", manifest)
}

// TestUsable reads archives as containerd's importer does, into a real content store. ctr images
// import of containerd 2.2.9 exits 0 and prints nothing in each case of "want none".
func TestUsable(t *testing.T) {
	amd := platforms.Only(ocispec.Platform{OS: "linux", Architecture: "amd64"})
	named := func(key, name string) map[string]string { return map[string]string{key: name} }
	for _, tc := range []struct {
		name    string
		archive []byte
		names   []string
		skipped []string // parts of the reasons
		checked string   // what Check says before any node is asked; "" is nothing
	}{
		{"docker's", dockerArchiveOf(t, "amd64", "busybox:1", "example.test/a/b:2"), []string{"docker.io/library/busybox:1", "example.test/a/b:2"}, nil, ""},
		{"docker's without a name", dockerArchiveOf(t, "amd64"), nil, []string{"has no name: save it by its name, not by its ID"}, "its image has no name"},
		{"docker's for another machine", dockerArchiveOf(t, "s390x", "busybox:1"), nil, []string{"docker.io/library/busybox:1 is for linux/s390x, not for linux/amd64"}, ""},
		{"OCI's with a full name", ociArchiveOf(t, entry{arch: "amd64", annotations: named(containerdName, "example.test/x:1")}), []string{"example.test/x:1"}, nil, ""},
		{"OCI's with a short name of containerd's", ociArchiveOf(t, entry{arch: "amd64", annotations: named(containerdName, "busybox:1")}), []string{"docker.io/library/busybox:1"}, nil, ""},
		{"without a tag either", ociArchiveOf(t, entry{arch: "amd64", annotations: named(containerdName, "busybox")}), []string{"docker.io/library/busybox:latest"}, nil, ""},
		{"OCI's with a short name", ociArchiveOf(t, entry{arch: "amd64", annotations: named(ociName, "someone/app:1")}), []string{"docker.io/someone/app:1"}, nil, ""},
		{"OCI's with a mere tag", ociArchiveOf(t, entry{arch: "amd64", annotations: named(ociName, "1.0")}), nil, []string{"has a tag (1.0), but no name"}, "its image has a tag (1.0)"},
		{"OCI's without anything", ociArchiveOf(t, entry{arch: "amd64"}), nil, []string{"has no name"}, "its image has no name"},
		{"a name that is none", ociArchiveOf(t, entry{arch: "amd64", annotations: named(ociName, "app/UPPER:1")}), nil, []string{`has the name "app/UPPER:1", which is none`}, "which is none"},
		{"some of several", ociArchiveOf(t,
			entry{arch: "arm64", annotations: named(containerdName, "app:1")},
			entry{arch: "amd64", annotations: named(containerdName, "app:1")},
			entry{arch: "amd64"},
		), []string{"docker.io/library/app:1"}, []string{"docker.io/library/app:1 is for linux/arm64", "has no name"}, ""},
		{"incomplete", ociArchiveOf(t, entry{arch: "amd64", annotations: named(containerdName, "app:1"), lost: true}), nil, []string{"docker.io/library/app:1 is not complete: 1 of its blobs"}, ""},
		{"empty", ociArchiveOf(t), nil, nil, "there is no image in it"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for form, data := range forms(t, tc.archive) {
				if err := Check(bytes.NewReader(data)); tc.checked == "" && err != nil || tc.checked != "" && (err == nil || !strings.Contains(err.Error(), tc.checked)) {
					t.Errorf("%s: the check says %v, want %q", form, err, tc.checked)
				}
				store, err := local.NewStore(t.TempDir())
				if err != nil {
					t.Fatal(err)
				}
				plain, err := decompress(bytes.NewReader(data))
				if err != nil {
					t.Fatal(err)
				}
				defer plain.Close()
				index, err := archive.ImportIndex(t.Context(), store, plain)
				if err != nil {
					t.Fatal(err)
				}
				found, skipped, err := usable(t.Context(), store, index, amd)
				if err != nil {
					t.Fatal(err)
				}
				var names []string
				for _, img := range found {
					names = append(names, img.Name)
				}
				slices.Sort(names)
				if !slices.Equal(names, tc.names) {
					t.Errorf("%s: found %q, want %q", form, names, tc.names)
				}
				if len(skipped) != len(tc.skipped) {
					t.Fatalf("%s: skipped %q, want %q", form, skipped, tc.skipped)
				}
				for i, part := range tc.skipped {
					if !strings.Contains(skipped[i], part) {
						t.Errorf("%s: skipped %q, want one with %q", form, skipped[i], part)
					}
				}
			}
		})
	}
}

// forms are an archive as it may come: plain and compressed.
func forms(t *testing.T, data []byte) map[string][]byte {
	t.Helper()
	var gz, zs bytes.Buffer
	z, err := zstd.NewWriter(&zs)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range []io.WriteCloser{gzip.NewWriter(&gz), z} {
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return map[string][]byte{"plain": data, "gzip": gz.Bytes(), "zstd": zs.Bytes()}
}

// store has images by name; the other methods are not called.
type store struct {
	images.Store
	names []string
}

func (s store) Get(_ context.Context, name string) (images.Image, error) {
	if !slices.Contains(s.names, name) {
		return images.Image{}, errdefs.ErrNotFound
	}
	return images.Image{Name: name}, nil
}

// TestNamed: images are exported by the names that pods and docker have for them, too.
func TestNamed(t *testing.T) {
	s := store{names: []string{"docker.io/library/web:1", "docker.io/library/web:latest", "quay.io/a/b:2", "plain"}}
	for name, want := range map[string]string{
		"web:1": "docker.io/library/web:1", "web": "docker.io/library/web:latest", "library/web:1": "docker.io/library/web:1",
		"quay.io/a/b:2": "quay.io/a/b:2", "plain": "plain", "docker.io/library/web:1": "docker.io/library/web:1",
		"a/b:2": "", "Web:1": "", "": "",
	} {
		got, err := named(t.Context(), s, name)
		if got.Name != want || (want == "") != errdefs.IsNotFound(err) {
			t.Errorf("%q: %q, %v", name, got.Name, err)
		}
	}
}

func TestCheckRefuses(t *testing.T) {
	good := forms(t, dockerArchiveOf(t, "amd64", "x:1"))
	for _, tc := range []struct {
		name string
		data []byte
		want string
	}{
		{"xz", []byte("\xfd7zXZ\x00and more"), "it is compressed with xz; gzip and zstd are accepted"},
		{"bzip2", []byte("BZh91AY"), "it is compressed with bzip2"},
		{"zip", []byte("PK\x03\x04more"), "it is compressed with zip"},
		{"nothing", nil, "it holds no images"},
		{"text", []byte("hello, this is no archive"), "it is damaged, or not an archive of images"},
		{"cut off", good["plain"][:560], "it is damaged"},
		{"gzip, cut off", good["gzip"][:len(good["gzip"])-20], "it is damaged"},
		{"zstd, cut off", good["zstd"][:len(good["zstd"])-20], "it is damaged"},
		{"a file system", tarOf(t, "etc/passwd", "root"), "neither index.json nor manifest.json"},
		{"another blob", tarOf(t, "index.json", "{}", "blobs/sha256/"+sha("x"), "y"), "does not match its digest"},
		{"an index that is none", tarOf(t, "index.json", "["), "its index.json is damaged"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := Check(bytes.NewReader(tc.data)); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error is %v, want one with %q", err, tc.want)
			}
		})
	}
}
