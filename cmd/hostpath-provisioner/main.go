// Command hostpath-provisioner runs on each node of a cluster with the addon hostpath-storage
// and makes the volumes there. Everything is in internal/hostpath.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"microk8s/internal/hostpath"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := hostpath.Run(ctx, os.Args[1:], os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "hostpath-provisioner:", err)
		os.Exit(1)
	}
}
