package hostwatch

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Kind is what a change is about.
type Kind int

// Kinds of changes.
const (
	Lost        Kind = iota // events were lost: anything may have changed; goes to every owner
	Link                    // an interface
	Address                 // an address of an interface
	Route                   // a route
	Neighbor                // an entry of a neighbour table, or of the forwarding table of a bridge or a VXLAN tunnel
	Setting                 // a sysctl below net.ipv4.conf or net.ipv6.conf that the kernel announces, such as forwarding
	Table                   // an nftables table
	Chain                   // an nftables chain
	Rule                    // an nftables rule
	Set                     // an nftables set or map
	Element                 // elements of an nftables set or map
	Transaction             // the end of an nftables transaction: the changes since the one before were all made by Program
)

// Change is one event of the kernel.
type Change struct {
	Kind    Kind
	Deleted bool
	// Port is the netlink port of the socket that made the change, 0 for the kernel.
	Port uint32

	Link int    // index of the interface; 0 if there is none: nftables, routes with several
	Name string // of the interface, for Link

	Family byte   // AF_INET and the like; for nftables the table's family, NFPROTO_IPV4 and the like
	Table  string // nftables: the table
	Object string // nftables: the chain, also of a rule; the set, also of an element

	// Program is for Transaction what the thread that made it is called, cut to 15 bytes as the kernel does; "" if the
	// kernel does not say.
	Program string
}

// Nftables reports whether the change is one of the ruleset.
func (c Change) Nftables() bool { return c.Kind >= Table }

// groups of rtnetlink(7).
var routeGroups = []uint32{
	unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH,
	unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
	unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
	unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV6_NETCONF,
}

// receiveBuffer is for bursts, such as a flush of thousands of rules; when it runs over, everybody looks.
const receiveBuffer = 4 << 20

// Run receives events until ctx ends. Where the kernel refuses a subscription, which is logged, changes are
// only seen every [Resync].
func (w *Watcher) Run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, s := range []struct {
		name   string
		family int
		groups []uint32
		decode func(netlink.Message) (Change, bool)
	}{
		{"links, addresses and routes", unix.NETLINK_ROUTE, routeGroups, decodeRoute},
		{"the nftables ruleset", unix.NETLINK_NETFILTER, []uint32{unix.NFNLGRP_NFTABLES}, decodeRuleset},
	} {
		wg.Go(func() {
			for wait := time.Second; ctx.Err() == nil; wait = min(2*wait, failurePause) {
				if err := w.receive(ctx, s.family, s.groups, s.decode); ctx.Err() == nil {
					w.log.Warn("changes of the host's network are seen late", "of", s.name, "err", err, "retry_in", wait)
				}
				select {
				case <-ctx.Done():
				case <-time.After(wait):
				}
			}
		})
	}
}

// receive distributes the events of one subscription until it fails or ctx ends.
func (w *Watcher) receive(ctx context.Context, family int, groups []uint32, decode func(netlink.Message) (Change, bool)) error {
	conn, err := netlink.Dial(family, nil)
	if err != nil {
		return fmt.Errorf("cannot open a netlink socket: %w", err)
	}
	defer conn.Close()
	_ = conn.SetReadBuffer(receiveBuffer) // the default will do on a quiet host
	for _, g := range groups {
		if err := conn.JoinGroup(g); err != nil {
			return fmt.Errorf("cannot subscribe to netlink events: %w", err)
		}
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Now()) })
	defer stop()
	w.distribute(Change{Kind: Lost}) // what happened before the subscription
	for {
		messages, err := conn.Receive()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, unix.ENOBUFS): // nobody read them fast enough
			w.distribute(Change{Kind: Lost})
			continue
		case err != nil:
			return fmt.Errorf("cannot read netlink events: %w", err)
		}
		for _, m := range messages {
			if c, ok := decode(m); ok {
				w.distribute(c)
			}
		}
	}
}

