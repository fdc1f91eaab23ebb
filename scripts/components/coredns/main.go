// Command coredns is CoreDNS with the plugins that a cluster's DNS needs, and no others: what
// is not linked costs no memory and no updates. The order in which a query passes the plugins
// is CoreDNS' own.
//
// It differs from CoreDNS in two things. The plugin `refuse`, last of all, refuses what no other
// has answered, where CoreDNS alone reports an error and logs it. And before CoreDNS starts, the host's name servers, which
// the kubelet puts into /etc/resolv.conf, are looked through: what would lead back to this
// server (loopback addresses, the address of the cluster's DNS service) is left out, the rest
// goes into a file of its own, and MICROK8S_UPSTREAM tells the Corefile whether there is any.
// So a host without name servers, or with a resolver on its loopback, has a cluster whose own
// names resolve, where CoreDNS by itself would refuse to start.
package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
	"github.com/coredns/coredns/plugin"
	_ "github.com/coredns/coredns/plugin/acl"
	_ "github.com/coredns/coredns/plugin/bufsize"
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/file"
	_ "github.com/coredns/coredns/plugin/forward"
	_ "github.com/coredns/coredns/plugin/header"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/hosts"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/log"
	_ "github.com/coredns/coredns/plugin/loop"
	_ "github.com/coredns/coredns/plugin/metrics"
	_ "github.com/coredns/coredns/plugin/ready"
	_ "github.com/coredns/coredns/plugin/reload"
	_ "github.com/coredns/coredns/plugin/rewrite"
	_ "github.com/coredns/coredns/plugin/template"
	_ "github.com/coredns/coredns/plugin/tls"
	"github.com/miekg/dns"
)

// The Corefile imports upstream-${MICROK8S_UPSTREAM}.conf; the first of them forwards to the
// servers in upstreamFile. MICROK8S_CLUSTER_DNS lists the addresses of the DNS service.
const (
	hostFile     = "/etc/resolv.conf"
	upstreamFile = "/tmp/resolv.conf"
)

func init() {
	dnsserver.Directives = append(dnsserver.Directives, "refuse")
	plugin.Register("refuse", func(c *caddy.Controller) error {
		dnsserver.GetConfig(c).AddPlugin(func(plugin.Handler) plugin.Handler { return refuse{} })
		return nil
	})
}

// refuse is the plugin of that name.
type refuse struct{}

func (refuse) Name() string { return "refuse" }

func (refuse) ServeDNS(context.Context, dns.ResponseWriter, *dns.Msg) (int, error) {
	return dns.RcodeRefused, nil
}

func main() {
	if err := prepare(); err != nil {
		fmt.Fprintln(os.Stderr, "coredns:", err)
		os.Exit(1)
	}
	coremain.Run()
}

func prepare() error {
	text, err := os.ReadFile(hostFile)
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	use, left := upstreams(string(text), strings.Fields(os.Getenv("MICROK8S_CLUSTER_DNS")))
	for _, s := range left {
		fmt.Printf("name server %s of the host is not used: it would lead back here\n", s)
	}
	if len(use) == 0 {
		fmt.Println("the host has no name server for names outside of the cluster: those are refused")
		return os.Setenv("MICROK8S_UPSTREAM", "none")
	}
	var b strings.Builder
	for _, s := range use {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	if err := os.WriteFile(upstreamFile, []byte(b.String()), 0o600); err != nil {
		return err
	}
	return os.Setenv("MICROK8S_UPSTREAM", "host")
}

// upstreams returns the name servers of a resolv.conf that may be asked, and those that may not
// because they are this server: own are its addresses.
func upstreams(resolvConf string, own []string) (use, left []string) {
	for line := range strings.Lines(resolvConf) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		addr, err := netip.ParseAddr(f[1])
		switch {
		case err != nil:
			left = append(left, f[1])
		case addr.IsLoopback(), addr.IsUnspecified(), slices.Contains(own, addr.String()):
			left = append(left, f[1])
		default:
			use = append(use, f[1])
		}
	}
	return use, left
}
