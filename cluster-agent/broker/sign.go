package broker

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/server"
	"microk8s/internal/defence"
	"microk8s/internal/pki"
	"microk8s/internal/token"
	"microk8s/internal/tokenstore"
)

// Lives of certificates, in days. Upstream's workers never renew theirs; ours do, long before.
const (
	upstreamDays = 3650
	ourDays      = 365
)

const (
	nodePrefix = "system:node:"
	nodesGroup = "system:nodes"
	proxyUser  = "system:kube-proxy"
)

// sign gives a worker that joins its certificates, one of each kind for each join request.
func (b *Broker) sign(w http.ResponseWriter, r *http.Request) {
	var req api.SignRequest
	if !server.ReadJSON(w, r, &req) {
		return
	}
	c := b.begin(w, r, "sign-cert")
	answer, err := c.sign(req)
	c.end(answer, err)
}

func (c *call) sign(req api.SignRequest) (*api.SignResponse, error) {
	text := strings.TrimSpace(req.Token)
	base, kubelet := strings.CutSuffix(text, api.SuffixKubelet)
	if !kubelet {
		var proxy bool
		if base, proxy = strings.CutSuffix(text, api.SuffixProxy); !proxy {
			if err := c.busy(); err != nil {
				return nil, err
			}
			return nil, c.tokenFailure(tokenstore.ErrUnknown)
		}
	}
	t, err := c.token(base)
	if err != nil {
		return nil, err
	}
	csr, csrErr := parseCSR(req.Request)
	name := ""
	if csrErr == nil && kubelet {
		name = strings.TrimPrefix(csr.Subject.CommonName, nodePrefix)
	}
	hold, err := c.b.Tokens.Sign(c.r.Context(), t, kubelet, name, func(h tokenstore.Hold) error {
		if csrErr != nil {
			return csrErr
		}
		return c.b.allowed(c.r.Context(), csr, kubelet, h.Name)
	})
	c.note("kubelet", kubelet, "node", hold.Name)
	var refused *refusal
	switch {
	case errors.As(err, &refused):
		return nil, fail(http.StatusInternalServerError, api.CodeCertificate, "Failed to sign certificate: %v", refused)
	case err != nil:
		return nil, c.tokenFailure(err)
	}
	days := upstreamDays
	if hold.Ours {
		days = ourDays
	}
	cert, err := c.issue(csr, kubelet, hold.Name, days)
	if err != nil {
		return nil, err
	}
	if kubelet && !hold.Ours { // this spent the token: nothing more will be heard of this join
		if err := c.b.clustered(); err != nil {
			return nil, err
		}
	}
	return &api.SignResponse{Certificate: cert}, nil
}

// refusal is why a request is not answered with a certificate.
type refusal struct{ what string }

func (r *refusal) Error() string { return r.what }

func refuse(format string, a ...any) error { return &refusal{fmt.Sprintf(format, a...)} }

// parseCSR reads a request in PEM and checks that its sender has the key.
func parseCSR(text string) (*x509.CertificateRequest, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST" {
		return nil, refuse("there is no PEM certificate request")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, refuse("the request cannot be read: %v", err)
	}
	if err := csr.CheckSignature(); err != nil && defence.On(defence.CSRSignature) {
		return nil, refuse("the request is not signed with its own key: %v", err)
	}
	if key, ok := csr.PublicKey.(*rsa.PublicKey); ok && key.N.BitLen() < 2048 {
		return nil, refuse("a key of %d bits is too short; 2048 are needed", key.N.BitLen())
	}
	return csr, nil
}

