// Package certs keeps the certificates and kubeconfigs of one node: it makes what is missing,
// issues again what no longer fits (an address came, the CA changed, the end is near), and says
// which services cannot take a new one up by themselves. It also does the work of
// `microk8s refresh-certs`: backup, undo, a new CA.
//
// Private keys are made once and kept; a new certificate is for the old key, except where the
// CA changes. Keys and the daemons' kubeconfigs are readable by root alone, certificates and
// the administrator's kubeconfig by the group of internal/fileaccess.
//
// Distribution of certificates in a cluster is left to the joining code; on a worker this
// package renews only what the node's own CA signs.
package certs

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"microk8s/internal/apiaddress"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/fileaccess"
	"microk8s/internal/hostinfo"
	"microk8s/internal/kubeconfig"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/pki"
	"microk8s/internal/snapenv"
)

// Names of certificates, as the files are called in $SNAP_DATA/certs without .crt.
const (
	CA               = "ca"
	FrontProxyCA     = "front-proxy-ca"
	Server           = "server"
	FrontProxyClient = "front-proxy-client"
	Admin            = "client"
	Kubelet          = "kubelet"
	// Datastore is the pair in the datastore's directory, called cluster.crt there.
	Datastore = "cluster"
)

// caDays is the life of a CA, and of client certificates, which kubeconfigs hold.
const caDays = 3650

// serviceAccountKey signs and verifies service account tokens; it has no certificate.
const serviceAccountKey = "serviceaccount.key"

// spec is one certificate of cli.md 6.4.
type spec struct {
	name       string
	subject    pkix.Name
	issuer     string // "" for those that sign themselves
	days       int
	server     bool   // serves TLS; clients of it check its names
	kubeconfig string // file that holds it, in credentials/
	restart    string // service that keeps using the old one until restarted
	onWorker   bool   // signed by the node's own CA even on a worker
}

func specs(hostname string) []spec {
	name := func(cn string, org ...string) pkix.Name { return pkix.Name{CommonName: cn, Organization: org} }
	return []spec{
		{name: Server, issuer: CA, days: 365, server: true, onWorker: true},
		{name: FrontProxyClient, issuer: FrontProxyCA, days: 365, server: true, onWorker: true},
		{name: "apiserver-kubelet-client", subject: name("kube-apiserver-kubelet-client", "system:masters"), issuer: CA, days: caDays, onWorker: true},
		{name: Admin, subject: name("admin", "system:masters"), issuer: CA, days: caDays, kubeconfig: "client.config"},
		{name: "controller", subject: name("system:kube-controller-manager"), issuer: CA, days: caDays, kubeconfig: "controller.config", restart: "kubelite"},
		{name: "scheduler", subject: name("system:kube-scheduler"), issuer: CA, days: caDays, kubeconfig: "scheduler.config", restart: "kubelite"},
		{name: "proxy", subject: name("system:kube-proxy"), issuer: CA, days: caDays, kubeconfig: "proxy.config", restart: "kubelite"},
		{name: Kubelet, subject: name("system:node:"+hostname, "system:nodes"), issuer: CA, days: caDays, server: true, kubeconfig: "kubelet.config", restart: "kubelite"},
	}
}

// Options are what a Store needs to know from outside; nil fields mean the real thing.
type Options struct {
	Maker     pki.Maker
	Hostname  func() (string, error) // of the host; see nodeconfig.NodeName for the node's name
	Addresses func() ([]net.IP, error)
	Log       *slog.Logger
}

// Store is the set of certificates of one node. Two processes may not change it at the same
// time; the callers are the installer, refresh-certs and the cluster agent.
type Store struct {
	env  snapenv.Env
	opts Options

	mu      sync.Mutex // one change at a time in this process
	between func()     // called in tests between files that are replaced together
}

