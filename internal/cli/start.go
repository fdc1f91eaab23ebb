package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"

	"microk8s/internal/cluster"
	"microk8s/internal/hostinfo"
	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/noderegistry"
	"microk8s/internal/service"
	"microk8s/internal/setup"
	"microk8s/internal/snapenv"
	"microk8s/internal/status"
)

// readyWait is how long start waits for the node to become Ready. A node that is not Ready by
// then is a failure, so a slow machine must not run into it.
func (a *App) readyWait() time.Duration { return cmp.Or(a.ReadyWait, 3*time.Minute) }

// closingWait is how long a port that nobody seems to hold may stay in use.
const closingWait = time.Second

func (a *App) newStart() *cobra.Command {
	var o startOptions
	cmd := &cobra.Command{
		Use:   "start [--new-name] [--disable-low-memory-guard]",
		Short: "Start the services of this node",
		Long: `Start the services of this node, and at every boot from now on, and wait until the node is
Ready. The first start on a machine without snapd sets the node up. Starting a node that runs
does nothing.

The addresses of pods and Services, IPv6 among them, are chosen before the first start, in
args/cni-env or by extraCNIEnv of a launch configuration. Ranges that cannot work on this host are
refused, with the lines that choose others.

If the node is not Ready after three minutes, the exit code is 1 and the reasons are shown; the
services keep running.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.start(cmd.Context(), o) },
	}
	cmd.Flags().BoolVar(&o.newName, "new-name", false, "register a single node whose host was renamed under its new name, and delete its Node of the old one")
	cmd.Flags().BoolVar(&o.disableGuard, "disable-low-memory-guard", false, "start on a machine that is too small for a control plane")
	return cmd
}

type startOptions struct{ newName, disableGuard bool }

func (a *App) start(ctx context.Context, o startOptions) error {
	if o.disableGuard {
		if err := removeLock(a.Env, snapenv.LockLowMemory); err != nil {
			return err
		}
	}
	if err := a.lowMemory(); err != nil {
		return err
	}
	if p := status.ClockProblem(a.Env, a.Now()); p != nil {
		return failf(p.Do, "cannot start: %s", p.What)
	}
	if err := a.refuseHalfChanged(); err != nil {
		return err
	}
	before, _ := nodeconfig.RegisteredName(a.Env)
	if err := a.checkName(o.newName); err != nil {
		return err
	}
	p := a.progress()
	if !a.Env.Snapd {
		err := p.step("Setting up the node", func() error { return a.Parts.Install(ctx, a.Env, a.log()) })
		if err != nil {
			return explain("cannot set up the node", err)
		}
		// The first start has made the files, with what a launch configuration says.
		if err := a.checkName(false); err != nil {
			return err
		}
		// Install may have found the machine too small for a control plane.
		if err := a.lowMemory(); err != nil {
			return err
		}
	}
	if err := setup.Ranges(ctx, a.Env, a.log()); err != nil {
		return fmt.Errorf("cannot start: %w", err)
	}
	if err := a.checkPorts(ctx); err != nil {
		return err
	}
	// Before the services run, not after: what looks at the lock while they start must not
	// find a stopped node.
	if err := removeLock(a.Env, snapenv.LockStopped); err != nil {
		return err
	}
	if err := p.step("Starting the services", func() error { return a.Services.Start(ctx) }); err != nil {
		if a.Env.Snapd {
			return failf(err.Error(), `Failed to start microk8s services. Check snapd logs with "journalctl -u snapd.service"`)
		}
		return explain("cannot start the services", err)
	}
	if a.state().Worker {
		return a.startedWorker(ctx, p)
	}
	prober := a.prober()
	var report status.Report
	var failing, why string
	_ = p.step("Waiting for the node to be Ready", func() error {
		wait, cancel := context.WithTimeout(ctx, a.readyWait())
		var forgetting sync.WaitGroup
		defer forgetting.Wait()
		defer cancel()
		if o.newName {
			forgetting.Go(func() { a.forgetNode(wait, before, p) })
		}
		report = prober.WaitReadyUnless(wait, func(r status.Report) bool {
			failing, why = r.Failing(a.Env)
			return failing != ""
		})
		if !report.Ready {
			return errors.New("not ready")
		}
		return nil
	})
	if err := ctx.Err(); err != nil {
		return err
	}
	if !report.Ready && failing != "" {
		for _, pr := range report.Problems { // a service that cannot have its address only says so
			if pr.ID == "datastore.address" {
				return failf(pr.Do, "cannot start: %s", pr.What)
			}
		}
		return failf("fix this and run microk8s start again; see also: microk8s logs "+failing, "service %s does not start: %s", failing, why)
	}
	if !report.Ready {
		var why strings.Builder
		for _, pr := range prober.Probe(ctx).Problems {
			fmt.Fprintf(&why, "\n  %s", pr)
		}
		return failf("keep waiting with: microk8s status --wait-ready", "the services run, but the node was not Ready within %s%s", a.readyWait(), &why)
	}
	p.say("The node is Ready. Try: microk8s kubectl get pods -A")
	return nil
}

// startedWorker waits until the cluster calls this worker Ready.
func (a *App) startedWorker(ctx context.Context, p *progress) error {
	why := ""
	_ = p.step("Waiting for the node to be Ready", func() error {
		wait, cancel := context.WithTimeout(ctx, a.readyWait())
		defer cancel()
		why = a.prober().WaitWorker(wait)
		if why != "" {
			return errors.New("not ready")
		}
		return nil
	})
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case why != "":
		return failf("see microk8s logs kubelite, and on a control-plane node: microk8s kubectl describe node "+nodeconfig.Load(a.Env).NodeName, "the services run, but this worker is not Ready: %s", why)
	}
	for _, problem := range status.Local(a.Env, a.Now()) {
		p.say("WARNING: %s", problem)
	}
	p.say("This worker is Ready. See it on a control-plane node: microk8s kubectl get nodes")
	return nil
}

// forgetPause is the pause until an API server that does not answer yet is asked again.
const forgetPause = time.Second

// forgetNode deletes the Node under which this single node was in its cluster before, as soon as the API server
// takes it: the name never comes back, and as long as it has this host's addresses none of another name may have
// them (snap/manifests/node-admission.yaml). An earlier start that was interrupted may have left it, so every other Node
// with an address of this host is meant, besides that called before.
func (a *App) forgetNode(ctx context.Context, before string, p *progress) {
	name := nodeconfig.Load(a.Env).NodeName
	old := func(n corev1.Node, own []net.IP) bool {
		return n.Name != name && (n.Name == before || slices.ContainsFunc(n.Status.Addresses, func(at corev1.NodeAddress) bool {
			return at.Type == corev1.NodeInternalIP && slices.ContainsFunc(own, net.ParseIP(at.Address).Equal)
		}))
	}
	for ctx.Err() == nil {
		core, err := kube.FromFile(a.Env.AdminKubeconfig())
		var nodes []corev1.Node
		if err == nil {
			nodes, err = core.Nodes(ctx)
		}
		own, addressErr := hostinfo.Addresses()
		for _, n := range nodes {
			if err != nil || addressErr != nil || !old(n, own) {
				continue
			}
			if err = core.Delete().Resource("nodes").Name(n.Name).Do(ctx).Error(); err == nil {
				err = noderegistry.Registry{Core: func() (*kube.Core, error) { return core, nil }}.Delete(ctx, n.Name)
				p.say("The Node of the old name, %s, is deleted", n.Name)
			}
		}
		if err = errors.Join(err, addressErr); err == nil {
			return
		}
		a.log().Debug("the Node of the old name is not deleted yet", "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(forgetPause):
		}
	}
}

// checkName refuses to start a node that the cluster could not know by its name, before anything
// runs.
func (a *App) checkName(newName bool) error {
	if newName {
		if s := a.state(); s.Clustered || s.Worker {
			return failf("leave the cluster first: microk8s leave", "cannot start under another name: this node is in a cluster")
		}
		if err := nodeconfig.ForgetName(a.Env); err != nil {
			return explain("cannot start under another name", err)
		}
	}
	if err := nodeconfig.Load(a.Env).Err(nodeconfig.PartName, nodeconfig.PartRenamed); err != nil {
		return fmt.Errorf("cannot start: %w", err)
	}
	return nil
}

// refuseHalfChanged refuses to start what an interrupted change of membership has left: some of
// its files are of one cluster and some of another.
func (a *App) refuseHalfChanged() error {
	r, err := cluster.Pending(a.Env)
	switch {
	case errors.Is(err, os.ErrPermission):
		return nil // only root may know, and only root starts services
	case err != nil:
		return err
	case r == nil || r.Operation == "remove-node": // which is about another node
		return nil
	case strings.HasPrefix(r.Operation, "join"):
		return failf("run microk8s join again to continue, or microk8s leave to undo it", "cannot start: a join was interrupted at %q", r.At())
	}
	return failf("run microk8s "+r.Operation+" again to finish it", "cannot start: microk8s %s was interrupted at %q", r.Operation, r.At())
}

// checkPorts refuses to start a service whose port another program holds.
func (a *App) checkPorts(ctx context.Context) error {
	states, err := a.Services.Status(ctx)
	if err != nil {
		return err
	}
	var running []string
	for _, s := range states {
		if s.Phase == service.Running || s.Phase == service.Stopping {
			running = append(running, s.Name)
		}
	}
	busy := status.PortsInUse(a.Env, running)
	// The ports of a process that was killed are closed a moment after it can be seen no more.
	for deadline := time.Now().Add(closingWait); len(busy) > 0 && busy[0].Owner == "" && time.Now().Before(deadline); {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(closingWait / 20):
		}
		busy = status.PortsInUse(a.Env, running)
	}
	if len(busy) == 0 {
		return nil
	}
	return failf(busy[0].Do, "cannot start: %s", busy[0].What)
}

// explain adds the next step to errors of the operating system that a person can fix.
func explain(what string, err error) error {
	hint := ""
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		hint = "free some space on that disk and run the same command again"
	case errors.Is(err, syscall.EROFS):
		hint = "the file system is mounted read-only: mount it for writing and run the same command again"
	case errors.Is(err, os.ErrPermission):
		hint = "run it again as root, with sudo"
	case errors.Is(err, syscall.EADDRINUSE):
		hint = "stop the program that uses the port and run the same command again"
	case errors.Is(err, context.Canceled):
		return err
	}
	return failf(hint, "%s: %w", what, err)
}

func removeLock(env snapenv.Env, names ...string) error {
	if err := nodeconfig.Unlock(env, names...); err != nil {
		return explain("cannot go on", err)
	}
	return nil
}

func makeLock(env snapenv.Env, name string) error {
	if err := nodeconfig.Lock(env, name); err != nil {
		return explain("cannot go on", err)
	}
	return nil
}
