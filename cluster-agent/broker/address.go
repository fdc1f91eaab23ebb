package broker

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	"microk8s/cluster-agent/api"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/service"
)

// settleWait bounds the restart of this node's daemons with another address.
const settleWait = 90 * time.Second

// settle has the only node of a cluster known by the address at which the first other one joins: with several networks, its
// own choice may be one that other nodes do not reach. Where somebody chose the address (--node-ip), and where both
// addresses are on one network, nothing happens. As with the datastore's address, a join that fails later does not take
// it back.
func (c *call) settle(ctx context.Context, j *joining) error {
	b := c.b
	b.moving.Lock() // one join moves it, the others find it moved
	defer b.moving.Unlock()
	if len(j.nodes) != 1 || len(b.config().NodeIPs) > 0 || !j.local.IsValid() || !j.local.IsGlobalUnicast() {
		return nil
	}
	own, err := b.Interfaces()
	if err != nil {
		return nil //nolint:nilerr // the addresses that it has are right as far as anybody knows
	}
	to, err := b.ownAddress(j.local, c.r.Host)
	if err != nil || !otherNetwork(own, addresses(j.nodes[0]), to) {
		return nil //nolint:nilerr // refused where it matters, see reachable
	}
	b.Log.Info("this node is known by the address at which the first other node joins", "before", fmt.Sprint(addresses(j.nodes[0])), "now", to)
	for file, flag := range map[string]string{nodeconfig.Kubelet: "node-ip", nodeconfig.APIServer: "advertise-address"} {
		if _, err := nodeconfig.SetFlags(b.Env, file, map[string]string{flag: to.String()}); err != nil {
			return internal("cannot change this node's address to the one that the other node reaches", err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, settleWait)
	defer cancel()
	if err := b.Services.Restart(ctx, service.Kubelite); err != nil {
		return internal("cannot restart this node's daemons with the address that the other node reaches", err)
	}
	for tick := time.NewTicker(500 * time.Millisecond); ; {
		nodes, err := b.Cluster.Nodes(ctx)
		if err == nil && slices.ContainsFunc(nodes, func(n corev1.Node) bool { return slices.Contains(addresses(n), to) }) {
			j.nodes = nodes
			return nil
		}
		select {
		case <-ctx.Done():
			tick.Stop()
			return fail(http.StatusServiceUnavailable, api.CodeUnavailable, "this node is restarting with the address %s, by which it is known from now on; join again in a minute: %v",
				to, errors.Join(ctx.Err(), err))
		case <-tick.C:
		}
	}
}

// otherNetwork reports whether an address is on another network of this host than each of the addresses by which
// it is known.
func otherNetwork(own []Interface, known []netip.Addr, to netip.Addr) bool {
	mine := false
	for _, a := range known {
		for _, p := range own {
			if p.Addr() != a || a.Is4() != to.Is4() {
				continue
			}
			mine = true
			if p.Masked().Contains(to) {
				return false
			}
		}
	}
	return mine
}
