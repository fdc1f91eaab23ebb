package hostnet

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"

	"microk8s/internal/hostwatch"
)

// Firewall keeps the host's own firewall from dropping the traffic of pods, as Docker's and
// ufw's do by setting the policy of the FORWARD chain to DROP. In netfilter a packet must be
// accepted in every chain of a hook, so the only remedy is a rule in the very chain that
// drops. Rules carry [Comment]; they are put behind what the owner of the chain has written,
// but before the point where everything left would be dropped, so that the owner's own
// decisions about single addresses keep their effect.
//
// Chains that let pods through anyway are not touched.
type Firewall struct {
	Cluster []netip.Prefix // pod addresses of the cluster
}

// legacyRecheck is how often legacy iptables is looked at, for what [WatchLegacy] misses.
const legacyRecheck = time.Minute

// Owner keeps the rules in place: it adds them, and again whenever somebody changed the firewall.
func (f *Firewall) Owner() hostwatch.Owner {
	return hostwatch.Owner{
		Name: "accept rules for pods",
		// kube-proxy writes its own table very often.
		Concerns: func(c hostwatch.Change) bool {
			return (c.Kind == hostwatch.Table || c.Kind == hostwatch.Chain || c.Kind == hostwatch.Rule) && !otherOwner(c.Table)
		},
		Sync:  func(context.Context) ([]string, error) { return f.Ensure() },
		Every: legacyRecheck,
	}
}

// otherOwners are tables whose programs deal with pods themselves.
func otherOwner(table string) bool {
	return table == Table || table == PolicyTable || table == proxyTable || table == hostPortsTable || strings.HasPrefix(table, "cali") || strings.HasPrefix(table, "cilium")
}

// Ensure adds the rules that are missing and gives the chains it had to change, such as
// "ip filter FORWARD". Errors of one chain do not keep it from the others.
func (f *Firewall) Ensure() (changed []string, err error) {
	h, err := readHost()
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, chain := range h.chains {
		wanted := f.wanted(chain)
		if len(wanted) == 0 {
			continue
		}
		did, err := h.ensure(chain, wanted)
		if err != nil {
			errs = append(errs, fmt.Errorf("cannot add accept rules to %s: %w", chainName(chain), err))
		}
		if did {
			changed = append(changed, chainName(chain))
		}
	}
	for _, c := range f.Cluster {
		did, err := ensureLegacy(c)
		errs = append(errs, err)
		changed = append(changed, did...)
	}
	return changed, errors.Join(errs...)
}

// wanted returns the accept rules that pods need in a chain, if it is one that filters them.
func (f *Firewall) wanted(c *nftables.Chain) [][]expr.Any {
	if c.Hooknum == nil || c.Type != nftables.ChainTypeFilter || otherOwner(c.Table.Name) {
		return nil
	}
	var rules [][]expr.Any
	for _, cluster := range f.Cluster {
		var prefix []expr.Any
		switch c.Table.Family {
		case family(cluster):
		case nftables.TableFamilyINet:
			prefix = familyOnly(cluster)
		default:
			continue
		}
		rule := func(parts ...[]expr.Any) {
			all := append([]expr.Any(nil), prefix...)
			for _, p := range parts {
				all = append(all, p...)
			}
			rules = append(rules, append(all, &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictAccept}))
		}
		switch *c.Hooknum {
		case *nftables.ChainHookForward:
			rule(address(source, cluster, true))
			rule(address(destination, cluster, true))
		case *nftables.ChainHookInput:
			// Pods talk to the API server and the kubelet of their own node.
			rule(interfaceName(expr.MetaKeyIIFNAME, Bridge), address(source, cluster, true))
			// Nodes ask each other through the tunnel whether it works.
			tunnel := Tunnel
			if cluster.Addr().Is6() {
				tunnel = Tunnel6
			}
			rule(interfaceName(expr.MetaKeyIIFNAME, tunnel), address(source, cluster, true), udpPort(CheckPort))
		}
	}
	return rules
}

// RemoveAccepts takes all rules with our comment out again, wherever they are.
func RemoveAccepts() error {
	h, err := readHost()
	if err != nil {
		return err
	}
	var errs []error
	for _, chain := range h.chains {
		if chain.Hooknum == nil || chain.Type != nftables.ChainTypeFilter {
			continue
		}
		rules, err := h.rules(chain)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if err := h.remove(ours(rules)); err != nil {
			errs = append(errs, fmt.Errorf("cannot remove accept rules from %s: %w", chainName(chain), err))
		}
	}
	return errors.Join(append(errs, removeLegacy())...)
}

// host is the ruleset at one moment, read as far as needed.
type host struct {
	conn   *nftables.Conn
	chains []*nftables.Chain
	read   map[string][]*nftables.Rule
}

func readHost() (*host, error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("cannot open the nftables socket: %w", err)
	}
	chains, err := conn.ListChains()
	if err != nil {
		return nil, fmt.Errorf("cannot list the host's firewall chains: %w", err)
	}
	return &host{conn: conn, chains: chains, read: map[string][]*nftables.Rule{}}, nil
}

func chainName(c *nftables.Chain) string {
	return familyName(c.Table.Family) + " " + c.Table.Name + " " + c.Name
}

