package cli

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"k8s.io/client-go/tools/clientcmd"

	"microk8s/internal/podsecurity"
)

func (a *App) newPodSecurity() *cobra.Command {
	root := &cobra.Command{
		Use:   "pod-security status|enforce|relax",
		Short: "Show and set what pods of the cluster may not do",
		Long: `Refuse pods that go beyond one of Kubernetes' Pod Security Standards: privileged ones, those on
the host's network, those with folders of the host, and so on. A new cluster only warns of them.

    microk8s pod-security status                  what is refused in which namespace
    microk8s pod-security enforce --dry-run       which pods that run now would be refused
    microk8s pod-security enforce                 refuse them, in new namespaces too
    microk8s pod-security relax                   undo that

It holds on all control plane nodes at once, and on those that join later. The namespaces of
addons that need the host are exempt; see docs/security.md. Labels that you have set yourself
(pod-security.kubernetes.io/enforce) stay as they are.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	var shown, planned *output
	status := &cobra.Command{
		Use: "status [-o json|yaml]", Short: "Show what is refused in which namespace", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.podSecurityStatus(cmd.Context(), shown) },
	}
	shown = addOutput(status, "table")
	var exempt []string
	var dry, force bool
	enforce := &cobra.Command{
		Use:   "enforce [baseline|restricted] [--exempt NAMESPACE,...] [--dry-run [-o json|yaml]] [--force]",
		Short: "Refuse pods beyond a standard, baseline without a name",
		Long: `Refuse pods beyond baseline, or beyond restricted, in all namespaces without a label of yours, and
in new ones. Pods that run go on running; those that violate it could not start again, so they
are looked for first, and nothing is changed where there are some, unless --force is set.

    microk8s pod-security enforce --dry-run
    microk8s pod-security enforce --exempt monitoring,rook-ceph`,
		ValidArgs: podsecurity.Levels,
		Args:      atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			level := append(args, podsecurity.Baseline)[0]
			if !slices.Contains(podsecurity.Levels, level) {
				return &usageError{cmd, fmt.Errorf("invalid standard: %s (choose from %s)", level, strings.Join(podsecurity.Levels, ", "))}
			}
			if planned.document() && !dry {
				return &usageError{cmd, fmt.Errorf("-o is for --dry-run")}
			}
			return a.podSecurityEnforce(cmd.Context(), level, exempt, dry, force, planned)
		},
	}
	enforce.Flags().StringSliceVar(&exempt, "exempt", nil, "namespaces whose pods may do all; it is kept for later calls")
	enforce.Flags().BoolVar(&dry, "dry-run", false, "change nothing, and show what would be refused")
	enforce.Flags().BoolVar(&force, "force", false, "also where pods that run now violate it")
	planned = addOutput(enforce, "text")
	relax := &cobra.Command{
		Use: "relax", Short: "Refuse nothing any more, and keep your own labels", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.podSecurityRelax(cmd.Context()) },
	}
	root.AddCommand(status, enforce, relax)
	return root
}

// podSecurityDocument is the kind PodSecurityStatus.
type podSecurityDocument struct {
	documentMeta
	podsecurity.Status
}

// podSecurityPlanDocument is the kind PodSecurityPlan.
type podSecurityPlanDocument struct {
	documentMeta
	podsecurity.Plan
}

func (a *App) podSecurityClient() (*podsecurity.Client, error) {
	cfg, err := clientcmd.BuildConfigFromFlags("", a.Env.AdminKubeconfig())
	if err != nil {
		return nil, fmt.Errorf("cannot reach the cluster: %w", err)
	}
	return podsecurity.New(cfg)
}

// podSecurityFailed is the failure of a call of the API server.
func podSecurityFailed(err error) error {
	return failf("see what is wrong with: microk8s status; then run the same command again", "%w", err)
}

func (a *App) podSecurityStatus(ctx context.Context, out *output) error {
	c, err := a.podSecurityClient()
	if err != nil {
		return err
	}
	s, err := c.Status(ctx)
	if err != nil {
		return podSecurityFailed(err)
	}
	if out.document() {
		return a.print(out, podSecurityDocument{documentOf("PodSecurityStatus"), *s})
	}
	if s.Level == "" {
		fmt.Fprintln(a.Out, "New namespaces: nothing is refused. To refuse pods beyond baseline: microk8s pod-security enforce")
	} else {
		fmt.Fprintf(a.Out, "New namespaces: pods beyond %s are refused\n", s.Level)
	}
	w := tabwriter.NewWriter(a.Out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NAMESPACE\tENFORCED\tSET BY")
	for _, n := range s.Namespaces {
		fmt.Fprintf(w, "%s\t%s\t%s\n", n.Name, cmp.Or(n.Enforce, "-"), cmp.Or(n.By, "-"))
	}
	return w.Flush()
}

func (a *App) podSecurityEnforce(ctx context.Context, level string, exempt []string, dry, force bool, out *output) error {
	c, err := a.podSecurityClient()
	if err != nil {
		return err
	}
	p, err := c.Plan(ctx, level, exempt)
	if err != nil {
		return podSecurityFailed(err)
	}
	if out.document() {
		return a.print(out, podSecurityPlanDocument{documentOf("PodSecurityPlan"), *p})
	}
	for _, o := range p.Others {
		fmt.Fprintf(a.Err, "left as it is: namespace %s, which somebody has set to %s\n", o.Name, o.Enforce)
	}
	for _, v := range p.Violations {
		for _, text := range v.Warnings {
			fmt.Fprintf(a.Err, "namespace %s: %s\n", v.Namespace, text)
		}
	}
	var in []string
	for _, v := range p.Violations {
		in = append(in, v.Namespace)
	}
	switch {
	case dry:
		fmt.Fprintf(a.Out, "Pods beyond %s would be refused in %d namespaces and in new ones; %d have pods that violate it\n", level, len(p.Enforce), len(in))
		return nil
	case len(in) > 0 && !force:
		return &Failure{Err: fmt.Errorf("nothing was changed: pods that run now violate %s in %s", level, strings.Join(in, ", ")), Hints: []string{
			"change those pods, or let their namespaces be: microk8s pod-security enforce " + level + " --exempt " + strings.Join(append(exempt, in...), ","),
			"or go on: they run until they are replaced, and are refused then: microk8s pod-security enforce " + level + " --force",
		}}
	}
	if err := c.Enforce(ctx, p); err != nil {
		return podSecurityFailed(err)
	}
	fmt.Fprintf(a.Out, "Pods beyond %s are refused, in new namespaces too. Exempt: %s\n", level, strings.Join(p.Exempt, ", "))
	fmt.Fprintln(a.Err, "To undo that: microk8s pod-security relax")
	return nil
}

func (a *App) podSecurityRelax(ctx context.Context) error {
	c, err := a.podSecurityClient()
	if err != nil {
		return err
	}
	changed, err := c.Relax(ctx)
	if err != nil {
		return podSecurityFailed(err)
	}
	fmt.Fprintf(a.Out, "Nothing is refused any more (%d namespaces were changed). Pods beyond baseline still cause a warning.\n", len(changed))
	return nil
}
