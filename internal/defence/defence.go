// Package defence names the defences of the cluster agent, so that the attack suite can show
// that each of them is needed. In the product all are on and cost nothing; a test program that
// is built with the tag `weakened` leaves out the one that MICROK8S_WEAKENED names, and the
// attack suite must then fail.
package defence

// Name is a defence.
type Name string

// The defences, each where it is used.
const (
	TokenKey       Name = "token-key"       // a token is compared as a whole
	TokenSpent     Name = "token-spent"     // a confirmed join uses a token up
	TokenExpiry    Name = "token-expiry"    //
	TokenRevoked   Name = "token-revoked"   //
	TokenRole      Name = "token-role"      // worker tokens join workers only
	TokenName      Name = "token-name"      // bound tokens join that node only
	TokenHeld      Name = "token-held"      // a reserved token is not given to another node
	TokenNames     Name = "token-names"     // a use that is begun again and again for other names ends
	ProofChosen    Name = "proof-chosen"    // no proof for tokens that can be guessed
	NodeName       Name = "node-name"       // host names are DNS names
	NameTaken      Name = "name-taken"      // a name in use is not given to another machine
	Datastore      Name = "datastore"       // only nodes that speak our protocol join the control plane
	HostHeader     Name = "host-header"     // the header does not choose the datastore's address
	Advertised     Name = "advertised"      // addresses that other nodes have are not taken
	CSRSubject     Name = "csr-subject"     //
	CSRNames       Name = "csr-names"       //
	CSRSignature   Name = "csr-signature"   //
	SignOnce       Name = "sign-once"       // one certificate of each kind for each join request
	SignExpiry     Name = "sign-expiry"     // and only within ten minutes
	ClientCert     Name = "client-cert"     // renewals need a certificate of the cluster's CA
	Member         Name = "renew-member"    // and a node that is still in the cluster
	Callback       Name = "callback"        // the secret of this node
	CallbackEmpty  Name = "callback-empty"  // which is never empty
	CallerCert     Name = "caller-cert"     // and a certificate that only control-plane nodes make
	Registered     Name = "registered"      // a certificate counts while its join has a record
	ServiceNames   Name = "service-names"   // a node is not called as what is in the cluster
	OneName        Name = "one-name"        // a use of a token for which a certificate was signed is for that node
	CAPI           Name = "capi"            // the token of cluster API providers is compared
	CAPIEmpty      Name = "capi-empty"      // and an empty file allows nobody
	Services       Name = "services"        // only argument files that there are
	ArgumentValues Name = "argument-values" // no lines, and nothing that a shell would run
	Addons         Name = "addons"          // only addons that there are
	Endpoint       Name = "endpoint"        // of a datastore member: host:port
	BodyLimit      Name = "body-limit"      //
	BodyTime       Name = "body-time"       // a body that trickles is given up
	Delay          Name = "delay"           // after wrong tokens
	SecretFirst    Name = "secret-first"    // lists are decoded after the caller has shown a secret
	BusyFirst      Name = "busy-first"      // no body is read while too many wrong secrets of its source wait
	SharedReads    Name = "shared-reads"    // wrong secrets share reads of the API server
	Connections    Name = "connections"     // in all and for each source, and early bytes
	CallRate       Name = "call-rate"       // of one source
	NoStore        Name = "no-store"        // answers with secrets are not cached
)

// All lists the defences.
func All() []Name {
	return []Name{
		TokenKey, TokenSpent, TokenExpiry, TokenRevoked, TokenRole, TokenName, TokenHeld, TokenNames, ProofChosen,
		NodeName, NameTaken, Datastore, HostHeader, Advertised, CSRSubject, CSRNames, CSRSignature, SignOnce, SignExpiry,
		ClientCert, Member, Callback, CallbackEmpty, CallerCert, Registered, ServiceNames, OneName,
		CAPI, CAPIEmpty, Services, ArgumentValues, Addons, Endpoint,
		BodyLimit, BodyTime, Delay, NoStore, SecretFirst, BusyFirst, SharedReads, Connections, CallRate,
	}
}
