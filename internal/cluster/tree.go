package cluster

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"microk8s/internal/atomicfile"
	"microk8s/internal/fileaccess"
	"microk8s/internal/snapenv"
)

// saved is the folder, beside the journal, with what this node was before it joined: copies of
// its argument files, certificates, credentials and locks.
const saved = "before-join"

// savedTrees are the folders that a join changes.
func savedTrees(env snapenv.Env) map[string]string {
	return map[string]string{"args": env.ArgsDir(), "certs": env.CertsDir(), "credentials": env.CredentialsDir(), "lock": env.LocksDir()}
}

// keptLocks are not part of what a node is.
func keptLock(name string) bool {
	return name == snapenv.LockJoining || name == snapenv.LockAddons || name == snapenv.LockInstalled
}

// save copies what the node is now. It appears whole, and only once.
func (n *Node) save() error {
	to := n.file(saved)
	if _, err := os.Stat(to); err == nil {
		return nil
	}
	temporary := to + ".new"
	if err := os.RemoveAll(temporary); err != nil {
		return err
	}
	for name, from := range savedTrees(n.Env) {
		if err := copyTree(from, filepath.Join(temporary, name)); err != nil {
			return fmt.Errorf("cannot keep a copy of %s: %w", from, err)
		}
	}
	if err := os.Rename(temporary, to); err != nil {
		return err
	}
	return syncDir(n.Env.ClusterDir())
}

// restore makes folders as they were when [Node.save] was called. Names are those of savedTrees;
// none means all.
func (n *Node) restore(names ...string) error {
	if _, err := os.Stat(n.file(saved)); errors.Is(err, fs.ErrNotExist) {
		return nil // nothing was changed before it was there
	}
	trees := savedTrees(n.Env)
	if len(names) == 0 {
		names = []string{"args", "certs", "credentials", "lock"}
	}
	for _, name := range names {
		if err := restoreTree(n.file(saved+"/"+name), trees[name], name == "lock"); err != nil {
			return fmt.Errorf("cannot restore %s: %w", trees[name], err)
		}
	}
	return nil
}

// copyTree copies folders, regular files and links with their modes and owners. Sockets and
// temporary files are left out; a missing folder is an empty one.
func copyTree(from, to string) error {
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil || rel == "." {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		switch {
		case d.IsDir():
			if err := os.Mkdir(target, 0o700); err != nil {
				return err
			}
			return own(target, st)
		case d.Type()&fs.ModeSymlink != 0:
			link, err := os.Readlink(path)
			if err != nil {
				return err
			}
			return os.Symlink(link, target)
		case !d.Type().IsRegular():
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return atomicfile.Write(target, data, st.Mode().Perm(), fileaccess.OwnerOf(st))
	})
	if errors.Is(err, fs.ErrNotExist) {
		if _, missing := os.Stat(from); errors.Is(missing, fs.ErrNotExist) {
			return nil
		}
	}
	return err
}

func own(path string, st fs.FileInfo) error {
	if o := fileaccess.OwnerOf(st); o != nil {
		if err := os.Lchown(path, o.UID, o.GID); err != nil {
			return err
		}
	}
	return os.Chmod(path, st.Mode().Perm())
}

// restoreTree makes to what from is: files that differ are replaced, those that came are removed.
func restoreTree(from, to string, locks bool) error {
	skip := func(rel string) bool { return locks && keptLock(rel) }
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		switch {
		case skip(rel):
			return nil
		case rel == ".":
			return os.MkdirAll(target, 0o755)
		case d.IsDir():
			if err := os.MkdirAll(target, 0o700); err != nil {
				return err
			}
			return own(target, st)
		case d.Type()&fs.ModeSymlink != 0:
			link, err := os.Readlink(path)
			if err != nil {
				return err
			}
			if now, err := os.Readlink(target); err == nil && now == link {
				return nil
			}
			if err := os.RemoveAll(target); err != nil {
				return err
			}
			return os.Symlink(link, target)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if now, err := os.Stat(target); err == nil && now.Mode() == st.Mode() {
			if old, err := os.ReadFile(target); err == nil && bytes.Equal(old, data) {
				return nil
			}
		}
		return atomicfile.Write(target, data, st.Mode().Perm(), fileaccess.OwnerOf(st))
	})
	if err != nil {
		return err
	}
	var extra []string
	err = filepath.WalkDir(to, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(to, path)
		if err != nil || rel == "." || skip(rel) {
			return err
		}
		if _, err := os.Lstat(filepath.Join(from, rel)); errors.Is(err, fs.ErrNotExist) {
			if d.IsDir() {
				extra = append(extra, path)
				return filepath.SkipDir
			}
			if d.Type().IsRegular() || d.Type()&fs.ModeSymlink != 0 || strings.HasPrefix(d.Name(), ".") {
				extra = append(extra, path)
			}
		}
		return nil
	})
	for _, path := range extra {
		err = errors.Join(err, os.RemoveAll(path))
	}
	return err
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// The single node's datastore is set aside while a join goes on, and kept as a backup after it.
func (n *Node) backendAside() string  { return n.Env.BackendLive() + ".aside" }
func (n *Node) backendBackup() string { return n.Env.BackendLive() + ".backup" }

// setBackendAside moves the datastore's folder away, once.
func (n *Node) setBackendAside() error {
	if _, err := os.Lstat(n.backendAside()); err == nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(n.backendAside()), 0o755); err != nil {
		return err
	}
	if err := os.Rename(n.Env.BackendLive(), n.backendAside()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot move the datastore aside: %w", err)
	} else if errors.Is(err, fs.ErrNotExist) {
		// A node without one, such as a worker that was never a single node.
		if err := os.Mkdir(n.backendAside(), 0o700); err != nil {
			return err
		}
	}
	return syncDir(filepath.Dir(n.backendAside()))
}

// takeBackendBack undoes setBackendAside. The datastore must not run.
func (n *Node) takeBackendBack() error {
	if _, err := os.Lstat(n.backendAside()); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := os.RemoveAll(n.Env.BackendLive()); err != nil {
		return fmt.Errorf("cannot restore the datastore: %w", err)
	}
	if err := os.Rename(n.backendAside(), n.Env.BackendLive()); err != nil {
		return fmt.Errorf("cannot restore the datastore: %w", err)
	}
	return syncDir(filepath.Dir(n.backendAside()))
}

// writeLike replaces a file and keeps its mode and owner.
func writeLike(path string, data []byte) error {
	st, err := os.Stat(path)
	if err != nil {
		return atomicfile.Write(path, data, 0o660, nil)
	}
	return atomicfile.Write(path, data, st.Mode().Perm(), fileaccess.OwnerOf(st))
}
