// Package archive is the form of a backup of a whole cluster: what a new machine needs to become that
// cluster, in one file that only its owner can read.
//
// A file is age (filippo.io/age) around gzip around tar, so that `age -d FILE | tar xz` opens it where
// there is no microk8s. The tar begins with manifest.json, which says what must follow, with hashes:
// the datastore as internal/datastore/backup has it, below datastore/, and the files of a node, below
// node/. Beside an archive that was proven stands NAME.json, its [Note], which is no secret.
//
// What proves one, where archives are kept and when they are made is the business of others.
package archive

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"filippo.io/age"

	"microk8s/internal/datastore/backup"
)

// Suffixes of an archive and of its note.
const (
	Suffix     = ".tar.gz.age"
	NoteSuffix = ".json"
)

// format is the version of the form. A reader refuses others.
const format = 1

const (
	manifestName    = "manifest.json"
	datastoreFolder = "datastore"
	nodeFolder      = "node"
	maxManifest     = 4 << 20
	maxNodeFiles    = 256 << 20 // bytes of all files of a node
)

// ErrDamaged is wrapped when an archive is not what its manifest says.
var ErrDamaged = errors.New("the archive is incomplete or damaged")

// File is one of a node's.
type File struct {
	Size   int64       `json:"size"`
	Mode   fs.FileMode `json:"mode"` // permissions
	SHA256 string      `json:"sha256"`
}

// Manifest says what is in an archive.
type Manifest struct {
	Format    int             `json:"format"`
	Name      string          `json:"name"`
	Cluster   string          `json:"cluster"` // as ClusterID returns it
	Node      string          `json:"node"`    // that made it
	Version   string          `json:"version"` // of the product
	Created   time.Time       `json:"created"`
	Datastore backup.Manifest `json:"datastore"`
	Files     map[string]File `json:"files"` // of the node, by path: see the package cluster's tree
}

// Note stands beside an archive that was proven. It has no secrets.
type Note struct {
	Format   int       `json:"format"`
	Name     string    `json:"name"`
	Cluster  string    `json:"cluster"`
	Node     string    `json:"node"`
	Version  string    `json:"version"`
	Created  time.Time `json:"created"`
	Proven   time.Time `json:"proven"` // when it was restored into a scratch member and compared
	Revision int64     `json:"revision"`
	Keys     int       `json:"keys"`
	Size     int64     `json:"size"`   // of the file, bytes
	SHA256   string    `json:"sha256"` // of the file
	For      []string  `json:"for"`    // who can read it: age recipients, or "passphrase"
}

// ClusterID returns what tells a cluster from others, from the certificate of its CA (PEM).
func ClusterID(ca []byte) string {
	sum := sha256.Sum256([]byte(strings.TrimSpace(string(ca))))
	return hex.EncodeToString(sum[:4])
}

const stamp = "20060102T150405Z"

// NewName returns the name of an archive, without a folder. Names sort by time.
func NewName(cluster string, now time.Time) string {
	return "microk8s-" + cluster + "-" + now.UTC().Format(stamp) + Suffix
}

var nameForm = regexp.MustCompile(`^microk8s-([0-9a-f]{8})-(\d{8}T\d{6}Z)` + regexp.QuoteMeta(Suffix) + `$`)

// ParseName returns of which cluster an archive is and when it was made, by its name.
func ParseName(name string) (cluster string, created time.Time, ok bool) {
	m := nameForm.FindStringSubmatch(name)
	if m == nil {
		return "", time.Time{}, false
	}
	created, err := time.Parse(stamp, m[2])
	return m[1], created, err == nil
}

// Write writes an archive: the datastore's backup of the directory keys, and files of a node, by their
// path, read from where files says. m gets its hashes. Only the recipients can read it.
func Write(ctx context.Context, w io.Writer, m *Manifest, keys string, files map[string]string, to ...age.Recipient) (err error) {
	set, err := backup.Open(keys)
	if err != nil {
		return err
	}
	m.Format, m.Datastore, m.Files = format, set.Manifest, map[string]File{}
	content := map[string][]byte{}
	total := int64(0)
	for name, from := range files {
		if !filepath.IsLocal(name) {
			return fmt.Errorf("%q is not a path below a folder", name)
		}
		st, err := os.Stat(from)
		if err != nil {
			return err
		}
		if total += st.Size(); total > maxNodeFiles {
			return fmt.Errorf("the files of this node are larger than %d MiB; move what is no configuration out of %s", maxNodeFiles>>20, filepath.Dir(from))
		}
		data, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		content[name] = data
		m.Files[name] = File{int64(len(data)), st.Mode().Perm(), hash(data)}
	}
	sealed, err := age.Encrypt(w, to...)
	if err != nil {
		return fmt.Errorf("cannot encrypt the archive: %w", err)
	}
	z := gzip.NewWriter(sealed)
	t := tar.NewWriter(z)
	put := func(name string, mode fs.FileMode, data []byte) error {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: int64(mode), Size: int64(len(data)), ModTime: m.Created}
		if err := t.WriteHeader(h); err != nil {
			return err
		}
		_, err := t.Write(data)
		return err
	}
	list, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if err := put(manifestName, 0o600, list); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(content)) {
		if err := put(path.Join(nodeFolder, name), m.Files[name].Mode, content[name]); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(keys)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		data, err := os.ReadFile(filepath.Join(keys, e.Name()))
		if err != nil {
			return err
		}
		if err := put(path.Join(datastoreFolder, e.Name()), 0o600, data); err != nil {
			return err
		}
	}
	return errors.Join(t.Close(), z.Close(), sealed.Close())
}

