package main

import (
	"context"
	"errors"
	"log/slog"

	"microk8s/internal/cli"
	"microk8s/internal/daemon"
	"microk8s/internal/hostnet"
	"microk8s/internal/images"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/setup"
	"microk8s/internal/snapenv"
)

func parts() cli.Parts {
	return cli.Parts{
		Install:        install,
		Hook:           runHook,
		RunDaemon:      daemon.Run,
		StopContainers: stopContainers,
		ResetNetwork:   hostnet.Cleanup,
	}
}

// stopContainers ends every container and takes the accept rules for pods out of the host's
// firewall, where they have no business while nothing of ours runs.
func stopContainers(ctx context.Context, env snapenv.Env) error {
	return errors.Join(images.StopAll(ctx, env), hostnet.RemoveAccepts())
}

// install sets the node up as the hook of snapd does, with the launch configuration that a
// person has left for it, or brings one that is set up in line with this version of the package.
func install(ctx context.Context, env snapenv.Env, log *slog.Logger) error {
	if nodeconfig.ReadState(env).Installed {
		return setup.Configure(ctx, env, log)
	}
	return hooks(env, log).Run(ctx, "install")
}
