// Package ranges is about the addresses that a cluster's pods and Services have: reading what args/cni-env, or
// extraCNIEnv of a launch configuration, asks for; refusing what cannot work; and, before the first start of a
// cluster, setting the arguments of the daemons that follow from it.
//
// The keys are those of upstream's MicroK8s, and two for a node's share of the pods' range. What the daemons' own
// arguments say is read by internal/nodeconfig; that file is only what a person wishes.
package ranges

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"microk8s/internal/hostnet"
)

// FileName is that of the file in args/.
const FileName = "cni-env"

// Keys of the file. A family is in use where its SUPPORT is true.
const (
	support  = "SUPPORT"
	cluster  = "CLUSTER_CIDR"
	service  = "SERVICE_CIDR"
	nodeMask = "NODE_CIDR_MASK_SIZE"
)

// family is what differs between IPv4 and IPv6.
type family struct {
	prefix                 string // of the keys
	bits                   int    // of an address
	on                     bool   // where the file does not mention it
	pods, services         string // ranges where none is named: those of upstream
	mask                   int    // of a node's share
	maxMask                int    // the smallest share of a node: room for a few pods
	minService, maxService int    // what the API server takes (20 bits at most), and DNS needs
}

// The families, in the order in which ranges are written.
var families = []family{
	{prefix: "IPv4_", bits: 32, on: true, pods: "10.1.0.0/16", services: "10.152.183.0/24", mask: 24, maxMask: 28, minService: 12, maxService: 28},
	{prefix: "IPv6_", bits: 128, pods: "fd01::/64", services: "fd98::/108", mask: 64, maxMask: 124, minService: 108, maxService: 124},
}

func familyOf(p netip.Prefix) family {
	if p.Addr().Is6() {
		return families[1]
	}
	return families[0]
}

// maxShares is how many bits may lie between the range of pods and a node's share: the controller manager keeps a bit for
// each share (nodeipam/ipam/cidrset, clusterSubnetMaxDiff; it holds for IPv6, and beyond it no cluster of IPv4 gets).
const maxShares = 16

// ordinaryPods is how many pods a kubelet runs unless told otherwise (--max-pods).
const ordinaryPods = 110

// Ranges are the addresses of a cluster, one range or one of each family, IPv4 first. Pods and Services have the
// same families.
type Ranges struct {
	Pods, Services []netip.Prefix
	// Masks are the lengths of a node's share of Pods, in the same order.
	Masks []int
}

// Of reads ranges as the daemons' arguments have them, separated by commas, in either order. Without masks a node's share is
// the usual one.
func Of(pods, services string, masks []int) (r Ranges, err error) {
	if r.Pods, err = hostnet.ParseCIDRs(pods); err != nil {
		return r, err
	}
	if r.Services, err = hostnet.ParseCIDRs(services); err != nil {
		return r, err
	}
	r.Pods, r.Services = ordered(r.Pods), ordered(r.Services)
	for i, p := range r.Pods {
		f := familyOf(p)
		if i < len(masks) && masks[i] >= p.Bits() && masks[i] <= f.bits {
			r.Masks = append(r.Masks, masks[i])
			continue
		}
		mask, _ := f.usualShare(p, func(string, string, ...any) {})
		r.Masks = append(r.Masks, mask)
	}
	return r, nil
}

// Equal reports whether pods and Services have the same addresses; a node's share does not count.
func (r Ranges) Equal(other Ranges) bool {
	return slices.Equal(r.Pods, other.Pods) && slices.Equal(r.Services, other.Services)
}

// Grown reports whether r is other with more addresses for pods, or another share for nodes: what a cluster may change to
// while it has nodes. The shares that they have stay within it.
func (r Ranges) Grown(other Ranges) bool {
	if len(r.Pods) != len(other.Pods) || !slices.Equal(r.Services, other.Services) {
		return false
	}
	for i, p := range r.Pods {
		if p.Bits() > other.Pods[i].Bits() || !p.Contains(other.Pods[i].Addr()) {
			return false
		}
	}
	return true
}

// String names the ranges for messages.
func (r Ranges) String() string {
	return fmt.Sprintf("%s for pods and %s for Services", join(r.Pods), join(r.Services))
}

// Nodes is how many nodes get a share, as the family with fewer has it.
func (r Ranges) Nodes() int {
	least := 1 << maxShares
	for i, p := range r.Pods {
		least = min(least, 1<<min(maxShares, max(0, r.Masks[i]-p.Bits())))
	}
	return least
}

// DNS is the address of the cluster's DNS, the tenth of a range of Services.
func DNS(services netip.Prefix) netip.Addr {
	a := services.Masked().Addr()
	for range 10 {
		a = a.Next()
	}
	return a
}

// Values are the variables of the file.
type Values map[string]string