// decodeRoute reads a message of rtnetlink; ok is false for one of no interest or with less than its header.
func decodeRoute(m netlink.Message) (c Change, ok bool) {
	c.Port = m.Header.PID
	index := func(at int) bool {
		if len(m.Data) < at+4 {
			return false
		}
		c.Link = int(int32(binary.NativeEndian.Uint32(m.Data[at:])))
		c.Family = m.Data[0]
		return true
	}
	switch uint16(m.Header.Type) {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK: // struct ifinfomsg: 16 bytes, the index at 4
		c.Kind, c.Deleted = Link, m.Header.Type == unix.RTM_DELLINK
		if !index(4) || len(m.Data) < unix.SizeofIfInfomsg {
			return c, false
		}
		c.Name = attributeText(m.Data[unix.SizeofIfInfomsg:], unix.IFLA_IFNAME)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR: // struct ifaddrmsg: the index at 4
		c.Kind, c.Deleted = Address, m.Header.Type == unix.RTM_DELADDR
		return c, index(4)
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE: // struct rtmsg: 12 bytes; the interface is an attribute
		c.Kind, c.Deleted = Route, m.Header.Type == unix.RTM_DELROUTE
		if len(m.Data) < unix.SizeofRtMsg {
			return c, false
		}
		c.Family = m.Data[0]
		if v := attribute(m.Data[unix.SizeofRtMsg:], unix.RTA_OIF); len(v) == 4 {
			c.Link = int(int32(binary.NativeEndian.Uint32(v)))
		}
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH: // struct ndmsg: the index at 4
		c.Kind, c.Deleted = Neighbor, m.Header.Type == unix.RTM_DELNEIGH
		return c, index(4)
	case unix.RTM_NEWNETCONF:
		c.Kind = Setting
		if len(m.Data) < 1 {
			return c, false
		}
		c.Family = m.Data[0]
	default:
		return c, false
	}
	return c, true
}

// objects are the messages of nftables' events, with the attribute that names the object. The table is
// attribute 1 in each (linux/netfilter/nf_tables.h).
var objects = map[uint16]struct {
	kind    Kind
	deleted bool
	name    uint16
}{
	unix.NFT_MSG_NEWTABLE: {Table, false, 1}, unix.NFT_MSG_DELTABLE: {Table, true, 1},
	unix.NFT_MSG_NEWCHAIN: {Chain, false, 3}, unix.NFT_MSG_DELCHAIN: {Chain, true, 3},
	unix.NFT_MSG_NEWRULE: {Rule, false, 2}, unix.NFT_MSG_DELRULE: {Rule, true, 2},
	unix.NFT_MSG_NEWSET: {Set, false, 2}, unix.NFT_MSG_DELSET: {Set, true, 2},
	unix.NFT_MSG_NEWSETELEM: {Element, false, 2}, unix.NFT_MSG_DELSETELEM: {Element, true, 2},
}

// decodeRuleset reads a message of nftables; ok is false for one of no interest.
func decodeRuleset(m netlink.Message) (c Change, ok bool) {
	const header = 4 // struct nfgenmsg: the family is its first byte
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < header {
		return c, false
	}
	if m.Header.Type&0xff == unix.NFT_MSG_NEWGEN {
		const program = 3 // NFTA_GEN_PROC_NAME
		return Change{Kind: Transaction, Port: m.Header.PID, Program: attributeText(m.Data[header:], program)}, true
	}
	o, ok := objects[uint16(m.Header.Type&0xff)]
	if !ok {
		return c, false
	}
	const table = 1
	return Change{
		Kind: o.kind, Deleted: o.deleted, Port: m.Header.PID, Family: m.Data[0],
		Table: attributeText(m.Data[header:], table), Object: attributeText(m.Data[header:], o.name),
	}, true
}

// attribute returns the value of the first netlink attribute of a type, nil if there is none. The list may hold
// thousands of elements, of which nothing is decoded.
func attribute(list []byte, want uint16) []byte {
	const header, typeMask = 4, 1<<14 - 1 // without NLA_F_NESTED and NLA_F_NET_BYTEORDER
	for len(list) >= header {
		length := int(binary.NativeEndian.Uint16(list))
		if length < header || length > len(list) {
			return nil
		}
		if binary.NativeEndian.Uint16(list[2:])&typeMask == want {
			return list[header:length]
		}
		list = list[min((length+3)&^3, len(list)):]
	}
	return nil
}

func attributeText(list []byte, want uint16) string {
	return string(bytes.TrimRight(attribute(list, want), "\x00"))
}
