// Package setup lays a node out on a machine and takes it away again: what the snap's hooks
// install, configure and remove do, and what the first start does where there is no snapd.
//
// [Install] makes everything the services need to start: directories, argument files,
// certificates and kubeconfigs, the datastore's directory, links on the host, locks. It is a
// list of named steps, each of which looks at what is there and adds what is missing; nothing
// that a user may have changed is overwritten. So it can be interrupted anywhere, by a crash
// too, and run again. Starting services is left to the callers.
package setup

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"

	"microk8s/internal/certs"
	"microk8s/internal/fileaccess"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/pki"
	"microk8s/internal/ranges"
	"microk8s/internal/snapenv"
)

// Installer is one run. The zero values of the optional fields mean the real machine.
type Installer struct {
	Env       snapenv.Env
	Log       *slog.Logger
	Maker     pki.Maker                 // keys and clock of the certificates
	Hostname  func() (string, error)    // see certs.Options
	Addresses func() ([]net.IP, error)  // see certs.Options
	Unmount   func(target string) error // lazily; see Remove
	Links     func() error              // removes the pod network's interfaces; see Remove

	// After is called after each change to the file system, with what was changed; an error
	// ends the run there. Tests use it to stop anywhere.
	After func(what string) error
}

type step struct {
	name string
	do   func(context.Context) error
}

// Install makes this machine ready to run the node's services. It returns at once when that has
// been done before.
func Install(ctx context.Context, env snapenv.Env, log *slog.Logger) error {
	return (&Installer{Env: env, Log: log}).Install(ctx)
}

// Install is [Install] with the fields of in.
func (in *Installer) Install(ctx context.Context) error {
	if nodeconfig.ReadState(in.Env).Installed {
		return nil
	}
	return in.run(ctx, []step{
		{"check the machine", in.checkHost},
		{"make the revision's directory", in.revision},
		{"make the group " + snapenv.Group, in.group},
		{"make the directories", in.directories},
		{"copy the images to load", in.sideload},
		{"copy the default arguments", in.defaultArgs},
		{"prepare the datastore", in.datastore},
		{"make certificates and credentials", in.certificates},
		{"link the CNI plugins", in.cniPlugins},
		{"link helm for hooks of addons", in.helmForHooks},
		{"record what the host lacks", in.noteTrees},
		{"make the links on the host", in.hostLinks},
		{"set the locks", in.locks},
		{"note that it is done", func(context.Context) error { return in.lock(snapenv.LockInstalled) }},
	})
}

// Configure brings an installed node in line after a refresh or a changed setting: links,
// directories with their group, argument files that are new, due certificates. It does nothing
// on a machine where nothing is installed.
func Configure(ctx context.Context, env snapenv.Env, log *slog.Logger) error {
	return (&Installer{Env: env, Log: log}).Configure(ctx)
}

// Configure is [Configure] with the fields of in.
func (in *Installer) Configure(ctx context.Context) error {
	if !nodeconfig.ReadState(in.Env).Installed {
		return nil
	}
	return in.run(ctx, in.configureSteps())
}

// Refresh brings a node that an earlier release made in line with this one, while no service
// runs: what [Configure] does, and the datastore's directory in the place that no revert
// touches. It does nothing on a machine where nothing is installed.
func Refresh(ctx context.Context, env snapenv.Env, log *slog.Logger) error {
	return (&Installer{Env: env, Log: log}).Refresh(ctx)
}

// Refresh is [Refresh] with the fields of in.
func (in *Installer) Refresh(ctx context.Context) error {
	if !nodeconfig.ReadState(in.Env).Installed {
		return nil
	}
	return in.run(ctx, append([]step{
		{"move aside the datastore of an undone refresh", in.setAside},
		{"move the datastore to where it stays", in.datastore},
		{"note that pods may mount the old revision", in.noteRefresh},
	}, in.configureSteps()...))
}

// noteRefresh makes the lock again each time: when it was made counts.
func (in *Installer) noteRefresh(context.Context) error {
	if err := nodeconfig.Lock(in.Env, snapenv.LockRemount); err != nil {
		return err
	}
	return in.changed(snapenv.LockRemount)
}

