package addon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"microk8s/internal/args"
	"microk8s/internal/snapenv"
)

// What holds where the argument files say nothing (cli.md 6.3).
const (
	defaultServiceCIDR = "10.152.183.0/24"
	defaultDomain      = "cluster.local"
)

// dnsOffset is where in the Service range the DNS service is: 10.152.183.10.
const dnsOffset = 10

// dnsValues fill the manifest of dns.
type dnsValues struct {
	ClusterIP netip.Addr
	Domain    string
	Upstreams []string // name servers for names outside; empty: those of the host
}

// checkDNS checks the arguments of `enable dns [servers]`.
func checkDNS(args []string) error {
	_, err := dnsServers(args)
	return err
}

func dnsServers(words []string) ([]string, error) {
	if len(words) > 1 {
		return nil, &ArgumentError{fmt.Sprintf("unexpected argument %q: name servers are one word, separated by commas", words[1])}
	}
	if len(words) == 0 {
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
	v := dnsValues{Domain: defaultDomain}
	var err error
	if v.Upstreams, err = dnsServers(words); err != nil {
		return nil, err
	}
	kubelet, err := args.Load(s.Env.Args("kubelet"), args.GrammarA)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err == nil {
		if d, ok := kubelet.Value("cluster-domain", s.Env.Lookup); ok {
			v.Domain = d
		}
	}
	if !validDomain(v.Domain) {
		return nil, fmt.Errorf("--cluster-domain=%s in %s is not a domain name", v.Domain, s.Env.Args("kubelet"))
	}
	v.ClusterIP, err = s.dnsAddress(ctx)
	return v, err
}

// dnsAddress is the address of the DNS service: the one it has, else the one at the fixed place
// in the Service range.
func (s *Set) dnsAddress(ctx context.Context) (netip.Addr, error) {
	svc, err := s.client.Resource(services).Namespace(metav1.NamespaceSystem).Get(ctx, "kube-dns", metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return netip.Addr{}, fmt.Errorf("cannot look for the DNS service: %w", err)
	}
	if err == nil {
		text, _, _ := unstructured.NestedString(svc.Object, "spec", "clusterIP")
		if addr, err := netip.ParseAddr(text); err == nil {
			return addr, nil
		}
	}
	return DNSAddress(s.Env)
}

// DNSAddress gives the address that the DNS service gets on this installation, from the
// Service range of the API server.
func DNSAddress(env snapenv.Env) (netip.Addr, error) {
	text := defaultServiceCIDR
	if f, err := args.Load(env.Args("kube-apiserver"), args.GrammarA); err == nil {
		if v, ok := f.Value("service-cluster-ip-range", env.Lookup); ok {
			text = v
		}
	}
	first, _, _ := strings.Cut(text, ",")
	prefix, err := netip.ParsePrefix(strings.TrimSpace(first))
	if err != nil {
		return netip.Addr{}, fmt.Errorf("cannot use --service-cluster-ip-range=%s in %s: %w", text, env.Args("kube-apiserver"), err)
	}
	addr := prefix.Masked().Addr()
	for range dnsOffset {
		addr = addr.Next()
	}
	if !prefix.Contains(addr) {
		return netip.Addr{}, fmt.Errorf("--service-cluster-ip-range=%s in %s has no room for the DNS service at its address %d", text, env.Args("kube-apiserver"), dnsOffset)
	}
	return addr, nil
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

// DNS gives the address of the DNS service, if that is what was enabled.
func (a Applied) DNS() (netip.Addr, bool) {
	v, ok := a.Values.(dnsValues)
	return v.ClusterIP, ok
}
