package hostwatch

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	vnetlink "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"microk8s/internal/hostwatch/hosttest"
)

var quietly = slog.New(slog.DiscardHandler)

// start runs a watcher until the test ends.
func start(t *testing.T) *Watcher {
	w := New(quietly)
	ended := make(chan struct{})
	go func() { defer close(ended); w.Run(t.Context()) }()
	t.Cleanup(func() { <-ended })
	return w
}

// await fails the test unless something becomes true.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not seen: %s", what)
		}
	}
}

// tableOwner keeps an nftables table, the smallest owner there is.
func tableOwner(name string) Owner {
	return Owner{
		Name:     name,
		Concerns: func(c Change) bool { return c.Table == name && c.Deleted },
		Sync: func(context.Context) ([]string, error) {
			if hasTable(name) {
				return nil, nil
			}
			c, err := nftables.New()
			if err != nil {
				return nil, err
			}
			c.AddTable(&nftables.Table{Name: name, Family: nftables.TableFamilyIPv4})
			return []string{name}, c.Flush()
		},
	}
}

func hasTable(name string) bool {
	c, err := nftables.New()
	if err != nil {
		return false
	}
	tables, err := c.ListTables()
	if err != nil {
		return false
	}
	for _, t := range tables {
		if t.Name == name {
			return true
		}
	}
	return false
}

// TestTableComesBack flushes the ruleset: each owner gets its table back, and a closed one does not.
func TestTableComesBack(t *testing.T) {
	if !hosttest.Alone(t) {
		return
	}
	w := start(t)
	first, second := w.Register(t.Context(), tableOwner("first")), w.Register(t.Context(), tableOwner("second"))
	defer first.Close()
	both := func() bool { return hasTable("first") && hasTable("second") }
	await(t, "both tables", both)
	for range 3 {
		c, err := nftables.New()
		if err != nil {
			t.Fatal(err)
		}
		c.FlushRuleset()
		if err := c.Flush(); err != nil {
			t.Fatal(err)
		}
		await(t, "both tables again", both)
	}
	second.Close()
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	c.FlushRuleset()
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	await(t, "the first table again", func() bool { return hasTable("first") })
	if hasTable("second") {
		t.Error("a closed registration was called")
	}
}

// TestLinksAndRoutes wants an event of each kind that rtnetlink has, by what a person would type.
func TestLinksAndRoutes(t *testing.T) {
	if !hosttest.Alone(t) {
		return
	}
	w := start(t)
	seen := make(chan Change, 10000)
	r := w.Register(t.Context(), Owner{
		Name:     "all",
		Concerns: func(c Change) bool { seen <- c; return false },
		Sync:     func(context.Context) ([]string, error) { return nil, nil },
	})
	defer r.Close()
	wantEvent := func(what string, match func(Change) bool) {
		t.Helper()
		for {
			select {
			case c := <-seen:
				if match(c) {
					return
				}
			case <-time.After(30 * time.Second):
				t.Fatalf("no event for: %s", what)
			}
		}
	}
	ip := func(args string) { t.Helper(); hosttest.Run(t, "ip", strings.Fields(args)...) }
	await(t, "an event: the subscription stands", func() bool {
		ip("link set lo down")
		ip("link set lo up")
		return len(seen) > 0
	})
	ip("link add d0 type bridge")
	wantEvent("a new link", func(c Change) bool { return c.Kind == Link && !c.Deleted && c.Name == "d0" })
	l, err := vnetlink.LinkByName("d0")
	if err != nil {
		t.Fatal(err)
	}
	index := l.Attrs().Index
	of := func(kind Kind, deleted bool) func(Change) bool {
		return func(c Change) bool { return c.Kind == kind && c.Deleted == deleted && c.Link == index }
	}
	ip("link set d0 up")
	ip("addr add 192.0.2.1/24 dev d0")
	wantEvent("an address", of(Address, false))
	ip("route add 198.51.100.0/24 dev d0")
	wantEvent("a route", of(Route, false))
	ip("neigh add 192.0.2.9 lladdr 02:00:00:00:00:01 dev d0 nud permanent")
	wantEvent("a neighbour", of(Neighbor, false))
	ip("neigh del 192.0.2.9 dev d0")
	wantEvent("a neighbour that went", of(Neighbor, true))
	ip("route del 198.51.100.0/24")
	wantEvent("a route that went", of(Route, true))
	if err := os.WriteFile("/proc/sys/net/ipv4/conf/d0/forwarding", []byte("1"), 0o644); err == nil {
		wantEvent("a sysctl", func(c Change) bool { return c.Kind == Setting })
	}
	ip("addr del 192.0.2.1/24 dev d0")
	wantEvent("an address that went", of(Address, true))
	ip("link del d0")
	wantEvent("a link that went", of(Link, true))
}

// TestFailedSyncIsRepeated wants another call after an error, without any event.
func TestFailedSyncIsRepeated(t *testing.T) {
	calls := make(chan struct{}, 10)
	n := 0
	r := New(quietly).Register(t.Context(), Owner{Name: "x", Sync: func(context.Context) ([]string, error) {
		n++
		calls <- struct{}{}
		if n == 1 {
			return nil, errors.New("not now")
		}
		return nil, nil
	}})
	defer r.Close()
	for range 2 {
		select {
		case <-calls:
		case <-time.After(30 * time.Second):
			t.Fatal("Sync was not called again")
		}
	}
}

// TestTrigger calls an owner that no event concerns.
func TestTrigger(t *testing.T) {
	calls := make(chan struct{}, 10)
	r := New(quietly).Register(t.Context(), Owner{Name: "x", Sync: func(context.Context) ([]string, error) {
		calls <- struct{}{}
		return nil, nil
	}})
	defer r.Close()
	<-calls
	r.Trigger()
	select {
	case <-calls:
	case <-time.After(30 * time.Second):
		t.Fatal("Sync was not called")
	}
}

// FuzzDecode feeds the decoders with what no kernel sends.
func FuzzDecode(f *testing.F) {
	f.Add(uint16(unix.RTM_NEWLINK), make([]byte, 20))
	f.Add(uint16(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_DELTABLE), []byte{2, 0, 0, 0, 8, 0, 1, 0, 'a', 'b', 0, 0})
	f.Fuzz(func(_ *testing.T, kind uint16, data []byte) {
		m := netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(kind)}, Data: data}
		decodeRoute(m)
		decodeRuleset(m)
	})
}
