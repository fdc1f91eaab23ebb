package node

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/longtest"
	"microk8s/tests/lab"
	"microk8s/tests/lab/labtest"
	"microk8s/tests/snippet"
)

// packOf copies the pack of an addon into the host and returns its path there.
func (n *node) packOf(t *testing.T, addon string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(build, "packs/microk8s-addons-"+addon+"_*.tar"))
	if err != nil || len(found) != 1 {
		t.Fatalf("packs of %s: %v, %v; make addons builds it", addon, found, err)
	}
	data, err := os.ReadFile(found[0])
	if err != nil {
		t.Fatal(err)
	}
	path := "/" + filepath.Base(found[0])
	if err := os.WriteFile(filepath.Join(n.lab.Root(n.name), path), data, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// manifest is the snippet of that name of docs/addons.md, with changes.
func manifest(t *testing.T, name string, changes ...string) string {
	t.Helper()
	all, err := snippet.Read("../../docs/addons.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		if s.Name == name {
			text := s.Text
			for i := 0; i < len(changes); i += 2 {
				if !strings.Contains(text, changes[i]) {
					t.Fatalf("the snippet %s has no %s", name, changes[i])
				}
				text = strings.ReplaceAll(text, changes[i], changes[i+1])
			}
			return text
		}
	}
	t.Fatalf("docs/addons.md has no snippet %s", name)
	return ""
}

// issue applies a snippet of docs/addons.md and waits for a certificate.
func (n *node) issue(t *testing.T, name, certificate string, changes ...string) {
	t.Helper()
	n.runIn(t, manifest(t, name, changes...), "microk8s", "kubectl", "apply", "-f", "-")
	n.waitCertificate(t, certificate)
}