// familyName is how nft writes a family.
func familyName(f nftables.TableFamily) string {
	return map[nftables.TableFamily]string{nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6", nftables.TableFamilyINet: "inet"}[f]
}

func (h *host) rules(c *nftables.Chain) ([]*nftables.Rule, error) {
	key := chainName(c)
	if r, ok := h.read[key]; ok {
		return r, nil
	}
	r, err := readRules(c)
	if err != nil {
		return nil, fmt.Errorf("cannot list the rules of %s: %w", key, err)
	}
	h.read[key] = r
	return r, nil
}

// ensure adds the wanted rules unless the chain has them where they work, or needs none.
func (h *host) ensure(c *nftables.Chain, wanted [][]expr.Any) (changed bool, err error) {
	rules, err := h.rules(c)
	if err != nil {
		return false, err
	}
	end, closed := h.end(c, 0)
	drops := closed || c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop
	have := ours(rules)
	if !drops && len(have) == 0 {
		return false, nil
	}
	if len(have) == len(wanted) {
		inPlace := true
		for i, r := range rules {
			if isOurs(r) && closed && i > end {
				inPlace = false
			}
		}
		for i, r := range have {
			inPlace = inPlace && sameMatch(r.Exprs, wanted[i])
		}
		if inPlace {
			return false, nil
		}
	}
	// One transaction: what is there is replaced, in the wanted order.
	for _, r := range have {
		if err := h.conn.DelRule(r); err != nil {
			return false, err
		}
	}
	comment := userdata.AppendString(nil, userdata.TypeComment, Comment)
	for _, w := range wanted {
		rule := &nftables.Rule{Table: c.Table, Chain: c, Exprs: w, UserData: comment}
		if closed {
			rule.Position = rules[end].Handle
			h.conn.InsertRule(rule)
		} else {
			h.conn.AddRule(rule)
		}
	}
	if err := h.conn.Flush(); err != nil {
		return false, err
	}
	delete(h.read, chainName(c))
	return true, nil
}

func (h *host) remove(rules []*nftables.Rule) error {
	if len(rules) == 0 {
		return nil
	}
	for _, r := range rules {
		if err := h.conn.DelRule(r); err != nil {
			return err
		}
	}
	return h.conn.Flush()
}

// end finds the first rule of a chain behind which no packet gets, because it drops or
// rejects whatever reaches it, by itself or in the chain it hands over to.
func (h *host) end(c *nftables.Chain, depth int) (index int, closed bool) {
	const deepest = 16 // the kernel's own limit of nested jumps, NFT_JUMP_STACK_SIZE
	rules, err := h.rules(c)
	if err != nil || depth > deepest {
		return 0, false
	}
	for i, r := range rules {
		if isOurs(r) {
			continue
		}
		final, ok := unconditional(r.Exprs)
		if !ok {
			continue
		}
		switch v := final.(type) {
		case *expr.Reject:
			return i, true
		case *expr.Verdict:
			switch v.Kind {
			case expr.VerdictDrop:
				return i, true
			case expr.VerdictJump, expr.VerdictGoto:
				for _, next := range h.chains {
					if next.Name == v.Chain && next.Table.Name == c.Table.Name && next.Table.Family == c.Table.Family {
						if _, closed := h.end(next, depth+1); closed {
							return i, true
						}
					}
				}
			case expr.VerdictAccept, expr.VerdictReturn:
				return 0, false // nothing behind it is ever reached
			}
		}
	}
	return 0, false
}

// unconditional returns what a rule does in the end, if it does so to every packet.
func unconditional(exprs []expr.Any) (final expr.Any, ok bool) {
	for _, e := range exprs {
		switch e := e.(type) {
		case *expr.Counter, *expr.Log:
		case *expr.Match:
			if e.Name != "comment" {
				return nil, false
			}
		case *expr.Verdict, *expr.Reject:
			final = e
		default:
			return nil, false
		}
	}
	return final, final != nil
}

func ours(rules []*nftables.Rule) []*nftables.Rule {
	var out []*nftables.Rule
	for _, r := range rules {
		if isOurs(r) {
			out = append(out, r)
		}
	}
	return out
}

func isOurs(r *nftables.Rule) bool { return ruleComment(r.UserData) == Comment }

// ruleComment reads a rule's comment from the type-length-value list that nft keeps beside
// it. Other programs put what they like there, so nothing about it is taken for granted.
func ruleComment(data []byte) string {
	for len(data) >= 2 {
		kind, length := userdata.Type(data[0]), int(data[1])
		if len(data) < 2+length {
			return ""
		}
		if kind == userdata.TypeComment {
			return strings.TrimSuffix(string(data[2:2+length]), "\x00")
		}
		data = data[2+length:]
	}
	return ""
}

// sameMatch compares a rule as the kernel returns it with one of ours.
func sameMatch(have, want []expr.Any) bool {
	if len(have) != len(want) {
		return false
	}
	for i := range want {
		switch w := want[i].(type) {
		case *expr.Cmp:
			h, ok := have[i].(*expr.Cmp)
			if !ok || h.Op != w.Op || strings.TrimRight(string(h.Data), "\x00") != strings.TrimRight(string(w.Data), "\x00") {
				return false
			}
		case *expr.Bitwise:
			h, ok := have[i].(*expr.Bitwise)
			if !ok || string(h.Mask) != string(w.Mask) {
				return false
			}
		case *expr.Payload:
			h, ok := have[i].(*expr.Payload)
			if !ok || h.Offset != w.Offset || h.Len != w.Len {
				return false
			}
		case *expr.Verdict:
			h, ok := have[i].(*expr.Verdict)
			if !ok || h.Kind != w.Kind {
				return false
			}
		}
	}
	return true
}

func nativeUint32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
