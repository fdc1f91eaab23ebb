package nft

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"microk8s/internal/netpolicy"
)

// ruleset is a table as data: what is to be there, or what is.
type ruleset struct {
	chains map[string]chain
	sets   map[string]set
}

// chain is a base chain if it has a hook, and else one that others go to.
type chain struct {
	hook  string
	rules []string
}

// set is a set, or a map when verdicts is true.
type set struct {
	keyType  string
	interval bool
	verdicts bool
	elements map[string]string // key ("A . B" for two) → verdict, "" in a set
}

// Names of what is in the table whatever the policies are.
const (
	chainForward, chainInput, chainEgress, chainIngress = "forward", "input", "egress", "ingress"
	// chainMidstream judges pods that are isolated on their other side only.
	chainMidstream = "midstream"
)

const (
	// deny is a rule and not a policy of the chain, so that it can be counted and seen.
	deny = "counter drop"
	// midstream drops what is not the first packet of a TCP connection and belongs to none: a
	// connection that was cut because a policy now forbids it would else be taken up again from
	// its other end, whose packets the policy does not judge.
	midstream = "tcp flags & (fin | syn | rst | ack) != syn counter drop"
	// neighbours lets IPv6 find its neighbours, which IPv4 does beside IP.
	neighbours = "icmpv6 type { mld-listener-query, mld-listener-report, nd-router-solicit, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert, mld2-listener-report } accept"
	replies    = "ct state established,related accept"
)

// families are the two sides of every look-up.
var families = []struct {
	suffix, ip, keyType, proto string
	four                       bool
}{{"4", "ip", "ipv4_addr", "ipv4", true}, {"6", "ip6", "ipv6_addr", "ipv6", false}}

// render turns a model into a table:
//
//	forward, input   replies pass; then the sender's side is judged, then (forward) the receiver's
//	egress, ingress  one look-up finds the group of a pod by its address; addresses of this node's
//	                 pods that are not known are dropped
//	a chain a group  one look-up finds the peer, by its address (map peer…) or its range (map net…);
//	                 who is in neither is dropped
//	a chain a set of ports, shared by all peers and groups that have the same: one look-up
//
// Chains of ports and maps of ranges are named after their content and never change.
func render(m *netpolicy.Model) ruleset {
	r := ruleset{chains: map[string]chain{}, sets: map[string]set{}}
	var self, egress, ingress []string
	for _, f := range families {
		closed := set{keyType: f.keyType, interval: true, elements: map[string]string{}}
		for _, p := range m.Closed {
			if p.Addr().Is4() == f.four {
				closed.elements[p.String()] = ""
			}
		}
		r.sets["closed"+f.suffix] = closed
		out, in := r.pods(m, m.Egress, m.Ingress, f.keyType, f.four), r.pods(m, m.Ingress, m.Egress, f.keyType, f.four)
		r.sets["egress"+f.suffix], r.sets["ingress"+f.suffix] = out, in
		own := set{keyType: f.keyType + " . " + f.keyType, elements: map[string]string{}}
		for key, verdict := range in.elements {
			if verdict != "return" {
				own.elements[key+" . "+key] = ""
			}
		}
		r.sets["self"+f.suffix] = own
		self = append(self, fmt.Sprintf("%s saddr . %s daddr @self%s accept", f.ip, f.ip, f.suffix))
		egress = append(egress, fmt.Sprintf("%s saddr vmap @egress%s", f.ip, f.suffix), fmt.Sprintf("%s saddr @closed%s %s", f.ip, f.suffix, deny))
		ingress = append(ingress, fmt.Sprintf("%s daddr vmap @ingress%s", f.ip, f.suffix), fmt.Sprintf("%s daddr @closed%s %s", f.ip, f.suffix, deny))
	}
	r.chains[chainForward] = chain{"forward", slices.Concat([]string{replies, neighbours}, self, []string{"jump " + chainEgress, "jump " + chainIngress})}
	r.chains[chainInput] = chain{"input", []string{`iifname "lo" accept`, replies, neighbours, "jump " + chainEgress}}
	r.chains[chainEgress] = chain{rules: egress}
	r.chains[chainIngress] = chain{rules: ingress}
	r.chains[chainMidstream] = chain{rules: []string{midstream}}
	for _, g := range m.Groups {
		r.group(g)
	}
	return r
}

