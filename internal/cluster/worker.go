package cluster

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"

	"microk8s/apiserver-proxy/config"
	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/client"
	"microk8s/internal/fileaccess"
	"microk8s/internal/pki"
	"microk8s/internal/snapenv"
)

// remoteCA is a worker's copy of the cluster's CA.
const remoteCA = "ca.remote.crt"

// Labels of a worker's Node object (cli.md 3.4).
const (
	workerLabel  = "node.kubernetes.io/microk8s-worker"
	workerLabels = "microk8s.io/cluster=true," + workerLabel + "=microk8s-worker"
)

// signed has the certificates of a worker's kubelet and kube-proxy signed, with new keys.
func (s *joinRun) signed(ctx context.Context, c *client.Client, a *answer) error {
	key, csr, err := s.certificateRequest(pkix.Name{CommonName: "system:kube-proxy"}, nil, nil)
	if err != nil {
		return err
	}
	cert, err := sign(ctx, c, "proxy", api.SuffixProxy, csr)
	if err != nil {
		return err
	}
	a.ProxyKey, a.ProxyCert = key, cert
	ips, err := s.Addresses()
	if err != nil {
		return err
	}
	key, csr, err = s.certificateRequest(kubeletName(s.Self), []string{s.Self}, ips)
	if err != nil {
		return err
	}
	if cert, err = sign(ctx, c, "kubelet", api.SuffixKubelet, csr); err != nil {
		return err
	}
	a.KubeletKey, a.KubeletCert = key, cert
	return nil
}

func kubeletName(hostname string) pkix.Name {
	return pkix.Name{CommonName: "system:node:" + hostname, Organization: []string{"system:nodes"}}
}

func sign(ctx context.Context, c *client.Client, name, suffix string, csr []byte) (string, error) {
	cert, err := c.Sign(ctx, suffix, csr)
	if err == nil {
		_, err = pki.ParseCert(cert)
	}
	var refused *client.ServerError
	if errors.As(err, &refused) {
		return "", fmt.Errorf("Failed to sign %s certificate (%d). %s", name, refused.Status, refused.Text) //nolint:staticcheck // upstream's text
	}
	if err != nil {
		return "", fmt.Errorf("cannot have the certificate of %s signed: %w", name, err)
	}
	return string(cert), nil
}

// certificateRequest makes a key and a request for it, both in PEM.
func (n *Node) certificateRequest(subject pkix.Name, dns []string, ips []net.IP) (key string, csr []byte, err error) {
	k, err := n.Maker.Key(2048)
	if err != nil {
		return "", nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: subject, DNSNames: dns, IPAddresses: ips}, k)
	if err != nil {
		return "", nil, fmt.Errorf("cannot make a certificate request: %w", err)
	}
	return string(pki.EncodeKey(k)), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

// workerArgs sets arguments, locks and the proxy's configuration.
func (s *joinRun) workerArgs(context.Context) error {
	a, err := s.answer()
	if err != nil {
		return err
	}
	if err := s.sameNetwork(a); err != nil {
		return err
	}
	err = s.kubeletArgs(a, map[string]string{"client-ca-file": "${SNAP_DATA}/certs/" + remoteCA, "node-labels": workerLabels})
	if err != nil {
		return err
	}
	if err := s.editArgs("kube-proxy", map[string]string{"master": "", "hostname-override": ""}); err != nil {
		return err
	}
	if err := config.Install(s.Env, a.apiServers()); err != nil {
		return err
	}
	if err := s.lock(snapenv.LockWorker, snapenv.LockNoDqlite, snapenv.LockNoReissue); err != nil {
		return err
	}
	return s.unlock(snapenv.LockNoProxy, snapenv.LockLowMemory)
}

// workerCerts writes what a worker holds of the cluster: its CA's certificate, and what the
// kubelet and kube-proxy need.
func (s *joinRun) workerCerts(context.Context) error {
	a, err := s.answer()
	if err != nil {
		return err
	}
	files := fileaccess.For(s.Env)
	for name, text := range map[string]string{remoteCA: a.CA, "kubelet.crt": a.KubeletCert, "proxy.crt": a.ProxyCert} {
		if err := files.WriteShared(s.Env.Cert(name), []byte(text)); err != nil {
			return err
		}
	}
	for path, text := range map[string]string{
		s.Env.Cert("kubelet.key"): a.KubeletKey, s.Env.Cert("proxy.key"): a.ProxyKey,
	} {
		if err := files.WriteSecret(path, []byte(text)); err != nil {
			return err
		}
	}
	if err := s.writeCallback(a); err != nil {
		return err
	}
	return s.workerKubeconfigs(a.CA, a.KubeletCert, a.KubeletKey, a.ProxyCert, a.ProxyKey)
}

// workerKubeconfigs point at the proxy on this node.
func (n *Node) workerKubeconfigs(ca, kubeletCert, kubeletKey, proxyCert, proxyKey string) error {
	address, err := config.ClientAddress(n.Env)
	if err != nil {
		return err
	}
	hostname, err := n.nodeName()
	if err != nil {
		return err
	}
	if err := n.kubeconfigFor("kubelet.config", "system:node:"+hostname, "https://"+address, ca, kubeletCert, kubeletKey); err != nil {
		return err
	}
	return n.kubeconfigFor("proxy.config", "system:kube-proxy", "https://"+address, ca, proxyCert, proxyKey)
}

// callbackToken is what others must show to this node's agent.
const callbackToken = "callback-token.txt"

// writeCallback keeps the callback secret. Where the cluster tells it after the join only, the one that
// this node had before goes: the agent gets its own.
func (s *joinRun) writeCallback(a *answer) error {
	path := s.Env.Credential(callbackToken)
	if a.CallbackToken != "" {
		return fileaccess.For(s.Env).WriteSecret(path, []byte(a.CallbackToken))
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
