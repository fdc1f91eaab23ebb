package cli

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/spf13/cobra"

	"microk8s/internal/cluster"
	"microk8s/internal/journal"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/nodecopy"
)

func (a *App) newLeave() *cobra.Command {
	var o cluster.LeaveOptions
	yes := false
	cmd := &cobra.Command{
		Use:   "leave [--force [--yes]]",
		Short: "Leave the cluster; this node starts over with a cluster of its own",
		Long: `The node will depart from the cluster it is in, and become a cluster of its own again: an
empty one, with new keys. The others finish the removal with microk8s remove-node.

With --force it leaves even if the others cannot be reached. Its copy of the cluster's data is then
kept beside the new one. If no other voter answers, that copy may be the last one: the command asks
first, or requires --yes.

On a copy of another node's disk, which has another address, it leaves the other node alone.

An interrupted leave is finished when it is run again; an interrupted join is undone.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Confirm = func(question string) error { return a.confirm(question, yes, "") }
			return a.leave(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVar(&o.Force, "force", false, "leave even if no other node can be reached; then remove this node there with remove-node --force")
	addYes(cmd.Flags(), &yes)
	return cmd
}

// stoppedUnlessChanging refuses on a stopped node, except where an interrupted change is the
// reason for that.
func (a *App) stoppedUnlessChanging() error {
	if r, err := cluster.Pending(a.Env); err != nil || r != nil {
		return nil //nolint:nilerr // the command says what is wrong with the journal
	}
	return a.stopped()
}

const notClustered = "This MicroK8s deployment is not acting as a node in a cluster."

func (a *App) leave(ctx context.Context, o cluster.LeaveOptions) error {
	node, j, err := a.change()
	if err != nil {
		return err
	}
	defer j.Close()
	address := cluster.Elsewhere(a.Env)
	copies, copied := nodecopy.Here(a.Env, a.Now())
	err = node.Leave(ctx, j, o)
	switch {
	case err == nil && address != "":
		fmt.Fprintf(a.Err, "This node is a cluster of its own now. The other cluster knows it as %s: if another machine has that address, of which this one is a copy, that is in order; "+
			"else on a node of the other one run: microk8s remove-node %[1]s\n", address)
		return nil
	case err == nil:
		name := nodeconfig.Load(a.Env).NodeName
		if name == "" {
			name = "NODE"
		}
		if copied {
			fmt.Fprintf(a.Err, "This node is a cluster of its own now. Of these machines that ran as node %s the other stays in its cluster: %s. "+
				"Only if none of them is to stay, run on a node of that cluster: microk8s remove-node %[1]s\n", name, copies.List())
			return nodecopy.Forget(a.Env)
		}
		fmt.Fprintln(a.Err, "This node is a cluster of its own now. On a node of the other one run: microk8s remove-node "+name)
		return nil
	case errors.Is(err, cluster.ErrNotMember):
		fmt.Fprintln(a.Out, notClustered)
		fmt.Fprintln(a.Err, "  see this node with: microk8s status")
		return exitError(ExitError)
	case errors.Is(err, cluster.ErrLast):
		fmt.Fprintln(a.Err, "This is the only node of its cluster; its data is kept. To delete it: microk8s reset")
		return nil
	case errors.Is(err, cluster.ErrOnlyCopy):
		fmt.Fprint(a.Out, `This node currently holds the only copy of the Kubernetes database so it cannot leave the cluster.
To remove this node you can either first remove all other nodes with 'microk8s remove-node' or
form a highly available cluster by adding at least three nodes.
`)
		return exitError(exitOnlyCopy)
	}
	f := &Failure{Err: err}
	var failed *journal.Failed
	switch {
	case errors.Is(err, cluster.ErrUnconfirmed):
		return a.withHints(err, a.lastCopyHints()...)
	case errors.Is(err, context.Canceled):
		f.Err, f.Code = errors.New("interrupted"), exitInterrupted
	case errors.Is(err, cluster.ErrContact):
		f.Code = exitContacting
		f.Hints = append(f.Hints, a.lastCopyHints()...)
	case errors.As(err, &failed):
		f.Err = failed.Err
	}
	return a.changeFailure(f, err)
}

// withHints puts hints before those that an error has already.
func (a *App) withHints(err error, hints ...string) error {
	var f *Failure
	if !errors.As(err, &f) {
		return &Failure{Err: err, Hints: hints}
	}
	out := *f
	out.Hints = append(hints, f.Hints...)
	return &out
}

// lastCopyHints say what can be done with a node whose cluster does not answer: its copy of the data
// first, and then leaving it.
func (a *App) lastCopyHints() []string {
	if a.state().Worker {
		return []string{"if the cluster is gone for good: microk8s leave --force"}
	}
	return []string{
		"start the other control-plane nodes; if they are gone for good, go on with this node's copy of the data" + cluster.HowFar(a.Env) + ":",
		"  sudo microk8s recover --dry-run",
		"or make this node a new, empty cluster, which keeps that copy aside: microk8s leave --force",
	}
}

func (a *App) newRemoveNode() *cobra.Command {
	var o cluster.RemoveOptions
	yes := false
	cmd := &cobra.Command{
		Use:   "remove-node NODE [--force [--yes]]",
		Short: "Remove another node from the cluster",
		Long: `Remove another node, given by its name or address, from the cluster, after it has left with
microk8s leave. With --force a node is removed that is gone for good and cannot leave; if it is a
member of the datastore that answers, the command asks first, or requires --yes.

An interrupted removal is finished when it is run again. A new node that has the name or address of
the old one meanwhile is left alone.

A node that was re-installed may join again after this.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				fmt.Fprintln(a.Out, "Please provide the node you want to remove.")
				fmt.Fprintln(a.Err, "  the nodes are listed by: microk8s kubectl get nodes -o wide")
				return exitError(ExitError)
			}
			if len(args) > 1 {
				return &usageError{cmd, fmt.Errorf("unexpected argument: %s. Please provide the node and the optional --force flag.", args[1])} //nolint:staticcheck // upstream's text
			}
			o.Node = args[0]
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Confirm = func(question string) error { return a.confirm(question, yes, "") }
			return a.removeNode(cmd.Context(), o)
		},
	}
	cmd.ValidArgsFunction = first(a.nodeNames)
	cmd.Flags().BoolVar(&o.Force, "force", false, "remove it also if it is a member of the datastore")
	addYes(cmd.Flags(), &yes)
	return cmd
}

