package certs

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"microk8s/internal/datastore/storedir"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/pki"
	"microk8s/internal/snapenv"
)

// ServiceAccount is the name of the keys of service account tokens in a list.
const ServiceAccount = "serviceaccount"

// Kinds of what a list has.
const (
	KindCA          = "ca"
	KindCertificate = "certificate"
	KindKey         = "key"
)

// Listed is one certificate or key of a node, without the key itself.
type Listed struct {
	Name      string `json:"name"` // as the file is called, without its ending
	Kind      string `json:"kind"` // ca, certificate or key
	File      string `json:"file"`
	Subject   string `json:"subject,omitempty"`
	Issuer    string `json:"issuer,omitempty"`
	Expires   string `json:"expires,omitempty"` // RFC 3339; keys have no end
	ID        string `json:"id,omitempty"`      // of the public key: KeyID
	TrustedBy string `json:"trustedBy"`
	Problem   string `json:"problem,omitempty"`
}

// Inventory is what one node has.
type Inventory struct {
	Node  string   `json:"node"`
	Role  string   `json:"role"` // control-plane or worker
	Items []Listed `json:"items"`
	// Tokens are the service account tokens in the pods of this node, by the key that signed them.
	Tokens map[string]int `json:"tokens,omitempty"`
}

// KeyID names a public key: the first 16 hex digits of the SHA-256 of its PKIX form. Tokens of service
// accounts have the same digest in their header.
func KeyID(pub crypto.PublicKey) string {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:8])
}

// trusted says who trusts what a node of a cluster has.
var trusted = map[string]string{
	CA:                         "every client of the API servers; API servers, kubelets and cluster agents for their callers",
	FrontProxyCA:               "extension API servers, for calls that API servers pass on",
	Server:                     "who trusts ca: clients of the API server and of the cluster agent",
	FrontProxyClient:           "extension API servers (front-proxy-ca)",
	"apiserver-kubelet-client": "kubelets (ca)",
	Admin:                      "API servers (ca), as the administrator",
	"controller":               "API servers (ca), as the controller manager",
	"scheduler":                "API servers (ca), as the scheduler",
	"proxy":                    "API servers (ca), as kube-proxy",
	Kubelet:                    "API servers (ca), as this node; who asks the kubelet",
	Datastore:                  "the members of the datastore, which all have the same pair",
	"node-calls":               "cluster agents (ca), with the callback secret of each",
	ServiceAccount:             "API servers, for tokens of service accounts",
}

// Names in a list of what is trusted beside [FrontProxyCA] and [Datastore], while one replaces the other.
const (
	NextFrontProxy = "front-proxy-ca.other"
	OtherDatastore = "cluster.other"
)

// nodeCalls is written by cluster-agent/callback.
const nodeCalls = "node-calls.pem"

// ofOwnCA is said of what a worker has from its own CA.
const ofOwnCA = "nobody in the cluster: it is of this node's own CA, for the time after a leave"