// New returns the Store of env.
func New(env snapenv.Env, opts Options) *Store {
	if opts.Hostname == nil {
		opts.Hostname = hostinfo.Hostname
	}
	if opts.Addresses == nil {
		opts.Addresses = hostinfo.Addresses
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	return &Store{env: env, opts: opts}
}

// nodeName is in certificates of the kubelet. While the host has another name than the one under
// which the node registered, it is that one: the kubelet, which may be running, still has it.
func (s *Store) nodeName() (string, error) {
	name, err := nodeconfig.NodeName(s.env, s.opts.Hostname)
	if err != nil || nodeconfig.CheckRegistered(s.env, name) == nil {
		return name, err
	}
	return nodeconfig.RegisteredName(s.env)
}

// Change is what one run did.
type Change struct {
	Issued []string // certificates, by name
	// Restart lists the services that must be restarted to use what was issued; the others
	// read the files again by themselves.
	Restart []string
}

func (c *Change) add(s spec, mustRestart bool) {
	c.Issued = append(c.Issued, s.name)
	if mustRestart && s.restart != "" && !slices.Contains(c.Restart, s.restart) {
		c.Restart = append(c.Restart, s.restart)
	}
}

func (s *Store) crt(name string) string { return s.env.Cert(name + ".crt") }
func (s *Store) key(name string) string { return s.env.Cert(name + ".key") }

// Ensure makes what is missing and issues what is due (see [Store.Renew] for the rules). It may
// be interrupted and run again. Files that contradict each other are an error that names them,
// and stay as they are.
func (s *Store) Ensure(ctx context.Context) (Change, error) {
	if err := Finish(s.env); err != nil {
		return Change{}, err
	}
	if err := fileaccess.For(s.env).SharedDir(s.env.CertsDir()); err != nil {
		return Change{}, err
	}
	if err := fileaccess.For(s.env).SharedDir(s.env.CredentialsDir()); err != nil {
		return Change{}, err
	}
	var all errgroup.Group
	all.Go(s.ensureDatastorePair) // slowest by far: 4096 bits
	var change Change
	all.Go(func() (err error) {
		change, err = s.ensureCluster(ctx)
		return err
	})
	return change, all.Wait()
}

func (s *Store) ensureCluster(ctx context.Context) (Change, error) {
	for _, name := range []string{CA, FrontProxyCA} {
		if err := s.ensureCA(name); err != nil {
			return Change{}, err
		}
	}
	if _, err := s.ensureKey(s.env.Cert(serviceAccountKey), 2048); err != nil {
		return Change{}, err
	}
	if _, err := os.Stat(s.env.Cert("csr.conf.template")); errors.Is(err, fs.ErrNotExist) {
		if err := fileaccess.For(s.env).WriteShared(s.env.Cert("csr.conf.template"), CSRTemplate); err != nil {
			return Change{}, err
		}
	}
	return s.Renew(ctx)
}

// ensureKey reads a key, or makes it when the file is missing.
func (s *Store) ensureKey(path string, bits int) (*rsa.PrivateKey, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		key, err := s.opts.Maker.Key(bits)
		if err != nil {
			return nil, err
		}
		return key, fileaccess.For(s.env).WriteSecret(path, pki.EncodeKey(key))
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the key: %w", err)
	}
	key, err := pki.ParseKey(data)
	if err != nil {
		return nil, fmt.Errorf("cannot read the key %s: %w; restore it, or remove it to have it made again", path, err)
	}
	return key, nil
}

func readCert(path string) (*x509.Certificate, []byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read the certificate: %w", err)
	}
	cert, err := pki.ParseCert(data)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read the certificate %s: %w; restore it, or remove it to have it issued again", path, err)
	}
	return cert, data, nil
}

