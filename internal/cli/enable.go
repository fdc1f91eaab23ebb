package cli

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/clientcmd"

	"microk8s/cluster-agent/api"
	"microk8s/internal/addon"
	"microk8s/internal/bootstrap"
	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
	"microk8s/internal/status"
)

const (
	// addonAPIWait is how long enable and disable wait for a node that can be used (cli.md 5.3).
	addonAPIWait = 30 * time.Second
	// addonLockWait is how long a command waits for another one that changes addons.
	addonLockWait = 15 * time.Minute

	// addonReadyWait bounds the wait for an addon's pods. What they wait for is said as soon as
	// it is known; this is for what does not end by itself.
	addonReadyWait = 3 * time.Minute

	// addonAnswerWait bounds the wait for answers of an addon whose pods are ready. kube-proxy takes
	// up to some seconds to let traffic through to them.
	addonAnswerWait = time.Minute

	// addonGoneWait bounds the wait for the end of a disabled addon's pods, which get 30 s by default.
	addonGoneWait = time.Minute

	// hookGrace is how long a hook may go on when the command is interrupted.
	hookGrace = 10 * time.Second

	// skipLockVar is set for what runs inside an enable, which holds the lock already.
	skipLockVar = "MICROK8S_ADDONS_SKIP_LOCK"
)

// request is one addon of a command line with its arguments.
type request struct {
	addon    addon.Addon
	inferred bool
	args     []string
}

func (a *App) newEnable() *cobra.Command {
	usages := ""
	for _, u := range addon.Usages() {
		usages += "\n    " + strings.ReplaceAll(u, "\n", "\n    ")
	}
	return a.addonCommand("enable", "Enable addons on this cluster", `Enable one or more addons. Arguments of an addon follow its name, or, where there are several,
a colon:

    microk8s enable dns
    microk8s enable dns 192.0.2.1,192.0.2.2
    microk8s enable dns:192.0.2.1 hostpath-storage

It returns when the addon's pods are ready and what they serve answers, or with --no-wait at once. Enabling an addon again
changes its arguments, and otherwise does nothing. microk8s status lists the addons.

An addon that needs objects which others have made, Helm or a person for instance, is refused. With
--adopt it takes them over, and disable removes them then; IngressClasses and StorageClasses stay
theirs.

The images of larger addons are in packs: files that are imported once with microk8s addons import.
Where one is missing, enable names it and changes nothing; with --online the nodes pull the images
from the registries that the addon names instead.

Arguments of addons:
`+usages, a.enable)
}

func (a *App) newDisable() *cobra.Command {
	return a.addonCommand("disable", "Disable addons on this cluster", `Disable one or more addons: everything they brought into the cluster is removed. What others
made stays, and is named. It returns when the addon's pods have ended, after a minute at the latest with those
that have not, or with --no-wait at once.

    microk8s disable dns
    microk8s disable hostpath-storage [destroy-storage]
    microk8s disable cert-manager [destroy-objects]

Disabling an addon that is not enabled does nothing. Data in volumes is kept, unless
destroy-storage is given or the question is answered with y. Kinds that an addon brought (cert-manager,
ingress, metallb) are kept with all objects of them, and so is a namespace with Secrets of yours; with
destroy-objects they are deleted too.`, a.disable)
}

func (a *App) addonCommand(verb, short, long string, run func(context.Context, *addon.Set, request, bool) error) *cobra.Command {
	return &cobra.Command{
		Use:                verb + " [--no-wait]" + map[string]string{"enable": " [--adopt] [--online]"}[verb] + " ADDON [ARGS...]",
		Short:              short,
		Long:               long,
		DisableFlagParsing: true, // options are the addon's
		RunE: func(cmd *cobra.Command, words []string) error {
			if len(words) > 0 && (words[0] == "-h" || words[0] == "--help") {
				return cmd.Help()
			}
			words, wait := takeFlag(words, "--no-wait")
			words, adopt := takeFlag(words, "--adopt")
			words, online := takeFlag(words, "--online")
			if len(words) > 0 && words[0] == "--" {
				words = words[1:]
			}
			if len(words) == 0 {
				return &usageError{cmd, errors.New("Missing argument 'ADDON'.")} //nolint:staticcheck // upstream's words
			}
			if slices.Contains(words, "-h") || slices.Contains(words, "--help") {
				fmt.Fprintf(a.Out, "Addon %s does not yet have a help message.\n", words[0])
				fmt.Fprintln(a.Out, "For more information about it, visit https://microk8s.io/docs/addons")
				return nil
			}
			return a.addons(cmd.Context(), verb, words, !wait, adopt, online, run)
		},
		ValidArgsFunction: a.addonNames,
	}
}

