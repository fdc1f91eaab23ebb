// Command agent loads a cluster agent, the real program, with slow, huge and many requests from
// many sources, and prints what it does to the agent's memory and to honest calls.
//
// Nothing fails because of a figure.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"text/tabwriter"
	"time"

	"microk8s/cluster-agent/suite/flood"
)

func main() {
	sources := flag.Int("sources", 50, "addresses that the load comes from")
	during := flag.Duration("during", 20*time.Second, "how long it lasts")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := measure(ctx, *sources, *during); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func measure(ctx context.Context, sources int, during time.Duration) (err error) {
	dir, err := os.MkdirTemp("", "bench-agent-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	program := filepath.Join(dir, "cluster-agent")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-tags", "nosqlite3", "-o", program, "./cmd/cluster-agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot build the agent: %w\n%s", err, out)
	}
	agent, err := flood.Start(ctx, program, filepath.Join(dir, "node"))
	if err != nil {
		return err
	}
	defer agent.Stop()
	r, err := flood.Run(ctx, agent, sources, during)
	if err != nil {
		return err
	}
	fmt.Printf("Cluster agent under a load from %d sources for %v (%d tries)\n\n", sources, during, r.Tries)
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	const mib = 1 << 20
	fmt.Fprintf(table, "what\twithout the load\tunder it\t\n")
	fmt.Fprintf(table, "resident memory, MiB (peak)\t%.0f\t%.0f\t\n", float64(r.Idle)/mib, float64(r.Most)/mib)
	fmt.Fprintf(table, "honest call, median\t%v\t%v\t\n", r.Before.Round(time.Millisecond/10), r.Median.Round(time.Millisecond/10))
	fmt.Fprintf(table, "honest call, slowest\t\t%v\t\n", r.Peak.Round(time.Millisecond/10))
	fmt.Fprintf(table, "honest calls, refused of all\t\t%d of %d\t\n", len(r.Failed), r.Honest)
	return table.Flush()
}
