package lab

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"
)

// systemDirs are the machine's programs, shown to hosts read-only; symbolic links among them
// are copied.
var systemDirs = []string{"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"}

// etcEntries is what a host's /etc takes over from the machine: what programs need to run, and
// neither its identity nor its secrets.
var etcEntries = strings.Fields("alternatives bash.bashrc bash_completion.d bindresvport.blacklist ca-certificates " +
	"ca-certificates.conf debian_version default e2scrub.conf ethertypes gai.conf host.conf inputrc iproute2 " +
	"ld.so.cache ld.so.conf ld.so.conf.d locale.alias localtime login.defs lsb-release magic mime.types mke2fs.conf " +
	"netconfig networks nsswitch.conf os-release pam.conf pam.d profile profile.d protocols rpc security services " +
	"shells skel ssl/certs ssl/openssl.cnf terminfo timezone vim xattr.conf")

// prepareRoot makes the host's file system, once in its life.
func (l *Lab) prepareRoot(h *host) error {
	root := l.rootDir(h.Name)
	if !h.Prepared {
		if err := os.RemoveAll(root); err != nil { // of an interrupted attempt
			return fmt.Errorf("cannot remove %s: %w", root, err)
		}
		if err := makeRoot(root, h.Name, l.addr(h).String()); err != nil {
			return fmt.Errorf("cannot make the file system: %w", err)
		}
		h.Prepared = true
		if err := l.save(h); err != nil {
			return err
		}
	}
	if h.Snap == "" {
		return nil
	}
	if st, err := os.Stat(h.Snap); err != nil || !st.IsDir() {
		return fmt.Errorf("there is no product in %s: run make build, or name its directory with --snap", h.Snap)
	}
	return linkCommands(h.Snap, filepath.Join(root, "snap/bin"))
}

func makeRoot(root, name, address string) error {
	for _, d := range []struct {
		path string
		mode os.FileMode
	}{
		{"", 0o755}, {"dev", 0o755}, {"etc", 0o755}, {"etc/ssl", 0o755}, {"home", 0o755}, {"media", 0o755}, {"mnt", 0o755}, {"opt", 0o755},
		{"proc", 0o555}, {"root", 0o700}, {"run", 0o755}, {"snap/bin", 0o755}, {"snap/microk8s/current", 0o755},
		{"srv", 0o755}, {"sys", 0o555}, {"tmp", 0o1777}, {"var/backups", 0o755}, {"var/cache", 0o755}, {"var/lib", 0o755},
		{"var/log", 0o755}, {"var/spool", 0o755}, {"var/tmp", 0o1777},
		{"var/snap/microk8s/x1", 0o755}, {"var/snap/microk8s/common", 0o755},
		{"etc/sysctl.d", 0o755}, {"etc/profile.d", 0o755},
	} {
		path := filepath.Join(root, d.path)
		if err := os.MkdirAll(path, 0o755); err != nil {
			return err
		}
		mode := d.mode.Perm()
		if d.mode&0o1000 != 0 {
			mode |= os.ModeSticky
		}
		if err := os.Chmod(path, mode); err != nil {
			return err
		}
	}
	for link, target := range map[string]string{
		"var/run": "/run", "var/lock": "/run/lock", "etc/mtab": "../proc/self/mounts",
		"var/snap/microk8s/current": "x1",
	} {
		if err := os.Symlink(target, filepath.Join(root, link)); err != nil {
			return err
		}
	}
	for _, dir := range systemDirs {
		st, err := os.Lstat(dir)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return err
		case st.Mode()&fs.ModeSymlink != 0:
			err = copyLink(dir, filepath.Join(root, dir))
		default:
			err = os.MkdirAll(filepath.Join(root, dir), 0o755)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for _, e := range etcEntries {
		if err := copyTree(filepath.Join("/etc", e), filepath.Join(root, "etc", e)); err != nil {
			return err
		}
	}
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return err
	}
	for _, f := range []struct {
		path, text string
		mode       os.FileMode
	}{
		{"etc/hostname", name + "\n", 0o644},
		{"etc/hosts", "127.0.0.1 localhost\n::1 localhost ip6-localhost\n" + address + " " + name + "\n", 0o644},
		{"etc/resolv.conf", "# this host reaches no name server\n", 0o644},
		{"etc/machine-id", hex.EncodeToString(id) + "\n", 0o444},
		{"etc/passwd", "root:x:0:0:root:/root:/bin/bash\ndaemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n" +
			"nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n", 0o644},
		{"etc/group", "root:x:0:\ndaemon:x:1:\ntty:x:5:\ndisk:x:6:\nsudo:x:27:\nshadow:x:42:\nusers:x:100:\nnogroup:x:65534:\n", 0o644},
		{"etc/shadow", "root:*:19000:0:99999:7:::\nnobody:*:19000:0:99999:7:::\n", 0o640},
		{"etc/gshadow", "root:*::\nsudo:*::\nshadow:*::\nusers:*::\nnogroup:*::\n", 0o640},
		{"etc/fstab", "", 0o644},
		{"etc/environment", "PATH=\"" + Path + "\"\n", 0o644},
		{"etc/profile.d/apps-bin-path.sh", "PATH=\"" + Path + "\"\n", 0o644},
	} {
		if err := os.WriteFile(filepath.Join(root, f.path), []byte(f.text), f.mode); err != nil {
			return err
		}
	}
	return nil
}

