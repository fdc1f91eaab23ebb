// Command cert-manager is cert-manager's controller, its webhook, its injector of CAs and its solver of HTTP-01
// challenges: which one, the name says by which it is called. Called by any other name it is the solver, whose
// pods the controller makes without a command.
//
// The programs of cert-manager itself are not part of its module, and link the issuer for Venafi, whose library is not
// to be had: here it is left out (ADR 42). This module is named as if it were below cert-manager's, whose internal packages it imports.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/pflag"
	ctrl "sigs.k8s.io/controller-runtime"

	logf "github.com/cert-manager/cert-manager/pkg/logs"
)

// part is one of the programs: it adds its flags, and returns what runs it.
type part func(flags *pflag.FlagSet) func(ctx context.Context) error

func main() {
	name, start := filepath.Base(os.Args[0]), part(nil)
	switch name {
	case "controller":
		start = controllerPart
	case "webhook":
		start = webhookPart
	case "cainjector":
		start = cainjectorPart
	default:
		name, start = "acmesolver", acmesolverPart
	}
	flags := pflag.NewFlagSet(name, pflag.ExitOnError)
	flags.SortFlags = false
	run := start(flags)
	_ = flags.Parse(os.Args[1:]) // it exits
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	logf.InitLogs()
	ctrl.SetLogger(logf.Log)
	err := run(logf.NewContext(ctx, logf.Log, name))
	logf.FlushLogs()
	if err != nil && ctx.Err() == nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
}