func takeFlag(words []string, flag string) (rest []string, found bool) {
	for _, w := range words {
		if w == flag {
			found = true
		} else {
			rest = append(rest, w)
		}
	}
	return rest, found
}

// addons does enable or disable. Everything that a person can get wrong is checked for all
// addons before the first is touched.
func (a *App) addons(ctx context.Context, verb string, words []string, wait, adopt, online bool, run func(context.Context, *addon.Set, request, bool) error) error {
	catalog, broken, err := addon.Catalogue(a.Env)
	if err != nil {
		return failf("the installation is damaged: reinstall it", "%w", err)
	}
	for _, err := range broken {
		fmt.Fprintln(a.Err, err)
	}
	requests, err := a.parseAddons(catalog, words)
	if err != nil {
		return err
	}
	for i, r := range requests {
		if target := addon.Target(catalog, r.addon); target.Name != r.addon.Name {
			fmt.Fprintf(a.Err, "DEPRECATION WARNING: '%[1]s' is deprecated and will soon be removed. Please use '%[2]s' instead.\n", r.addon.Name, target.Name)
			r.addon, requests[i].addon = target, target
		}
		switch {
		case r.addon.Repository != addon.CoreRepository: // its hooks check
		case r.addon.Source != "":
			if _, _, err := readSource(r); err != nil || verb == "disable" && len(r.args) > 0 {
				return failf("see microk8s "+verb+" --help", "cannot %s %s: it takes [URL or path] [--reference BRANCH] when it is enabled, and got %q", verb, r.addon.Name, r.args)
			}
		case verb == "disable" && r.addon.Builtin == "" && len(r.args) > 0:
			if err := checkDisable(r); err != nil {
				return failf("see microk8s disable --help", "cannot disable %s: %w", r.addon.Name, err)
			}
		case r.addon.Builtin != "" && verb == "disable":
			return failf("see what can be disabled with: microk8s status", "cannot disable %s: %s", r.addon.FullName(), r.addon.Builtin)
		case r.addon.Builtin == "" && verb == "enable":
			if err := addon.Check(r.addon, r.args); err != nil {
				return failf("see microk8s enable --help", "cannot enable %s: %w", r.addon.Name, err)
			}
			if err := a.checkPack(ctx, r, online); err != nil {
				return err
			}
		}
	}
	prober := a.prober()
	ready, cancel := context.WithTimeout(ctx, addonAPIWait)
	prober.WaitReady(ready)
	cancel()
	if err := ctx.Err(); err != nil {
		return err
	}
	unlock, err := a.lockAddons(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	cfg, err := clientcmd.BuildConfigFromFlags("", a.Env.AdminKubeconfig())
	if err != nil {
		return fmt.Errorf("cannot reach the cluster: %w", err)
	}
	cfg.Timeout = addonAPIWait
	kube.Bound(cfg)
	set, err := addon.Open(a.Env, cfg, a.log())
	if err != nil {
		return err
	}
	set.Adopt, set.Online = adopt, online
	set.Left = func(o bootstrap.Foreign) { fmt.Fprintf(a.Err, "left in the cluster, because others made it: %s\n", o) }
	for _, r := range requests {
		err := error(nil)
		if r.addon.Source != "" {
			if err := a.changeSource(ctx, verb, r); err != nil {
				return err
			}
		} else if r.addon.Hook(verb) != "" {
			err = a.runHook(ctx, set, verb, r)
		} else {
			err = run(ctx, set, r, wait)
		}
		if err != nil {
			return a.addonFailure(ctx, prober, verb, r, err)
		}
	}
	return nil
}

// readSource reads the arguments of an addon that stands for a repository: another place of it, and a branch.
func readSource(r request) (source, reference string, err error) {
	flags := pflag.NewFlagSet(r.addon.Name, pflag.ContinueOnError)
	flags.Usage = func() {}
	flags.StringVar(&reference, "reference", "", "")
	if err := flags.Parse(r.args); err != nil {
		return "", "", err
	}
	if flags.NArg() > 1 {
		return "", "", fmt.Errorf("unexpected argument %q", flags.Arg(1))
	}
	return cmp.Or(flags.Arg(0), r.addon.Source), reference, nil
}

// changeSource adds or removes the repository that an addon stands for. The lock is held.
func (a *App) changeSource(ctx context.Context, verb string, r request) error {
	source, reference, err := readSource(r)
	if err != nil {
		return err
	}
	_, err = os.Stat(filepath.Join(a.Env.AddonRepository(r.addon.Name), "addons.yaml"))
	if (err == nil) == (verb == "enable") {
		fmt.Fprintf(a.Out, "Addon %s is already %sd\n", r.addon.FullName(), verb)
		return nil
	}
	repositories := &addon.Repositories{Env: a.Env, Out: a.Out, Err: a.Err, Term: a.Term}
	repositories.Clean()
	if verb == "disable" {
		if err := repositories.Remove(r.addon.Name); err != nil {
			return err
		}
		fmt.Fprintf(a.Out, "%s is disabled\n", r.addon.Title())
		return nil
	}
	err = repositories.Add(ctx, r.addon.Name, source, reference, true)
	var refused *addon.RefusedError
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &refused):
		return failf(cmp.Or(refused.Hint, "give another repository: microk8s enable "+r.addon.Name+" URL"), "%s", refused.Text)
	case err != nil:
		return failf("where there is no way out, bring a clone of it here, and: microk8s enable "+r.addon.Name+" /path/to/the/clone", "cannot get %s: %w", source, err)
	}
	fmt.Fprintf(a.Out, "%s is enabled; see its addons with: microk8s status\n", r.addon.Title())
	return nil
}

