package certs

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"

	"microk8s/internal/datastore/storedir"
	"microk8s/internal/fileaccess"
	"microk8s/internal/kubeconfig"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/pki"
)

// Leaves are the certificates that ReplaceLeaves replaces: all that the CA signs.
func Leaves(inv Inventory) (ids []string) {
	for _, l := range inv.Items {
		worker := inv.Role == "worker"
		switch l.Name {
		case Server, "apiserver-kubelet-client", Admin, "controller", "scheduler":
			if worker {
				continue // of its own CA
			}
		case "proxy", Kubelet:
		default:
			continue
		}
		ids = append(ids, l.ID)
	}
	return ids
}

// ReplaceLeaves makes new keys and certificates in place of those whose keys have these IDs, and the
// kubeconfigs that hold them. It may be repeated: what is replaced has another ID. It is for
// control-plane nodes, which have the CA's key.
func (s *Store) ReplaceLeaves(_ context.Context, ids []string) (Change, error) {
	var change Change
	s.mu.Lock()
	defer s.mu.Unlock()
	if nodeconfig.ReadState(s.env).Worker {
		return change, errors.New("a worker has its certificates from the control plane")
	}
	if err := Finish(s.env); err != nil {
		return change, err
	}
	hostname, err := s.nodeName()
	if err != nil {
		return change, err
	}
	want, err := s.names()
	if err != nil {
		return change, err
	}
	for _, sp := range specs(hostname) {
		cert, _, err := readCert(s.crt(sp.name))
		if sp.issuer != CA || err == nil && !slices.Contains(ids, KeyID(cert.PublicKey)) || errors.Is(err, fs.ErrNotExist) {
			continue // what is missing is made by Renew
		}
		if err != nil {
			return change, err
		}
		files, err := s.newLeaf(sp, want[sp.name])
		if err != nil {
			return change, err
		}
		if err := s.replaceTogether(files); err != nil {
			return change, err
		}
		s.opts.Log.Info("issued a certificate", "name", sp.name, "reason", "its key is replaced")
		change.add(sp, true)
	}
	return change, nil
}

// newLeaf makes a key, its certificate and the kubeconfig with both.
func (s *Store) newLeaf(sp spec, want wanted) ([]newFile, error) {
	ca, caText, err := readCert(s.crt(sp.issuer))
	if err != nil {
		return nil, err
	}
	caKey, err := readKey(s.key(sp.issuer))
	if err != nil {
		return nil, fmt.Errorf("cannot issue %s.crt: the CA's key is needed: %w", sp.name, err)
	}
	key, err := s.opts.Maker.Key(2048)
	if err != nil {
		return nil, err
	}
	der, err := s.opts.Maker.Issue(request(sp, want), key.Public(), ca, caKey)
	if err != nil {
		return nil, err
	}
	crt, keyText := pki.EncodeCert(der), pki.EncodeKey(key)
	files := []newFile{
		{Folder: "certs", Name: sp.name + ".key", Text: keyText},
		{Folder: "certs", Name: sp.name + ".crt", Shared: true, Text: crt},
	}
	if sp.kubeconfig == "" {
		return files, nil
	}
	config := kubeconfig.Config{
		Server: kubeconfig.LocalServer(nodeconfig.Load(s.env).APIServer.Port), User: sp.subject.CommonName, CA: caText, Cert: crt, Key: keyText,
	}
	text, err := config.Encode()
	if err != nil {
		return nil, err
	}
	return append(files, newFile{Folder: "credentials", Name: sp.kubeconfig, Shared: sp.name == Admin, Text: text}), nil
}

// nextFrontProxy is the key of the front proxy's CA that is to come.
const nextFrontProxy = "front-proxy-ca.next.key"

// Steps of the replacement of a front proxy's CA; each may be repeated.
const (
	FrontProxyAdd  = "add"  // a new CA is trusted beside the present one
	FrontProxyUse  = "use"  // the new one signs
	FrontProxyDrop = "drop" // the other one is trusted no more
)

// FrontProxy does one step of replacing the front proxy's CA of this node, whose key has the ID old. The API
// server reads the files again by itself.
func (s *Store) FrontProxy(step, old string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if nodeconfig.ReadState(s.env).Worker {
		return errors.New("a worker calls no extension API servers")
	}
	if err := Finish(s.env); err != nil {
		return err
	}
	all, err := readBundle(s.crt(FrontProxyCA))
	if err != nil {
		return err
	}
	present := KeyID(all[0].PublicKey) == old
	switch step {
	case FrontProxyAdd:
		if _, err := os.Lstat(s.env.Cert(nextFrontProxy)); !present || err == nil && len(all) > 1 {
			return nil
		}
		key, err := s.opts.Maker.Key(2048)
		if err != nil {
			return err
		}
		der, err := s.opts.Maker.Issue(pki.Request{Subject: pkix.Name{CommonName: FrontProxyCA}, Days: caDays, CA: true}, key.Public(), nil, key)
		if err != nil {
			return err
		}
		return s.replaceTogether([]newFile{
			{Folder: "certs", Name: nextFrontProxy, Text: pki.EncodeKey(key)},
			{Folder: "certs", Name: FrontProxyCA + ".crt", Shared: true, Text: slices.Concat(pki.EncodeCert(all[0].Raw), pki.EncodeCert(der))},
		})
	case FrontProxyUse:
		if !present {
			return nil
		}
		return s.useFrontProxy(all)
	case FrontProxyDrop:
		if present {
			return errors.New("the front proxy's CA signs yet, and cannot be dropped")
		}
		return fileaccess.For(s.env).WriteShared(s.crt(FrontProxyCA), pki.EncodeCert(all[0].Raw))
	}
	return fmt.Errorf("there is no step %q", step)
}

