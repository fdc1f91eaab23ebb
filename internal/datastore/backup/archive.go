package backup

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"microk8s/internal/diskspace"
)

// Suffix of archives.
const Suffix = ".tar.gz"

// KeysName is the file of the keys with which Secrets in the archive are encrypted, where they are:
// without it they could be restored in the same cluster only.
const KeysName = "encryption.yaml"

// Pack writes the directory as an archive, reads the archive back, and only then gives it its
// name. The members lie below the archive's base name, where upstream looks for them. Nothing
// is left of an archive that failed. Others cannot read it: it holds every secret.
func Pack(ctx context.Context, dir, archive string) (err error) {
	base := strings.TrimSuffix(filepath.Base(archive), Suffix)
	f, err := os.CreateTemp(filepath.Dir(archive), "."+base+".*") // mode 0600
	if err != nil {
		return fmt.Errorf("cannot write the archive: %w", err)
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	if err := writeTar(ctx, f, dir, base); err != nil {
		return fmt.Errorf("cannot write the archive: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("cannot write the archive: %w", err)
	}
	back := dir + ".read-back"
	defer os.RemoveAll(back)
	s, err := Unpack(ctx, f.Name(), back)
	if err != nil {
		return fmt.Errorf("the archive reads differently from what was written: %w", err)
	}
	want, err := Open(dir)
	if err != nil {
		return err
	}
	if s.Manifest.SHA256 != want.Manifest.SHA256 || s.Manifest.Keys != want.Manifest.Keys {
		return errors.New("the archive reads differently from what was written")
	}
	if err := os.Rename(f.Name(), archive); err != nil {
		return fmt.Errorf("cannot write the archive: %w", err)
	}
	d, err := os.Open(filepath.Dir(archive))
	if err != nil {
		return fmt.Errorf("cannot write the archive: %w", err)
	}
	defer d.Close()
	return d.Sync()
}

func writeTar(ctx context.Context, w io.Writer, dir, base string) error {
	z := gzip.NewWriter(w)
	t := tar.NewWriter(z)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: base + "/", Mode: 0o700}); err != nil {
		return err
	}
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return err
		}
		if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: base + "/" + e.Name(), Mode: 0o640, Size: int64(len(data))}); err != nil {
			return err
		}
		if _, err := t.Write(data); err != nil {
			return err
		}
	}
	return errors.Join(t.Close(), z.Close())
}

// Needs reads an archive to its end and returns what its files will take.
func Needs(ctx context.Context, archive string) (need diskspace.Need, err error) {
	f, err := os.Open(archive)
	if err != nil {
		return need, fmt.Errorf("cannot read the archive: %w", err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return need, fmt.Errorf("%w: %w", ErrIncomplete, err)
	}
	for t := tar.NewReader(z); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return need, nil
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return need, fmt.Errorf("%w: %w", ErrIncomplete, err)
		}
		need.Add(h.Size)
	}
}

// Unpack reads an archive into a new directory and checks it. The folder inside may have any
// name, so that archives can be renamed. Members that are no part of a backup are refused, as
// are those of a second folder.
func Unpack(ctx context.Context, archive, dir string) (*Set, error) {
	f, err := os.Open(archive)
	if err != nil {
		return nil, fmt.Errorf("cannot read the archive: %w", err)
	}
	defer f.Close()
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot unpack: %w", err)
	}
	z, err := gzip.NewReader(f)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrIncomplete, err)
	}
	folder := ""
	for t := tar.NewReader(z); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrIncomplete, err)
		}
		if h.Typeflag == tar.TypeDir {
			continue
		}
		parent, name := path.Split(path.Clean(h.Name))
		switch {
		case h.Typeflag != tar.TypeReg || !pairName.MatchString(name) && name != ManifestName && name != KeysName:
			return nil, fmt.Errorf("%q is no part of a backup; the archive was not made by dbctl", h.Name)
		case folder == "":
			folder = parent
		case folder != parent:
			return nil, fmt.Errorf("the archive has files in %q and in %q: it was not made by dbctl", folder, parent)
		}
		if err := extract(t, filepath.Join(dir, name)); err != nil {
			return nil, err
		}
	}
	// The end of the compressed data holds its checksum.
	if _, err := io.Copy(io.Discard, z); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrIncomplete, err)
	}
	return Open(dir)
}

func extract(r io.Reader, file string) error {
	out, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o640)
	if err != nil {
		return fmt.Errorf("cannot unpack: %w", err)
	}
	defer out.Close()
	if _, err := io.Copy(out, r); err != nil {
		return fmt.Errorf("cannot unpack: %w", errors.Join(ErrIncomplete, err))
	}
	return out.Close()
}

// Prune removes all but the newest archives of a directory whose names match the pattern,
// which must sort by age. It returns what it removed.
func Prune(dir, pattern string, keep int) (removed []string, err error) {
	names, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	for len(names) > keep {
		if err := os.Remove(names[0]); err != nil {
			return removed, fmt.Errorf("cannot remove an old backup: %w", err)
		}
		removed = append(removed, names[0])
		names = names[1:]
	}
	return removed, nil
}
