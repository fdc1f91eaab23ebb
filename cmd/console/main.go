// Command console serves the console in a pod of the addon dashboard. Everything is in
// internal/console/inpod.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"microk8s/internal/console/inpod"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := inpod.Run(ctx, os.Args[1:], os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "console:", err)
		os.Exit(1)
	}
}
