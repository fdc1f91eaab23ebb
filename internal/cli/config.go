package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"microk8s/apiserver-proxy/endpoints"
	"microk8s/internal/apiaddress"
	"microk8s/internal/hostinfo"
	"microk8s/internal/hostprobe"
	"microk8s/internal/kube"
)

func (a *App) newConfig() *cobra.Command {
	var loopback, all bool
	var user configUserFlags
	cmd := &cobra.Command{
		Use:   "config [-l|--use-loopback] [--all-servers] [--user NAME [--role ROLE] [--namespace NAMESPACE] [--ttl DURATION] | --list [-o json|yaml] | --revoke NAME]",
		Short: "Print the administrator's kubeconfig of this node",
		Long: `Print the administrator's kubeconfig of this node, with the address of the machine's default
interface as its server, for use on other machines. It grants full control of the cluster. Where
the cluster has an address for the API (microk8s network api-address), that is the server.

It names one server, as scripts expect. With --all-servers it has a context more for each other
control plane node, microk8s-NODE, for when this one is down:

    microk8s config --all-servers > ~/.kube/config
    kubectl --context microk8s-n2 get nodes

With --user, make a kubeconfig with fewer rights and an end, for everybody who is not an
administrator. The roles are Kubernetes' own: view reads all but Secrets, edit changes workloads
and reads Secrets, admin also gives rights within a namespace, cluster-admin may do everything.

    microk8s config --user ann --role view > ann.kubeconfig          for 8 hours
    microk8s config --user bob --role edit --namespace shop --ttl 72h
    microk8s config --list                                           who has which role
    microk8s config --revoke ann                                     end all kubeconfigs of ann`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.perm(a.Err)(); err != nil {
				return err
			}
			if user.asked(cmd) {
				return a.configUser(cmd, &user, kubeconfigServers{loopback, all, apiaddress.Read(a.Env)})
			}
			if user.out.document() {
				return &usageError{cmd, errors.New("-o is for --list; a kubeconfig is YAML")}
			}
			return a.config(cmd.Context(), kubeconfigServers{loopback, all, apiaddress.Read(a.Env)})
		},
	}
	cmd.Flags().BoolVarP(&loopback, "use-loopback", "l", false, "leave the server's address as it is, 127.0.0.1")
	cmd.Flags().BoolVar(&all, "all-servers", false, "add a context for each other control plane node")
	user.add(cmd)
	user.out = addOutput(cmd, "table")
	completeFlag(cmd, "role", userRoles...)
	return cmd
}

// serverLine is the server of a kubeconfig where it is on the loopback.
var serverLine = regexp.MustCompile(`(?m)^(\s*server:\s*["']?https://)(127\.0\.0\.1|localhost|\[::1\])(:|/|\s|["']|$)`)

// kubeconfigServers says which servers a kubeconfig names.
type kubeconfigServers struct {
	loopback bool // this node's is left at 127.0.0.1
	all      bool // those of the other control-plane nodes too
	// shared is the virtual address of the API, if the cluster has one: it stands for this node's.
	shared netip.Addr
}

// local replaces the loopback in a kubeconfig by this node's address.
func (s kubeconfigServers) local(text string) string {
	addr := s.shared
	if !addr.IsValid() {
		addr = defaultAddress()
	}
	if s.loopback || !addr.IsValid() {
		return text
	}
	host := addr.String()
	if addr.Is6() {
		host = "[" + host + "]"
	}
	return serverLine.ReplaceAllString(text, "${1}"+host+"${3}")
}

func (a *App) config(ctx context.Context, servers kubeconfigServers) error {
	data, err := os.ReadFile(a.Env.AdminKubeconfig())
	if err != nil {
		return fmt.Errorf("cannot print the kubeconfig: %w", err)
	}
	if servers.all {
		cfg, err := clientcmd.Load(data)
		if err != nil {
			return fmt.Errorf("cannot read the administrator's kubeconfig: %w", err)
		}
		if err := a.addServers(ctx, cfg); err != nil {
			return err
		}
		if data, err = clientcmd.Write(*cfg); err != nil {
			return err
		}
	}
	fmt.Fprintln(a.Out, strings.TrimSuffix(servers.local(string(data)), "\n")+"\n")
	return nil
}

// serversWait bounds how long the API server is asked for the others.
const serversWait = 10 * time.Second

