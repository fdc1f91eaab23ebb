package setup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"microk8s/internal/args"
	"microk8s/internal/atomicfile"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/encryption"
	"microk8s/internal/fileaccess"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
)

// checkHost refuses machines on which nothing can work, before anything is made.
func (in *Installer) checkHost(context.Context) error {
	env, err := os.ReadFile(in.Env.HostPath("proc/1/environ"))
	inLXC := err == nil && bytes.Contains(env, []byte("container=lxc"))
	if _, err := os.Stat(in.Env.HostPath("dev/kmsg")); inLXC && errors.Is(err, fs.ErrNotExist) {
		return errors.New("/dev/kmsg is missing in this LXC container; apply the LXC profile of MicroK8s and try again")
	}
	if _, err := os.Stat(in.Env.DefaultArgs()); err != nil {
		return fmt.Errorf("the package tree is not complete: %w; install the package again", err)
	}
	return nil
}

// revision makes $SNAP_DATA where snapd did not: a directory x1 and the link current to it.
func (in *Installer) revision(context.Context) error {
	if _, err := os.Stat(in.Env.Data); err == nil {
		return nil
	}
	if filepath.Base(in.Env.Data) != "current" {
		if err := os.MkdirAll(in.Env.Data, 0o755); err != nil {
			return err
		}
		return in.changed(in.Env.Data)
	}
	revision := in.Env.Revision
	if revision == "" {
		revision = "x1"
	}
	if err := os.MkdirAll(filepath.Join(filepath.Dir(in.Env.Data), revision), 0o755); err != nil {
		return err
	}
	if err := in.changed(revision); err != nil {
		return err
	}
	if err := replaceLink(revision, in.Env.Data); err != nil {
		return err
	}
	return in.changed(in.Env.Data)
}

// replaceLink makes a link in one step, in the place of one that may be there.
func replaceLink(target, path string) error {
	temporary := path + ".new"
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(target, temporary); err != nil {
		return err
	}
	return os.Rename(temporary, path)
}

// group adds the group whose members may use the command line. The file is locked the way
// the system's own tools do it.
func (in *Installer) group(ctx context.Context) error {
	path := in.Env.HostPath("etc/group")
	if _, found, err := fileaccess.GroupID(path, snapenv.Group); err != nil || found || in.access().RootOnly() {
		return err
	}
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		in.Log.Warn("there is no /etc/group; only root can use the command line")
		return nil
	}
	unlock, err := lockAccounts(ctx, in.Env.HostPath("etc/.pwd.lock"))
	if err != nil {
		return err
	}
	defer unlock()
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	used := map[string]bool{}
	for line := range strings.Lines(string(data)) {
		fields := strings.Split(strings.TrimSpace(line), ":")
		if fields[0] == snapenv.Group {
			return nil
		}
		if len(fields) > 2 {
			used[fields[2]] = true
		}
	}
	if len(data) > 0 && data[len(data)-1] != '\n' {
		data = append(data, '\n')
	}
	gid := 999 // system groups count down from here
	for used[fmt.Sprint(gid)] {
		gid--
	}
	if gid < 100 {
		return errors.New("no free number for a system group")
	}
	data = fmt.Appendf(data, "%s:x:%d:\n", snapenv.Group, gid)
	// The shadow file first: once the group itself is there, nothing is done again.
	shadow := in.Env.HostPath("etc/gshadow")
	if data, err := os.ReadFile(shadow); err == nil && !bytes.Contains(data, []byte("\n"+snapenv.Group+":")) {
		st, err := os.Stat(shadow)
		if err != nil {
			return err
		}
		if err := atomicfile.Write(shadow, fmt.Appendf(data, "%s:!::\n", snapenv.Group), st.Mode().Perm(), fileaccess.OwnerOf(st)); err != nil {
			return err
		}
	}
	if err := in.changed(shadow); err != nil {
		return err
	}
	if err := atomicfile.Write(path, data, st.Mode().Perm(), fileaccess.OwnerOf(st)); err != nil {
		return err
	}
	return in.changed(path)
}

func (in *Installer) directories(context.Context) error {
	a := in.access()
	for _, dir := range []string{
		in.Env.ArgsDir(), in.Env.CNIConf(), in.Env.CertsDir(), in.Env.CredentialsDir(), in.Env.LocksDir(),
		filepath.Join(in.Env.Data, "tmp"), filepath.Join(in.Env.Data, "var/log"), filepath.Join(in.Env.Data, "var/tmp"),
		filepath.Join(in.Env.Common, "addons"), in.Env.PluginsDir(), filepath.Join(in.Env.Common, "hooks"),
		filepath.Join(in.Env.Common, "hooks/reconcile.d"), filepath.Join(in.Env.Common, "hooks/post-refresh.d"), filepath.Join(in.Env.Common, "hooks/remove.d"),
		filepath.Join(in.Env.Common, "etc/launcher"), in.Env.SideloadDir(),
	} {
		if err := a.SharedDir(dir); err != nil {
			return err
		}
		if err := in.changed(dir); err != nil {
			return err
		}
	}
	for _, dir := range []string{
		in.Env.CNIBin(), filepath.Join(in.Env.Data, "var/lib/calico"), filepath.Dir(in.Env.Backend()),
		in.Env.RunDir(), in.Env.KubeletRoot(), in.Env.ContainerdRoot(), filepath.Join(in.Env.Common, "var/log"),
	} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := in.changed(dir); err != nil {
			return err
		}
	}
	return nil
}

