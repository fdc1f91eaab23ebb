// Package api is the wire of the cluster agent: paths, requests, answers and error codes, for
// the server and for its clients. What the calls do is in cluster-agent/broker (joining) and
// cluster-agent/node (what one node is asked to do).
//
// Paths, field names, statuses and texts are those that upstream's agents and clients use
// (cluster-agent.md 1.5, 3.2 and 3.6). Fields and paths marked "ours" are additions: upstream's
// programs ignore unknown fields and answer unknown paths with 404.
package api

import (
	"strings"

	"microk8s/internal/datastore/storedir"
	"microk8s/internal/serverargs"
)

// Paths. All of them are called with POST, except PathHealth.
const (
	PathHealth       = "/health"
	PathJoin         = "/cluster/api/v2.0/join"
	PathSignCert     = "/cluster/api/v1.0/sign-cert"
	PathConfigure    = "/cluster/api/v1.0/configure"
	PathImageImport  = "/cluster/api/v2.0/image/import"
	PathDqliteRemove = "/cluster/api/v2.0/dqlite/remove"

	PathProof     = "/cluster/api/v2.0/proof"             // ours
	PathPreflight = "/cluster/api/v2.0/preflight"         // ours
	PathConfirm   = "/cluster/api/v2.0/join/confirm"      // ours
	PathRelease   = "/cluster/api/v2.0/join/release"      // ours
	PathExamine   = "/cluster/api/v2.0/datastore/examine" // ours, with a client certificate
	PathRenew     = "/cluster/api/v2.0/renew"             // ours, with a client certificate
	PathCerts     = "/cluster/api/v2.0/certificates"      // ours, with a client certificate
)

// Headers that carry secrets.
const (
	HeaderCallback = "X-Microk8s-Callback-Token" // of PathImageImport
	HeaderCAPI     = "Capi-Auth-Token"           // of PathDqliteRemove
)

// Product in a request says that the client is this product and not upstream's.
const Product = "microk8s-go"

// DatastoreProtocol names the protocol between datastore daemons. Only nodes that speak the
// same one can share a datastore. It is the ALPN name of internal/datastore/member.
const DatastoreProtocol = storedir.Protocol

// Error is the body of every answer that is not 200.
type Error struct {
	Message string `json:"error"`          // for people; its first letter is upper case
	Code    Code   `json:"code,omitempty"` // ours: for programs
}

// Code says what kind of failure an [Error] is.
type Code string

// Codes. Those about tokens other than CodeToken are only given to who knows the token.
const (
	CodeToken        Code = "token-invalid"  // wrong, or not known to this node
	CodeTokenUsed    Code = "token-used"     // nothing is left of its uses
	CodeTokenExpired Code = "token-expired"  //
	CodeTokenRevoked Code = "token-revoked"  // somebody took it back
	CodeTokenHeld    Code = "token-reserved" // another node is joining with it just now; it is free again after ten minutes at most
	CodeTokenRole    Code = "token-role"     // it only joins workers
	CodeTokenName    Code = "token-name"     // it is bound to another node name
	CodeNoProof      Code = "no-proof"       // chosen tokens are not proved, or the connection cannot carry a proof
	CodeNotHA        Code = "not-ha"         // the node is not in HA mode
	CodeWorkerNode   Code = "not-control-plane"
	CodePort         Code = "port-differs"
	CodeSameAddress  Code = "same-address"
	CodeHostname     Code = "hostname-unresolved"
	CodeNameTaken    Code = "name-taken"   // a node of that name is in the cluster
	CodeMember       Code = "known-member" // the address is a datastore member already
	CodeDatastore    Code = "datastore-incompatible"
	CodeOldClient    Code = "client-too-old"
	CodeArguments    Code = "server-arguments" // arguments of the API server that must agree and cannot be carried
	CodeAddress      Code = "no-address"       // no usable address of this host for the datastore
	CodeRequest      Code = "bad-request"
	CodeCertificate  Code = "certificate-refused"
	CodeBusy         Code = "too-many-attempts"
	CodeUnavailable  Code = "unavailable" // the API server or the datastore does not answer; try again
	CodeInternal     Code = "internal"
)

