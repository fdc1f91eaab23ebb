package hostnet

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// unsteady are flags of addresses that a node cannot be known by: they change, or are not in use.
const unsteady = unix.IFA_F_TEMPORARY | unix.IFA_F_DEPRECATED | unix.IFA_F_DADFAILED | unix.IFA_F_TENTATIVE

// OtherFamily returns an address of the other family on the interface that has this one: one of a network before a single one. ok is false
// where there is none, or no interface has the address.
func OtherFamily(address netip.Addr) (other netip.Addr, ok bool, err error) {
	all, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return other, false, fmt.Errorf("cannot list addresses: %w", err)
	}
	index := 0
	for _, a := range all {
		if p, ok := addrPrefix(a); ok && p.Addr() == address.Unmap() {
			index = a.LinkIndex
		}
	}
	single := true
	for _, a := range all {
		p, known := addrPrefix(a)
		if !known || a.LinkIndex != index || p.Addr().Is4() == address.Unmap().Is4() || !p.Addr().IsGlobalUnicast() || a.Flags&unsteady != 0 {
			continue
		}
		if !ok || single && !p.IsSingleIP() {
			other, ok, single = p.Addr(), true, p.IsSingleIP()
		}
	}
	return other, ok, nil
}
