package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// command is one subcommand: its gates, and how to build it.
type command struct {
	name   string
	group  string // heading under which the list of commands shows it
	hidden bool
	// raw commands take every argument as it is, --help and -h included.
	raw bool
	// ownHelp: a raw command's first --help or -h is for the command itself.
	ownHelp bool
	// sudo: the command goes on under sudo where the caller is not root.
	sudo bool
	// gates refuse the command before its arguments are looked at.
	gates []gate
	// usage is the exit code for wrong options and arguments.
	usage int
	// exits are the exit codes besides those that follow from the rest; see exits.go.
	exits []exitCode
	build func() *cobra.Command
}

// Headings of the list of commands, in their order there.
const (
	groupNode      = "This node"
	groupCluster   = "The cluster"
	groupWorkloads = "Addons and images"
	groupTools     = "Tools for Kubernetes and containers"
)

// commands is the table of all commands and of who may use them when (cli.md 1.0).
func (a *App) commands() []command {
	perm := a.perm(a.Err)
	addons := []gate{a.perm(a.Out), a.worker("\nPlease use the master node.", ExitError), a.stopped}
	return []command{
		{name: "add-node", group: groupCluster, usage: ExitUsage, gates: []gate{a.worker("Please use the microk8s add-node on the master.", ExitError), perm, a.stopped}, build: a.newAddNode},
		{name: "addons", group: groupWorkloads, usage: ExitUsage, exits: []exitCode{{ExitRoot, "update needs root"}}, gates: []gate{a.perm(a.Out)}, build: a.newAddons},
		{name: "backup", group: groupCluster, usage: ExitUsage, gates: []gate{perm, a.worker("\nPlease use the master node.", ExitError), a.stopped}, sudo: true, exits: exitsBackup, build: a.newBackup},
		{name: "certs", group: groupCluster, usage: ExitUsage, gates: []gate{perm, a.worker("\nPlease use the master node.", ExitError), a.stopped}, sudo: true, build: a.newCerts},
		{name: "completion", group: groupTools, usage: ExitUsage, build: a.newCompletion},
		{name: "config", group: groupTools, usage: ExitError, gates: []gate{a.worker("Please use the microk8s config on the master.", ExitOK)}, build: a.newConfig},
		{name: "ctr", group: groupTools, raw: true, gates: []gate{perm}, sudo: true, exits: exitsPassed, build: a.newCtr},
		{name: "dashboard-proxy", group: groupCluster, usage: ExitUsage, gates: []gate{a.worker("Please use the microk8s dashboard-proxy on the master.", ExitOK), perm}, sudo: true, exits: []exitCode{{ExitOK, "interrupted: it has served"}}, build: a.newDashboardProxy},
		{name: "dbctl", group: groupCluster, usage: ExitUsage, gates: []gate{perm, a.worker("\nPlease use the master node.", ExitError)}, sudo: true, exits: exitsDbctl, build: a.newDbctl},
		{name: "disable", group: groupWorkloads, raw: true, ownHelp: true, usage: ExitUsage, gates: addons, build: a.newDisable},
		{name: "enable", group: groupWorkloads, raw: true, ownHelp: true, usage: ExitUsage, gates: addons, build: a.newEnable},
		{name: "encryption", group: groupCluster, usage: ExitUsage, gates: []gate{perm, a.worker("\nPlease use the master node.", ExitError), a.stopped}, sudo: true, build: a.newEncryption},
		{name: "helm", group: groupTools, raw: true, gates: []gate{a.worker("Please use the microk8s helm on the master.", ExitOK), a.stopped}, exits: exitsPassed, build: a.newHelm("helm")},
		{name: "helm3", group: groupTools, raw: true, gates: []gate{a.worker("Please use the microk8s helm on the master.", ExitOK), a.stopped}, exits: exitsPassed, build: a.newHelm("helm3")},
		{name: "images", group: groupWorkloads, usage: ExitUsage, gates: []gate{perm, a.stopped}, build: a.newImages},
		{name: "inspect", group: groupNode, usage: ExitUsage, sudo: true, exits: exitsInspect, build: a.newInspect},
		{name: "join", group: groupCluster, usage: ExitUsage, gates: []gate{a.permUnlessNew}, sudo: true, exits: exitsJoin, build: a.newJoin},
		{name: "kubectl", group: groupTools, raw: true, gates: []gate{a.worker("Please use the microk8s kubectl on the master.", ExitOK), a.stopped}, exits: exitsPassed, build: a.newKubectl},
		{name: "leave", group: groupCluster, usage: ExitUsage, gates: []gate{a.stoppedUnlessChanging, a.permUnlessNew}, sudo: true, exits: exitsLeave, build: a.newLeave},
		{name: "logs", group: groupNode, usage: ExitUsage, gates: []gate{perm}, build: a.newLogs},
		{name: "network", group: groupCluster, usage: ExitUsage, exits: exitsNetwork, gates: []gate{perm, a.stopped}, build: a.newNetwork},
		{name: "pod-security", group: groupCluster, usage: ExitUsage, gates: []gate{perm, a.worker("\nPlease use the master node.", ExitError), a.stopped}, build: a.newPodSecurity},
		{name: "recover", group: groupCluster, usage: ExitUsage, gates: []gate{perm, a.worker("\nPlease use a control plane node.", ExitError)}, sudo: true, exits: exitsRecover, build: a.newRecover},
		{name: "refresh-certs", group: groupNode, usage: ExitUsage, gates: []gate{a.workerRefresh}, exits: slices.Concat(exitsRefresh, exitsRoot), build: a.newRefreshCerts},
		{name: "remove-node", group: groupCluster, usage: ExitUsage, gates: []gate{perm, a.worker("Please use microk8s leave.", ExitError)}, sudo: true, exits: exitsRemove, build: a.newRemoveNode},
		{name: "reset", group: groupNode, usage: ExitUsage, gates: []gate{a.rootOnly, a.perm(a.Out), a.worker("\nPlease use the master node.", ExitError), a.stoppedUnlessResetting}, exits: exitsRoot, build: a.newReset},
		{name: "restore", group: groupCluster, usage: ExitUsage, gates: []gate{a.permUnlessNew, a.worker("\nPlease use the master node.", ExitError)}, sudo: true, exits: exitsBackup, build: a.newRestore},
		{name: "start", group: groupNode, usage: ExitError, gates: []gate{a.workerSnap("start"), a.permUnlessNew}, sudo: true, build: a.newStart},
		{name: "status", group: groupNode, usage: ExitUsage, gates: []gate{a.perm(a.Out), a.worker(workerStatus, ExitOK), a.lowMemory, a.stoppedStatus}, exits: exitsStatus, build: a.newStatus},
		{name: "stop", group: groupNode, usage: ExitError, gates: []gate{a.workerSnap("stop"), a.permUnlessNew}, sudo: true, build: a.newStop},
		{name: "version", group: groupNode, usage: ExitError, gates: []gate{a.permUnlessNew}, build: a.newVersion},

		{name: "daemon", hidden: true, usage: ExitUsage, build: a.newDaemon},
		{name: "find-resolv-conf", hidden: true, usage: ExitUsage, build: a.newFindResolvConf},
		{name: "hook", hidden: true, usage: ExitUsage, build: a.newHook},
		{name: "node-config", hidden: true, usage: ExitUsage, gates: []gate{perm}, build: a.newNodeConfig},
		{name: "supervise", hidden: true, usage: ExitUsage, build: a.newSupervise},
	}
}

