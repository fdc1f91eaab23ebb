// Package cli is the command line of microk8s: which commands there are, who may use them when
// (gates.go), what they print and with which code they exit. What they do to a node is in the
// packages that they call.
//
// Results go to standard output. Progress, warnings and errors go to standard error, begin
// with a lower case letter and have no full stop; errors are printed once, by [App.Main], as
// `microk8s: <what>` with indented lines that say what to do next. The refusals of cli.md 0.6
// keep upstream's words, streams and exit codes, because scripts know them.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"microk8s/internal/service"
	"microk8s/internal/snapenv"
)

// Exit codes (cli.md 1). Those of refresh-certs are beside it.
const (
	ExitOK    = 0
	ExitError = 1
	ExitUsage = 2  // wrong options or arguments of status, reset, refresh-certs, logs
	ExitRoot  = 50 // the command needs root
)

// App is the program with everything it takes from the outside.
type App struct {
	Env     snapenv.Env
	In      io.Reader
	Out     io.Writer // results
	Err     io.Writer // conversation
	Term    bool      // Err is a terminal
	Environ []string  // as os.Environ gives it
	UID     int
	Group   string // the group whose members need no sudo
	Now     func() time.Time

	// ReadyWait is how long start waits for the node to become Ready; 0 stands for 3 minutes.
	ReadyWait time.Duration

	// LockWait is how long a command waits for another one that changes addons; 0 stands for 15
	// minutes.
	LockWait time.Duration

	// Exec replaces this process by a program; it returns only on failure.
	Exec func(path string, argv, environ []string) error

	Services service.Manager

	// Parts does what other packages of the product do.
	Parts Parts
}

// Parts are the works of other packages that commands call. main fills it.
type Parts struct {
	// Install sets the node up: folders, argument files, certificates. It does nothing on a
	// node that is set up.
	Install func(ctx context.Context, env snapenv.Env, log *slog.Logger) error

	// Hook runs the snap hook of that name.
	Hook func(ctx context.Context, env snapenv.Env, name string, log *slog.Logger) error

	// RunDaemon prepares a service and replaces this process by it; nil means that the
	// service has nothing to do on this node.
	RunDaemon func(ctx context.Context, env snapenv.Env, name string, log *slog.Logger) error

	// StopContainers ends every container; the kubelet must have been stopped before.
	StopContainers func(ctx context.Context, env snapenv.Env) error

	// ResetNetwork takes the pod network off the host, when no pod is left.
	ResetNetwork func(ctx context.Context, env snapenv.Env) error
}

// Failure is an error with an exit code and hints on what to do next, one per line.
type Failure struct {
	Err   error
	Hints []string
	Code  int // 0 means [ExitError]
}

func (f *Failure) Error() string { return f.Err.Error() }
func (f *Failure) Unwrap() error { return f.Err }

// failf makes a failure with one hint.
func failf(hint, format string, a ...any) error {
	f := &Failure{Err: fmt.Errorf(format, a...)}
	if hint != "" {
		f.Hints = []string{hint}
	}
	return f
}

// exitError ends the program with a code when everything has been said already.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// Main runs the command line argv, whose first word is how the program was called, and gives
// the exit code. It prints the error, if there is one.
func (a *App) Main(ctx context.Context, argv []string) int {
	err := a.dispatch(ctx, words(argv))
	var exit exitError
	var failure *Failure
	switch {
	case err == nil:
		return ExitOK
	case errors.As(err, &exit):
		return int(exit)
	case errors.As(err, &failure):
		fmt.Fprintf(a.Err, "microk8s: %v\n", failure.Err)
		for _, h := range failure.Hints {
			fmt.Fprintf(a.Err, "  %s\n", h)
		}
		a.sayNextStep(argv, failure.Err.Error()+"\n"+strings.Join(failure.Hints, "\n"))
		if failure.Code != 0 {
			return failure.Code
		}
		return ExitError
	case errors.Is(err, context.Canceled):
		fmt.Fprintln(a.Err, "microk8s: interrupted")
		return exitInterrupted
	}
	fmt.Fprintf(a.Err, "microk8s: %v\n", err)
	a.sayNextStep(argv, err.Error())
	return ExitError
}

// nextStep is what a message has that says how to go on: a command, a page, or a thing to do and to run
// the same command again.
var nextStep = regexp.MustCompile(`(?i)microk8s[. ][a-z-]+|\b(sudo|systemctl|sysctl|sh|rm|chmod|ip|snap|openssl|git) |docs/|--[a-z]|\bagain\b`)

// services are the commands that service managers run. The last line that they write is shown as why they
// ended, so nothing follows it.
var services = []string{"daemon", "hook", "supervise"}

// sayNextStep adds a line to a message that does not say how to go on.
func (a *App) sayNextStep(argv []string, text string) {
	if w := words(argv); nextStep.MatchString(text) || len(w) == 0 || slices.Contains(services, w[0]) {
		return
	}
	step, known := nextSteps[words(argv)[0]]
	if !known { // a command that people do not type
		step = "see what is wrong with: microk8s status, and more with: microk8s inspect"
	}
	fmt.Fprintln(a.Err, "  "+step)
}

