// Package agreement keeps a summary of the API server's arguments, and the agent's port, in the record
// of this control-plane node, so that `microk8s status` on any of them can name those in which they
// differ (ADR 28). It follows the argument files and all files that arguments name.
package agreement

import (
	"context"
	"log/slog"
	"time"

	"microk8s/internal/filewatch"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/noderegistry"
	"microk8s/internal/serverargs"
	"microk8s/internal/snapenv"
)

// Controller writes the summary of one node.
type Controller struct {
	Env   snapenv.Env
	Node  string // its name
	Nodes noderegistry.Registry
	Log   *slog.Logger
}

// Pauses.
const (
	settle = 300 * time.Millisecond // editors write in several steps
	retry  = 3 * time.Second        // while the API server is down, or the node has no record yet
	// sweep is how often the record is looked at: a control-plane node of an earlier build may have
	// rewritten it without the summary, and no watch reports a folder that is made later.
	sweep = time.Minute
)

// Run goes on until ctx ends.
func (k *Controller) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		if !k.once(ctx) {
			return nil
		}
	}
	return nil
}

// once writes the summary and waits until it may have changed. It reports whether to go on.
func (k *Controller) once(ctx context.Context) bool {
	summary, used, err := serverargs.Summarize(k.Env)
	match, folders := filewatch.Files(append(used, k.Env.Args("cluster-agent"))...)
	// Watching begins before the files are read again, so that no change falls in between.
	watch, cancel := context.WithCancel(ctx)
	defer cancel()
	changed, watchErr := filewatch.Watch(watch, filewatch.Options{Settle: settle, Match: match, Missing: true}, folders...)
	if watchErr != nil {
		k.Log.Debug("the API server's arguments cannot be watched now", "err", watchErr)
	} else {
		summary, _, err = serverargs.Summarize(k.Env)
	}
	pause := sweep
	if err == nil {
		err = k.Nodes.Change(ctx, k.Node, func(r *noderegistry.Record) error {
			r.ServerArguments, r.AgentPort = summary.String(), nodeconfig.Load(k.Env).AgentPort
			return nil
		})
	}
	if err != nil { // a file that cannot be read now keeps what was said before
		k.Log.Debug("the summary of the API server's arguments is not written", "err", err)
		pause = retry
	}
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-changed: // also when watching has failed and the channel is closed or nil
	case <-timer.C:
	}
	return true
}
