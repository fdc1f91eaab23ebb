package callback

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"microk8s/internal/fileaccess"
	"microk8s/internal/pki"
	"microk8s/internal/snapenv"
	"microk8s/internal/token"
)

// Organization is that of the certificates with which control-plane nodes call others. The broker
// signs no such certificate; a node that has the CA's key makes it itself. It has no rights in the API.
const Organization = "microk8s:control-plane"

// callerFile lets members of the group microk8s call other nodes, who cannot read the CA's key: the
// base of the callback secrets, and a certificate for a day, in PEM.
const callerFile = "node-calls.pem"

const (
	baseBlock  = "MICROK8S CALLBACK BASE"
	callerDays = 2 // the file is written again after a day
)

// authority reads the cluster's CA with its key.
func authority(env snapenv.Env) (ca *x509.Certificate, key *rsa.PrivateKey, err error) {
	text, err := os.ReadFile(env.Cert("ca.key"))
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read the CA's key: %w", err)
	}
	k, err := pki.ParseKey(text)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read %s: %w", env.Cert("ca.key"), err)
	}
	if text, err = os.ReadFile(env.Cert("ca.crt")); err != nil {
		return nil, nil, fmt.Errorf("cannot read the CA: %w", err)
	}
	if ca, err = pki.ParseCert(text); err != nil {
		return nil, nil, fmt.Errorf("cannot read %s: %w", env.Cert("ca.crt"), err)
	}
	return ca, k, nil
}

// loadBase derives the base from the CA's key, or reads it where that is for root alone.
func loadBase(env snapenv.Env) ([]byte, error) {
	text, err := os.ReadFile(env.Cert("ca.key"))
	if errors.Is(err, fs.ErrPermission) {
		base, _, err := readCaller(env)
		return base, err
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the CA's key, which callback secrets follow from: %w", err)
	}
	key, err := pki.ParseKey(text)
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", env.Cert("ca.key"), err)
	}
	return token.CallbackBase(key), nil
}

// Caller returns the certificate that this control-plane node shows to agents that it calls.
func Caller(env snapenv.Env, node string) (tls.Certificate, error) {
	_, _, pair, err := newCaller(env, node, time.Now())
	if errors.Is(err, fs.ErrPermission) {
		_, pair, err = readCaller(env)
	}
	return pair, err
}

func newCaller(env snapenv.Env, node string, now time.Time) (base, text []byte, pair tls.Certificate, err error) {
	ca, caKey, err := authority(env)
	if err != nil {
		return nil, nil, pair, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, pair, err
	}
	der, err := pki.Maker{Now: func() time.Time { return now }}.Issue(pki.Request{
		Subject: pkix.Name{CommonName: "microk8s:agent:" + node, Organization: []string{Organization}}, Days: callerDays, ClientAuth: true,
	}, key.Public(), ca, caKey)
	if err != nil {
		return nil, nil, pair, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, pair, err
	}
	base = token.CallbackBase(caKey)
	text = slices.Concat(pki.EncodeCert(der),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), pem.EncodeToMemory(&pem.Block{Type: baseBlock, Bytes: base}))
	return base, text, tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

func readCaller(env snapenv.Env) (base []byte, pair tls.Certificate, err error) {
	path := env.Credential(callerFile)
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, pair, fmt.Errorf("cannot read what other nodes are called with: %w", err)
	}
	if pair, err = tls.X509KeyPair(text, text); err != nil {
		return nil, pair, fmt.Errorf("cannot read %s: %w", path, err)
	}
	for rest := text; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return nil, pair, fmt.Errorf("cannot read %s: it has no base of callback secrets", path)
		}
		if block.Type == baseBlock {
			return block.Bytes, pair, nil
		}
	}
}

// WriteCaller keeps the file for members of the group: it is written when it is a day old, or of
// another CA.
func WriteCaller(env snapenv.Env, node string, now time.Time) error {
	ca, caKey, err := authority(env)
	if err != nil {
		return err
	}
	if base, pair, err := readCaller(env); err == nil && bytes.Equal(base, token.CallbackBase(caKey)) {
		if cert, err := x509.ParseCertificate(pair.Certificate[0]); err == nil && pki.IssuedBy(cert, ca) == nil && now.Before(pki.RenewalTime(cert)) {
			return nil
		}
	}
	_, text, _, err := newCaller(env, node, now)
	if err != nil {
		return err
	}
	return fileaccess.For(env).WriteShared(env.Credential(callerFile), text)
}

// CheckCaller returns the name of the control-plane node whose certificate a connection showed. The
// CA is that of the cluster, in PEM.
func CheckCaller(state *tls.ConnectionState, ca []byte, now time.Time) (string, error) {
	if state == nil || len(state.PeerCertificates) == 0 {
		return "", ErrCaller
	}
	cert := state.PeerCertificates[0]
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	opts := x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, CurrentTime: now}
	if _, err := cert.Verify(opts); err != nil {
		return "", ErrCaller
	}
	if !slices.Equal(cert.Subject.Organization, []string{Organization}) {
		return "", ErrCaller
	}
	return cert.Subject.CommonName, nil
}

// ErrCaller says that a call came without the certificate that control-plane nodes have.
var ErrCaller = errors.New("a certificate of a control-plane node of this cluster is needed")
