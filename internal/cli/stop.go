package cli

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"microk8s/internal/service"
	"microk8s/internal/snapenv"
)

// stopContainersWait bounds the orderly end of the containers; what is left then is killed
// with its shims when the services are stopped.
const stopContainersWait = 60 * time.Second

func (a *App) newStop() *cobra.Command {
	return &cobra.Command{
		Use:   "stop",
		Short: "Stop the services of this node and all its containers",
		Long: `Stop the services of this node and all its containers. They stay stopped, across reboots,
until microk8s start. The cluster's data and the data of volumes are kept.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.stop(cmd.Context()) },
	}
}

func (a *App) stop(ctx context.Context) error {
	p := a.progress()
	err := p.step("Stopping Kubernetes", func() error { return a.Services.Stop(ctx, service.Kubelite) })
	if err != nil {
		if a.Env.Snapd {
			return failf(err.Error(), `Failed to stop microk8s services. Check snapd logs with "journalctl -u snapd.service"`)
		}
		return explain("cannot stop the services", err)
	}
	err = p.step("Stopping the containers", func() error {
		limit, cancel := context.WithTimeout(ctx, stopContainersWait)
		defer cancel()
		return a.Parts.StopContainers(limit, a.Env)
	})
	if err := ctx.Err(); err != nil {
		return err
	}
	if err != nil {
		p.say("some containers could not be stopped cleanly and are killed: %v", err)
	}
	if err := p.step("Stopping the other services", func() error { return a.Services.Stop(ctx) }); err != nil {
		return explain("cannot stop the services", err)
	}
	if err := makeLock(a.Env, snapenv.LockStopped); err != nil {
		return err
	}
	p.say("The node is stopped. Start it again with: microk8s start")
	return nil
}
