package hostnet

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// opaque is an expression that this program cannot read. The nftables library leaves those
// out of a rule, which makes "drop what matches this" look like "drop everything".
type opaque struct{ expr.Any }

// readRules lists the rules of a chain, in order, with every expression they have.
func readRules(c *nftables.Chain) ([]*nftables.Rule, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	selection, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_RULE_TABLE, Data: []byte(c.Table.Name + "\x00")},
		{Type: unix.NFTA_RULE_CHAIN, Data: []byte(c.Name + "\x00")},
	})
	if err != nil {
		return nil, err
	}
	messages, err := conn.Execute(netlink.Message{
		Header: netlink.Header{
			Type:  netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETRULE),
			Flags: netlink.Request | netlink.Dump,
		},
		Data: append([]byte{byte(c.Table.Family), unix.NFNETLINK_V0, 0, 0}, selection...),
	})
	if errors.Is(err, unix.ENOENT) {
		return nil, nil // gone meanwhile
	}
	if err != nil {
		return nil, err
	}
	var rules []*nftables.Rule
	for _, m := range messages {
		if len(m.Data) < 4 {
			return nil, fmt.Errorf("the kernel sent a message of %d bytes", len(m.Data))
		}
		ad, err := netlink.NewAttributeDecoder(m.Data[4:])
		if err != nil {
			return nil, err
		}
		ad.ByteOrder = binary.BigEndian
		r := &nftables.Rule{Table: c.Table, Chain: c}
		for ad.Next() {
			switch ad.Type() {
			case unix.NFTA_RULE_HANDLE:
				r.Handle = ad.Uint64()
			case unix.NFTA_RULE_USERDATA:
				r.UserData = ad.Bytes()
			case unix.NFTA_RULE_EXPRESSIONS:
				ad.Nested(func(list *netlink.AttributeDecoder) error {
					for list.Next() {
						list.Nested(func(e *netlink.AttributeDecoder) error {
							r.Exprs = append(r.Exprs, readExpr(byte(c.Table.Family), e))
							return nil
						})
					}
					return nil
				})
			}
		}
		if err := ad.Err(); err != nil {
			return nil, err
		}
		rules = append(rules, r)
	}
	return rules, nil
}

// readExpr reads the expressions that matter here; the others are opaque.
func readExpr(family byte, ad *netlink.AttributeDecoder) expr.Any {
	var name string
	var data []byte
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_EXPR_NAME:
			name = ad.String()
		case unix.NFTA_EXPR_DATA:
			data = ad.Bytes()
		}
	}
	var e expr.Any
	switch name {
	case "counter":
		e = &expr.Counter{}
	case "log":
		e = &expr.Log{}
	case "reject":
		e = &expr.Reject{}
	case "meta":
		e = &expr.Meta{}
	case "payload":
		e = &expr.Payload{}
	case "bitwise":
		e = &expr.Bitwise{}
	case "cmp":
		e = &expr.Cmp{}
	case "nat":
		e = &expr.NAT{}
	case "immediate":
		immediate, verdict := &expr.Immediate{}, &expr.Verdict{}
		if expr.Unmarshal(family, data, immediate) != nil {
			return opaque{}
		}
		if immediate.Register != unix.NFT_REG_VERDICT {
			return immediate
		}
		e = verdict
	case "match":
		// What a match of iptables holds is of its own making; only a comment is known to
		// match everything.
		if extensionName(data) == "comment" {
			return &expr.Match{Name: "comment"}
		}
		return opaque{}
	case "target":
		switch extensionName(data) {
		case "REJECT":
			return &expr.Reject{}
		case "LOG", "NFLOG":
			return &expr.Log{}
		}
		return opaque{}
	default:
		return opaque{}
	}
	if expr.Unmarshal(family, data, e) != nil {
		return opaque{}
	}
	return e
}

// extensionName is the name of a match or target of iptables.
func extensionName(data []byte) string {
	attributes, err := netlink.UnmarshalAttributes(data)
	if err != nil {
		return ""
	}
	for _, a := range attributes {
		if a.Type == unix.NFTA_MATCH_NAME /* and NFTA_TARGET_NAME */ {
			return string(bytes.TrimRight(a.Data, "\x00"))
		}
	}
	return ""
}