func (s *Store) ensureCA(name string) error {
	cert, _, err := readCert(s.crt(name))
	if err == nil {
		return s.checkCA(name, cert)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	key, err := s.ensureKey(s.key(name), 2048)
	if err != nil {
		return err
	}
	subject := pkix.Name{CommonName: FrontProxyCA}
	if name == CA {
		ips, err := serviceIPs(s.env)
		if err != nil {
			return err
		}
		subject.CommonName = ips[0].String()
	}
	der, err := s.opts.Maker.Issue(pki.Request{Subject: subject, Days: caDays, CA: true}, key.Public(), nil, key)
	if err != nil {
		return err
	}
	return fileaccess.For(s.env).WriteShared(s.crt(name), pki.EncodeCert(der))
}

// checkCA compares a CA certificate with its key. A node without the key (a worker's view of
// its cluster's CA) is in order until something has to be signed.
func (s *Store) checkCA(name string, cert *x509.Certificate) error {
	if !cert.IsCA {
		return fmt.Errorf("cannot use %s: it is not the certificate of a CA; restore it with 'microk8s refresh-certs --undo'", s.crt(name))
	}
	data, err := os.ReadFile(s.key(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot read the key: %w", err)
	}
	key, err := pki.ParseKey(data)
	if err != nil {
		return fmt.Errorf("cannot read the key %s: %w; restore it with 'microk8s refresh-certs --undo'", s.key(name), err)
	}
	if err := pki.Matches(cert, key.Public()); err != nil {
		return fmt.Errorf("cannot use %s and %s together: %w; restore the pair with 'microk8s refresh-certs --undo'", s.crt(name), s.key(name), err)
	}
	return nil
}

// ensureDatastorePair makes the certificate that the datastore's members share. It signs itself,
// and its first DNS name is the server name that members check.
func (s *Store) ensureDatastorePair() error {
	dir := s.env.BackendLive()
	crt, keyFile := storedir.Dir(dir).File(storedir.CertFile), storedir.Dir(dir).File(storedir.KeyFile)
	if !nodeconfig.Load(s.env).Datastore.Own() {
		return nil
	}
	if err := fileaccess.For(s.env).SharedDir(dir); err != nil {
		return err
	}
	cert, _, err := readCert(crt)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err == nil {
		if _, err := os.Stat(keyFile); errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cannot use %s: its key %s is missing; restore it from another member, or remove the certificate on a node without a cluster", crt, keyFile)
		}
	}
	key, err2 := s.ensureKey(keyFile, 4096)
	if err2 != nil {
		return err2
	}
	if err == nil {
		if err := pki.Matches(cert, key.Public()); err != nil {
			return fmt.Errorf("cannot use %s and %s together: %w; restore the pair from another member", crt, keyFile, err)
		}
		return nil
	}
	hostname, err := s.nodeName()
	if err != nil {
		return err
	}
	der, err := s.opts.Maker.Issue(pki.Request{
		Subject: pkix.Name{CommonName: "k8s"}, DNSNames: []string{hostname}, IPs: []net.IP{net.IPv4(127, 0, 0, 1)},
		Days: caDays, ServerAuth: true, ClientAuth: true,
	}, key.Public(), nil, key)
	if err != nil {
		return err
	}
	return fileaccess.For(s.env).WriteShared(crt, pki.EncodeCert(der))
}

// Renew issues again each certificate that is missing, is not signed by the present CA, lacks a
// name or address it should have, or has passed two thirds of its life, and rewrites kubeconfigs
// that hold another one. While the lock no-cert-reissue is there, addresses alone are no reason.
func (s *Store) Renew(ctx context.Context) (Change, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var change Change
	if err := Finish(s.env); err != nil {
		return change, err
	}
	want, err := s.names()
	if err != nil {
		return change, err
	}
	hostname, err := s.nodeName()
	if err != nil {
		return change, err
	}
	for _, sp := range specs(hostname) {
		if err := ctx.Err(); err != nil {
			return change, err
		}
		if nodeconfig.ReadState(s.env).Worker && !sp.onWorker {
			continue
		}
		why, expiry, err := s.reason(sp, want[sp.name])
		if err != nil {
			return change, err
		}
		if why != "" {
			if err := s.issue(sp, want[sp.name]); err != nil {
				return change, err
			}
			s.opts.Log.Info("issued a certificate", "name", sp.name, "reason", why)
			change.add(sp, expiry)
		}
		if err := s.writeKubeconfig(sp); err != nil {
			return change, err
		}
	}
	return change, s.writeChanged(s.env.Cert("csr.conf"), want[Server].rendered)
}

// writeChanged writes only if the content differs, so that watchers do not fire.
func (s *Store) writeChanged(path string, data []byte) error {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, data) {
		return nil
	}
	return fileaccess.For(s.env).WriteShared(path, data)
}

