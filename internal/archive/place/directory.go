package place

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"microk8s/internal/diskspace"
)

type directory struct {
	dir     string
	network bool // it must be on a network file system
}

// networks are the types of file systems of other machines (statfs(2)).
var networks = map[int64]bool{unix.NFS_SUPER_MAGIC: true, unix.SMB_SUPER_MAGIC: true, unix.SMB2_SUPER_MAGIC: true, unix.CIFS_SUPER_MAGIC: true, unix.CEPH_SUPER_MAGIC: true}

// ready makes the directory where it may.
func (d *directory) ready(write bool) error {
	if d.network {
		var st unix.Statfs_t
		if err := unix.Statfs(d.dir, &st); err != nil {
			return fmt.Errorf("cannot use %s: %w; mount the network file system there", d.dir, err)
		}
		if !networks[st.Type] {
			return fmt.Errorf("no network file system is mounted at %s: archives would lie on this machine; mount it, for instance: mount -t nfs4 SERVER:/EXPORT %[1]s", d.dir)
		}
	}
	if write {
		if err := os.Mkdir(d.dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("cannot make the directory of the backups: %w", err)
		}
	}
	st, err := os.Stat(d.dir)
	if err == nil && !st.IsDir() {
		err = fmt.Errorf("%s is not a directory", d.dir)
	}
	if err != nil {
		return fmt.Errorf("cannot use the directory of the backups: %w", err)
	}
	return nil
}

// partly is in the names of files that are being written; staleAfter is when nobody writes them any more.
const (
	partly     = ".part-"
	staleAfter = 24 * time.Hour
)

func (d *directory) Put(ctx context.Context, name string, r io.Reader, size int64) (err error) {
	if err := checkName(name); err != nil {
		return err
	}
	if err := d.ready(true); err != nil {
		return err
	}
	d.sweep()
	var need diskspace.Need
	need.Add(size)
	if err := diskspace.Check(d.dir, need); err != nil {
		return err
	}
	f, err := os.CreateTemp(d.dir, partly+"*") // mode 0600
	if err != nil {
		return fmt.Errorf("cannot write to %s: %w", d.dir, err)
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	n, err := io.Copy(f, reader{ctx, r})
	if err == nil && n != size {
		err = fmt.Errorf("%d bytes came, and %d were announced", n, size)
	}
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = f.Close()
	}
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(d.dir, name))
	}
	if err != nil {
		return fmt.Errorf("cannot write to %s: %w", d.dir, err)
	}
	folder, err := os.Open(d.dir)
	if err != nil {
		return err
	}
	defer folder.Close()
	return folder.Sync()
}

// sweep removes what writers that were killed have left.
func (d *directory) sweep() {
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		if st, err := e.Info(); err == nil && strings.HasPrefix(e.Name(), partly) && time.Since(st.ModTime()) > staleAfter {
			_ = os.Remove(filepath.Join(d.dir, e.Name()))
		}
	}
}

func (d *directory) Get(ctx context.Context, name string) (io.ReadCloser, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	if err := d.ready(false); err != nil {
		return nil, err
	}
	f, err := os.Open(filepath.Join(d.dir, name))
	if err != nil {
		return nil, fmt.Errorf("cannot read the backup: %w", err)
	}
	return struct {
		io.Reader
		io.Closer
	}{reader{ctx, f}, f}, nil
}

func (d *directory) List(context.Context) (out []Entry, err error) {
	if err := d.ready(false); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(d.dir) // sorted
	if err != nil {
		return nil, fmt.Errorf("cannot list the backups: %w", err)
	}
	for _, e := range entries {
		st, err := e.Info()
		if err != nil || !st.Mode().IsRegular() || checkName(e.Name()) != nil {
			continue
		}
		out = append(out, Entry{e.Name(), st.Size(), st.ModTime().UTC()})
	}
	return out, nil
}

func (d *directory) Remove(_ context.Context, name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(d.dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot remove a backup: %w", err)
	}
	return nil
}

// reader ends with its context.
type reader struct {
	ctx context.Context //nolint:containedctx // it is one call's
	r   io.Reader
}

func (r reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}
