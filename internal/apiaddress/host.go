package apiaddress

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// ErrElsewhere is of an address that is on none of the host's networks.
var ErrElsewhere = errors.New("it is on no network of this host")

// link returns the interface on whose network an address is.
func link(addr netip.Addr) (netlink.Link, error) {
	family := netlink.FAMILY_V4
	if addr.Is6() {
		family = netlink.FAMILY_V6
	}
	list, err := netlink.AddrList(nil, family)
	if err != nil {
		return nil, fmt.Errorf("cannot read the host's addresses: %w", err)
	}
	for _, a := range list {
		ones, bits := a.Mask.Size()
		if ones < bits && a.Contains(addr.AsSlice()) {
			return netlink.LinkByIndex(a.LinkIndex)
		}
	}
	return nil, ErrElsewhere
}

// Network returns an error unless the address is on a network of this host.
func Network(addr netip.Addr) error {
	_, err := link(addr)
	return err
}

// entry is the address with a full-length mask: by that it never becomes the node's own (ADR 36), and routes do not change.
func entry(addr netip.Addr) *netlink.Addr {
	a := &netlink.Addr{IPNet: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())}}
	if addr.Is6() {
		a.Flags = unix.IFA_F_NODAD // the one before may not have let go of it yet
		a.PreferedLft, a.ValidLft = 0, 0
	}
	return a
}

// Here reports whether the host has the address.
func Here(addr netip.Addr) (bool, error) {
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return false, fmt.Errorf("cannot read the host's addresses: %w", err)
	}
	for _, a := range list {
		if have, ok := netip.AddrFromSlice(a.IP); ok && have.Unmap() == addr {
			return true, nil
		}
	}
	return false, nil
}

// Add puts the address on the interface of its network, unless it is there. added is false then.
func Add(addr netip.Addr) (added bool, err error) {
	here, err := Here(addr)
	if err != nil || here {
		return false, err
	}
	l, err := link(addr)
	if err != nil {
		return false, err
	}
	if err := netlink.AddrAdd(l, entry(addr)); err != nil && !errors.Is(err, unix.EEXIST) {
		return false, fmt.Errorf("cannot add %s to %s: %w", addr, l.Attrs().Name, err)
	}
	return true, nil
}

// Remove takes the address off the host, where it has a full-length mask as Add puts it.
func Remove(addr netip.Addr) error {
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("cannot read the host's addresses: %w", err)
	}
	for _, a := range list {
		have, ok := netip.AddrFromSlice(a.IP)
		if ones, bits := a.Mask.Size(); !ok || have.Unmap() != addr || ones != bits {
			continue
		}
		l, err := netlink.LinkByIndex(a.LinkIndex)
		if err != nil {
			return err
		}
		if err := netlink.AddrDel(l, &netlink.Addr{IPNet: a.IPNet}); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("cannot remove %s from %s: %w", addr, l.Attrs().Name, err)
		}
	}
	return nil
}

// announcements are the pauses before each announcement: one may be lost, and switches learn late.
var announcements = []time.Duration{0, 200 * time.Millisecond, time.Second, 3 * time.Second}

// Announce tells the hosts of the network where the address is now: by gratuitous ARP (RFC 5227, section 3), or by
// unsolicited neighbour advertisements (RFC 4861, section 7.2.6).
func Announce(ctx context.Context, addr netip.Addr) error {
	l, err := link(addr)
	if err != nil {
		return err
	}
	for _, pause := range announcements {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		if addr.Is4() {
			err = announceARP(l, addr)
		} else {
			err = announceND(l, addr)
		}
		if err != nil {
			return fmt.Errorf("cannot announce %s on %s: %w", addr, l.Attrs().Name, err)
		}
	}
	return nil
}

// arpRequest is a gratuitous request (RFC 826): who has addr, asked by its own holder.
func arpRequest(mac net.HardwareAddr, addr netip.Addr) []byte {
	b := make([]byte, 0, 28)
	b = binary.BigEndian.AppendUint16(b, 1)             // Ethernet
	b = binary.BigEndian.AppendUint16(b, unix.ETH_P_IP) // IPv4
	b = append(b, 6, 4, 0, 1)                           // lengths, request
	b = append(b, mac...)
	b = append(b, addr.AsSlice()...)
	b = append(b, make([]byte, 6)...)
	return append(b, addr.AsSlice()...)
}

func announceARP(l netlink.Link, addr netip.Addr) error {
	mac := l.Attrs().HardwareAddr
	if len(mac) != 6 {
		return nil // a network without ARP
	}
	protocol := uint16(unix.ETH_P_ARP)
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	to := &unix.SockaddrLinklayer{Protocol: protocol<<8 | protocol>>8, Ifindex: l.Attrs().Index, Halen: 6, Addr: [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}
	return unix.Sendto(fd, arpRequest(mac, addr), 0, to)
}

// advertisement is the body of an unsolicited neighbour advertisement that overrides what hosts know.
func advertisement(mac net.HardwareAddr, addr netip.Addr) []byte {
	b := []byte{0x20, 0, 0, 0} // override
	b = append(b, addr.AsSlice()...)
	if len(mac) == 6 {
		b = append(append(b, 2, 1), mac...) // target link-layer address, of 8 bytes
	}
	return b
}

func announceND(l netlink.Link, addr netip.Addr) error {
	conn, err := icmp.ListenPacket("ip6:ipv6-icmp", addr.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	p := conn.IPv6PacketConn()
	if err := errors.Join(p.SetMulticastHopLimit(255), p.SetHopLimit(255)); err != nil {
		return err
	}
	m := icmp.Message{Type: ipv6.ICMPTypeNeighborAdvertisement, Body: &icmp.RawBody{Data: advertisement(l.Attrs().HardwareAddr, addr)}}
	data, err := m.Marshal(nil) // the kernel adds the sum
	if err != nil {
		return err
	}
	_, err = p.WriteTo(data, &ipv6.ControlMessage{HopLimit: 255, IfIndex: l.Attrs().Index}, &net.IPAddr{IP: net.ParseIP("ff02::1"), Zone: l.Attrs().Name})
	return err
}

// probing is how long a host may take to answer for an address.
const probing = 1500 * time.Millisecond

// Answered returns the hardware address of the host of the network that answers for an address, nil where nobody does.
func Answered(ctx context.Context, addr netip.Addr) (net.HardwareAddr, error) {
	l, err := link(addr)
	if err != nil {
		return nil, err
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "udp", netip.AddrPortFrom(addr, 9).String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	_, _ = conn.Write([]byte{0}) // the kernel asks who has it
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(probing):
	}
	list, err := netlink.NeighList(l.Attrs().Index, 0)
	if err != nil {
		return nil, err
	}
	for _, n := range list {
		have, ok := netip.AddrFromSlice(n.IP)
		if ok && have.Unmap() == addr && n.State&(unix.NUD_REACHABLE|unix.NUD_STALE|unix.NUD_DELAY|unix.NUD_PROBE|unix.NUD_PERMANENT) != 0 {
			return n.HardwareAddr, nil
		}
	}
	return nil, nil
}