// waitCertificate waits until a Certificate is Ready and its Secret there.
func (n *node) waitCertificate(t *testing.T, name string) {
	t.Helper()
	eventually(t, 3*time.Minute, func() error {
		if _, err := n.client.CoreV1().Secrets("default").Get(t.Context(), name, metav1.GetOptions{}); err != nil {
			return err
		}
		out, err := n.try(t, "microk8s", "kubectl", "get", "certificate", name, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")]}`)
		if err == nil && !strings.Contains(out, `"status":"True"`) {
			orders, _ := n.try(t, "microk8s", "kubectl", "get", "orders,challenges", "-o", "jsonpath={.items[*].status}")
			err = fmt.Errorf("certificate %s: %s %s", name, out, orders)
		}
		return err
	})
}

// certificateOf is what the Secret of a certificate holds.
func (n *node) certificateOf(t *testing.T, name string) *x509.Certificate {
	t.Helper()
	secret, err := n.client.CoreV1().Secrets("default").Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(secret.Data["tls.crt"])
	if block == nil {
		t.Fatalf("Secret %s holds no certificate", name)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// testCertificates is the part of TestCertManager that the gate has.
func (n *node) testCertificates(t *testing.T) {
	path := n.packOf(t, "cert-manager")
	if out, err := n.tryAll(t, "", "microk8s", "enable", "cert-manager"); exitCode(err) != 1 || !strings.Contains(out, filepath.Base(path)+", which is not on this node") {
		t.Errorf("without its pack: %v\n%s", err, out)
	}
	n.run(t, "microk8s", "addons", "import", path)
	if out := n.run(t, "microk8s", "enable", "cert-manager"); !strings.Contains(out, "cert-manager is enabled\n") {
		t.Errorf("enable printed %q", out)
	}
	// The webhook answers: what it refuses is refused at once, and what is right is issued.
	if out, err := n.tryAll(t, "apiVersion: cert-manager.io/v1\nkind: Issuer\nmetadata: {name: none}\nspec: {}\n", "microk8s", "kubectl", "apply", "-f", "-"); err == nil || !strings.Contains(out, "denied the request") {
		t.Errorf("an issuer of no kind: %v\n%s", err, out)
	}
	n.issue(t, "self-signed", "web-tls")
	n.run(t, "microk8s", "disable", "cert-manager")
	if out := n.run(t, "microk8s", "kubectl", "get", "certificate", "web-tls", "-o", "name"); !strings.Contains(out, "web-tls") {
		t.Errorf("after disable there is %q", out)
	}
	n.certificateOf(t, "web-tls")
}

// TestCertManager has certificates issued by all that docs/addons.md shows, ACME by a server of the test's own, which asks through
// the addon ingress. No host reaches another machine.
func TestCertManager(t *testing.T) {
	longtest.Only(t)
	n := newNode(t, "resolver")
	step := n.steps(t)
	const shop = "shop.example.com"
	server := labtest.Resolver(t, n.lab, "resolver", filepath.Join(build, "components/bin/coredns"), shop, n.ip(t))
	n.run(t, "microk8s", "start")
	n.connect(t)
	n.waitReady(t)
	n.loadWebImage(t)
	ca := n.pebble(t, "resolver")

	step("self-signed, kept by disable", n.testCertificates)
	step("enabled again, it goes on", func(t *testing.T) {
		first := n.certificateOf(t, "web-tls")
		n.run(t, "microk8s", "enable", "cert-manager")
		n.wantAddon(t, "cert-manager", "enabled")
		if !n.certificateOf(t, "web-tls").Equal(first) {
			t.Error("a certificate that was there is another one")
		}
		n.run(t, "microk8s", "kubectl", "delete", "secret", "web-tls")
		n.waitCertificate(t, "web-tls")
	})
	step("a CA", func(t *testing.T) {
		n.issue(t, "ca", "inside-tls")
		if cert := n.certificateOf(t, "inside-tls"); cert.Issuer.CommonName != "our CA" || cert.VerifyHostname("web.default.svc") != nil {
			t.Errorf("it is of %s for %v", cert.Issuer, cert.DNSNames)
		}
	})
	step("ACME through the ingress", func(t *testing.T) {
		n.run(t, "microk8s", "enable", "dns", server)
		n.run(t, "microk8s", "enable", "ingress")
		n.runIn(t, "apiVersion: v1\nkind: Namespace\nmetadata: {name: default, labels: {pod-security.kubernetes.io/enforce: restricted}}\n",
			"microk8s", "kubectl", "apply", "--server-side", "-f", "-") // what answers the challenge is as it wants pods
		n.runIn(t, "apiVersion: v1\nkind: Service\nmetadata: {name: shop}\nspec: {selector: {app: shop}, ports: [{port: 80, targetPort: 8080}]}\n", "microk8s", "kubectl", "apply", "-f", "-")
		n.issue(t, "acme", "shop-tls",
			"server: https://acme-v02.api.letsencrypt.org/directory",
			"server: https://"+server+":14000/dir\n    caBundle: "+base64.StdEncoding.EncodeToString([]byte(ca)))
		eventually(t, time.Minute, func() error {
			issuer, err := n.presents(t, shop)
			if err == nil && !strings.Contains(issuer, "Pebble Intermediate CA") {
				err = fmt.Errorf("the ingress has a certificate of %s", issuer)
			}
			return err
		})
		if out := n.run(t, "microk8s", "kubectl", "get", "pods,ingresses", "-o", "name"); strings.Contains(out, "acme-http-solver") {
			t.Errorf("left of the challenge:\n%s", out)
		}
	})
	step("a new start", func(t *testing.T) {
		n.run(t, "microk8s", "stop")
		n.run(t, "microk8s", "start")
		n.waitReady(t)
		n.run(t, "microk8s", "kubectl", "delete", "secret", "inside-tls")
		n.waitCertificate(t, "inside-tls")
	})
	step("its kinds, with a challenge that is open", func(t *testing.T) {
		n.runIn(t, strings.NewReplacer("shop.example.com", "nowhere.example.com", "shop-tls", "nowhere-tls", "name: shop\n", "name: nowhere\n").Replace(
			manifest(t, "acme")[strings.Index(manifest(t, "acme"), "---\n"):]), "microk8s", "kubectl", "apply", "-f", "-")
		eventually(t, 2*time.Minute, func() error {
			out, err := n.try(t, "microk8s", "kubectl", "get", "challenges", "-o", "jsonpath={.items[*].metadata.finalizers}")
			if err == nil && !strings.Contains(out, "acme.cert-manager.io/finalizer") {
				err = fmt.Errorf("challenges have the finalizers %q", out)
			}
			return err
		})
		n.run(t, "microk8s", "disable", "cert-manager", "destroy-objects")
		if out := n.run(t, "microk8s", "kubectl", "get", "crds,namespaces", "-o", "name"); strings.Contains(out, "cert-manager") {
			t.Errorf("left:\n%s", out)
		}
		n.certificateOf(t, "shop-tls")
		if out, err := n.tryAll(t, "", "microk8s", "disable", "cert-manager", "all"); exitCode(err) != 1 || !strings.Contains(out, "it takes destroy-objects or nothing") {
			t.Errorf("another word: %v\n%s", err, out)
		}
	})
}

// pebble runs an ACME server on a host, which asks that host's name server and port 80, and returns the CA of its own certificate.
func (n *node) pebble(t *testing.T, host string) (ca string) {
	t.Helper()
	ip, err := n.lab.IP(host)
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(filepath.Join(build, "peers/pebble"))
	if err != nil {
		t.Fatalf("%v; make build/peers/pebble.stamp builds it", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.ParseIP(ip)}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	der, err := x509.CreateCertificate(crand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	ca = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	root := n.lab.Root(host)
	for name, data := range map[string][]byte{
		"pebble":     program,
		"pebble.crt": []byte(ca),
		"pebble.key": pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: private}),
		"pebble.json": []byte(`{"pebble": {"listenAddress": "` + ip + `:14000", "managementListenAddress": "127.0.0.1:15000",
			"certificate": "/pebble.crt", "privateKey": "/pebble.key", "httpPort": 80, "tlsPort": 443,
			"profiles": {"default": {"description": "the only one", "validityPeriod": 7776000}}}}`),
	} {
		if err := os.WriteFile(filepath.Join(root, name), data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd, err := n.lab.Spawn(t.Context(), host, lab.Command{Args: []string{"/pebble", "-config", "/pebble.json", "-dnsserver", ip + ":53"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return ca
}

// presents returns who issued the certificate that the node's port 443 has for a name.
func (n *node) presents(t *testing.T, name string) (issuer string, err error) {
	conn, err := n.lab.Dial(t.Context(), n.name, "tcp", n.ip(t)+":443")
	if err != nil {
		return "", err
	}
	defer conn.Close()
	client := tls.Client(conn, &tls.Config{ServerName: name, InsecureSkipVerify: true})
	if err := client.HandshakeContext(t.Context()); err != nil {
		return "", err
	}
	chain := client.ConnectionState().PeerCertificates
	if len(chain) == 0 {
		return "", errors.New("no certificate")
	}
	return chain[0].Issuer.CommonName, nil
}
