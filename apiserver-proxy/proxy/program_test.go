package proxy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"microk8s/apiserver-proxy/config"
	"microk8s/internal/snapenv"
)

func TestParse(t *testing.T) {
	env := snapenv.Under("/r")
	f, err := Parse(env, nil, os.Stderr)
	if want := (Flags{config.StaticFile(env), env.Credential("kubelet.config"), 30 * time.Second}); f != want || err != nil {
		t.Errorf("%+v, %v; want %+v", f, err, want)
	}
	f, err = Parse(env, []string{"--traefik-config", "/t", "--kubeconfig=/k", "--refresh-interval", "0"}, os.Stderr)
	if want := (Flags{"/t", "/k", 0}); f != want || err != nil {
		t.Errorf("%+v, %v; want %+v", f, err, want)
	}
	for _, bad := range [][]string{{"x"}, {"--refresh-interval", "-1s"}, {"--refresh-interval", "soon"}, {"--other"}} {
		if _, err := Parse(env, bad, &lockedBuffer{}); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

func TestInterval(t *testing.T) {
	for flag, want := range map[time.Duration]time.Duration{0: 0, time.Second: 15 * time.Second, 15 * time.Second: 15 * time.Second, time.Minute: time.Minute} {
		log := &lockedBuffer{}
		p := &Program{Flags: Flags{Refresh: flag}, Log: slog.New(slog.NewTextHandler(log, nil))}
		if got := p.interval(); got != want || (log.String() != "") != (flag < 15*time.Second) {
			t.Errorf("%s: %s, log %q", flag, got, log)
		}
	}
}

func TestSelf(t *testing.T) {
	for _, tc := range []struct {
		listener, address string
		want              bool
	}{
		{"127.0.0.1:16443", "127.0.0.1:16443", true}, {"127.0.0.1:16443", "localhost:16443", true}, {"127.0.0.1:16443", "127.0.0.1:16444", false},
		{"127.0.0.1:16443", "127.0.0.2:16443", false}, {"127.0.0.1:16443", "10.0.0.1:16443", false}, {"[::1]:16443", "[::1]:16443", true},
		{"[::]:16443", "127.0.0.1:16443", true}, {"[::]:16443", "[::1]:16443", true}, {"0.0.0.0:16443", "127.0.0.9:16443", true},
		{"[::]:16443", "name:16443", false}, {"[::]:16443", "192.0.2.1:16443", false},
	} {
		if got := self(netip.MustParseAddrPort(tc.listener), tc.address); got != tc.want {
			t.Errorf("%s reaches %s: %v", tc.address, tc.listener, got)
		}
	}
}

// node is a worker's files with a running proxy.
type node struct {
	*Program
	t       *testing.T
	log     *lockedBuffer
	updates chan []string
	used    bool // the listener, which a stop closes
	stop    func()
}

func newNode(t *testing.T, refresh time.Duration) *node {
	t.Helper()
	env := snapenv.Under(t.TempDir())
	if err := os.MkdirAll(config.Dir(env), 0o755); err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, log: &lockedBuffer{}, stop: func() {}}
	n.Program = &Program{Env: env, Flags: Flags{config.StaticFile(env), env.Credential("kubelet.config"), refresh}, Times: quick}
	n.write(config.StaticFile(env), "entryPoints: {apiserver: {address: '127.0.0.1:0'}}\nproviders: {file: {filename: "+n.list()+"}}\n")
	t.Cleanup(func() {
		n.stop()
		if t.Failed() {
			t.Logf("the proxy's log:\n%s", n.log)
		}
	})
	return n
}

func (n *node) list() string { return n.Env.Args("traefik/provider.yaml") }

func (n *node) write(path, text string) {
	n.t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) start() {
	n.t.Helper()
	n.Log = slog.New(slog.NewTextHandler(n.log, nil))
	updates := make(chan []string, 1000)
	n.updates = updates
	n.Updated = func(a []string, _ string) { updates <- a }
	if n.Listener == nil || n.used {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			n.t.Fatal(err)
		}
		n.Listener = l
	}
	n.used = true
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	n.stop = func() {
		cancel()
		if err := <-done; err != nil {
			n.t.Errorf("the proxy ended: %v", err)
		}
		n.stop = func() {}
	}
}

// uses waits until these servers are in use.
func (n *node) uses(addresses ...string) {
	n.t.Helper()
	limit := time.After(time.Minute)
	for {
		select {
		case a := <-n.updates:
			if slices.Equal(a, addresses) {
				return
			}
		case <-limit:
			n.t.Fatalf("%q never came in use", addresses)
		}
	}
}