// runHook enables or disables an addon of an added repository: its own program does it.
func (a *App) runHook(ctx context.Context, set *addon.Set, verb string, r request) error {
	on, err := set.ForeignOn(ctx, r.addon)
	if err != nil {
		return err
	}
	if on == (verb == "enable") {
		fmt.Fprintf(a.Out, "Addon %s is already %sd\n", r.addon.FullName(), verb)
		return nil
	}
	hook := exec.CommandContext(ctx, r.addon.Hook(verb), r.args...)
	hook.Cancel = func() error { return hook.Process.Signal(os.Interrupt) }
	hook.WaitDelay = hookGrace
	// Bash itself reads this file before the hook: hooks without set -e would end well whatever failed in them.
	hook.Env = append(a.hookEnviron(), skipLockVar+"=1", "BASH_ENV="+a.Env.FirstFailure(), fmt.Sprintf("MICROK8S_HOOK_OF=%d", os.Getpid()))
	hook.Stdin, hook.Stdout, hook.Stderr = a.In, a.Out, a.Err
	err = hook.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &exit) && exit.ExitCode() > 0:
		return exitError(exit.ExitCode()) // it has said why
	case errors.Is(err, fs.ErrPermission):
		return failf("set them with: sudo chmod +x "+r.addon.Hook(verb), "%s hook for %s addon needs execute permissions", verb, r.addon.Name)
	}
	return fmt.Errorf("its hook %s ended: %w", r.addon.Hook(verb), err)
}

// hookEnviron is the environment of hooks (cli.md 5.5).
func (a *App) hookEnviron() []string {
	environ := a.commandEnviron()
	home := a.getenv("HOME")
	for _, kv := range []string{
		"SNAP_ARCH=" + runtime.GOARCH,
		"SNAP_USER_DATA=" + filepath.Join(home, "snap", a.Env.Name, cmp.Or(a.Env.Revision, "current")),
		"SNAP_USER_COMMON=" + filepath.Join(home, "snap", a.Env.Name, "common"),
	} {
		if name, _, _ := strings.Cut(kv, "="); a.getenv(name) == "" {
			environ = append(environ, kv)
		}
	}
	return environ
}

