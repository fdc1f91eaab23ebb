package hostprobe

import (
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"
)

// podInterfaces carry addresses of the pod network.
var podInterfaces = []string{"lo", "cni0", "flannel.1", "vxlan.calico", "docker0"}

// network reads the kernel's tables: whether there is a default route, and the first address
// on the first network that the host is connected to.
func network(read func(string) string) (defaultRoute bool, address string) {
	local := localAddresses(read("/proc/net/fib_trie"))
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
			continue
		}
		if address != "" || slices.Contains(podInterfaces, f[0]) || strings.HasPrefix(f[0], "cali") || f[2] != "00000000" {
			continue
		}
		subnet := netip.PrefixFrom(dst, bits)
		if i := slices.IndexFunc(local, subnet.Contains); i >= 0 {
			address = local[i].String()
		}
	}
	for line := range strings.Lines(read("/proc/net/ipv6_route")) {
		// destination, its prefix length, source, its prefix length, next hop, metric, …, interface
		f := strings.Fields(line)
		if len(f) > 9 && f[1] == "00" && f[9] != "lo" {
			defaultRoute = true
		}
	}
	return defaultRoute, address
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