func (n *node) logs(text string) {
	n.t.Helper()
	for limit := time.Now().Add(time.Minute); time.Now().Before(limit); time.Sleep(5 * time.Millisecond) {
		if strings.Contains(n.log.String(), text) {
			return
		}
	}
	n.t.Fatalf("the log never says %q", text)
}

func provider(addresses ...string) string {
	text := "tcp:\n  services:\n    kube-apiserver:\n      loadBalancer:\n        servers:\n"
	for _, a := range addresses {
		text += fmt.Sprintf("        - address: %q\n", a)
	}
	return text
}

// The test network of RFC 5737: nothing answers there.
const a1, a2, a3 = "192.0.2.1:16443", "192.0.2.2:16443", "192.0.2.3:16443"

func TestListByHand(t *testing.T) {
	n := newNode(t, 0)
	n.write(n.list(), provider(a2, "https://192.0.2.1:16443", "x y"))
	n.start()
	n.uses(a1, a2)
	n.logs(`x y`)
	n.logs("Will not auto-refresh list of control plane endpoints")

	n.write(n.list(), provider(a3))
	n.uses(a3)

	// What cannot be used is said, and changes nothing.
	for i, bad := range []string{
		"", "\t", "tcp: {}", provider(), provider("x y"), "tcp:\n  services:\n    other: {}\n", "{{ fail \"template\" }}",
		"tcp:\n  unheard: 1\n", "tcp:\n  services:\n    kube-apiserver:\n      weighted: {}\n", strings.Repeat("#", config.MaxSize+1),
	} {
		before := strings.Count(n.log.String(), "the list of API servers stays as it was")
		n.write(n.list(), bad)
		n.counts("the list of API servers stays as it was", before+1)
		if got := n.balancer.Addresses(); !slices.Equal(got, []string{a3}) {
			t.Errorf("case %d: servers became %q", i, got)
		}
		n.write(n.list(), provider(a3))
		n.uses(a3)
	}
	if err := os.Remove(n.list()); err != nil {
		t.Fatal(err)
	}
	n.logs("no such file")
	if got := n.balancer.Addresses(); !slices.Equal(got, []string{a3}) {
		t.Errorf("without a file: %q", got)
	}
	if err := os.MkdirAll(filepath.Join(config.Dir(n.Env), "other"), 0o755); err != nil {
		t.Fatal(err)
	}
	n.write(n.list(), provider(a1)) // a new file
	n.uses(a1)
	n.write(n.list()+".new", provider(a2)) // and a replaced one
	if err := os.Rename(n.list()+".new", n.list()); err != nil {
		t.Fatal(err)
	}
	n.uses(a2)
}

func (n *node) counts(text string, want int) {
	n.t.Helper()
	for limit := time.Now().Add(time.Minute); time.Now().Before(limit); time.Sleep(5 * time.Millisecond) {
		if strings.Count(n.log.String(), text) >= want {
			return
		}
	}
	n.t.Fatalf("the log does not say %q %d times", text, want)
}

func TestHandWrittenListIsNeverTouched(t *testing.T) {
	c := newCluster(t, 1, quick)
	n := newNode(t, 0)
	text := "# mine\n" + provider(c.servers[0].address)
	n.write(n.list(), text)
	n.Flags.Kubeconfig = c.kubeconfig
	n.start()
	n.uses(c.servers[0].address)
	n.stop()
	if data, err := os.ReadFile(n.list()); string(data) != text || err != nil {
		t.Errorf("%q, %v", data, err)
	}
	if st, err := os.Stat(n.list()); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("%v, %v", st, err)
	}
}

func TestLastGoodListSurvivesRestarts(t *testing.T) {
	n := newNode(t, 0)
	n.write(n.list(), provider(a1, a2))
	n.start()
	n.uses(a1, a2)
	n.stop()
	for _, damage := range []func(){
		func() { n.write(n.list(), "") },
		func() { _ = os.Remove(n.list()) },
	} {
		damage()
		n.start()
		n.uses(a1, a2)
		n.stop()
	}
	if err := os.Remove(config.LastGood(n.list())); err != nil {
		t.Fatal(err)
	}
	n.start()
	n.logs("no API server is known; write the list by hand")
	n.write(n.list(), provider(a3))
	n.uses(a3)
}