// checkDisable checks the arguments of a disable, which one addon only has.
func checkDisable(r request) error {
	switch {
	case r.addon.Keeps() && len(r.args) == 1 && strings.TrimPrefix(r.args[0], "--") == "destroy-objects":
		return nil
	case r.addon.Keeps():
		return fmt.Errorf("it takes destroy-objects or nothing, and got %q", r.args)
	case r.addon.Name != storageAddon:
		return fmt.Errorf("it takes no arguments, and got %q", r.args)
	}
	_, err := destroyStorage(r.args)
	return err
}

// parseAddons reads the words of a command line (cli.md 5.4): several addons if every word,
// cut at its first colon, is the name of one, else one addon with its arguments.
func (a *App) parseAddons(catalog []addon.Addon, words []string) ([]request, error) {
	several := make([]request, 0, len(words))
	colon := false
	for _, w := range words {
		name, arg, ok := strings.Cut(w, ":")
		x, inferred, err := addon.Find(catalog, name)
		if err != nil {
			break
		}
		r := request{addon: x, inferred: inferred}
		if ok {
			colon = true
			r.args = []string{arg}
		}
		several = append(several, r)
	}
	if len(several) == len(words) {
		for _, r := range several {
			a.sayInferred(r)
		}
		return several, nil
	}
	if colon && len(several) > 0 && strings.HasPrefix(words[len(several)], "-") {
		return nil, failf("give the arguments of one addon after its name: microk8s enable NAME ARGUMENTS",
			"Can't pass string arguments and flag arguments simultaneously!")
	}
	name, _, _ := strings.Cut(words[0], ":")
	if strings.Contains(words[0], ":") && len(several) > 0 {
		name, _, _ = strings.Cut(words[len(several)], ":") // the word that is no addon
	}
	x, inferred, err := addon.Find(catalog, name)
	if err != nil {
		return nil, a.refuseAddon(err)
	}
	r := request{addon: x, inferred: inferred, args: words[1:]}
	a.sayInferred(r)
	return []request{r}, nil
}

func (a *App) sayInferred(r request) {
	if r.inferred {
		fmt.Fprintf(a.Err, "Infer repository %s for addon %s\n", r.addon.Repository, r.addon.Name)
	}
}

// refuseAddon says that there is no such addon, in the words that scripts know.
func (a *App) refuseAddon(err error) error {
	fmt.Fprintln(a.Err, err)
	var unknown *addon.UnknownError
	if errors.As(err, &unknown) && unknown.Why == "" && unknown.Nearest != "" {
		fmt.Fprintf(a.Err, "Did you mean %s?\n", unknown.Nearest)
	}
	fmt.Fprintln(a.Err, "  see the addons with: microk8s status")
	return exitError(ExitError)
}

// addonFailure adds the next step to what went wrong.
func (a *App) addonFailure(ctx context.Context, prober *status.Prober, verb string, r request, err error) error {
	var wrong *addon.ArgumentError
	var late *addon.NotReadyError
	var mute *addon.NoAnswerError
	var theirs *bootstrap.ForeignError
	var exit exitError
	switch {
	case ctx.Err() != nil, errors.As(err, &exit):
		return err
	case errors.As(err, &wrong):
		return failf("see microk8s enable --help", "cannot %s %s: %w", verb, r.addon.Name, err)
	case errors.As(err, &mute):
		return failf("see the pods with microk8s kubectl get pods -A -o wide, or disable it with microk8s disable "+r.addon.Name, "%s is enabled and its pods are ready, but %w", r.addon.Name, err)
	case errors.As(err, &late):
		return failf("see more with microk8s kubectl get events -A, or disable it with microk8s disable "+r.addon.Name, "%s is enabled, but %w", r.addon.Name, err)
	}
	if verb == "enable" && errors.As(err, &theirs) {
		f := &Failure{Err: fmt.Errorf("cannot enable %s: objects of that name are there already, and were made by others", r.addon.Name), Code: ExitUsage}
		for _, o := range theirs.Objects {
			f.Hints = append(f.Hints, o.String())
		}
		if slices.ContainsFunc(theirs.Objects, func(o bootstrap.Foreign) bool { return o.Fixed }) {
			f.Hints = append(f.Hints, "nothing was changed; they cannot be changed as the addon needs them, so it cannot take them over: remove them first")
			return f
		}
		f.Hints = append(f.Hints, "nothing was changed; remove them, or let the addon take them over with: microk8s enable "+strings.Join(append([]string{r.addon.Name}, r.args...), " ")+" --adopt")
		return f
	}
	f := &Failure{Err: fmt.Errorf("cannot %s %s: %w", verb, r.addon.Name, err)}
	for _, p := range prober.Probe(ctx).Problems {
		f.Hints = append(f.Hints, p.String())
	}
	f.Hints = append(f.Hints, "then run the same command again")
	return f
}

