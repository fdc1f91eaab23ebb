package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/spf13/cobra"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"microk8s/internal/apiaddress"
	"microk8s/internal/hostinfo"
	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
)

func (a *App) newAPIAddress() *cobra.Command {
	var out *output
	cmd := &cobra.Command{
		Use:   "api-address [ADDRESS|none] [-o json|yaml]",
		Short: "Show, set or remove the virtual address of the API",
		Long: `Show, set or remove the virtual address of the API: one address of the nodes' network in front of
port 16443 of all control plane nodes. One of them answers for it at a time, by ARP or neighbour
discovery; when it dies or is stopped, another one does. It is in the certificates, and what
microk8s config prints as the server.

    microk8s network api-address                 which it is, and which node answers for it
    microk8s network api-address 10.64.140.5     an address that nothing else has
    microk8s network api-address none            remove it

A node never takes it for its own address, and workers need it not: their proxies know all API servers.`,
		Args: atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.worker("\nPlease use the master node.", ExitError)(); err != nil {
				return err
			}
			if len(args) == 0 {
				return a.showAPIAddress(cmd.Context(), out)
			}
			if args[0] == "none" {
				return a.setAPIAddress(cmd.Context(), netip.Addr{})
			}
			addr, err := apiaddress.Parse(args[0])
			if err != nil {
				return &usageError{cmd, err}
			}
			return a.setAPIAddress(cmd.Context(), addr)
		},
	}
	out = addOutput(cmd, "text")
	return cmd
}

// apiAddressDocument is the kind APIAddress.
type apiAddressDocument struct {
	documentMeta
	Address string `json:"address,omitempty"`
	Node    string `json:"node,omitempty"` // that answers for it
}

const apiAddressPath = "/api/v1/namespaces/kube-system/configmaps/" + apiaddress.ConfigMap

func (a *App) showAPIAddress(ctx context.Context, out *output) error {
	core, err := kube.FromFile(a.Env.AdminKubeconfig())
	if err != nil {
		return err
	}
	doc := apiAddressDocument{documentMeta: documentOf("APIAddress")}
	var cm corev1.ConfigMap
	if err := core.Get().AbsPath(apiAddressPath).Do(ctx).Into(&cm); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("cannot read the address of the API: %w", err)
	}
	doc.Address = cm.Data[apiaddress.Key]
	if doc.Address != "" {
		var lease coordinationv1.Lease
		err := core.Get().AbsPath("/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/" + apiaddress.Lease).Do(ctx).Into(&lease)
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("cannot find out who answers for the address of the API: %w", err)
		}
		if lease.Spec.HolderIdentity != nil {
			doc.Node = *lease.Spec.HolderIdentity
		}
	}
	if out.document() {
		return a.print(out, doc)
	}
	switch {
	case doc.Address == "":
		fmt.Fprintln(a.Out, "The API has no virtual address. To set one: microk8s network api-address ADDRESS")
	case doc.Node == "":
		fmt.Fprintf(a.Out, "%s: no node answers for it\n", doc.Address)
	default:
		fmt.Fprintf(a.Out, "%s: node %s answers for it\n", doc.Address, doc.Node)
	}
	return nil
}

// setAPIAddress writes the address down in the cluster, for its control-plane nodes to act on.
func (a *App) setAPIAddress(ctx context.Context, addr netip.Addr) error {
	core, err := kube.FromFile(a.Env.AdminKubeconfig())
	if err != nil {
		return err
	}
	if !addr.IsValid() {
		err := core.Delete().AbsPath(apiAddressPath).Do(ctx).Error()
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("cannot remove the address of the API: %w", err)
		}
		fmt.Fprintln(a.Out, "The API has no virtual address any more")
		return nil
	}
	if apiaddress.Read(a.Env) != addr {
		if err := a.freeAddress(ctx, core, addr); err != nil {
			return err
		}
	}
	cm := &corev1.ConfigMap{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "ConfigMap"},
		ObjectMeta: metav1.ObjectMeta{Name: apiaddress.ConfigMap, Namespace: metav1.NamespaceSystem},
		Data:       map[string]string{apiaddress.Key: addr.String()},
	}
	data, err := json.Marshal(cm)
	if err != nil {
		return err
	}
	err = core.Patch(types.ApplyPatchType).AbsPath(apiAddressPath).Param("fieldManager", "microk8s").Param("force", "true").Body(data).Do(ctx).Error()
	if err != nil {
		return fmt.Errorf("cannot set the address of the API: %w", err)
	}
	fmt.Fprintf(a.Out, "The API gets the address %s; microk8s config prints it within some seconds, when it is in the certificates\n", addr)
	return nil
}

// freeAddress refuses an address that is not free on this host's network.
func (a *App) freeAddress(ctx context.Context, core *kube.Core, addr netip.Addr) error {
	refuse := func(why string, args ...any) error {
		return failf("choose a free address of the nodes' network", "cannot use %s: %s", addr, fmt.Sprintf(why, args...))
	}
	nodes, err := core.Nodes(ctx)
	if err != nil {
		return fmt.Errorf("cannot list the nodes: %w", err)
	}
	for _, n := range nodes {
		for _, have := range n.Status.Addresses {
			if have.Address == addr.String() {
				return refuse("it is the address of node %s", n.Name)
			}
		}
	}
	own, err := hostinfo.Addresses()
	if err != nil {
		return fmt.Errorf("cannot read this host's addresses: %w", err)
	}
	for _, ip := range own {
		if ip.Equal(net.IP(addr.AsSlice())) {
			return refuse("this host has it already")
		}
	}
	config := nodeconfig.Load(a.Env)
	for _, p := range config.ClusterCIDRs {
		if p.Contains(addr) {
			return refuse("it is in the range of pods, %s", p)
		}
	}
	for _, p := range config.APIServer.ServiceCIDRs {
		if p.Contains(addr) {
			return refuse("it is in the range of Services, %s", p)
		}
	}
	mac, err := apiaddress.Answered(ctx, addr)
	switch {
	case errors.Is(err, apiaddress.ErrElsewhere):
		return refuse("%v", err)
	case err != nil:
		return fmt.Errorf("cannot find out whether %s is free: %w", addr, err)
	case mac != nil:
		return refuse("the host %s answers for it", mac)
	}
	return nil
}
