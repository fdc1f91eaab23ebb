package cli

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/client-go/tools/clientcmd"

	"microk8s/cluster-agent/api"
	"microk8s/internal/addon"
	"microk8s/internal/addon/control"
	"microk8s/internal/bootstrap"
	"microk8s/internal/kube"
	"microk8s/internal/status"
)

// request is one addon of a command line.
type request struct {
	control.Request
	inferred bool
}

// changer is [control.Controller.Enable] or Disable.
type changer func(*control.Controller, context.Context, control.Request) error

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
`+usages, (*control.Controller).Enable)
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
destroy-objects they are deleted too.`, (*control.Controller).Disable)
}

func (a *App) addonCommand(verb, short, long string, run changer) *cobra.Command {
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
func (a *App) addons(ctx context.Context, verb string, words []string, wait, adopt, online bool, run changer) error {
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
	version, _ := Version(a.Env)
	for i, r := range requests {
		if target := addon.Target(catalog, r.Addon); target.Name != r.Addon.Name {
			fmt.Fprintf(a.Err, "DEPRECATION WARNING: '%[1]s' is deprecated and will soon be removed. Please use '%[2]s' instead.\n", r.Addon.Name, target.Name)
			r.Addon, requests[i].Addon = target, target
		}
		switch {
		case r.Addon.Repository != addon.CoreRepository: // its hooks check
		case r.Addon.Source != "":
			if _, _, err := readSource(r); err != nil || verb == "disable" && len(r.Args) > 0 {
				return failf("see microk8s "+verb+" --help", "cannot %s %s: it takes [URL or path] [--reference BRANCH] when it is enabled, and got %q", verb, r.Addon.Name, r.Args)
			}
		case verb == "disable" && r.Addon.Builtin == "" && len(r.Args) > 0:
			if err := control.CheckDisable(r.Request); err != nil {
				return failf("see microk8s disable --help", "cannot disable %s: %w", r.Addon.Name, err)
			}
		case r.Addon.Builtin != "" && verb == "disable":
			return failf("see what can be disabled with: microk8s status", "cannot disable %s: %s", r.Addon.FullName(), r.Addon.Builtin)
		case r.Addon.Builtin == "" && verb == "enable":
			if err := addon.Check(r.Addon, r.Args); err != nil {
				return failf("see microk8s enable --help", "cannot enable %s: %w", r.Addon.Name, err)
			}
			if err := control.CheckPack(ctx, a.Env, version, r.Request, online); err != nil {
				return refused(err)
			}
		}
	}
	prober := a.prober()
	ready, cancel := context.WithTimeout(ctx, control.APIWait)
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
	c, err := a.controller(reporter{a})
	if err != nil {
		return err
	}
	c.Wait, c.Set.Adopt, c.Set.Online, c.Set.Declare = wait, adopt, online, true
	for _, r := range requests {
		if r.Addon.Source != "" {
			if err := a.changeSource(ctx, verb, r); err != nil {
				return err
			}
		} else if err := run(c, ctx, r.Request); err != nil {
			return a.addonFailure(ctx, prober, verb, r, err)
		}
	}
	return nil
}

// readSource reads the arguments of an addon that stands for a repository: another place of it, and a branch.
func readSource(r request) (source, reference string, err error) {
	flags := pflag.NewFlagSet(r.Addon.Name, pflag.ContinueOnError)
	flags.Usage = func() {}
	flags.StringVar(&reference, "reference", "", "")
	if err := flags.Parse(r.Args); err != nil {
		return "", "", err
	}
	if flags.NArg() > 1 {
		return "", "", fmt.Errorf("unexpected argument %q", flags.Arg(1))
	}
	return cmp.Or(flags.Arg(0), r.Addon.Source), reference, nil
}

// changeSource adds or removes the repository that an addon stands for. The lock is held.
func (a *App) changeSource(ctx context.Context, verb string, r request) error {
	source, reference, err := readSource(r)
	if err != nil {
		return err
	}
	_, err = os.Stat(filepath.Join(a.Env.AddonRepository(r.Addon.Name), "addons.yaml"))
	if (err == nil) == (verb == "enable") {
		fmt.Fprintf(a.Out, "Addon %s is already %sd\n", r.Addon.FullName(), verb)
		return nil
	}
	repositories := &addon.Repositories{Env: a.Env, Out: a.Out, Err: a.Err, Term: a.Term}
	repositories.Clean()
	if verb == "disable" {
		if err := repositories.Remove(r.Addon.Name); err != nil {
			return err
		}
		fmt.Fprintf(a.Out, "%s is disabled\n", r.Addon.Title())
		return nil
	}
	err = repositories.Add(ctx, r.Addon.Name, source, reference, true)
	var refused *addon.RefusedError
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &refused):
		return failf(cmp.Or(refused.Hint, "give another repository: microk8s enable "+r.Addon.Name+" URL"), "%s", refused.Text)
	case err != nil:
		return failf("where there is no way out, bring a clone of it here, and: microk8s enable "+r.Addon.Name+" /path/to/the/clone", "cannot get %s: %w", source, err)
	}
	fmt.Fprintf(a.Out, "%s is enabled; see its addons with: microk8s status\n", r.Addon.Title())
	return nil
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
		r := request{control.Request{Addon: x}, inferred}
		if ok {
			colon = true
			r.Args = []string{arg}
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
	r := request{control.Request{Addon: x, Args: words[1:]}, inferred}
	a.sayInferred(r)
	return []request{r}, nil
}