func (a *App) removeNode(ctx context.Context, o cluster.RemoveOptions) error {
	node, j, err := a.change()
	if err != nil {
		return err
	}
	defer j.Close()
	err = node.Remove(ctx, j, o)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, cluster.ErrRegistered):
		fmt.Fprintf(a.Out, "Removal failed. Node %s is registered with dqlite. Please, run first 'microk8s leave' on the departing node. \n"+
			"If the node is not available anymore and will never attempt to join the cluster in the future use the '--force' flag \n"+
			"to unregister the node while removing it.\n", o.Node)
		return exitError(ExitError)
	case errors.Is(err, cluster.ErrNoNode):
		fmt.Fprintf(a.Out, "Node %s does not exist in Kubernetes.\n", o.Node)
		if o.Force {
			fmt.Fprintf(a.Out, "Attempting to remove %s from dqlite.\n", o.Node)
		}
		return noNodeFailure(o.Node, err)
	case errors.Is(err, cluster.ErrNoAddress):
		fmt.Fprintf(a.Out, "Node %s is not part of the cluster.\n", o.Node)
		return failf("to remove it all the same: microk8s remove-node "+o.Node+" --force", "%s was not removed: it has no address", o.Node)
	case errors.Is(err, cluster.ErrReplaced):
		return failf("to remove the new one too, run the same command again", "%s: %w; what is there now was left alone", o.Node, err)
	case errors.Is(err, cluster.ErrUnconfirmed):
		return err
	case errors.Is(err, cluster.ErrSelf):
		return failf("on this node itself run: microk8s leave", "cannot remove %s: it is this node", o.Node)
	}
	f := &Failure{Err: err}
	if errors.Is(err, cluster.ErrContact) {
		f.Code = exitContacting
	}
	return a.changeFailure(f, err)
}

// noNodeFailure says which members of the datastore no Node belongs to: after kubectl delete node
// only their addresses are known.
func noNodeFailure(node string, err error) error {
	f := &Failure{Err: fmt.Errorf("%s was not removed: no node has that name or address", node)}
	var none *cluster.NoNodeError
	if errors.As(err, &none) && len(none.Members) > 0 {
		f.Err = fmt.Errorf("%w, but the datastore has members without a node", f.Err)
		for _, m := range none.Members {
			host, _, split := net.SplitHostPort(m.Address)
			if split != nil {
				host = m.Address
			}
			state := "does not answer"
			if m.Online {
				state = "answers"
			}
			f.Hints = append(f.Hints, fmt.Sprintf("if %s is the one at %s, which %s: microk8s remove-node %s --force", node, host, state, host))
		}
		return f
	}
	f.Hints = []string{"the nodes are listed by: microk8s kubectl get nodes -o wide"}
	return f
}
