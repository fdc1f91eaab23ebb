package inpod

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"strings"
	"testing"
	"time"
)

func TestCertificateIsMadeAgainBeforeItEnds(t *testing.T) {
	now := time.Now()
	k := &keyPair{now: func() time.Time { return now }}
	get := func() *tls.Certificate {
		t.Helper()
		pair, err := k.get(nil)
		if err != nil {
			t.Fatal(err)
		}
		return pair
	}
	first := get()
	cert, err := x509.ParseCertificate(first.Certificate[0])
	if err != nil || cert.VerifyHostname("localhost") != nil || cert.VerifyHostname("kubernetes-dashboard.kube-system.svc") != nil {
		t.Fatalf("%v, names %v", err, cert.DNSNames)
	}
	if now = now.Add(life / 2); get() != first {
		t.Error("it was made again early")
	}
	if now = now.Add(life / 4); get() == first {
		t.Error("it was not made again")
	}
}

func TestWrongWords(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	for words, want := range map[string]string{"": "this is not a pod", "x": "unexpected argument", "--no": "not defined"} {
		if err := Run(t.Context(), strings.Fields(words), io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %s", words, err, want)
		}
	}
}
