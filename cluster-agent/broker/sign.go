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
	"time"

	corev1 "k8s.io/api/core/v1"
	k8sasn1 "k8s.io/apimachinery/pkg/apis/asn1"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/server"
	"microk8s/internal/noderegistry"
	"microk8s/internal/pki"
	"microk8s/internal/tokenstore"
)

// Lives of certificates, in days. Upstream's workers never renew theirs. Ours do, ten days before
// the end, and afterwards too (ADR 14).
const (
	upstreamDays = 3650
	ourDays      = 30
	// lateDays is how long after its end a certificate still renews itself: a machine that was
	// switched off comes back. Whether it may is what its record says.
	lateDays = 365
)

const (
	nodePrefix = "system:node:"
	nodesGroup = "system:nodes"
	proxyUser  = "system:kube-proxy"
	// proxyGroup, with the node's name behind it, says whose kube-proxy it is, so that its certificate
	// ends with the node.
	proxyGroup = "microk8s:node:"
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
	var names names
	hold, err := c.b.Tokens.Sign(c.r.Context(), t, kubelet, name, func(h tokenstore.Hold) error {
		if csrErr != nil {
			return csrErr
		}
		var err error
		names, err = c.b.allowed(c.r.Context(), csr, kubelet, h.Name)
		if err == nil && len(names.refused) > 0 {
			err = refuse("%s", names.refused[0])
		}
		return err
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
	cert, err := c.issue(csr, names, identity{node: hold.Name, join: hold.Join, kubelet: kubelet}, days)
	if err != nil {
		return nil, err
	}
	if kubelet && !hold.Ours { // this spent the token: nothing more will be heard of this join
		if err := c.b.registered(c.r.Context(), hold); err != nil {
			return nil, err
		}
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
	if err := csr.CheckSignature(); err != nil {
		return nil, refuse("the request is not signed with its own key: %v", err)
	}
	if key, ok := csr.PublicKey.(*rsa.PublicKey); ok && key.N.BitLen() < 2048 {
		return nil, refuse("a key of %d bits is too short; 2048 are needed", key.N.BitLen())
	}
	return csr, nil
}

// names are those that a certificate may have, and why others that were asked for may not.
type names struct {
	dns     []string
	ips     []net.IP
	refused []string
}

// allowed decides what this node may have of what the request asks for (cluster-agent.md 8, W6):
// its own identity, or the one that all kube-proxies share, and no names of others. A wrong identity
// is an error; names are left out.
func (b *Broker) allowed(ctx context.Context, csr *x509.CertificateRequest, kubelet bool, node string) (names, error) {
	want := pkix.Name{CommonName: proxyUser}
	if kubelet {
		want = pkix.Name{CommonName: nodePrefix + node, Organization: []string{nodesGroup}}
	}
	if !sameName(csr.Subject, want) {
		return names{}, refuse("the subject %q is not that of this node, %q", shorten(csr.Subject.String()), want.String())
	}
	if len(csr.EmailAddresses)+len(csr.URIs) > 0 || !kubelet && len(csr.DNSNames)+len(csr.IPAddresses) > 0 {
		return names{}, refuse("the request has names that this certificate cannot have")
	}
	var out names
	leaveOut := func(format string, a ...any) { out.refused = append(out.refused, fmt.Sprintf(format, a...)) }
	for _, name := range csr.DNSNames {
		if !strings.EqualFold(name, node) {
			leaveOut("the name %q is not that of this node", shorten(name))
			continue
		}
		whose, err := b.nameOf(ctx, name, true)
		if err != nil {
			return names{}, err
		}
		if whose != "" { // a node that was let in before this was looked at keeps its identity, and serves under no name
			leaveOut("the name %q is that of %s", name, whose)
			continue
		}
		out.dns = append(out.dns, name)
	}
	if len(csr.IPAddresses) == 0 {
		return out, nil
	}
	taken, err := b.taken(ctx, node)
	if err != nil {
		return names{}, err
	}
	pods := b.config().ClusterCIDRs
	for _, ip := range csr.IPAddresses {
		a, ok := netip.AddrFromSlice(ip)
		a = a.Unmap()
		switch {
		case !ok || !a.IsGlobalUnicast() && !a.IsLinkLocalUnicast():
			leaveOut("the address %s is not one of a node", ip)
		case slices.ContainsFunc(pods, func(p netip.Prefix) bool { return p.Contains(a) }): // upstream's workers ask for those of their pod network too
			b.Log.Info("left an address of a pod out of a certificate", "node", node, "address", a.String())
		default:
			if whose := taken(a); whose != "" {
				leaveOut("the address %s is that of %s", a, whose)
				continue
			}
			out.ips = append(out.ips, ip)
		}
	}
	return out, nil
}

// sameName compares a subject attribute by attribute; x509 keeps the unknown ones in Names.
func sameName(got, want pkix.Name) bool {
	return got.CommonName == want.CommonName && slices.Equal(got.Organization, want.Organization) &&
		len(got.Names) == 1+len(want.Organization) && len(got.ExtraNames) == 0
}

// taken returns a function that says whose an address is, other than the node's.
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
	if servers, err := b.Cluster.APIServers(ctx); err == nil {
		for _, a := range servers {
			if !mine[a.Unmap()] {
				whose[a.Unmap()] = "an API server"
			}
		}
	}
	if cert := b.serving(); cert != nil { // with the virtual addresses that were added
		for _, ip := range cert.IPAddresses {
			if a, ok := netip.AddrFromSlice(ip); ok && !mine[a.Unmap()] {
				whose[a.Unmap()] = "the API server"
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

// identity is for whom a certificate is.
type identity struct {
	node    string
	join    string // in the subject's UID, so that a node that joins again is another; "" for nodes from before there were records
	kubelet bool   // or the proxy
}

func (i identity) subject() pkix.Name {
	name := pkix.Name{CommonName: nodePrefix + i.node, Organization: []string{nodesGroup}}
	if !i.kubelet {
		name = pkix.Name{CommonName: proxyUser, Organization: []string{proxyGroup + i.node}}
	}
	if i.join != "" {
		name.ExtraNames = []pkix.AttributeTypeAndValue{{Type: k8sasn1.X509UID(), Value: i.join}}
	}
	return name
}

// joinOf reads the join from a certificate; "" where it has none.
func joinOf(cert *x509.Certificate) string {
	for _, n := range cert.Subject.Names {
		if n.Type.Equal(k8sasn1.X509UID()) {
			text, _ := n.Value.(string)
			return text
		}
	}
	return ""
}

// issue signs. What the certificate says is what was allowed, not what the request holds
// beside it.
func (c *call) issue(csr *x509.CertificateRequest, n names, who identity, days int) (string, error) {
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
	req := pki.Request{Subject: who.subject(), Days: days, ClientAuth: true}
	if who.kubelet {
		req.ServerAuth, req.DNSNames, req.IPs = true, n.dns, n.ips
	}
	der, err := c.b.Maker.Issue(req, csr.PublicKey, ca, key)
	if err != nil {
		return failed(err)
	}
	c.note("subject", req.Subject.CommonName, "names", len(req.DNSNames)+len(req.IPs), "days", days)
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
	cert, node, err := b.clientNode(c.r)
	if err != nil {
		return nil, err
	}
	c.note("node", node)
	record, err := c.member(cert, node, req)
	if err != nil {
		return nil, err
	}
	answer := &api.RenewResponse{Secrets: 2}
	for _, one := range []struct {
		text    string
		kubelet bool
		to      *string
	}{{req.Kubelet, true, &answer.Kubelet}, {req.Proxy, false, &answer.Proxy}} {
		if one.text == "" {
			continue
		}
		csr, err := parseCSR(one.text)
		var n names
		if err == nil {
			n, err = b.allowed(ctx, csr, one.kubelet, node)
		}
		if err != nil {
			return nil, fail(http.StatusInternalServerError, api.CodeCertificate, "Failed to sign certificate: %v", err)
		}
		answer.Refused = append(answer.Refused, n.refused...)
		if *one.to, err = c.issue(csr, n, identity{node: node, join: record.Join, kubelet: one.kubelet}, ourDays); err != nil {
			return nil, err
		}
	}
	if !record.Pending() {
		key, err := b.Cluster.CallbackKey(ctx)
		if err != nil {
			return nil, internal("Could not retrieve self callback token", err)
		}
		answer.CallbackToken, answer.LegacyCallback = key.Secret(*record), key.Legacy(node)
		if req.Secrets < 2 && answer.LegacyCallback != "" { // it takes one only: that which all callers know
			answer.CallbackToken, answer.LegacyCallback = answer.LegacyCallback, ""
		}
	}
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

// member finds the record of a node that shows its certificate. A certificate of an earlier join
// under the same name, and one whose node was removed, are refused at once.
func (c *call) member(cert *x509.Certificate, node string, req api.RenewRequest) (*noderegistry.Record, error) {
	ctx, b := c.r.Context(), c.b
	unavailable := func(err error) error {
		return fail(http.StatusServiceUnavailable, api.CodeUnavailable, "the API server of this node does not answer now, try again: %v", err)
	}
	gone := fail(http.StatusUnauthorized, api.CodeCertificate, "the node %s is no longer in the cluster; let it leave, and join again", node)
	record, err := b.Nodes.Get(ctx, node)
	if errors.Is(err, noderegistry.ErrNone) {
		complete, err := b.Nodes.Complete(ctx)
		if err != nil {
			return nil, unavailable(err)
		}
		if complete {
			return nil, gone
		}
		// A control-plane node of the build before has let it in, or nobody has made the records yet.
		nodes, err := b.Cluster.Nodes(ctx)
		if err != nil {
			return nil, unavailable(err)
		}
		if !slices.ContainsFunc(nodes, func(n corev1.Node) bool { return n.Name == node }) {
			return nil, gone
		}
		record = &noderegistry.Record{Name: node, Role: noderegistry.Worker, Secrets: req.Secrets}
		return record, nil
	}
	if err != nil {
		return nil, unavailable(err)
	}
	// Control-plane nodes make their own certificates; one of theirs is not renewed here.
	if record.Join != joinOf(cert) || record.Role != noderegistry.Worker {
		return nil, gone
	}
	late := record.Pending() && b.Now().After(record.Until) // it is in, and could not say so
	if late || req.Secrets >= 2 && record.Secrets < 2 {
		err := b.Nodes.Change(ctx, node, func(r *noderegistry.Record) error {
			if r.Join != record.Join {
				return gone
			}
			r.Secrets = max(r.Secrets, min(req.Secrets, 2))
			if late {
				r.Until = time.Time{}
			}
			*record = *r
			return nil
		})
		if err != nil {
			return nil, unavailable(err)
		}
	}
	if late {
		if err := b.Tokens.Settle(ctx, record.Join); err != nil {
			return nil, unavailable(err)
		}
	}
	return record, nil
}

// clientNode returns the certificate that the connection showed, and the node whose it is.
func (b *Broker) clientNode(r *http.Request) (*x509.Certificate, string, error) {
	unknown := fail(http.StatusUnauthorized, api.CodeCertificate, "a certificate of a node of this cluster is needed")
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return nil, "", unknown
	}
	cert := r.TLS.PeerCertificates[0]
	caText, err := os.ReadFile(b.Env.Cert("ca.crt"))
	if err != nil {
		return nil, "", internal("Failed reading cluster CA", err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(caText)
	at := b.Now()
	if at.After(cert.NotAfter) && at.Before(cert.NotAfter.AddDate(0, 0, lateDays)) {
		at = cert.NotAfter
	}
	opts := x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, CurrentTime: at}
	if _, err := cert.Verify(opts); err != nil {
		return nil, "", unknown
	}
	node, ok := strings.CutPrefix(cert.Subject.CommonName, nodePrefix)
	if !ok || !slices.Contains(cert.Subject.Organization, nodesGroup) {
		return nil, "", unknown
	}
	return cert, node, nil
}
