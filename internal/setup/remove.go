package setup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"microk8s/internal/hostprobe"
	"microk8s/internal/snapenv"
)

// Remove takes away what the node put on the host outside its own data: mounts, links and the
// directories made for them, settings files, network interfaces and namespaces of pods. The group
// stays, since users were added to it. Services and containers must have been stopped before.
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
		in.Links = func() error { return errors.Join(removeInterfaces(), removeNamespaces(in.Env, in.Unmount)) }
	}
	var errs []error
	for _, s := range []step{
		{"unmount what pods had mounted", in.unmountAll},
		{"remove the pods' cgroups", in.removeCgroups},
		{"remove the pods' interfaces", func(context.Context) error { return in.Links() }},
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

// removeDirs removes the directories that came with the node: those that its programs filled,
// and those made for links if they hold nothing else now.
func (in *Installer) removeDirs(context.Context) error {
	notes, err := readNotes(in.Env)
	if err != nil {
		return err
	}
	host := hostprobe.Probe(in.Env.Host)
	var errs []error
	for _, dir := range notes.Trees {
		if !slices.Contains(hostTrees(in.Env), dir) { // never anything but what is known here
			errs = append(errs, fmt.Errorf("%s names %s, which is left alone", hostNotesFile(in.Env), dir))
			continue
		}
		if points := host.MountsBelow(dir); len(points) > 0 {
			errs = append(errs, fmt.Errorf("%s is left alone: something is mounted at %s", dir, points[0]))
			continue
		}
		errs = append(errs, os.RemoveAll(dir))
	}
	slices.SortFunc(notes.Dirs, func(a, b string) int { return len(b) - len(a) })
	for _, d := range notes.Dirs {
		if err := os.Remove(d); err != nil && !errors.Is(err, fs.ErrNotExist) {
			in.Log.Info("a directory stays, because others use it", "path", d)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := os.Remove(hostNotesFile(in.Env)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// podInterface says whether an interface is one of a pod network, ours or one that users
// commonly put in its place.
func podInterface(name string) bool {
	switch name {
	case "cni0", "flannel.1", "flannel-v6.1", "vxlan.calico", "vxlan-v6.calico", "cilium_vxlan", "cilium_host", "cilium_net":
		return true
	}
	return strings.HasPrefix(name, "cali")
}

func removeInterfaces() error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("cannot list interfaces: %w", err)
	}
	var errs []error
	for _, l := range links {
		if !podInterface(l.Attrs().Name) {
			continue
		}
		if err := netlink.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("cannot remove the interface %s: %w", l.Attrs().Name, err))
		}
	}
	return errors.Join(errs...)
}

// removeNamespaces removes the network namespaces that containerd makes for pods.
func removeNamespaces(env snapenv.Env, unmount func(string) error) error {
	dir := env.HostPath("run/netns")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil // no namespace was ever made
	}
	var errs []error
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), "cni-") {
			continue
		}
		path := filepath.Join(dir, e.Name())
		if err := unmount(path); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("cannot unmount %s: %w", path, err))
			continue
		}
		errs = append(errs, os.Remove(path))
	}
	return errors.Join(errs...)
}
