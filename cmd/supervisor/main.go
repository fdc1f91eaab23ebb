// Command supervisor runs the services of a node on a machine without snapd. `microk8s supervise`
// becomes it: a program of its own, because it runs as long as the node and the command line is large.
package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/pflag"

	"microk8s/internal/service"
	"microk8s/internal/snapenv"
	"microk8s/internal/workingset"
)

func main() { os.Exit(run()) }

func run() int {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	flags := pflag.NewFlagSet("supervisor", pflag.ContinueOnError)
	boot := flags.Bool("boot", false, "start what ran when the machine went down; end at once if that is nothing")
	readyFD := flags.Int("ready-fd", 0, "descriptor to write to when requests are served")
	if err := flags.Parse(os.Args[1:]); err != nil {
		if errors.Is(err, pflag.ErrHelp) {
			return 0
		}
		log.Error("cannot start", "err", err)
		return 2
	}
	var ready io.WriteCloser
	if *readyFD > 0 {
		syscall.CloseOnExec(*readyFD)
		ready = os.NewFile(uintptr(*readyFD), "ready")
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	go workingset.TrimAfterStart(ctx)
	if err := service.Supervise(ctx, snapenv.FromEnviron(os.Getenv), log, os.Environ(), *boot, ready); err != nil {
		log.Error("the supervisor ends", "err", err)
		return 1
	}
	return 0
}
