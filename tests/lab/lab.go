// Package lab runs many hosts on one Linux machine, each in namespaces of its own with the
// product installed at its real paths, so that tests, newcomers and people who reproduce a
// problem get real nodes without virtual machines, docker or the internet.
//
// A host is an init process (PID 1 of its PID namespace) with its own network, mount, UTS, IPC
// and cgroup namespaces, and a directory that is its disk. Hosts of one lab share a switch: a
// bridge in one more network namespace, so that nothing appears in the machine's own network.
// Hosts can be killed (power loss), started again, frozen, cut off from each other, and given a
// small disk.
//
// What is known about a lab lies in its state directory, and every name outside of it (cgroups)
// is derived from the instance name, so that [Lab.Down] finds all of it again after a crash of
// the lab or a reboot of the machine.
//
// The package knows nothing about Kubernetes; package labtest adds what tests of nodes need, and
// package labcli is the command line. It needs root. A program that imports this package is
// re-executed as the init process of the hosts it starts.
package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Defaults of [Config].
const (
	DefaultInstance = "lab"
	DefaultStateDir = "/var/lib/microk8s-lab"
)

// Config says which lab. The zero value is the default lab without a product tree.
type Config struct {
	// Instance keeps labs on one machine apart: lower-case letters, digits and hyphens, at
	// most 32. Empty means [DefaultInstance].
	Instance string
	// StateDir holds the hosts' disks, below a folder per instance. It should lie on a file
	// system that overlayfs accepts as an upper layer (ext4, xfs, btrfs). Empty means
	// [DefaultStateDir].
	StateDir string
	// Snap is the built product tree that hosts see read-only at /snap/microk8s/current.
	// Empty leaves that directory empty. A host keeps the tree that [Lab.Up] gave it.
	Snap string
	// Log receives what the lab does; nil discards it.
	Log *slog.Logger
}

// Lab is one instance: its hosts and their switch. It holds no state in memory, so several
// values, also in several processes, may work on the same instance; changes are serialised by a
// file lock. Methods may be called concurrently.
type Lab struct {
	instance string
	stateDir string
	snap     string
	log      *slog.Logger
}

// Errors a caller may want to tell apart.
var (
	ErrNoHost     = errors.New("no such host")
	ErrNotRunning = errors.New("host is switched off")
	ErrPaused     = errors.New("host is paused")
)

