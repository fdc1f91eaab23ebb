// Package daemon prepares the host and the command line of each service, and becomes the
// program. It is the same code under snapd and under the product's own supervisor: both start
// `microk8s daemon NAME`.
//
// What a service must find before it runs is here: locks that say it has nothing to do, checked
// argument files, containerd's configuration, kernel settings (upwards only, and never a reason
// not to start). When to start, stop and restart is left to snapd and internal/service.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"microk8s/apiserver-proxy/config"
	"microk8s/internal/args"
	"microk8s/internal/argsdigest"
	"microk8s/internal/certs"
	"microk8s/internal/hostinfo"
	"microk8s/internal/hostprobe"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/setup"
	"microk8s/internal/snapenv"
)

// ErrNothingToDo is wrapped by errors of [Prepare] that say why the service is not wanted on
// this node now. Its start then ends without failure.
var ErrNothingToDo = errors.New("nothing to do")

// Command is a program to become.
type Command struct {
	Path string   // of the program
	Args []string // without the program's name
	Env  []string // KEY=value, complete
	Dir  string

	NoFile  uint64 // limit of open files; 0 keeps it
	MemLock uint64 // limit of locked memory in bytes; 0 keeps it
}

// Preparer is one preparation. Fields other than Env and Log are for tests; nil means the real
// thing.
type Preparer struct {
	Env      snapenv.Env
	Log      *slog.Logger
	Environ  []string                                    // of this process
	Host     *hostprobe.Host                             // what was found about the host
	Modprobe func(ctx context.Context, mod string) error // loads a kernel module
	Unmount  func(target string) error                   // lazily
	// Addresses lists those of this host; nil means the kernel's.
	Addresses func() ([]net.IP, error)
}

// Prepare makes the host and the files ready for a service and gives its command. The name is
// that of the daemon: containerd, k8s-dqlite, kubelite, cluster-agent or apiserver-proxy.
func Prepare(ctx context.Context, env snapenv.Env, name string, log *slog.Logger) (*Command, error) {
	return (&Preparer{Env: env, Log: log}).Prepare(ctx, name)
}

// Run prepares the service and becomes it: it returns only on an error, and with nil and a line
// in the log when the service has nothing to do.
func Run(ctx context.Context, env snapenv.Env, name string, log *slog.Logger) error {
	cmd, err := Prepare(ctx, env, name, log)
	if errors.Is(err, ErrNothingToDo) {
		log.Info("not started", "service", name, "reason", err)
		return nil
	}
	if err != nil {
		return err
	}
	setLimit(log, unix.RLIMIT_NOFILE, "open files", cmd.NoFile)
	setLimit(log, unix.RLIMIT_MEMLOCK, "locked memory", cmd.MemLock)
	if err := protect("/proc/self/oom_score_adj", name); err != nil {
		log.Info("the kernel may end this service when memory is short, before it ends pods", "service", name, "err", err)
	}
	if err := os.Chdir(cmd.Dir); err != nil {
		return fmt.Errorf("cannot start %s: %w", name, err)
	}
	err = unix.Exec(cmd.Path, append([]string{cmd.Path}, cmd.Args...), cmd.Env)
	return fmt.Errorf("cannot start %s: %s: %w", name, cmd.Path, err)
}

// scores are what the kernel's OOM killer adds to the services' badness. The kubelet gives
// guaranteed pods -997, and itself, which is kubelite, -999: services without which nothing goes
// on are to outlive every pod, and so are the others, which take little.
var scores = map[string]int{
	"containerd": -999, "k8s-dqlite": -999, "kubelite": -999, "cluster-agent": -998, "apiserver-proxy": -998,
}

// protect writes the score of a service. Lowering it takes CAP_SYS_RESOURCE, which a container
// that is the machine may lack.
func protect(file, name string) error {
	score, ok := scores[name]
	if !ok {
		return nil
	}
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = fmt.Fprint(f, score)
	return errors.Join(err, f.Close())
}

