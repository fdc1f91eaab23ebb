package netcheck

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// attempts is how many datagrams may be lost before the way counts as closed.
	attempts = 3
	// answerWait is how long an answer may take.
	answerWait = 700 * time.Millisecond
	// ipHeaders is what IP and UDP add to a datagram: 20 bytes of IPv4, or 40 of IPv6, and 8.
	ipHeaders = 40 + 8
	// atOnce is how many nodes are asked side by side.
	atOnce = 16
)

// smaller are the sizes of packets that are tried when those of the pods' MTU do not get through.
var smaller = []int{1400, 1350, 1300, 1230, 1000, 576}

// Unreachable is the code of a node that does not answer at all: it is down, as far as anybody can see.
const Unreachable = "unreachable"

// Problem is something that does not get through, with what to do about it.
type Problem struct {
	// Code is for programs: tunnel, one-way, mtu, duplicate, unreachable, port-there, port-here, no-answer.
	Code string `json:"code"`
	Node string `json:"node"` // the other node
	What string `json:"what"`
	Do   string `json:"do"`
}

// Result is what was found about the ways between this node and another.
type Result struct {
	Node      string        `json:"node"`
	Address   string        `json:"address"`
	Tunnel    bool          `json:"tunnel"` // datagrams of pods' size go there and come back
	RoundTrip time.Duration `json:"roundTripNanoseconds,omitempty"`
	Problems  []Problem     `json:"problems"`
}

// Check asks the other nodes.
type Check struct {
	Self  Node
	Peers []Node
	MTU   int // of pods, in bytes
	// Ports has the nodes' TCP ports tried in both directions as well.
	Ports bool
	// Skip are ports that are not tried, because this cluster uses others or none.
	Skip []int
	// Heard returns when a node was last heard by this node's responder; nil where that is not known.
	Heard func(Node) time.Time
}

// Run asks all nodes side by side and returns a result for each, in the order of Peers. It takes some
// seconds at most for each sixteen nodes; an error is one of this host.
func (c *Check) Run(ctx context.Context) ([]Result, error) {
	if c.Self.Tunnel.IsValid() {
		probe, err := net.ListenUDP("udp", &net.UDPAddr{IP: c.Self.Tunnel.AsSlice()})
		if err != nil {
			return nil, fmt.Errorf("this node's end of the tunnel (%s) is not there: %w", c.Self.Tunnel, err)
		}
		probe.Close()
	}
	results := make([]Result, len(c.Peers))
	var wg sync.WaitGroup
	slots := make(chan struct{}, atOnce)
	for i, p := range c.Peers {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			results[i] = c.ask(ctx, p)
		})
	}
	wg.Wait()
	for i, p := range c.Peers {
		results[i].Problems = append(results[i].Problems, c.duplicates(p)...)
		if results[i].Problems == nil {
			results[i].Problems = []Problem{}
		}
	}
	return results, ctx.Err()
}

// duplicates finds nodes with the same end of the tunnel: packets for both go to one.
func (c *Check) duplicates(p Node) (out []Problem) {
	for _, other := range append([]Node{c.Self}, c.Peers...) {
		if other.Name == p.Name {
			continue
		}
		what := ""
		switch {
		case p.MAC != "" && strings.EqualFold(p.MAC, other.MAC):
			what = "the hardware address " + p.MAC + " of its tunnel"
		case p.Address == other.Address:
			what = "the address " + p.Address.String()
		default:
			continue
		}
		out = append(out, Problem{"duplicate", p.Name, fmt.Sprintf("node %s has %s, which is that of node %s, too", p.Name, what, other.Name),
			"one of them is probably a copy of the other's disk: microk8s leave on the copy, then join it again"})
	}
	return out
}

// answer is what came back for a question.
type answer struct {
	ok      bool
	refused bool // the other node is there, and nothing answers on the port
	open    portSet
	after   time.Duration
}

