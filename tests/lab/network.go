package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// bridge is the switch, in the network namespace of the switch process.
const bridge = "br0"

// port is a host's end at the switch.
func port(h *host) string { return fmt.Sprintf("p%d", h.Number) }

// mac is the link address of eth0. It is fixed, so that the other hosts need not learn a new one
// when a host is switched off and on.
func mac(h *host) net.HardwareAddr { return net.HardwareAddr{0x02, 0x4d, 0x38, 0, 0, h.Number} }

// ensureSwitch returns the switch process, started if it does not run. The network namespace
// lives exactly as long as this process; hosts that run already are attached to a new one.
func (l *Lab) ensureSwitch(ctx context.Context) (process, error) {
	s := l.loadShared()
	if s.Ready && s.Switch.alive() {
		return s.Switch, nil
	}
	s.Ready = false
	if err := l.removeCgroups(ctx, switchGroup); err != nil { // one whose record was lost or never completed
		return process{}, err
	}
	if _, err := l.makeCgroups(switchGroup); err != nil {
		return process{}, err
	}
	go_, goW, err := os.Pipe()
	if err != nil {
		return process{}, err
	}
	defer go_.Close()
	defer goW.Close()
	cmd, err := l.startIn(switchGroup, nil, func() (*exec.Cmd, error) {
		return &exec.Cmd{
			Path:        "/proc/self/exe",
			Args:        []string{argvSwitch, l.instance},
			Env:         []string{},
			Dir:         "/",
			ExtraFiles:  []*os.File{go_},
			SysProcAttr: &syscall.SysProcAttr{Setsid: true, Cloneflags: unix.CLONE_NEWNET},
		}, nil
	})
	if err != nil {
		return process{}, fmt.Errorf("cannot start the switch: %w", err)
	}
	go func() { _ = cmd.Wait() }() // reap it should it end before this program
	if s.Switch, err = identify(cmd.Process.Pid); err != nil {
		return process{}, fmt.Errorf("cannot start the switch: %w", err)
	}
	if err := l.saveShared(s); err != nil {
		return process{}, err
	}
	if _, err := goW.Write([]byte("go")); err != nil { // recorded: now it may live on
		return process{}, fmt.Errorf("cannot start the switch: %w", err)
	}
	handle, err := handleAt(s.Switch)
	if err != nil {
		return process{}, err
	}
	defer handle.Close()
	if err := handle.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridge}}); err != nil {
		return process{}, fmt.Errorf("cannot create the switch's bridge: %w", err)
	}
	if err := setUp(handle, bridge); err != nil {
		return process{}, err
	}
	if err := l.applyCuts(ctx, s); err != nil {
		return process{}, err
	}
	names, err := l.hostNames()
	if err != nil {
		return process{}, err
	}
	for _, name := range names {
		if h, err := l.load(name); err == nil && h.up() {
			if err := l.attach(h, s.Switch); err != nil {
				return process{}, err
			}
		}
	}
	s.Ready = true
	return s.Switch, l.saveShared(s)
}

// stopSwitch ends the switch process and with it the bridge.
func (l *Lab) stopSwitch(ctx context.Context) {
	if s := l.loadShared(); s.Switch.alive() {
		_ = unix.Kill(s.Switch.PID, unix.SIGKILL)
		_ = s.Switch.wait(ctx)
	}
}

// attach connects a running host to the switch: eth0 with its address, and lo.
func (l *Lab) attach(h *host, sw process) error {
	fail := func(err error) error { return fmt.Errorf("cannot connect %s to the switch: %w", h.Name, err) }
	inHost, err := netns.GetFromPid(h.Init.PID)
	if err != nil {
		return fail(err)
	}
	defer inHost.Close()
	swHandle, err := handleAt(sw)
	if err != nil {
		return fail(err)
	}
	defer swHandle.Close()
	br, err := swHandle.LinkByName(bridge)
	if err != nil {
		return fail(err)
	}
	l.detach(h, sw) // of an earlier life
	err = swHandle.LinkAdd(&netlink.Veth{
		LinkAttrs:        netlink.LinkAttrs{Name: port(h), MasterIndex: br.Attrs().Index},
		PeerName:         "eth0",
		PeerHardwareAddr: mac(h),
		PeerNamespace:    netlink.NsFd(int(inHost)),
	})
	if err != nil {
		return fail(err)
	}
	if err := setUp(swHandle, port(h)); err != nil {
		return fail(err)
	}
	handle, err := netlink.NewHandleAt(inHost)
	if err != nil {
		return fail(err)
	}
	defer handle.Close()
	if err := setUp(handle, "lo"); err != nil {
		return fail(err)
	}
	eth, err := handle.LinkByName("eth0")
	if err != nil {
		return fail(err)
	}
	var addrs []*netlink.Addr
	if h.IPv6 != OnlyIPv6 {
		addrs = append(addrs, &netlink.Addr{IPNet: &net.IPNet{IP: l.addr4(h).AsSlice(), Mask: net.CIDRMask(l.subnet().Bits(), 32)}})
	}
	if h.IPv6 != NoIPv6 { // nobody else has it, so it can be used at once
		addrs = append(addrs, &netlink.Addr{IPNet: &net.IPNet{IP: l.addr6(h).AsSlice(), Mask: net.CIDRMask(prefix6, 128)}, Flags: unix.IFA_F_NODAD})
	}
	for _, addr := range addrs {
		if err := handle.AddrAdd(eth, addr); err != nil {
			return fail(err)
		}
	}
	if err := handle.LinkSetUp(eth); err != nil {
		return fail(err)
	}
	if h.DefaultRoute {
		for _, addr := range addrs {
			zero := make(net.IP, len(addr.IP))
			route := &netlink.Route{LinkIndex: eth.Attrs().Index, Scope: netlink.SCOPE_LINK,
				Dst: &net.IPNet{IP: zero, Mask: net.CIDRMask(0, 8*len(zero))}}
			if err := handle.RouteAdd(route); err != nil {
				return fail(err)
			}
		}
	}
	return nil
}