func TestListFromTheCluster(t *testing.T) {
	n := newNode(t, 0)
	n.write(n.list(), provider(a1))
	n.start()
	n.uses(a1)
	n.fromCluster([]string{a2, a3})
	if got, err := os.ReadFile(n.list()); err != nil || !strings.Contains(string(got), "- address: "+a2+"\n        - address: "+a3) {
		t.Errorf("%s, %v", got, err)
	}
	if st, err := os.Stat(n.list()); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("%v, %v", st, err)
	}
	own := n.Listener.Addr().String()
	for _, useless := range [][]string{nil, {"x y"}, {own}} {
		n.fromCluster(useless)
		if got := n.balancer.Addresses(); !slices.Equal(got, []string{a2, a3}) {
			t.Errorf("%q: %q", useless, got)
		}
	}
	n.fromCluster([]string{a2, own})
	if got := n.balancer.Addresses(); !slices.Equal(got, []string{a2}) {
		t.Errorf("%q", got)
	}
	// A damaged file is mended by the next list, though that is no other.
	n.write(n.list(), "damaged")
	n.logs("the list of API servers stays as it was")
	n.fromCluster([]string{a2})
	if got, err := os.ReadFile(n.list()); err != nil || !strings.Contains(string(got), a2) {
		t.Errorf("%s, %v", got, err)
	}
}

func TestDamagedStaticFile(t *testing.T) {
	n := newNode(t, 0)
	n.write(config.StaticFile(n.Env), "\t")
	other := config.DefaultProviderFile(n.Env.Data)
	if err := os.MkdirAll(filepath.Dir(other), 0o755); err != nil {
		t.Fatal(err)
	}
	n.write(other, provider(a1))
	n.start()
	n.logs("using the defaults")
	n.uses(a1)
}

func TestPortInUse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	n := newNode(t, 0)
	n.Log = slog.New(slog.DiscardHandler)
	n.write(config.StaticFile(n.Env), fmt.Sprintf("entryPoints: {apiserver: {address: %q}}\n", l.Addr()))
	if err := n.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "another program has the port") {
		t.Errorf("%v", err)
	}
}

// TestWholeProgram: the list comes from the cluster through the proxy itself, while servers die.
func TestWholeProgram(t *testing.T) {
	c := newServers(t, 3)
	var all []string
	for _, s := range c.servers {
		all = append(all, s.address)
	}
	n := newNode(t, time.Minute)
	n.Flags.Kubeconfig, n.Listener = c.kubeconfig, c.listener
	c.log = n.log
	c.publish(all)
	n.write(n.list(), provider(all[0]))
	n.start()
	n.uses(all[0])
	n.uses(all...)
	c.names(c.servers...)
	st := c.stream(c.servers[1])
	c.servers[0].kill()
	c.publish(all[1:]) // as the cluster's own lease of a dead server ends
	n.uses(all[1:]...)
	if data, err := os.ReadFile(n.list()); err != nil || strings.Contains(string(data), all[0]) || !strings.Contains(string(data), all[2]) {
		t.Errorf("%s, %v", data, err)
	}
	c.servers[0].start()
	c.publish(all)
	n.uses(all...)
	c.names(c.servers...)
	if _, err := st.line(); err != nil {
		t.Errorf("a connection to a server that lived all the time has ended: %v", err)
	}
	n.stop()
	st.ends()
}

// FuzzProvider looks for texts with which the reader of provider.yaml misbehaves.
func FuzzProvider(f *testing.F) {
	f.Add(provider(a1, a2))
	f.Add(provider("https://[::1]:1/"))
	f.Add("tcp:\n  services:\n    kube-apiserver:\n      weighted:\n        services: [{name: a, weight: 3}]\n")
	f.Add("tcp: &a\n  services: *a\n")
	f.Add("http: {routers: {r: {rule: x}}}\ntls: {stores: {default: {}}}\n")
	dir := f.TempDir()
	path := filepath.Join(dir, "provider.yaml")
	f.Fuzz(func(t *testing.T, text string) {
		if strings.Contains(text, "{{") {
			t.Skip("a template, which runs as long as its author wants")
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		good, bad, err := loadProvider(path)
		if err == nil && (len(good) == 0 || !slices.IsSorted(good)) {
			t.Errorf("%q: %q, %v", text, good, bad)
		}
	})
}

func TestProviderMissing(t *testing.T) {
	if _, _, err := loadProvider(filepath.Join(t.TempDir(), "provider.yaml")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
}
