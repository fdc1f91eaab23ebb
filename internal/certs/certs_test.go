package certs

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/clientcmd"

	"microk8s/internal/apiaddress"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/pki"
	"microk8s/internal/pki/pkitest"
	"microk8s/internal/snapenv"
)

// node is a Store in a temporary folder whose clock and addresses a test moves.
type node struct {
	*Store
	env       snapenv.Env
	now       time.Time
	addresses []net.IP
}

func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{env: snapenv.Under(t.TempDir()), now: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), addresses: []net.IP{net.IPv4(10, 9, 8, 7)}}
	for _, dir := range []string{n.env.ArgsDir(), n.env.LocksDir()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	n.Store = New(n.env, Options{
		Maker:     pkitest.Maker(func() time.Time { return n.now }),
		Hostname:  func() (string, error) { return "node-a", nil },
		Addresses: func() ([]net.IP, error) { return n.addresses, nil },
	})
	return n
}

func (n *node) ensure(t *testing.T) Change {
	t.Helper()
	c, err := n.Ensure(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (n *node) cert(t *testing.T, name string) *x509.Certificate {
	t.Helper()
	cert, _, err := readCert(n.crt(name))
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestEveryCertificate(t *testing.T) {
	n := newNode(t)
	n.ensure(t)
	for _, tc := range []struct {
		name, subject, issuer, host, usage string
		days                               int
	}{
		{CA, "CN=10.152.183.1", "CN=10.152.183.1", "", "ca", 3650},
		{FrontProxyCA, "CN=front-proxy-ca", "CN=front-proxy-ca", "", "ca", 3650},
		{Server, "CN=127.0.0.1,OU=Canonical,O=Canonical,L=Canonical,ST=Canonical,C=GB", "CN=10.152.183.1", "10.9.8.7", "both", 365},
		{Server, "CN=127.0.0.1,OU=Canonical,O=Canonical,L=Canonical,ST=Canonical,C=GB", "CN=10.152.183.1", "10.152.183.1", "both", 365},
		{Server, "CN=127.0.0.1,OU=Canonical,O=Canonical,L=Canonical,ST=Canonical,C=GB", "CN=10.152.183.1", "kubernetes.default.svc.cluster.local", "both", 365},
		{FrontProxyClient, "CN=front-proxy-client", "CN=front-proxy-ca", "127.0.0.1", "both", 365},
		{Admin, "CN=admin,O=system:masters", "CN=10.152.183.1", "", "client", 3650},
		{"controller", "CN=system:kube-controller-manager", "CN=10.152.183.1", "", "client", 3650},
		{"scheduler", "CN=system:kube-scheduler", "CN=10.152.183.1", "", "client", 3650},
		{"proxy", "CN=system:kube-proxy", "CN=10.152.183.1", "", "client", 3650},
		{Kubelet, "CN=system:node:node-a,O=system:nodes", "CN=10.152.183.1", "node-a", "both", 3650},
		{Kubelet, "CN=system:node:node-a,O=system:nodes", "CN=10.152.183.1", "10.9.8.7", "both", 3650},
		{"apiserver-kubelet-client", "CN=kube-apiserver-kubelet-client,O=system:masters", "CN=10.152.183.1", "", "client", 3650},
	} {
		cert := n.cert(t, tc.name)
		if cert.Subject.String() != tc.subject || cert.Issuer.String() != tc.issuer || cert.Version != 3 {
			t.Errorf("%s: subject %s, issuer %s, version %d", tc.name, cert.Subject, cert.Issuer, cert.Version)
		}
		if end := n.now.AddDate(0, 0, tc.days); !cert.NotAfter.Equal(end) {
			t.Errorf("%s ends on %v, want %v", tc.name, cert.NotAfter, end)
		}
		roots := x509.NewCertPool()
		roots.AddCert(n.cert(t, CA))
		roots.AddCert(n.cert(t, FrontProxyCA))
		verify := func(usage x509.ExtKeyUsage) error {
			_, err := cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: n.now, DNSName: tc.host, KeyUsages: []x509.ExtKeyUsage{usage}})
			return err
		}
		if tc.usage == "ca" {
			if !cert.IsCA {
				t.Errorf("%s is no CA", tc.name)
			}
			continue
		}
		if err := verify(x509.ExtKeyUsageClientAuth); err != nil {
			t.Errorf("%s as a client: %v", tc.name, err)
		}
		if err := verify(x509.ExtKeyUsageServerAuth); (err == nil) != (tc.usage == "both") {
			t.Errorf("%s as a server: %v", tc.name, err)
		}
	}

	pair, _, err := readCert(filepath.Join(n.env.BackendLive(), "cluster.crt"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(pair)
	if _, err := pair.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: n.now, DNSName: pair.DNSNames[0], KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil || pair.Subject.String() != "CN=k8s" {
		t.Errorf("datastore pair %s: %v", pair.Subject, err)
	}
}

func TestModes(t *testing.T) {
	n := newNode(t)
	n.ensure(t)
	for pattern, want := range map[string]os.FileMode{
		n.env.Cert("*.key"):                         0o600,
		filepath.Join(n.env.BackendLive(), "*.key"): 0o600,
		n.env.Credential("[^c]*.config"):            0o600,
		n.env.Credential("controller.config"):       0o600,
		n.env.AdminKubeconfig():                     0o660,
		n.env.Cert("*.crt"):                         0o660,
		n.env.CertsDir():                            0o770,
		n.env.CredentialsDir():                      0o770,
	} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %v, %v", pattern, files, err)
		}
		for _, f := range files {
			st, err := os.Stat(f)
			if err != nil || st.Mode().Perm() != want {
				t.Errorf("%s: %v, %v; want %v", f, st.Mode(), err, want)
			}
		}
	}
}

func TestKubeconfigs(t *testing.T) {
	n := newNode(t)
	write(t, n.env.Args("kube-apiserver"), "--secure-port=7443\n")
	n.ensure(t)
	for file, user := range map[string]string{
		"client.config": "admin", "controller.config": "system:kube-controller-manager", "scheduler.config": "system:kube-scheduler",
		"proxy.config": "system:kube-proxy", "kubelet.config": "system:node:node-a",
	} {
		cfg, err := clientcmd.BuildConfigFromFlags("", n.env.Credential(file))
		if err != nil {
			t.Fatal(err)
		}
		cert, err := pki.ParseCert(cfg.CertData)
		if err != nil || cert.Subject.CommonName != user || cfg.Host != "https://127.0.0.1:7443" {
			t.Errorf("%s: %v, %v, %s", file, err, cert.Subject, cfg.Host)
		}
		key, err := pki.ParseKey(cfg.KeyData)
		if err != nil || pki.Matches(cert, key.Public()) != nil {
			t.Errorf("%s: the key does not fit: %v", file, err)
		}
	}
}

// TestNodeName holds that kubelet's certificate and kubeconfig have the name under which the
// kubelet registers the node.
func TestNodeName(t *testing.T) {
	n := newNode(t)
	write(t, n.env.Args("kubelet"), "--hostname-override=Blue\n")
	n.ensure(t)
	cert := n.cert(t, Kubelet)
	if cert.Subject.CommonName != "system:node:blue" || cert.VerifyHostname("blue") != nil {
		t.Errorf("the certificate is of %s, for %v", cert.Subject, cert.DNSNames)
	}
	data, err := os.ReadFile(n.env.Credential("kubelet.config"))
	if err != nil || !strings.Contains(string(data), "system:node:blue") {
		t.Errorf("kubeconfig: %v\n%s", err, data)
	}
	write(t, n.env.Args("kubelet"), "--hostname-override=under_score\n")
	if _, err := n.Renew(t.Context()); err == nil || !strings.Contains(err.Error(), "--hostname-override in") {
		t.Errorf("a name that no node can have: %v", err)
	}
}

// TestRenamedHost keeps the kubelet's certificate of a node whose host gets another name while
// it runs: the kubelet still has the old one.
func TestRenamedHost(t *testing.T) {
	n := newNode(t)
	n.ensure(t)
	if err := nodeconfig.KeepName(n.env, "node-a"); err != nil {
		t.Fatal(err)
	}
	n.opts.Hostname = func() (string, error) { return "node-b", nil }
	c, err := n.Renew(t.Context())
	if err != nil || slices.Contains(c.Issued, Kubelet) || n.cert(t, Kubelet).Subject.CommonName != "system:node:node-a" {
		t.Errorf("%v, issued %q for %s", err, c.Issued, n.cert(t, Kubelet).Subject)
	}
	if err := nodeconfig.ForgetName(n.env); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Renew(t.Context()); err != nil || n.cert(t, Kubelet).Subject.CommonName != "system:node:node-b" {
		t.Errorf("as a new node: %v, %s", err, n.cert(t, Kubelet).Subject)
	}
}

func TestNothingToDoTheSecondTime(t *testing.T) {
	n := newNode(t)
	n.ensure(t)
	before, err := os.Stat(n.env.Cert("csr.conf"))
	if err != nil {
		t.Fatal(err)
	}
	if c := n.ensure(t); len(c.Issued) != 0 || len(c.Restart) != 0 {
		t.Errorf("second run: %+v", c)
	}
	after, err := os.Stat(n.env.Cert("csr.conf"))
	if err != nil || !os.SameFile(before, after) {
		t.Errorf("csr.conf was replaced: %v", err)
	}
}

func TestRenewal(t *testing.T) {
	for _, tc := range []struct {
		name    string
		change  func(t *testing.T, n *node)
		issued  []string
		restart []string
	}{
		{"nothing", func(*testing.T, *node) {}, nil, nil},
		{"after two thirds of a year", func(_ *testing.T, n *node) { n.now = n.now.AddDate(0, 0, 244) }, []string{Server, FrontProxyClient}, nil},
		{"a day before that", func(_ *testing.T, n *node) { n.now = n.now.AddDate(0, 0, 242) }, nil, nil},
		{"an address more", func(_ *testing.T, n *node) { n.addresses = append(n.addresses, net.ParseIP("fd00::5")) }, []string{Server, FrontProxyClient, Kubelet}, nil},
		{"an address less", func(_ *testing.T, n *node) { n.addresses = nil }, nil, nil},
		{"an address more in a cluster", func(t *testing.T, n *node) {
			write(t, n.env.Lock(snapenv.LockNoReissue), "")
			n.addresses = append(n.addresses, net.IPv4(10, 9, 8, 8))
		}, nil, nil},
		{"another name of the node", func(t *testing.T, n *node) {
			write(t, n.env.Args("kubelet"), "--hostname-override=Blue\n")
		}, []string{Kubelet}, []string{"kubelite"}},
		{"another name of the node in a cluster", func(t *testing.T, n *node) {
			write(t, n.env.Lock(snapenv.LockNoReissue), "")
			write(t, n.env.Args("kubelet"), "--hostname-override=blue\n")
		}, []string{Kubelet}, []string{"kubelite"}},
		{"another service range", func(t *testing.T, n *node) {
			write(t, n.env.Args("kube-apiserver"), "--service-cluster-ip-range=10.50.0.0/16\n")
		}, []string{Server, FrontProxyClient}, nil},
		{"a name more", func(t *testing.T, n *node) {
			write(t, n.env.Cert("csr.conf.template"), strings.Replace(string(CSRTemplate), "IP.1 =", "DNS.99 = api.example.org\nIP.1 =", 1))
		}, []string{Server, FrontProxyClient}, nil},
		{"a name and an address more in a cluster", func(t *testing.T, n *node) {
			write(t, n.env.Lock(snapenv.LockNoReissue), "")
			n.addresses = append(n.addresses, net.IPv4(10, 9, 8, 8))
			write(t, n.env.Cert("csr.conf.template"), strings.Replace(string(CSRTemplate), "IP.1 =", "DNS.99 = api.example.org\nIP.99 = 192.0.2.7\nIP.1 =", 1))
		}, []string{Server, FrontProxyClient}, nil},
		{"a name less", func(t *testing.T, n *node) {
			write(t, n.env.Cert("csr.conf.template"), strings.Replace(string(CSRTemplate), "DNS.4 = kubernetes.default.svc.cluster\n", "", 1))
		}, []string{Server}, nil},
		{"a lost certificate", func(t *testing.T, n *node) { remove(t, n.crt("scheduler")) }, []string{"scheduler"}, []string{"kubelite"}},
		{"a lost key", func(t *testing.T, n *node) { remove(t, n.key("proxy")) }, []string{"proxy"}, []string{"kubelite"}},
		{"a lost kubeconfig", func(t *testing.T, n *node) { remove(t, n.env.Credential("kubelet.config")) }, nil, nil},
		{"the CA near its end", func(_ *testing.T, n *node) { n.now = n.now.AddDate(0, 0, 3600) }, []string{Server, FrontProxyClient}, nil},
		{"a worker in old age", func(t *testing.T, n *node) {
			write(t, n.env.Lock(snapenv.LockWorker), "")
			remove(t, n.crt(Kubelet))
			n.now = n.now.AddDate(0, 0, 300)
		}, []string{Server, FrontProxyClient}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t)
			n.ensure(t)
			tc.change(t, n)
			got, err := n.Renew(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(got.Issued, tc.issued) || !slices.Equal(got.Restart, tc.restart) {
				t.Errorf("issued %v, restart %v; want %v, %v", got.Issued, got.Restart, tc.issued, tc.restart)
			}
			if again, err := n.Renew(t.Context()); err != nil || len(again.Issued) != 0 && tc.name != "the CA near its end" {
				t.Errorf("the second run issued %v, %v", again.Issued, err)
			}
			if _, err := os.Stat(n.env.Credential("kubelet.config")); err != nil {
				t.Error(err)
			}
		})
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func TestContradictionsAreErrors(t *testing.T) {
	for _, tc := range []struct {
		name  string
		spoil func(t *testing.T, n *node)
		says  string
	}{
		{"a foreign key", func(t *testing.T, n *node) { swap(t, n.key(Server), n.key(Admin)) }, "server.key"},
		{"a foreign CA key", func(t *testing.T, n *node) { swap(t, n.key(CA), n.key(FrontProxyCA)) }, "ca.key"},
		{"a leaf in the place of the CA", func(t *testing.T, n *node) { swap(t, n.crt(CA), n.crt(Server)) }, "not the certificate of a CA"},
		{"text for a certificate", func(t *testing.T, n *node) { write(t, n.crt("proxy"), "hello") }, "proxy.crt"},
		{"an empty key", func(t *testing.T, n *node) { write(t, n.key("proxy"), "") }, "proxy.key"},
		{"a datastore key that is gone", func(t *testing.T, n *node) { remove(t, filepath.Join(n.env.BackendLive(), "cluster.key")) }, "cluster.key"},
		{"a foreign datastore key", func(t *testing.T, n *node) { swap(t, filepath.Join(n.env.BackendLive(), "cluster.key"), n.key(CA)) }, "cluster.key"},
		{"a template with a typo", func(t *testing.T, n *node) {
			write(t, n.env.Cert("csr.conf.template"), "[alt_names]\nDNS.1 = a\nIP.1 = 10.0.0.300\n")
		}, "line 3"},
		{"a service range that is none", func(t *testing.T, n *node) {
			write(t, n.env.Args("kube-apiserver"), "--service-cluster-ip-range=ten\n")
		}, "service-cluster-ip-range"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t)
			n.ensure(t)
			tc.spoil(t, n)
			if _, err := n.Ensure(t.Context()); err == nil || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("got %v, want an error that names %s", err, tc.says)
			}
		})
	}
}

