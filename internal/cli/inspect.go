package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	rbacv1 "k8s.io/api/rbac/v1"

	"microk8s/internal/cis"
	"microk8s/internal/inspect"
	"microk8s/internal/kube"
)

func (a *App) newInspect() *cobra.Command {
	var security bool
	var out *output
	cmd := &cobra.Command{
		Use:   "inspect [--security] [-o json|yaml]",
		Short: "Check this node for known problems, and collect a report",
		Long: `Collect logs, arguments and the state of the cluster and of the machine into one tarball that
can be shown to others: keys, tokens and passwords are redacted. Warnings are printed as they
are found. Exit code 1 means that a service which should run does not. With -o the warnings and
the report's path are one document, and what is done is said on standard error.

With --security, compare this node with the CIS Kubernetes Benchmark and with what a new node
has, and print a table: what is wanted, what was found, and how to set it. Nothing is changed,
and no report is made. Nodes that were installed by an earlier release keep their arguments, so
they differ. Exit code 1 means that a control fails.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if _, err := os.Stat(a.Env.Data); errors.Is(err, os.ErrNotExist) {
				return errNotSetUp()
			}
			if security {
				return a.inspectSecurity(cmd, out)
			}
			in := &inspect.Inspector{Env: a.Env, Manager: a.Services, Out: a.Out, Now: a.Now}
			if out.document() {
				in.Out = a.Err
			}
			path, err := in.Inspect(cmd.Context())
			if down := errors.Is(err, inspect.ErrDown); out.document() && (err == nil || down) {
				doc := inspectionDocument{documentOf("InspectionReport"), path, !down, append([]string{}, in.Warnings...)}
				if err := a.print(out, doc); err != nil {
					return err
				}
			}
			if errors.Is(err, inspect.ErrDown) {
				return exitError(ExitError)
			}
			if err != nil {
				return explain("cannot inspect the node", err)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&security, "security", false, "compare this node with the CIS benchmark instead")
	out = addOutput(cmd, "table")
	return cmd
}

// inspectionDocument is the kind InspectionReport.
type inspectionDocument struct {
	documentMeta
	Report   string   `json:"report"`   // the tarball's path
	Services bool     `json:"services"` // all that should run do
	Warnings []string `json:"warnings"`
}

// securityDocument is the kind SecurityReport.
type securityDocument struct {
	documentMeta
	Benchmark string             `json:"benchmark"`
	Summary   map[cis.Status]int `json:"summary"` // controls by status
	Controls  []cis.Result       `json:"controls"`
}

// bindingsWait bounds how long the API server is waited for: the rest does not need it.
const bindingsWait = 5 * time.Second

// listWait bounds a list of the API that a control is checked by. After one that is not answered no
// other is asked for.
const listWait = 10 * time.Second

func (a *App) inspectSecurity(cmd *cobra.Command, out *output) error {
	node := &cis.Node{Env: a.Env}
	if core, err := kube.FromFile(a.Env.AdminKubeconfig()); err == nil {
		node.Bindings = func(ctx context.Context) ([]rbacv1.ClusterRoleBinding, error) {
			ctx, cancel := context.WithTimeout(ctx, bindingsWait)
			defer cancel()
			var list rbacv1.ClusterRoleBindingList
			data, err := core.Get().AbsPath("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings").DoRaw(ctx)
			if err != nil {
				return nil, err
			}
			return list.Items, json.Unmarshal(data, &list)
		}
		node.Get = func(ctx context.Context, path string) ([]byte, error) {
			ctx, cancel := context.WithTimeout(ctx, listWait)
			defer cancel()
			return core.Get().AbsPath(path).DoRaw(ctx)
		}
	}
	results := cis.Run(cmd.Context(), node)
	count := cis.Count(results)
	if out.document() {
		if err := a.print(out, securityDocument{documentOf("SecurityReport"), cis.Edition, count, results}); err != nil {
			return err
		}
	} else {
		a.printSecurity(results, count)
	}
	if count[cis.Fail] > 0 {
		return exitError(ExitError)
	}
	return nil
}

func (a *App) printSecurity(results []cis.Result, count map[cis.Status]int) {
	w := tabwriter.NewWriter(a.Out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tSTATUS\tTITLE\tWANTED\tFOUND")
	for _, r := range results {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", r.ID, r.Status, r.Title, r.Wanted, r.Found)
	}
	w.Flush()
	for _, r := range results {
		if r.Status == cis.Fail && r.Do != "" {
			fmt.Fprintf(a.Out, "\n%s %s: %s\n  %s\n", r.ID, r.Title, r.Found, r.Do)
		}
	}
	fmt.Fprintf(a.Out, "\n%s: %d pass, %d fail, %d accepted, %d for a person to check, %d do not apply\n", cis.Edition,
		count[cis.Pass], count[cis.Fail], count[cis.Accepted], count[cis.Manual], count[cis.None])
	fmt.Fprintln(a.Out, "docs/cis.md says for each what accepted and not-applicable mean.")
}
