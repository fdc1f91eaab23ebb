package addon

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"microk8s/internal/apiaddress"
	"microk8s/internal/hostinfo"
	"microk8s/internal/nodeconfig"
)

// metallbQuestion is upstream's.
const metallbQuestion = "Enter each IP address range delimited by comma (e.g. '10.64.140.43-10.64.140.49,192.168.0.105-192.168.0.111'): "

// maxRanges is how many ranges one pool may have.
const maxRanges = 100

// addressRange is the addresses from the first to the last, of one family.
type addressRange struct{ first, last netip.Addr }

func (r addressRange) String() string {
	if r.first == r.last {
		return r.first.String()
	}
	return r.first.String() + "-" + r.last.String()
}

func (r addressRange) overlaps(o addressRange) bool {
	return r.first.BitLen() == o.first.BitLen() && r.first.Compare(o.last) <= 0 && o.first.Compare(r.last) <= 0
}

func rangeOf(p netip.Prefix) addressRange {
	p = p.Masked()
	last := p.Addr().AsSlice()
	for bit := p.Bits(); bit < p.Addr().BitLen(); bit++ {
		last[bit/8] |= 0x80 >> (bit % 8)
	}
	to, _ := netip.AddrFromSlice(last)
	return addressRange{p.Addr(), to}
}

// parseRange reads FIRST-LAST, a prefix or one address.
func parseRange(text string) (addressRange, error) {
	bad := func() (addressRange, error) {
		return addressRange{}, &ArgumentError{fmt.Sprintf("%q is not a range of addresses, such as 10.64.140.43-10.64.140.49, or 10.64.140.0/28", text)}
	}
	if strings.Contains(text, "/") {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return bad()
		}
		return rangeOf(p), nil
	}
	from, to, ok := strings.Cut(text, "-")
	if !ok {
		to = from
	}
	first, err1 := netip.ParseAddr(strings.TrimSpace(from))
	last, err2 := netip.ParseAddr(strings.TrimSpace(to))
	switch {
	case err1 != nil || err2 != nil || first.Zone() != "" || last.Zone() != "" || first.BitLen() != last.BitLen():
		return bad()
	case last.Less(first):
		return addressRange{}, &ArgumentError{fmt.Sprintf("the range %s ends before it begins", text)}
	}
	return addressRange{first, last}, nil
}

// unusable are ranges from which no Service can have an address.
var unusable = map[string]netip.Prefix{
	"the loopback":         netip.MustParsePrefix("127.0.0.0/8"),
	"this network":         netip.MustParsePrefix("0.0.0.0/8"),
	"link-local addresses": netip.MustParsePrefix("169.254.0.0/16"),
	"multicast":            netip.MustParsePrefix("224.0.0.0/3"),
	"the IPv6 loopback":    netip.MustParsePrefix("::/127"),
	"IPv6 link-local":      netip.MustParsePrefix("fe80::/10"),
	"IPv6 multicast":       netip.MustParsePrefix("ff00::/8"),
	"IPv4 in IPv6":         netip.MustParsePrefix("::ffff:0:0/96"),
}

type metallbValues struct {
	Addresses []string // ranges as MetalLB reads them
	Layer2    bool     // all pools are announced by ARP and NDP

	ranges []addressRange
}

// readMetallb reads `enable metallb:RANGE[,RANGE…]` and `enable metallb RANGE[,RANGE…] --bgp`. Without ranges there are none.
func readMetallb(words []string) (metallbValues, error) {
	v := metallbValues{Layer2: true}
	for _, w := range words {
		if w == "--bgp" {
			v.Layer2 = false
			continue
		}
		if strings.HasPrefix(w, "-") {
			return v, &ArgumentError{"unknown option " + w}
		}
		for text := range strings.SplitSeq(w, ",") {
			if text = strings.TrimSpace(text); text == "" {
				continue
			}
			r, err := parseRange(text)
			if err != nil {
				return v, err
			}
			for what, p := range unusable {
				if r.overlaps(rangeOf(p)) {
					return v, &ArgumentError{fmt.Sprintf("%s reaches into %s (%s), which no Service can use", text, p, what)}
				}
			}
			for _, o := range v.ranges {
				if r.overlaps(o) {
					return v, &ArgumentError{fmt.Sprintf("the ranges %s and %s overlap", o, r)}
				}
			}
			v.ranges = append(v.ranges, r)
			v.Addresses = append(v.Addresses, r.first.String()+"-"+r.last.String())
		}
	}
	if len(v.ranges) > maxRanges {
		return v, &ArgumentError{fmt.Sprintf("it takes %d ranges at most, and got %d", maxRanges, len(v.ranges))}
	}
	return v, nil
}

