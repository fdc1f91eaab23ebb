// Package pki makes and checks keys and X.509 certificates: RSA keys, SHA-256 signatures, PEM.
//
// It knows nothing of which certificates the product has or where they are; that is
// internal/certs. It writes no files.
package pki

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"time"
)

// Maker makes keys and certificates. Its zero value is ready to use. It may be used
// concurrently if NewKey may.
type Maker struct {
	// NewKey makes a private key of so many bits; nil means crypto/rsa. Tests give small or
	// ready-made ones.
	NewKey func(bits int) (*rsa.PrivateKey, error)
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// Key makes an RSA key of the given size.
func (m Maker) Key(bits int) (*rsa.PrivateKey, error) {
	if m.NewKey != nil {
		return m.NewKey(bits)
	}
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		return nil, fmt.Errorf("cannot make a key: %w", err)
	}
	return key, nil
}

// Time is the present as this Maker sees it.
func (m Maker) Time() time.Time {
	if m.Now != nil {
		return m.Now()
	}
	return time.Now()
}

// Request is what a certificate is to contain.
type Request struct {
	Subject  pkix.Name
	DNSNames []string
	IPs      []net.IP
	Days     int
	CA       bool // may sign others; ClientAuth and ServerAuth are then ignored
	// ServerAuth and ClientAuth are the extended key usages.
	ServerAuth, ClientAuth bool
}

// clockSkew is how far in the past a certificate begins, for nodes whose clocks differ.
const clockSkew = 5 * time.Minute

// Issue makes a certificate for the public key pub, signed by caKey in the name of ca. With ca
// nil the certificate signs itself, and caKey is the key it is for. A leaf never outlives
// its CA. The result is in DER.
func (m Maker) Issue(req Request, pub crypto.PublicKey, ca *x509.Certificate, caKey crypto.Signer) ([]byte, error) {
	fail := func(err error) ([]byte, error) {
		return nil, fmt.Errorf("cannot issue the certificate of %s: %w", req.Subject.CommonName, err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 126))
	if err != nil {
		return fail(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return fail(err)
	}
	sum := sha256.Sum256(spki)
	now := m.Time()
	template := &x509.Certificate{
		SerialNumber:          serial.Add(serial, big.NewInt(1)),
		Subject:               req.Subject,
		NotBefore:             now.Add(-clockSkew).UTC(),
		NotAfter:              now.AddDate(0, 0, req.Days).UTC(),
		SubjectKeyId:          sum[:20],
		DNSNames:              req.DNSNames,
		IPAddresses:           req.IPs,
		BasicConstraintsValid: true,
		SignatureAlgorithm:    x509.SHA256WithRSA,
	}
	if req.CA {
		template.IsCA = true
		template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	} else {
		template.KeyUsage = x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment | x509.KeyUsageDataEncipherment
		if req.ServerAuth {
			template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
		}
		if req.ClientAuth {
			template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
		}
	}
	parent := ca
	if parent == nil {
		parent = template
		template.AuthorityKeyId = template.SubjectKeyId
	} else {
		if err := Matches(ca, caKey.Public()); err != nil {
			return fail(fmt.Errorf("the CA's key does not belong to its certificate: %w", err))
		}
		if !ca.NotAfter.After(now) {
			return fail(fmt.Errorf("the CA %s expired on %s", ca.Subject, ca.NotAfter.Format(time.DateOnly)))
		}
		if template.NotAfter.After(ca.NotAfter) {
			template.NotAfter = ca.NotAfter
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, caKey)
	if err != nil {
		return fail(err)
	}
	return der, nil
}

// Matches reports whether the certificate is for this public key.
func Matches(cert *x509.Certificate, pub crypto.PublicKey) error {
	k, ok := cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !k.Equal(pub) {
		return errors.New("the certificate is for another key")
	}
	return nil
}

// IssuedBy checks that ca signed cert directly. Dates do not matter.
func IssuedBy(cert, ca *x509.Certificate) error {
	if !bytes.Equal(cert.RawIssuer, ca.RawSubject) {
		return fmt.Errorf("it was issued by %s, not by %s", cert.Issuer, ca.Subject)
	}
	if err := cert.CheckSignatureFrom(ca); err != nil {
		return fmt.Errorf("its signature is not that of %s: %w", ca.Subject, err)
	}
	return nil
}

// RenewalTime is when a certificate should be replaced: after two thirds of its life, or 30
// days before its end if that is earlier for lives of more than 90 days.
func RenewalTime(cert *x509.Certificate) time.Time {
	life := cert.NotAfter.Sub(cert.NotBefore)
	at := cert.NotBefore.Add(life * 2 / 3)
	if early := cert.NotAfter.AddDate(0, 0, -30); life > 90*24*time.Hour && early.Before(at) {
		at = early
	}
	return at
}

// EncodeCert returns the PEM of a certificate in DER.
func EncodeCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// EncodeKey returns the PEM of a private key, in the PKCS #1 form that every older tool reads.
func EncodeKey(key *rsa.PrivateKey) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})
}

// ParseCert reads the first certificate of a PEM text.
func ParseCert(data []byte) (*x509.Certificate, error) {
	for {
		block, rest := pem.Decode(data)
		if block == nil {
			return nil, errors.New("there is no PEM certificate in it")
		}
		if block.Type == "CERTIFICATE" {
			return x509.ParseCertificate(block.Bytes)
		}
		data = rest
	}
}

// ParseKey reads an RSA private key in PEM, PKCS #1 or PKCS #8.
func ParseKey(data []byte) (*rsa.PrivateKey, error) {
	for {
		block, rest := pem.Decode(data)
		if block == nil {
			return nil, errors.New("there is no PEM private key in it")
		}
		switch block.Type {
		case "RSA PRIVATE KEY":
			return x509.ParsePKCS1PrivateKey(block.Bytes)
		case "PRIVATE KEY":
			key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, err
			}
			rsaKey, ok := key.(*rsa.PrivateKey)
			if !ok {
				return nil, fmt.Errorf("it holds a %T, not an RSA key", key)
			}
			return rsaKey, nil
		}
		data = rest
	}
}
