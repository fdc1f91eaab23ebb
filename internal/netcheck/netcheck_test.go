package netcheck

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/snapenv"
)

func TestMessages(t *testing.T) {
	for _, m := range []message{{kind: ping, nonce: 7, size: headerSize}, {kind: pong, asked: 0b1111, open: 0b0101, nonce: 1<<63 + 1, size: 1422}} {
		if got, err := unmarshal(m.marshal()); err != nil || got != m {
			t.Errorf("%+v became %+v, %v", m, got, err)
		}
	}
	good := message{kind: ping, size: headerSize}.marshal()
	for name, change := range map[string]func([]byte) []byte{
		"short":                  func(b []byte) []byte { return b[:headerSize-1] },
		"another version":        func(b []byte) []byte { b[7]++; return b },
		"another kind":           func(b []byte) []byte { b[8] = 3; return b },
		"a port that is none":    func(b []byte) []byte { b[9] = 1 << 4; return b },
		"open that is not asked": func(b []byte) []byte { b[10] = 1; return b },
		"too long":               func(b []byte) []byte { return append(b, make([]byte, maxSize)...) },
	} {
		if _, err := unmarshal(change(append([]byte(nil), good...))); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzUnmarshal(f *testing.F) {
	f.Add(message{kind: ping, asked: 3, size: 64}.marshal())
	f.Fuzz(func(t *testing.T, data []byte) {
		if m, err := unmarshal(data); err == nil && len(m.marshal()) != len(data) {
			t.Errorf("the answer to %d bytes has %d", len(data), len(m.marshal()))
		}
	})
}

// TestResponder has a responder on the loopback: who is no node gets no answer, and a node not more than its share.
func TestResponder(t *testing.T) {
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	dials := make(chan string, 100)
	asker := Node{Name: "n2", Address: netip.MustParseAddr("192.0.2.2"), Tunnel: netip.MustParseAddr("127.0.0.2")}
	r := &Responder{
		Node: func(a netip.Addr) (Node, bool) { return asker, a == asker.Tunnel },
		Dial: func(_ context.Context, _, address string) (net.Conn, error) {
			dials <- address
			if strings.HasSuffix(address, ":10250") {
				here, _ := net.Pipe()
				return here, nil
			}
			return nil, errors.New("closed")
		},
	}
	ended := make(chan error)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { ended <- r.Serve(ctx, conn) }()
	ask := func(from string, m message) (answer message, ok bool) {
		t.Helper()
		c, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.ParseIP(from)}, conn.LocalAddr().(*net.UDPAddr))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write(m.marshal()); err != nil {
			t.Fatal(err)
		}
		c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		buf := make([]byte, maxSize)
		n, err := c.Read(buf)
		if err != nil {
			return answer, false
		}
		answer, err = unmarshal(buf[:n])
		return answer, err == nil
	}
	if _, ok := ask("127.0.0.3", message{kind: ping, size: 100}); ok {
		t.Error("a stranger got an answer")
	}
	if _, ok := ask("127.0.0.2", message{kind: pong, size: 100}); ok {
		t.Error("an answer got an answer: two nodes would never stop")
	}
	if a, ok := ask("127.0.0.2", message{kind: ping, nonce: 9, size: 1000}); !ok || a.size != 1000 || a.nonce != 9 || a.kind != pong {
		t.Errorf("answer %+v, %v", a, ok)
	}
	if r.Heard(asker).IsZero() {
		t.Error("the question was not noted")
	}
	for range 2 { // the second within moments: nothing is dialled
		if a, ok := ask("127.0.0.2", message{kind: ping, asked: 0b1111, size: 100}); !ok || a.open != 0b0001 {
			t.Errorf("answer %+v, %v, want only 10250 open", a, ok)
		}
	}
	if len(dials) != len(ports) {
		t.Errorf("%d dials, want one for each port", len(dials))
	}
	for range len(ports) {
		if to := <-dials; !strings.HasPrefix(to, "192.0.2.2:") {
			t.Errorf("dialled %s, which is not the asking node's address", to)
		}
	}
	answered := 0
	for range 4 * perPeer {
		c, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.ParseIP("127.0.0.2")}, conn.LocalAddr().(*net.UDPAddr))
		if err != nil {
			t.Fatal(err)
		}
		c.Write(message{kind: ping, size: 100}.marshal())
		c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		if _, err := c.Read(make([]byte, 200)); err == nil {
			answered++
		}
		c.Close()
	}
	if answered == 4*perPeer {
		t.Error("a node may ask without limit")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("ended with %v", err)
	}
}

