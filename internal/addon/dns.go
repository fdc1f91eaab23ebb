package addon

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"microk8s/internal/nodeconfig"
	"microk8s/internal/ranges"
	"microk8s/internal/snapenv"
)

// IgnoredDNSPath is where the API server has the ConfigMap into which CoreDNS writes which keys of coredns-custom
// it has left out, and why (scripts/components/coredns).
const IgnoredDNSPath = "/api/v1/namespaces/kube-system/configmaps/coredns-custom-ignored"

// dnsValues fill the manifest of dns.
type dnsValues struct {
	ClusterIP netip.Addr
	// Second is the address of the other family, where Services have both; the zero value otherwise.
	Second    netip.Addr
	Domain    string
	Upstreams []string // name servers for names outside; empty: those of the host
}

// dnsArgs are the arguments of `enable dns [servers] [service IP] [domain]`.
type dnsArgs struct {
	servers []string
	ip      netip.Addr // the zero value where it is not given
	domain  string     // "" where it is not given
}

func readDNS(words []string) (dnsArgs, error) {
	var v dnsArgs
	var err error
	if len(words) > 3 {
		return v, &ArgumentError{fmt.Sprintf("unexpected argument %q", words[3])}
	}
	if v.servers, err = dnsServers(words[:min(1, len(words))]); err != nil {
		return v, err
	}
	if len(words) > 1 {
		if v.ip, err = netip.ParseAddr(words[1]); err != nil {
			return v, &ArgumentError{fmt.Sprintf("%q is not an address for the DNS service; name servers are one word, separated by commas", words[1])}
		}
	}
	if len(words) > 2 {
		if v.domain = words[2]; !validDomain(v.domain) {
			return v, &ArgumentError{fmt.Sprintf("%q is not a domain name", v.domain)}
		}
	}
	return v, nil
}

func dnsServers(words []string) ([]string, error) {
	if len(words) == 0 || words[0] == "" {
		return nil, nil
	}
	var out []string
	for s := range strings.SplitSeq(words[0], ",") {
		addr, err := netip.ParseAddr(s)
		text := s
		if err != nil {
			var at netip.AddrPort
			at, err = netip.ParseAddrPort(s)
			addr = at.Addr()
		}
		switch {
		case err != nil:
			return nil, &ArgumentError{fmt.Sprintf("%q is not the address of a name server", s)}
		case addr.IsLoopback(), addr.IsUnspecified(), addr.IsMulticast():
			return nil, &ArgumentError{fmt.Sprintf("pods cannot reach a name server at %s", addr)}
		}
		out = append(out, text)
	}
	return out, nil
}

func renderDNS(ctx context.Context, s *Set, words []string) (any, error) {
	var v dnsValues
	given, err := readDNS(words)
	if err != nil {
		return nil, err
	}
	v.Upstreams = given.servers
	if _, err := nodeconfig.File(s.Env, nodeconfig.Kubelet); err != nil {
		return nil, err // the domain is in it
	}
	v.Domain = nodeconfig.Load(s.Env).ClusterDomain
	if given.domain != "" {
		v.Domain = given.domain
	}
	if !validDomain(v.Domain) {
		return nil, fmt.Errorf("--cluster-domain=%s in %s is not a domain name", v.Domain, s.Env.Args("kubelet"))
	}
	if given.ip.IsValid() {
		v.ClusterIP = given.ip
		return v, s.freeAddress(ctx, given.ip)
	}
	v.ClusterIP, v.Second, err = s.dnsAddress(ctx)
	return v, err
}

// freeAddress checks that the DNS service can have an address.
func (s *Set) freeAddress(ctx context.Context, ip netip.Addr) error {
	networks, err := serviceRanges(s.Env)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(networks, func(p netip.Prefix) bool { return p.Contains(ip) }) {
		return &ArgumentError{fmt.Sprintf("%s is not in the range of Services, %v", ip, networks)}
	}
	list, err := s.client.Resource(services).List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("cannot list the Services: %w", err)
	}
	for _, svc := range list.Items {
		all, _, _ := unstructured.NestedStringSlice(svc.Object, "spec", "clusterIPs")
		if slices.Contains(all, ip.String()) && !(svc.GetNamespace() == metav1.NamespaceSystem && svc.GetName() == "kube-dns") {
			return &ArgumentError{fmt.Sprintf("Service %s/%s has the address %s", svc.GetNamespace(), svc.GetName(), ip)}
		}
	}
	return nil
}

// serviceRanges returns the ranges of the addresses of Services.
func serviceRanges(env snapenv.Env) ([]netip.Prefix, error) {
	c := nodeconfig.Load(env)
	return c.APIServer.ServiceCIDRs, c.Err(nodeconfig.PartServiceCIDRs)
}

// dnsAddress is the address of the DNS service: the one it has, else the one at the fixed place
// in the Service range. second is the same in the range of the other family; it is not made for a service whose first address
// somebody has chosen.
func (s *Set) dnsAddress(ctx context.Context) (first, second netip.Addr, err error) {
	svc, err := s.client.Resource(services).Namespace(metav1.NamespaceSystem).Get(ctx, "kube-dns", metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return first, second, fmt.Errorf("cannot get the DNS service: %w", err)
	}
	usual, err2 := dnsAddresses(s.Env)
	if err2 != nil {
		return first, second, err2
	}
	if err == nil {
		has, _, _ := unstructured.NestedStringSlice(svc.Object, "spec", "clusterIPs")
		if len(has) == 0 {
			text, _, _ := unstructured.NestedString(svc.Object, "spec", "clusterIP")
			has = []string{text}
		}
		if addr, err := netip.ParseAddr(has[0]); err == nil {
			switch {
			case len(has) > 1:
				second, _ = netip.ParseAddr(has[1])
			case addr == usual[0] && len(usual) > 1:
				second = usual[1]
			}
			return addr, second, nil
		}
	}
	if len(usual) > 1 {
		second = usual[1]
	}
	return usual[0], second, nil
}

// dnsAddresses are those that the DNS service gets on this installation: one in each range of Services of the API server.
func dnsAddresses(env snapenv.Env) (out []netip.Addr, err error) {
	all, err := serviceRanges(env)
	if err != nil {
		return nil, err
	}
	for _, prefix := range all {
		addr := ranges.DNS(prefix)
		if !prefix.Contains(addr) {
			return nil, fmt.Errorf("--service-cluster-ip-range=%s in %s has no room for the DNS service at its tenth address", prefix, env.Args("kube-apiserver"))
		}
		out = append(out, addr)
	}
	return out, nil
}

// validDomain keeps what could change the meaning of the Corefile out of it.
func validDomain(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(strings.TrimSuffix(s, "."), ".") {
		if label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-") != "" {
			return false
		}
	}
	return true
}

// DNS returns address and domain of the DNS service, if that is what was enabled.
func (a Applied) DNS() (ip netip.Addr, domain string, ok bool) {
	v, ok := a.Values.(dnsValues)
	return v.ClusterIP, v.Domain, ok
}
