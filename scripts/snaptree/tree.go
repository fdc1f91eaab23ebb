package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"microk8s/internal/atomicfile"
	"microk8s/scripts/catalog"
)

// tree collects what belongs into the snap, path in the snap by path, then writes it.
type tree struct {
	files   map[string]file // by path relative to the snap's root
	changed int
}

type file struct {
	source string // file to copy, or ""
	data   []byte // content, when there is no source
	link   string // target of a symbolic link, or ""
	mode   fs.FileMode
}

func (t *tree) add(dst, src string, mode fs.FileMode) { t.files[dst] = file{source: src, mode: mode} }

// addDir takes every regular file below src; what is executable for its owner stays so.
func (t *tree) addDir(dst, src string) error {
	return filepath.WalkDir(src, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, path)
		if err != nil {
			return err
		}
		mode := fs.FileMode(0o644)
		if info.Mode()&0o100 != 0 {
			mode = 0o755
		}
		t.add(filepath.Join(dst, rel), path, mode)
		return nil
	})
}

// Assemble writes the tree of the snap for arch below out from the repository at root and
// says how many files it wrote or removed. With built it leaves out components that are not built
// yet and that a node is Ready without.
func Assemble(root, out, arch string, built bool) (changed int, err error) {
	t := &tree{files: map[string]file{}}
	in := func(p string) string { return filepath.Join(root, p) }

	for _, p := range catalog.Programs {
		t.add("bin/"+p, in("build/bin/"+p), 0o755)
	}
	for _, c := range catalog.At(catalog.Snap) {
		programs, err := c.Binaries(root)
		if err != nil {
			return 0, err
		}
		for _, p := range programs {
			if _, err := os.Stat(in(filepath.Join("build/components/bin", c.Subfolder(), p))); built && c.Later && errors.Is(err, fs.ErrNotExist) {
				continue
			}
			t.add(filepath.Join(c.Dir, p), in(filepath.Join("build/components/bin", c.Subfolder(), p)), 0o755)
		}
		for name := range c.Objects {
			t.add(filepath.Join("manifests", name), in(filepath.Join("build/components/manifests", name)), 0o644)
		}
	}
	t.add("bin/nft", in("build/components/nft/bin/nft"), 0o755)
	t.files["bin/dqlite"] = file{link: "k8s-dqlite"}
	// In the search path of plugins of kubectl and helm, which call it by name.
	t.files["bin/kubectl"] = file{link: "kubelite"}
	for _, l := range []string{"kubectl", "kubelite"} {
		t.files[l] = file{link: "bin/kubelite"}
	}
	for dst, src := range map[string]string{
		"images":     "build/images",
		"manifests":  "snap/manifests",
		"addons":     "addons",
		"meta/hooks": "snap/hooks",
		"lib/nft":    "build/components/nft/lib/nft",
		"":           "snap/local",
	} {
		if err := t.addDir(dst, in(src)); err != nil {
			return 0, err
		}
	}
	if err := t.addHostPrograms(); err != nil {
		return 0, err
	}
	if err := t.addCompletions(root, built); err != nil {
		return 0, err
	}
	craft, err := os.ReadFile(in("snapcraft.yaml"))
	if err != nil {
		return 0, err
	}
	if err := Check(root, arch); err != nil {
		return 0, fmt.Errorf("snapcraft.yaml: %w", err)
	}
	meta, err := SnapYAML(craft, arch)
	if err != nil {
		return 0, fmt.Errorf("snapcraft.yaml: %w", err)
	}
	if err := CheckTree(meta, t.executables()); err != nil {
		return 0, fmt.Errorf("snapcraft.yaml: %w", err)
	}
	t.files["meta/snap.yaml"] = file{data: meta, mode: 0o644}
	bom, err := BOM(root)
	if err != nil {
		return 0, err
	}
	t.files["bom.json"] = file{data: bom, mode: 0o644}
	if err := t.write(out); err != nil {
		return 0, err
	}
	return t.changed, nil
}

// hostPrograms are programs that upstream carries in its snap, by their folder on the machine. Hooks of addon
// repositories call them by their paths in $SNAP; here these are links to the machine's own. A link to a
// program that the machine does not have leads nowhere, and is passed over in searches of a PATH.
var hostPrograms = map[string]string{
	"/usr/bin": `
		arch awk base64 basename bash bc bunzip2 bzip2 cat chgrp chmod chown cksum cmp comm cp curl cut date dd df diff dig
		dirname du egrep env expand expr false fgrep file find findmnt flock fold gawk getent getopt git grep gunzip gzip head
		hostname hostnamectl iconv id install ip journalctl jq kill less link ln ls lsblk lsof md5sum mkdir mkfifo mknod mktemp
		mountpoint mv nc netstat nproc nsenter numfmt od openssl paste patch pgrep pidof ping pkill printenv printf ps pwd
		readlink realpath rm rmdir sed seq sh sha1sum sha256sum sha512sum shuf sleep socat sort split ss stat stdbuf sudo sync
		systemctl tac tail tar tee test timeout touch tr true tsort tty uname uniq unlink unzip wc wget which whoami xargs xz
		yes zcat`,
	"/usr/sbin": `
		bridge chroot conntrack ethtool ip6tables ip6tables-restore ip6tables-save ipset iptables iptables-restore
		iptables-save losetup lsmod modprobe sysctl tc update-ca-certificates`,
}

