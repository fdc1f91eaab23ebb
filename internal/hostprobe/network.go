package hostprobe

import (
	"encoding/binary"
	"encoding/hex"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// podInterfaces carry addresses of the pod network.
var podInterfaces = []string{"lo", "cni0", "flannel.1", "vxlan.calico", "docker0", "flannel-v6.1"}

// network reads the kernel's tables: whether there is a default route, and the IPv4 address that a node has unless
// somebody chooses another: on the network of the default gateway with the smallest metric, or of the first
// interface where no route is the default one. What the host's name resolves to has no part in it: that may
// be an address of host-access, of a VPN, or a virtual one. address is "" where only IPv6 has a default route.
func network(read func(string) string) (defaultRoute bool, address string) {
	local := localAddresses(read("/proc/net/fib_trie"))
	byInterface := map[string]string{} // the first address on a connected network
	byNetwork := map[netip.Prefix]string{}
	uplink, metric := "", uint64(1<<32)
	var gateway netip.Addr
	for line := range strings.Lines(read("/proc/net/route")) {
		// Iface Destination Gateway Flags RefCnt Use Metric Mask …
		f := strings.Fields(line)
		if len(f) < 8 {
			continue
		}
		dst, ok1 := hexIPv4(f[1])
		mask, ok2 := hexIPv4(f[7])
		if !ok1 || !ok2 {
			continue // the heading
		}
		m := mask.As4()
		bits := 0
		for v := binary.BigEndian.Uint32(m[:]); v != 0; v <<= 1 {
			bits++
		}
		if bits == 0 {
			defaultRoute = true
			if m, err := strconv.ParseUint(f[6], 10, 32); err == nil && m < metric {
				uplink, metric = f[0], m
				gateway, _ = hexIPv4(f[2])
			}
			continue
		}
		if slices.Contains(podInterfaces, f[0]) || strings.HasPrefix(f[0], "cali") || f[2] != "00000000" {
			continue
		}
		subnet := netip.PrefixFrom(dst, bits)
		if i := slices.IndexFunc(local, subnet.Contains); i >= 0 {
			if byInterface[f[0]] == "" {
				byInterface[f[0]] = local[i].String()
			}
			byNetwork[subnet] = local[i].String()
			if address == "" {
				address = local[i].String()
			}
		}
	}
	if defaultRoute {
		address = byInterface[uplink]
		bits := -1
		for subnet, a := range byNetwork { // an interface may be in several
			if subnet.Contains(gateway) && subnet.Bits() > bits {
				address, bits = a, subnet.Bits()
			}
		}
	}
	for line := range strings.Lines(read("/proc/net/ipv6_route")) {
		// destination, its prefix length, source, its prefix length, next hop, metric, …, interface
		f := strings.Fields(line)
		if len(f) > 9 && f[1] == "00" && f[9] != "lo" {
			if !defaultRoute {
				address = ""
			}
			defaultRoute = true
		}
	}
	return defaultRoute, address
}

// Flags of an address in /proc/net/if_inet6, as far as they fit in the eight bits there (linux/if_addr.h).
const (
	flagTemporary  = 0x01
	flagDADFailed  = 0x08
	flagDeprecated = 0x20
	flagTentative  = 0x40
	flagPermanent  = 0x80
)

// address6 reads the IPv6 address that a node has unless somebody chooses another: on the interface with the default route of
// the smallest metric, or else with that of IPv4, or else on the first that has one. Link-local addresses and
// those that the host changes by itself (temporary ones, RFC 8981) are none. An address that somebody has set counts before one that a router
// has announced, and one of a network before a single one, such as keepalived's.
func address6(read func(string) string) string {
	type candidate struct {
		addr netip.Addr
		rank int
	}
	best := map[string]candidate{}
	first := ""
	for line := range strings.Lines(read("/proc/net/if_inet6")) {
		// address, index of the interface, prefix length, scope, flags, name
		f := strings.Fields(line)
		if len(f) < 6 || slices.Contains(podInterfaces, f[5]) || strings.HasPrefix(f[5], "cali") || strings.HasPrefix(f[5], "veth") {
			continue
		}
		raw, err := hex.DecodeString(f[0])
		flags, err2 := strconv.ParseUint(f[4], 16, 8)
		length, err3 := strconv.ParseUint(f[2], 16, 8)
		addr, ok := netip.AddrFromSlice(raw)
		if err != nil || err2 != nil || err3 != nil || !ok || !addr.IsGlobalUnicast() || flags&(flagTemporary|flagDADFailed|flagDeprecated|flagTentative) != 0 {
			continue
		}
		c := candidate{addr: addr}
		if flags&flagPermanent == 0 {
			c.rank += 2
		}
		if length == 128 {
			c.rank++
		}
		if b, ok := best[f[5]]; !ok || c.rank < b.rank || c.rank == b.rank && c.addr.Less(b.addr) {
			best[f[5]] = c
		}
		if first == "" || f[5] < first {
			first = f[5]
		}
	}
	for _, uplink := range []string{uplink6(read("/proc/net/ipv6_route")), uplink4(read("/proc/net/route"))} {
		if c, ok := best[uplink]; ok {
			return c.addr.String()
		}
	}
	if c, ok := best[first]; ok {
		return c.addr.String()
	}
	return ""
}

// uplink6 is the interface of the default route of IPv6, "" without one.
func uplink6(table string) (name string) {
	metric := uint64(1 << 32)
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) < 10 || f[1] != "00" || f[9] == "lo" {
			continue
		}
		if m, err := strconv.ParseUint(f[5], 16, 32); err == nil && m < metric {
			name, metric = f[9], m
		}
	}
	return name
}