func TestNeeds(t *testing.T) {
	member, worker := Node{Name: "m", ControlPlane: true}, Node{Name: "w"}
	for _, tc := range []struct {
		from, to Node
		want     portSet
	}{{worker, worker, 0b0011}, {worker, member, 0b0111}, {member, worker, 0b0011}, {member, member, 0b1111}} {
		if got := needs(tc.from, tc.to); got != tc.want {
			t.Errorf("%s of %s: %04b, want %04b", tc.from.Name, tc.to.Name, got, tc.want)
		}
	}
}

func TestDuplicates(t *testing.T) {
	node := func(name, address, mac string) Node {
		return Node{Name: name, Address: netip.MustParseAddr(address), MAC: mac}
	}
	c := Check{Self: node("n1", "192.0.2.1", "02:00:00:00:00:01"), Peers: []Node{node("n2", "192.0.2.2", "02:00:00:00:00:0a"), node("n3", "192.0.2.3", "02:00:00:00:00:0A")}}
	for i, want := range []string{"n3", "n2"} {
		got := c.duplicates(c.Peers[i])
		if len(got) != 1 || got[0].Code != "duplicate" || !strings.Contains(got[0].What, "that of node "+want) {
			t.Errorf("%s: %v", c.Peers[i].Name, got)
		}
	}
}

func TestFromNode(t *testing.T) {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", Labels: map[string]string{labelControlPlane: ""}, Annotations: map[string]string{
		annotationType: "vxlan", annotationData: `{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}`,
	}}}
	n.Spec.PodCIDRs = []string{"fd00::/64", "10.1.7.0/24"}
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: "n1"}, {Type: corev1.NodeInternalIP, Address: "192.0.2.1"}}
	want := Node{"n1", netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("10.1.7.0"), "02:00:00:00:00:01", true}
	if got := FromNode(n); len(got) != 1 || got[0] != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: "2001:db8::1"})
	n.Annotations[annotationData6] = `{"VNI":1,"VtepMAC":"02:00:00:00:00:06"}`
	six := Node{"n1", netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("fd00::"), "02:00:00:00:00:06", true}
	if got := FromNode(n); len(got) != 2 || got[0] != six || got[1] != want {
		t.Errorf("of both families: got %+v, want %+v and %+v", got, six, want)
	}
	n.Annotations[annotationType] = "host-gw"
	if got := FromNode(n); len(got) != 1 || got[0].Tunnel.IsValid() {
		t.Errorf("a node without a tunnel has %v", got)
	}
}

// TestFamilies holds that each family is checked, in the order of this node's ranges, and the ports in the first only.
func TestFamilies(t *testing.T) {
	node := func(name, number string) *corev1.Node {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{annotationType: "vxlan"}}}
		n.Spec.PodCIDRs = []string{"10.1." + number + ".0/24", "fd01:0:0:" + number + "::/64"}
		n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2." + number}, {Type: corev1.NodeInternalIP, Address: "2001:db8::" + number}}
		return n
	}
	checks, err := Families([]*corev1.Node{node("n1", "1"), node("n2", "2")}, "n1", Check{Ports: true, MTU: 1430})
	if err != nil || len(checks) != 2 {
		t.Fatalf("%d checks, %v", len(checks), err)
	}
	for i, want := range []string{"192.0.2.2 10.1.2.0 true", "2001:db8::2 fd01:0:0:2:: false"} {
		c := checks[i]
		if got := fmt.Sprint(c.Peers[0].Address, c.Peers[0].Tunnel, c.Ports); got != want || c.MTU != 1430 || c.Self.Name != "n1" {
			t.Errorf("check %d is of %s, want %s: %+v", i, got, want, c)
		}
	}
	if _, err := Families(nil, "n1", Check{}); err == nil {
		t.Error("a node that is not in the cluster can be checked")
	}
}

func TestRecord(t *testing.T) {
	env, now := snapenv.Under(t.TempDir()), time.Now()
	if r := ReadRecord(env, now); len(r.Results) != 0 {
		t.Errorf("a record out of nothing: %+v", r)
	}
	if err := (Record{Time: now, Results: []Result{{Node: "n2"}}}).Write(env); err != nil {
		t.Fatal(err)
	}
	if r := ReadRecord(env, now); len(r.Results) != 1 {
		t.Errorf("read %+v", r)
	}
	if r := ReadRecord(env, now.Add(time.Hour)); len(r.Results) != 0 {
		t.Error("a record of an hour ago counts")
	}
}