var (
	validHost     = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	validInstance = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$`)
)

// New returns the lab that cfg names. It creates nothing.
func New(cfg Config) (*Lab, error) {
	l := &Lab{instance: cfg.Instance, stateDir: cfg.StateDir, snap: cfg.Snap, log: cfg.Log}
	if l.instance == "" {
		l.instance = DefaultInstance
	}
	if !validInstance.MatchString(l.instance) {
		return nil, fmt.Errorf("cannot use %q as the name of a lab: only a-z, 0-9 and hyphens, at most 32", cfg.Instance)
	}
	if l.stateDir == "" {
		l.stateDir = DefaultStateDir
	}
	var err error
	if l.stateDir, err = filepath.Abs(l.stateDir); err != nil {
		return nil, fmt.Errorf("cannot use state directory %s: %w", cfg.StateDir, err)
	}
	if l.snap != "" {
		if l.snap, err = filepath.Abs(l.snap); err != nil {
			return nil, fmt.Errorf("cannot use product tree %s: %w", cfg.Snap, err)
		}
	}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	return l, nil
}

// Instance is the name of this lab.
func (l *Lab) Instance() string { return l.instance }

// Options of a new host; they are ignored for one that exists.
type Options struct {
	// DefaultRoute adds a default route to the host on its only link. Nobody answers there, so
	// the host still has no way out, but connections to addresses that netfilter translates
	// (cluster IPs) find a route, as on a machine with a network connection.
	DefaultRoute bool
	// IPv6 is which addresses the host has.
	IPv6 IPv6
}

// IPv6 is which addresses a host has on the switch.
type IPv6 string

// The kinds of hosts. Addresses of IPv6 are unique local ones (RFC 4193).
const (
	NoIPv6   IPv6 = ""
	DualIPv6 IPv6 = "dual" // both
	OnlyIPv6 IPv6 = "only"
)

// Set implements [pflag.Value].
func (v *IPv6) Set(text string) error {
	switch kind := IPv6(text); kind {
	case DualIPv6, OnlyIPv6:
		*v = kind
		return nil
	}
	return errors.New("it is dual or only")
}

// String implements [pflag.Value].
func (v *IPv6) String() string { return string(*v) }

// Type implements [pflag.Value].
func (v *IPv6) Type() string { return "dual|only" }

// State of a host.
type State string

// States of a host.
const (
	Running State = "running"
	Paused  State = "paused"
	Off     State = "off"
)

// Info describes one host.
type Info struct {
	Name     string   `json:"name"`
	Address  string   `json:"address"`
	Address6 string   `json:"address6,omitempty"` // that of IPv6, where the host has both or only it
	State    State    `json:"state"`
	PID      int      `json:"pid,omitempty"`  // of its init process, as the machine sees it
	Disk     int64    `json:"disk,omitempty"` // size limit of /var/snap in bytes; 0 is none
	Cut      []string `json:"cut,omitempty"`  // hosts it cannot reach; "*" is all others
	Root     string   `json:"root"`           // its file system as the machine sees it
}

// Up creates the host if it does not exist and switches it on if it is off. It returns when the
// host is running; it does not start the product unless the product was started in this host
// before (see [Lab.Start]).
func (l *Lab) Up(ctx context.Context, name string, opt Options) error {
	if !validHost.MatchString(name) {
		return fmt.Errorf("cannot create host %q: a host name has only a-z, 0-9 and inner hyphens, at most 63", name)
	}
	return l.locked(ctx, func() error {
		h, err := l.load(name)
		if errors.Is(err, ErrNoHost) {
			h, err = l.create(name, opt)
		}
		if err != nil {
			return err
		}
		if l.snap != "" && l.snap != h.Snap {
			if h.up() {
				return fmt.Errorf("cannot give %s the product in %s: it runs with %q; switch it off first with lab kill %s", name, l.snap, h.Snap, name)
			}
			h.Snap = l.snap
			if err := l.save(h); err != nil {
				return err
			}
		}
		return l.boot(ctx, h)
	})
}

// Start switches a host on that was killed. Its address and disk are the old ones; if the
// product was started in it before (and not stopped), its supervisor is started, as a
// distribution's boot would. It returns when the host is running.
func (l *Lab) Start(ctx context.Context, name string) error {
	return l.locked(ctx, func() error {
		h, err := l.load(name)
		if err != nil {
			return err
		}
		return l.boot(ctx, h)
	})
}

// Kill switches a host off like a power loss: all its processes die and its network vanishes;
// the disk stays. Killing a host that is off does nothing.
func (l *Lab) Kill(ctx context.Context, name string) error {
	return l.locked(ctx, func() error {
		h, err := l.load(name)
		if err != nil {
			return err
		}
		return l.powerOff(ctx, h)
	})
}

// Down removes the hosts named, or the whole lab if none is: processes, network, cgroups, disks.
// It also removes what a crash of the lab left behind.
func (l *Lab) Down(ctx context.Context, names ...string) error {
	return l.locked(ctx, func() error {
		for _, name := range names {
			if _, err := l.load(name); err != nil && errors.Is(err, ErrNoHost) {
				if !l.leftover(name) {
					return err
				}
			}
		}
		if len(names) == 0 {
			return l.removeAll(ctx)
		}
		for _, name := range names {
			if err := l.removeHost(ctx, name); err != nil {
				return err
			}
		}
		if hosts, err := l.hostNames(); err == nil && len(hosts) == 0 {
			return l.removeAll(ctx)
		}
		return nil
	})
}

// List returns the hosts in the order of their names.
func (l *Lab) List(context.Context) ([]Info, error) {
	names, err := l.hostNames()
	if err != nil {
		return nil, err
	}
	shared := l.loadShared()
	infos := make([]Info, 0, len(names))
	for _, name := range names {
		h, err := l.load(name)
		if errors.Is(err, ErrNoHost) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		infos = append(infos, l.info(h, shared))
	}
	return infos, nil
}

// Info returns one host.
func (l *Lab) Info(_ context.Context, name string) (Info, error) {
	h, err := l.load(name)
	if err != nil {
		return Info{}, err
	}
	return l.info(h, l.loadShared()), nil
}

func (l *Lab) info(h *host, s shared) Info {
	i := Info{Name: h.Name, Address: l.addr(h).String(), Address6: l.text6(h), State: l.state(h), Disk: h.Disk, Root: l.rootDir(h.Name)}
	if i.State != Off {
		i.PID = h.Init.PID
	}
	for _, c := range s.Cuts {
		switch {
		case c[0] == h.Name:
			i.Cut = append(i.Cut, c[1])
		case c[1] == h.Name:
			i.Cut = append(i.Cut, c[0])
		}
	}
	slices.Sort(i.Cut)
	return i
}

// IP is the address of a host; it never changes.
func (l *Lab) IP(name string) (string, error) {
	h, err := l.load(name)
	if err != nil {
		return "", err
	}
	return l.addr(h).String(), nil
}

// IP6 is the IPv6 address of a host; an error where it has none.
func (l *Lab) IP6(name string) (string, error) {
	h, err := l.load(name)
	if err != nil {
		return "", err
	}
	if h.IPv6 == NoIPv6 {
		return "", fmt.Errorf("host %s has no IPv6 address: it was made without lab up --ipv6", name)
	}
	return l.addr6(h).String(), nil
}

// leftover reports whether something of a host exists besides its record.
func (l *Lab) leftover(name string) bool {
	if !validHost.MatchString(name) {
		return false
	}
	if _, err := os.Lstat(l.hostDir(name)); err == nil {
		return true
	}
	return l.cgroupExists(name)
}

// removeHost removes all of one host. Nothing of it needs to exist.
func (l *Lab) removeHost(ctx context.Context, name string) error {
	h, err := l.load(name)
	if err != nil {
		h = &host{Name: name} // record missing or torn: what is left has derivable names
	}
	l.log.Info("remove host", "host", name)
	if err := l.powerOff(ctx, h); err != nil {
		return err
	}
	if err := l.forgetCuts(name); err != nil {
		return err
	}
	return removeTree(ctx, l.hostDir(name))
}

func (l *Lab) removeAll(ctx context.Context) error {
	names, err := l.hostNames()
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := l.removeHost(ctx, name); err != nil {
			return err
		}
	}
	l.stopSwitch(ctx)
	if err := l.removeCgroups(ctx, ""); err != nil {
		return err
	}
	if err := removeTree(ctx, l.dir()); err != nil {
		return err
	}
	return nil // the lock file and the state directory go with the lock
}

// removeTree removes a directory that hosts have mounted things in. Such mounts live in the
// hosts' namespaces only; should one be visible here all the same, it is unmounted first, so
// that nothing below a mount point is ever deleted.
func removeTree(ctx context.Context, dir string) error {
	if err := unmountBelow(dir); err != nil {
		return err
	}
	var err error
	for wait := 5 * time.Millisecond; ; wait *= 2 {
		// Mounts of a namespace that just died are taken down asynchronously: EBUSY passes.
		if err = os.RemoveAll(dir); err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if wait > 2*time.Second || pause(ctx, wait) != nil {
			return fmt.Errorf("cannot remove %s: %w", dir, err)
		}
	}
}

// pause waits, or returns the error of ctx if that ends first.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// SnapApps are the commands linked into /snap/bin when the product tree has no meta/snap.yaml.
var SnapApps = strings.Fields("add-node addons config ctr dbctl disable enable helm helm3 inspect istioctl join " +
	"kubectl leave refresh-certs remove-node reset start status stop version images kubelet")