func (c *Check) ask(ctx context.Context, p Node) Result {
	r := Result{Node: p.Name, Address: p.Address.String()}
	add := func(code, do, what string, args ...any) {
		r.Problems = append(r.Problems, Problem{code, p.Name, fmt.Sprintf(what, args...), do})
	}
	there, back := needs(c.Self, p), needs(p, c.Self)
	for i, port := range ports {
		if slices.Contains(c.Skip, port) {
			there, back = there&^(1<<i), back&^(1<<i)
		}
	}
	var here portSet
	if c.Ports {
		here = tryPorts(ctx, nil, p.Address, there)
	}
	tunnelled := c.Self.Tunnel.IsValid() && p.Tunnel.IsValid()
	var small answer
	if tunnelled {
		small = c.exchange(ctx, p, headerSize, 0)
		r.RoundTrip = small.after
	}
	switch {
	case !tunnelled:
	case small.refused:
		add("no-answer", "refresh it to the same version as this node", "node %s does not answer the check; it runs an earlier version", p.Name)
	case !small.ok:
		heard := c.Heard != nil && time.Since(c.Heard(p)) < 3*time.Minute
		switch {
		case here == 0 && !alive(ctx, p.Address):
			add(Unreachable, "start it, or see that the network between the nodes works", "node %s does not answer at %s at all", p.Name, p.Address)
		case heard:
			add("one-way", openTunnel(c.Self.Address, p.Address), "pod traffic from node %s arrives here, but none gets from here to %s: UDP port 4789 is closed on the way from %s to %s",
				p.Name, p.Name, c.Self.Address, p.Address)
		default:
			add("tunnel", openTunnel(c.Self.Address, p.Address), "pod traffic between this node and %s does not get through: UDP port 4789 is closed between %s and %s", p.Name, c.Self.Address, p.Address)
		}
	default:
		ipHeader := ipHeaders
		if p.Tunnel.Is4() {
			ipHeader -= 20
		}
		if large := c.exchange(ctx, p, c.MTU-ipHeader, 0); large.ok {
			r.Tunnel = true
		} else {
			fits := 0
			for _, size := range smaller {
				if size < c.MTU && c.exchange(ctx, p, size-ipHeader, 0).ok {
					fits = size
					break
				}
			}
			do := "set the same MTU on the interfaces of all nodes and of what is between them"
			if fits > 0 {
				do += fmt.Sprintf(", or put --mtu=%d into args/pod-network on each node and run: microk8s stop; microk8s start", fits)
			}
			add("mtu", do, "packets of pods (%d bytes) to node %s get lost, while smaller ones get through (%d bytes do): the MTU is smaller on the way", c.MTU, p.Name, cmp.Or(fits, headerSize+ipHeader))
		}
	}
	if !c.Ports || slices.ContainsFunc(r.Problems, func(p Problem) bool { return p.Code == Unreachable }) {
		return r
	}
	for i, port := range ports {
		if there.has(i) && !here.has(i) {
			add("port-there", openPort(port, c.Self.Address, p.Name), "TCP port %d of node %s (%s) is not reached from here", port, p.Name, p.Address)
		}
	}
	if small.ok {
		dialled := c.exchange(ctx, p, headerSize, back)
		for i, port := range ports {
			if dialled.ok && back.has(i) && !dialled.open.has(i) {
				add("port-here", openPort(port, p.Address, "this node"), "TCP port %d of this node (%s) is not reached from node %s", port, c.Self.Address, p.Name)
			}
		}
	}
	return r
}

// alive reports whether a host answers at all, be it that nothing listens: then it is the tunnel that is closed, and not the host
// that is down.
func alive(ctx context.Context, host netip.Addr) bool {
	ctx, cancel := context.WithTimeout(ctx, dialWait)
	defer cancel()
	answers := make(chan bool, len(ports))
	for _, port := range ports {
		go func() {
			conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", netip.AddrPortFrom(host, uint16(port)).String())
			if err == nil {
				conn.Close()
			}
			answers <- err == nil || errors.Is(err, syscall.ECONNREFUSED)
		}()
	}
	for range ports {
		if <-answers {
			return true
		}
	}
	return false
}

// openTunnel is what opens the tunnel on both nodes, for the firewalls that people have.
func openTunnel(self, other netip.Addr) string {
	return fmt.Sprintf("on each of the two, and on what is between them: ufw allow proto udp from %s to any port 4789 (there: from %s); or firewall-cmd --permanent --add-port=4789/udp && firewall-cmd --reload; or nft insert rule inet filter input udp dport 4789 accept",
		other, self)
}

func openPort(port int, from netip.Addr, where string) string {
	return fmt.Sprintf("on %s: ufw allow proto tcp from %s to any port %d; or firewall-cmd --permanent --add-port=%d/tcp && firewall-cmd --reload; or nft insert rule inet filter input tcp dport %d accept",
		where, from, port, port, port)
}

// exchange sends a question of a size to a node, some times, until an answer comes.
func (c *Check) exchange(ctx context.Context, p Node, size int, dial portSet) answer {
	dialer := net.Dialer{LocalAddr: &net.UDPAddr{IP: c.Self.Tunnel.AsSlice()}, Control: dontFragment}
	conn, err := dialer.DialContext(ctx, "udp", netip.AddrPortFrom(p.Tunnel, Port).String())
	if err != nil {
		return answer{}
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	wait := answerWait
	if dial != 0 {
		wait += dialWait
	}
	buf := make([]byte, maxSize+1)
	for range attempts {
		m := message{kind: ping, asked: dial, nonce: rand.Uint64(), size: size}
		began := time.Now()
		if _, err := conn.Write(m.marshal()); err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
			return answer{} // longer than this host's own MTU
		}
		_ = conn.SetReadDeadline(began.Add(wait))
		for {
			n, err := conn.Read(buf)
			if errors.Is(err, syscall.ECONNREFUSED) {
				return answer{refused: true}
			}
			if err != nil {
				break // the next attempt
			}
			if got, err := unmarshal(buf[:n]); err == nil && got.kind == pong && got.nonce == m.nonce && n == max(size, headerSize) {
				return answer{ok: true, open: got.open, after: time.Since(began)}
			}
		}
		if ctx.Err() != nil {
			return answer{}
		}
	}
	return answer{}
}

// dontFragment has the kernel send datagrams whole, whatever it knows about the way.
func dontFragment(network, _ string, c syscall.RawConn) error {
	var err error
	if cause := c.Control(func(fd uintptr) {
		if strings.HasSuffix(network, "6") {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE)
			return
		}
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
	}); cause != nil {
		return cause
	}
	return err
}
