package netpolicy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// Protocol is a number of IP's list of protocols.
type Protocol uint8

// The protocols that policies know.
const (
	TCP  Protocol = 6
	UDP  Protocol = 17
	SCTP Protocol = 132
)

// ProtocolOf reads the name of a protocol; none is TCP.
func ProtocolOf(p corev1.Protocol) (Protocol, bool) {
	switch p {
	case corev1.ProtocolTCP, "":
		return TCP, true
	case corev1.ProtocolUDP:
		return UDP, true
	case corev1.ProtocolSCTP:
		return SCTP, true
	}
	return 0, false
}

// String is the name that nft and people have for it.
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case SCTP:
		return "sctp"
	}
	return fmt.Sprint(uint8(p))
}

// PortRange is the ports From to To of a protocol, both included.
type PortRange struct {
	Protocol Protocol
	From, To uint16
}

// PortSet is a set of ports. It is not changed after it was made.
type PortSet struct {
	// All is every port of every protocol, those without ports included.
	All bool
	// Others is everything of the protocols that are not named here, such as ICMP.
	Others bool
	Ranges []PortRange // sorted, apart from each other; none with All
	key    string
}

// whole is every port of the protocols that have ports.
var whole = []PortRange{{TCP, 0, 65535}, {UDP, 0, 65535}, {SCTP, 0, 65535}}

var (
	nothing    = newPortSet(false, nil)
	everything = newPortSet(true, whole)
)

func newPortSet(others bool, ranges []PortRange) *PortSet {
	s := &PortSet{Others: others}
	ranges = slices.Clone(ranges)
	slices.SortFunc(ranges, func(a, b PortRange) int {
		return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.From, b.From), cmp.Compare(a.To, b.To))
	})
	for _, r := range ranges {
		if n := len(s.Ranges); n > 0 && s.Ranges[n-1].Protocol == r.Protocol && int(r.From) <= int(s.Ranges[n-1].To)+1 {
			s.Ranges[n-1].To = max(s.Ranges[n-1].To, r.To)
			continue
		}
		s.Ranges = append(s.Ranges, r)
	}
	if others && slices.Equal(s.Ranges, whole) {
		return &PortSet{All: true, Others: true, key: "all"}
	}
	var b strings.Builder
	if others {
		b.WriteString("others;")
	}
	for _, r := range s.Ranges {
		fmt.Fprintf(&b, "%s %d-%d;", r.Protocol, r.From, r.To)
	}
	s.key = b.String()
	return s
}

// ranges returns the ports of the protocols that have ports.
func (s *PortSet) ranges() []PortRange {
	if s.All {
		return whole
	}
	return s.Ranges
}

// without returns what of a set is not in another.
func (s *PortSet) without(o *PortSet) *PortSet {
	var out []PortRange
	for _, r := range s.ranges() {
		from := int(r.From)
		for _, gap := range o.ranges() {
			if gap.Protocol != r.Protocol || int(gap.To) < from || gap.From > r.To {
				continue
			}
			if int(gap.From) > from {
				out = append(out, PortRange{r.Protocol, uint16(from), gap.From - 1})
			}
			from = int(gap.To) + 1
		}
		if from <= int(r.To) {
			out = append(out, PortRange{r.Protocol, uint16(from), r.To})
		}
	}
	return newPortSet(s.Others && !o.Others, out)
}

// Key is equal for sets that are.
func (s *PortSet) Key() string { return s.key }

// Empty reports whether the set has no port.
func (s *PortSet) Empty() bool { return !s.Others && len(s.Ranges) == 0 }

// Contains reports whether a port is in the set.
func (s *PortSet) Contains(p Protocol, port uint16) bool {
	if s.All || p != TCP && p != UDP && p != SCTP {
		return s.Others
	}
	_, found := slices.BinarySearchFunc(s.Ranges, PortRange{Protocol: p, From: port}, func(r, want PortRange) int {
		if c := cmp.Compare(r.Protocol, want.Protocol); c != 0 {
			return c
		}
		switch {
		case r.To < want.From:
			return -1
		case r.From > want.From:
			return 1
		}
		return 0
	})
	return found
}