// wanted is the subject, names and addresses that a serving certificate must have.
type wanted struct {
	csr
	rendered []byte
	written  csr // the part that people have written into csr.conf.template
}

// names renders csr.conf.template for this machine, and lists what each serving
// certificate must carry.
func (s *Store) names() (map[string]wanted, error) {
	path := s.env.Cert("csr.conf.template")
	template, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		template = CSRTemplate
	} else if err != nil {
		return nil, fmt.Errorf("cannot read the names for certificates: %w", err)
	}
	services, err := serviceIPs(s.env)
	if err != nil {
		return nil, err
	}
	addresses, err := s.opts.Addresses()
	if err != nil {
		return nil, err
	}
	// The API's address is named like one of the template's, whether it is on this host now or not; the kubelet has no
	// part in it.
	addresses, shared := apiaddress.Apart(s.env, addresses)
	written, err := parseCSR(template)
	if err != nil {
		return nil, fmt.Errorf("cannot use %s: %w", path, err)
	}
	rendered, err := renderCSR(template, slices.Concat(services, addresses, shared))
	if err != nil {
		return nil, fmt.Errorf("cannot use %s: %w", path, err)
	}
	if err := s.writeChanged(s.env.Cert("csr.conf.rendered"), rendered); err != nil {
		return nil, err
	}
	server, err := parseCSR(rendered)
	if err != nil {
		return nil, fmt.Errorf("cannot use %s: %w", path, err)
	}
	for _, ip := range append([]net.IP{net.IPv4(127, 0, 0, 1)}, services...) { // without these nothing works
		if !slices.ContainsFunc(server.ips, ip.Equal) {
			server.ips = append(server.ips, ip)
		}
	}
	hostname, err := s.nodeName()
	if err != nil {
		return nil, err
	}
	front, frontWritten := server, written
	written.ips = slices.Concat(written.ips, shared)
	front.subject = pkix.Name{CommonName: FrontProxyClient}
	frontWritten.subject = front.subject
	node := pkix.Name{CommonName: "system:node:" + hostname, Organization: []string{"system:nodes"}}
	return map[string]wanted{
		Server:           {csr: server, rendered: rendered, written: written},
		FrontProxyClient: {csr: front, written: frontWritten},
		Kubelet: {
			csr:     csr{subject: node, dns: []string{hostname}, ips: append([]net.IP{net.IPv4(127, 0, 0, 1)}, addresses...)},
			written: csr{subject: node},
		},
	}, nil
}

// reason says why a certificate must be issued, "" if it need not. old is true when programs
// that hold the present one must let go of it.
func (s *Store) reason(sp spec, want wanted) (why string, old bool, err error) {
	cert, _, err := readCert(s.crt(sp.name))
	if errors.Is(err, fs.ErrNotExist) {
		return "it is missing", true, nil
	}
	if err != nil {
		return "", false, err
	}
	keyData, err := os.ReadFile(s.key(sp.name))
	if errors.Is(err, fs.ErrNotExist) {
		return "its key is missing", true, nil
	}
	if err != nil {
		return "", false, fmt.Errorf("cannot read the key: %w", err)
	}
	key, err := pki.ParseKey(keyData)
	if err != nil {
		return "", false, fmt.Errorf("cannot read the key %s: %w; restore it, or remove it to have it made again", s.key(sp.name), err)
	}
	if err := pki.Matches(cert, key.Public()); err != nil {
		return "", false, fmt.Errorf("cannot use %s and %s together: %w; restore the right one, or remove the certificate to have it issued again",
			s.crt(sp.name), s.key(sp.name), err)
	}
	ca, _, err := readCert(s.crt(sp.issuer))
	if err != nil {
		return "", false, err
	}
	if err := pki.IssuedBy(cert, ca); err != nil {
		return err.Error(), true, nil
	}
	now := s.opts.Maker.Time()
	if !now.Before(pki.RenewalTime(cert)) && cert.NotAfter.Before(ca.NotAfter) {
		return "it ends on " + cert.NotAfter.Format(time.DateOnly), true, nil
	}
	if sp.server {
		// A member of a cluster does not follow its addresses, but does follow what people write.
		needed := want.csr
		if nodeconfig.ReadState(s.env).Clustered {
			needed = want.written
		}
		if cert.Subject.CommonName != needed.subject.CommonName {
			return "the name " + needed.subject.CommonName + " is to be its subject", true, nil
		}
		if missing := needed.missingFrom(cert); missing != "" {
			return missing + " is to be added to it", false, nil
		}
		if sp.name == Server && s.nameRemoved(want) {
			return "a name was removed from csr.conf.template", false, nil
		}
	}
	return "", false, nil
}

