package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"microk8s/cluster-agent/fanout"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/encryption"
	"microk8s/internal/journal"
	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
)

func (a *App) newEncryption() *cobra.Command {
	root := &cobra.Command{
		Use:   "encryption status|rotate",
		Short: "Show and change the keys with which Secrets are encrypted",
		Long: `Show and change the keys with which the API servers encrypt Secrets and ConfigMaps in the
datastore.

    microk8s encryption status     the keys by name, never the keys themselves
    microk8s encryption rotate     encrypt everything with a new key, and drop the others

A rotation makes a new key known to every control plane node, then has all of them write with it,
then writes every Secret and ConfigMap again, then drops the other keys. API servers are
restarted three times, one after the other. When it is interrupted, run it again: it goes on.
All control plane nodes must run. Backups from before can be restored afterwards too: they hold
their key.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	var out *output
	status := &cobra.Command{
		Use: "status [-o json|yaml]", Short: "Show the keys by name", Args: noArgs,
		RunE: func(*cobra.Command, []string) error { return a.encryptionStatus(out) },
	}
	out = addOutput(status, "text")
	root.AddCommand(status, &cobra.Command{
		Use: "rotate", Short: "Encrypt everything with a new key", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.encryptionRotate(cmd.Context()) },
	})
	return root
}

// rotationJournal has a rotation that has begun and not ended.
func (a *App) rotationJournal() string {
	return filepath.Join(a.Env.ClusterDir(), "encryption-journal")
}

// oldRotationFile has the name of the new key of a rotation that an earlier release has begun.
func (a *App) oldRotationFile() string {
	return filepath.Join(a.Env.ClusterDir(), "encryption-rotation")
}

// begunRotation returns the name of the new key of a rotation that an earlier release has begun; ""
// where there is none.
func (a *App) begunRotation() string {
	data, err := os.ReadFile(a.oldRotationFile())
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

// rotating reports whether a rotation has begun and not ended.
func (a *App) rotating() bool {
	r, err := journal.Read(a.rotationJournal())
	return r != nil || err != nil || a.begunRotation() != ""
}

// ownKeys returns the keys of this node, as its API server uses them.
func (a *App) ownKeys() (encryption.Keys, error) {
	path := a.encryptionFile()
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, failf("docs/cis.md says how it is switched on", "this cluster does not encrypt Secrets at rest")
	}
	if err != nil {
		return nil, err
	}
	keys, err := encryption.Parse(data)
	if err == nil && path != encryption.Path(a.Env) {
		err = encryption.ErrForeign
	}
	if err != nil {
		return nil, failf("change its keys by hand, as Kubernetes' documentation says under \"Encrypting Confidential Data at Rest\"", "%s: %w", path, err)
	}
	return keys, nil
}

// encryptionDocument is the kind EncryptionStatus.
type encryptionDocument struct {
	documentMeta
	Provider string   `json:"provider"`
	Keys     []string `json:"keys"` // the first one encrypts
	Rotating bool     `json:"rotating"`
}

func (a *App) encryptionStatus(out *output) error {
	keys, err := a.ownKeys()
	if err != nil {
		return err
	}
	rotating := a.rotating()
	if out.document() {
		return a.print(out, encryptionDocument{documentOf("EncryptionStatus"), "secretbox", keys.Names(), rotating})
	}
	fmt.Fprintf(a.Out, "Secrets and ConfigMaps are encrypted with secretbox\nfile: %s\nkeys:\n", encryption.Path(a.Env))
	for i, name := range keys.Names() {
		what := "encrypts"
		if i > 0 {
			what = "reads only"
		}
		fmt.Fprintf(a.Out, "  %s  %s\n", name, what)
	}
	if rotating {
		fmt.Fprintln(a.Out, "A rotation was interrupted; go on with: sudo microk8s encryption rotate")
	}
	return nil
}

// encryptionRotate runs the steps of a rotation, or those that are left of one.
func (a *App) encryptionRotate(ctx context.Context) error {
	if _, err := a.ownKeys(); err != nil {
		return err
	}
	nodes, err := a.controlPlaneNodes(ctx)
	if err != nil {
		return err
	}
	j, err := journal.Open(a.rotationJournal())
	if err != nil {
		return err
	}
	defer j.Close()
	p := a.progress()
	j.Log = a.log()
	j.Show = func(s journal.Step, _ bool, run func() error) error { return p.step(s.Title, run) }
	j.At = a.dieAt
	cluster := fanout.Cluster{Env: a.Env}
	rotation := encryption.Rotation{
		Keys: a.ownKeys,
		Spread: func(ctx context.Context, keys encryption.Keys) error {
			p.say("  on %s, one after the other", strings.Join(nodes, ", "))
			return cluster.Encryption(ctx, string(keys.Encode()), nodes...)
		},
		Rewrite: a.encryptAgain,
		Begun:   a.begunRotation(),
	}
	if a.rotating() {
		p.say("Going on with the rotation that was interrupted")
	}
	done, err := rotation.Run(ctx, j)
	if err != nil {
		return failf("no Secret is lost: when all control plane nodes run, go on with: sudo microk8s encryption rotate", "the rotation was interrupted: %w", err)
	}
	if err := os.Remove(a.oldRotationFile()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	fmt.Fprintf(a.Out, "%d Secrets and ConfigMaps are encrypted with %s\n", done.Objects, done.Key)
	return nil
}

// controlPlaneNodes lists the control-plane nodes by name. Every member of the datastore must be a
// node of the cluster: one that is left out could not read what the others write.
func (a *App) controlPlaneNodes(ctx context.Context) ([]string, error) {
	if !nodeconfig.Load(a.Env).Datastore.Own() {
		return nil, failf("change the keys by hand on each control plane node", "the cluster's datastore is an etcd of its own, which does not say who its control plane nodes are")
	}
	targets, err := (&fanout.Cluster{Env: a.Env}).Targets(ctx)
	if err != nil {
		return nil, failf("see what is wrong with: microk8s status", "cannot list the nodes: %w", err)
	}
	members := storedir.Dir(a.Env.BackendLive()).Addresses()
	var names []string
	for _, m := range members {
		host, _, err := net.SplitHostPort(m)
		if err != nil {
			return nil, err
		}
		i := slices.IndexFunc(targets, func(t fanout.Target) bool {
			own, _, _ := net.SplitHostPort(t.Address)
			return own == host
		})
		if ip := net.ParseIP(host); i < 0 && ip != nil && ip.IsLoopback() && len(targets) == 1 {
			i = 0 // a node that was never joined
		}
		if i < 0 && len(members) == 1 {
			own, err := os.Hostname()
			if err != nil {
				return nil, err
			}
			i = slices.IndexFunc(targets, func(t fanout.Target) bool { return strings.EqualFold(t.Name, own) })
		}
		if i < 0 {
			return nil, failf("remove it with: microk8s remove-node "+host+" --force, or bring it back", "the member %s of the datastore is no node of the cluster", m)
		}
		names = append(names, targets[i].Name)
	}
	if len(names) == 0 {
		return nil, failf("see what is wrong with: microk8s status", "the datastore has no members")
	}
	return names, nil
}

// encryptPage is how many objects are read at a time.
const encryptPage = 200

// encryptAgain writes every Secret and ConfigMap as it is, which encrypts it with the first key. One
// that somebody else writes or deletes meanwhile is encrypted already, or gone.
func (a *App) encryptAgain(ctx context.Context) (count int, err error) {
	core, err := kube.FromFile(a.Env.AdminKubeconfig())
	if err != nil {
		return 0, err
	}
	write := func(resource, namespace, name string, o any) error {
		body, err := json.Marshal(o)
		if err != nil {
			return err
		}
		err = core.Put().Namespace(namespace).Resource(resource).Name(name).SetHeader("Content-Type", "application/json").Body(body).Do(ctx).Error()
		if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s %s/%s: %w", strings.TrimSuffix(resource, "s"), namespace, name, err)
		}
		count++
		return nil
	}
	next := ""
	for {
		var page corev1.SecretList
		if err := core.Get().Resource("secrets").Param("limit", strconv.Itoa(encryptPage)).Param("continue", next).Do(ctx).Into(&page); err != nil {
			return count, err
		}
		for i := range page.Items {
			if err := write("secrets", page.Items[i].Namespace, page.Items[i].Name, &page.Items[i]); err != nil {
				return count, err
			}
		}
		if next = page.Continue; next == "" {
			break
		}
	}
	next = ""
	for {
		var page corev1.ConfigMapList
		if err := core.Get().Resource("configmaps").Param("limit", strconv.Itoa(encryptPage)).Param("continue", next).Do(ctx).Into(&page); err != nil {
			return count, err
		}
		for i := range page.Items {
			if err := write("configmaps", page.Items[i].Namespace, page.Items[i].Name, &page.Items[i]); err != nil {
				return count, err
			}
		}
		if next = page.Continue; next == "" {
			return count, nil
		}
	}
}