// List says which certificates and keys this node has. What cannot be read is in the list, with the
// reason; it needs root for the keys.
func (s *Store) List() (Inventory, error) {
	node, err := s.nodeName()
	if err != nil {
		return Inventory{}, err
	}
	inv := Inventory{Node: node, Role: "control-plane", Tokens: podTokens(s.env)}
	worker := nodeconfig.ReadState(s.env).Worker
	if worker {
		inv.Role = "worker"
		inv.Items = append(inv.Items, s.listed("ca.remote", KindCA, s.env.Cert("ca.remote.crt"), "", "", trusted[CA]))
	}
	own := func(text string) string {
		if worker {
			return ofOwnCA
		}
		return text
	}
	for _, name := range []string{CA, FrontProxyCA} {
		inv.Items = append(inv.Items, s.listed(name, KindCA, s.crt(name), s.key(name), "", own(trusted[name])))
	}
	if !worker {
		inv.Items = append(inv.Items, others(NextFrontProxy, KindCA, s.crt(FrontProxyCA), trusted[FrontProxyCA])...)
	}
	for _, sp := range specs(node) {
		issuer, who := sp.issuer, own(trusted[sp.name])
		if worker && (sp.name == Kubelet || sp.name == "proxy") {
			issuer, who = "ca.remote", trusted[sp.name]
		}
		if _, err := os.Lstat(s.crt(sp.name)); worker && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		inv.Items = append(inv.Items, s.listed(sp.name, KindCertificate, s.crt(sp.name), s.key(sp.name), issuer, who))
	}
	if _, err := os.Lstat(s.env.Credential(nodeCalls)); err == nil && !worker {
		inv.Items = append(inv.Items, s.listed("node-calls", KindCertificate, s.env.Credential(nodeCalls), "", CA, trusted["node-calls"]))
	}
	inv.Items = append(inv.Items, s.listedKeys(own(trusted[ServiceAccount]))...)
	if !worker && nodeconfig.Load(s.env).Datastore.Own() {
		dir := storedir.Dir(s.env.BackendLive())
		inv.Items = append(inv.Items, s.listed(Datastore, KindCertificate, dir.File(storedir.CertFile), dir.File(storedir.KeyFile), "", trusted[Datastore]))
		inv.Items = append(inv.Items, others(OtherDatastore, KindCertificate, dir.File(storedir.CertFile), trusted[Datastore])...)
	}
	return inv, nil
}

// others are what a file has beside its first certificate: what is trusted while one replaces another.
func others(name, kind, file, who string) (out []Listed) {
	bundle, err := readBundle(file)
	if err != nil {
		return nil // the first one says it
	}
	for _, cert := range bundle[1:] {
		out = append(out, Listed{
			Name: name, Kind: kind, File: file, Subject: cert.Subject.String(), Issuer: cert.Issuer.String(),
			Expires: cert.NotAfter.UTC().Format(time.RFC3339), ID: KeyID(cert.PublicKey), TrustedBy: who + ", while it is replaced",
		})
	}
	return out
}

// listed looks at one certificate, with its key where there should be one.
func (s *Store) listed(name, kind, file, key, issuer, who string) Listed {
	l := Listed{Name: name, Kind: kind, File: file, TrustedBy: who}
	cert, _, err := readCert(file)
	if err != nil {
		l.Problem = err.Error()
		return l
	}
	l.Subject, l.Issuer, l.ID = cert.Subject.String(), cert.Issuer.String(), KeyID(cert.PublicKey)
	l.Expires = cert.NotAfter.UTC().Format(time.RFC3339)
	l.Problem = s.problem(cert, key, issuer)
	return l
}

// problem says what is wrong with a certificate, "" for nothing.
func (s *Store) problem(cert *x509.Certificate, key, issuer string) string {
	now := s.opts.Maker.Time()
	if !now.Before(cert.NotAfter) {
		return "it has ended"
	}
	if key != "" {
		switch k, err := readKey(key); {
		case errors.Is(err, fs.ErrNotExist):
			return "its key is missing"
		case err != nil:
			return err.Error()
		default:
			if err := pki.Matches(cert, k.Public()); err != nil {
				return "its key is that of another certificate"
			}
		}
	}
	if issuer == "" {
		return ""
	}
	ca, _, err := readCert(s.crt(issuer))
	if err == nil {
		err = pki.IssuedBy(cert, ca)
	}
	if err != nil {
		return err.Error()
	}
	return ""
}

// readKey reads the first key of a file.
func readKey(path string) (crypto.Signer, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	key, err := pki.ParseKey(data)
	if err != nil {
		return nil, fmt.Errorf("cannot read the key %s: %w", path, err)
	}
	return key, nil
}

// listedKeys are the keys of service account tokens: the first one signs, the others are valid.
func (s *Store) listedKeys(who string) []Listed {
	l := Listed{Name: ServiceAccount, Kind: KindKey, File: s.env.Cert(serviceAccountKey), TrustedBy: who}
	keys, err := s.SigningKeys()
	if err != nil {
		l.Problem = err.Error()
		return []Listed{l}
	}
	var out []Listed
	for i, id := range keys.IDs() {
		l.ID, l.TrustedBy = id, who+" (signs)"
		if i > 0 {
			l.TrustedBy = who + " (valid, signs no more or not yet)"
		}
		out = append(out, l)
	}
	return out
}

