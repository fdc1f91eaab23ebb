package netpolicy

import (
	"cmp"
	"net/netip"
	"slices"

	networkingv1 "k8s.io/api/networking/v1"
)

var (
	whole4 = rangeOf(netip.MustParsePrefix("0.0.0.0/0"))
	whole6 = rangeOf(netip.MustParsePrefix("::/0"))
)

// rangeOf returns the first and the last address of a prefix.
func rangeOf(p netip.Prefix) addrRange {
	p = p.Masked()
	last := p.Addr().AsSlice()
	for i := p.Bits(); i < len(last)*8; i++ {
		last[i/8] |= 0x80 >> (i % 8)
	}
	to, _ := netip.AddrFromSlice(last)
	return addrRange{p.Addr(), to}
}

// parseBlock reads an ipBlock; the API server has checked it, and one that cannot be read means nobody.
func parseBlock(b *networkingv1.IPBlock) (block, bool) {
	out := block{}
	var err error
	if out.cidr, err = parsePrefix(b.CIDR); err != nil {
		return out, false
	}
	for _, e := range b.Except {
		p, err := parsePrefix(e)
		if err != nil {
			return out, false
		}
		if p.Addr().Is4() == out.cidr.Addr().Is4() {
			out.except = append(out.except, p)
		}
	}
	out.ranges = subtract(rangeOf(out.cidr), out.except)
	return out, true
}

// parsePrefix reads a CIDR as Kubernetes does: IPv4 in its IPv6 form is IPv4.
func parsePrefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return p, err
	}
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), nil
}

// subtract returns what is left of a range without some prefixes.
func subtract(r addrRange, except []netip.Prefix) []addrRange {
	except = slices.Clone(except)
	slices.SortFunc(except, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	var out []addrRange
	from := r.from
	for _, e := range except {
		gap := rangeOf(e)
		if gap.to.Less(from) || r.to.Less(gap.from) {
			continue
		}
		if from.Less(gap.from) {
			out = append(out, addrRange{from, gap.from.Prev()})
		}
		if from = gap.to.Next(); !from.IsValid() || r.to.Less(from) { // the end of all addresses, or of the range
			return out
		}
	}
	return append(out, addrRange{from, r.to})
}

func (b block) contains(a netip.Addr) bool {
	return b.cidr.Contains(a) && !within(b.except, a)
}

// nodes returns the addresses in the pod network of the other nodes whose own addresses are in the
// block: what a node, or a pod of its own network, sends to a pod of another node comes out of the
// tunnel with the tunnel's address.
func (b block) nodes(nodes []*Node, self string) (out []addrRange) {
	for _, n := range nodes {
		if n.Name == self || !slices.ContainsFunc(n.Addresses, b.contains) {
			continue
		}
		for _, c := range n.PodCIDRs {
			out = append(out, addrRange{c.Addr(), c.Addr()})
		}
	}
	return out
}

type portedRange struct {
	addrRange
	ports *PortSet
}

// partition turns ranges that may overlap into ones that do not, each with all ports of those that
// it is in.
func (c *Compiler) partition(ranges []portedRange) []Net {
	type edge struct {
		at    netip.Addr
		ports *PortSet
		count int
	}
	var out []Net
	for _, four := range []bool{true, false} {
		var edges []edge
		end := whole6.to
		if four {
			end = whole4.to
		}
		for _, r := range ranges {
			if r.from.Is4() != four {
				continue
			}
			edges = append(edges, edge{r.from, r.ports, 1})
			if next := r.to.Next(); next.IsValid() {
				edges = append(edges, edge{next, r.ports, -1})
			}
		}
		slices.SortFunc(edges, func(a, b edge) int { return cmp.Or(a.at.Compare(b.at), cmp.Compare(a.ports.key, b.ports.key)) })
		active := map[*PortSet]int{}
		for i := 0; i < len(edges); {
			start := edges[i].at
			changed := false
			for ; i < len(edges) && edges[i].at == start; i++ {
				e := edges[i]
				before := active[e.ports]
				if active[e.ports] += e.count; active[e.ports] == 0 {
					delete(active, e.ports)
				}
				changed = changed || (before == 0) != (active[e.ports] == 0)
			}
			to := end
			if i < len(edges) {
				to = edges[i].at.Prev()
			}
			last := len(out) - 1
			if !changed && last >= 0 && out[last].To.Next() == start {
				out[last].To = to
				continue
			}
			ports := c.unionOf(active)
			switch {
			case ports.Empty():
			case last >= 0 && out[last].To.Next() == start && out[last].Ports == ports:
				out[last].To = to
			default:
				out = append(out, Net{start, to, ports})
			}
		}
	}
	return out
}

// unionOf joins many sets at once.
func (c *Compiler) unionOf(sets map[*PortSet]int) *PortSet {
	switch len(sets) {
	case 0:
		return nothing
	case 1:
		for s := range sets {
			return s
		}
	}
	var all []PortRange
	others := false
	for s := range sets {
		if s.All {
			return everything
		}
		all = append(all, s.Ranges...)
		others = others || s.Others
	}
	return c.intern(newPortSet(others, all))
}