// addHostPrograms links the names of hostPrograms, in each folder in which upstream may have them.
func (t *tree) addHostPrograms() error {
	for folder, names := range hostPrograms {
		for name := range strings.FieldsSeq(names) {
			for _, dir := range []string{"bin", "sbin", "usr/bin", "usr/sbin"} {
				path := filepath.Join(dir, name)
				if _, ok := t.files[path]; ok {
					return fmt.Errorf("%s is the product's own, and cannot be the machine's", path)
				}
				t.files[path] = file{link: filepath.Join(folder, name)}
			}
		}
	}
	return nil
}

// addCompletions makes the scripts that complete command lines in bash, those of kubectl and
// helm for the names under which the snap has them.
func (t *tree) addCompletions(root string, built bool) error {
	for _, c := range []struct {
		file, program string
		argv          []string
		extra         string
	}{
		{"completion.bash", "build/bin/microk8s", []string{"microk8s", "completion", "bash"}, ""},
		{"completion-kubectl.bash", "build/bin/kubelite", []string{"kubectl", "completion", "bash"}, "complete -o default -F __start_kubectl microk8s.kubectl\n"},
		{"completion-helm.bash", "build/components/bin/helm", []string{"helm", "completion", "bash"}, "complete -o default -F __start_helm microk8s.helm microk8s.helm3\n"},
	} {
		var errOut bytes.Buffer
		cmd := exec.Cmd{Path: filepath.Join(root, c.program), Args: c.argv, Stderr: &errOut}
		script, err := cmd.Output()
		if built && c.program == "build/components/bin/helm" && errors.Is(err, fs.ErrNotExist) {
			script, err = nil, nil // an empty script completes nothing
		}
		if err != nil {
			return fmt.Errorf("cannot make %s: %w: %s", c.file, err, &errOut)
		}
		t.files[c.file] = file{data: append(script, c.extra...), mode: 0o644}
	}
	return nil
}

// executables tells of every file of the tree, by its path, whether it can be executed.
func (t *tree) executables() map[string]bool {
	out := map[string]bool{}
	for path, f := range t.files {
		target := f
		if f.link != "" {
			target = t.files[filepath.Join(filepath.Dir(path), f.link)]
		}
		out[path] = target.mode&0o111 != 0
	}
	return out
}

func (t *tree) write(out string) error {
	for rel, f := range t.files {
		dst := filepath.Join(out, rel)
		if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
			return err
		}
		if err := t.put(dst, f); err != nil {
			return err
		}
	}
	return t.prune(out)
}

func (t *tree) put(dst string, f file) error {
	if f.link != "" {
		if old, err := os.Readlink(dst); err == nil && old == f.link {
			return nil
		}
		t.changed++
		return errors.Join(os.RemoveAll(dst), os.Symlink(f.link, dst))
	}
	if f.source != "" {
		if same(dst, f.source, f.mode) {
			return nil
		}
		data, err := os.ReadFile(f.source)
		if err != nil {
			return err
		}
		f.data = data
	}
	if old, err := os.ReadFile(dst); err == nil && bytes.Equal(old, f.data) {
		return os.Chmod(dst, f.mode)
	}
	t.changed++
	return atomicfile.Write(dst, f.data, f.mode, nil)
}

// same says that dst is at least as new as src and of its size: enough to leave 200 MB unread.
func same(dst, src string, mode fs.FileMode) bool {
	d, err := os.Lstat(dst)
	if err != nil || d.Mode() != mode {
		return false
	}
	s, err := os.Stat(src)
	return err == nil && d.Size() == s.Size() && d.ModTime().After(s.ModTime())
}

// prune removes files that the tree does not have, and directories that became empty.
func (t *tree) prune(out string) error {
	var dirs []string
	err := filepath.WalkDir(out, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			dirs = append(dirs, path)
			return nil
		}
		rel, err := filepath.Rel(out, path)
		if err != nil {
			return err
		}
		if _, ok := t.files[rel]; ok {
			return nil
		}
		t.changed++
		return os.Remove(path)
	})
	for i := len(dirs) - 1; i >= 0; i-- {
		if !strings.EqualFold(dirs[i], out) {
			_ = os.Remove(dirs[i]) // fails where something is left, which is then wanted
		}
	}
	return err
}
