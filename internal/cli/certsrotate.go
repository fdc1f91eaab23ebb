package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/fanout"
	"microk8s/internal/certs"
	"microk8s/internal/journal"
	"microk8s/internal/keyrotation"
	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/pki"
	"microk8s/internal/turn"
)

type rotateOptions struct {
	kind     string // "" means all
	dry, yes bool
	out      *output
}

func (a *App) newCertsRotate() *cobra.Command {
	o := rotateOptions{}
	cmd := &cobra.Command{
		Use:   "rotate [" + strings.Join(keyrotation.Kinds(), "|") + "] [--dry-run [-o json|yaml]] [--yes]",
		Short: "Replace certificates and keys while the cluster runs",
		Long: `Replace certificates and keys of all nodes while the cluster runs, one node after the other. Without a
kind all of these are replaced:

    leaves            what the CA has signed for nodes: API servers, kubelets, the administrator
    front-proxy       the CA and the certificate with which API servers call extension API servers
    datastore         the pair of key and certificate that the datastore's members share
    service-account   the key that signs the tokens of service accounts; two are valid until no pod
                      has a token of the old one

All nodes must run. See first what would be done, with --dry-run. When it is interrupted, run it again on the
same node: it goes on. Meanwhile no node of the cluster is refreshed. API servers are restarted one after the
other: clients that know more than one of them, and read certificates and tokens again as client-go does,
see nothing of it.

Kubeconfigs of 'microk8s config --user' hold a token of a service account, and end with its old key; their
users are listed before and after. Those of 'microk8s config' go on until their certificate's end.`,
		ValidArgs: keyrotation.Kinds(),
		Args:      atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.kind = args[0]
				if !slices.Contains(keyrotation.Kinds(), o.kind) {
					return &usageError{cmd, fmt.Errorf("invalid kind: %s (choose from %s)", o.kind, strings.Join(keyrotation.Kinds(), ", "))}
				}
			}
			if o.out.document() && !o.dry {
				return &usageError{cmd, errors.New("-o is for --dry-run")}
			}
			return a.rotateCerts(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVar(&o.dry, "dry-run", false, "change nothing, and show what would be done")
	addYes(cmd.Flags(), &o.yes)
	o.out = addOutput(cmd, "text")
	return cmd
}

// certsJournal has a rotation that has begun and not ended.
func (a *App) certsJournal() string { return filepath.Join(a.Env.ClusterDir(), "certs-journal") }

// interruptedRotation is the kind of a rotation that has begun here and not ended; "" where there is none.
func (a *App) interruptedRotation() (string, error) {
	r, err := journal.Read(a.certsJournal())
	return keyrotation.KindOf(r), err
}

// rotationPlan is the kind CertificateRotationPlan.
type rotationPlan struct {
	documentMeta
	Rotations []plannedRotation `json:"rotations"`
	// Users are those whose kubeconfigs would end.
	Users []string `json:"users"`
}

type plannedRotation struct {
	Kind  string   `json:"kind"`
	Nodes []string `json:"nodes"`
	Steps []string `json:"steps"`
}

func (a *App) rotateCerts(ctx context.Context, o rotateOptions) error {
	begun, err := a.interruptedRotation()
	if err != nil {
		return err
	}
	kinds := keyrotation.Kinds()
	if o.kind != "" {
		kinds = []string{o.kind}
	}
	if begun != "" && o.kind != "" && o.kind != begun {
		return failf("go on with it: sudo microk8s certs rotate "+begun, "a rotation of %s was interrupted", begun)
	}
	if begun != "" { // those before it are done
		kinds = kinds[slices.Index(kinds, begun):]
	}
	c, err := a.rotationCluster()
	if err != nil {
		return err
	}
	nodes, err := c.List(ctx)
	if err != nil {
		return err
	}
	users, err := a.tokenUsers(ctx, kinds)
	if err != nil {
		return err
	}
	if o.dry {
		return a.showRotation(o.out, c, kinds, nodes, users)
	}
	if len(users) > 0 {
		what := "The kubeconfigs of these users end, and they need new ones (microk8s config --user NAME): " + strings.Join(users, ", ") + "."
		if err := a.confirm(what, o.yes, ""); err != nil {
			return err
		}
	}
	end, err := turn.Lease{Core: (&kube.File{Path: a.Env.AdminKubeconfig()}).Core}.Hold(ctx, c.Self, turn.ForKeys, turn.RefreshLimit, a.log())
	var held *turn.HeldError
	if errors.As(err, &held) {
		return failf("nothing was changed", "%w", err)
	}
	if err != nil {
		return err
	}
	defer end()
	j, err := journal.Open(a.certsJournal())
	if err != nil {
		return err
	}
	defer j.Close()
	p := a.progress()
	j.Log = a.log()
	j.Show = func(s journal.Step, _ bool, run func() error) error { return p.step(s.Title, run) }
	j.At = a.dieAt
	var fetch []string
	for _, kind := range kinds {
		if _, names := c.Steps(kind, nodes); len(names) == 0 && o.kind == "" {
			continue // the datastore is an etcd of its own
		}
		if kind == begun {
			p.say("Going on with the rotation of %s that was interrupted", kind)
		}
		done, err := c.Rotate(ctx, j, kind)
		if err != nil {
			return failf("the cluster works as it is: when all nodes run, go on with: sudo microk8s certs rotate "+kind, "the rotation of %s was interrupted: %w", kind, err)
		}
		fmt.Fprintf(a.Out, "%s: replaced on all nodes that have it\n", kind)
		fetch = append(fetch, done.Fetch...)
	}
	a.sayFetch(users, fetch)
	return nil
}

// sayFetch says who must fetch what again.
func (a *App) sayFetch(users, others []string) {
	if len(users)+len(others) == 0 {
		fmt.Fprintln(a.Out, "Nobody has to fetch a kubeconfig again.")
		return
	}
	fmt.Fprintln(a.Out, "These must fetch a kubeconfig or token again:")
	for _, u := range users {
		fmt.Fprintf(a.Out, "  %s: microk8s config --user %s\n", u, u)
	}
	for _, o := range others {
		fmt.Fprintf(a.Out, "  %s\n", o)
	}
}

func (a *App) showRotation(out *output, c *keyrotation.Cluster, kinds []string, nodes []certs.Inventory, users []string) error {
	doc := rotationPlan{documentMeta: documentOf("CertificateRotationPlan"), Rotations: []plannedRotation{}, Users: users}
	if doc.Users == nil {
		doc.Users = []string{}
	}
	for _, kind := range kinds {
		steps, names := c.Steps(kind, nodes)
		doc.Rotations = append(doc.Rotations, plannedRotation{kind, names, steps})
	}
	if out.document() {
		return a.print(out, doc)
	}
	for _, r := range doc.Rotations {
		fmt.Fprintf(a.Out, "%s, on %s:\n", r.Kind, strings.Join(r.Nodes, ", "))
		for i, s := range r.Steps {
			fmt.Fprintf(a.Out, "  %d. %s\n", i+1, s)
		}
	}
	a.sayFetch(users, nil)
	fmt.Fprintln(a.Out, "Nothing was changed.")
	return nil
}

// tokenUsers are the people whose kubeconfigs hold a token of a key that is replaced.
func (a *App) tokenUsers(ctx context.Context, kinds []string) ([]string, error) {
	if !slices.Contains(kinds, keyrotation.ServiceAccount) {
		return nil, nil
	}
	core, err := kube.FromFile(a.Env.AdminKubeconfig())
	if err != nil {
		return nil, err
	}
	list, err := users{core}.bindings(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("cannot list the users of kubeconfigs: %w", err)
	}
	var out []string
	for _, b := range list {
		out = append(out, b.Labels[userLabel])
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// rotationCluster ties a rotation to this cluster.
func (a *App) rotationCluster() (*keyrotation.Cluster, error) {
	config := nodeconfig.Load(a.Env)
	if err := config.Err(nodeconfig.PartName); err != nil {
		return nil, err
	}
	core, err := kube.FromFile(a.Env.AdminKubeconfig())
	if err != nil {
		return nil, err
	}
	p, cluster, store := a.progress(), &fanout.Cluster{Env: a.Env}, certs.New(a.Env, certs.Options{Log: a.log()})
	proxies := proxyTrust{core}
	return &keyrotation.Cluster{
		Self: config.NodeName,
		List: func(ctx context.Context) ([]certs.Inventory, error) {
			nodes, silent, err := cluster.Certificates(ctx)
			if err != nil {
				return nil, err
			}
			if err := fanout.Failed(silent); err != nil {
				return nil, failf("bring it back, or take it out with: microk8s remove-node NAME", "a node does not say which certificates it has: %w", err)
			}
			return nodes, nil
		},
		Change: func(ctx context.Context, node string, change api.CertificateChange, restart string) error {
			req := api.ConfigureRequest{Certificates: &change}
			if restart != "" {
				req.Services = []api.ConfigureService{{Name: restart, Restart: true}}
			}
			return cluster.Roll(ctx, req, node)
		},
		SigningKeys: store.SigningKeys, NewKey: keyrotation.NewSigningKey,
		Pair: store.DatastorePair, NextPair: store.NextDatastorePair, ForgetPair: store.ForgetNextPair,
		TrustedProxies: proxies.trusted, KeepProxies: proxies.keep,
		Resign: func(ctx context.Context, ids []string) ([]string, error) { return resign(ctx, core, ids) },
		Pause: func(ctx context.Context, d time.Duration) error {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(d):
				return nil
			}
		},
		Say: p.say, Poll: 3 * time.Second, Patience: 10 * time.Minute,
	}, nil
}

// proxyTrust is the ConfigMap from which extension API servers learn which CAs of front proxies to trust. API
// servers add theirs to it, and take none away before its end.
type proxyTrust struct{ core *kube.Core }

const proxyTrustName, proxyTrustKey = "extension-apiserver-authentication", "requestheader-client-ca-file"

func (p proxyTrust) get(ctx context.Context) (*corev1.ConfigMap, error) {
	var cm corev1.ConfigMap
	err := p.core.Get().Namespace("kube-system").Resource("configmaps").Name(proxyTrustName).Timeout(userWait).Do(ctx).Into(&cm)
	return &cm, err
}

func (p proxyTrust) trusted(ctx context.Context) (ids []string, err error) {
	cm, err := p.get(ctx)
	if err != nil {
		return nil, err
	}
	list, err := certs.Bundle([]byte(cm.Data[proxyTrustKey]))
	if err != nil {
		return nil, fmt.Errorf("cannot read the ConfigMap %s: %w", proxyTrustName, err)
	}
	for _, c := range list {
		ids = append(ids, certs.KeyID(c.PublicKey))
	}
	return ids, nil
}

func (p proxyTrust) keep(ctx context.Context, ids []string) error {
	return kube.RetryConflict(ctx, func() error {
		cm, err := p.get(ctx)
		if err != nil {
			return err
		}
		list, err := certs.Bundle([]byte(cm.Data[proxyTrustKey]))
		if err != nil {
			return fmt.Errorf("cannot read the ConfigMap %s: %w", proxyTrustName, err)
		}
		var text strings.Builder
		left := 0
		for _, c := range list {
			if slices.Contains(ids, certs.KeyID(c.PublicKey)) {
				text.Write(pki.EncodeCert(c.Raw))
				left++
			}
		}
		if left == 0 || left == len(list) { // none is left where API servers have not added theirs yet
			return nil
		}
		cm.Data[proxyTrustKey] = text.String()
		body, err := json.Marshal(cm)
		if err != nil {
			return err
		}
		return p.core.Put().Namespace("kube-system").Resource("configmaps").Name(proxyTrustName).
			SetHeader("Content-Type", "application/json").Body(body).Timeout(userWait).Do(ctx).Error()
	})
}

// resign has the tokens in Secrets signed again that were signed with one of some keys: the controller manager
// fills in what is missing. It returns the names of all Secrets with tokens, also of those that were signed
// again before an interruption.
func resign(ctx context.Context, core *kube.Core, ids []string) (names []string, err error) {
	for next := ""; ; {
		var page corev1.SecretList
		err := core.Get().Resource("secrets").Param("fieldSelector", "type="+string(corev1.SecretTypeServiceAccountToken)).
			Param("limit", fmt.Sprint(encryptPage)).Param("continue", next).Timeout(userWait).Do(ctx).Into(&page)
		if err != nil {
			return nil, fmt.Errorf("cannot list the Secrets with tokens: %w", err)
		}
		for i := range page.Items {
			s := &page.Items[i]
			names = append(names, s.Namespace+"/"+s.Name)
			if !slices.Contains(ids, certs.TokenKey(string(s.Data[corev1.ServiceAccountTokenKey]))) {
				continue
			}
			delete(s.Data, corev1.ServiceAccountTokenKey)
			body, err := json.Marshal(s)
			if err != nil {
				return nil, err
			}
			err = core.Put().Namespace(s.Namespace).Resource("secrets").Name(s.Name).SetHeader("Content-Type", "application/json").Body(body).Timeout(userWait).Do(ctx).Error()
			if err != nil && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
				return nil, fmt.Errorf("cannot have the token in the Secret %s/%s signed again: %w", s.Namespace, s.Name, err)
			}
		}
		if next = page.Continue; next == "" {
			return names, nil
		}
	}
}
