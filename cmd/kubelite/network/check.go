package network

import (
	"context"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"microk8s/internal/netcheck"
)

// checkWays answers the checks of other nodes on the tunnel's address, and finds out every minute whether pods'
// packets get to each other node. What it finds is in the log and, for `microk8s status`, in a file. It needs the tunnel, and
// ends with ctx.
func (n *node) checkWays(ctx context.Context, g ground, mtu int) {
	i := slices.IndexFunc(g.subnets, func(s netip.Prefix) bool { return s.Addr().Is4() })
	if n.Backend != BackendVXLAN || i < 0 {
		return
	}
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: g.subnets[i].Addr().AsSlice(), Port: netcheck.Port})
	if err != nil {
		n.Log.Warn("other nodes cannot check whether they reach this one's pods", "err", err)
		return
	}
	responder := &netcheck.Responder{Node: func(a netip.Addr) (netcheck.Node, bool) {
		for _, other := range n.others() {
			if other.Tunnel == a {
				return other, true
			}
		}
		return netcheck.Node{}, false
	}}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		if err := responder.Serve(ctx, conn); err != nil {
			n.Log.Warn("other nodes cannot check any more whether they reach this one's pods", "err", err)
		}
	})
	known := map[string]bool{} // problems that were logged
	pause := 5 * time.Second   // the first look, when the tunnel knows its nodes
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = netcheck.Interval - rand.N(netcheck.Interval/10)
		own := n.own()
		if own == nil {
			continue
		}
		others := n.others()
		check := netcheck.Check{Self: netcheck.FromNode(own), Peers: others, MTU: mtu, Heard: responder.Heard}
		results, err := check.Run(ctx)
		if err != nil {
			continue // the tunnel is being made, or ctx ended
		}
		record := netcheck.Record{Time: time.Now(), Results: results, Heard: map[string]time.Time{}}
		for _, o := range others {
			if at := responder.Heard(o); !at.IsZero() {
				record.Heard[o.Name] = at
			}
		}
		if err := record.Write(n.Env); err != nil {
			n.Log.Warn("cannot note how other nodes are reached", "err", err)
		}
		now := map[string]bool{}
		for _, r := range results {
			for _, p := range r.Problems {
				now[p.What] = true
				if !known[p.What] {
					n.Log.Warn("pods do not reach another node", "node", p.Node, "err", p.What, "do", p.Do)
				}
			}
		}
		known = now
	}
}

// others are the other nodes as a check sees them.
func (n *node) others() (out []netcheck.Node) {
	for _, o := range n.all() {
		if o.Name != n.NodeName {
			out = append(out, netcheck.FromNode(o))
		}
	}
	return out
}