// Read takes the text of the file apart. Lines without "=" and comments are left out.
func Read(text []byte) Values {
	out := Values{}
	for line := range strings.Lines(string(text)) {
		key, value, ok := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), "export "), "=")
		if key = strings.TrimSpace(key); !ok || strings.HasPrefix(key, "#") {
			continue
		}
		value, _, _ = strings.Cut(value, " #")
		out[key] = strings.Trim(strings.TrimSpace(value), `"'`)
	}
	return out
}

// Parse returns what variables ask for, or everything that is wrong with them, a line for each.
func Parse(v Values) (r Ranges, err error) {
	var errs []error
	wrong := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s=%s: %s", key, v[key], fmt.Sprintf(format, args...)))
	}
	errs = append(errs, misspelled(v)...)
	for _, f := range families {
		on := f.on
		if text, ok := v[f.prefix+support]; ok && text != "" {
			var err error
			if on, err = strconv.ParseBool(text); err != nil {
				wrong(f.prefix+support, "it is true or false")
				continue
			}
		}
		if !on {
			continue
		}
		pods, ok1 := f.parseRange(v, cluster, f.pods, wrong)
		services, ok2 := f.parseRange(v, service, f.services, wrong)
		if !ok1 || !ok2 {
			continue
		}
		mask, ok := f.shareOf(pods, v, wrong)
		if !ok {
			continue
		}
		switch bits := services.Bits(); {
		case bits > f.maxService:
			wrong(f.prefix+service, "too small: Services need a /%d at least, of which the tenth address is that of DNS", f.maxService)
		case bits < f.minService:
			wrong(f.prefix+service, "too large: the API server takes a /%d at most", f.minService)
		}
		if pods.Overlaps(services) {
			wrong(f.prefix+service, "overlaps the range of pods, %s=%s", f.prefix+cluster, pods)
		}
		r.Pods, r.Services, r.Masks = append(r.Pods, pods), append(r.Services, services), append(r.Masks, mask)
	}
	if len(errs) == 0 && len(r.Pods) == 0 {
		errs = append(errs, errors.New("IPv4_SUPPORT and IPv6_SUPPORT are both false: pods need addresses of one family at least"))
	}
	return r, errors.Join(errs...)
}

// misspelled finds keys that differ from a known one by case only: nothing would read them. Others belong to somebody else.
func misspelled(v Values) (errs []error) {
	known := Keys()
	for _, key := range slices.Sorted(maps.Keys(v)) {
		for _, k := range known {
			if key != k && strings.EqualFold(key, k) {
				errs = append(errs, fmt.Errorf("%s=%s: the key is written %s", key, v[key], k))
			}
		}
	}
	return errs
}

// Keys are the names of the variables.
func Keys() (out []string) {
	for _, f := range families {
		for _, k := range []string{support, cluster, service, nodeMask} {
			out = append(out, f.prefix+k)
		}
	}
	return out
}

// parseRange reads one range; a missing one is upstream's.
func (f family) parseRange(v Values, key, usual string, wrong func(key, format string, args ...any)) (p netip.Prefix, ok bool) {
	text := v[f.prefix+key]
	if text == "" {
		text = usual
	}
	key = f.prefix + key
	p, err := netip.ParsePrefix(text)
	other := families[0].prefix
	if f.bits == 32 {
		other = families[1].prefix
	}
	switch {
	case err != nil && strings.Contains(text, ","):
		wrong(key, "one range; that of the other family is %s", other+strings.TrimPrefix(key, f.prefix))
	case err != nil:
		wrong(key, "not a range of addresses, such as %s", usual)
	case p.Addr().BitLen() != f.bits:
		wrong(key, "not a range of %s; this one belongs in %s", strings.TrimSuffix(f.prefix, "_"), other+strings.TrimPrefix(key, f.prefix))
	case p != p.Masked():
		wrong(key, "the range begins at %s", p.Masked().Addr())
	case !usable(p):
		wrong(key, "these addresses are loopback, link-local, multicast or unspecified; take private ones, such as %s", usual)
	default:
		return p, true
	}
	return p, false
}

// usable reports whether pods and Services can have the addresses of a range.
func usable(p netip.Prefix) bool {
	for _, reserved := range []string{"0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3", "::/8", "fe80::/10", "ff00::/8"} {
		if netip.MustParsePrefix(reserved).Overlaps(p) {
			return false
		}
	}
	return true
}

// shareOf returns how long the prefix of a node's share of the pods' range is.
func (f family) shareOf(pods netip.Prefix, v Values, wrong func(key, format string, args ...any)) (mask int, ok bool) {
	key := f.prefix + nodeMask
	text := v[key]
	if text == "" {
		return f.usualShare(pods, wrong)
	}
	mask, err := strconv.Atoi(strings.TrimPrefix(text, "/"))
	switch {
	case err != nil:
		wrong(key, "not a number, such as %d", f.mask)
	case mask < pods.Bits():
		wrong(key, "a node's share is larger than the range of all pods, %s", pods)
	case mask > f.maxMask:
		wrong(key, "too small: a node needs a /%d at least", f.maxMask)
	case f.bits == 128 && mask-pods.Bits() > maxShares:
		wrong(key, "too small for %s: the controller manager takes up to %d", pods, pods.Bits()+maxShares)
	default:
		return mask, true
	}
	return 0, false
}

