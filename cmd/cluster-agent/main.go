// Command cluster-agent answers the nodes of a cluster over HTTPS and keeps this node's
// certificates in order.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/pflag"

	"microk8s/cluster-agent/agent"
	"microk8s/internal/service"
	"microk8s/internal/snapenv"
	"microk8s/internal/workingset"
)

func main() { os.Exit(run()) }

func run() int {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	env := snapenv.FromEnviron(os.Getenv)
	if len(os.Args) > 1 && os.Args[1] == agent.InitCommand {
		err := agent.Init(ctx, env, os.Args[2:], os.Stdin, os.Stdout, log)
		switch {
		case errors.Is(err, pflag.ErrHelp):
			return 0
		case err != nil:
			fmt.Fprintln(os.Stderr, "cluster-agent: cannot apply the launch configuration:", err) // for a person
			return 1
		}
		return 0
	}
	flags, err := agent.Parse(os.Args[1:], os.Stderr)
	if errors.Is(err, pflag.ErrHelp) {
		return 0
	}
	if err != nil {
		log.Error("cannot start", "err", err)
		return 2
	}
	go workingset.TrimAfterStart(ctx)
	if err := agent.Run(ctx, env, flags, service.New(env), log); err != nil {
		log.Error("the cluster agent ends", "err", err)
		return 1
	}
	return 0
}