func (a *App) enable(ctx context.Context, set *addon.Set, r request, wait bool) error {
	if r.addon.Builtin != "" {
		fmt.Fprintln(a.Out, r.addon.Builtin)
		fmt.Fprintf(a.Out, "Addon %s is already enabled\n", r.addon.FullName())
		return nil
	}
	had, on, err := set.Enabled(ctx, r.addon.Name)
	if err != nil {
		return err
	}
	if on && len(r.args) == 0 {
		r.args = had.Args
	}
	online := set.Online && len(r.addon.Images) > 0
	if on && had.Complete() && slices.Equal(had.Args, r.args) && had.Online == online && had.Version == r.addon.Version {
		fmt.Fprintf(a.Out, "Addon %s is already enabled\n", r.addon.FullName())
		return nil
	}
	if question := r.addon.Question(); question != "" && len(r.args) == 0 {
		if r.args, err = a.askArgument(question); err != nil {
			return err
		}
		if err := addon.Check(r.addon, r.args); err != nil {
			return err
		}
	}
	if err := a.room(ctx, set, r); err != nil {
		return err
	}
	for _, name := range r.addon.Needs(r.args) {
		if err := a.enableNeeded(ctx, set, name); err != nil {
			return err
		}
	}
	p := a.progress()
	var applied addon.Applied
	if err := p.step("Enabling "+r.addon.Name, func() error {
		applied, err = set.Enable(ctx, r.addon, r.args)
		return err
	}); err != nil {
		return err
	}
	if ip, domain, ok := applied.DNS(); ok {
		fmt.Fprintf(a.Out, "CoreDNS service deployed with IP address %s\n", ip)
		if err := a.kubeletDNS(ctx, p, ip.String(), domain); err != nil {
			return err
		}
		if err := set.Spread(ctx); err != nil {
			return err
		}
	}
	for _, line := range r.addon.Notes() {
		fmt.Fprintln(a.Out, line)
	}
	if wait {
		err := p.step("Waiting for the pods of "+r.addon.Name, func() error {
			wait, cancel := context.WithTimeout(ctx, addonReadyWait)
			defer cancel()
			return set.Wait(wait, applied, func(reason string) { fmt.Fprintf(a.Err, "  %s\n", reason) })
		})
		if err == nil {
			err = p.step("Waiting for answers of "+r.addon.Name, func() error {
				wait, cancel := context.WithTimeout(ctx, addonAnswerWait)
				defer cancel()
				return set.Answers(wait, applied, nodeconfig.Load(a.Env).NodeName, func(reason string) { fmt.Fprintf(a.Err, "  %s\n", reason) })
			})
		}
		if err != nil {
			return err
		}
	}
	fmt.Fprintf(a.Out, "%s is enabled\n", r.addon.Title())
	return nil
}