// usualShare is a /24 of IPv4. Of IPv6 it is a /64 where that leaves shares for 256 nodes, else what leaves them for 65,536,
// and never fewer than 256 addresses.
func (f family) usualShare(pods netip.Prefix, wrong func(key, format string, args ...any)) (mask int, ok bool) {
	mask = f.mask
	if f.bits == 128 {
		switch bits := pods.Bits(); {
		case bits+maxShares < mask, bits > mask-8:
			mask = min(bits+maxShares, 120)
		}
	}
	if pods.Bits() > mask {
		wrong(f.prefix+cluster, "too small: a node's share is a /%d; choose a larger range, or a smaller share with %s", mask, f.prefix+nodeMask)
		return 0, false
	}
	return mask, true
}

// Edit returns the text of the file with these variables set, each in its line; lines of others stay. A variable with the value ""
// is commented out.
func Edit(text []byte, v Values) []byte {
	var out bytes.Buffer
	written := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		bare := strings.TrimPrefix(strings.TrimPrefix(strings.TrimSpace(line), "#"), "export ")
		key, _, ok := strings.Cut(bare, "=")
		value, mine := v[key]
		switch {
		case !ok || !mine:
			out.WriteString(strings.TrimSuffix(line, "\n") + "\n")
		case written[key]:
		case value == "":
			out.WriteString("#" + strings.TrimPrefix(strings.TrimSpace(line), "#") + "\n")
		default:
			fmt.Fprintf(&out, "%s=%s\n", key, value)
			written[key] = true
		}
	}
	for _, key := range slices.Sorted(maps.Keys(v)) {
		if v[key] != "" && !written[key] {
			fmt.Fprintf(&out, "%s=%s\n", key, v[key])
		}
	}
	return out.Bytes()
}

// Values are the variables that ask for these ranges.
func (r Ranges) Values() Values {
	v := Values{}
	for _, f := range families {
		v[f.prefix+support], v[f.prefix+cluster], v[f.prefix+service], v[f.prefix+nodeMask] = "false", "", "", ""
		for i, p := range r.Pods {
			if p.Addr().BitLen() != f.bits {
				continue
			}
			v[f.prefix+support], v[f.prefix+cluster] = "true", p.String()
			usual, ok := f.usualShare(p, func(string, string, ...any) {})
			if i < len(r.Masks) && r.Masks[i] != 0 && (!ok || r.Masks[i] != usual) {
				v[f.prefix+nodeMask] = strconv.Itoa(r.Masks[i])
			}
		}
		for _, p := range r.Services {
			if p.Addr().BitLen() == f.bits {
				v[f.prefix+service] = p.String()
			}
		}
	}
	return v
}

// ShareFlags are the arguments of the controller manager about a node's share; "" for one that must not be there.
func (r Ranges) ShareFlags() map[string]string {
	flags := r.flags()["kube-controller-manager"]
	maps.DeleteFunc(flags, func(flag, _ string) bool { return !strings.HasPrefix(flag, "node-cidr-mask-size") })
	return flags
}

// flags are the arguments that these ranges need, by file and flag; "" for one that must not be there.
func (r Ranges) flags() map[string]map[string]string {
	masks := map[string]string{"node-cidr-mask-size": "", "node-cidr-mask-size-ipv4": "", "node-cidr-mask-size-ipv6": ""}
	pods := 1 << 20
	for i, p := range r.Pods {
		f := familyOf(p)
		if r.Masks[i] != f.mask {
			masks["node-cidr-mask-size-"+strings.ToLower(strings.TrimSuffix(f.prefix, "_"))] = strconv.Itoa(r.Masks[i])
		}
		// Network, gateway and broadcast are nobody's.
		pods = min(pods, 1<<min(20, f.bits-r.Masks[i])-3)
	}
	maxPods := ""
	if pods < ordinaryPods {
		maxPods = strconv.Itoa(pods)
	}
	manager := map[string]string{"cluster-cidr": join(r.Pods), "service-cluster-ip-range": join(r.Services)}
	maps.Copy(manager, masks)
	return map[string]map[string]string{
		"kube-apiserver":          {"service-cluster-ip-range": join(r.Services)},
		"kube-controller-manager": manager,
		"kube-proxy":              {"cluster-cidr": join(r.Pods)},
		"kubelet":                 {"cluster-dns": DNS(r.Services[0]).String(), "max-pods": maxPods},
	}
}

func join(list []netip.Prefix) string {
	var out []string
	for _, p := range list {
		out = append(out, p.String())
	}
	return strings.Join(out, ",")
}
