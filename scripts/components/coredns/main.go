// Command coredns is CoreDNS with the plugins that people use in a cluster, and without those that are clients of
// clouds and of tracing: what is not linked costs no memory and no updates. The order in which a query passes the
// plugins is CoreDNS' own.
//
// It differs from CoreDNS in three things. What is wrong in the ConfigMap coredns-custom is left out (custom.go). The plugin `refuse`, last of all, refuses what no other
// has answered, where CoreDNS alone reports an error and logs it. And before CoreDNS starts, the host's name servers, which
// the kubelet puts into /etc/resolv.conf, are looked through: what would lead back to this
// server (loopback addresses, the address of the cluster's DNS service) or cannot be reached from a pod (IPv6 addresses of a link) is left out, the rest
// goes into a file of its own, and MICROK8S_UPSTREAM tells the Corefile whether there is any.
// So a host without name servers, or with a resolver on its loopback, has a cluster whose own
// names resolve, where CoreDNS by itself would refuse to start.
package main

import (
	"context"
	"errors"
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
	_ "github.com/coredns/coredns/plugin/any"
	_ "github.com/coredns/coredns/plugin/auto"
	_ "github.com/coredns/coredns/plugin/autopath"
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/bufsize"
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/cancel"
	_ "github.com/coredns/coredns/plugin/chaos"
	_ "github.com/coredns/coredns/plugin/debug"
	_ "github.com/coredns/coredns/plugin/dns64"
	_ "github.com/coredns/coredns/plugin/dnssec"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/etcd"
	_ "github.com/coredns/coredns/plugin/file"
	_ "github.com/coredns/coredns/plugin/forward"
	_ "github.com/coredns/coredns/plugin/geoip"
	_ "github.com/coredns/coredns/plugin/grpc"
	_ "github.com/coredns/coredns/plugin/header"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/hosts"
	_ "github.com/coredns/coredns/plugin/k8s_external"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/local"
	_ "github.com/coredns/coredns/plugin/log"
	_ "github.com/coredns/coredns/plugin/loop"
	_ "github.com/coredns/coredns/plugin/metadata"
	_ "github.com/coredns/coredns/plugin/metrics"
	_ "github.com/coredns/coredns/plugin/minimal"
	_ "github.com/coredns/coredns/plugin/multisocket"
	_ "github.com/coredns/coredns/plugin/nsid"
	_ "github.com/coredns/coredns/plugin/pprof"
	_ "github.com/coredns/coredns/plugin/ready"
	_ "github.com/coredns/coredns/plugin/reload"
	_ "github.com/coredns/coredns/plugin/rewrite"
	_ "github.com/coredns/coredns/plugin/root"
	_ "github.com/coredns/coredns/plugin/secondary"
	_ "github.com/coredns/coredns/plugin/sign"
	_ "github.com/coredns/coredns/plugin/template"
	_ "github.com/coredns/coredns/plugin/timeouts"
	_ "github.com/coredns/coredns/plugin/tls"
	_ "github.com/coredns/coredns/plugin/transfer"
	_ "github.com/coredns/coredns/plugin/tsig"
	_ "github.com/coredns/coredns/plugin/view"
	_ "github.com/coredns/coredns/plugin/whoami"
	"github.com/miekg/dns"
)

// The Corefile imports upstream-${MICROK8S_UPSTREAM}.conf; the first of them forwards to the
// servers in upstreamFile. MICROK8S_CLUSTER_DNS lists the addresses of the DNS service.
const (
	corefile     = "/etc/coredns/Corefile"
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
	if file := os.Getenv(checkVar); file != "" {
		if err := checkOnly(file); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if err := prepare(); err != nil {
		fmt.Fprintln(os.Stderr, "coredns:", err)
		os.Exit(1)
	}
	c := &custom{corefile: corefile, from: customFolder, link: takenFolder, try: tryCorefile(corefile), report: reporter()}
	err := errors.Join(os.Setenv(customVar, takenFolder), c.take())
	if err != nil {
		fmt.Printf("[ERROR] the ConfigMap coredns-custom is left out: %v\n", err)
	}
	go func() {
		if err := c.follow(); err != nil {
			fmt.Printf("[ERROR] changes of the ConfigMap coredns-custom are not seen until this pod is restarted: %v\n", err)
		}
	}()
	coremain.Run()
}

func prepare() error {
	text, err := os.ReadFile(hostFile)
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	use, left := upstreams(string(text), strings.Fields(os.Getenv("MICROK8S_CLUSTER_DNS")))
	for _, s := range left {
		fmt.Printf("name server %s of the host is not used: it would lead back here, or pods cannot reach it\n", s)
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
// because they are this server, whose addresses are own, or are of the host's link: a pod has no way to
// fe80::1%eth0. (IPv4 addresses of a link are reached through the host; clouds have name servers at one.)
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
		case addr.IsLoopback(), addr.IsUnspecified(), addr.Is6() && addr.IsLinkLocalUnicast(), slices.Contains(own, addr.String()):
			left = append(left, f[1])
		default:
			use = append(use, f[1])
		}
	}
	return use, left
}
