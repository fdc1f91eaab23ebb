package certs

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"microk8s/internal/nodeconfig"
	"microk8s/internal/pki"
	"microk8s/internal/snapenv"
)

func find(t *testing.T, inv Inventory, name string) []Listed {
	t.Helper()
	var out []Listed
	for _, l := range inv.Items {
		if l.Name == name {
			out = append(out, l)
		}
	}
	if len(out) == 0 {
		t.Fatalf("there is no %s in %+v", name, inv)
	}
	return out
}

func (n *node) list(t *testing.T) Inventory {
	t.Helper()
	inv, err := n.List()
	if err != nil {
		t.Fatal(err)
	}
	return inv
}

// token writes what the header of a pod's token says, for a key with this ID's digest.
func (n *node) token(t *testing.T, pod, header string) {
	t.Helper()
	dir := filepath.Join(n.env.KubeletRoot(), "pods", pod, "volumes/kubernetes.io~projected/kube-api-access")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "token"), base64.RawURLEncoding.EncodeToString([]byte(header))+".e30.c2ln")
}

func TestListHasEverything(t *testing.T) {
	n := newNode(t)
	n.ensure(t)
	n.token(t, "a", `{"kid":"`+base64.RawURLEncoding.EncodeToString(make([]byte, 32))+`"}`)
	n.token(t, "b", `{"kid":"`+base64.RawURLEncoding.EncodeToString(make([]byte, 32))+`"}`)
	n.token(t, "c", `{"kid":"short"}`)
	n.token(t, "d", `nothing`)
	inv := n.list(t)
	var names []string
	for _, l := range inv.Items {
		names = append(names, l.Name)
		if l.ID == "" || l.TrustedBy == "" || l.Problem != "" || (l.Expires == "") != (l.Kind == KindKey) {
			t.Errorf("%+v", l)
		}
	}
	want := []string{"ca", "front-proxy-ca", "server", "front-proxy-client", "apiserver-kubelet-client", "client", "controller", "scheduler", "proxy", "kubelet", "serviceaccount", "cluster"}
	if !slices.Equal(names, want) || inv.Node != "node-a" || inv.Role != "control-plane" {
		t.Errorf("%s %s has %v", inv.Role, inv.Node, names)
	}
	for _, file := range must(filepath.Glob(n.env.CertsDir() + "/*.key")) { // nothing is left out
		if !slices.Contains(names, strings.TrimSuffix(filepath.Base(file), ".key")) {
			t.Errorf("%s is not in the list", file)
		}
	}
	if len(inv.Tokens) != 1 || inv.Tokens[strings.Repeat("00", 8)] != 2 {
		t.Errorf("tokens %v", inv.Tokens)
	}
	if got := find(t, inv, Server)[0].Expires; got != n.now.AddDate(0, 0, 365).Format(time.RFC3339) {
		t.Errorf("the server's certificate ends at %s", got)
	}
	text, err := json.Marshal(inv)
	if err != nil || strings.Contains(string(text), "PRIVATE KEY") {
		t.Errorf("%v %s", err, text)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestListNamesWhatIsWrong(t *testing.T) {
	for what, tc := range map[string]struct {
		name, says string
		do         func(n *node) error
	}{
		"ended":       {FrontProxyClient, "it has ended", func(n *node) error { n.now = n.now.AddDate(0, 0, 366); return nil }},
		"no key":      {"controller", "its key is missing", func(n *node) error { return os.Remove(n.key("controller")) }},
		"another key": {Server, "its key is that of another certificate", func(n *node) error { return os.Rename(n.key("proxy"), n.key(Server)) }},
		"no file":     {"scheduler", "no such file", func(n *node) error { return os.Remove(n.crt("scheduler")) }},
		"another CA":  {Kubelet, "", func(n *node) error { _, err := n.ReplaceCA(t.Context(), ""); return err }},
	} {
		n := newNode(t)
		n.ensure(t)
		if err := tc.do(n); err != nil {
			t.Fatal(err)
		}
		if got := find(t, n.list(t), tc.name)[0].Problem; !strings.Contains(got, tc.says) || (got == "") != (tc.says == "") {
			t.Errorf("%s: %q", what, got)
		}
	}
}

// A worker has two certificates of the cluster's CA, and what its own CA has signed before.
func TestListOfAWorker(t *testing.T) {
	n := newNode(t)
	n.ensure(t)
	data, err := os.ReadFile(n.crt(CA))
	if err != nil {
		t.Fatal(err)
	}
	write(t, n.env.Cert("ca.remote.crt"), string(data))
	if err := nodeconfig.Lock(n.env, snapenv.LockWorker); err != nil {
		t.Fatal(err)
	}
	inv := n.list(t)
	if inv.Role != "worker" || find(t, inv, "ca.remote")[0].TrustedBy != trusted[CA] || find(t, inv, Kubelet)[0].TrustedBy != trusted[Kubelet] {
		t.Errorf("%+v", inv)
	}
	if got := find(t, inv, Server)[0].TrustedBy; got != ofOwnCA {
		t.Errorf("its own server's certificate: %s", got)
	}
}

func TestCompareFindsWhatIsNotShared(t *testing.T) {
	a, b := newNode(t), newNode(t) // with the same keys: pkitest has them in one order
	a.ensure(t)
	b.ensure(t)
	nodes := []Inventory{a.list(t), b.list(t)}
	nodes[0].Node, nodes[1].Node = "n1", "n2"
	for i := range nodes {
		for j := range nodes[i].Items {
			nodes[i].Items[j].ID = nodes[i].Items[j].Name
		}
	}
	Compare(nodes)
	for _, n := range nodes {
		for _, l := range n.Items {
			if l.Problem != "" {
				t.Errorf("equal nodes: %s: %s", l.Name, l.Problem)
			}
		}
	}
	for j := range nodes[1].Items {
		switch l := &nodes[1].Items[j]; l.Name {
		case CA, Datastore, ServiceAccount, Server:
			l.ID = "other"
		}
	}
	Compare(nodes)
	for _, name := range []string{CA, Datastore, ServiceAccount} { // each says it of both
		if find(t, nodes[0], name)[0].Problem == "" || find(t, nodes[1], name)[0].Problem == "" {
			t.Errorf("%s differs, and nothing is said", name)
		}
	}
	if p := find(t, nodes[1], Server)[0].Problem; p != "" {
		t.Errorf("each has a server's certificate of its own: %s", p)
	}
}

func TestTokenKeyIsTheKeys(t *testing.T) {
	key := must(pki.Maker{}.Key(2048))
	id := KeyID(key.Public())
	if raw, err := hex.DecodeString(id); err != nil || len(raw) != 8 {
		t.Errorf("%s", id)
	}
}
