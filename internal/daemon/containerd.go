package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"microk8s/internal/atomicfile"
)

func (p *Preparer) containerd(_ context.Context, _ *Command) error {
	if err := p.clearStaleState(); err != nil {
		return err
	}
	for _, dir := range []string{p.Env.ContainerdRoot(), p.Env.ContainerdState(), p.Env.CNIBin(), p.Env.CNIConf()} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return fmt.Errorf("cannot start containerd: %w", err)
		}
	}
	return p.renderConfig()
}

// renderConfig writes containerd.toml from the template, which a user may have edited.
func (p *Preparer) renderConfig() error {
	path := p.Env.Args("containerd-template.toml")
	template, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot configure containerd: %s does not exist; copy it from %s", path, p.Env.DefaultArgs())
	}
	if err != nil {
		return fmt.Errorf("cannot configure containerd: %w", err)
	}
	if len(strings.TrimSpace(string(template))) == 0 || strings.ContainsRune(string(template), 0) {
		return fmt.Errorf("cannot configure containerd: %s is empty or damaged; copy it from %s", path, p.Env.DefaultArgs())
	}
	host := p.host()
	text := strings.NewReplacer(
		"${SNAP}", current(p.Env.Snap),
		"${SNAP_DATA}", current(p.Env.Data),
		"${SNAP_COMMON}", p.Env.Common,
		"${SNAPSHOTTER}", host.Snapshotter(p.Env.ContainerdRoot()),
		"${RUNTIME}", "runc",
		"${RUNTIME_TYPE}", "io.containerd.runc.v2",
		"${RESTRICT_OOM_SCORE_ADJ}", strconv.FormatBool(host.RestrictOOMScoreAdj()),
	).Replace(string(template))
	return atomicfile.Write(p.Env.Args("containerd.toml"), []byte(text), 0o600, nil)
}

// clearStaleState removes containerd's volatile directory when it is of an earlier boot: its
// sockets and processes do not exist any more.
func (p *Preparer) clearStaleState() error {
	marker := filepath.Join(p.Env.Common, "var/last-boot")
	now := p.bootIdentity()
	if last, err := os.ReadFile(marker); err == nil && string(last) == now {
		return nil
	}
	if err := p.unmountBelow(p.Env.ContainerdState()); err != nil {
		return fmt.Errorf("cannot clear what containerd left behind before the last boot: %w", err)
	}
	if err := os.RemoveAll(p.Env.ContainerdState()); err != nil {
		return fmt.Errorf("cannot clear what containerd left behind before the last boot: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(marker), 0o755); err != nil {
		return fmt.Errorf("cannot note the boot: %w", err)
	}
	return atomicfile.Write(marker, []byte(now), 0o600, nil)
}

// bootIdentity differs between boots, also between those of a machine made of namespaces, which
// shares the kernel and its boot_id with others: the first process is another one then.
func (p *Preparer) bootIdentity() string {
	parts := []string{p.host().BootID}
	if stat, err := os.ReadFile(p.Env.HostPath("proc/1/stat")); err == nil {
		// Field 22 is the start time; field 2, in parentheses, may hold blanks.
		text := string(stat)
		if fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:]); len(fields) > 19 {
			parts = append(parts, fields[19])
		}
	}
	if ns, err := os.Readlink(p.Env.HostPath("proc/1/ns/pid")); err == nil {
		parts = append(parts, ns)
	}
	return strings.Join(parts, " ") + "\n"
}

// unmountBelow takes every mount below dir away, the innermost first, so that nothing behind
// it is deleted with dir.
func (p *Preparer) unmountBelow(dir string) error {
	points := p.host().MountsBelow(dir)
	slices.Reverse(points)
	var errs []error
	for _, point := range points {
		if err := p.Unmount(point); err != nil {
			errs = append(errs, fmt.Errorf("cannot unmount %s: %w", point, err))
		}
	}
	return errors.Join(errs...)
}
