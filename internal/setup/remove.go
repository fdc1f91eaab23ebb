package setup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"microk8s/internal/hostprobe"
	"microk8s/internal/snapenv"
)

// Remove takes away what the node put on the host outside its own data: mounts, links and the
// directories made for them, settings files, logs of pods, and the rest of its containers. What is not
// known to be the node's stays, and is logged (owned.go). The group stays, since users were added to
// it. Services and containers must have been stopped before, and the node's own data must still be
// there: it says what is the node's.
//
// Each step is tried whatever became of the others; the errors come back together. It may be
// run again.
func Remove(ctx context.Context, env snapenv.Env, log *slog.Logger) error {
	return (&Installer{Env: env, Log: log}).Remove(ctx)
}

// Remove is [Remove] with the fields of in.
func (in *Installer) Remove(ctx context.Context) error {
	if in.Log == nil {
		in.Log = slog.New(slog.DiscardHandler)
	}
	if in.Unmount == nil {
		in.Unmount = func(target string) error { return unix.Unmount(target, unix.MNT_DETACH) }
	}
	if in.Links == nil {
		in.Links = in.removeInterfaces
	}
	var errs []error
	for _, s := range []step{
		{"unmount what pods had mounted", in.unmountAll},
		{"remove the pods' cgroups", in.removeCgroups},
		{"remove the interfaces of a pod network of the user's", func(context.Context) error { return in.Links() }},
		{"remove the links on the host", in.removeLinks},
		{"remove settings files", in.removeSettings},
		{"remove directories that came with the node", in.removeDirs},
	} {
		if err := ctx.Err(); err != nil {
			errs = append(errs, fmt.Errorf("cannot %s: %w", s.name, err))
			break
		}
		if err := s.do(ctx); err != nil {
			errs = append(errs, fmt.Errorf("cannot %s: %w", s.name, err))
		}
	}
	in.Log.Info("the group stays, because users were added to it; remove it with: groupdel "+snapenv.Group, "group", snapenv.Group)
	return errors.Join(errs...)
}

func (in *Installer) unmountAll(context.Context) error {
	host := hostprobe.Probe(in.Env.Host)
	var errs []error
	for _, dir := range []string{in.Env.KubeletRoot(), in.Env.ContainerdState(), in.Env.ContainerdRoot(), in.Env.RunDir()} {
		points := host.MountsBelow(dir)
		for _, point := range slices.Backward(points) { // the innermost first
			if err := in.Unmount(point); err != nil && !errors.Is(err, unix.EINVAL) {
				errs = append(errs, fmt.Errorf("cannot unmount %s: %w", point, err))
			}
		}
	}
	return errors.Join(errs...)
}

// removeLinks removes links that lead to this node's data, and no others.
func (in *Installer) removeLinks(context.Context) error {
	byCurrent := in.Env
	byCurrent.Data = current(in.Env.Data)
	var errs []error
	for i, l := range hostLinks(in.Env) {
		target, err := os.Readlink(l.path)
		if err != nil || target != l.target && target != hostLinks(byCurrent)[i].target {
			continue
		}
		errs = append(errs, os.Remove(l.path))
	}
	return errors.Join(errs...)
}

// settingsFiles are those that the product, or an earlier one at its place, put on the host.
var settingsFiles = []string{
	"etc/sysctl.d/10-microk8s.conf",
	"etc/systemd/system/snap.microk8s.daemon-kubelite.service.d/delegate.conf",
}

func (in *Installer) removeSettings(context.Context) error {
	var errs []error
	for _, f := range settingsFiles {
		if err := os.Remove(in.Env.HostPath(f)); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// removeDirs removes what the node has in directories that other products use too, and directories made
// for links if they hold nothing else now.
func (in *Installer) removeDirs(context.Context) error {
	notes, err := readNotes(in.Env)
	if err != nil {
		return err
	}
	err = in.removeOwned(notes.Trees)
	slices.SortFunc(notes.Dirs, func(a, b string) int { return len(b) - len(a) })
	for _, d := range notes.Dirs {
		if err := os.Remove(d); err != nil && !errors.Is(err, fs.ErrNotExist) {
			in.Log.Info("keeping a directory that others use", "path", d)
		}
	}
	if err != nil {
		return err
	}
	if err := os.Remove(hostNotesFile(in.Env)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func errMounted(dir, point string) error {
	return fmt.Errorf("%s is left alone: something is mounted at %s", dir, point)
}
