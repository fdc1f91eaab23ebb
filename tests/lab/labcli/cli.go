// Package labcli is the command line of the lab: flags, messages and exit codes around package
// lab, and starting the product in new hosts.
package labcli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	"k8s.io/apimachinery/pkg/api/resource"

	"microk8s/tests/lab"
)

// Streams are the standard streams of the program.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
}

// Exit codes beside those of a command run with exec.
const (
	exitFailure  = 1
	exitUsage    = 2
	exitCannot   = 126 // the host cannot be entered
	exitNotFound = 127 // the command does not exist in the host
)

// Run executes the program with its arguments (without its name) and gives its exit code.
func Run(args []string, s Streams) int {
	// Interrupts end the command in hand; what it did is found again by the next one.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	root := NewCommand(s)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	var exit *exitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		if exit.err != nil {
			fmt.Fprintln(s.Err, "lab:", exit.err)
		}
		return exit.code
	}
	fmt.Fprintln(s.Err, "lab:", err)
	return exitFailure
}

// exitError ends the program with a code; err nil says nothing.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err != nil {
		return e.err.Error()
	}
	return fmt.Sprintf("exit code %d", e.code)
}

func (e *exitError) Unwrap() error { return e.err }

func usage(err error) error { return &exitError{exitUsage, err} }

// options of all commands.
type options struct {
	Streams
	cfg     lab.Config
	verbose bool
}

// NewCommand builds the command tree.
func NewCommand(s Streams) *cobra.Command {
	o := &options{Streams: s}
	root := &cobra.Command{
		Use:   "lab",
		Short: "Many hosts on one Linux machine, each running the product",
		Long: `lab runs hosts in namespaces of this machine, each with an address, a disk and the
product from build/snap at its real paths. Hosts can be switched off and on, frozen,
cut off from each other and given a small disk. They have no way out to any network.
It needs root, and neither systemd nor docker nor the internet.`,
		Example: `  lab up n1 n2                     two hosts with the product running
  lab exec n1 -- microk8s status   run a command in one
  lab kill n1 && lab start n1      power loss and return
  lab cut n1 n2; lab heal          a broken cable, and a new one
  lab room                         how many hosts fit on this machine
  lab record met.yaml; lab kill n1; lab start n1; lab record --stop
  lab play met.yaml                the same again, with the times
  lab down                         remove everything`,
		SilenceErrors:     true,
		SilenceUsage:      true,
		Args:              cobra.NoArgs,
		PersistentPreRunE: func(*cobra.Command, []string) error { return o.complete() },
		RunE:              func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetIn(s.In)
	root.SetOut(s.Out)
	root.SetErr(s.Err)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage(fmt.Errorf("%w\nsee %s --help", err, cmd.CommandPath()))
	})
	f := root.PersistentFlags()
	f.StringVar(&o.cfg.Snap, "snap", "", "built product tree (default ../snap next to this program)")
	f.StringVar(&o.cfg.StateDir, "state", lab.DefaultStateDir, "directory for the hosts' disks")
	f.StringVar(&o.cfg.Instance, "instance", lab.DefaultInstance, "name of the lab, to have several side by side")
	f.BoolVarP(&o.verbose, "verbose", "v", false, "say what is done to the machine")
	root.AddCommand(o.up(), o.exec(), o.ip(), o.ls(), o.kill(), o.start(), o.pause(), o.resume(), o.cut(), o.heal(), o.disk(), o.down(), o.room(), o.play(), o.record())
	for _, c := range root.Commands() {
		if c.Args != nil {
			check := c.Args
			c.Args = func(cmd *cobra.Command, args []string) error {
				if err := check(cmd, args); err != nil {
					return usage(fmt.Errorf("%w\nusage: %s", err, cmd.UseLine()))
				}
				return nil
			}
		}
	}
	return root
}

func (o *options) complete() error {
	if o.cfg.Snap == "" {
		if exe, err := os.Executable(); err == nil {
			o.cfg.Snap = filepath.Join(filepath.Dir(exe), "../snap")
		}
	}
	level := slog.LevelWarn
	if o.verbose {
		level = slog.LevelDebug
	}
	o.cfg.Log = slog.New(slog.NewTextHandler(o.Err, &slog.HandlerOptions{Level: level}))
	return nil
}

