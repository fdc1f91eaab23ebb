package cli

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"strings"

	"github.com/spf13/cobra"
	"github.com/vishvananda/netlink"
)

func (a *App) newConfig() *cobra.Command {
	var loopback bool
	var user configUserFlags
	cmd := &cobra.Command{
		Use:   "config [-l|--use-loopback] [--user NAME [--role ROLE] [--namespace NAMESPACE] [--ttl DURATION] | --list [-o json|yaml] | --revoke NAME]",
		Short: "Print the administrator's kubeconfig of this node",
		Long: `Print the administrator's kubeconfig of this node, with the address of the machine's default
interface as its server, for use on other machines. It grants full control of the cluster.

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
				return a.configUser(cmd, &user, loopback)
			}
			if user.out.document() {
				return &usageError{cmd, errors.New("-o is for --list; a kubeconfig is YAML")}
			}
			return a.config(loopback)
		},
	}
	cmd.Flags().BoolVarP(&loopback, "use-loopback", "l", false, "leave the server's address as it is, 127.0.0.1")
	user.add(cmd)
	user.out = addOutput(cmd, "table")
	completeFlag(cmd, "role", userRoles...)
	return cmd
}

// serverLine is the server of a kubeconfig where it is on the loopback.
var serverLine = regexp.MustCompile(`(?m)^(\s*server:\s*["']?https://)(127\.0\.0\.1|localhost|\[::1\])(:|/|\s|["']|$)`)

func (a *App) config(loopback bool) error {
	data, err := os.ReadFile(a.Env.AdminKubeconfig())
	if err != nil {
		return fmt.Errorf("cannot print the kubeconfig: %w", err)
	}
	text := string(data)
	if addr := defaultAddress(); !loopback && addr.IsValid() {
		host := addr.String()
		if addr.Is6() {
			host = "[" + host + "]"
		}
		text = serverLine.ReplaceAllString(text, "${1}"+host+"${3}")
	}
	fmt.Fprintln(a.Out, strings.TrimSuffix(text, "\n")+"\n")
	return nil
}

// defaultAddress returns the address of the interface that has the default route, IPv4 before
// IPv6; where there is no such route the first address that is neither loopback nor
// link-local nor on a bridge of containers; the zero Addr where there is none.
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
			if link, err := net.InterfaceByIndex(r.LinkIndex); err == nil {
				if addr := firstAddress(link, family == netlink.FAMILY_V4); addr.IsValid() {
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
		if addr := firstAddress(&links[i], true); addr.IsValid() {
			return addr
		}
	}
	return netip.Addr{}
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

func firstAddress(link *net.Interface, v4 bool) netip.Addr {
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
		if ip.Is4() == v4 && ip.IsGlobalUnicast() {
			return ip
		}
	}
	return netip.Addr{}
}