// kubeletDNS makes the kubelets of all nodes give pods address and domain of the DNS service,
// where this node's arguments say something else.
func (a *App) kubeletDNS(ctx context.Context, p *progress, ip, domain string) error {
	if _, err := os.Stat(a.Env.Args(nodeconfig.Kubelet)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	changed, err := nodeconfig.SetFlags(a.Env, nodeconfig.Kubelet, map[string]string{"cluster-dns": ip, "cluster-domain": domain})
	if err != nil {
		return explain("cannot set --cluster-dns of the kubelet", err)
	}
	if !changed {
		return nil
	}
	update := []map[string]string{{"--cluster-dns": ip}, {"--cluster-domain": domain}}
	if err := a.configureOthers(ctx, "Adding arguments --cluster-dns and --cluster-domain to nodes.",
		api.ConfigureRequest{Services: []api.ConfigureService{{Name: "kubelet", Update: update, Restart: true}}}); err != nil {
		return err
	}
	return p.step(fmt.Sprintf("Restarting the kubelet with --cluster-dns=%s --cluster-domain=%s", ip, domain), func() error {
		if err := a.Services.Restart(ctx, "kubelite"); err != nil {
			return err
		}
		ready, cancel := context.WithTimeout(ctx, addonAPIWait) // it was the API server's restart, too
		defer cancel()
		a.prober().WaitReady(ready)
		return ctx.Err()
	})
}

func (a *App) disable(ctx context.Context, set *addon.Set, r request, wait bool) error {
	_, on, err := set.Enabled(ctx, r.addon.Name)
	if err != nil {
		return err
	}
	destroy := false
	if r.addon.Name == storageAddon {
		if destroy, err = a.askDestroy(on, r.args); err != nil {
			return err
		}
	}
	set.Everything = r.addon.Keeps() && len(r.args) > 0
	left, err := set.Leftover(ctx, r.addon.Name)
	if err != nil {
		return err
	}
	if err := a.progress().step("Disabling "+r.addon.Name, func() error {
		return set.Disable(ctx, r.addon.Name) // also finishes one that was interrupted
	}); err != nil {
		return err
	}
	var ending []string
	if on && wait {
		if err := a.progress().step("Waiting for the end of its pods", func() error {
			wait, cancel := context.WithTimeout(ctx, addonGoneWait)
			defer cancel()
			ending = left.Gone(wait)
			return ctx.Err()
		}); err != nil {
			return err
		}
	}
	if destroy {
		if err := a.progress().step("Deleting "+a.Env.DefaultStorage(), func() error { return emptyDir(a.Env.DefaultStorage()) }); err != nil {
			return explain("cannot delete the data of volumes", err)
		}
		if err := a.sayElsewhere(ctx, set); err != nil {
			return err
		}
	}
	if !on {
		fmt.Fprintf(a.Out, "Addon %s is already disabled\n", r.addon.FullName())
		return nil
	}
	if len(ending) > 0 {
		fmt.Fprintf(a.Err, "still ending: %s\nwatch them with: microk8s kubectl get pods -A -w\n", strings.Join(ending, ", "))
	}
	fmt.Fprintf(a.Out, "%s is disabled\n", r.addon.Title())
	return nil
}

// sayElsewhere names the nodes that still have data of volumes: a node's is deleted there only.
func (a *App) sayElsewhere(ctx context.Context, set *addon.Set) error {
	count, err := set.VolumesElsewhere(ctx, nodeconfig.Load(a.Env).NodeName)
	if err != nil || len(count) == 0 {
		return err
	}
	var on []string
	for _, node := range slices.Sorted(maps.Keys(count)) {
		on = append(on, fmt.Sprintf("%s (%d)", node, count[node]))
	}
	fmt.Fprintf(a.Out, "Data of volumes on other nodes is kept: %s\n", strings.Join(on, ", "))
	fmt.Fprintf(a.Out, "To delete that too, run there: sudo rm -r %s\n", a.Env.DefaultStorage())
	return nil
}

// storageAddon is the addon with data of people.
const storageAddon = "hostpath-storage"

// destroyStorage reads the arguments of its disable.
func destroyStorage(words []string) (destroy bool, err error) {
	for _, w := range words {
		switch w {
		case "destroy-storage", "--destroy-storage":
			destroy = true
		default:
			return false, fmt.Errorf("unexpected argument %q", w)
		}
	}
	return destroy, nil
}

// askDestroy finds out whether the data of volumes on this node is to be deleted: by the
// arguments, or by a question, to which anything but y is no.
func (a *App) askDestroy(on bool, words []string) (bool, error) {
	destroy, err := destroyStorage(words)
	entries, _ := os.ReadDir(a.Env.DefaultStorage())
	if err != nil || destroy || !on || len(entries) == 0 {
		return destroy, err
	}
	fmt.Fprintf(a.Out, "Remove PVC storage at %s ? (Y/N): ", a.Env.DefaultStorage())
	line, err := bufio.NewReader(a.In).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return false, fmt.Errorf("cannot read the answer: %w", err)
	}
	answer := strings.ToLower(strings.TrimSpace(line))
	destroy = answer == "y" || answer == "yes"
	if !destroy {
		fmt.Fprintf(a.Out, "\nStorage removal: the data stays\n")
	}
	return destroy, nil
}