// sideload takes over the archives of images that were put beside the snap before it was
// installed (cli.md 8.1); internal/images loads them.
func (in *Installer) sideload(context.Context) error {
	for _, from := range []string{in.Env.UserCommon, in.Env.Common, in.Env.Snap} {
		for _, archive := range snapenv.SideloadArchives(filepath.Join(from, "sideload")) {
			to := filepath.Join(in.Env.SideloadDir(), filepath.Base(archive))
			if err := copyOnce(to, archive); err != nil {
				return err
			}
			if err := in.changed(to); err != nil {
				return err
			}
		}
	}
	return nil
}

// copyOnce copies a file that may be large, unless it is there.
func copyOnce(to, from string) (err error) {
	if _, err := os.Lstat(to); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	part, err := os.OpenFile(to+".part", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o640)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, part.Close()); err != nil {
			err = errors.Join(err, os.Remove(part.Name()))
		} else {
			err = os.Rename(part.Name(), to)
		}
	}()
	if _, err := io.Copy(part, src); err != nil {
		return err
	}
	return part.Sync()
}

// defaultArgs copies shipped argument files that are not there yet, and completes those of
// Kubernetes' daemons in which a person has written something before the first start. A colon cannot be in a file
// name of every build system, so the package writes two underscores for it in directories.
func (in *Installer) defaultArgs(context.Context) error {
	a, from := in.access(), in.Env.DefaultArgs()
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		to := in.Env.Args(strings.ReplaceAll(rel, "__", ":"))
		if rel == storedir.TuningFile { // belongs to the datastore's directory
			return nil
		}
		if d.IsDir() {
			return a.SharedDir(to)
		}
		there := false
		if _, err := os.Lstat(to); err == nil {
			there = true
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if there && (nodeconfig.ReadState(in.Env).Installed || args.GrammarFor(rel) != args.GrammarA) {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if rel == "kubelet" {
			if data, err = in.reserve(data); err != nil {
				return err
			}
		}
		if there {
			if data, err = withArguments(data, in.Env, rel); err != nil || data == nil {
				return err
			}
		}
		if err := a.WriteShared(to, data); err != nil {
			return err
		}
		return in.changed(to)
	})
}

// withArguments returns default arguments with those that a person has written into the file of
// this name before the first start, which count; nil where the file has them all.
func withArguments(defaults []byte, env snapenv.Env, name string) ([]byte, error) {
	own, err := nodeconfig.File(env, name)
	if err != nil {
		return nil, err
	}
	file, err := args.Parse(defaults, args.GrammarA)
	if err != nil {
		return nil, err
	}
	for _, flag := range own.Flags() {
		file.Unset(flag)
	}
	if file.Empty() {
		return nil, nil
	}
	return append(file.Bytes(), own.Bytes()...), nil
}

// setAside is for a release that kept the datastore in $SNAP_DATA: when a refresh from it was
// undone, it went on with its own directory, and the one that was moved is of the past.
func (in *Installer) setAside(context.Context) error {
	live, link := in.Env.BackendLive(), in.Env.Backend()
	if st, err := os.Lstat(link); err != nil || !st.IsDir() {
		return nil
	}
	entries, err := os.ReadDir(live)
	if err != nil || len(entries) == 0 {
		return nil
	}
	aside := live + ".undone"
	if err := os.RemoveAll(aside); err != nil {
		return err
	}
	if err := os.Rename(live, aside); err != nil {
		return err
	}
	return in.changed(aside)
}

// datastore makes the directory at its real place and the link at the documented one, with what
// a first start needs. A directory that was used before is left as it is.
func (in *Installer) datastore(context.Context) error {
	live, link := in.Env.BackendLive(), in.Env.Backend()
	st, err := os.Lstat(link)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case st.IsDir(): // as upstream has it: move it to where it stays
		entries, err := os.ReadDir(live)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if len(entries) > 0 {
			return fmt.Errorf("there are two datastores, %s and %s; move away the one that is not wanted", link, live)
		}
		if err := os.MkdirAll(filepath.Dir(live), 0o755); err != nil {
			return err
		}
		if err := os.Remove(live); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := os.Rename(link, live); err != nil {
			return err
		}
		if err := in.changed(live); err != nil {
			return err
		}
	case st.Mode()&fs.ModeSymlink == 0:
		return fmt.Errorf("%s is neither a directory nor a link; move it away", link)
	}
	a := in.access()
	if err := a.SharedDir(live); err != nil {
		return err
	}
	if err := in.changed(live); err != nil {
		return err
	}
	if target, err := os.Readlink(link); err != nil || target != live {
		if err := replaceLink(live, link); err != nil {
			return err
		}
		if err := in.changed(link); err != nil {
			return err
		}
	}
	tuning, err := os.ReadFile(filepath.Join(in.Env.DefaultArgs(), storedir.TuningFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	dir := storedir.Dir(live)
	if dir.Used() {
		return nil
	}
	first, err := storedir.Init{Address: storedir.FirstAddress}.Encode()
	if err != nil {
		return err
	}
	// The key of what will be in it. It is older than the first Secret, or there is none.
	key := filepath.Join(live, encryption.FileName)
	if _, err := os.Lstat(key); errors.Is(err, fs.ErrNotExist) {
		if err := a.WriteSecret(key, encryption.New()); err != nil {
			return err
		}
		if err := in.changed(key); err != nil {
			return err
		}
	}
	for _, f := range []struct {
		name string
		data []byte
	}{{storedir.TuningFile, tuning}, {storedir.FailureDomainFile, []byte("1\n")}, {storedir.InitFile, first}} {
		path := dir.File(f.name)
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) || len(f.data) == 0 {
			continue
		}
		if err := a.WriteShared(path, f.data); err != nil {
			return err
		}
		if err := in.changed(path); err != nil {
			return err
		}
	}
	return nil
}