// addServers adds to a kubeconfig a cluster and a context for each API server of the cluster but this
// node's, with the names of the current ones and the node's behind them.
func (a *App) addServers(ctx context.Context, cfg *clientcmdapi.Config) error {
	ctx, cancel := context.WithTimeout(ctx, serversWait)
	defer cancel()
	servers, err := a.otherServers(ctx)
	if err != nil {
		return failf("without --all-servers it names this node alone; see what is wrong with: microk8s status", "cannot list the API servers of the cluster: %w", err)
	}
	current := cfg.Contexts[cfg.CurrentContext]
	if current == nil || cfg.Clusters[current.Cluster] == nil {
		return errors.New("the administrator's kubeconfig has no current context")
	}
	for name, address := range servers {
		cluster, use := cfg.Clusters[current.Cluster].DeepCopy(), current.DeepCopy()
		cluster.Server = "https://" + address
		use.Cluster = current.Cluster + "-" + name
		cfg.Clusters[use.Cluster] = cluster
		cfg.Contexts[cfg.CurrentContext+"-"+name] = use
	}
	return nil
}

// otherServers returns the other API servers as host:port, by the names of their nodes, or by their
// addresses where no node has that one.
func (a *App) otherServers(ctx context.Context) (map[string]string, error) {
	core, err := kube.FromFile(a.Env.AdminKubeconfig())
	if err != nil {
		return nil, err
	}
	var found discoveryv1.EndpointSliceList
	data, err := core.Get().AbsPath("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices").
		Param("labelSelector", discoveryv1.LabelServiceName+"=kubernetes").SetHeader("Accept", "application/json").DoRaw(ctx)
	if err == nil {
		err = json.Unmarshal(data, &found)
	}
	if err != nil {
		return nil, err
	}
	nodes, err := core.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	names := map[string]string{}
	for i := range nodes {
		for _, address := range nodes[i].Status.Addresses {
			if address.Type == corev1.NodeInternalIP {
				names[address.Address] = nodes[i].Name
			}
		}
	}
	own, err := hostinfo.Addresses()
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, server := range endpoints.FromSlices(found.Items) {
		address, _, err := net.SplitHostPort(server)
		local := func(ip net.IP) bool { return ip.Equal(net.ParseIP(address)) }
		if err == nil && !slices.ContainsFunc(own, local) {
			out[cmp.Or(names[address], address)] = server
		}
	}
	return out, nil
}

// defaultAddress returns the address of the interface that has the default route, IPv4 before
// IPv6; where there is no such route the first address that is neither loopback nor
// link-local nor on a bridge of containers, again IPv4 before IPv6; the zero Addr where there is none.
func defaultAddress() netip.Addr {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteList(nil, family)
		if err != nil {
			continue
		}
		for _, r := range routes {
			ones := 0
			if r.Dst != nil {
				ones, _ = r.Dst.Mask.Size()
			}
			if ones != 0 || r.LinkIndex == 0 {
				continue
			}
			if family == netlink.FAMILY_V6 {
				return steadyAddress()
			}
			if link, err := net.InterfaceByIndex(r.LinkIndex); err == nil {
				if addr := firstAddress(link); addr.IsValid() {
					return addr
				}
			}
		}
	}
	links, err := net.Interfaces()
	if err != nil {
		return netip.Addr{}
	}
	for i := range links {
		if ours(links[i].Name) || links[i].Flags&net.FlagUp == 0 {
			continue
		}
		if addr := firstAddress(&links[i]); addr.IsValid() {
			return addr
		}
	}
	return steadyAddress()
}

// steadyAddress is the IPv6 address by which a node is known: not one that the host changes by itself.
func steadyAddress() netip.Addr {
	addr, _ := netip.ParseAddr(hostprobe.Probe("/").Address6)
	return addr
}

// ours reports whether an interface belongs to containers.
func ours(name string) bool {
	for _, prefix := range []string{"lo", "cni", "flannel", "veth", "docker", "cali", "vxlan", "br-", "kube-"} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// firstAddress is the first address of IPv4 on an interface.
func firstAddress(link *net.Interface) netip.Addr {
	addrs, err := link.Addrs()
	if err != nil {
		return netip.Addr{}
	}
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a.String())
		if err != nil {
			continue
		}
		ip := p.Addr().Unmap()
		if ip.Is4() && ip.IsGlobalUnicast() {
			return ip
		}
	}
	return netip.Addr{}
}
