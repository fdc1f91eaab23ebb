package cli

import (
	"context"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/util/duration"

	"microk8s/cluster-agent/fanout"
	"microk8s/internal/certs"
)

func (a *App) newCerts() *cobra.Command {
	var out *output
	root := &cobra.Command{
		Use:   "certs [-o json|yaml]",
		Short: "Show and replace the certificates and keys of every node",
		Long: `Show every certificate and key of every node, when it ends, and who trusts it. The keys themselves
are never shown. Nodes are asked through their cluster agents; those that do not answer are named.

    microk8s certs                      every certificate and key
    microk8s certs rotate --dry-run     what a replacement of them would do
    microk8s certs rotate               replace them, while the cluster runs

Certificates other than those of CAs are renewed automatically before they expire.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.listCerts(cmd.Context(), out) },
	}
	out = addOutput(root, "table")
	root.AddCommand(a.newCertsRotate())
	return root
}

// certsDocument is the kind ClusterCertificates.
type certsDocument struct {
	documentMeta
	Nodes  []certs.Inventory `json:"nodes"`
	Silent []silentNode      `json:"silent"`
}

// silentNode is one that did not say what it has.
type silentNode struct {
	Node string `json:"node"`
	Why  string `json:"why"`
}

func (a *App) listCerts(ctx context.Context, out *output) error {
	nodes, silent, err := (&fanout.Cluster{Env: a.Env}).Certificates(ctx)
	if err != nil {
		return failf("see what is wrong with: microk8s status; the certificates of this node alone: sudo microk8s refresh-certs --check", "cannot list the nodes: %w", err)
	}
	doc := certsDocument{documentMeta: documentOf("ClusterCertificates"), Nodes: nodes, Silent: []silentNode{}}
	for _, r := range silent {
		doc.Silent = append(doc.Silent, silentNode{r.Name, r.Err.Error()})
	}
	if doc.Nodes == nil {
		doc.Nodes = []certs.Inventory{}
	}
	if out.document() {
		return a.print(out, doc)
	}
	a.showCerts(doc)
	return nil
}

func (a *App) showCerts(doc certsDocument) {
	tw := tabwriter.NewWriter(a.Out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "NODE\tNAME\tKIND\tENDS IN\tKEY\tTRUSTED BY")
	var problems []string
	for _, n := range doc.Nodes {
		for _, l := range n.Items {
			fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\n", n.Node, l.Name, l.Kind, a.endsIn(l.Expires), l.ID, l.TrustedBy)
			if l.Problem != "" {
				problems = append(problems, fmt.Sprintf("%s: %s: %s", n.Node, l.File, l.Problem))
			}
		}
	}
	tw.Flush()
	for _, p := range problems {
		fmt.Fprintln(a.Err, "warning:", p)
	}
	if kind, err := a.interruptedRotation(); err == nil && kind != "" {
		fmt.Fprintf(a.Err, "warning: a rotation of %s was interrupted; go on with: sudo microk8s certs rotate %s\n", kind, kind)
	}
	for _, s := range doc.Silent {
		fmt.Fprintf(a.Err, "warning: %s did not say what it has: %s\n", s.Node, s.Why)
	}
}

// endsIn is how long something is good yet.
func (a *App) endsIn(expires string) string {
	end, err := time.Parse(time.RFC3339, expires)
	if err != nil {
		return "-"
	}
	if left := end.Sub(a.Now()); left > 0 {
		return duration.HumanDuration(left)
	}
	return "ended"
}
