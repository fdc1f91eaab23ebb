package nft

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"microk8s/internal/netpolicy"
)

// Cut forgets the connections that the model forbids, so that their next packets are judged like
// those of new ones. It returns how many there were. Connections of the host itself are left
// alone: nothing forbids them.
func Cut(m *netpolicy.Model) (cut uint, err error) {
	own, err := hostAddresses()
	if err != nil {
		return 0, err
	}
	var errs []error
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		n, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, forbidden{m, own})
		cut += n
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) && !errors.Is(err, unix.ENOENT) { // ended by itself meanwhile
			errs = append(errs, fmt.Errorf("cannot end connections that are forbidden now: %w", err))
		}
	}
	return cut, errors.Join(errs...)
}

type forbidden struct {
	model *netpolicy.Model
	own   map[netip.Addr]bool
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter. The sender is as it was before any
// translation, the receiver is who answers.
func (f forbidden) MatchConntrackFlow(c *netlink.ConntrackFlow) bool {
	src, ok := netip.AddrFromSlice(c.Forward.SrcIP)
	dst, ok2 := netip.AddrFromSlice(c.Reverse.SrcIP)
	src, dst = src.Unmap(), dst.Unmap()
	if !ok || !ok2 || f.own[src] {
		return false
	}
	flow := netpolicy.Flow{Src: src, Dst: dst, Protocol: netpolicy.Protocol(c.Forward.Protocol)}
	switch flow.Protocol {
	case netpolicy.TCP, netpolicy.UDP, netpolicy.SCTP:
		flow.Port = c.Reverse.SrcPort
	}
	d := f.model.Verdict(flow)
	return !d.Allowed && (d.Side == netpolicy.Egress || !f.own[dst])
}

func hostAddresses() (map[netip.Addr]bool, error) {
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("cannot list the addresses of this host: %w", err)
	}
	own := map[netip.Addr]bool{}
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			own[ip.Unmap()] = true
		}
	}
	return own, nil
}
