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
	"time"

	"microk8s/cluster-agent/suite/flood"
	"microk8s/tests/bench/report"
)

func main() {
	sources := flag.Int("sources", 50, "addresses that the load comes from")
	during := flag.Duration("during", 20*time.Second, "how long it lasts")
	page := report.Flag()
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := measure(ctx, *page, *sources, *during); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func measure(ctx context.Context, page string, sources int, during time.Duration) (err error) {
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
	const mib = 1 << 20
	table := &report.Table{
		Title: "The cluster agent under a load of strangers", Part: "agent", Head: []string{"what", "without the load", "under it"},
		About: fmt.Sprintf("The load comes from %d sources for %v (%d tries).", sources, during, r.Tries),
		Rows: [][]string{
			{"resident memory, MiB (peak)", fmt.Sprintf("%.0f", float64(r.Idle)/mib), fmt.Sprintf("%.0f", float64(r.Most)/mib)},
			{"honest call, median", r.Before.Round(time.Millisecond / 10).String(), r.Median.Round(time.Millisecond / 10).String()},
			{"honest call, slowest", "", r.Peak.Round(time.Millisecond / 10).String()},
			{"honest calls, refused of all", "", fmt.Sprintf("%d of %d", len(r.Failed), r.Honest)},
		},
	}
	return table.Write(os.Stdout, page)
}