func (s *Store) useFrontProxy(all []*x509.Certificate) error {
	text, err := os.ReadFile(s.env.Cert(nextFrontProxy))
	if err != nil {
		return fmt.Errorf("cannot read the key of the front proxy's new CA: %w", err)
	}
	caKey, err := pki.ParseKey(text)
	if err != nil {
		return fmt.Errorf("cannot read %s: %w", s.env.Cert(nextFrontProxy), err)
	}
	if len(all) != 2 || pki.Matches(all[1], caKey.Public()) != nil {
		return fmt.Errorf("%s and %s do not belong together", s.crt(FrontProxyCA), s.env.Cert(nextFrontProxy))
	}
	hostname, err := s.nodeName()
	if err != nil {
		return err
	}
	want, err := s.names()
	if err != nil {
		return err
	}
	known := specs(hostname)
	sp := known[slices.IndexFunc(known, func(sp spec) bool { return sp.name == FrontProxyClient })]
	key, err := s.opts.Maker.Key(2048)
	if err != nil {
		return err
	}
	der, err := s.opts.Maker.Issue(request(sp, want[sp.name]), key.Public(), all[1], caKey)
	if err != nil {
		return err
	}
	return s.replaceTogether([]newFile{
		{Folder: "certs", Name: FrontProxyClient + ".key", Text: pki.EncodeKey(key)},
		{Folder: "certs", Name: FrontProxyClient + ".crt", Shared: true, Text: pki.EncodeCert(der)},
		{Folder: "certs", Name: FrontProxyCA + ".key", Text: text},
		{Folder: "certs", Name: FrontProxyCA + ".crt", Shared: true, Text: slices.Concat(pki.EncodeCert(all[1].Raw), pki.EncodeCert(all[0].Raw))},
		{Folder: "certs", Name: nextFrontProxy},
	})
}

// request is what is asked of a CA for a certificate.
func request(sp spec, want wanted) pki.Request {
	req := pki.Request{Subject: sp.subject, Days: sp.days, ClientAuth: true, ServerAuth: sp.server}
	if sp.server {
		req.Subject, req.DNSNames, req.IPs = want.subject, want.dns, want.ips
	}
	return req
}

// readBundle reads all certificates of a file.
func readBundle(path string) ([]*x509.Certificate, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read the certificate: %w", err)
	}
	out, err := Bundle(data)
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", path, err)
	}
	return out, nil
}

// Bundle reads all certificates of a PEM text, of which there must be one.
func Bundle(text []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		out = append(out, cert)
	}
	if len(out) == 0 {
		return nil, errors.New("there is no certificate in it")
	}
	return out, nil
}

// SigningKeys are the keys of service account tokens: the first one signs, API servers take tokens of all.
type SigningKeys []*rsa.PrivateKey

// ParseSigningKeys reads the text of the file.
func ParseSigningKeys(text []byte) (SigningKeys, error) {
	var out SigningKeys
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		key, err := pki.ParseKey(pem.EncodeToMemory(block))
		if err != nil {
			return nil, err
		}
		out = append(out, key)
	}
	if len(out) == 0 {
		return nil, errors.New("there is no key in it")
	}
	return out, nil
}

// Encode is the text of the file.
func (k SigningKeys) Encode() []byte {
	var b bytes.Buffer
	for _, key := range k {
		b.Write(pki.EncodeKey(key))
	}
	return b.Bytes()
}

// IDs are those of the keys, in their order.
func (k SigningKeys) IDs() (out []string) {
	for _, key := range k {
		out = append(out, KeyID(key.Public()))
	}
	return out
}

// SigningKeys reads those of this node.
func (s *Store) SigningKeys() (SigningKeys, error) {
	text, err := os.ReadFile(s.env.Cert(serviceAccountKey))
	if err != nil {
		return nil, fmt.Errorf("cannot read the keys of service account tokens: %w", err)
	}
	keys, err := ParseSigningKeys(text)
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", s.env.Cert(serviceAccountKey), err)
	}
	return keys, nil
}