// pods makes the map from the addresses of this node's pods to what judges them on one side.
func (r ruleset) pods(m *netpolicy.Model, side, other map[netip.Addr]string, keyType string, four bool) set {
	s := set{keyType: keyType, verdicts: true, elements: map[string]string{}}
	for addr, group := range side {
		if addr.Is4() != four {
			continue
		}
		verdict := "return"
		switch {
		case group != "":
			verdict = "goto " + groupChain(m.Groups[group])
		case other[addr] != "":
			verdict = "goto " + chainMidstream
		}
		s.elements[addr.String()] = verdict
	}
	return s
}

// groupChain is the name of a group's chain. Names of nftables are shorter than those of pods.
func groupChain(g *netpolicy.Group) string { return shorten(string(g.Direction) + "-" + g.Name) }

func shorten(name string) string {
	const most = 120
	if len(name) > most {
		return strings.TrimRight(name[:most], "-./")
	}
	return name
}

func (r ruleset) group(g *netpolicy.Group) {
	field := "daddr"
	if g.Direction == netpolicy.Ingress {
		field = "saddr"
	}
	rules := []string{midstream}
	for _, f := range families {
		peers := set{keyType: f.keyType, verdicts: true, elements: map[string]string{}}
		for addr, ports := range g.Peers {
			if addr.Is4() == f.four {
				peers.elements[addr.String()] = r.ports(ports)
			}
		}
		if len(peers.elements) > 0 {
			name := shorten("peer" + f.suffix + "-" + groupChain(g))
			r.sets[name] = peers
			rules = append(rules, fmt.Sprintf("%s %s vmap @%s", f.ip, field, name))
		}
		var nets []netpolicy.Net
		for _, n := range g.Nets {
			if n.From.Is4() == f.four {
				nets = append(nets, n)
			}
		}
		switch {
		case len(nets) == 0:
		case len(nets) == 1 && !nets[0].From.Prev().IsValid() && !nets[0].To.Next().IsValid(): // everybody
			rules = append(rules, "meta nfproto "+f.proto+" "+r.ports(nets[0].Ports))
		default:
			rules = append(rules, fmt.Sprintf("%s %s vmap @%s", f.ip, field, r.nets(nets, f.keyType, f.suffix)))
		}
	}
	r.chains[groupChain(g)] = chain{rules: append(rules, deny)}
}

// nets makes the map of ranges, named after what is in it, and returns its name.
func (r ruleset) nets(nets []netpolicy.Net, keyType, suffix string) string {
	s := set{keyType: keyType, verdicts: true, interval: true, elements: map[string]string{}}
	var all strings.Builder
	for _, n := range nets {
		key := n.From.String()
		if n.From != n.To {
			key += "-" + n.To.String()
		}
		s.elements[key] = r.ports(n.Ports)
		all.WriteString(key + " " + n.Ports.Key() + "\n")
	}
	name := "net" + suffix + "-" + digest(all.String())
	r.sets[name] = s
	return name
}

// ports returns the verdict for a set of ports, and makes its chain.
func (r ruleset) ports(p *netpolicy.PortSet) string {
	if p.All {
		return "return"
	}
	name := "ports-" + digest(p.Key())
	if _, ok := r.chains[name]; !ok {
		var elements []string
		for _, e := range p.Ranges {
			ports := fmt.Sprint(e.From)
			if e.From != e.To {
				ports = fmt.Sprintf("%d-%d", e.From, e.To)
			}
			elements = append(elements, e.Protocol.String()+" . "+ports)
		}
		var rules []string
		if len(elements) > 0 {
			rules = append(rules, "meta l4proto . th dport { "+strings.Join(elements, ", ")+" } return")
		}
		if p.Others {
			rules = append(rules, "meta l4proto != { tcp, udp, sctp } return")
		}
		r.chains[name] = chain{rules: append(rules, deny)}
	}
	return "goto " + name
}

func digest(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:8])
}