// nextSteps are the lines of the commands, for errors that do not say how to go on.
var nextSteps = map[string]string{
	"add-node":        "see the nodes with: microk8s kubectl get nodes; what is wrong with: microk8s status",
	"addons":          "see the repositories with: microk8s addons repo list; what is wrong with: microk8s status",
	"backup":          "see the archives with: microk8s backup list; what is wrong with: microk8s status; more in docs/operations.md",
	"completion":      "see the shells with: microk8s completion --help",
	"certs":           "see the certificates of this node alone with: sudo microk8s refresh-certs --check; what is wrong with: microk8s status",
	"config":          "see what there is with: microk8s config --help; what is wrong with: microk8s status",
	"ctr":             "see what is wrong with: microk8s status; the log of containerd with: microk8s logs containerd",
	"dashboard-proxy": "see what it takes with: microk8s dashboard-proxy --help; what is wrong with: microk8s status",
	"dbctl":           "archives are made with: microk8s dbctl backup; see the datastore with: microk8s status",
	"disable":         "see the addons with: microk8s status; what is wrong with: microk8s inspect",
	"enable":          "see the addons with: microk8s status, and what each takes with: microk8s enable ADDON --help",
	"encryption":      "see how far it is with: microk8s encryption status; run the same command again to go on",
	"helm":            "see what is wrong with: microk8s status, and more with: microk8s inspect",
	"helm3":           "see what is wrong with: microk8s status, and more with: microk8s inspect",
	"images":          "see the images with: microk8s images list; what is wrong with: microk8s status",
	"inspect":         "free some space in /var/snap, and see the services with: microk8s logs",
	"join":            "run the same join again, with a new line of microk8s add-node where the token has ended; see this node with: microk8s status; more in docs/cluster.md",
	"kubectl":         "see what is wrong with: microk8s status, and more with: microk8s inspect",
	"leave":           "run it again: microk8s leave goes on where it ended; see this node with: microk8s status; more in docs/cluster.md",
	"logs":            "see the services with: microk8s status; without snapd their logs are files in /var/snap/microk8s/common/var/log, see docs/install.md",
	"network":         "see the ways between nodes with: microk8s network check; what is wrong with: microk8s status",
	"pod-security":    "see the namespaces with: microk8s pod-security status; what is wrong with: microk8s status",
	"recover":         "what is stored was kept; see the datastore with: microk8s status; more in docs/operations.md",
	"refresh-certs":   "see the certificates with: microk8s refresh-certs --check; undo the last change with: microk8s refresh-certs --undo",
	"remove-node":     "see the nodes with: microk8s kubectl get nodes -o wide, and the members of the datastore with: microk8s status",
	"reset":           "run microk8s reset again: it goes on where it ended; see what is wrong with: microk8s status",
	"restore":         "run the same command again: it goes on, or begins again; see what is wrong with: microk8s status; more in docs/operations.md",
	"start":           "see what is wrong with: microk8s status; the services' own words with: microk8s logs",
	"status":          "see the services' own words with: microk8s logs, and more with: microk8s inspect",
	"stop":            "see the services' own words with: microk8s logs; run microk8s stop again",
	"version":         "the package is damaged: install it again, with snapd: snap refresh microk8s; without: see docs/install.md",
}

// exitInterrupted is what a shell reports of a program that SIGINT ended.
const exitInterrupted = 130

// words returns the arguments, with the command first also where the program was called as
// microk8s.<command>.
func words(argv []string) []string {
	if len(argv) == 0 {
		return nil
	}
	if name, ok := strings.CutPrefix(filepath.Base(argv[0]), "microk8s."); ok {
		return append([]string{name}, argv[1:]...)
	}
	return argv[1:]
}

func (a *App) getenv(key string) string {
	for _, kv := range a.Environ {
		if k, v, _ := strings.Cut(kv, "="); k == key {
			return v
		}
	}
	return ""
}

// log returns the logger of commands that other packages write into.
func (a *App) log() *slog.Logger {
	level := slog.LevelWarn
	if a.getenv("MICROK8S_DEBUG") != "" {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(a.Err, &slog.HandlerOptions{Level: level}))
}

// daemonLog returns the logger of hidden commands that run as services.
func (a *App) daemonLog() *slog.Logger {
	return slog.New(slog.NewTextHandler(a.Err, nil))
}

// root builds the command tree.
func (a *App) root() *cobra.Command {
	root := &cobra.Command{
		Use:           "microk8s",
		Short:         "A Kubernetes cluster in one package",
		SilenceUsage:  true,
		SilenceErrors: true,
		// Of letters that may be wrong in a name that is like a command's.
		SuggestionsMinimumDistance: 2,
		CompletionOptions: cobra.CompletionOptions{
			DisableDefaultCmd: true,
		},
	}
	root.SetIn(a.In)
	root.SetOut(a.Out)
	root.SetErr(a.Err)
	root.SetHelpCommand(&cobra.Command{Use: "no-help", Hidden: true})
	for _, c := range a.commands() {
		root.AddCommand(c.build())
	}
	help := root.HelpFunc()
	root.SetHelpFunc(func(cmd *cobra.Command, args []string) {
		help(cmd, args)
		fmt.Fprint(cmd.OutOrStdout(), a.exitHelp(cmd))
	})
	return root
}
