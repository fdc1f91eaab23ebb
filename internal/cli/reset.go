package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/clientcmd"

	"microk8s/internal/addon/control"
	"microk8s/internal/cli/reset"
	"microk8s/internal/kube"
	"microk8s/internal/snapenv"
)

// resetWait is how long reset waits for the node to be usable, before and after.
const resetWait = 30 * time.Second

func (a *App) newReset() *cobra.Command {
	destroy, noCopy := true, false
	cmd := &cobra.Command{
		Use:   "reset [--destroy-storage[=true|false]] [--no-copy]",
		Short: "Return this node to its initial state",
		Long: `Return the MicroK8s node to the default initial state: everything in the cluster is deleted,
without asking, and all addons are disabled, dns too: enable it again with microk8s enable dns.
Argument files, certificates, and with --destroy-storage=false the data of volumes, are kept. The
content of the datastore is kept as an archive for microk8s dbctl restore; the last three are.

An interrupted reset can be run again. It works on clusters of one node only.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.reset(cmd.Context(), destroy, noCopy) },
	}
	cmd.Flags().BoolVar(&noCopy, "no-copy", false, "keep no archive of what the datastore had")
	cmd.Flags().BoolVar(&destroy, "destroy-storage", true, "delete the data of volumes on this node too")
	return cmd
}

// stoppedUnlessResetting refuses on a stopped node, except where a reset has stopped it and
// was then interrupted.
func (a *App) stoppedUnlessResetting() error {
	if a.state().Resetting {
		return nil
	}
	return a.stopped()
}

func (a *App) reset(ctx context.Context, destroy, noCopy bool) error {
	resumed := a.state().Resetting
	if a.state().Resetting {
		a.progress().say("A previous reset was interrupted; starting what it may have stopped")
		if err := a.start(ctx, startOptions{}); err != nil {
			return err
		}
	}
	prober := a.prober()
	wait, cancel := context.WithTimeout(ctx, resetWait)
	defer cancel()
	report := prober.WaitReady(wait)
	if err := ctx.Err(); err != nil {
		return err
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", a.Env.AdminKubeconfig())
	if err != nil {
		return fmt.Errorf("cannot reach the cluster: %w", err)
	}
	kube.Bound(cfg)
	cleaner, err := reset.New(cfg)
	if err != nil {
		return fmt.Errorf("cannot reach the cluster: %w", err)
	}
	nodes, err := cleaner.Dynamic.Resource(schema.GroupVersionResource{Version: "v1", Resource: "nodes"}).List(wait, metav1.ListOptions{})
	if err != nil {
		fmt.Fprintln(a.Out, "Failed to query the cluster nodes.")
		f := &Failure{Err: fmt.Errorf("cannot reset: %w", err)}
		for _, p := range report.Problems {
			f.Hints = append(f.Hints, p.String())
		}
		return f
	}
	if len(nodes.Items) > 1 {
		fmt.Fprintln(a.Out, "This is a multi-node MicroK8s deployment. Reset is applicable for single node clusters.")
		fmt.Fprintln(a.Out, "Please remove all joined nodes before calling reset.")
		fmt.Fprintln(a.Err, "  see them with: microk8s kubectl get nodes; remove each with: microk8s leave there, and then here: microk8s remove-node NAME")
		return exitError(ExitOK)
	}
	if err := a.soleNode(ctx, false, "reset this node", "it would delete everything that they have, too", ""); err != nil {
		return err
	}
	p := a.progress()
	// What an interrupted reset has left is not worth an archive in the place of the one that it made.
	if err := a.keepCopy(ctx, "reset", noCopy || resumed); err != nil {
		return err
	}
	if err := makeLock(a.Env, snapenv.LockResetting); err != nil {
		return err
	}
	cleaner.KeepVolumes = !destroy
	cleaner.Say = p.say
	p.say("Removing everything from the cluster")
	if err := cleaner.Clean(ctx); err != nil {
		if errors.Is(err, context.Canceled) {
			return err
		}
		return failf("run microk8s reset again", "%w", err)
	}
	p.say("Restarting cluster")
	if err := a.stop(ctx); err != nil {
		return err
	}
	if destroy {
		if err := p.step("Deleting the data of volumes", func() error { return control.EmptyDir(a.Env.DefaultStorage()) }); err != nil {
			return explain("cannot delete the data of volumes", err)
		}
	}
	if err := os.RemoveAll(filepath.Join(a.Env.Data, "bin")); err != nil {
		return explain("cannot delete the programs of addons", err)
	}
	// The second lock makes the user's own CNI be applied again.
	if err := removeLock(a.Env, snapenv.LockNoReissue, snapenv.LockCNILoaded); err != nil {
		return err
	}
	if err := a.start(ctx, startOptions{newName: true}); err != nil {
		return err
	}
	if a.state().Stopped {
		return exitError(ExitError)
	}
	return removeLock(a.Env, snapenv.LockResetting)
}
