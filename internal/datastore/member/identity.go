package member

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"

	"microk8s/internal/atomicfile"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
)

// The files that say who this member is, and let it reach the others, are in no log: without them nothing can
// be fetched again. So there are copies of them in a folder of their own, which replace what cannot be read.

func (d directory) copies() directory { return at(d.File(storedir.IdentityFolder)) }

// copyIdentity keeps a copy of one of the files.
func (d directory) copyIdentity(name string, data []byte) error {
	c := d.copies()
	if old, err := os.ReadFile(c.File(name)); err == nil && bytes.Equal(old, data) {
		return nil
	}
	if err := os.MkdirAll(string(c.Dir), 0o700); err != nil {
		return fmt.Errorf("cannot keep a copy of %s: %w", name, err)
	}
	return atomicfile.Write(c.File(name), data, 0o600, nil)
}

// rememberPair keeps a copy of a key pair that can be used.
func (d directory) rememberPair() error {
	if !sound(d) {
		return nil
	}
	for _, name := range pairFiles {
		data, err := os.ReadFile(d.File(name))
		if err == nil {
			err = d.copyIdentity(name, data)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

var pairFiles = []string{storedir.CertFile, storedir.KeyFile}

// sound reports whether the key pair in a directory belongs together, and the certificate is as it was signed.
func sound(d directory) bool {
	_, config, err := peers.KeyPair(string(d.Dir), tls.VersionTLS12, 0)
	if err != nil {
		return false
	}
	cert, err := x509.ParseCertificate(config.Certificates[0].Certificate[0])
	if err != nil {
		return false
	}
	// It signs itself; one that somebody else has signed is taken as it is.
	return !bytes.Equal(cert.RawIssuer, cert.RawSubject) || cert.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature) == nil
}

// restoreIdentity replaces those of the files that cannot be read by their copies. A directory that starts
// over has others.
func (d directory) restoreIdentity(log *slog.Logger) error {
	if d.Has(storedir.InitFile) {
		return nil
	}
	c := d.copies()
	put := func(name string, mode os.FileMode, why error) error {
		data, err := os.ReadFile(c.File(name))
		if err != nil {
			return err
		}
		if st, err := os.Stat(d.File(name)); err == nil {
			mode = st.Mode().Perm()
		}
		kept, err := d.quarantine([]string{name})
		if err != nil {
			return err
		}
		if err := atomicfile.Write(d.File(name), data, mode, nil); err != nil {
			return err
		}
		log.Warn("a damaged file was replaced by its copy", "file", d.File(name), "kept", kept, "reason", why)
		return nil
	}
	info, err := d.Self()
	if err != nil {
		if _, copyErr := c.Self(); copyErr == nil {
			if err := put(storedir.InfoFile, 0o660, err); err != nil {
				return err
			}
		}
	}
	members, err := d.Members()
	if err != nil {
		var copyErr error
		if members, copyErr = c.Members(); copyErr == nil {
			if err := put(storedir.ClusterFile, 0o660, err); err != nil {
				return err
			}
		}
	}
	// An ID with another digit is an ID, too. The list of members knows this one's.
	if copied, copyErr := c.Self(); copyErr == nil && info.ID != 0 && copied.Address == info.Address && copied.ID != info.ID &&
		listed(members, copied) && !listed(members, info) {
		if err := put(storedir.InfoFile, 0o660, fmt.Errorf("it says ID %d, and %s has %d at that address", info.ID, storedir.ClusterFile, copied.ID)); err != nil {
			return err
		}
	}
	if !sound(d) && sound(c) {
		for _, name := range pairFiles {
			if err := put(name, 0o600, errors.New("it is no pair, or not as it was signed")); err != nil {
				return err
			}
		}
	}
	return nil
}

func listed(members []storedir.Member, m storedir.Member) bool {
	return slices.ContainsFunc(members, func(n storedir.Member) bool { return n.ID == m.ID && n.Address == m.Address })
}
