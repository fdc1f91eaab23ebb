// Command host-access keeps an address on the loopback of the host it runs on, labelled
// lo:microk8s, while it runs: pods reach programs of their node by it. It runs in the pods of
// the addon host-access, in the host's network.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"syscall"

	"github.com/vishvananda/netlink"
)

const label = "lo:microk8s"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "host-access:", err)
		os.Exit(1)
	}
}

// run puts the address there, again whenever it was taken away, and removes it when ctx ends.
func run(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("usage: host-access ADDRESS")
	}
	ip, err := netip.ParseAddr(args[0])
	if err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("cannot find the loopback: %w", err)
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(ip.BitLen(), ip.BitLen())}}
	if ip.Is4() {
		addr.Label = label // IPv6 addresses have none
	}
	changes := make(chan netlink.AddrUpdate, 16)
	if err := netlink.AddrSubscribeWithOptions(changes, ctx.Done(), netlink.AddrSubscribeOptions{}); err != nil {
		return fmt.Errorf("cannot watch addresses: %w", err)
	}
	if err := clean(lo, addr); err != nil {
		return err
	}
	for {
		if err := netlink.AddrReplace(lo, addr); err != nil {
			return fmt.Errorf("cannot add %s to the loopback: %w", ip, err)
		}
		for gone := false; !gone; {
			select {
			case c, ok := <-changes:
				if !ok && ctx.Err() == nil {
					return errors.New("the watch of addresses has ended")
				}
				gone = ok && !c.NewAddr && c.LinkIndex == lo.Attrs().Index && c.LinkAddress.IP.Equal(addr.IP)
			case <-ctx.Done():
				if err := netlink.AddrDel(lo, addr); err != nil && !errors.Is(err, syscall.EADDRNOTAVAIL) {
					return fmt.Errorf("cannot remove %s from the loopback: %w", ip, err)
				}
				return nil
			}
		}
	}
}

// clean removes addresses of an earlier run that was killed.
func clean(lo netlink.Link, keep *netlink.Addr) error {
	list, err := netlink.AddrList(lo, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("cannot list the addresses of the loopback: %w", err)
	}
	for _, a := range list {
		if a.Label == label && !a.IP.Equal(keep.IP) {
			if err := netlink.AddrDel(lo, &a); err != nil {
				return fmt.Errorf("cannot remove %s from the loopback: %w", a.IP, err)
			}
		}
	}
	return nil
}