// askArgument asks for the argument of an addon.
func (a *App) askArgument(question string) ([]string, error) {
	fmt.Fprint(a.Out, question)
	line, err := bufio.NewReader(a.In).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("cannot read the answer: %w", err)
	}
	if errors.Is(err, io.EOF) {
		fmt.Fprintln(a.Out)
	}
	if line = strings.TrimSpace(line); line == "" {
		return nil, nil
	}
	return []string{line}, nil
}

// enableNeeded enables an addon that another one needs, unless it is on.
func (a *App) enableNeeded(ctx context.Context, set *addon.Set, name string) error {
	x, err := set.Find(name)
	if err != nil {
		return err
	}
	if had, on, err := set.Enabled(ctx, name); err != nil || on && had.Complete() {
		return err
	}
	return a.enable(ctx, set, request{addon: x}, true)
}

// room refuses an addon that no node has disk for: the kubelet would evict its pods, or take
// none. Nothing has been changed then.
func (a *App) room(ctx context.Context, set *addon.Set, r request) error {
	pressed, roomy, err := set.Disks(ctx)
	if err != nil {
		return err
	}
	full := status.FullDisk(a.Env)
	if full != nil {
		here := nodeconfig.Load(a.Env).NodeName
		roomy = slices.DeleteFunc(roomy, func(n string) bool { return n == here })
	}
	switch {
	case len(roomy) > 0:
		return nil
	case full != nil:
		return failf("free some space there and run the same command again", "cannot enable %s: %s", r.addon.Name, full.What)
	case len(pressed) > 0:
		return failf("free some space there and run the same command again", "cannot enable %s: not enough disk for pods on %s", r.addon.Name, strings.Join(pressed, ", "))
	}
	return nil // no node is ready: the wait says so
}

// lockAddons waits for the lock that lets one enable or disable at a time change this node. It
// is a POSIX record lock: it goes with the process.
func (a *App) lockAddons(ctx context.Context) (unlock func(), err error) {
	if a.getenv(skipLockVar) == "1" {
		return func() {}, nil
	}
	f, err := os.OpenFile(a.Env.Lock(snapenv.LockAddons), os.O_RDWR|os.O_CREATE, 0o660)
	if err != nil {
		return nil, explain("cannot open the lock of the addons", err)
	}
	lock := unix.Flock_t{Type: unix.F_WRLCK}
	said := false
	limit := time.NewTimer(cmp.Or(a.LockWait, addonLockWait))
	defer limit.Stop()
	holder := func() string {
		who := unix.Flock_t{Type: unix.F_WRLCK}
		if err := unix.FcntlFlock(f.Fd(), unix.F_GETLK, &who); err != nil || who.Pid <= 0 {
			return "another enable or disable"
		}
		return fmt.Sprintf("another enable or disable (process %d)", who.Pid)
	}
	for {
		err := unix.FcntlFlock(f.Fd(), unix.F_SETLK, &lock)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, explain("cannot lock the addons", err)
		}
		if !said {
			said = true
			fmt.Fprintf(a.Err, "waiting for %s to end\n", holder())
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-limit.C:
			who := holder()
			f.Close()
			return nil, failf("see what that process does, or end it, and run the same command again", "%s did not end within %s", who, cmp.Or(a.LockWait, addonLockWait))
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		}
	}
}
