package cli

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
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
	a.warnOfQuorum(ctx, p)
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

// warnOfQuorum says when the cluster works and would not without this node. Stopping loses nothing,
// so it is not refused: whoever stops a whole cluster stops the last voters, too.
func (a *App) warnOfQuorum(ctx context.Context, p *progress) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	members, err := peers.Members(ctx, a.Env.BackendLive())
	if err != nil {
		return
	}
	voters, alive, self := 0, 0, false
	for _, m := range members {
		if m.Role != storedir.Voter {
			continue
		}
		voters++
		switch {
		case m.Self:
			self = true
		case m.Online:
			alive++
		}
	}
	if need := voters/2 + 1; self && voters > 1 && alive < need && alive+1 >= need {
		p.say("WARNING: without this node %d of the %d voters of the datastore are left, and %d are needed: nothing in the cluster can be read or written until this node or another voter is started", alive, voters, need)
	}
}