// ProofRequest asks the server to show that it knows a generated token. It goes over the very
// connection on which the join request follows, TLS 1.3 and not resumed.
type ProofRequest struct {
	ID    string `json:"id"`    // token.ID, 16 hex digits
	Nonce []byte `json:"nonce"` // token.NonceSize random bytes, base64
}

// ProofResponse is checked with token.CheckProof.
type ProofResponse struct {
	Proof []byte `json:"proof"` // base64
}

// JoinRequest is the body of PathJoin (cluster-agent.md 3.2).
type JoinRequest struct {
	Token               string `json:"token"`
	Hostname            string `json:"hostname"` // the node's name, lower case
	Port                string `json:"port"`     // of the joining node's agent
	Worker              Worker `json:"worker"`
	CanHandleX509Auth   *bool  `json:"can_handle_x509_auth,omitempty"`
	CanHandleCustomEtcd *bool  `json:"can_handle_custom_etcd,omitempty"`

	// Product is api.Product from this product's clients; they confirm a join. Ours.
	Product string `json:"product,omitempty"`
	// Version of the client's Kubernetes, such as v1.37.1. Ours.
	Version string `json:"version,omitempty"`
	// DatastoreProtocol is api.DatastoreProtocol. A control-plane join without it is refused
	// before anything changes. Ours.
	DatastoreProtocol string `json:"datastore_protocol,omitempty"`
	// AdvertiseAddress is the IP address under which other nodes reach this one; "" means the
	// one that the connection comes from. It matters behind address translation or a balancer.
	// Ours.
	AdvertiseAddress string `json:"advertise_address,omitempty"`
	// Secrets is 2 from clients that get their callback secret after the join. Ours.
	Secrets int `json:"secrets,omitempty"`
	// ServerArguments are the digests of the arguments of kube-apiserver that the joining
	// control-plane node has now (internal/serverargs); that there are any says that it takes the
	// cluster's over. Ours.
	ServerArguments map[string]string `json:"server_arguments,omitempty"`
}

// Worker is the field `worker`: any JSON value, and only true and "as-worker" mean it.
type Worker bool

// UnmarshalJSON never fails.
func (w *Worker) UnmarshalJSON(data []byte) error {
	s := string(data)
	*w = s == "true" || s == `"as-worker"`
	return nil
}

// MarshalJSON writes what upstream's client does.
func (w Worker) MarshalJSON() ([]byte, error) {
	if w {
		return []byte(`"as-worker"`), nil
	}
	return []byte("null"), nil
}

// JoinResponse is the answer to a join (cluster-agent.md 3.6). Clients branch on which keys
// are present.
type JoinResponse struct {
	CA                string   `json:"ca"`
	CallbackToken     string   `json:"callback_token"` // "" for clients that get it after the join
	APIPort           string   `json:"apiport"`
	AuthorizationMode string   `json:"api_authz_mode"`
	KubeletArgs       string   `json:"kubelet_args"`
	HostnameOverride  string   `json:"hostname_override"` // the joining node's address
	Voters            []string `json:"voters,omitempty"`
	ServiceAccountKey string   `json:"service_account_key"` // "" for workers
	AdminToken        string   `json:"admin_token,omitempty"`
	CAKey             *string  `json:"ca_key"` // null for workers
	ClusterCert       string   `json:"cluster_cert,omitempty"`
	ClusterKey        string   `json:"cluster_key,omitempty"`
	ControlPlaneNodes []string `json:"control_plane_nodes"` // null for control-plane nodes
	ClusterCIDR       string   `json:"cluster_cidr,omitempty"`
	EtcdServers       string   `json:"etcd_servers,omitempty"`
	EtcdCA            string   `json:"etcd_ca,omitempty"`
	EtcdCert          string   `json:"etcd_cert,omitempty"`
	EtcdKey           string   `json:"etcd_key,omitempty"`

	// Product is api.Product from this product's servers: the join must then be confirmed
	// (PathConfirm) or given up (PathRelease). Ours.
	Product string `json:"product,omitempty"`
	// ServiceCIDR is the API server's --service-cluster-ip-range, the same on all
	// control-plane nodes. Ours.
	ServiceCIDR string `json:"service_cidr,omitempty"`
	// NodeMasks are the lengths of a node's share of ClusterCIDR, that of IPv4 first, for control-plane nodes: with another
	// one the controller manager would go on otherwise when it moves there. Ours.
	NodeMasks []int `json:"node_masks,omitempty"`
	// APIServers lists host:port of all API servers, the contacted node's first. Ours.
	APIServers []string `json:"api_servers,omitempty"`
	// CNI is true where the cluster has a CNI of its own (args/cni-network/cni.yaml). Ours.
	CNI bool `json:"cni,omitempty"`
	// ServerArguments are those of kube-apiserver that all control-plane nodes must share, with
	// the files that they name, keys of encryption at rest among them. For control-plane nodes
	// only. Ours.
	ServerArguments *serverargs.Set `json:"server_arguments,omitempty"`
}

