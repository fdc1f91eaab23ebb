package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"microk8s/internal/hostprobe"
	"microk8s/internal/hostwatch"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
)

// addressGrace is how long the node's address may be away before it counts as another: a restarted network manager
// takes it away and brings it back.
const addressGrace = 6 * time.Second

// errAddress ends kubelite when the node got another address: the daemons read theirs once, when they start.
var errAddress = errors.New("the node's address changed")

// followAddress returns [errAddress] when the node's address has left the host and another one is there. On a member of
// the control plane, which the other members know by that address, and where somebody chose the address, it only warns.
func followAddress(ctx context.Context, env snapenv.Env, config nodeconfig.Config, address netip.Addr, watch *hostwatch.Watcher, log *slog.Logger) error {
	changed := make(chan netip.Addr, 1)
	var once sync.Once
	var since time.Time // when it was first missing
	// What is written in the file of arguments stays as it is, but for a worker, where the join wrote it (daemon.Preparer).
	fixed := len(config.NodeIPs) > 1 || len(config.NodeIPs) == 1 && !config.Worker
	member := config.Clustered && !config.Worker
	kept := watch.Register(ctx, hostwatch.Owner{
		Name:     "the node's address",
		Concerns: func(c hostwatch.Change) bool { return c.Kind == hostwatch.Address },
		Sync: func(context.Context) ([]string, error) {
			if onHost(address) {
				since = time.Time{}
				return nil, nil
			}
			if since.IsZero() {
				since = time.Now()
			}
			host := hostprobe.Probe(env.Host)
			text := host.Address
			if address.Is6() {
				text = host.Address6
			}
			now, err := netip.ParseAddr(text)
			switch {
			case err != nil:
				return nil, fmt.Errorf("the node's address %s is on no interface, and there is no other", address)
			case fixed && !member:
				return nil, fmt.Errorf("the node's address %s is on no interface; the host has %s: change --node-ip in %s, and run: microk8s stop; microk8s start", address, now, env.Args(nodeconfig.Kubelet))
			case member:
				return nil, fmt.Errorf("the node's address %s is on no interface; the cluster knows this control-plane node by it: give it back to the host, or run on another one: microk8s remove-node %s --force, and join again",
					address, config.NodeName)
			case time.Since(since) < addressGrace:
				return nil, fmt.Errorf("the node's address %s is on no interface", address) // it is looked at again
			}
			once.Do(func() { changed <- now })
			return nil, nil
		},
	})
	defer kept.Close()
	select {
	case <-ctx.Done():
		return nil
	case now := <-changed:
		log.Info("the node's address changed; its daemons are restarted with it", "before", address, "now", now)
		return fmt.Errorf("%w from %s to %s", errAddress, address, now)
	}
}

// onHost reports whether an interface has the address.
func onHost(address netip.Addr) bool {
	addrs, err := net.InterfaceAddrs()
	return err != nil || slices.ContainsFunc(addrs, func(a net.Addr) bool {
		p, err := netip.ParsePrefix(a.String())
		return err == nil && p.Addr().Unmap() == address.Unmap()
	})
}