// renderMetallb wants ranges.
func renderMetallb(_ context.Context, _ *Set, words []string) (any, error) {
	v, err := readMetallb(words)
	if err == nil && len(v.ranges) == 0 {
		err = &ArgumentError{"it needs the addresses for Services, such as metallb:10.64.140.43-10.64.140.49"}
	}
	return v, err
}

var pools = schema.GroupVersionResource{Group: "metallb.io", Version: "v1beta1", Resource: "ipaddresspools"}

// taken is addresses that a pool must not have, and whose they are.
type taken struct {
	addressRange
	whose string
}

// admitMetallb refuses ranges with addresses that the network of the nodes uses already: whoever asks for one of these
// would be answered by the wrong machine.
func admitMetallb(ctx context.Context, s *Set, words []string) error {
	v, err := readMetallb(words)
	if err != nil {
		return err
	}
	used, err := s.takenAddresses(ctx)
	if err != nil {
		return err
	}
	return v.conflict(used)
}

// conflict returns an error that names the first address that is used already.
func (v metallbValues) conflict(used []taken) error {
	for _, r := range v.ranges {
		for _, t := range used {
			if !r.overlaps(t.addressRange) {
				continue
			}
			return &ArgumentError{fmt.Sprintf("the range %s has %s, which is %s: choose addresses of the nodes' network that nothing else uses", r, t.addressRange, t.whose)}
		}
	}
	return nil
}

// takenAddresses are those of the nodes, of this host and its gateways, the ranges of pods and Services, and pools that
// people have made.
func (s *Set) takenAddresses(ctx context.Context) ([]taken, error) {
	var out []taken
	one := func(text, whose string) {
		if a, err := netip.ParseAddr(text); err == nil {
			out = append(out, taken{addressRange{a.Unmap(), a.Unmap()}, whose})
		}
	}
	list, err := s.client.Resource(nodes).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("cannot list the nodes: %w", err)
	}
	for i := range list.Items {
		addresses, _, _ := unstructured.NestedSlice(list.Items[i].Object, "status", "addresses")
		for _, a := range addresses {
			if m, ok := a.(map[string]any); ok {
				one(fmt.Sprint(m["address"]), "the address of node "+list.Items[i].GetName())
			}
		}
	}
	own, err := hostinfo.Addresses()
	if err != nil {
		return nil, fmt.Errorf("cannot read this host's addresses: %w", err)
	}
	for _, ip := range own {
		one(ip.String(), "an address of this host")
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("cannot read this host's routes: %w", err)
	}
	for _, r := range routes {
		if r.Gw != nil {
			one(r.Gw.String(), "a gateway of this host")
		}
	}
	if shared := apiaddress.Read(s.Env); shared.IsValid() {
		one(shared.String(), "the address of the API")
	}
	config := nodeconfig.Load(s.Env)
	for _, p := range config.ClusterCIDRs {
		out = append(out, taken{rangeOf(p), "the range of pods"})
	}
	for _, p := range config.APIServer.ServiceCIDRs {
		out = append(out, taken{rangeOf(p), "the range of Services"})
	}
	others, err := s.client.Resource(pools).List(ctx, metav1.ListOptions{LabelSelector: "!" + Label})
	if err != nil && !apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("cannot list the pools of addresses: %w", err)
	}
	if err == nil {
		for i := range others.Items {
			addresses, _, _ := unstructured.NestedStringSlice(others.Items[i].Object, "spec", "addresses")
			for _, text := range addresses {
				if r, err := parseRange(text); err == nil {
					out = append(out, taken{r, "in IPAddressPool " + others.Items[i].GetNamespace() + "/" + others.Items[i].GetName()})
				}
			}
		}
	}
	return out, nil
}