// allowed says whether this node may have what the request asks for (cluster-agent.md 8, W6):
// its own identity, or the one that all kube-proxies share, and no names of others.
func (b *Broker) allowed(ctx context.Context, csr *x509.CertificateRequest, kubelet bool, node string) error {
	want := pkix.Name{CommonName: proxyUser}
	if kubelet {
		want = pkix.Name{CommonName: nodePrefix + node, Organization: []string{nodesGroup}}
	}
	if defence.On(defence.CSRSubject) && !sameName(csr.Subject, want) {
		return refuse("the subject %q is not that of this node, %q", shorten(csr.Subject.String()), want.String())
	}
	if !defence.On(defence.CSRNames) {
		return nil
	}
	if len(csr.EmailAddresses)+len(csr.URIs) > 0 || !kubelet && len(csr.DNSNames)+len(csr.IPAddresses) > 0 {
		return refuse("the request has names that this certificate cannot have")
	}
	for _, name := range csr.DNSNames {
		if !strings.EqualFold(name, node) {
			return refuse("the name %q is not that of this node", shorten(name))
		}
	}
	if len(csr.IPAddresses) == 0 {
		return nil
	}
	taken, err := b.taken(ctx, node)
	if err != nil {
		return err
	}
	for _, ip := range csr.IPAddresses {
		a, ok := netip.AddrFromSlice(ip)
		if a = a.Unmap(); !ok || !a.IsGlobalUnicast() && !a.IsLinkLocalUnicast() {
			return refuse("the address %s is not one of a node", ip)
		}
		if whose := taken(a); whose != "" {
			return refuse("the address %s is that of %s", a, whose)
		}
	}
	return nil
}

// sameName compares a subject attribute by attribute; x509 keeps the unknown ones in Names.
func sameName(got, want pkix.Name) bool {
	return got.CommonName == want.CommonName && slices.Equal(got.Organization, want.Organization) &&
		len(got.Names) == 1+len(want.Organization) && len(got.ExtraNames) == 0
}

// taken gives a function that says whose an address is, other than the node's.
func (b *Broker) taken(ctx context.Context, node string) (func(netip.Addr) string, error) {
	whose := map[netip.Addr]string{}
	nodes, err := b.Cluster.Nodes(ctx)
	if err != nil {
		return nil, fail(http.StatusServiceUnavailable, api.CodeUnavailable, "the API server of this node does not answer now, try again: %v", err)
	}
	mine := map[netip.Addr]bool{}
	for _, n := range nodes {
		for _, a := range addresses(n) {
			if n.Name == node {
				mine[a] = true
			} else {
				whose[a] = "the node " + n.Name
			}
		}
	}
	if members, err := b.Members(); err == nil {
		for _, m := range members {
			if ap, err := netip.ParseAddrPort(m.Address); err == nil && !mine[ap.Addr().Unmap()] {
				whose[ap.Addr().Unmap()] = "a control plane node"
			}
		}
	}
	services := b.config().APIServer.ServiceCIDRs
	return func(a netip.Addr) string {
		for _, p := range services {
			if p.Contains(a) {
				return "a Service"
			}
		}
		return whose[a]
	}, nil
}

// issue signs. What the certificate says is what was allowed, not what the request holds
// beside it.
func (c *call) issue(csr *x509.CertificateRequest, kubelet bool, node string, days int) (string, error) {
	failed := func(err error) (string, error) { return "", internal("Failed to sign certificate", err) }
	caText, err := os.ReadFile(c.b.Env.Cert("ca.crt"))
	if err != nil {
		return failed(err)
	}
	ca, err := pki.ParseCert(caText)
	if err != nil {
		return failed(err)
	}
	keyText, err := os.ReadFile(c.b.Env.Cert("ca.key"))
	if err != nil {
		return failed(err)
	}
	key, err := pki.ParseKey(keyText)
	if err != nil {
		return failed(err)
	}
	req := pki.Request{Subject: pkix.Name{CommonName: proxyUser}, Days: days, ClientAuth: true}
	if kubelet {
		req = pki.Request{
			Subject: pkix.Name{CommonName: nodePrefix + node, Organization: []string{nodesGroup}}, Days: days,
			ClientAuth: true, ServerAuth: true, DNSNames: csr.DNSNames, IPs: csr.IPAddresses,
		}
	}
	if !defence.On(defence.CSRSubject) {
		req.Subject = csr.Subject
	}
	if !defence.On(defence.CSRNames) {
		req.DNSNames, req.IPs = csr.DNSNames, csr.IPAddresses
	}
	der, err := c.b.Maker.Issue(req, csr.PublicKey, ca, key)
	if err != nil {
		return failed(err)
	}
	c.note("subject", req.Subject.String(), "names", len(req.DNSNames)+len(req.IPs), "days", days)
	return string(pki.EncodeCert(der)), nil
}

