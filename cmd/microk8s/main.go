// Command microk8s is the command line of the product. Everything is in internal/cli; this
// file makes the outside world into the one value it takes, and parts.go ties it to the
// packages that do the work.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/term"

	"microk8s/internal/cli"
	"microk8s/internal/service"
	"microk8s/internal/snapenv"
)

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	env := snapenv.FromEnviron(os.Getenv)
	app := &cli.App{
		Env:      env,
		In:       os.Stdin,
		Out:      os.Stdout,
		Err:      os.Stderr,
		Term:     term.IsTerminal(int(os.Stderr.Fd())),
		Environ:  os.Environ(),
		UID:      os.Geteuid(),
		Group:    snapenv.Group,
		Now:      time.Now,
		Exec:     syscall.Exec,
		Services: service.New(env),
		Parts:    parts(),
	}
	return app.Main(ctx, os.Args)
}