// maxToken bounds what is read of a token, in bytes.
const maxToken = 64 << 10

// podTokens counts the tokens that the kubelet has put into this node's pods, by the key that signed each.
func podTokens(env snapenv.Env) map[string]int {
	files, err := filepath.Glob(filepath.Join(env.KubeletRoot(), "pods/*/volumes/kubernetes.io~projected/*/*"))
	if err != nil || len(files) == 0 {
		return nil
	}
	out := map[string]int{}
	for _, path := range files {
		if id := tokenKey(path); id != "" {
			out[id]++
		}
	}
	return out
}

// tokenKey is the [KeyID] of the key that signed a token; "" where the file is none. It is a pod's
// folder, so nothing in it is believed.
func tokenKey(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxToken))
	if err != nil {
		return ""
	}
	return TokenKey(string(text))
}

// TokenKey is the [KeyID] of the key that signed a token; "" where it does not say.
func TokenKey(token string) string {
	head, _, _ := strings.Cut(token, ".")
	data, err := base64.RawURLEncoding.DecodeString(head)
	if err != nil {
		return ""
	}
	var header struct {
		KeyID string `json:"kid"`
	}
	if json.Unmarshal(data, &header) != nil {
		return ""
	}
	sum, err := base64.RawURLEncoding.DecodeString(header.KeyID)
	if err != nil || len(sum) != sha256.Size {
		return ""
	}
	return hex.EncodeToString(sum[:8])
}

// Compare finds what nodes of one cluster must have in common and have not, and notes it as the
// problem of each: a CA that differs splits the cluster's trust.
func Compare(nodes []Inventory) {
	said := map[string]map[string][]*Listed{} // by what it is, and ID
	for i := range nodes {
		worker := nodes[i].Role == "worker"
		for j := range nodes[i].Items {
			l := &nodes[i].Items[j]
			what := ""
			if l.Name == "ca.remote" || l.Name == CA && !worker {
				what = "the CA"
			}
			if what == "" || l.ID == "" {
				continue
			}
			if said[what] == nil {
				said[what] = map[string][]*Listed{}
			}
			said[what][l.ID] = append(said[what][l.ID], l)
		}
	}
	for what, ids := range said {
		if len(ids) < 2 {
			continue
		}
		for _, items := range ids {
			for _, l := range items {
				if l.Problem == "" {
					l.Problem = "other nodes have another one: " + what + " must be the same everywhere"
				}
			}
		}
	}
	compareTaken(nodes, ServiceAccount, ServiceAccount, "the API server of %s does not take tokens of this key")
	compareTaken(nodes, Datastore, OtherDatastore, "the datastore of %s does not take this certificate")
}

// compareTaken notes what one control-plane node shows to others and another one does not take. The first item
// with the name is what it shows; that and those called other are what it takes.
func compareTaken(nodes []Inventory, name, other, says string) {
	taken := map[string][]string{} // key IDs by node
	var order []string
	for _, n := range nodes {
		for _, l := range n.Items {
			if n.Role != "worker" && l.ID != "" && (l.Name == name || l.Name == other) {
				if taken[n.Node] == nil {
					order = append(order, n.Node)
				}
				taken[n.Node] = append(taken[n.Node], l.ID)
			}
		}
	}
	for i := range nodes {
		j := slices.IndexFunc(nodes[i].Items, func(l Listed) bool { return l.Name == name })
		if j < 0 || nodes[i].Role == "worker" {
			continue
		}
		for _, node := range order {
			if l := &nodes[i].Items[j]; !slices.Contains(taken[node], l.ID) && l.Problem == "" && l.ID != "" {
				l.Problem = fmt.Sprintf(says, node)
			}
		}
	}
}
