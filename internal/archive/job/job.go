// Package job makes archives of this node's cluster, proves them, and removes old ones: from the running
// datastore to a place, and back from there into a scratch member. What an archive looks like is the
// package archive's, where it lies is archive/place's.
package job

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"filippo.io/age"

	"microk8s/internal/archive"
	"microk8s/internal/archive/place"
	"microk8s/internal/archive/schedule"
	"microk8s/internal/diskspace"
	"microk8s/internal/snapenv"
)

// Job is one run of this program. All fields are set.
type Job struct {
	Env   snapenv.Env
	Place place.Place
	Node  string // this node's name
	// Encryption is the file of the keys of encryption at rest, which may not exist.
	Encryption string
	Version    string
	Now        func() time.Time
	// Datastore runs k8s-dqlite with a sub-command and returns what it printed.
	Datastore func(ctx context.Context, args ...string) ([]byte, error)
	// Step shows a part of the work and does it.
	Step func(name string, do func() error) error
}

// Files returns the files of a node that an archive has, from the path in the archive to the path here:
// keys and certificates of the cluster (not of the machine, which makes its own), arguments, addon
// repositories, launch configurations, and the keys of encryption at rest.
func Files(env snapenv.Env, encryption string) (map[string]string, error) {
	out := map[string]string{}
	for _, name := range ClusterCerts {
		out["certs/"+name] = env.Cert(name)
	}
	if _, err := os.Stat(encryption); err == nil {
		out[EncryptionFile] = encryption
	}
	if _, err := os.Stat(env.UserLaunchFile()); err == nil {
		out[LaunchFile] = env.UserLaunchFile()
	}
	for folder, from := range map[string]string{ArgsFolder: env.ArgsDir(), AddonsFolder: env.AddonRepositories(), LaunchFolder: env.LaunchDir()} {
		err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) && path == from {
				return fs.SkipDir
			}
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(from, path)
			if err != nil {
				return err
			}
			if d.Type().IsRegular() && !strings.HasSuffix(rel, ".backup") {
				out[folder+"/"+filepath.ToSlash(rel)] = path
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// ClusterCerts are the files in certs/ that make a cluster this one.
var ClusterCerts = []string{"ca.crt", "ca.key", "front-proxy-ca.crt", "front-proxy-ca.key", "serviceaccount.key"}

// Paths of a node's files in an archive.
const (
	CertsFolder    = "certs"
	ArgsFolder     = "args"
	AddonsFolder   = "addons"
	LaunchFolder   = "launcher"
	LaunchFile     = "microk8s.yaml"
	EncryptionFile = "encryption.yaml"
)

// Work makes a folder on the disk of the node's data, whose path is short enough for sockets, and
// removes those that commands which were killed have left. The caller removes it.
func Work(env snapenv.Env) (string, error) {
	parent := filepath.Join(env.Common, "tmp")
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return "", err
	}
	left, err := filepath.Glob(filepath.Join(parent, "backup-*"))
	if err != nil {
		return "", err
	}
	for _, l := range left {
		if st, err := os.Stat(l); err == nil && time.Since(st.ModTime()) > 24*time.Hour {
			if err := os.RemoveAll(l); err != nil {
				return "", err
			}
		}
	}
	return os.MkdirTemp(parent, "backup-")
}

// Create makes an archive, stores it, reads it back, proves it, and only then writes its note.
func (j *Job) Create(ctx context.Context, seal archive.Seal) (*archive.Note, error) {
	to, who, err := seal.Open()
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(j.Env.Cert("ca.crt"))
	if err != nil {
		return nil, err
	}
	work, err := Work(j.Env)
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)
	now := j.Now().UTC().Truncate(time.Second)
	cluster := archive.ClusterID(ca)
	m := &archive.Manifest{Name: archive.NewName(cluster, now), Cluster: cluster, Node: j.Node, Version: j.Version, Created: now}
	keys, file := filepath.Join(work, "keys"), filepath.Join(work, "archive")
	err = j.Step("Read the datastore", func() error {
		_, err := j.Datastore(ctx, "migrator", "--endpoint", "unix://"+j.Env.DatastoreSocket(), "--mode", "backup-dqlite", "--db-dir", keys)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("cannot read the datastore: %w", err)
	}
	var size int64
	var sum string
	err = j.Step("Write and encrypt the archive", func() (err error) {
		files, err := Files(j.Env, j.Encryption)
		if err != nil {
			return err
		}
		f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		h := sha256.New()
		if err := archive.Write(ctx, io.MultiWriter(f, h), m, keys, files, to...); err != nil {
			return err
		}
		st, err := f.Stat()
		if err != nil {
			return err
		}
		size, sum = st.Size(), hex.EncodeToString(h.Sum(nil))
		return f.Close()
	})
	if err != nil {
		return nil, fmt.Errorf("cannot write the archive: %w", err)
	}
	if err := os.RemoveAll(keys); err != nil { // it has to come from the archive
		return nil, err
	}
	err = j.Step("Store "+m.Name, func() error {
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close()
		return j.Place.Put(ctx, m.Name, f, size)
	})
	if err != nil {
		return nil, err
	}
	if err := os.Remove(file); err != nil {
		return nil, err
	}
	note := &archive.Note{
		Format: m.Format, Name: m.Name, Cluster: cluster, Node: m.Node, Version: m.Version, Created: m.Created,
		Revision: m.Datastore.Revision, Keys: m.Datastore.Keys, Size: size, SHA256: sum, For: seal.For(),
	}
	if err := j.prove(ctx, work, note, who); err != nil {
		err = fmt.Errorf("the archive %s does not count, because it could not be proven: %w", m.Name, err)
		if ctx.Err() == nil {
			err = errors.Join(err, j.Place.Remove(ctx, m.Name))
		}
		return nil, err
	}
	note.Proven = j.Now().UTC().Truncate(time.Second)
	return note, j.note(ctx, note)
}

// note writes what says that an archive was proven.
func (j *Job) note(ctx context.Context, n *archive.Note) error {
	data, err := n.Encode()
	if err != nil {
		return err
	}
	return j.Place.Put(ctx, n.Name+archive.NoteSuffix, bytes.NewReader(data), int64(len(data)))
}

// ErrOther is wrapped where what is stored is not what the note of the archive says.
var ErrOther = errors.New("what is stored is not the archive that was made")

// Open reads an archive from the place into a folder below work, and compares it with its manifest, and
// with its hash where that is known (hexadecimal, "" is not known).
func (j *Job) Open(ctx context.Context, work, name, sum string, who ...age.Identity) (o *archive.Opened, size int64, got string, err error) {
	r, err := j.Place.Get(ctx, name)
	if err != nil {
		return nil, 0, "", err
	}
	defer r.Close()
	h := sha256.New()
	count := &counter{r: io.TeeReader(r, h)}
	dir := filepath.Join(work, "open")
	if o, err = archive.Read(ctx, count, dir, who...); err != nil {
		return nil, 0, "", err
	}
	if _, err := io.Copy(io.Discard, count); err != nil {
		return nil, 0, "", err
	}
	if got = hex.EncodeToString(h.Sum(nil)); sum != "" && got != sum {
		return nil, 0, "", fmt.Errorf("%w: its hash is %s and not %s", ErrOther, got, sum)
	}
	return o, count.n, got, nil
}

type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// prove reads an archive back and restores it into a scratch member.
func (j *Job) prove(ctx context.Context, work string, note *archive.Note, who ...age.Identity) error {
	var o *archive.Opened
	err := j.Step("Read it back", func() (err error) {
		o, _, _, err = j.Open(ctx, work, note.Name, note.SHA256, who...)
		return err
	})
	if err != nil {
		return err
	}
	return j.Step(fmt.Sprintf("Restore its %d keys into a scratch datastore, and compare", note.Keys), func() error {
		return j.Prove(ctx, work, o)
	})
}

// Prove restores the datastore of an archive into a scratch member below work, and compares number and
// hash of all keys.
func (j *Job) Prove(ctx context.Context, work string, o *archive.Opened) error {
	var need diskspace.Need
	entries, err := os.ReadDir(o.Keys())
	if err != nil {
		return err
	}
	for _, e := range entries {
		if st, err := e.Info(); err == nil {
			need.Add(st.Size())
		}
	}
	need.Bytes += need.Bytes + 64<<20 // the member's log, and what is read back
	if err := diskspace.Check(work, need); err != nil {
		return err
	}
	out, err := j.Datastore(ctx, "prove", "--db-dir", o.Keys(), "--work", work)
	if err != nil {
		return err
	}
	var proof struct {
		Keys   int    `json:"keys"`
		SHA256 string `json:"sha256"`
	}
	if err := json.Unmarshal(out, &proof); err != nil {
		return fmt.Errorf("cannot read the result of the proof: %w", err)
	}
	if d := o.Manifest.Datastore; proof.Keys != d.Keys || proof.SHA256 != d.SHA256 {
		return fmt.Errorf("%w: restored, it has %d keys with hash %s; the manifest says %d with hash %s", archive.ErrDamaged, proof.Keys, proof.SHA256, d.Keys, d.SHA256)
	}
	return nil
}

// Verify proves an archive that is stored, and writes its note where it has none.
func (j *Job) Verify(ctx context.Context, name string, who ...age.Identity) (*archive.Note, error) {
	work, err := Work(j.Env)
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)
	note, err := j.Note(ctx, name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	sum := ""
	if note != nil {
		sum = note.SHA256
	}
	var o *archive.Opened
	var size int64
	err = j.Step("Read "+name, func() (err error) {
		o, size, sum, err = j.Open(ctx, work, name, sum, who...)
		return err
	})
	if err != nil {
		return nil, err
	}
	m := o.Manifest
	if err := j.Step(fmt.Sprintf("Restore its %d keys into a scratch datastore, and compare", m.Datastore.Keys), func() error {
		return j.Prove(ctx, work, o)
	}); err != nil {
		return nil, err
	}
	if note == nil {
		note = &archive.Note{
			Format: m.Format, Name: m.Name, Cluster: m.Cluster, Node: m.Node, Version: m.Version, Created: m.Created,
			Revision: m.Datastore.Revision, Keys: m.Datastore.Keys, Size: size, SHA256: sum,
		}
	}
	note.Proven = j.Now().UTC().Truncate(time.Second)
	if note.Name != name { // a copy under another name
		return note, nil
	}
	return note, j.note(ctx, note)
}

// Note reads the note of an archive; fs.ErrNotExist says that it has none.
func (j *Job) Note(ctx context.Context, name string) (*archive.Note, error) {
	r, err := j.Place.Get(ctx, name+archive.NoteSuffix)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, 1<<20))
	if err != nil {
		return nil, err
	}
	return archive.ParseNote(data)
}

