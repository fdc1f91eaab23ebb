package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"microk8s/internal/args"
	"microk8s/internal/nodeconfig"
)

// raw makes a command that hands its arguments to a program as they are.
func raw(use, short string, run func(args []string) error) func() *cobra.Command {
	return func() *cobra.Command {
		return &cobra.Command{
			Use:                use,
			Short:              short,
			DisableFlagParsing: true,
			RunE:               func(_ *cobra.Command, args []string) error { return run(args) },
		}
	}
}

func (a *App) newKubectl() *cobra.Command {
	c := raw("kubectl [arguments]", "Run kubectl against this node", a.kubectl)()
	c.ValidArgsFunction = a.delegateCompletion(func() (string, []string, error) { return a.kubectlCommand(nil) })
	return c
}

func (a *App) kubectl(user []string) error {
	if err := a.permUnlessOwn(user); err != nil {
		return err
	}
	path, argv, err := a.kubectlCommand(append(a.kubectlEnd(user), user...))
	if err != nil {
		return err
	}
	environ, err := a.kubectlEnviron()
	if err != nil {
		return err
	}
	return a.replace(path, argv, environ)
}

// permUnlessOwn is perm unless the user names another kubeconfig than the node's.
func (a *App) permUnlessOwn(user []string) error {
	if slices.ContainsFunc(user, func(s string) bool { return s == "--kubeconfig" || strings.HasPrefix(s, "--kubeconfig=") }) {
		return nil
	}
	return a.perm(a.Err)()
}

// kubectlCommand returns the program and its arguments, those of args/kubectl in front.
func (a *App) kubectlCommand(user []string) (string, []string, error) {
	path := filepath.Join(a.Env.Snap, "kubectl")
	argv := []string{path}
	f, err := nodeconfig.File(a.Env, "kubectl")
	if err != nil {
		return "", nil, err
	}
	argv = append(argv, f.Words(a.lookup)...)
	return path, append(argv, user...), nil
}

// kubectlEnviron is the environment of kubectl: args/kubectl-env counts most, and without it
// the administrator's kubeconfig is used.
func (a *App) kubectlEnviron() ([]string, error) {
	f, err := args.LoadEnv(a.Env.Args("kubectl-env"), a.lookup)
	if err != nil {
		return nil, err
	}
	if _, ok := f.Values["KUBECONFIG"]; !ok {
		f.Vars = append(f.Vars, "KUBECONFIG="+a.Env.AdminKubeconfig())
	}
	return append(a.environWithout(f.Vars), f.Vars...), nil
}

// commandEnviron is the environment of the programs that a person runs through us.
func (a *App) commandEnviron() []string {
	// Whoever may not make it does without, as with any XDG_RUNTIME_DIR that is not there.
	_ = os.MkdirAll(a.Env.RunDir(), 0o755)
	environ := a.Env.CommandEnviron(a.Environ)
	// cloud-init and units of systemd have no HOME; kubectl and Helm keep caches, repositories and
	// plugins there, and would make folders in whatever directory they are in.
	if a.getenv("HOME") == "" {
		if u, err := user.Current(); err == nil && u.HomeDir != "" {
			environ = append(slices.DeleteFunc(environ, func(kv string) bool { return kv == "HOME=" }), "HOME="+u.HomeDir)
		}
	}
	return environ
}

// environWithout is commandEnviron without the variables that vars sets.
func (a *App) environWithout(vars []string) []string {
	return slices.DeleteFunc(a.commandEnviron(), func(kv string) bool {
		key, _, _ := strings.Cut(kv, "=")
		return slices.ContainsFunc(vars, func(v string) bool { return strings.HasPrefix(v, key+"=") })
	})
}

func (a *App) lookup(name string) (string, bool) {
	if v, ok := a.Env.Lookup(name); ok {
		return v, true
	}
	v := a.getenv(name)
	return v, v != ""
}

func (a *App) newHelm(name string) func() *cobra.Command {
	return func() *cobra.Command {
		short := "Run Helm against this node"
		if name != "helm" {
			short = "The same as helm"
		}
		c := raw(name+" [arguments]", short, a.helm)()
		c.ValidArgsFunction = a.delegateCompletion(func() (string, []string, error) {
			path, argv := a.helmCommand(nil)
			return path, argv, nil
		})
		return c
	}
}

