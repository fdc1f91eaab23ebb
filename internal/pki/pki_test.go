package pki_test

import (
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net"
	"strings"
	"testing"
	"time"

	"microk8s/internal/pki"
	"microk8s/internal/pki/pkitest"
)

func authority(t *testing.T, m pki.Maker, days int) (*x509.Certificate, *rsa.PrivateKey) {
	t.Helper()
	key, err := m.Key(2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := m.Issue(pki.Request{Subject: pkix.Name{CommonName: "10.152.183.1"}, Days: days, CA: true}, key.Public(), nil, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := pki.ParseCert(pki.EncodeCert(der))
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func leaf(t *testing.T, m pki.Maker, req pki.Request, ca *x509.Certificate, caKey *rsa.PrivateKey) *x509.Certificate {
	t.Helper()
	key, err := m.Key(2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := m.Issue(req, key.Public(), ca, caKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	if err := pki.Matches(cert, key.Public()); err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestIssue(t *testing.T) {
	m := pkitest.Maker(nil)
	ca, caKey := authority(t, m, 3650)
	if !ca.IsCA || ca.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || len(ca.SubjectKeyId) == 0 ||
		string(ca.AuthorityKeyId) != string(ca.SubjectKeyId) || ca.Version != 3 {
		t.Errorf("CA: %+v", ca)
	}
	cert := leaf(t, m, pki.Request{
		Subject:  pkix.Name{CommonName: "127.0.0.1", Organization: []string{"x"}},
		DNSNames: []string{"kubernetes"}, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}, Days: 365, ServerAuth: true, ClientAuth: true,
	}, ca, caKey)
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{usage}, DNSName: "127.0.0.1"}); err != nil {
			t.Errorf("usage %v: %v", usage, err)
		}
	}
	if cert.IsCA || cert.Version != 3 || cert.SignatureAlgorithm != x509.SHA256WithRSA {
		t.Errorf("leaf: version %d, CA %v, %v", cert.Version, cert.IsCA, cert.SignatureAlgorithm)
	}
	if err := pki.IssuedBy(cert, ca); err != nil {
		t.Error(err)
	}
	client := leaf(t, m, pki.Request{Subject: pkix.Name{CommonName: "c"}, Days: 1, ClientAuth: true}, ca, caKey)
	if _, err := client.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err == nil {
		t.Error("a client's certificate may serve")
	}
}

func TestIssueRefusals(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	m := pkitest.Maker(func() time.Time { return now })
	ca, caKey := authority(t, m, 10)
	otherCA, otherKey := authority(t, m, 10)

	long := leaf(t, m, pki.Request{Subject: pkix.Name{CommonName: "l"}, Days: 365}, ca, caKey)
	if long.NotAfter.After(ca.NotAfter) {
		t.Errorf("a leaf until %v outlives its CA until %v", long.NotAfter, ca.NotAfter)
	}
	if err := pki.IssuedBy(long, otherCA); err == nil {
		t.Error("a CA of the same name and another key passes for the issuer")
	}
	if err := pki.Matches(ca, otherKey.Public()); err == nil {
		t.Error("a foreign key matches")
	}
	if _, err := m.Issue(pki.Request{Subject: pkix.Name{CommonName: "x"}, Days: 1}, otherKey.Public(), ca, otherKey); err == nil || !strings.Contains(err.Error(), "does not belong") {
		t.Errorf("mismatched CA key: %v", err)
	}
	now = now.AddDate(0, 0, 11)
	if _, err := m.Issue(pki.Request{Subject: pkix.Name{CommonName: "x"}, Days: 1}, otherKey.Public(), ca, caKey); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("expired CA: %v", err)
	}
}

func TestRenewalTime(t *testing.T) {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for days, want := range map[int]int{3: 2, 30: 20, 90: 60, 93: 62, 365: 243, 3650: 2433} {
		at := pki.RenewalTime(&x509.Certificate{NotBefore: start, NotAfter: start.AddDate(0, 0, days)})
		if got := int(at.Sub(start).Hours() / 24); got != want {
			t.Errorf("%d days: renewed on day %d, want %d", days, got, want)
		}
	}
}

func TestParse(t *testing.T) {
	key, err := pkitest.Keys()(2048)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"PKCS #1":             pki.EncodeKey(key),
		"PKCS #8":             pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}),
		"after another block": append(pem.EncodeToMemory(&pem.Block{Type: "OTHER", Bytes: []byte("x")}), pki.EncodeKey(key)...),
	} {
		if got, err := pki.ParseKey(data); err != nil || !got.Equal(key) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, bad := range []string{"", "x", "-----BEGIN RSA PRIVATE KEY-----\nAAAA\n-----END RSA PRIVATE KEY-----\n"} {
		if _, err := pki.ParseKey([]byte(bad)); err == nil {
			t.Errorf("ParseKey(%q) succeeded", bad)
		}
		if _, err := pki.ParseCert([]byte(bad)); err == nil {
			t.Errorf("ParseCert(%q) succeeded", bad)
		}
	}
}
