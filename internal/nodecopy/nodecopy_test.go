package nodecopy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/kube"
	"microk8s/internal/kube/kubetest"
	"microk8s/internal/pki"
	"microk8s/internal/pki/pkitest"
	"microk8s/internal/snapenv"
)

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(what)
		}
	}
}

// machine is one of two that run as node w1; the API server is that of the tests.
type machine struct {
	k    *Controller
	here netip.Addr
}

func start(t *testing.T, api *kubetest.Server, here, boot string, running map[string]bool, now func() time.Time) machine {
	t.Helper()
	env := snapenv.Under(t.TempDir())
	m := machine{here: netip.MustParseAddr(here)}
	m.k = &Controller{
		Env: env, Node: "w1", Log: slog.New(slog.DiscardHandler), Core: api.Core, Now: now,
		At:        func(netip.Addr) (*kube.Core, error) { return api.Core() },
		Boot:      func() string { return boot },
		Addresses: func() ([]net.IP, error) { return []net.IP{m.here.AsSlice()}, nil },
		Prove: func(_ context.Context, host netip.Addr, port int, name string) (netip.Addr, bool) {
			return m.here, name == "w1" && port == kubeletPort && running[host.String()]
		},
	}
	return m
}

func (m machine) run(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := m.k.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
}

// reported is what the kubelet of a machine writes.
func reported(api *kubetest.Server, address, boot string) {
	api.Edit("v1/nodes/w1", func(o map[string]any) {
		o["status"] = map[string]any{"addresses": []any{map[string]any{"type": "InternalIP", "address": address}}, "nodeInfo": map[string]any{"bootID": boot}}
	})
}

func inNode(t *testing.T, api *kubetest.Server, now time.Time) string {
	t.Helper()
	s, ok := Of(kubetest.As[corev1.Node](api, "v1/nodes/w1"), now)
	if !ok {
		return ""
	}
	return s.What("w1")
}

// TestTwoMachines: the kubelets of a machine and of its copy write one Node in turn; both say so, and the cluster too.
func TestTwoMachines(t *testing.T) {
	api := kubetest.New(t)
	api.Set(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "w1"}})
	running := map[string]bool{"10.0.0.5": true, "10.0.0.6": true}
	first, second := start(t, api, "10.0.0.5", "boot-1", running, time.Now), start(t, api, "10.0.0.6", "boot-2", running, time.Now)
	reported(api, "10.0.0.5", "boot-1")
	first.run(t)
	second.run(t)
	const want = "2 machines run as node w1, at 10.0.0.5 and 10.0.0.6"
	says := func(m machine) func() bool {
		return func() bool {
			s, ok := Here(m.k.Env, time.Now())
			return ok && strings.HasPrefix(s.What("w1"), want)
		}
	}
	eventually(t, "the copy says nothing", says(second))
	reported(api, "10.0.0.6", "boot-2")
	eventually(t, "the machine says nothing", says(first))
	eventually(t, "the cluster says nothing", func() bool { return strings.HasPrefix(inNode(t, api, time.Now()), want) })
	if got := inNode(t, api, time.Now().Add(fresh)); got != "" {
		t.Errorf("after a while without a sign of it: %s", got)
	}
}

// TestOneMachine: what looks like a copy and is none.
func TestOneMachine(t *testing.T) {
	for _, tc := range []struct {
		what, address, boot string
		answers             bool // somebody proves there that it is the node
	}{
		{"its own report", "10.0.0.5", "boot-1", true},
		{"a report from before a reboot", "10.0.0.5", "boot-0", true},
		{"before a reboot that changed the address", "10.0.0.9", "boot-0", false},
		{"an address that leads back here", "192.0.2.1", "boot-1", true},
		{"a kubelet without a boot", "10.0.0.9", "", true},
	} {
		t.Run(tc.what, func(t *testing.T) {
			api := kubetest.New(t)
			api.Set(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "w1"}})
			reported(api, tc.address, tc.boot)
			m := start(t, api, "10.0.0.5", "boot-1", map[string]bool{tc.address: tc.answers}, time.Now)
			m.k.complete()
			m.k.see(t.Context(), kubetest.As[corev1.Node](api, "v1/nodes/w1"))
			if s, ok := Here(m.k.Env, time.Now()); ok || inNode(t, api, time.Now()) != "" {
				t.Errorf("found %v", s)
			}
		})
	}
}