// missingFrom names something that the certificate should carry and does not.
func (c csr) missingFrom(cert *x509.Certificate) string {
	for _, name := range c.dns {
		if !slices.Contains(cert.DNSNames, name) {
			return name
		}
	}
	for _, ip := range c.ips {
		if !slices.ContainsFunc(cert.IPAddresses, ip.Equal) {
			return ip.String()
		}
	}
	return ""
}

// nameRemoved compares with the request configuration used last. Addresses that went away are
// no reason for a new certificate: interfaces come and go.
func (s *Store) nameRemoved(want wanted) bool {
	text, err := os.ReadFile(s.env.Cert("csr.conf"))
	if err != nil {
		return false
	}
	last, err := parseCSR(text)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(last.dns, func(name string) bool { return !slices.Contains(want.dns, name) })
}

func (s *Store) issue(sp spec, want wanted) error {
	ca, _, err := readCert(s.crt(sp.issuer))
	if err != nil {
		return err
	}
	caKeyData, err := os.ReadFile(s.key(sp.issuer))
	if err != nil {
		return fmt.Errorf("cannot issue %s.crt: the CA's key is needed: %w", sp.name, err)
	}
	caKey, err := pki.ParseKey(caKeyData)
	if err != nil {
		return fmt.Errorf("cannot read the key %s: %w", s.key(sp.issuer), err)
	}
	key, err := s.ensureKey(s.key(sp.name), 2048)
	if err != nil {
		return err
	}
	der, err := s.opts.Maker.Issue(request(sp, want), key.Public(), ca, caKey)
	if err != nil {
		return err
	}
	return fileaccess.For(s.env).WriteShared(s.crt(sp.name), pki.EncodeCert(der))
}

// writeKubeconfig rewrites the file of sp if it is missing or holds another certificate, CA or
// address.
func (s *Store) writeKubeconfig(sp spec) error {
	if sp.kubeconfig == "" {
		return nil
	}
	want := kubeconfig.Config{Server: kubeconfig.LocalServer(nodeconfig.Load(s.env).APIServer.Port), User: sp.subject.CommonName}
	for path, to := range map[string]*[]byte{s.crt(CA): &want.CA, s.crt(sp.name): &want.Cert, s.key(sp.name): &want.Key} {
		data, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("cannot make %s: %w", sp.kubeconfig, err)
		}
		*to = data
	}
	path := s.env.Credential(sp.kubeconfig)
	if old, err := os.ReadFile(path); err == nil {
		have, err := kubeconfig.Decode(old)
		if err == nil && have.User == want.User && have.Server == want.Server && bytes.Equal(have.CA, want.CA) &&
			bytes.Equal(have.Cert, want.Cert) && bytes.Equal(have.Key, want.Key) {
			return nil
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot read the kubeconfig: %w", err)
	}
	data, err := want.Encode()
	if err != nil {
		return err
	}
	if sp.name == Admin {
		return fileaccess.For(s.env).WriteShared(path, data)
	}
	return fileaccess.For(s.env).WriteSecret(path, data)
}

// NextRenewal is when the first certificate becomes due; the zero time if none can be read.
func (s *Store) NextRenewal() time.Time {
	hostname, err := s.nodeName()
	if err != nil {
		return time.Time{}
	}
	var next time.Time
	for _, sp := range specs(hostname) {
		if nodeconfig.ReadState(s.env).Worker && !sp.onWorker {
			continue
		}
		cert, _, err := readCert(s.crt(sp.name))
		if err != nil {
			continue
		}
		if at := pki.RenewalTime(cert); next.IsZero() || at.Before(next) {
			next = at
		}
	}
	return next
}
