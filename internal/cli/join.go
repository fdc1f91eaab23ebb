package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"microk8s/cluster-agent/client"
	"microk8s/internal/cluster"
	"microk8s/internal/journal"
	"microk8s/internal/snapenv"
)

// Exit codes of join, leave and remove-node (cli.md 3 and 4).
const (
	exitContacting = 2 // leave, remove-node: the datastore's other members did not answer
	exitOnlyCopy   = 3 // leave: nobody else has the data
	exitVerify     = 4 // join: the server is not the one that made the token
	exitConnect    = 5 // join: no connection
	exitRefused    = 6 // join: the cluster said no
)

type joinOptions struct {
	connection   string
	worker       bool
	controlPlane bool
	skipVerify   bool
	disableGuard bool
	force        bool
	nodeIP       netip.Addr
}

func (a *App) newJoin() *cobra.Command {
	var o joinOptions
	cmd := &cobra.Command{
		Use:   "join CONNECTION [--worker | --controlplane] [--node-ip ADDRESS] [--force] [--skip-verify] [--disable-low-memory-guard]",
		Short: "Join this node to a cluster",
		Long: `Join this node to a cluster, with the line that microk8s add-node printed on one of its nodes.
Joining ends this node's own cluster: its workloads are stopped, and its data is kept only as a backup
beside the datastore. If the join fails, the node is rolled back. An interrupted join continues when it
is run again with the same CONNECTION; microk8s leave undoes it.

If this node's own cluster has other nodes, the join is refused; if it is in use, the command asks.
--force joins anyway.

With several networks the cluster knows this node by the address that it sees; --node-ip, or --node-ip in
args/kubelet, chooses another one of this host. If the cluster has one node, that node is known by the address
in CONNECTION from then on.

CONNECTION is HOST:PORT/TOKEN[/FINGERPRINT]; - reads it from standard input.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if err := one("CONNECTION")(cmd, args); err != nil {
				return err
			}
			if o.worker && o.controlPlane {
				return &usageError{cmd, errors.New("--worker and --controlplane exclude each other")}
			}
			o.connection = args[0]
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return a.join(cmd.Context(), o) },
	}
	f := cmd.Flags()
	f.BoolVar(&o.worker, "worker", false, "join as a worker, which runs workloads and no control plane")
	f.BoolVar(&o.controlPlane, "controlplane", false, "join as a control-plane node, which is the default")
	f.TextVar(&o.nodeIP, "node-ip", netip.Addr{}, "the address of this host by which the other nodes are to know it")
	f.BoolVar(&o.force, "force", false, "join although this node's own cluster has other nodes or is in use; its data is kept as a backup")
	f.BoolVar(&o.skipVerify, "skip-verify", false, "do not verify the server's identity (dangerous: whoever answers can control this node)")
	f.BoolVar(&o.disableGuard, "disable-low-memory-guard", false, "join a machine that is too small for a control plane")
	return cmd
}

func (a *App) join(ctx context.Context, o joinOptions) error {
	if o.connection == "-" {
		line, err := bufio.NewReader(io.LimitReader(a.In, 4096)).ReadString('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("cannot read the connection string: %w", err)
		}
		o.connection = strings.TrimSpace(line)
	}
	if fi, err := os.Stat(a.Env.DefaultStorage()); err == nil && fi.IsDir() {
		fmt.Fprint(a.Out, "WARNING: Hostpath storage is enabled and is not suitable for multi node clusters.\n\n")
	}
	target, err := client.Parse(o.connection)
	if err != nil {
		return &Failure{Err: fmt.Errorf("Invalid connection: %w", err), Hints: []string{"get one with microk8s add-node on a node of the cluster"}} //nolint:staticcheck // upstream's text
	}
	if o.disableGuard {
		if err := removeLock(a.Env, snapenv.LockLowMemory); err != nil {
			return err
		}
	}
	node, j, err := a.change()
	if err != nil {
		return err
	}
	defer j.Close()
	fmt.Fprintf(a.Out, "Contacting cluster at %s\n", target.Host)
	options := cluster.JoinOptions{Target: target, Worker: o.worker, SkipVerify: o.skipVerify, Force: o.force, Version: a.kubernetesVersion(), NodeIP: o.nodeIP}
	err = node.Join(ctx, j, options)
	var ends *cluster.AbandonError
	if errors.As(err, &ends) {
		if err := a.confirmAbandon(ends); err != nil {
			return err
		}
		options.Force = true
		err = node.Join(ctx, j, options)
	}
	if err != nil {
		return a.joinFailure(target, err)
	}
	if o.worker {
		fmt.Fprintf(a.Out, `
The node has joined the cluster and will appear in the nodes list in a few seconds.

This worker node gets automatically configured with the API server endpoints.
If the API servers are behind a loadbalancer please set the '--refresh-interval' to '0s' in:
    /var/snap/%[1]s/current/args/apiserver-proxy
and replace the API server endpoints with the one provided by the loadbalancer in:
    /var/snap/%[1]s/current/args/traefik/provider.yaml

`, a.Env.Name)
	}
	fmt.Fprintln(a.Out, "Successfully joined the cluster.")
	a.warnNetwork(ctx)
	return nil
}

// confirmAbandon says what a join would end. Only what is in use may be given up by an answer: other
// nodes would lose their control plane, which takes --force.
func (a *App) confirmAbandon(ends *cluster.AbandonError) error {
	if len(ends.Nodes) == 0 && ends.Unknown == nil {
		return a.confirm(fmt.Sprintf("%v. The join ends that cluster; its data is kept as a backup in %s.backup", ends, a.Env.BackendLive()), false, "--force")
	}
	f := &Failure{Err: ends, Code: ExitUsage}
	for _, n := range ends.Nodes {
		f.Hints = append(f.Hints, fmt.Sprintf("on %s run: microk8s leave; then here: microk8s remove-node %[1]s", n))
	}
	if ends.Unknown != nil {
		f.Hints = append(f.Hints, "start this node with microk8s start, and see microk8s kubectl get nodes")
	}
	f.Hints = append(f.Hints, "nothing was changed; to join all the same, which leaves them without a control plane, run the same command with --force")
	return f
}

// change makes what join, leave and remove-node work with.
func (a *App) change() (*cluster.Node, *journal.Journal, error) {
	j, err := journal.Open(a.Env.Journal())
	if err != nil {
		return nil, nil, err
	}
	p := a.progress()
	j.Log = a.log()
	j.Show = func(s journal.Step, undo bool, run func() error) error {
		if undo {
			return p.step("Undo: "+s.Title, run)
		}
		return p.step(s.Title, run)
	}
	j.At = a.dieAt
	return &cluster.Node{
		Env: a.Env, Services: a.Services, Log: a.log(), Say: p.say, Now: a.Now,
		Install:        func(ctx context.Context) error { return a.Parts.Install(ctx, a.Env, a.log()) },
		StopContainers: func(ctx context.Context) error { return a.Parts.StopContainers(ctx, a.Env) },
		ResetNetwork:   func(ctx context.Context) error { return a.Parts.ResetNetwork(ctx, a.Env) },
	}, j, nil
}

// dieVar names a point of a journal, as "join/stop/begin", at which the command
// kills itself like kill -9 would. Tests of interruptions use it; root can do no harm with it
// that it could not do otherwise.
const dieVar = "MICROK8S_DIE_AT"

func (a *App) dieAt(p journal.Point) {
	if where := a.getenv(dieVar); where != "" && where == p.String() {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}

// kubernetesVersion is what the package has inside, "" if it does not say.
func (a *App) kubernetesVersion() string {
	components, err := readBOM(a.Env.BOM())
	if err != nil {
		return ""
	}
	for _, c := range components {
		if c.Name == "kubernetes" {
			return c.Version
		}
	}
	return ""
}

// joinFailure says why, with the exit code and next step that belong to it.
func (a *App) joinFailure(target client.Target, err error) error {
	f := &Failure{Err: err}
	var pre *cluster.PreflightError
	if errors.As(err, &pre) {
		for _, p := range pre.Problems {
			fmt.Fprintf(a.Err, "microk8s: %s\n", p.What)
			if p.Do != "" {
				fmt.Fprintf(a.Err, "  %s\n", p.Do)
			}
		}
		if pre.Err == nil {
			fmt.Fprintln(a.Err, "microk8s: nothing was changed")
			return exitError(ExitError)
		}
		f.Err = pre.Err
	}
	var verify *client.VerifyError
	var connect *client.ConnectError
	var refused *client.ServerError
	switch {
	case errors.As(err, &verify):
		f.Code = exitVerify
		f.Err = fmt.Errorf("Joining cluster failed. Could not verify the identity of %s. Use '--skip-verify' to skip server certificate check.", target.Host) //nolint:staticcheck // upstream's text
		f.Hints = append(f.Hints, verify.Why, "the token was not sent; get a fresh line with microk8s add-node on a node of the cluster")
	case errors.As(err, &connect):
		f.Code = exitConnect
		f.Err = fmt.Errorf("Connecting to cluster failed with %w.", connect.Err) //nolint:staticcheck // upstream's text
		if errors.Is(connect.Err, context.DeadlineExceeded) {
			f.Hints = append(f.Hints, fmt.Sprintf("the cluster agent at %s did not answer in time; see on that node: microk8s status, and microk8s logs cluster-agent", target.Address()))
		}
		f.Hints = append(f.Hints, fmt.Sprintf("is the node up, and is TCP port %d open towards it?", target.Port))
	case errors.As(err, &refused):
		f.Code = exitRefused
		f.Err = fmt.Errorf("Connection failed. %s (%d).", refused.Text, refused.Status) //nolint:staticcheck // upstream's text
	case errors.Is(err, cluster.ErrMember):
		f.Hints = append(f.Hints, "leave that one first: microk8s leave")
	case errors.Is(err, context.Canceled):
		f.Code = exitInterrupted
		f.Err = errors.New("interrupted")
	}
	return a.changeFailure(f, err)
}

// changeFailure adds what has become of the node.
func (a *App) changeFailure(f *Failure, err error) error {
	var failed *journal.Failed
	switch {
	case !errors.As(err, &failed):
	case failed.Undone:
		f.Hints = append(f.Hints, "the node was rolled back")
	case failed.UndoErr != nil:
		f.Hints = append(f.Hints, fmt.Sprintf("rollback failed (%v); run the same command again to retry", failed.UndoErr))
	default:
		f.Hints = append(f.Hints, "run the same command again to finish it")
	}
	return f
}
