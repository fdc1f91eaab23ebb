// Command ingress-secrets runs beside the controller of the addon ingress, in its pod, and serves
// it the certificates of its Ingresses. Everything is in internal/ingresssecrets.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"microk8s/internal/ingresssecrets"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := ingresssecrets.Run(ctx, os.Args[1:], os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "ingress-secrets:", err)
		os.Exit(1)
	}
}