func (a *App) sayInferred(r request) {
	if r.inferred {
		fmt.Fprintf(a.Err, "Infer repository %s for addon %s\n", r.Addon.Repository, r.Addon.Name)
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
	var refusal *control.Refusal
	var hook *control.HookError
	switch {
	case ctx.Err() != nil:
		return err
	case errors.As(err, &hook):
		return exitError(hook.Code) // it has said why
	case errors.As(err, &refusal):
		return refused(err)
	case errors.As(err, &wrong):
		return failf("see microk8s enable --help", "cannot %s %s: %w", verb, r.Addon.Name, err)
	case errors.As(err, &mute):
		return failf("see the pods with microk8s kubectl get pods -A -o wide, or disable it with microk8s disable "+r.Addon.Name, "%s is enabled and its pods are ready, but %w", r.Addon.Name, err)
	case errors.As(err, &late):
		return failf("see more with microk8s kubectl get events -A, or disable it with microk8s disable "+r.Addon.Name, "%s is enabled, but %w", r.Addon.Name, err)
	}
	if verb == "enable" && errors.As(err, &theirs) {
		f := &Failure{Err: fmt.Errorf("cannot enable %s: objects of that name are there already, and were made by others", r.Addon.Name), Code: ExitUsage}
		for _, o := range theirs.Objects {
			f.Hints = append(f.Hints, o.String())
		}
		if slices.ContainsFunc(theirs.Objects, func(o bootstrap.Foreign) bool { return o.Fixed }) {
			f.Hints = append(f.Hints, "nothing was changed; they cannot be changed as the addon needs them, so it cannot take them over: remove them first")
			return f
		}
		f.Hints = append(f.Hints, "nothing was changed; remove them, or let the addon take them over with: microk8s enable "+strings.Join(append([]string{r.Addon.Name}, r.Args...), " ")+" --adopt")
		return f
	}
	f := &Failure{Err: fmt.Errorf("cannot %s %s: %w", verb, r.Addon.Name, err)}
	for _, p := range prober.Probe(ctx).Problems {
		f.Hints = append(f.Hints, p.String())
	}
	f.Hints = append(f.Hints, "then run the same command again")
	return f
}

// reporter shows a person how a change of addons goes, and asks.
type reporter struct{ a *App }

func (r reporter) Step(title string, do func() error) error { return r.a.progress().step(title, do) }
func (r reporter) Say(line string)                          { fmt.Fprintln(r.a.Out, line) }
func (r reporter) Note(line string)                         { fmt.Fprintln(r.a.Err, line) }

// Ask returns the line that answers a question.
func (r reporter) Ask(question string) (string, error) {
	fmt.Fprint(r.a.Out, question)
	line, err := bufio.NewReader(r.a.In).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("cannot read the answer: %w", err)
	}
	if errors.Is(err, io.EOF) {
		fmt.Fprintln(r.a.Out)
	}
	return strings.TrimSpace(line), nil
}

// controller makes what changes addons from this node.
func (a *App) controller(report control.Reporter) (*control.Controller, error) {
	cfg, err := clientcmd.BuildConfigFromFlags("", a.Env.AdminKubeconfig())
	if err != nil {
		return nil, fmt.Errorf("cannot reach the cluster: %w", err)
	}
	cfg.Timeout = control.APIWait
	kube.Bound(cfg)
	set, err := addon.Open(a.Env, cfg, a.log())
	if err != nil {
		return nil, err
	}
	set.Left = func(o bootstrap.Foreign) { report.Note("left in the cluster, because others made it: " + o.String()) }
	version, _ := Version(a.Env)
	return &control.Controller{
		Env: a.Env, Set: set, Report: report, Version: version,
		Others: func(ctx context.Context, action string, req api.ConfigureRequest) error {
			return a.configureOthers(ctx, action, req)
		},
		Restart: func(ctx context.Context) error {
			if err := a.Services.Restart(ctx, "kubelite"); err != nil {
				return err
			}
			ready, cancel := context.WithTimeout(ctx, control.APIWait) // it was the API server's restart, too
			defer cancel()
			a.prober().WaitReady(ready)
			return nil
		},
		Hook: func(hook *exec.Cmd) {
			hook.Env = a.hookEnviron()
			hook.Stdin, hook.Stdout, hook.Stderr = a.In, a.Out, a.Err
		},
	}, nil
}

// refused is an error of package control, with its hints.
func refused(err error) error {
	var r *control.Refusal
	if errors.As(err, &r) {
		return &Failure{Err: err, Hints: r.Hints}
	}
	return err
}

// lockAddons waits for the lock that lets one enable or disable at a time change this node.
func (a *App) lockAddons(ctx context.Context) (unlock func(), err error) {
	if a.getenv(control.SkipLockVar) == "1" {
		return func() {}, nil
	}
	unlock, err = control.Lock(ctx, a.Env, a.LockWait, reporter{a}.Note)
	var file *fs.PathError
	if errors.As(err, &file) {
		return nil, explain("cannot open the lock of the addons", err)
	}
	return unlock, refused(err)
}

// quiet is the reporter where nobody reads, and nobody answers.
type quiet struct{ log *slog.Logger }

func (q quiet) Step(title string, do func() error) error {
	q.log.Debug(title)
	return do()
}
func (q quiet) Say(line string)          { q.log.Debug(line) }
func (q quiet) Note(line string)         { q.log.Debug(line) }
func (quiet) Ask(string) (string, error) { return "", nil }

// newAddonsCarryOut is for the cluster agent, which watches the objects.
func (a *App) newAddonsCarryOut() *cobra.Command {
	return &cobra.Command{
		Use: "carry-out NAME", Short: "Do what the object of an addon asks for", Args: exactly("NAME"), Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.controller(quiet{a.log()})
			if err != nil {
				return err
			}
			c.Hook = func(hook *exec.Cmd) {
				hook.Env = a.hookEnviron()
				hook.Stdout, hook.Stderr = a.Err, a.Err
			}
			return c.CarryOut(cmd.Context(), args[0], a.LockWait)
		},
	}
}