// setLimit sets a resource limit, or as much of it as this process may.
func setLimit(log *slog.Logger, resource int, what string, value uint64) {
	if value == 0 {
		return
	}
	var now unix.Rlimit
	if err := unix.Getrlimit(resource, &now); err != nil {
		log.Warn("cannot read a limit", "of", what, "err", err)
		return
	}
	want := unix.Rlimit{Cur: value, Max: max(now.Max, value)}
	if err := unix.Setrlimit(resource, &want); err == nil {
		return
	}
	want = unix.Rlimit{Cur: min(value, now.Max), Max: now.Max}
	if err := unix.Setrlimit(resource, &want); err != nil || want.Cur < value {
		log.Warn("this host does not allow the limit that was asked for", "of", what, "wanted", value, "has", want.Cur)
	}
}

// Prepare is [Prepare] with the fields of p.
func (p *Preparer) Prepare(ctx context.Context, name string) (*Command, error) {
	if p.Log == nil {
		p.Log = slog.New(slog.DiscardHandler)
	}
	if p.Environ == nil {
		p.Environ = os.Environ()
	}
	if p.Modprobe == nil {
		p.Modprobe = modprobe
	}
	if p.Unmount == nil {
		p.Unmount = func(target string) error { return unix.Unmount(target, unix.MNT_DETACH) }
	}
	prepare, known := map[string]func(context.Context, *Command) error{
		"containerd": p.containerd, "k8s-dqlite": p.k8sDqlite, "kubelite": p.kubelite,
		"cluster-agent": p.clusterAgent, "apiserver-proxy": p.apiserverProxy,
	}[name]
	if !known {
		return nil, fmt.Errorf("cannot start %q: it is not a service of this product", name)
	}
	if !nodeconfig.ReadState(p.Env).Installed {
		return nil, fmt.Errorf("cannot start %s: the node is not set up yet; run: sudo microk8s start", name)
	}
	if name != "containerd" { // containers may go on, whatever cluster they are of
		if err := setup.CheckIdentity(p.Env); err != nil {
			return nil, fmt.Errorf("cannot start %s: %w", name, err)
		}
	}
	cmd := &Command{Path: p.Env.Bin(name), Dir: p.Env.Data}
	if err := prepare(ctx, cmd); err != nil {
		return nil, err
	}
	if cmd.Args == nil {
		words, err := p.words(name)
		if err != nil {
			return nil, err
		}
		cmd.Args = words
	}
	if err := p.environment(cmd, name); err != nil {
		return nil, err
	}
	if err := argsdigest.Record(p.Env, name); err != nil {
		p.Log.Warn("status will not notice changed argument files", "err", err)
	}
	return cmd, nil
}

func (p *Preparer) host() hostprobe.Host {
	if p.Host == nil {
		h := hostprobe.Probe(p.Env.Host)
		p.Host = &h
	}
	return *p.Host
}

func (p *Preparer) addresses() ([]net.IP, error) {
	if p.Addresses == nil {
		return hostinfo.Addresses()
	}
	return p.Addresses()
}

func nothingToDo(why string) error { return fmt.Errorf("%w: %s", ErrNothingToDo, why) }

// lookup resolves variables of argument files.
func (p *Preparer) lookup(name string) (string, bool) {
	if v, ok := p.Env.Lookup(name); ok {
		return v, true
	}
	for _, kv := range slices.Backward(p.Environ) {
		if k, v, _ := strings.Cut(kv, "="); k == name {
			return v, true
		}
	}
	return "", false
}

// load reads an argument file that must have something in it.
func (p *Preparer) load(name string) (*args.File, error) {
	f, err := args.Load(p.Env.Args(name), args.GrammarFor(name))
	if err != nil {
		return nil, err
	}
	if f.Empty() {
		return nil, fmt.Errorf("cannot use %s: it has no arguments; copy it from %s, or from its .backup",
			p.Env.Args(name), filepath.Join(p.Env.DefaultArgs(), name))
	}
	return f, nil
}

