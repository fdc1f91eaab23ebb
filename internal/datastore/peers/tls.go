package peers

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"

	"microk8s/internal/datastore/storedir"
)

// KeyPair loads the pair that all members share and gives the TLS configurations for
// accepting and for dialling. cache is the size of the session cache for dialling, 0 for none.
func KeyPair(dir string, minVersion uint16, cache int) (listen, dial *tls.Config, err error) {
	certFile, keyFile := storedir.Dir(dir).File(storedir.CertFile), storedir.Dir(dir).File(storedir.KeyFile)
	const next = "run: microk8s start (it makes a new pair on a node that has none), or copy the pair from another member of the cluster"
	certPEM, err := os.ReadFile(certFile)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read the cluster's certificate: %w; %s", err, next)
	}
	keyPEM, err := os.ReadFile(keyFile)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read the cluster's key: %w; %s", err, next)
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, nil, fmt.Errorf("%s and %s are not a key pair: %w; copy both from another member or from a backup", certFile, keyFile, err)
	}
	cert, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read %s: %w", certFile, err)
	}
	if len(cert.DNSNames) == 0 {
		return nil, nil, fmt.Errorf("%s has no DNS name: members recognise each other by the first one; make a certificate with a DNS entry in subjectAltName", certFile)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(certPEM) {
		return nil, nil, fmt.Errorf("%s holds no certificate", certFile)
	}
	listen = &tls.Config{
		MinVersion: minVersion, Certificates: []tls.Certificate{pair}, ClientCAs: pool,
		ClientAuth: tls.RequireAndVerifyClientCert,
	}
	dial = &tls.Config{
		MinVersion: minVersion, Certificates: []tls.Certificate{pair}, RootCAs: pool, ServerName: cert.DNSNames[0],
	}
	if cache > 0 {
		dial.ClientSessionCache = tls.NewLRUClientSessionCache(cache)
	}
	return listen, dial, nil
}
