package hostnet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// settle is how long the firewall has to be quiet before it is looked at: whoever
	// reloads one writes it in several transactions.
	settle = 300 * time.Millisecond

	// recheck is for what the kernel does not announce: legacy iptables has no events, and
	// events are dropped when a reader is too slow.
	recheck = time.Minute
)

// Run keeps the accept rules in place until ctx ends: it adds them, and again whenever
// somebody changed the firewall. What it cannot do it logs and tries again at the next
// change; the rules stay when it returns.
func (f *Firewall) Run(ctx context.Context) {
	changes := make(chan struct{}, 1)
	subscribed := subscribe(ctx, changes, f.Log)
	last := ""
	check := func() {
		changed, err := f.Ensure()
		for _, c := range changed {
			f.Log.Info("the host's firewall drops forwarded packets; pods are let through", "chain", c)
		}
		if err != nil && err.Error() != last {
			f.Log.Warn("the host's firewall may drop the packets of pods", "err", err)
		}
		if last = ""; err != nil {
			last = err.Error()
		}
	}
	check()
	tick := time.NewTicker(recheck)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			<-subscribed
			return
		case <-tick.C:
		case <-changes:
			if !quiet(ctx, changes) {
				continue
			}
		}
		check()
	}
}

// quiet waits until no change came for the settle time, at most ten times as long.
func quiet(ctx context.Context, changes <-chan struct{}) bool {
	limit := time.After(10 * settle)
	for {
		select {
		case <-ctx.Done():
			return false
		case <-changes:
		case <-limit:
			return true
		case <-time.After(settle):
			return true
		}
	}
}

// subscribe sends to changes when chains, rules or tables of others change. The channel it
// returns is closed when it has ended, soon after ctx. The socket belongs to the network
// namespace of the caller's thread.
func subscribe(ctx context.Context, changes chan<- struct{}, log *slog.Logger) <-chan struct{} {
	done := make(chan struct{})
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err == nil {
		err = conn.JoinGroup(unix.NFNLGRP_NFTABLES)
	}
	if err != nil {
		if conn != nil {
			conn.Close()
		}
		log.Warn("changes of the host's firewall are only seen once a minute", "err", err)
		close(done)
		return done
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Now()) })
	go func() {
		defer close(done)
		defer conn.Close()
		defer stop()
		for ctx.Err() == nil {
			messages, err := conn.Receive()
			if err != nil {
				if ctx.Err() != nil {
					return
				}
				if !overrun(err) {
					log.Warn("changes of the host's firewall are only seen once a minute", "err", fmt.Errorf("cannot read from netlink: %w", err))
					return
				}
				messages = nil // events were lost: look
			}
			if err == nil && !concerns(messages) {
				continue
			}
			select {
			case changes <- struct{}{}:
			default:
			}
		}
	}()
	return done
}

// overrun reports whether a socket only lost events because nobody read them fast enough.
func overrun(err error) bool { return errors.Is(err, unix.ENOBUFS) }

// concerns reports whether one of the messages tells of a change in a table that others own.
// kube-proxy writes its own very often, mostly set elements, which are not even decoded.
func concerns(messages []netlink.Message) bool {
	const tableAttribute = 1 // NFTA_TABLE_NAME, NFTA_CHAIN_TABLE and NFTA_RULE_TABLE are all 1
	for _, m := range messages {
		if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < 4 {
			continue
		}
		switch m.Header.Type & 0xff {
		case unix.NFT_MSG_NEWTABLE, unix.NFT_MSG_DELTABLE, unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_NEWRULE, unix.NFT_MSG_DELRULE:
		default:
			continue
		}
		attributes, err := netlink.UnmarshalAttributes(m.Data[4:])
		if err != nil {
			return true
		}
		for _, a := range attributes {
			if a.Type == tableAttribute && !otherOwner(string(bytes.TrimRight(a.Data, "\x00"))) {
				return true
			}
		}
	}
	return false
}