// TestMemberElsewhere: the copy of a control-plane node has no API server of its own; it tells the one of the machine
// that it is a copy of.
func TestMemberElsewhere(t *testing.T) {
	api := kubetest.New(t)
	api.Set(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "w1"}})
	m := start(t, api, "10.0.0.6", "boot-2", map[string]bool{"10.0.0.5": true}, time.Now)
	m.k.Core = func() (*kube.Core, error) { return nil, fmt.Errorf("nobody listens") }
	for path, text := range map[string]string{
		filepath.Join(m.k.Env.BackendLive(), "info.yaml"): "Address: 10.0.0.5:19001\nID: 7\nRole: 0\n",
		m.k.Env.Lock(snapenv.LockHA):                      "",
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m.run(t)
	eventually(t, "the cluster says nothing", func() bool {
		return strings.HasPrefix(inNode(t, api, time.Now()), "2 machines run as node w1, at 10.0.0.5 and 10.0.0.6")
	})
}

// TestClear: the annotation goes when the copy is gone.
func TestClear(t *testing.T) {
	api := kubetest.New(t)
	old := `{"machines":["10.0.0.5","10.0.0.6"],"seen":"2026-11-01T00:00:00Z"}`
	api.Set(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "w1", Annotations: map[string]string{Annotation: old}}})
	reported(api, "10.0.0.5", "boot-1")
	start(t, api, "10.0.0.5", "boot-1", nil, time.Now).run(t)
	eventually(t, "the annotation stays", func() bool {
		_, there := kubetest.As[corev1.Node](api, "v1/nodes/w1").Annotations[Annotation]
		return !there
	})
}

// TestStrange: nodes write what they like into their own annotations.
func TestStrange(t *testing.T) {
	now := time.Date(2026, 11, 29, 0, 0, 0, 0, time.UTC)
	for _, text := range []string{"", "{", `{"machines":["10.0.0.5"],"seen":"2026-11-29T00:00:00Z"}`, `{"machines":["\u001b[2J","x"],"seen":"2026-11-29T00:00:00Z"}`,
		`{"machines":["10.0.0.5","10.0.0.6"],"seen":"2030-01-01T00:00:00Z"}`,
		`{"machines":["::1","::2","::3","::4","::5","::6","::7","::8","::9"],"seen":"2026-11-29T00:00:00Z"}`} {
		if s, ok := Of(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{Annotation: text}}}, now); ok {
			t.Errorf("%s: %v", text, s)
		}
	}
}

// TestProve: who answers must have the node's certificate, of the cluster's CA.
func TestProve(t *testing.T) {
	issue := func(authority string, names ...string) (roots *x509.CertPool, serving tls.Certificate) {
		maker := pkitest.Maker(nil)
		key, err := maker.Key(2048)
		if err != nil {
			t.Fatal(err)
		}
		ca, err := maker.Issue(pki.Request{Subject: pkix.Name{CommonName: authority}, Days: 10, CA: true}, key.Public(), nil, key)
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := x509.ParseCertificate(ca)
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := maker.Issue(pki.Request{Subject: pkix.Name{CommonName: "system:node:" + names[0]}, Days: 10, DNSNames: names, ServerAuth: true}, key.Public(), parsed, key)
		if err != nil {
			t.Fatal(err)
		}
		roots = x509.NewCertPool()
		roots.AddCert(parsed)
		return roots, tls.Certificate{Certificate: [][]byte{leaf}, PrivateKey: key}
	}
	roots, serving := issue("ca", "w1")
	others, _ := issue("another CA", "w1")
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{serving}, MinVersion: tls.VersionTLS12})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = conn.(*tls.Conn).HandshakeContext(t.Context())
			conn.Close()
		}
	})
	defer wg.Wait()
	defer l.Close()
	at := netip.MustParseAddrPort(l.Addr().String())
	for _, tc := range []struct {
		what, name string
		roots      *x509.CertPool
		want       bool
	}{{"the node", "w1", roots, true}, {"another node", "w2", roots, false}, {"a node of another cluster", "w1", others, false}} {
		local, ok := prove(t.Context(), at.Addr(), int(at.Port()), tc.name, tc.roots)
		if ok != tc.want || ok && local != at.Addr() {
			t.Errorf("%s: %v, %v", tc.what, ok, local)
		}
	}
}