// SignRequest asks for a certificate during a worker's join: token is the join token with
// "-kubelet" or "-proxy" behind it.
type SignRequest struct {
	Token   string `json:"token"`
	Request string `json:"request"` // PEM
}

// Suffixes of the tokens of a SignRequest.
const (
	SuffixKubelet = "-kubelet"
	SuffixProxy   = "-proxy"
)

// SignResponse is the answer to a SignRequest.
type SignResponse struct {
	Certificate string `json:"certificate"` // PEM
}

// ConfirmRequest is the body of PathConfirm and of PathRelease. Both may be repeated.
//
// Confirm says that the node is in: the token is spent. Release says that the join was undone:
// what the server noted for it is removed, and the token is free for another node at once.
type ConfirmRequest struct {
	Token    string `json:"token"`
	Hostname string `json:"hostname"`
}

// Result is the answer to a ConfirmRequest and to a ConfigureRequest.
type Result struct {
	Result string `json:"result"` // "ok"
}

// PreflightRequest asks what would be in the way of a join. It changes nothing. The token is
// sent as in a JoinRequest, after the same proof.
type PreflightRequest struct {
	JoinRequest
	MachineID  string `json:"machine_id,omitempty"`  // /etc/machine-id
	SystemUUID string `json:"system_uuid,omitempty"` // as the kubelet reports it: /sys/class/dmi/id/product_uuid
}

// PreflightResponse says all there is to say.
type PreflightResponse struct {
	Product  string    `json:"product"`
	Version  string    `json:"version"`      // of the cluster's Kubernetes, such as v1.37.1
	Time     int64     `json:"time"`         // the server's clock, Unix milliseconds
	Address  string    `json:"address"`      // the joining node's, as the server sees or accepts it
	Problems []Problem `json:"problems"`     // everything found; empty when nothing is in the way
	Servers  []string  `json:"api_servers"`  // host:port of all API servers
	Members  []string  `json:"members"`      // host:port of the datastore's members; empty with an external etcd
	External bool      `json:"external"`     // the datastore is an external etcd
	CIDR     string    `json:"cluster_cidr"` // of the pods
}

// Problem is one thing in the way of a join.
type Problem struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
	Fatal   bool   `json:"fatal"` // the join would be refused; otherwise a warning
}

// Codes of problems that are warnings.
const (
	CodeCloned  Code = "cloned-machine"  // machine-id or product_uuid equal another node's
	CodeVersion Code = "version-skew"    //
	CodeAgent   Code = "agent-unreached" // the server cannot reach the joining node's agent
)

// RenewRequest renews what a node holds. It is sent with the client certificate of the node's
// kubelet. Empty requests are not answered with a certificate.
type RenewRequest struct {
	Kubelet string `json:"kubelet,omitempty"` // CSR, PEM
	Proxy   string `json:"proxy,omitempty"`
	Secrets int    `json:"secrets,omitempty"` // the form of callback secrets that the node speaks: 2; 0 in the build before
}

