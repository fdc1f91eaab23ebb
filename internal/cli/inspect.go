package cli

import (
	"errors"
	"os"

	"github.com/spf13/cobra"

	"microk8s/internal/inspect"
)

func (a *App) newInspect() *cobra.Command {
	return &cobra.Command{
		Use:   "inspect",
		Short: "Check this node for known problems, and collect a report",
		Long: `Collect logs, arguments and the state of the cluster and of the machine into one tarball that
can be shown to others: keys, tokens and passwords are taken out. Warnings are printed on the
way. Exit code 1 means that a service which should run does not.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if _, err := os.Stat(a.Env.Data); errors.Is(err, os.ErrNotExist) {
				return errNotSetUp()
			}
			in := &inspect.Inspector{Env: a.Env, Manager: a.Services, Out: a.Out, Now: a.Now}
			_, err := in.Inspect(cmd.Context())
			if errors.Is(err, inspect.ErrDown) {
				return exitError(ExitError)
			}
			if err != nil {
				return explain("cannot inspect the node", err)
			}
			return nil
		},
	}
}
