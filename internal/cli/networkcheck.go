package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"

	"microk8s/internal/kube"
	"microk8s/internal/netcheck"
	"microk8s/internal/nodeconfig"
)

// newNetworkCheck is a command of [App.newNetwork].
func (a *App) newNetworkCheck() *cobra.Command {
	var out *output
	check := &cobra.Command{
		Use:   "check [-o json|yaml]",
		Short: "Check whether packets get to every other node, and back",
		Long: `Send packets from this node to every other one and back, through the tunnel that pods use and in
the size of pods' packets, and try the TCP ports that the nodes need of each other in both directions:
10250 (kubelet), 25000 (cluster agent), 16443 (API server), 19001 (datastore).

What does not get through is named, with what to open where: UDP port 4789 that is closed, a smaller MTU
on the way, packets that get through in one direction only, and two nodes with the same end of the
tunnel. Where pods have addresses of both families, each is tried: the tunnels differ. Each node also looks at its own ways every minute, and microk8s status says what it finds.

It takes a few seconds and changes nothing. Run it on each node that is in doubt: the ways of two
others are not this node's to try.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.networkCheck(cmd.Context(), out) },
	}
	out = addOutput(check, "text")
	return check
}

// networkDocument is the kind NetworkCheck.
type networkDocument struct {
	documentMeta
	Node    string            `json:"node"`
	MTU     int               `json:"mtu"` // of pods
	Results []netcheck.Result `json:"results"`
}

func (a *App) networkCheck(ctx context.Context, out *output) error {
	var doc networkDocument
	check := func() (err error) { doc, err = a.checkNetwork(ctx); return err }
	if out.document() {
		if err := check(); err != nil {
			return err
		}
	} else if err := a.progress().step("Asking the other nodes", check); err != nil {
		return err
	}
	problems := 0
	for _, r := range doc.Results {
		problems += len(r.Problems)
	}
	if out.document() {
		if err := a.print(out, doc); err != nil {
			return err
		}
	} else {
		a.printNetwork(doc)
	}
	if problems > 0 {
		return exitError(ExitError)
	}
	return nil
}

func (a *App) printNetwork(doc networkDocument) {
	if len(doc.Results) == 0 {
		fmt.Fprintf(a.Out, "Node %s is the only one: there is nothing to check.\n", doc.Node)
	}
	for _, r := range doc.Results {
		switch {
		case len(r.Problems) > 0:
			fmt.Fprintf(a.Out, "%s (%s): problems\n", r.Node, r.Address)
		case r.Tunnel:
			fmt.Fprintf(a.Out, "%s (%s): good, packets of %d bytes in %s\n", r.Node, r.Address, doc.MTU, r.RoundTrip.Round(10*time.Microsecond))
		default:
			fmt.Fprintf(a.Out, "%s (%s): good; there is no tunnel between the two\n", r.Node, r.Address)
		}
		for _, p := range r.Problems {
			fmt.Fprintf(a.Out, "  %s\n    %s\n", p.What, p.Do)
		}
	}
}

// checkNetwork asks the other nodes.
func (a *App) checkNetwork(ctx context.Context) (doc networkDocument, err error) {
	config := nodeconfig.Load(a.Env)
	doc = networkDocument{documentMeta: documentOf("NetworkCheck"), Node: config.NodeName, Results: []netcheck.Result{}}
	file := a.Env.AdminKubeconfig()
	if config.Worker {
		file = a.Env.Credential("kubelet.config") // which may list the nodes
	}
	core, err := kube.FromFile(file)
	if err != nil {
		return doc, err
	}
	list, err := core.Nodes(ctx)
	if err != nil {
		return doc, failf("see: microk8s status", "the other nodes are not known: %w", err)
	}
	var nodes []*corev1.Node
	for i := range list {
		nodes = append(nodes, &list[i])
	}
	check := netcheck.Check{Ports: true}
	for port, differs := range map[int]bool{
		16443: config.APIServer.Port != 16443 && !config.Worker, 25000: config.AgentPort != 25000,
		19001: config.Datastore.Owner != nodeconfig.OwnDatastore || config.Datastore.Port != 19001,
	} {
		if differs {
			check.Skip = append(check.Skip, port)
		}
	}
	heard := netcheck.ReadRecord(a.Env, a.Now()).Heard
	check.Heard = func(n netcheck.Node) time.Time { return heard[netcheck.HeardKey(n)] }
	checks, err := netcheck.Families(nodes, config.NodeName, check)
	if err != nil {
		return doc, err
	}
	if len(checks[0].Peers) == 0 {
		return doc, nil
	}
	for i := range checks {
		if !checks[i].Self.Tunnel.IsValid() {
			continue
		}
		if checks[i].MTU, err = netcheck.PodMTU(a.Env); err != nil {
			return doc, failf("see: microk8s logs kubelite", "%w", err)
		}
		doc.MTU = checks[i].MTU
	}
	doc.Results, err = netcheck.RunAll(ctx, checks)
	return doc, err
}

// warnNetwork checks the network after a join, whose ports were tried before: pods could not be.
func (a *App) warnNetwork(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	doc, err := a.checkNetwork(ctx)
	if err != nil {
		return // the node says by itself what is wrong with it
	}
	for _, r := range doc.Results {
		for _, p := range r.Problems {
			fmt.Fprintf(a.Err, "WARNING: %s\n  %s\n", p.What, strings.ReplaceAll(p.Do, "; or ", ";\n  or "))
		}
	}
}
