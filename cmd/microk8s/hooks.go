package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"time"

	"microk8s/cluster-agent/launchconf"
	"microk8s/internal/cluster"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/hook"
	"microk8s/internal/hostnet"
	"microk8s/internal/hostprobe"
	"microk8s/internal/images"
	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/service"
	"microk8s/internal/setup"
	"microk8s/internal/snapenv"
	"microk8s/internal/status"
	"microk8s/internal/turn"
)

// runHook runs one of snapd's hooks.
func runHook(ctx context.Context, env snapenv.Env, name string, log *slog.Logger) error {
	return hooks(env, log).Run(ctx, name)
}

// hooks ties the hooks to the packages that do the work.
func hooks(env snapenv.Env, log *slog.Logger) *hook.Runner {
	return &hook.Runner{
		Env:         env,
		Log:         log,
		Snapctl:     snapctl(env),
		Install:     setup.Install,
		Configure:   setup.Configure,
		Refresh:     setup.Refresh,
		Remove:      remove,
		Members:     peers.Members,
		Turn:        turn.Lease{Core: (&kube.File{Path: env.AdminKubeconfig()}).Core},
		TurnWait:    turnWait,
		CheckConfig: func(text []byte, strict bool) error { return checkConfig(env, text, strict, log) },
		PreInit:     launchconf.PreInit,
		Health:      func(ctx context.Context) (state, message string) { return health(ctx, env) },
	}
}

// turnWait is what snapd's user waits at most when another node is refreshed.
const turnWait = time.Minute

// checkConfig finds all mistakes in a launch configuration. What is a warning about a file,
// which may be for a later version, is a slip at a prompt.
func checkConfig(env snapenv.Env, text []byte, strict bool, log *slog.Logger) error {
	_, warnings, err := launchconf.Parse(text)
	if err == nil {
		err = launchconf.Validate(context.Background(), env, text)
	}
	errs := []error{err}
	for _, w := range warnings {
		if strict {
			errs = append(errs, errors.New(w))
		} else {
			log.Warn("launch configuration: " + w)
		}
	}
	return errors.Join(errs...)
}

// snapctl runs snapd's; where there is no snapd nothing is set, and nobody is told.
func snapctl(env snapenv.Env) func(context.Context, ...string) (string, error) {
	if !env.Snapd {
		return func(context.Context, ...string) (string, error) { return "", nil }
	}
	return func(ctx context.Context, args ...string) (string, error) {
		var out, errOut bytes.Buffer
		cmd := exec.CommandContext(ctx, "snapctl", args...)
		cmd.Stdout, cmd.Stderr = &out, &errOut
		if err := cmd.Run(); err != nil {
			return "", fmt.Errorf("snapctl %s: %w: %s", args[0], err, strings.TrimSpace(errOut.String()))
		}
		return out.String(), nil
	}
}

// healthBudget is how long the health check waits for an answer of each part of the node.
const healthBudget = 5 * time.Second

// health says how the node is in the words of snapd.
func health(ctx context.Context, env snapenv.Env) (state, message string) {
	if nodeconfig.ReadState(env).Stopped {
		return "okay", ""
	}
	report := (&status.Prober{Env: env, Manager: service.New(env), Now: time.Now, Budget: healthBudget}).Probe(ctx)
	switch {
	case len(report.Problems) > 0 && report.Ready:
		return "error", report.Problems[0].What
	case report.Ready, nodeconfig.ReadState(env).Worker && len(report.Problems) == 0:
		return "okay", ""
	}
	return "waiting", "the node is not Ready yet; see microk8s status --wait-ready"
}

// remove takes the node off the host. snapd has stopped the services before; our supervisor
// is told to. Every part is tried whatever became of the others. The containers' data goes
// too, which snapd would otherwise copy into the snapshot that it takes next.
func remove(ctx context.Context, env snapenv.Env, log *slog.Logger) error {
	var errs []error
	try := func(err error) { errs = append(errs, err) }
	// A member that just goes is a vote that the others wait for, or the end of a cluster of two.
	if err := (&cluster.Node{Env: env, Log: log}).Depart(ctx); err != nil {
		log.Warn("the cluster was not told that this node goes; on another node run: microk8s remove-node NAME --force", "err", err)
	}
	if services := service.New(env); !env.Snapd {
		try(services.Stop(ctx, service.Kubelite))
		try(images.StopAll(ctx, env))
		try(services.Stop(ctx))
	} else {
		try(images.StopAll(ctx, env))
		// A unit that failed would stay in systemd's list of failures after it is gone.
		_ = exec.CommandContext(ctx, "systemctl", "reset-failed", "snap."+env.Name+".daemon-*").Run()
	}
	try(images.Discard(env))
	try(hostnet.Cleanup(ctx, env)) // before setup.Remove: it reads the network's configuration
	try(setup.Remove(ctx, env, log))
	for _, dir := range []string{env.ContainerdRoot(), env.ContainerdState(), env.KubeletRoot()} {
		try(removeUnmounted(env, dir))
	}
	return errors.Join(errs...)
}

// removeUnmounted deletes a directory unless something is still mounted in it, whose content
// would go with it.
func removeUnmounted(env snapenv.Env, dir string) error {
	if points := hostprobe.Probe(env.Host).MountsBelow(dir); len(points) > 0 {
		return fmt.Errorf("%s is left alone: something is mounted at %s", dir, points[0])
	}
	return os.RemoveAll(dir)
}