func (o *options) lab() (*lab.Lab, error) { return lab.New(o.cfg) }

// hosts completes names of hosts on the command line.
func (o *options) hosts(limit int) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		l, err := o.lab()
		if err != nil || (limit > 0 && len(args) >= limit) {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		infos, _ := l.List(cmd.Context())
		var names []cobra.Completion
		for _, i := range infos {
			names = append(names, i.Name)
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

// simple is a command that does one thing to a lab.
func (o *options) simple(use, short, long string, args cobra.PositionalArgs, limit int, do func(context.Context, *lab.Lab, []string) error) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Long: long, Args: args, ValidArgsFunction: o.hosts(limit), DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := o.lab()
			if err != nil {
				return err
			}
			if err := do(cmd.Context(), l, args); err != nil {
				return err
			}
			return o.recorded(cmd.Name(), args)
		},
	}
}

// each does the same to several hosts, one after the other.
func each(do func(context.Context, *lab.Lab, string) error) func(context.Context, *lab.Lab, []string) error {
	return func(ctx context.Context, l *lab.Lab, names []string) error {
		for _, n := range names {
			if err := do(ctx, l, n); err != nil {
				return err
			}
		}
		return nil
	}
}

func (o *options) up() *cobra.Command {
	var (
		noStart bool
		opt     lab.Options
	)
	c := o.simple("up NAME…", "Create hosts and start the node on each",
		`Creates the hosts that do not exist, switches on those that are off, and starts the product
on each. What was interrupted goes on where it was. Before hosts of its own limits of the kernel get too
few, it raises them, and lab down restores them; lab room says how many hosts fit. Returns when its services are started; lab exec NAME -- microk8s status --wait-ready
waits for the node.`, cobra.MinimumNArgs(1), 0,
		func(ctx context.Context, l *lab.Lab, names []string) error {
			if !noStart {
				if st, err := os.Stat(filepath.Join(o.cfg.Snap, "bin/microk8s")); err != nil || st.IsDir() {
					return fmt.Errorf("there is no product in %s: run make build, name its directory with --snap, or use --no-start", o.cfg.Snap)
				}
			} else if _, err := os.Stat(o.cfg.Snap); err != nil {
				cfg := o.cfg
				cfg.Snap = ""
				if l, err = lab.New(cfg); err != nil {
					return err
				}
			}
			if err := o.makeRoom(ctx, l, names); err != nil {
				return err
			}
			for _, n := range names {
				if err := l.Up(ctx, n, opt); err != nil {
					return err
				}
				ip, err := l.IP(n)
				if err != nil {
					return err
				}
				fmt.Fprintf(o.Err, "%s: host is up at %s\n", n, ip)
			}
			if noStart {
				return nil
			}
			return o.startProduct(ctx, l, names)
		})
	c.Flags().BoolVar(&noStart, "no-start", false, "only make the hosts, do not start the product")
	c.Flags().BoolVar(&opt.DefaultRoute, "default-route", false, "give new hosts a default route (on which nobody answers)")
	c.Flags().Var(&opt.IPv6, "ipv6", "give new hosts an IPv6 address, too; --ipv6=only: and none of IPv4")
	c.Flags().Lookup("ipv6").NoOptDefVal = string(lab.DualIPv6)
	c.ValidArgsFunction = cobra.NoFileCompletions
	return c
}