// dispatch finds what the first word means: a command, help, or a plugin.
func (a *App) dispatch(ctx context.Context, args []string) error {
	if len(args) == 0 {
		a.list(a.Out)
		return exitError(ExitError)
	}
	name, rest := args[0], args[1:]
	if slices.Contains([]string{cobra.ShellCompRequestCmd, cobra.ShellCompNoDescRequestCmd}, name) {
		return a.execute(ctx, args)
	}
	for _, c := range a.commands() {
		if c.name == name {
			return a.run(ctx, c, rest)
		}
	}
	switch name {
	case "help", "--help", "-h":
		for _, c := range a.commands() {
			if len(rest) > 0 && c.name == rest[0] {
				return a.help(c, rest[1:]...)
			}
		}
		a.list(a.Out)
		return nil
	}
	if plugin := a.plugin(name); plugin != "" {
		return a.Exec(plugin, append([]string{plugin}, rest...), a.commandEnviron())
	}
	fmt.Fprintf(a.Err, "'%s' is not a valid MicroK8s subcommand.\n", name)
	if like := a.root().SuggestionsFor(name); len(like) > 0 {
		fmt.Fprintf(a.Err, "Did you mean: microk8s %s\n", strings.Join(like, ", or microk8s "))
	}
	a.list(a.Err)
	return exitError(ExitError)
}

