// Package inpod serves the console in a pod of the addon dashboard: everybody logs in there with a token or
// a kubeconfig of their own. The pod has no ServiceAccount token, so that there is nothing to steal.
package inpod

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"sync"
	"time"

	"k8s.io/client-go/rest"

	"microk8s/internal/console"
)

// life is how long the pod's certificate is valid; a pod that runs for longer makes another one.
const life = 90 * 24 * time.Hour

// Run serves until ctx ends. Errors of its words are returned; everything else is written to log.
func Run(ctx context.Context, words []string, log io.Writer) error {
	set := flag.NewFlagSet("console", flag.ContinueOnError)
	set.SetOutput(log)
	address := set.String("listen", ":8443", "address for browsers, HTTPS with a certificate of the pod's own")
	behind := set.String("listen-ingress", "", "address for an ingress controller that ends TLS, HTTP")
	ca := set.String("ca", "", "file with the CA of the API server")
	if err := set.Parse(words); err != nil {
		return err
	}
	if set.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", set.Arg(0))
	}
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return errors.New("this is not a pod: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set")
	}
	if !console.Built() {
		return errors.New("this program was built without the page of the console")
	}
	pair := &keyPair{now: time.Now}
	s := console.New(console.Options{
		Certificate: pair.get,
		API: func() (*rest.Config, error) {
			return &rest.Config{Host: "https://" + net.JoinHostPort(host, port), TLSClientConfig: rest.TLSClientConfig{CAFile: *ca}}, nil
		},
		Log: slog.New(slog.NewTextHandler(log, nil)),
	})
	var listen net.ListenConfig
	browsers, err := listen.Listen(ctx, "tcp", *address)
	if err != nil {
		return fmt.Errorf("cannot serve browsers: %w", err)
	}
	var ingress net.Listener
	if *behind != "" {
		if ingress, err = listen.Listen(ctx, "tcp", *behind); err != nil {
			browsers.Close()
			return fmt.Errorf("cannot serve the ingress controller: %w", err)
		}
	}
	return s.ServeBoth(ctx, browsers, ingress)
}

// keyPair is a certificate that the pod makes for itself. Its methods may be called from any goroutine.
type keyPair struct {
	now func() time.Time

	mu   sync.Mutex
	pair *tls.Certificate
	end  time.Time
}

// get is a tls.Config.GetCertificate.
func (k *keyPair) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := k.now()
	if k.pair != nil && now.Before(k.end.Add(-life/3)) {
		return k.pair, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	end := now.Add(life)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "console"},
		NotBefore: now.Add(-time.Hour), NotAfter: end, // clocks differ
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames: []string{"kubernetes-dashboard", "kubernetes-dashboard.kube-system.svc", "localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}, &x509.Certificate{Subject: pkix.Name{CommonName: "console"}}, &key.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("cannot make the pod's certificate: %w", err)
	}
	k.pair, k.end = &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, end
	return k.pair, nil
}