// uplink4 is the interface of the default route of IPv4, or else of the first connected network.
func uplink4(table string) (name string) {
	metric, connected := uint64(1<<32), ""
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) < 8 || f[0] == "Iface" {
			continue
		}
		if m, err := strconv.ParseUint(f[6], 10, 32); err == nil && f[7] == "00000000" && m < metric {
			name, metric = f[0], m
		}
		if connected == "" && !slices.Contains(podInterfaces, f[0]) {
			connected = f[0]
		}
	}
	if name == "" {
		return connected
	}
	return name
}

// primary returns the first address of IPv4 in the given one's network, on its interface: one that somebody added
// later, such as keepalived's, is not the node's. The kernel's tables of text have no order.
func primary(address string) string {
	interfaces, err := net.Interfaces()
	if err != nil {
		return address
	}
	for _, i := range interfaces {
		addrs, err := i.Addrs()
		if err != nil {
			continue
		}
		first, found := "", false
		for _, a := range addrs {
			n, ok := a.(*net.IPNet)
			if !ok || n.IP.To4() == nil {
				continue
			}
			found = found || n.IP.String() == address
			if ones, bits := n.Mask.Size(); first == "" && ones < bits && n.IP.IsGlobalUnicast() && n.Contains(net.ParseIP(address)) {
				first = n.IP.String()
			}
		}
		if found && first != "" {
			return first
		}
	}
	return address
}

// hexIPv4 reads an address as the kernel prints it there: the bytes in the machine's order.
func hexIPv4(s string) (netip.Addr, bool) {
	raw, err := hex.DecodeString(s)
	if err != nil || len(raw) != 4 {
		return netip.Addr{}, false
	}
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], binary.BigEndian.Uint32(raw))
	return netip.AddrFrom4(b), true
}

// localAddresses lists the host's own addresses out of /proc/net/fib_trie, where each is a
// leaf that is followed by a line with its kind.
func localAddresses(trie string) []netip.Addr {
	var found []netip.Addr
	var leaf netip.Addr
	for line := range strings.Lines(trie) {
		line = strings.TrimSpace(line)
		if rest, ok := strings.CutPrefix(line, "|-- "); ok {
			leaf, _ = netip.ParseAddr(rest)
			continue
		}
		if line == "/32 host LOCAL" && leaf.IsValid() && !leaf.IsLoopback() && !leaf.IsLinkLocalUnicast() && !slices.Contains(found, leaf) {
			found = append(found, leaf)
		}
	}
	return found
}
