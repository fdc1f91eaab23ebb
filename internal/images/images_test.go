package images

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"microk8s/internal/snapenv"
)

// What needs a real containerd (Load, StopAll with pods) is tested with real nodes.

func TestReadIndex(t *testing.T) {
	archive := func(files ...string) []byte {
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
	const index = `{"manifests":[{"digest":"sha256:aa","annotations":{"io.containerd.image.name":"x/y:1"}}]}`
	for _, tc := range []struct {
		name string
		data []byte
		err  string // "" for success
	}{
		{"good", archive("index.json", index), ""},
		{"index last, as tar writes a directory", archive("./oci-layout", "{}", "./index.json", index), ""},
		{"no archive at all", []byte("hello"), "damaged"},
		{"cut off", archive("index.json", index)[:600], "damaged"},
		{"empty file", nil, "index.json is missing"},
		{"another kind of archive", archive("manifest.json", "[]"), "index.json is missing"},
		{"bad index", archive("index.json", "{"), "damaged"},
		{"no image", archive("index.json", "{}"), "no image"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := readIndex(bytes.NewReader(tc.data))
			if tc.err == "" {
				if err != nil || len(got.Manifests) != 1 || got.Manifests[0].Digest != "sha256:aa" {
					t.Errorf("got %+v, %v", got, err)
				}
			} else if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("error is %v, want one with %q", err, tc.err)
			}
		})
	}
}

func TestConfiguredSnapshotter(t *testing.T) {
	for _, tc := range []struct{ config, want string }{
		{"", "overlayfs"},
		{"[plugins.x]\n  snapshotter = \"native\"\n", "native"},
		{"# snapshotter = \"zfs\"\nsnapshotter=\"fuse-overlayfs\"\n", "fuse-overlayfs"},
	} {
		env := snapenv.Under(t.TempDir())
		if err := os.MkdirAll(env.ArgsDir(), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(env.Args("containerd.toml"), []byte(tc.config), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := configuredSnapshotter(env); got != tc.want {
			t.Errorf("with %q it is %q, want %q", tc.config, got, tc.want)
		}
	}
}

func TestLoadWithoutArchivesSaysSo(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	err := Load(t.Context(), env, nil)
	if err == nil || !strings.Contains(err.Error(), env.Images()) {
		t.Errorf("error is %v", err)
	}
}

// Nothing to stop is success, with and without a dead socket.
func TestStopAllOfNothing(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	for range 2 {
		if err := StopAll(t.Context(), env); err != nil {
			t.Error(err)
		}
		if err := os.MkdirAll(filepath.Dir(env.ContainerdSocket()), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(env.ContainerdSocket(), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestIsShim(t *testing.T) {
	const socket = "/var/snap/microk8s/common/run/containerd.sock"
	for _, tc := range []struct {
		argv string
		want bool
	}{
		{"/snap/microk8s/current/bin/containerd-shim-runc-v2 -namespace k8s.io -id x -address " + socket, true},
		{"/usr/bin/containerd-shim-runc-v2 -namespace k8s.io -id x -address /run/containerd/containerd.sock", false},
		{"/snap/microk8s/current/bin/containerd-shim-runc-v2 -namespace other -id x -address " + socket, false},
		{"grep containerd-shim-runc-v2 -namespace k8s.io -address " + socket, false},
		{"containerd-shim-runc-v2 -namespace k8s.io -address", false},
		{"", false},
	} {
		var argv [][]byte
		for word := range strings.FieldsSeq(tc.argv) {
			argv = append(argv, []byte(word))
		}
		if got := isShim(argv, socket); got != tc.want {
			t.Errorf("isShim(%q) = %v", tc.argv, got)
		}
	}
}

// A process number that now belongs to another program must not be killed.
func TestKillContainerLooksAtTheCgroup(t *testing.T) {
	killContainer(os.Getpid(), "0123456789abcdef") // this test goes on
}