func (p *Preparer) words(name string) ([]string, error) {
	f, err := p.load(name)
	if err != nil {
		return nil, err
	}
	return f.Words(p.lookup), nil
}

// environment is what cli.md 0.5 promises to every program, then the service's -env file.
func (p *Preparer) environment(cmd *Command, name string) error {
	if err := os.MkdirAll(p.Env.RunDir(), 0o755); err != nil {
		return fmt.Errorf("cannot start %s: %w", name, err)
	}
	set := map[string]string{"XDG_RUNTIME_DIR": p.Env.RunDir()}
	path, _ := p.lookup("PATH")
	if path == "" {
		path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	}
	snap := p.Env.Snap
	if name == "containerd" { // its shims live longer than this revision
		snap = current(snap)
	}
	var ours []string
	for _, dir := range []string{"usr/sbin", "usr/bin", "sbin", "bin"} {
		ours = append(ours, filepath.Join(snap, dir))
	}
	set["PATH"] = strings.Join(append(ours, path), ":")
	if home, _ := p.lookup("HOME"); home == "" {
		set["HOME"] = filepath.Join(p.Env.Data, "var/tmp")
	}
	files := []string{name + "-env"}
	if name == "kubelite" || name == "k8s-dqlite" || name == "cluster-agent" {
		files = append(files, "fips-env")
	}
	base := p.Env.Environ(p.Environ)
	for _, file := range files {
		env, err := args.LoadEnv(p.Env.Args(file), func(name string) (string, bool) {
			if v, ok := set[name]; ok {
				return v, true
			}
			return p.lookup(name)
		})
		if err != nil {
			return err
		}
		for k, v := range env.Values {
			set[k] = v
		}
		cmd.NoFile, cmd.MemLock = max(cmd.NoFile, env.NoFile), max(cmd.MemLock, env.MemLock)
	}
	for _, kv := range base {
		k, _, _ := strings.Cut(kv, "=")
		if _, replaced := set[k]; !replaced {
			cmd.Env = append(cmd.Env, kv)
		}
	}
	for k, v := range set {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	slices.Sort(cmd.Env)
	return nil
}

// current replaces a revision's directory by the link current beside it, if it is the same.
func current(dir string) string {
	link := filepath.Join(filepath.Dir(dir), "current")
	a, err1 := os.Stat(link)
	b, err2 := os.Stat(dir)
	if err1 == nil && err2 == nil && os.SameFile(a, b) {
		return link
	}
	return dir
}

// lowMemory says why the control plane does not run here, nil if it may.
func (p *Preparer) lowMemory() error {
	if s := nodeconfig.ReadState(p.Env); s.LowMemory && !s.Worker {
		return nothingToDo("this machine has too little memory for a control plane; to run it anyway: microk8s start --disable-low-memory-guard")
	}
	return nil
}

func (p *Preparer) clusterAgent(context.Context, *Command) error { return certs.Check(p.Env) }

func (p *Preparer) apiserverProxy(_ context.Context, cmd *Command) error {
	if !nodeconfig.ReadState(p.Env).Worker {
		return nothingToDo("only workers need it")
	}
	for _, name := range []string{"traefik", "apiserver-proxy"} {
		if _, err := os.Stat(p.Env.Args(name)); errors.Is(err, fs.ErrNotExist) {
			return nothingToDo(p.Env.Args(name) + " does not exist")
		}
	}
	cmd.NoFile = 65536 // descriptors of connections
	return config.Render(p.Env)
}

func modprobe(ctx context.Context, module string) error {
	out, err := exec.CommandContext(ctx, "modprobe", module).CombinedOutput()
	if err != nil {
		return fmt.Errorf("modprobe %s: %w: %s", module, err, strings.TrimSpace(string(out)))
	}
	return nil
}
