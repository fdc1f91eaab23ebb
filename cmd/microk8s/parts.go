package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"microk8s/internal/cli"
	"microk8s/internal/daemon"
	"microk8s/internal/hostnet"
	"microk8s/internal/images"
	"microk8s/internal/service"
	"microk8s/internal/setup"
	"microk8s/internal/snapenv"
)

func parts() cli.Parts {
	return cli.Parts{
		Install:        install,
		Hook:           hook,
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

// install sets the node up, or brings one that is in line with this version of the package.
func install(ctx context.Context, env snapenv.Env, log *slog.Logger) error {
	if env.Locked(snapenv.LockInstalled) {
		return setup.Configure(ctx, env, log)
	}
	return setup.Install(ctx, env, log)
}

// hook runs one of snapd's hooks.
func hook(ctx context.Context, env snapenv.Env, name string, log *slog.Logger) error {
	switch name {
	case "install":
		return setup.Install(ctx, env, log)
	case "configure", "post-refresh":
		return setup.Configure(ctx, env, log)
	case "remove":
		return remove(ctx, env, log)
	}
	return fmt.Errorf("cannot run hook %q: there is no such hook", name)
}

// remove takes the node off the host. Under snapd the services have been stopped by then;
// stopping what is stopped does no harm. Every part is tried whatever became of the others.
func remove(ctx context.Context, env snapenv.Env, log *slog.Logger) error {
	services := service.New(env)
	return errors.Join(
		services.Stop(ctx, service.Kubelite),
		images.StopAll(ctx, env),
		services.Stop(ctx),
		images.Discard(env),
		hostnet.Cleanup(ctx, env), // before setup.Remove: it reads the network's configuration
		setup.Remove(ctx, env, log),
	)
}