// run takes one command through its gates and executes it.
func (a *App) run(ctx context.Context, c command, args []string) error {
	if !c.raw && slices.ContainsFunc(args, func(s string) bool { return s == "-h" || s == "--help" }) {
		return a.help(c, args...) // whoever and wherever one is
	}
	if c.ownHelp && len(args) > 0 && (args[0] == "-h" || args[0] == "--help") {
		return a.help(c)
	}
	if err := a.gated(c, args); err != nil {
		return err
	}
	if c.sudo {
		if err := a.asRoot(append([]string{c.name}, args...)...); err != nil {
			return err
		}
	}
	err := a.execute(ctx, append([]string{c.name}, args...))
	var wrong *usageError
	if errors.As(err, &wrong) {
		return a.wrongUsage(c, wrong)
	}
	return err
}

// gated tries the refusals of a command. Where a document is asked for, standard output has nothing
// but documents: refusals are on standard error, and status has one that says it.
func (a *App) gated(c command, args []string) error {
	format, asks := asksDocument(args)
	if !asks || c.raw || c.name == "dbctl" { // whose -o is a file
		for _, g := range c.gates {
			if err := g(); err != nil {
				return err
			}
		}
		return nil
	}
	var said bytes.Buffer
	quiet := *a
	quiet.Out = &said
	quiet.Err = &said
	for _, again := range quiet.commands() {
		if again.name != c.name {
			continue
		}
		for _, g := range again.gates {
			err := g()
			if err == nil {
				continue
			}
			var exit exitError
			if c.name == "status" && errors.As(err, &exit) {
				return errors.Join(a.refusedStatus(format, said.String()), err)
			}
			_, _ = a.Err.Write(said.Bytes())
			return err
		}
	}
	return nil
}

// execute runs the command tree.
func (a *App) execute(ctx context.Context, args []string) error {
	root := a.root()
	root.SetArgs(args)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return &usageError{cmd, plain(err)} })
	return root.ExecuteContext(ctx)
}

// Tree returns all commands, hidden ones too, for what has to know them: tests that want a row for
// each.
func (a *App) Tree() *cobra.Command { return a.root() }

// help prints the help of a command, or of the subcommand that the first words name.
func (a *App) help(c command, words ...string) error {
	if c.raw {
		return a.execute(context.Background(), []string{c.name, "--help"})
	}
	cmd := c.build()
	root := a.root()
	if found, _, err := root.Find([]string{c.name}); err == nil {
		cmd = found
	}
	for _, w := range words {
		i := slices.IndexFunc(cmd.Commands(), func(s *cobra.Command) bool { return s.Name() == w })
		if i < 0 {
			break
		}
		cmd = cmd.Commands()[i]
	}
	cmd.SetOut(a.Out)
	return cmd.Help()
}