// swap puts a copy of from in the place of to.
func swap(t *testing.T, to, from string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	write(t, to, string(data))
}

func TestReplaceAndUndo(t *testing.T) {
	n := newNode(t)
	n.ensure(t)
	before := snapshot(t, n.env)
	if err := n.Undo(); !errors.Is(err, ErrNoSaved) {
		t.Fatalf("Undo without a backup: %v", err)
	}
	if earlier, err := n.Backup(); err != nil || earlier != "" {
		t.Fatalf("%v, an earlier backup %q", err, earlier)
	}
	change, err := n.ReplaceCA(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if len(change.Issued) != 8 || !slices.Equal(change.Restart, []string{"kubelite", "cluster-agent"}) {
		t.Errorf("%+v", change)
	}
	after := snapshot(t, n.env)
	for _, name := range []string{"certs/ca.key", "certs/ca.crt", "certs/client.key", "certs/server.crt", "credentials/client.config", "credentials/kubelet.config"} {
		if before[name] == after[name] {
			t.Errorf("%s is still the old one", name)
		}
	}
	for _, name := range []string{"certs/serviceaccount.key", "certs/front-proxy-ca.crt", "certs/server.key"} {
		if before[name] != after[name] {
			t.Errorf("%s changed", name)
		}
	}
	if c := n.ensure(t); len(c.Issued) != 0 {
		t.Errorf("certificates of the old CA were left: %v", c.Issued)
	}
	write(t, n.env.Cert("added-since"), "x")
	if err := n.Undo(); err != nil {
		t.Fatal(err)
	}
	got := snapshot(t, n.env)
	for name, text := range before {
		if got[name] != text {
			t.Errorf("after Undo %s differs", name)
		}
	}
	if len(got) != len(before) {
		t.Errorf("after Undo there are %d files, before there were %d", len(got), len(before))
	}
}

// TestBackupsAreKept: a second change does not cost the backup of the first, and their number is bounded.
func TestBackupsAreKept(t *testing.T) {
	n := newNode(t)
	n.ensure(t)
	first, err := os.ReadFile(n.env.Cert("ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	var kept []string
	for i := range KeptBackups + 1 {
		earlier, err := n.Backup()
		if err != nil || (earlier == "") != (i == 0) {
			t.Fatalf("backup %d: %v, the one of before is %q", i, err, earlier)
		}
		if i > 0 {
			kept = append(kept, earlier)
		}
		if i == 0 {
			if _, err := n.ReplaceCA(t.Context(), ""); err != nil {
				t.Fatal(err)
			}
		}
	}
	if text, err := os.ReadFile(filepath.Join(kept[0], "certs", "ca.key")); err != nil || !bytes.Equal(text, first) {
		t.Errorf("the key of the first CA is not in %s: %v", kept[0], err)
	}
	if ca, err := n.BackedUp("ca.crt"); err != nil || len(ca) == 0 {
		t.Errorf("the last backup has no CA: %v", err)
	}
	one, err := n.Backup()
	if err != nil {
		t.Fatal(err)
	}
	all, err := filepath.Glob(n.BackupDir() + "-*")
	slices.Sort(all)
	want := append(slices.Clone(kept[1:]), one)
	slices.Sort(want)
	if err != nil || !slices.Equal(all, want) {
		t.Errorf("kept are %q, %v; want %q", all, err, want)
	}
}

func snapshot(t *testing.T, env snapenv.Env) map[string]string {
	t.Helper()
	files := map[string]string{}
	for _, dir := range []string{"certs", "credentials"} {
		entries, err := os.ReadDir(filepath.Join(env.Data, dir))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			data, err := os.ReadFile(filepath.Join(env.Data, dir, e.Name()))
			if err != nil {
				t.Fatal(err)
			}
			files[dir+"/"+e.Name()] = string(data)
		}
	}
	return files
}

func TestGivenCA(t *testing.T) {
	n, other := newNode(t), newNode(t)
	n.ensure(t)
	other.opts.Maker = pkitest.Maker(other.opts.Maker.Now)
	for range 20 { // keys that n does not have
		if _, err := other.opts.Maker.Key(0); err != nil {
			t.Fatal(err)
		}
	}
	other.ensure(t)
	dir := other.env.CertsDir()
	if _, err := n.ReplaceCA(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if err := pki.IssuedBy(n.cert(t, Server), other.cert(t, CA)); err != nil {
		t.Error(err)
	}

	bad := t.TempDir()
	for _, step := range []struct {
		name string
		do   func()
		want error
	}{
		{"empty directory", func() {}, ErrMissing},
		{"only the certificate", func() { swap(t, filepath.Join(bad, "ca.crt"), n.crt(CA)) }, ErrMissing},
		{"no key", func() { write(t, filepath.Join(bad, "ca.key"), "x") }, ErrKey},
		{"foreign key", func() { swap(t, filepath.Join(bad, "ca.key"), n.key(FrontProxyCA)) }, ErrCert},
		{"a leaf", func() {
			swap(t, filepath.Join(bad, "ca.key"), n.key(Server))
			swap(t, filepath.Join(bad, "ca.crt"), n.crt(Server))
		}, ErrCert},
		{"no certificate", func() {
			write(t, filepath.Join(bad, "ca.crt"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")})))
		}, ErrCert},
		{"a good pair", func() {
			swap(t, filepath.Join(bad, "ca.key"), n.key(CA))
			swap(t, filepath.Join(bad, "ca.crt"), n.crt(CA))
		}, nil},
		{"after its end", func() { n.now = n.now.AddDate(11, 0, 0) }, ErrCert},
	} {
		step.do()
		if err := n.ValidateCA(bad); !errors.Is(err, step.want) {
			t.Errorf("%s: %v, want %v", step.name, err, step.want)
		}
	}
}

func TestReissueAndExpiry(t *testing.T) {
	n := newNode(t)
	n.ensure(t)
	n.now = n.now.Add(36 * time.Hour)
	for name, days := range map[string]int{CA: 3648, Server: 363, FrontProxyClient: 363} {
		if got, err := n.DaysLeft(name); err != nil || got != days {
			t.Errorf("%s: %d days, %v; want %d", name, got, err, days)
		}
	}
	old := n.cert(t, Server)
	if c, err := n.Reissue(t.Context(), Server); err != nil || !slices.Equal(c.Issued, []string{Server}) || len(c.Restart) != 0 {
		t.Errorf("%+v, %v", c, err)
	}
	if now := n.cert(t, Server); now.SerialNumber.Cmp(old.SerialNumber) == 0 || pki.Matches(now, old.PublicKey) != nil {
		t.Error("not a new certificate for the old key")
	}
	if _, err := n.Reissue(t.Context(), "nonesuch"); err == nil {
		t.Error("issued a certificate that does not exist")
	}
	n.now = n.now.AddDate(2, 0, 0)
	if got, err := n.DaysLeft(Server); err != nil || got >= 0 {
		t.Errorf("long ended: %d days, %v", got, err)
	}
	if next := n.NextRenewal(); next.IsZero() || next.After(n.now) {
		t.Errorf("next renewal %v, at %v", next, n.now)
	}
}

func TestRenderCSR(t *testing.T) {
	template := "[alt_names]\nDNS.1 = a # why\nIP.1 = 127.0.0.1\nIP.4 = 10.0.0.4\n#MOREIPS\n[other]\nIP.9 = nonsense\n"
	got, err := renderCSR([]byte(template), []net.IP{net.IPv4(10, 0, 0, 1), net.IPv4(10, 0, 0, 4), net.ParseIP("fd00::1")})
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Replace(template, "#MOREIPS\n", "IP.3 = 10.0.0.1\nIP.5 = fd00::1\n", 1)
	if string(got) != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if got, err := renderCSR([]byte(template), nil); err != nil || strings.Contains(string(got), "MOREIPS") {
		t.Errorf("without addresses: %q, %v", got, err)
	}
}

// TestAddressOfTheAPI: it is in the API server's certificate of a member of a cluster, which does not follow its own
// addresses, and never a reason to issue the kubelet's, which would restart it.
func TestAddressOfTheAPI(t *testing.T) {
	n := newNode(t)
	n.ensure(t)
	before := n.cert(t, Kubelet)
	write(t, n.env.Lock(snapenv.LockNoReissue), "")
	shared := netip.MustParseAddr("10.0.0.99")
	if err := apiaddress.Keep(n.env, shared); err != nil {
		t.Fatal(err)
	}
	n.addresses = append(n.addresses, net.IPv4(10, 0, 0, 99)) // this node answers for it
	change, err := n.Renew(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(change.Issued, []string{Server}) || len(change.Restart) > 0 {
		t.Errorf("issued %v, restarts %v", change.Issued, change.Restart)
	}
	if cert := n.cert(t, Server); !slices.ContainsFunc(cert.IPAddresses, net.IPv4(10, 0, 0, 99).Equal) {
		t.Errorf("the certificate has %v", cert.IPAddresses)
	}
	if !n.cert(t, Kubelet).Equal(before) {
		t.Error("the kubelet's certificate was issued again")
	}
	if change, err := n.Renew(t.Context()); err != nil || len(change.Issued) > 0 {
		t.Errorf("again: %v, %v", change.Issued, err)
	}
}
