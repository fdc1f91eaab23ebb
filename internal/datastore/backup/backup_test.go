package backup

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// sample makes a backup of n keys.
func sample(t *testing.T, n int) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "keys")
	w, err := Create(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		p := Pair{Key: fmt.Appendf(nil, "/k/%d", i), Value: bytes.Repeat([]byte{0, byte(i), '\n'}, i)}
		if i == 3 {
			p.TTL = 60
		}
		if err := w.Add(p); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Close(42, time.Unix(1e9, 0)); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestRoundTrip(t *testing.T) {
	dir := sample(t, 12)
	archive := filepath.Join(t.TempDir(), "a.tar.gz")
	if err := Pack(t.Context(), dir, archive); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(archive); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
	// A renamed archive is the same archive.
	renamed := filepath.Join(t.TempDir(), "b.tar.gz")
	if err := os.Rename(archive, renamed); err != nil {
		t.Fatal(err)
	}
	s, err := Unpack(t.Context(), renamed, filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	if s.Manifest.Keys != 12 || s.Manifest.Revision != 42 {
		t.Errorf("%+v", s.Manifest)
	}
	for i := range 12 {
		p, err := s.Pair(i)
		want := int64(0)
		if i == 3 {
			want = 60
		}
		if err != nil || string(p.Key) != fmt.Sprintf("/k/%d", i) || len(p.Value) != 3*i || p.TTL != want {
			t.Errorf("%d: %+v, %v", i, p, err)
		}
	}
	if left, _ := os.ReadDir(filepath.Dir(dir)); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}

// The files of a directory are upstream's form, byte for byte.
func TestFormat(t *testing.T) {
	dir := sample(t, 4)
	for name, want := range map[string]string{"0.key": "/k/0", "0.data": "", "2.key": "/k/2", "2.data": "\x00\x02\n\x00\x02\n"} {
		path := filepath.Join(dir, name)
		data, err := os.ReadFile(path)
		fi, statErr := os.Stat(path)
		if err != nil || statErr != nil || string(data) != want || fi.Mode().Perm() != 0o640 {
			t.Errorf("%s: %q, %v, %v", name, data, fi.Mode(), err)
		}
	}
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", fi, err)
	}
}

func TestDamageIsFound(t *testing.T) {
	for name, damage := range map[string]func(dir string) error{
		"no data":        func(d string) error { return os.Remove(filepath.Join(d, "5.data")) },
		"no key":         func(d string) error { return os.Remove(filepath.Join(d, "5.key")) },
		"last missing":   func(d string) error { return errors.Join(os.Remove(d+"/11.key"), os.Remove(d+"/11.data")) },
		"pair missing":   func(d string) error { return errors.Join(os.Remove(d+"/4.key"), os.Remove(d+"/4.data")) },
		"other value":    func(d string) error { return os.WriteFile(d+"/7.data", []byte("x"), 0o600) },
		"empty key":      func(d string) error { return os.Truncate(d+"/7.key", 0) },
		"one more":       func(d string) error { return os.WriteFile(d+"/12.key", []byte("/x"), 0o600) },
		"bad manifest":   func(d string) error { return os.WriteFile(d+"/backup.json", []byte("{"), 0o600) },
		"empty manifest": func(d string) error { return os.WriteFile(d+"/backup.json", []byte("{}"), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := sample(t, 12)
			if err := damage(dir); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(dir); !errors.Is(err, ErrIncomplete) {
				t.Errorf("it was opened: %v", err)
			}
			if err := Pack(t.Context(), dir, filepath.Join(t.TempDir(), "a.tar.gz")); err == nil {
				t.Error("it was packed")
			}
		})
	}
}

// Of upstream's archives, gaps, missing halves and emptiness can be seen.
func TestUpstreamsDirectory(t *testing.T) {
	dir := sample(t, 12)
	os.Remove(filepath.Join(dir, ManifestName))
	s, err := Open(dir)
	if err != nil || s.Manifest.Keys != 12 || s.Manifest.Revision != 0 {
		t.Fatalf("%+v, %v", s, err)
	}
	os.Remove(filepath.Join(dir, "6.data"))
	if _, err := Open(dir); !errors.Is(err, ErrIncomplete) {
		t.Errorf("a half pair: %v", err)
	}
	os.Remove(filepath.Join(dir, "6.key"))
	if _, err := Open(dir); !errors.Is(err, ErrIncomplete) {
		t.Errorf("a gap: %v", err)
	}
	if _, err := Open(t.TempDir()); !errors.Is(err, ErrIncomplete) {
		t.Errorf("nothing: %v", err)
	}
}

func TestNothingIsNoBackup(t *testing.T) {
	w, err := Create(filepath.Join(t.TempDir(), "keys"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Close(1, time.Now()); err == nil {
		t.Error("an empty backup was made")
	}
	if _, err := Create(sample(t, 1)); err == nil {
		t.Error("a directory was used twice")
	}
}

type member struct {
	name, data string
	kind       byte
}

func archive(t testing.TB, members ...member) []byte {
	t.Helper()
	var buf bytes.Buffer
	z := gzip.NewWriter(&buf)
	w := tar.NewWriter(z)
	for _, m := range members {
		h := &tar.Header{Name: m.name, Typeflag: m.kind, Size: int64(len(m.data)), Mode: 0o600}
		if m.kind == 0 {
			h.Typeflag = tar.TypeReg
		}
		if m.kind == tar.TypeSymlink {
			h.Size, h.Linkname = 0, "/etc/passwd"
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, m.data[:h.Size]); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	z.Close()
	return buf.Bytes()
}

func TestArchives(t *testing.T) {
	good := []member{{"b/", "", tar.TypeDir}, {"b/0.key", "/a", 0}, {"b/0.data", strings.Repeat("1", 2000), 0}}
	whole := archive(t, good...)
	flipped := bytes.Clone(whole)
	flipped[len(flipped)-6] ^= 1
	for name, tc := range map[string]struct {
		data []byte
		ok   bool
	}{
		"good":            {whole, true},
		"flat":            {archive(t, member{"0.key", "/a", 0}, member{"0.data", "1", 0}), true},
		"dotted":          {archive(t, member{"./b/0.key", "/a", 0}, member{"./b/0.data", "1", 0}), true},
		"cut":             {whole[:len(whole)-20], false},
		"half":            {whole[:len(whole)/2], false},
		"flipped":         {flipped, false},
		"empty file":      {nil, false},
		"text":            {[]byte("hello"), false},
		"empty":           {archive(t), false},
		"empty folder":    {archive(t, good[0]), false},
		"half pair":       {archive(t, good[:2]...), false},
		"escapes":         {archive(t, append(good, member{"../1.key", "/b", 0}, member{"../1.data", "1", 0})...), false},
		"two folders":     {archive(t, append(good, member{"c/1.key", "/b", 0}, member{"c/1.data", "1", 0})...), false},
		"twice":           {archive(t, append(good, good[1])...), false},
		"symlink":         {archive(t, append(good, member{"b/1.key", "", tar.TypeSymlink})...), false},
		"something else":  {archive(t, append(good, member{"b/run.sh", "x", 0})...), false},
		"number with nul": {archive(t, append(good, member{"b/01.key", "x", 0})...), false},
	} {
		t.Run(name, func(t *testing.T) {
			tmp := t.TempDir()
			file := filepath.Join(tmp, "a.tar.gz")
			if err := os.WriteFile(file, tc.data, 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := Unpack(t.Context(), file, filepath.Join(tmp, "out"))
			if tc.ok != (err == nil) {
				t.Errorf("error: %v", err)
			}
			if left, _ := os.ReadDir(tmp); len(left) > 2 {
				t.Errorf("outside of the directory: %v", left)
			}
		})
	}
}

func TestPruneKeepsTheNewest(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"b-1.tar.gz", "b-3.tar.gz", "b-2.tar.gz", "other.tar.gz"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	removed, err := Prune(dir, "b-[0-9].tar.gz", 2)
	if err != nil || len(removed) != 1 || filepath.Base(removed[0]) != "b-1.tar.gz" {
		t.Errorf("%v, %v", removed, err)
	}
}

func FuzzUnpack(f *testing.F) {
	good := archive(f, member{"b/", "", tar.TypeDir}, member{"b/0.key", "/a", 0}, member{"b/0.data", "1", 0})
	f.Add(good, false)
	z, err := gzip.NewReader(bytes.NewReader(good))
	if err != nil {
		f.Fatal(err)
	}
	inner, err := io.ReadAll(z)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(inner, true)
	f.Fuzz(func(t *testing.T, data []byte, compress bool) {
		if compress { // past the checksum
			var buf bytes.Buffer
			z := gzip.NewWriter(&buf)
			_, _ = z.Write(data)
			z.Close()
			data = buf.Bytes()
		}
		tmp := t.TempDir()
		file := filepath.Join(tmp, "a")
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Unpack(t.Context(), file, filepath.Join(tmp, "out"))
		if err == nil && s.Manifest.Keys == 0 {
			t.Error("an empty backup was taken")
		}
	})
}