// parsing is what Go's own parsers say about a value that is none, at the end of an error of flags.
var parsing = regexp.MustCompile(`: (strconv\.Parse(Int|Uint|Float|Bool)|time): [^:]*(: .*)?$`)

// plain says what a value of a flag should have been, instead of which function did not take it.
func plain(err error) error {
	found := parsing.FindStringSubmatch(err.Error())
	if found == nil {
		return err
	}
	want := "a whole number such as 60"
	switch {
	case found[1] == "time":
		want = "a duration such as 90s, 30m or 8h"
	case found[2] == "Bool":
		want = "true or false"
	case found[2] == "Float":
		want = "a number"
	}
	return errors.New(strings.TrimSuffix(err.Error(), found[0]) + ": want " + want)
}

// usageError is a wrong option or argument.
type usageError struct {
	cmd *cobra.Command
	err error
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// wrongUsage says what was wrong in the words of upstream's command: shell scripts there say
// `invalid option`, the Python commands print their usage.
func (a *App) wrongUsage(c command, wrong *usageError) error {
	if c.usage == ExitError {
		defer fmt.Fprintf(a.Err, "Try 'microk8s %s --help' for help.\n", c.name)
		option := wrong.err.Error()
		if unknown := []string{"unknown ", "unexpected argument: ", "invalid option: "}; !slices.ContainsFunc(unknown, func(s string) bool { return strings.HasPrefix(option, s) }) {
			fmt.Fprintf(a.Err, "microk8s %s: %s\n", c.name, option)
			return exitError(ExitError)
		}
		if i := strings.LastIndex(option, ": "); i >= 0 {
			option = option[i+2:]
		}
		// pflag says "unknown shorthand flag: 'x' in -x" of short ones.
		if _, after, ok := strings.Cut(option, " in "); ok {
			option = after
		}
		fmt.Fprintf(a.Err, "microk8s %s: invalid option -- %s\n", c.name, option)
		return exitError(ExitError)
	}
	fmt.Fprintf(a.Err, "Usage: %s\nTry 'microk8s %s --help' for help.\n\nError: %v\n", wrong.cmd.UseLine(), c.name, wrong.err)
	return exitError(c.usage)
}

// noArgs refuses arguments after a command that takes none.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return &usageError{cmd, fmt.Errorf("unexpected argument: %s", args[0])}
	}
	return nil
}

// list prints the subcommands by groups, each with what it does. The first line, and names
// behind a tab, are upstream's form.
func (a *App) list(w io.Writer) {
	fmt.Fprintln(w, "Available subcommands are:")
	for _, group := range []string{groupNode, groupCluster, groupWorkloads, groupTools} {
		fmt.Fprintf(w, "\n%s:\n", group)
		for _, c := range a.commands() {
			if c.group == group {
				fmt.Fprintf(w, "\t%-15s %s\n", c.name, c.build().Short)
			}
		}
	}
	fmt.Fprintln(w, "\nRun microk8s COMMAND --help for more about a command.")
	if plugins := a.plugins(); len(plugins) > 0 {
		fmt.Fprintln(w, "Available subcommands from addons are:")
		for _, p := range plugins {
			fmt.Fprintf(w, "\t%s\n", p)
		}
	}
}

// plugins lists what addons have installed as subcommands.
func (a *App) plugins() []string {
	entries, err := os.ReadDir(a.Env.PluginsDir())
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

// plugin returns the path of the executable plugin of that name, or "".
func (a *App) plugin(name string) string {
	if name != filepath.Base(name) || strings.HasPrefix(name, ".") {
		return ""
	}
	path := filepath.Join(a.Env.PluginsDir(), name)
	fi, err := os.Stat(path)
	if err != nil || !fi.Mode().IsRegular() || fi.Mode()&0o111 == 0 {
		return ""
	}
	return path
}
