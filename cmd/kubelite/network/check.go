package network

import (
	"context"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"microk8s/internal/netcheck"
)

// checkWays answers the checks of other nodes on the addresses of the tunnels, and finds out every minute whether pods'
// packets get to each other node. What it finds is in the log and, for `microk8s status`, in a file. It needs the tunnels, and
// ends with ctx.
func (n *node) checkWays(ctx context.Context, g ground, mtu int) {
	if n.Backend != BackendVXLAN {
		return
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	responders := map[bool]*netcheck.Responder{} // by whether the tunnel is that of IPv4
	for _, subnet := range g.subnets {
		conn, err := (&net.ListenConfig{Control: early}).ListenPacket(ctx, "udp", netip.AddrPortFrom(subnet.Addr(), netcheck.Port).String())
		if err != nil {
			n.Log.Warn("other nodes cannot check whether they reach this one's pods", "at", subnet.Addr(), "err", err)
			continue
		}
		r := &netcheck.Responder{Node: n.byTunnel}
		responders[subnet.Addr().Is4()] = r
		wg.Go(func() {
			if err := r.Serve(ctx, conn); err != nil {
				n.Log.Warn("other nodes cannot check any more whether they reach this one's pods", "err", err)
			}
		})
	}
	heard := func(o netcheck.Node) time.Time {
		if r := responders[o.Tunnel.Is4()]; r != nil {
			return r.Heard(o)
		}
		return time.Time{}
	}
	known := map[string]bool{} // problems that were logged
	pause := 5 * time.Second   // the first look, when the tunnel knows its nodes
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = netcheck.Interval - rand.N(netcheck.Interval/10)
		checks, err := netcheck.Families(n.all(), n.NodeName, netcheck.Check{MTU: mtu, Heard: heard})
		if err != nil {
			continue // the node is not registered
		}
		results, err := netcheck.RunAll(ctx, checks)
		if err != nil {
			continue // the tunnel is being made, or ctx ended
		}
		record := netcheck.Record{Time: time.Now(), Results: results, Heard: map[string]time.Time{}}
		for _, c := range checks {
			for _, o := range c.Peers {
				if at := heard(o); !at.IsZero() {
					record.Heard[netcheck.HeardKey(o)] = at
				}
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

// early lets a socket have an address of IPv6 while the kernel still looks whether somebody else has it.
func early(network, _ string, c syscall.RawConn) error {
	if network != "udp6" {
		return nil
	}
	var err error
	if cause := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1) }); cause != nil {
		return cause
	}
	return err
}

// byTunnel returns the other node whose tunnel has an address.
func (n *node) byTunnel(a netip.Addr) (netcheck.Node, bool) {
	for _, o := range n.all() {
		if o.Name == n.NodeName {
			continue
		}
		for _, f := range netcheck.FromNode(o) {
			if f.Tunnel == a {
				return f, true
			}
		}
	}
	return netcheck.Node{}, false
}
