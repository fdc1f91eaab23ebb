package hostnet

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Rules describes the table that this package owns.
type Rules struct {
	Cluster []netip.Prefix // pod addresses of the whole cluster, at most one range per family
	Node    []netip.Prefix // pod addresses of this node; may be empty while not known

	// Hairpin hides the sender of traffic between two pods of this node that went through a
	// Service, so that the answer comes back by way of the host. For hosts where
	// [BridgeFiltered] is false.
	Hairpin bool
}

// Apply replaces the table by one with these rules, in one transaction: traffic is never
// without them. It is idempotent.
//
//	table ip microk8s-pods {
//	  chain postrouting {
//	    type nat hook postrouting priority srcnat
//	    ip saddr CLUSTER ip daddr != CLUSTER ip daddr != 224.0.0.0/4 masquerade fully-random
//	    oifname "flannel.1" ip saddr != CLUSTER ip daddr CLUSTER masquerade fully-random
//	    ip saddr NODE ip daddr NODE ct status dnat masquerade fully-random     (with Hairpin)
//	  }
//	}
func (r Rules) Apply() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("cannot open the nftables socket: %w", err)
	}
	for _, cluster := range r.Cluster {
		table := &nftables.Table{Name: Table, Family: family(cluster)}
		// Adding before deleting makes the deletion work when there is no table yet.
		c.AddTable(table)
		c.DelTable(table)
		c.AddTable(table)
		chain := c.AddChain(&nftables.Chain{
			Name: postrouting, Table: table, Type: nftables.ChainTypeNAT,
			Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
		})
		for _, exprs := range r.rules(cluster) {
			c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: exprs})
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("cannot write the nftables table %s (is the kernel module nft_masq there?): %w", Table, err)
	}
	return nil
}

// Ensure is Apply where the table differs from these rules; changed reports whether it did.
func (r Rules) Ensure() (changed bool, err error) {
	h, err := readHost()
	if err != nil {
		return false, err
	}
	for _, cluster := range r.Cluster {
		same := false
		for _, c := range h.chains {
			if c.Table.Name != Table || c.Table.Family != family(cluster) {
				continue
			}
			// A second chain is somebody else's.
			if same = c.Name == postrouting && c.Hooknum != nil && *c.Hooknum == *nftables.ChainHookPostrouting; !same {
				break
			}
			have, err := h.rules(c)
			if err != nil {
				return false, err
			}
			want := r.rules(cluster)
			if same = len(have) == len(want); same {
				for i := range want {
					same = same && sameMatch(have[i].Exprs, want[i])
				}
			}
			if !same {
				break
			}
		}
		if !same {
			return true, r.Apply()
		}
	}
	return false, nil
}

const postrouting = "postrouting"

// rules returns what the table of one family holds.
func (r Rules) rules(cluster netip.Prefix) (out [][]expr.Any) {
	add := func(parts ...[]expr.Any) {
		var all []expr.Any
		for _, p := range parts {
			all = append(all, p...)
		}
		out = append(out, append(all, &expr.Counter{}, &expr.Masq{FullyRandom: true}))
	}
	multicast, tunnel := netip.MustParsePrefix("224.0.0.0/4"), Tunnel
	if cluster.Addr().Is6() {
		multicast, tunnel = netip.MustParsePrefix("ff00::/8"), Tunnel6
	}
	add(address(source, cluster, true), address(destination, cluster, false), address(destination, multicast, false))
	// A program of the host that bound itself to another address: the other node would
	// answer to that one, past the tunnel.
	add(interfaceName(expr.MetaKeyOIFNAME, tunnel), address(source, cluster, false), address(destination, cluster, true))
	for _, node := range r.Node {
		if r.Hairpin && node.Addr().Is4() == cluster.Addr().Is4() {
			add(address(source, node, true), address(destination, node, true), translated())
		}
	}
	return out
}

func family(p netip.Prefix) nftables.TableFamily {
	if p.Addr().Is4() {
		return nftables.TableFamilyIPv4
	}
	return nftables.TableFamilyIPv6
}

// side is the address field of a packet that an expression looks at.
type side int

const (
	source side = iota
	destination
)

// address matches packets whose source or destination is, or is not, within p. It has the
// form in which iptables' nft variant writes the same match, which can then still list it.
func address(s side, p netip.Prefix, within bool) []expr.Any {
	size := uint32(p.Addr().BitLen() / 8)
	offset := uint32(12) // IPv4: source at byte 12, destination at 16
	if p.Addr().Is6() {
		offset = 8 // IPv6: source at byte 8, destination at 24
	}
	if s == destination {
		offset += size
	}
	mask := make([]byte, size)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	op := expr.CmpOpEq
	if !within {
		op = expr.CmpOpNeq
	}
	exprs := []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size}}
	if p.Bits() < p.Addr().BitLen() {
		exprs = append(exprs, &expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: size, Mask: mask, Xor: make([]byte, size)})
	}
	return append(exprs, &expr.Cmp{Op: op, Register: 1, Data: p.Masked().Addr().AsSlice()})
}

// interfaceName matches the name of an incoming or outgoing interface.
func interfaceName(key expr.MetaKey, name string) []expr.Any {
	// With its terminating NUL the name is compared as a whole, not as a prefix.
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: append([]byte(name), 0)},
	}
}

// udpPort matches packets of UDP to a port.
func udpPort(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)},
	}
}

// translated matches connections whose destination was rewritten.
func translated() []expr.Any {
	const ipsDstNAT = 1 << 5 // IPS_DST_NAT, linux/netfilter/nf_conntrack_common.h
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: nativeUint32(ipsDstNAT), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

// familyOnly matches packets of the family of p, for tables that see both.
func familyOnly(p netip.Prefix) []expr.Any {
	proto := byte(unix.NFPROTO_IPV4)
	if p.Addr().Is6() {
		proto = unix.NFPROTO_IPV6
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
	}
}