func (a *App) helmCommand(user []string) (string, []string) {
	path := a.Env.Bin("helm")
	return path, append([]string{path, "--kubeconfig=" + a.Env.AdminKubeconfig()}, user...)
}

func (a *App) helm(user []string) error {
	if err := a.permUnlessOwn(user); err != nil {
		return err
	}
	if err := a.helmReady(user); err != nil {
		return err
	}
	path, argv := a.helmCommand(user)
	return a.replace(path, argv, a.commandEnviron())
}

func (a *App) newCtr() *cobra.Command {
	return raw("ctr [arguments]", "Run containerd's client against this node", a.ctr)()
}

// ctrRegistry are the commands of ctr that ask a registry, by ctr's own names and aliases.
var ctrRegistry = map[string][]string{
	"images": {"pull", "push"}, "image": {"pull", "push"}, "i": {"pull", "push"},
	"content": {"fetch", "fetch-object", "fetch-blob", "push-object"},
}

// ctrValued are ctr's options before the command whose value may be the next word.
var ctrValued = []string{"address", "a", "timeout", "connect-timeout", "namespace", "n"}

// withHostsDir adds the folder with the registries' hosts.toml files, which pods' pulls use, to
// the commands of ctr that ask a registry, unless the user names a folder.
func (a *App) withHostsDir(user []string) []string {
	at := 0
	for ; at < len(user) && strings.HasPrefix(user[at], "-"); at++ {
		if slices.Contains(ctrValued, strings.TrimLeft(user[at], "-")) {
			at++
		}
	}
	if at+1 >= len(user) || !slices.Contains(ctrRegistry[user[at]], user[at+1]) {
		return user
	}
	at += 2
	if slices.ContainsFunc(user[at:], func(s string) bool {
		name, _, _ := strings.Cut(strings.TrimLeft(s, "-"), "=")
		return strings.HasPrefix(s, "-") && name == "hosts-dir"
	}) {
		return user
	}
	return slices.Concat(user[:at], []string{"--hosts-dir", a.Env.Args("certs.d")}, user[at:])
}

// quietDeprecations keeps containerd's client from printing, before each answer, what of the host its daemon will not
// support some day (cgroup version 1): that is asked for with `ctr deprecations list`.
const quietDeprecations = "CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS"

func (a *App) ctr(user []string) error {
	file := a.Env.Args("ctr")
	f, err := args.Load(file, args.GrammarFor("ctr"))
	if errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintf(a.Out, "Arguments file %s is missing.\n", file)
		fmt.Fprintf(a.Err, "  copy it again with: sudo cp %s %s\n", filepath.Join(a.Env.DefaultArgs(), "ctr"), file)
		return exitError(ExitError)
	}
	if err != nil {
		return err
	}
	path := a.Env.Bin("ctr")
	argv := append([]string{path}, f.Words(a.lookup)...)
	vars := []string{"CONTAINERD_SNAPSHOTTER=" + snapshotter(a.Env.Common)}
	if a.getenv(quietDeprecations) == "" {
		vars = append(vars, quietDeprecations+"=1")
	}
	argv = append(argv, a.ctrEnd(user)...)
	return a.replace(path, append(argv, a.withHostsDir(user)...), append(a.environWithout(vars), vars...))
}

// snapshotter returns the name of containerd's snapshotter for a directory: overlayfs, except on
// ZFS, which cannot carry it.
func snapshotter(dir string) string {
	const zfsMagic = 0x2fc12fc1
	var fs unix.Statfs_t
	if unix.Statfs(dir, &fs) == nil && int64(fs.Type) == zfsMagic { //nolint:unconvert // 32 bits on some architectures
		return "native"
	}
	return "overlayfs"
}

// replace goes on as another program, which inherits the terminal and whose exit code becomes
// ours.
func (a *App) replace(path string, argv, environ []string) error {
	if err := a.Exec(path, argv, environ); err != nil {
		return fmt.Errorf("cannot run %s: %w", path, err)
	}
	return nil
}