// renew gives a node of the cluster new certificates, its callback secret and the list of API
// servers. It shows who it is with the kubelet's present certificate.
func (b *Broker) renew(w http.ResponseWriter, r *http.Request) {
	var req api.RenewRequest
	if !server.ReadJSON(w, r, &req) {
		return
	}
	c := b.begin(w, r, "renew")
	answer, err := c.renew(req)
	c.end(answer, err)
}

func (c *call) renew(req api.RenewRequest) (*api.RenewResponse, error) {
	ctx, b := c.r.Context(), c.b
	node, err := b.clientNode(c.r)
	if err != nil {
		return nil, err
	}
	c.note("node", node)
	nodes, err := b.Cluster.Nodes(ctx)
	if err != nil {
		return nil, fail(http.StatusServiceUnavailable, api.CodeUnavailable, "the API server of this node does not answer now, try again: %v", err)
	}
	known := false
	for _, n := range nodes {
		known = known || n.Name == node
	}
	if !known && defence.On(defence.Member) {
		return nil, fail(http.StatusUnauthorized, api.CodeCertificate, "the node %s is not in the cluster any more", node)
	}
	answer := &api.RenewResponse{}
	for _, one := range []struct {
		text    string
		kubelet bool
		to      *string
	}{{req.Kubelet, true, &answer.Kubelet}, {req.Proxy, false, &answer.Proxy}} {
		if one.text == "" {
			continue
		}
		csr, err := parseCSR(one.text)
		if err == nil {
			err = b.allowed(ctx, csr, one.kubelet, node)
		}
		if err != nil {
			return nil, fail(http.StatusInternalServerError, api.CodeCertificate, "Failed to sign certificate: %v", err)
		}
		if *one.to, err = c.issue(csr, one.kubelet, node, ourDays); err != nil {
			return nil, err
		}
	}
	key, err := b.Cluster.CallbackKey(ctx)
	if err != nil {
		return nil, internal("Could not retrieve self callback token", err)
	}
	answer.CallbackToken = token.Callback(key, node)
	j := &joining{}
	if local, ok := ctx.Value(http.LocalAddrContextKey).(net.Addr); ok {
		if ap, err := netip.ParseAddrPort(local.String()); err == nil {
			j.local = ap.Addr().Unmap().WithZone("")
		}
	}
	servers, err := b.controlPlane(ctx, j)
	if err != nil {
		return nil, internal("Failed to retrieve list of control plane nodes", err)
	}
	for _, a := range servers {
		answer.APIServers = append(answer.APIServers, net.JoinHostPort(a.String(), b.apiPort()))
	}
	return answer, nil
}

// clientNode gives the node whose certificate the connection showed.
func (b *Broker) clientNode(r *http.Request) (string, error) {
	unknown := fail(http.StatusUnauthorized, api.CodeCertificate, "a certificate of a node of this cluster is needed")
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return "", unknown
	}
	cert := r.TLS.PeerCertificates[0]
	caText, err := os.ReadFile(b.Env.Cert("ca.crt"))
	if err != nil {
		return "", internal("Failed reading cluster CA", err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(caText)
	opts := x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, CurrentTime: b.Now()}
	if _, err := cert.Verify(opts); err != nil && defence.On(defence.ClientCert) {
		return "", unknown
	}
	node, ok := strings.CutPrefix(cert.Subject.CommonName, nodePrefix)
	if !ok || !slices.Contains(cert.Subject.Organization, nodesGroup) {
		return "", unknown
	}
	return node, nil
}