func hash(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// Opened is an archive that was unpacked, and is what its manifest says.
type Opened struct {
	Manifest Manifest
	dir      string
}

// Keys is the directory of the datastore's backup.
func (o *Opened) Keys() string { return filepath.Join(o.dir, datastoreFolder) }

// File is where a file of the node lies.
func (o *Opened) File(name string) string { return filepath.Join(o.dir, nodeFolder, name) }

var pair = regexp.MustCompile(`^(0|[1-9][0-9]{0,9})\.(key|data)$`)

// Read decrypts and unpacks an archive into the directory dir, which it makes, and compares all of it
// with its manifest. An *age.NoIdentityMatchError says that it was encrypted for somebody else.
func Read(ctx context.Context, r io.Reader, dir string, who ...age.Identity) (*Opened, error) {
	damaged := func(err error) error { return fmt.Errorf("%w: %w", ErrDamaged, err) }
	plain, err := age.Decrypt(r, who...)
	var nobody *age.NoIdentityMatchError
	if errors.As(err, &nobody) {
		return nil, fmt.Errorf("cannot decrypt the archive: %w", err)
	}
	if err != nil {
		return nil, damaged(err)
	}
	z, err := gzip.NewReader(plain)
	if err != nil {
		return nil, damaged(err)
	}
	for _, d := range []string{dir, filepath.Join(dir, datastoreFolder), filepath.Join(dir, nodeFolder)} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return nil, fmt.Errorf("cannot unpack: %w", err)
		}
	}
	o := &Opened{dir: dir}
	t := tar.NewReader(z)
	first, err := t.Next()
	if err != nil {
		return nil, damaged(err)
	}
	if first.Name != manifestName || first.Size > maxManifest {
		return nil, damaged(fmt.Errorf("it begins with %q and not with its manifest", first.Name))
	}
	if err := json.NewDecoder(io.LimitReader(t, maxManifest)).Decode(&o.Manifest); err != nil {
		return nil, damaged(err)
	}
	if o.Manifest.Format != format {
		return nil, fmt.Errorf("the archive has the form %d, and this version knows the form %d; use the version %s that made it", o.Manifest.Format, format, o.Manifest.Version)
	}
	missing := maps.Clone(o.Manifest.Files)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return nil, damaged(err)
		}
		if h.Typeflag != tar.TypeReg || !filepath.IsLocal(h.Name) {
			return nil, damaged(fmt.Errorf("%q does not belong there", h.Name))
		}
		folder, name, _ := strings.Cut(h.Name, "/")
		switch {
		case folder == datastoreFolder && (pair.MatchString(name) || name == backup.ManifestName):
			err = unpack(t, filepath.Join(o.Keys(), name), 0o600)
		case folder == nodeFolder:
			want, listed := missing[name]
			if !listed || h.Size != want.Size {
				return nil, damaged(fmt.Errorf("%q is not what the manifest says", h.Name))
			}
			delete(missing, name)
			err = unpackNode(t, o.File(name), want)
		default:
			return nil, damaged(fmt.Errorf("%q does not belong there", h.Name))
		}
		if err != nil {
			return nil, err
		}
	}
	if _, err := io.Copy(io.Discard, z); err != nil { // its end holds the checksum
		return nil, damaged(err)
	}
	for name := range missing {
		return nil, damaged(fmt.Errorf("%q is missing", name))
	}
	set, err := backup.Open(o.Keys())
	if err != nil {
		return nil, damaged(err)
	}
	if d := o.Manifest.Datastore; set.Manifest.SHA256 != d.SHA256 || set.Manifest.Keys != d.Keys || set.Manifest.Revision != d.Revision {
		return nil, damaged(errors.New("the datastore is not what the manifest says"))
	}
	return o, nil
}

func unpack(r io.Reader, file string, mode fs.FileMode) error {
	out, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return fmt.Errorf("cannot unpack: %w", err)
	}
	defer out.Close()
	if _, err := io.Copy(out, r); err != nil {
		return fmt.Errorf("cannot unpack: %w", errors.Join(ErrDamaged, err))
	}
	return out.Close()
}

func unpackNode(r io.Reader, file string, want File) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return fmt.Errorf("cannot unpack: %w", err)
	}
	if err := unpack(r, file, 0o600); err != nil {
		return err
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if hash(data) != want.SHA256 {
		return fmt.Errorf("%w: the hash of %s differs", ErrDamaged, filepath.Base(file))
	}
	return os.Chmod(file, want.Mode.Perm()) // below a folder that only the owner enters
}

// Encode returns the note as it is written beside the archive.
func (n *Note) Encode() ([]byte, error) {
	data, err := json.MarshalIndent(n, "", "  ")
	return append(data, '\n'), err
}

// ParseNote reads a note.
func ParseNote(data []byte) (*Note, error) {
	var n Note
	if err := json.Unmarshal(data, &n); err != nil {
		return nil, fmt.Errorf("cannot read the note of an archive: %w", err)
	}
	if _, _, ok := ParseName(n.Name); !ok || n.Format != format || n.Proven.IsZero() || n.Keys <= 0 {
		return nil, errors.New("cannot read the note of an archive: it is not one of this version")
	}
	return &n, nil
}