// SetSigningKeys replaces the keys of this node. Tokens of the key that signs here now must stay valid:
// what two nodes disagree about is left to a person.
func (s *Store) SetSigningKeys(text []byte) error {
	if nodeconfig.ReadState(s.env).Worker {
		return errors.New("a worker signs no tokens")
	}
	keys, err := ParseSigningKeys(text)
	if err != nil {
		return fmt.Errorf("cannot replace the keys of service account tokens: %w", err)
	}
	have, err := s.SigningKeys()
	if err != nil {
		return err
	}
	if !slices.Contains(keys.IDs(), have.IDs()[0]) {
		return fmt.Errorf("tokens are signed with the key %s here, which is not among the new keys", have.IDs()[0])
	}
	return fileaccess.For(s.env).WriteSecret(s.env.Cert(serviceAccountKey), keys.Encode())
}

// Pair is that of the datastore's members: the certificate that this node shows, others that it takes from
// members, and the key of the first one. Each signs itself.
type Pair struct {
	Certs []*x509.Certificate
	Key   *rsa.PrivateKey
}

// ParsePair reads the texts of the two files.
func ParsePair(crt, key []byte) (Pair, error) {
	list, err := Bundle(crt)
	if err != nil {
		return Pair{}, err
	}
	k, err := pki.ParseKey(key)
	if err != nil {
		return Pair{}, err
	}
	return Pair{list, k}, pki.Matches(list[0], k.Public())
}

// Encode returns the texts of the two files.
func (p Pair) Encode() (crt, key []byte) {
	for _, c := range p.Certs {
		crt = append(crt, pki.EncodeCert(c.Raw)...)
	}
	return crt, pki.EncodeKey(p.Key)
}

// DatastorePair reads the pair of this node.
func (s *Store) DatastorePair() (Pair, error) {
	dir := storedir.Dir(s.env.BackendLive())
	crt, err1 := os.ReadFile(dir.File(storedir.CertFile))
	key, err2 := os.ReadFile(dir.File(storedir.KeyFile))
	if err := errors.Join(err1, err2); err != nil {
		return Pair{}, fmt.Errorf("cannot read the datastore's pair: %w", err)
	}
	p, err := ParsePair(crt, key)
	if err != nil {
		return Pair{}, fmt.Errorf("cannot read the datastore's pair: %w", err)
	}
	return p, nil
}

// SetDatastorePair replaces the pair of this node, which its datastore uses from its next start on. What this
// node shows to others now must be among what it takes then, and under the same name: members know
// each other by it.
func (s *Store) SetDatastorePair(crt, key []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if nodeconfig.ReadState(s.env).Worker || !nodeconfig.Load(s.env).Datastore.Own() {
		return errors.New("this node is no member of the datastore")
	}
	if err := Finish(s.env); err != nil {
		return err
	}
	p, err := ParsePair(crt, key)
	if err != nil {
		return fmt.Errorf("cannot replace the datastore's pair: %w", err)
	}
	have, err := s.DatastorePair()
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(p.Certs, have.Certs[0].Equal) {
		return fmt.Errorf("the datastore of this node shows the certificate of the key %s, which is not among the new ones", KeyID(have.Key.Public()))
	}
	if !slices.Equal(p.Certs[0].DNSNames, have.Certs[0].DNSNames) {
		return fmt.Errorf("the new certificate of the datastore has the names %q, and members look for %q", p.Certs[0].DNSNames, have.Certs[0].DNSNames)
	}
	crt, key = p.Encode()
	return s.replaceTogether([]newFile{
		{Folder: "datastore", Name: storedir.KeyFile, Text: key}, {Folder: "datastore", Name: storedir.CertFile, Shared: true, Text: crt},
	})
}

// nextPair has the pair of the datastore that is to come, on the node where its replacement was begun.
const nextPair = "cluster.next.pem"

// NextDatastorePair returns the pair that is to come, and makes it where there is none.
func (s *Store) NextDatastorePair() (Pair, error) {
	text, err := os.ReadFile(s.env.Cert(nextPair))
	if err == nil {
		return ParsePair(text, text)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return Pair{}, err
	}
	have, err := s.DatastorePair()
	if err != nil {
		return Pair{}, err
	}
	p, err := s.newPair(have.Certs[0].DNSNames, have.Certs[0].IPAddresses)
	if err != nil {
		return Pair{}, err
	}
	crt, key := p.Encode()
	return p, fileaccess.For(s.env).WriteSecret(s.env.Cert(nextPair), slices.Concat(crt, key))
}

func (s *Store) newPair(dns []string, ips []net.IP) (Pair, error) {
	key, err := s.opts.Maker.Key(4096)
	if err != nil {
		return Pair{}, err
	}
	der, err := s.opts.Maker.Issue(pki.Request{
		Subject: pkix.Name{CommonName: "k8s"}, DNSNames: dns, IPs: ips, Days: caDays, ServerAuth: true, ClientAuth: true,
	}, key.Public(), nil, key)
	if err != nil {
		return Pair{}, err
	}
	cert, err := x509.ParseCertificate(der)
	return Pair{[]*x509.Certificate{cert}, key}, err
}

// ForgetNextPair removes the pair that was to come, when it is in use.
func (s *Store) ForgetNextPair() error {
	if err := os.Remove(s.env.Cert(nextPair)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