// ImportResponse is the answer to PathImageImport. Upstream's agents answer with the status alone.
type ImportResponse struct {
	Status  string   `json:"status"`            // OK
	Images  []string `json:"images,omitempty"`  // full names of what was imported
	Skipped []string `json:"skipped,omitempty"` // what was not, each with the reason
	// Pack is the digest of the pack of addons that was imported, and is kept by the node. Ours.
	Pack string `json:"pack,omitempty"`
}

// RenewResponse is the answer to a RenewRequest.
type RenewResponse struct {
	Kubelet       string   `json:"kubelet,omitempty"` // certificate, PEM
	Proxy         string   `json:"proxy,omitempty"`
	CallbackToken string   `json:"callback_token"` // "" while the join is not confirmed
	APIServers    []string `json:"api_servers"`
	// LegacyCallback is the secret that control-plane nodes of the build before show; "" where the
	// cluster has none.
	LegacyCallback string `json:"callback_token_legacy,omitempty"`
	// Secrets is 2 from servers of this build.
	Secrets int `json:"secrets,omitempty"`
	// Refused lists the names and addresses that were asked for and are not in the certificate.
	Refused []string `json:"refused,omitempty"`
}

// ConfigureRequest changes arguments, restarts services and switches addons on one node
// (cluster-agent.md 1.5.3).
type ConfigureRequest struct {
	Callback string             `json:"callback"`
	Services []ConfigureService `json:"service,omitempty"`
	Addons   []ConfigureAddon   `json:"addon,omitempty"`
	// Encryption replaces the keys of encryption at rest of a control-plane node, before its services are
	// restarted; see internal/encryption. It is never kept for a node that is not reached. Ours.
	Encryption string `json:"encryption,omitempty"`
	// Certificates is one step of a change of certificates and keys, done before services are restarted.
	// It is never kept for a node that is not reached. Ours.
	Certificates *CertificateChange `json:"certificates,omitempty"`
}

// CertificateChange is what one node is to do in a change of the cluster's certificates and keys
// (internal/keyrotation). Each may be repeated.
type CertificateChange struct {
	// Leaves are the IDs of public keys (certs.KeyID) in whose place new keys and certificates are made.
	Leaves []string `json:"leaves,omitempty"`
	// FrontProxy is a step of replacing the front proxy's CA whose key has the ID FrontProxyOld.
	FrontProxy    string `json:"front_proxy,omitempty"`
	FrontProxyOld string `json:"front_proxy_old,omitempty"`
	// SigningKeys are the keys of service account tokens, in PEM: the first one signs.
	SigningKeys string `json:"signing_keys,omitempty"`
	// DatastoreCert and DatastoreKey are the pair of the datastore's members, in PEM: the certificate of the
	// key, and others that are taken from members too.
	DatastoreCert string `json:"datastore_cert,omitempty"`
	DatastoreKey  string `json:"datastore_key,omitempty"`
}

// ConfigureService is one argument file and its service.
type ConfigureService struct {
	Name    string              `json:"name"`
	Update  []map[string]string `json:"arguments_update,omitempty"`
	Remove  []string            `json:"arguments_remove,omitempty"`
	Restart Truth               `json:"restart,omitempty"`
}

// ConfigureAddon is one addon.
type ConfigureAddon struct {
	Name    string `json:"name"`
	Enable  Truth  `json:"enable,omitempty"`
	Disable Truth  `json:"disable,omitempty"`
}

// Truth is a bool that upstream's programs also send as text: true, "true" and "yes" mean it,
// every other value does not, and none is an error.
type Truth bool

// UnmarshalJSON never fails.
func (t *Truth) UnmarshalJSON(data []byte) error {
	switch strings.ToLower(string(data)) {
	case "true", `"true"`, `"yes"`:
		*t = true
	default:
		*t = false
	}
	return nil
}

// RemoveRequest is the body of PathDqliteRemove.
type RemoveRequest struct {
	Endpoint string `json:"remove_endpoint"` // host:port
}