// copyTree copies files, directories and symbolic links with their modes; what is missing at
// the source is left out, as are other kinds of files.
func copyTree(source, target string) error {
	st, err := os.Lstat(source)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	switch {
	case st.Mode()&fs.ModeSymlink != 0:
		return copyLink(source, target)
	case st.IsDir():
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		entries, err := os.ReadDir(source)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if err := copyTree(filepath.Join(source, e.Name()), filepath.Join(target, e.Name())); err != nil {
				return err
			}
		}
		return os.Chmod(target, st.Mode().Perm())
	case st.Mode().IsRegular():
		data, err := os.ReadFile(source)
		if err != nil {
			return err
		}
		if err := os.WriteFile(target, data, 0o600); err != nil {
			return err
		}
		return os.Chmod(target, st.Mode().Perm())
	}
	return nil
}

func copyLink(source, target string) error {
	to, err := os.Readlink(source)
	if err != nil {
		return err
	}
	return os.Symlink(to, target)
}

// linkCommands makes the commands that snapd would put into /snap/bin.
func linkCommands(snap, dir string) error {
	apps := SnapApps
	if data, err := os.ReadFile(filepath.Join(snap, "meta/snap.yaml")); err == nil {
		var meta struct {
			Apps map[string]struct {
				Daemon string `json:"daemon"`
			} `json:"apps"`
		}
		if err := yaml.Unmarshal(data, &meta); err != nil {
			return fmt.Errorf("cannot read %s/meta/snap.yaml: %w", snap, err)
		}
		apps = nil
		for name, app := range meta.Apps {
			if app.Daemon == "" && name != "microk8s" {
				apps = append(apps, name)
			}
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("cannot make %s: %w", dir, err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("cannot make %s: %w", dir, err)
	}
	names := []string{"microk8s"}
	for _, app := range apps {
		names = append(names, "microk8s."+app)
	}
	for _, name := range names {
		if err := os.Symlink("/snap/microk8s/current/bin/microk8s", filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("cannot make /snap/bin/%s: %w", name, err)
		}
	}
	return nil
}

// unmountBelow takes off every mount that this mount namespace has below dir.
func unmountBelow(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return fmt.Errorf("cannot read the mounts below %s: %w", dir, err)
	}
	for i := len(mounts) - 1; i >= 0; i-- {
		if err := unix.Unmount(mounts[i].Mountpoint, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("cannot unmount %s: %w", mounts[i].Mountpoint, err)
		}
	}
	if mounts, err = mountinfo.GetMounts(mountinfo.PrefixFilter(dir)); err != nil || len(mounts) > 0 {
		return fmt.Errorf("cannot remove %s: something is mounted in it", dir)
	}
	return nil
}
