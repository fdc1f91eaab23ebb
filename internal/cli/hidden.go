package cli

import (
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"microk8s/internal/service"
)

func (a *App) newDaemon() *cobra.Command {
	return &cobra.Command{
		Use:    "daemon NAME",
		Short:  "Prepare a service of this node and become it",
		Hidden: true,
		Args:   one("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := service.Resolve(args[0])
			if err != nil {
				return err
			}
			if err := service.TieToSupervisor(a.getenv); err != nil {
				return err
			}
			err = a.Parts.RunDaemon(cmd.Context(), a.Env, name, a.daemonLog())
			if err == nil && service.Supervised(a.getenv) {
				return exitError(service.ExitIdle)
			}
			return err
		},
	}
}

func (a *App) newHook() *cobra.Command {
	return &cobra.Command{
		Use:    "hook NAME",
		Short:  "Run a snap hook: install, configure, remove and so on",
		Hidden: true,
		Args:   one("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.Parts.Hook(cmd.Context(), a.Env, args[0], a.daemonLog())
		},
	}
}

func (a *App) newSupervise() *cobra.Command {
	var boot bool
	var readyFD int
	cmd := &cobra.Command{
		Use:    "supervise [--boot]",
		Short:  "Run the services of a node on a machine without snapd, in the foreground",
		Hidden: true,
		Args:   noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// It runs as long as the node does: a program of its own takes a tenth of this one's memory.
			path := a.Env.Bin("supervisor")
			argv := []string{path, fmt.Sprintf("--boot=%t", boot), fmt.Sprintf("--ready-fd=%d", readyFD)}
			if err := a.Exec(path, argv, a.Environ); err != nil {
				return fmt.Errorf("cannot run %s: %w; reinstall MicroK8s", path, err)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&boot, "boot", false, "start what ran when the machine went down; end at once if that is nothing")
	cmd.Flags().IntVar(&readyFD, "ready-fd", 0, "descriptor to write to when requests are served")
	return cmd
}

// one wants exactly one argument.
func one(name string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch len(args) {
		case 0:
			return &usageError{cmd, fmt.Errorf("Missing argument '%s'.", name)}
		case 1:
			return nil
		}
		return &usageError{cmd, fmt.Errorf("unexpected argument: %s", args[1])}
	}
}

func (a *App) newFindResolvConf() *cobra.Command {
	return &cobra.Command{
		Use:    "find-resolv-conf [FILE...]",
		Short:  "Print the first resolver configuration that pods can use",
		Hidden: true,
		RunE: func(_ *cobra.Command, files []string) error {
			if len(files) == 0 {
				files = []string{a.Env.HostPath("etc/resolv.conf"), a.Env.HostPath("run/systemd/resolve/resolv.conf")}
			}
			for _, f := range files {
				if data, err := os.ReadFile(f); err == nil && usableInPods(string(data)) {
					fmt.Fprintln(a.Out, f)
					return nil
				}
			}
			return nil
		},
	}
}

// usableInPods reports whether a resolv.conf names servers and none of them is on the loopback,
// which inside a pod would be the pod itself.
func usableInPods(text string) bool {
	found := false
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		addr, err := netip.ParseAddr(f[1]) // a scope such as %eth0 is part of the address
		if err != nil || addr.IsLoopback() {
			return false
		}
		found = true
	}
	return found
}