// detach pulls a host's cable, if it is in.
func (l *Lab) detach(h *host, sw process) {
	if !sw.alive() {
		return
	}
	handle, err := handleAt(sw)
	if err != nil {
		return
	}
	defer handle.Close()
	if link, err := handle.LinkByName(port(h)); err == nil {
		_ = handle.LinkDel(link)
	}
}

func handleAt(p process) (*netlink.Handle, error) {
	ns, err := netns.GetFromPid(p.PID)
	if err != nil {
		return nil, fmt.Errorf("cannot open the network namespace: %w", err)
	}
	defer ns.Close()
	return netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
}

func setUp(handle *netlink.Handle, name string) error {
	link, err := handle.LinkByName(name)
	if err != nil {
		return fmt.Errorf("cannot find link %s: %w", name, err)
	}
	if err := handle.LinkSetUp(link); err != nil {
		return fmt.Errorf("cannot set link %s up: %w", name, err)
	}
	return nil
}

// everyone is the second host of a cut from all others.
const everyone = "*"

// Cut drops all traffic between two hosts, or, with b empty, between one and all others. It
// stays in force when hosts are switched off and on.
func (l *Lab) Cut(ctx context.Context, a, b string) error {
	return l.changeCuts(ctx, []string{a, b}, func(cuts [][2]string) [][2]string {
		if b == "" {
			b = everyone
		}
		if a > b && b != everyone {
			a, b = b, a
		}
		for _, c := range cuts {
			if c == [2]string{a, b} {
				return cuts
			}
		}
		return append(cuts, [2]string{a, b})
	})
}

// Heal undoes cuts: all of them without names, those of one host, or the one between two.
func (l *Lab) Heal(ctx context.Context, names ...string) error {
	if len(names) > 2 {
		return errors.New("cannot heal: name no host, one or two")
	}
	return l.changeCuts(ctx, names, func(cuts [][2]string) [][2]string {
		var keep [][2]string
		for _, c := range cuts {
			healed := true
			for _, n := range names {
				healed = healed && (c[0] == n || c[1] == n)
			}
			if !healed {
				keep = append(keep, c)
			}
		}
		return keep
	})
}

func (l *Lab) changeCuts(ctx context.Context, names []string, change func([][2]string) [][2]string) error {
	return l.locked(ctx, func() error {
		for i, n := range names {
			if n == "" {
				continue
			}
			if _, err := l.load(n); err != nil {
				return err
			}
			if i > 0 && names[0] == n {
				return fmt.Errorf("cannot cut %s from itself", n)
			}
		}
		s := l.loadShared()
		s.Cuts = change(s.Cuts)
		if err := l.applyCuts(ctx, s); err != nil {
			return err
		}
		if _, err := os.Stat(l.dir()); err != nil {
			return nil // no lab, nothing to heal
		}
		return l.saveShared(s)
	})
}

// forgetCuts drops the cuts of a host that goes away.
func (l *Lab) forgetCuts(name string) error {
	s := l.loadShared()
	var keep [][2]string
	for _, c := range s.Cuts {
		if c[0] != name && c[1] != name {
			keep = append(keep, c)
		}
	}
	if len(keep) == len(s.Cuts) {
		return nil
	}
	s.Cuts = keep
	return l.saveShared(s) // its rules match nobody now
}

// ruleset drops frames between ports of the switch, so broadcasts (ARP) are cut as well. Ports are
// named after the number of their host and keep the name when it is switched off and on.
func (l *Lab) ruleset(cuts [][2]string) string {
	var b strings.Builder
	b.WriteString("table bridge microk8s_lab\ndelete table bridge microk8s_lab\n")
	if len(cuts) == 0 {
		return b.String()
	}
	b.WriteString("table bridge microk8s_lab {\n chain forward {\n  type filter hook forward priority 0\n")
	for _, c := range cuts {
		one, err := l.load(c[0])
		if err != nil {
			continue
		}
		if c[1] == everyone {
			fmt.Fprintf(&b, "  iifname %s drop\n  oifname %s drop\n", port(one), port(one))
			continue
		}
		two, err := l.load(c[1])
		if err != nil {
			continue
		}
		fmt.Fprintf(&b, "  iifname %s oifname %s drop\n  iifname %s oifname %s drop\n", port(one), port(two), port(two), port(one))
	}
	b.WriteString(" }\n}\n")
	return b.String()
}

// applyCuts makes the switch drop exactly what s says. A switch that does not run gets its
// rules when it starts.
func (l *Lab) applyCuts(ctx context.Context, s shared) error {
	if !s.Switch.alive() {
		return nil
	}
	var out bytes.Buffer
	var cmd *exec.Cmd
	err := onThread(func() error {
		if err := enter(s.Switch, "net"); err != nil {
			return err
		}
		cmd = exec.CommandContext(ctx, "nft", "-f", "-")
		cmd.Stdin = strings.NewReader(l.ruleset(s.Cuts))
		cmd.Stdout, cmd.Stderr = &out, &out
		return cmd.Start()
	})
	if err == nil {
		err = cmd.Wait()
	}
	switch {
	case err == nil:
		return nil
	case len(s.Cuts) == 0:
		return nil // a machine without nftables can do everything but cut
	case errors.Is(err, exec.ErrNotFound):
		return errors.New("cannot cut hosts off: nft is missing; install the package nftables")
	}
	return fmt.Errorf("cannot cut hosts off: nft: %w: %s", err, strings.TrimSpace(out.String()))
}