// Stored is an archive of a place.
type Stored struct {
	Name    string
	Cluster string
	Created time.Time
	Size    int64         // bytes
	Note    *archive.Note // nil where it was not proven, or its note cannot be read
}

// List returns the archives of a place, the newest first.
func (j *Job) List(ctx context.Context) (out []Stored, err error) {
	entries, err := j.Place.List(ctx)
	if err != nil {
		return nil, err
	}
	names := map[string]bool{}
	for _, e := range entries {
		names[e.Name] = true
	}
	for _, e := range entries {
		cluster, created, ok := archive.ParseName(e.Name)
		if !ok {
			continue
		}
		s := Stored{Name: e.Name, Cluster: cluster, Created: created, Size: e.Size}
		if names[e.Name+archive.NoteSuffix] {
			if n, err := j.Note(ctx, e.Name); err == nil && n.Size == e.Size {
				s.Note = n
			}
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b Stored) int { return b.Created.Compare(a.Created) })
	return out, nil
}

// Prune removes the archives of a cluster beyond the newest keep proven ones, and returns their names.
func (j *Job) Prune(ctx context.Context, cluster string, keep int) ([]string, error) {
	entries, err := j.Place.List(ctx)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name)
	}
	expired := schedule.Expired(names, cluster, keep)
	for i, name := range expired {
		for _, file := range []string{name + archive.NoteSuffix, name} { // the note first: without it nobody takes it for one
			if err := j.Place.Remove(ctx, file); err != nil {
				return expired[:i], err
			}
		}
	}
	return expired, nil
}
