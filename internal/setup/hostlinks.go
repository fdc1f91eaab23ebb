package setup

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"microk8s/internal/atomicfile"
	"microk8s/internal/snapenv"
)

// A hostLink is a link outside the snap that other software expects (cli.md 6.2).
type hostLink struct{ path, target string }

func hostLinks(env snapenv.Env) []hostLink {
	return []hostLink{
		{env.HostPath("var/lib/kubelet"), env.KubeletRoot()},
		{env.HostPath("var/lib/calico"), filepath.Join(env.Data, "var/lib/calico")},
		{env.HostPath("etc/cni/net.d"), env.CNIConf()},
		{env.HostPath("opt/cni/bin"), env.CNIBin()},
	}
}

// current replaces a revision in a path below /var/snap or /snap by the link that outlives it.
func current(dir string) string {
	link := filepath.Join(filepath.Dir(dir), "current")
	if a, err := os.Stat(link); err == nil {
		if b, err := os.Stat(dir); err == nil && os.SameFile(a, b) {
			return link
		}
	}
	return dir
}

// hostLinks makes the links where nothing is. Directories made for them are noted first, so
// that they can be taken away.
func (in *Installer) hostLinks(context.Context) error {
	env := in.Env
	env.Data = current(env.Data)
	for _, l := range hostLinks(env) {
		if _, err := os.Lstat(l.path); !errors.Is(err, fs.ErrNotExist) {
			if err != nil {
				return err
			}
			continue
		}
		var parents []string
		for dir := filepath.Dir(l.path); ; dir = filepath.Dir(dir) {
			if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
				break
			}
			parents = append(parents, dir)
		}
		if err := in.note(func(n *hostNotes) { addMissing(&n.Dirs, parents...) }); err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Dir(l.path), 0o755); err != nil {
			return err
		}
		if err := in.changed(filepath.Dir(l.path)); err != nil {
			return err
		}
		if err := os.Symlink(l.target, l.path); err != nil {
			return err
		}
		if err := in.changed(l.path); err != nil {
			return err
		}
	}
	return nil
}

// hostTrees are directories that the node's programs, and those of other products, make on the host
// and fill. One that was not there before the node is removed with it if it is empty then.
func hostTrees(env snapenv.Env) []string {
	return []string{
		env.HostPath("var/log/pods"), env.HostPath("var/log/containers"),
		env.HostPath("var/lib/cni"), env.HostPath("run/containerd"),
	}
}

// hostNotes remembers what was not on the host before the node.
type hostNotes struct {
	Dirs  []string `json:"dirs"`  // made for links; removed when empty
	Trees []string `json:"trees"` // shared with other products; removed when empty
}

func hostNotesFile(env snapenv.Env) string { return filepath.Join(env.Common, "var/host.json") }

func readNotes(env snapenv.Env) (hostNotes, error) {
	var n hostNotes
	data, err := os.ReadFile(hostNotesFile(env))
	if errors.Is(err, fs.ErrNotExist) {
		return n, nil
	}
	if err != nil {
		return n, err
	}
	if err := json.Unmarshal(data, &n); err != nil {
		return n, fmt.Errorf("cannot read %s: %w; remove the file, and by hand what is not wanted in /etc/cni, /opt/cni and /var/log/pods", hostNotesFile(env), err)
	}
	return n, nil
}

// note adds to the notes, which are complete on disk before anything is made.
func (in *Installer) note(add func(*hostNotes)) error {
	n, err := readNotes(in.Env)
	if err != nil {
		return err
	}
	before, err := json.Marshal(n)
	if err != nil {
		return err
	}
	add(&n)
	after, err := json.Marshal(n)
	if err != nil || string(after) == string(before) {
		return err
	}
	if err := atomicfile.Write(hostNotesFile(in.Env), append(after, '\n'), 0o600, nil); err != nil {
		return err
	}
	return in.changed(hostNotesFile(in.Env))
}

func addMissing(list *[]string, paths ...string) {
	for _, p := range paths {
		if !slices.Contains(*list, p) {
			*list = append(*list, p)
		}
	}
}

// noteTrees notes which of the trees are not there yet. It runs once, before any program of
// the node does.
func (in *Installer) noteTrees(context.Context) error {
	return in.note(func(n *hostNotes) {
		for _, dir := range hostTrees(in.Env) {
			if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
				addMissing(&n.Trees, dir)
			}
		}
	})
}

// cniPlugins links the shipped plugins into the directory that containerd looks in. Plugins
// that a user's own CNI put there stay.
func (in *Installer) cniPlugins(context.Context) error {
	snap := in.Env
	snap.Snap = current(in.Env.Snap)
	plugins, err := os.ReadDir(snap.ShippedCNIBin())
	if errors.Is(err, fs.ErrNotExist) {
		in.Log.Warn("the package has no CNI plugins; pods will get no network", "path", snap.ShippedCNIBin())
		return nil
	}
	if err != nil {
		return err
	}
	if err := os.MkdirAll(in.Env.CNIBin(), 0o755); err != nil {
		return err
	}
	for _, p := range plugins {
		path, target := filepath.Join(in.Env.CNIBin(), p.Name()), filepath.Join(snap.ShippedCNIBin(), p.Name())
		st, err := os.Lstat(path)
		if err == nil && st.Mode()&fs.ModeSymlink == 0 {
			continue
		}
		if old, err := os.Readlink(path); err == nil && old == target {
			continue
		}
		if err := replaceLink(target, path); err != nil {
			return err
		}
		if err := in.changed(path); err != nil {
			return err
		}
	}
	return nil
}

// helmForHooks links helm to where hooks of addons look for it. What somebody else put there stays.
func (in *Installer) helmForHooks(context.Context) error {
	path, target := in.Env.HelmForHooks(), filepath.Join(current(in.Env.Snap), "bin/helm")
	if st, err := os.Lstat(path); err == nil && st.Mode()&fs.ModeSymlink == 0 {
		return nil
	}
	if old, err := os.Readlink(path); err == nil && old == target {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := replaceLink(target, path); err != nil {
		return err
	}
	return in.changed(path)
}

// lockAccounts takes the lock under which the system's tools change /etc/group, waiting up to
// 15 s as they do.
func lockAccounts(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot lock the list of groups: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
		if err == nil {
			return func() { f.Close() }, nil // closing gives the lock up
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) {
			return nil, errors.Join(fmt.Errorf("cannot lock the list of groups: %w", err), f.Close())
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("cannot lock the list of groups, another program changes it: %w", ctx.Err()), f.Close())
		case <-tick.C:
		}
	}
}