func (in *Installer) configureSteps() []step {
	return []step{
		{"make the group " + snapenv.Group, in.group},
		{"make the directories", in.directories},
		{"copy new default arguments", in.defaultArgs},
		{"set group and modes", in.modes},
		{"renew certificates", in.certificates},
		{"link the CNI plugins", in.cniPlugins},
		{"link helm for hooks of addons", in.helmForHooks},
		{"make the links on the host", in.hostLinks},
	}
}

func (in *Installer) run(ctx context.Context, steps []step) error {
	if in.Log == nil {
		in.Log = slog.New(slog.DiscardHandler)
	}
	if os.Geteuid() != 0 && in.Env.Host == "/" {
		return fmt.Errorf("cannot set up the node: this needs root; run it again with sudo")
	}
	for _, s := range steps {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("cannot %s: %w", s.name, err)
		}
		if err := s.do(ctx); err != nil {
			return fmt.Errorf("cannot %s: %w", s.name, err)
		}
		in.Log.Debug("setup", "step", s.name)
	}
	return nil
}

func (in *Installer) changed(what string) error {
	if in.After != nil {
		return in.After(what)
	}
	return nil
}

func (in *Installer) access() fileaccess.Access { return fileaccess.For(in.Env) }

// certificates makes all certificates and kubeconfigs that are missing or due.
func (in *Installer) certificates(ctx context.Context) error {
	store := certs.New(in.Env, certs.Options{Maker: in.Maker, Hostname: in.Hostname, Addresses: in.Addresses, Log: in.Log})
	if _, err := store.Ensure(ctx); err != nil {
		return err
	}
	return in.changed(in.Env.CertsDir())
}

// Ranges has a node take the addresses of pods and Services that args/cni-env asks for, as far as it may, with the certificates
// that follow. It belongs before each start of the services. An error is about ranges that cannot work on this host.
func Ranges(ctx context.Context, env snapenv.Env, log *slog.Logger) error {
	changed, err := ranges.Prepare(env)
	if err != nil || !changed {
		return err
	}
	_, err = certs.New(env, certs.Options{Log: log}).Ensure(ctx)
	return err
}

// lock makes an empty lock file.
func (in *Installer) lock(name string) error {
	if _, err := os.Lstat(in.Env.Lock(name)); err == nil {
		return nil
	}
	if err := nodeconfig.Lock(in.Env, name); err != nil {
		return err
	}
	return in.changed(name)
}

// lowMemory is the size at or below which no control plane is started by itself, in kB as
// /proc/meminfo has it: 512 MiB.
const lowMemory = 524288

// Locks of services that are not part of the product, kept because other programs look at them
// (cli.md 6.6).
var absentServices = []string{"no-etcd", "no-flanneld", snapenv.LockNoProxy}

func (in *Installer) locks(context.Context) error {
	for _, name := range append(absentServices, snapenv.LockHA, snapenv.LockLite) {
		if err := in.lock(name); err != nil {
			return err
		}
	}
	total, err := memTotal(in.Env.HostPath("proc/meminfo"))
	if err != nil {
		in.Log.Warn("cannot find out how much memory there is", "err", err)
		return nil
	}
	if total <= lowMemory {
		in.Log.Warn("this machine has too little memory for a control plane, which is not started by itself", "kB", total, "needed", lowMemory+1)
		return in.lock(snapenv.LockLowMemory)
	}
	return nil
}

func memTotal(path string) (kB uint64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if _, err := fmt.Fscanf(f, "MemTotal: %d kB", &kB); err != nil {
		return 0, fmt.Errorf("%s does not begin with MemTotal: %w", path, err)
	}
	return kB, nil
}

// modes gives files made by others (addons, editors) the group again. Private keys and the
// daemons' kubeconfigs stay root's.
func (in *Installer) modes(context.Context) error {
	a := in.access()
	dirs := []string{in.Env.ArgsDir(), in.Env.LocksDir(), filepath.Join(in.Env.Common, "addons"), in.Env.PluginsDir(), filepath.Join(in.Env.Common, "hooks")}
	if a.RootOnly() {
		dirs = append(dirs, in.Env.CertsDir(), in.Env.CredentialsDir(), in.Env.BackendLive())
	}
	for _, dir := range dirs {
		if err := a.ShareTree(dir); err != nil {
			return err
		}
	}
	return nil
}
