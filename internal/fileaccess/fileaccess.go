// Package fileaccess decides who may read and write the product's files: members of the group
// microk8s for what the command line needs, root alone for private keys, and root alone for
// everything while the lock cis-hardening is there (cli.md 0.6).
package fileaccess

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"microk8s/internal/atomicfile"
	"microk8s/internal/snapenv"
)

// Access is the rule of one installation at one moment.
type Access struct {
	gid  int // of the shared files
	root bool
	cis  bool
}

// For reads the group file of the host and the lock. A missing group is root's.
func For(env snapenv.Env) Access {
	_, err := os.Lstat(env.Lock(snapenv.LockCIS)) // internal/nodeconfig imports this package
	a := Access{root: os.Geteuid() == 0, cis: err == nil}
	if !a.cis {
		if gid, ok, err := GroupID(env.HostPath("etc/group"), snapenv.Group); err == nil && ok {
			a.gid = gid
		}
	}
	return a
}

// GroupID looks a group up in a file of the form of /etc/group.
func GroupID(path, name string) (gid int, found bool, err error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("cannot look up the group %s: %w", name, err)
	}
	for line := range strings.Lines(string(data)) {
		fields := strings.Split(strings.TrimSpace(line), ":")
		if len(fields) >= 3 && fields[0] == name {
			gid, err := strconv.Atoi(fields[2])
			if err != nil {
				return 0, false, fmt.Errorf("cannot look up the group %s: %s has %q as its number", name, path, fields[2])
			}
			return gid, true, nil
		}
	}
	return 0, false, nil
}

// RootOnly reports whether the lock cis-hardening keeps everything from the group.
func (a Access) RootOnly() bool { return a.cis }

// WriteShared replaces a file that group members may read and change.
func (a Access) WriteShared(path string, data []byte) error {
	if a.cis {
		return atomicfile.Write(path, data, 0o600, a.owner(0))
	}
	return atomicfile.Write(path, data, 0o660, a.owner(a.gid))
}

// WriteSecret replaces a file for root alone.
func (a Access) WriteSecret(path string, data []byte) error {
	return atomicfile.Write(path, data, 0o600, a.owner(0))
}

// SharedDir makes a directory, parents included, that group members may use, and corrects its
// mode and owner if it was there.
func (a Access) SharedDir(path string) error {
	mode, gid := fs.FileMode(0o770), a.gid
	if a.cis {
		mode, gid = 0o700, 0
	}
	if err := os.MkdirAll(path, 0o755); err != nil {
		return fmt.Errorf("cannot make the directory: %w", err)
	}
	if a.root {
		if err := os.Chown(path, 0, gid); err != nil {
			return fmt.Errorf("cannot give the directory its group: %w", err)
		}
	}
	if err := os.Chmod(path, mode); err != nil {
		return fmt.Errorf("cannot give the directory its mode: %w", err)
	}
	return nil
}

func (a Access) owner(gid int) *atomicfile.Owner {
	if !a.root {
		return nil
	}
	return &atomicfile.Owner{UID: 0, GID: gid}
}

// Share lets the product's group use a file or socket by the group's bits of mode. Where there is no
// such group, or this process is not root, only the mode is set.
func Share(path string, mode fs.FileMode) error {
	if os.Geteuid() == 0 {
		if g, err := user.LookupGroup(snapenv.Group); err == nil {
			gid, err := strconv.Atoi(g.Gid)
			if err == nil {
				err = os.Chown(path, -1, gid)
			}
			if err != nil {
				return fmt.Errorf("cannot share %s with the group %s: %w", path, snapenv.Group, err)
			}
		}
	}
	return os.Chmod(path, mode)
}

// OwnerOf is the owner of an existing file, for a copy or a replacement of it; nil when this
// process may not give files away.
func OwnerOf(st fs.FileInfo) *atomicfile.Owner {
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok || os.Geteuid() != 0 {
		return nil
	}
	return &atomicfile.Owner{UID: int(sys.Uid), GID: int(sys.Gid)}
}

// ShareTree gives every regular file and directory below dir the group and modes of shared
// files, keeping execute bits. A missing dir is in order; links are left alone.
func (a Access) ShareTree(dir string) error {
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !d.Type().IsRegular() && !d.IsDir() {
			return nil
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		user := st.Mode().Perm() & 0o700
		mode, gid := user|0o600|user>>3|0o060, a.gid
		if a.cis {
			mode, gid = user|0o600, 0
		}
		if a.root {
			if err := os.Lchown(path, 0, gid); err != nil {
				return err
			}
		}
		return os.Chmod(path, mode)
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot share %s with the group: %w", dir, err)
	}
	return nil
}
