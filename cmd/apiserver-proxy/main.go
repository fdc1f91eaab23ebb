// Command apiserver-proxy connects the programs of a worker to the cluster's API servers.
package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/pflag"

	"microk8s/apiserver-proxy/proxy"
	"microk8s/internal/snapenv"
	"microk8s/internal/workingset"
)

func main() { os.Exit(run()) }

func run() int {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	env := snapenv.FromEnviron(os.Getenv)
	flags, err := proxy.Parse(env, os.Args[1:], os.Stderr)
	if errors.Is(err, pflag.ErrHelp) {
		return 0
	}
	if err != nil {
		log.Error("cannot start", "err", err)
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	go workingset.TrimAfterStart(ctx)
	if err := (&proxy.Program{Env: env, Flags: flags, Log: log}).Run(ctx); err != nil {
		log.Error("the API server proxy ends", "err", err)
		return 1
	}
	return 0
}