// startProduct runs the product's start command on all hosts at once.
func (o *options) startProduct(ctx context.Context, l *lab.Lab, names []string) error {
	var wg sync.WaitGroup
	errs := make([]error, len(names))
	out := &lineWriter{w: o.Err}
	for i, n := range names {
		fmt.Fprintf(o.Err, "%s: starting the services\n", n)
		wg.Go(func() {
			w := out.prefixed(n + ": ")
			err := l.Exec(ctx, n, lab.Command{Args: []string{"microk8s", "start"}, Stdout: w, Stderr: w})
			w.flush()
			if err != nil {
				errs[i] = fmt.Errorf("cannot start the product on %s: microk8s start: %w", n, err)
				return
			}
			out.line(n + ": services are started")
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (o *options) exec() *cobra.Command {
	c := &cobra.Command{
		Use:   "exec NAME -- CMD…",
		Short: "Run a command in a host",
		Long: `Runs a command in a host as root. Input, output, terminal and exit code are those of the
command. /snap/bin is in its PATH. Exit code 126 means that the host cannot be entered,
127 that the command does not exist there.`,
		Args:                  cobra.MinimumNArgs(2),
		ValidArgsFunction:     o.hosts(1),
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := o.lab()
			if err != nil {
				return err
			}
			if args[1] == "--" {
				args = append(args[:1:1], args[2:]...)
			}
			if len(args) < 2 {
				return usage(fmt.Errorf("no command is given\nusage: %s", cmd.UseLine()))
			}
			return o.runExec(l, args[0], args[1:])
		},
	}
	c.Flags().SetInterspersed(false)
	return c
}

// runExec does not use the command's context: a signal is for the program in the host, which
// decides itself whether to end.
func (o *options) runExec(l *lab.Lab, name string, args []string) error {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, os.Interrupt, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(signals)
	cmd, err := l.Spawn(context.Background(), name, lab.Command{Args: args, Stdin: o.In, Stdout: o.Out, Stderr: o.Err})
	if errors.Is(err, exec.ErrNotFound) {
		return &exitError{exitNotFound, fmt.Errorf("%s has no command %s", name, args[0])}
	}
	if err != nil {
		return &exitError{exitCannot, err}
	}
	onTerminal := false
	if f, ok := o.In.(*os.File); ok {
		onTerminal = term.IsTerminal(int(f.Fd()))
	}
	done := make(chan struct{})
	go func() {
		for {
			select {
			case s := <-signals:
				// The terminal has sent ^C and ^\ to the command already.
				if !onTerminal || s == syscall.SIGTERM || s == syscall.SIGHUP {
					_ = cmd.Process.Signal(s)
				}
			case <-done:
				return
			}
		}
	}()
	err = cmd.Wait()
	close(done)
	if err := o.recordExec(name, args, cmd.ProcessState.ExitCode()); err != nil {
		fmt.Fprintln(o.Err, "lab: not recorded:", err)
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			return &exitError{128 + int(ws.Signal()), nil}
		}
		return &exitError{exit.ExitCode(), nil}
	}
	if errors.Is(err, exec.ErrWaitDelay) {
		return nil // the command ended well and left something in the background
	}
	return err
}

func (o *options) ip() *cobra.Command {
	var six bool
	c := o.simple("ip NAME", "Print a host's address", "", cobra.ExactArgs(1), 1,
		func(_ context.Context, l *lab.Lab, args []string) error {
			find := l.IP
			if six {
				find = l.IP6
			}
			ip, err := find(args[0])
			if err == nil {
				fmt.Fprintln(o.Out, ip)
			}
			return err
		})
	c.Flags().BoolVarP(&six, "ipv6", "6", false, "print that of IPv6")
	return c
}

func (o *options) ls() *cobra.Command {
	var output string
	c := o.simple("ls", "List hosts, addresses and states", "", cobra.NoArgs, 0,
		func(ctx context.Context, l *lab.Lab, _ []string) error {
			infos, err := l.List(ctx)
			if err != nil {
				return err
			}
			switch output {
			case "json":
				if infos == nil {
					infos = []lab.Info{}
				}
				enc := json.NewEncoder(o.Out)
				enc.SetIndent("", "  ")
				return enc.Encode(infos)
			case "":
			default:
				return usage(fmt.Errorf("cannot print as %q: the format is json or none", output))
			}
			if len(infos) == 0 {
				fmt.Fprintln(o.Err, "no hosts; create one with lab up NAME")
				return nil
			}
			w := tabwriter.NewWriter(o.Out, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "NAME\tADDRESS\tSTATE\tDISK\tCUT")
			for _, i := range infos {
				disk, cut := "-", "-"
				if i.Disk > 0 {
					disk = resource.NewQuantity(i.Disk, resource.BinarySI).String()
				}
				if len(i.Cut) > 0 {
					cut = strings.Join(i.Cut, ",")
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", i.Name, i.Address, i.State, disk, cut)
			}
			return w.Flush()
		})
	c.Flags().StringVarP(&output, "output", "o", "", "json, or a table if not given")
	return c
}

func (o *options) kill() *cobra.Command {
	return o.simple("kill NAME…", "Power off: everything in a host dies at once, its disk is kept", "",
		cobra.MinimumNArgs(1), 0, each(func(ctx context.Context, l *lab.Lab, n string) error { return l.Kill(ctx, n) }))
}

func (o *options) start() *cobra.Command {
	return o.simple("start NAME…", "Switch hosts on again after kill", `Switches hosts on. The product comes up by itself if it was running when the host was killed.`,
		cobra.MinimumNArgs(1), 0, each(func(ctx context.Context, l *lab.Lab, n string) error { return l.Start(ctx, n) }))
}

func (o *options) pause() *cobra.Command {
	return o.simple("pause NAME…", "Freeze all processes of a host", "",
		cobra.MinimumNArgs(1), 0, each(func(ctx context.Context, l *lab.Lab, n string) error { return l.Pause(ctx, n) }))
}

func (o *options) resume() *cobra.Command {
	return o.simple("resume NAME…", "Let a paused host go on", "",
		cobra.MinimumNArgs(1), 0, each(func(ctx context.Context, l *lab.Lab, n string) error { return l.Resume(ctx, n) }))
}

func (o *options) cut() *cobra.Command {
	return o.simple("cut A [B]", "Drop traffic between two hosts, or between one and all others", "",
		cobra.RangeArgs(1, 2), 2, func(ctx context.Context, l *lab.Lab, args []string) error {
			return l.Cut(ctx, args[0], strings.Join(args[1:], ""))
		})
}

func (o *options) heal() *cobra.Command {
	return o.simple("heal [A [B]]", "Undo cuts: all, those of one host, or one", "",
		cobra.MaximumNArgs(2), 2, func(ctx context.Context, l *lab.Lab, args []string) error {
			return l.Heal(ctx, args...)
		})
}

func (o *options) disk() *cobra.Command {
	return o.simple("disk NAME SIZE", "Put a host's data on a file system of that size (500Mi, 2G; 0 is no limit)",
		`Puts /var/snap of the host on a file system of the given size, so that it can be filled up.
The data is kept. A running host is switched off and on again for it.`,
		cobra.ExactArgs(2), 1, func(ctx context.Context, l *lab.Lab, args []string) error {
			size, err := parseSize(args[1])
			if err != nil {
				return usage(err)
			}
			return l.Disk(ctx, args[0], size)
		})
}

func parseSize(s string) (int64, error) {
	// "G" and "GB" mean what "Gi" does, as for other disk tools.
	norm := strings.TrimSuffix(strings.ToUpper(s), "B")
	if len(norm) > 0 && strings.ContainsRune("KMGT", rune(norm[len(norm)-1])) {
		norm = norm[:len(norm)-1] + norm[len(norm)-1:] + "i"
	} else if strings.HasSuffix(norm, "I") {
		norm = strings.TrimSuffix(norm, "I") + "i"
	}
	q, err := resource.ParseQuantity(norm)
	if err != nil || q.Sign() < 0 || s[0] < '0' || s[0] > '9' {
		return 0, fmt.Errorf("cannot use %q as a size: write a number of bytes, or 500M, 2Gi", s)
	}
	return q.Value(), nil
}

func (o *options) down() *cobra.Command {
	return o.simple("down [NAME…]", "Remove hosts (all of them without names) and every trace of them",
		`Removes hosts with their disks; without names the whole lab, also what a crash of it left.`,
		nil, 0, func(ctx context.Context, l *lab.Lab, args []string) error {
			if err := l.Down(ctx, args...); err != nil || len(args) > 0 {
				return err
			}
			return o.restoreLimits()
		})
}
