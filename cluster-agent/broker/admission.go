package broker

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"microk8s/cluster-agent/api"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/encryption"
	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/noderegistry"
	"microk8s/internal/serverargs"
	"microk8s/internal/tokenstore"
)

// facts is all that the decision about a join depends on. A fact that could not be read has its error
// beside it. What does not matter for a request is not read.
type facts struct {
	req    api.JoinRequest
	record tokenstore.Record // of the token
	from   netip.Addr        // where the request came from
	local  netip.Addr        // of this node, where the request came in
	config nodeconfig.Config // of this node
	own    []Interface       // of this node; none where they cannot be listed

	resolved     []netip.Addr         // of the joining node's host name; none where it does not resolve
	arguments    *serverargs.Set      // of the API server, for a control-plane node
	differences  []serverargs.Problem // between them and the joining node's
	argumentsErr error
	members      []storedir.Member // of our own datastore, from the file that its daemon keeps
	membersErr   error
	records      []noderegistry.Record // of nodes
	recordsErr   error
	joining      *noderegistry.Record // of a node that joins under this name just now, by another token; nil for none
	joiningErr   error
	live         []peers.Member // the members from the daemon, where one has the joining node's name or address
	liveErr      error
	nodes        []corev1.Node
	nodesErr     error
	serving      []string // names in the certificate of this node's API server
	namespace    bool     // whether the name's second word is a namespace
	namespaceErr error
	complete     bool // whether every control-plane node is of this build
	completeErr  error
}

// verdict is the decision about a join.
type verdict struct {
	problems []error       // what speaks against it, in upstream's order (cluster-agent.md 3.3); none admits
	address  netip.Addr    // under which other nodes reach the joining one
	local    netip.Addr    // under which the joining node reaches this one
	replaces *peers.Member // the datastore's member that the node was before it was reinstalled, or nil
}

func (f *facts) ours() bool     { return f.req.Product == api.Product }
func (f *facts) external() bool { return f.config.Datastore.Owner == nodeconfig.ExternalEtcd }

// byHostname reports whether the API server reaches nodes by their host names before their addresses.
// Our default address types do not.
func (f *facts) byHostname() bool {
	for _, kind := range f.config.APIServer.PreferredAddressTypes {
		if kind == "InternalIP" || kind == "Hostname" {
			return kind == "Hostname"
		}
	}
	return true
}

// knownMember reports whether a member of the datastore may have the name or the address.
func (f *facts) knownMember(address netip.Addr) bool {
	named := slices.ContainsFunc(f.records, func(r noderegistry.Record) bool { return r.Name == f.req.Hostname && r.Member != 0 })
	return named || hasAddress(f.members, address)
}

// mayHave reports whether a name may be the node's though it is known: it began a join with this
// token, or the token is bound to the name.
func (f *facts) mayHave(name string) bool { return f.record.Knows(name) || f.record.Name == name }

// earlier reports whether the node is a control-plane node of the build before.
func (f *facts) earlier() bool { return !bool(f.req.Worker) && f.ours() && f.req.Secrets < 2 }

// gather reads what is to be known of a join. It changes nothing.
func (b *Broker) gather(ctx context.Context, j *joining) *facts {
	f := &facts{req: j.req, record: j.record, from: j.address, local: j.local, config: b.config()}
	if f.config.Worker {
		return f
	}
	f.own, _ = b.Interfaces()
	address, _ := f.address()
	if f.byHostname() {
		f.resolved, _ = b.Resolve(ctx, f.req.Hostname)
	}
	if !f.req.Worker {
		var problems []serverargs.Problem
		f.arguments, problems, f.argumentsErr = serverargs.Read(b.Env)
		if f.argumentsErr == nil && f.req.ServerArguments != nil {
			f.differences = f.arguments.Reconcile(problems, f.req.ServerArguments)
		}
	}
	if !f.external() {
		f.members, f.membersErr = b.Members()
		if !f.record.Knows(f.req.Hostname) {
			f.records, f.recordsErr = b.Nodes.List(ctx)
			if f.recordsErr == nil && f.knownMember(address) {
				f.live, f.liveErr = b.Live(ctx)
			}
		}
	}
	f.nodes, f.nodesErr = b.Cluster.Nodes(ctx)
	if !f.mayHave(f.req.Hostname) {
		r, err := b.Nodes.Get(ctx, f.req.Hostname)
		switch {
		case err == nil && r.Pending() && !b.Now().After(r.Until):
			f.joining = r
		case err != nil && !errors.Is(err, noderegistry.ErrNone):
			f.joiningErr = err
		}
	}
	if cert := b.serving(); cert != nil {
		f.serving = cert.DNSNames
	}
	if _, namespace := reserved(f.req.Hostname, bool(f.req.Worker), f.config, f.serving); namespace != "" {
		f.namespace, f.namespaceErr = b.Cluster.Namespace(ctx, namespace)
	}
	if f.earlier() {
		f.complete, f.completeErr = b.Nodes.Complete(ctx)
	}
	return f
}

// decide admits a join, or lists everything that speaks against it. It depends on nothing but the facts.
func decide(f *facts) verdict {
	v := verdict{address: f.from, local: f.local}
	add := func(err error) {
		if err != nil {
			v.problems = append(v.problems, err)
		}
	}
	if f.config.Worker {
		add(fail(http.StatusNotImplemented, api.CodeWorkerNode, "This node is a worker of a cluster. Contact a control plane node"))
		return v
	}
	if !f.config.HA {
		add(fail(http.StatusNotImplemented, api.CodeNotHA, "Not possible to join. This is not an HA MicroK8s cluster"))
	}
	if port := strconv.Itoa(f.config.AgentPort); f.req.Port != port {
		add(fail(http.StatusBadGateway, api.CodePort, "The port of the cluster agent port has to be set to %s", port))
	}
	var err error
	v.address, err = f.address()
	add(err)
	add(f.hostnameProblem(v.address))
	if !f.req.Worker {
		add(f.clientProblem())
		add(f.argumentsProblem())
	}
	if !f.external() {
		if f.membersErr != nil {
			add(internal("Failed to retrieve dqlite cluster nodes", f.membersErr))
		}
		if !f.record.Knows(f.req.Hostname) {
			v.replaces, err = f.memberProblem(v.address)
			add(err)
		}
	}
	add(silent(f.nodesErr))
	v.local = f.ofCluster()
	add(f.nameProblem())
	add(f.joiningProblem())
	add(f.reservedProblem())
	add(f.ownerProblem(v.address))
	if f.earlier() {
		add(f.earlierProblem())
	}
	return v
}

// silent is the problem that the API server cannot be asked, or nil without an error.
func silent(err error) error {
	if err == nil {
		return nil
	}
	return fail(http.StatusServiceUnavailable, api.CodeUnavailable, "the API server of this node does not answer now, try again: %v", err)
}

// earlierProblem refuses a control-plane node of the build before where no other is: it could call
// no node, and would let machines join that are refused afterwards.
func (f *facts) earlierProblem() error {
	if f.completeErr != nil || !f.complete {
		return silent(f.completeErr)
	}
	return fail(http.StatusInternalServerError, api.CodeOldClient,
		"The joining node has an earlier build than all control plane nodes of this cluster. Refresh it first: snap refresh microk8s")
}

// reservedProblem refuses names under which something else is known in the cluster: the API server,
// a Service, another node, an address. A node's certificate serves under its name.
func (f *facts) reservedProblem() error {
	name := f.req.Hostname
	whose, namespace := reserved(name, bool(f.req.Worker), f.config, f.serving)
	if namespace != "" {
		if f.namespaceErr != nil {
			return silent(f.namespaceErr)
		}
		if f.namespace {
			whose = serviceIn(namespace)
		}
	}
	for _, n := range f.nodes {
		for _, a := range n.Status.Addresses {
			if n.Name != name && strings.EqualFold(a.Address, name) {
				whose = "the node " + n.Name
			}
		}
	}
	if whose != "" {
		return fail(http.StatusBadRequest, api.CodeNameTaken, "A node cannot be called %s: that is the name of %s. Give the joining machine another host name", name, whose)
	}
	return nil
}

func serviceIn(namespace string) string { return "a Service in the namespace " + namespace }

// reserved returns what a name stands for that a node must not have, "" if nothing, or the namespace in
// which it is a Service, if that namespace exists. A control-plane node serves the API itself, under
// all names in serving, the certificate of the API server.
func reserved(name string, worker bool, config nodeconfig.Config, serving []string) (whose, namespace string) {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	domain := strings.ToLower(strings.Trim(config.ClusterDomain, "."))
	under := func(suffix string) bool { return name == suffix || strings.HasSuffix(name, "."+suffix) }
	if _, err := netip.ParseAddr(name); err == nil {
		return "an address", ""
	}
	switch {
	case name == "kubernetes" || name == "kubernetes.default":
		return "the API server", ""
	case under("svc"), under(domain):
		return "Services of the cluster", ""
	case under("localhost"):
		return "every machine itself", ""
	}
	if worker && slices.ContainsFunc(serving, func(n string) bool { return strings.EqualFold(n, name) }) {
		return "the API server", ""
	}
	service, namespace, two := strings.Cut(name, ".")
	if !two || service == "" || strings.Contains(namespace, ".") {
		return "", ""
	}
	return "", namespace
}

// nameOf returns what a name stands for that a node must not have; "" if nothing.
func (b *Broker) nameOf(ctx context.Context, name string, worker bool) (string, error) {
	var serving []string
	if cert := b.serving(); cert != nil {
		serving = cert.DNSNames
	}
	whose, namespace := reserved(name, worker, b.config(), serving)
	if namespace == "" {
		return whose, nil
	}
	there, err := b.Cluster.Namespace(ctx, namespace)
	if err != nil || !there {
		return "", silent(err)
	}
	return serviceIn(namespace), nil
}

// memberProblem refuses an address or a name that a member of the datastore has. A token for this
// node's name states that it was reinstalled: then its old member is replaced, if it does not live. The
// address is not enough for that: a member is the one of this node where the node's record states it,
// or where no record states whose it is.
func (f *facts) memberProblem(address netip.Addr) (replaces *peers.Member, err error) {
	name := f.req.Hostname
	switch {
	case f.recordsErr != nil:
		return nil, silent(f.recordsErr)
	case !f.knownMember(address):
		return nil, nil
	case f.liveErr != nil:
		return nil, internal("Failed to retrieve dqlite cluster nodes", f.liveErr)
	}
	bound := f.record.Name == name
	for _, m := range f.live {
		ap, err := netip.ParseAddrPort(m.Address)
		there := err == nil && ap.Addr().Unmap() == address
		owner := noderegistry.OfMember(f.records, m.ID)
		mine := owner != nil && owner.Name == name
		known := fmt.Sprintf("Failed to retrieve dqlite cluster nodes: the joining node (%s) is already known to dqlite", address)
		switch {
		case !there && !mine:
		case !m.Online && bound && (owner == nil || mine):
			replaces = &m
		case !there:
			how := fmt.Sprintf("If it was reinstalled, make a token for it with: microk8s add-node --name %s", name)
			if m.Online {
				how = "Give the joining machine another host name"
			}
			return nil, fail(http.StatusBadRequest, api.CodeNameTaken, "A node called %s is in the cluster already, with the datastore's member at %s. %s", name, m.Address, how)
		case m.Online || !f.ours():
			return nil, fail(http.StatusInternalServerError, api.CodeMember, "%s", known)
		case owner != nil && !mine:
			return nil, fail(http.StatusInternalServerError, api.CodeMember, "%s, as the node %s. If that node is gone for good, remove it with: microk8s remove-node %[2]s --force", known, owner.Name)
		default:
			return nil, fail(http.StatusInternalServerError, api.CodeMember, "%s. If it was reinstalled, make a token for it with: microk8s add-node --name %s", known, name)
		}
	}
	return replaces, nil
}

// ofCluster returns the address under which the cluster knows this node, where the request came in at
// one of the other family than the pods': an API server cannot be announced there.
func (f *facts) ofCluster() netip.Addr {
	cidrs := f.config.ClusterCIDRs
	if len(cidrs) == 0 || cidrs[0].Addr().Is4() == f.local.Is4() {
		return f.local
	}
	for _, n := range f.nodes {
		for _, a := range addresses(n) {
			if a.Is4() == cidrs[0].Addr().Is4() && slices.ContainsFunc(f.own, func(p Interface) bool { return p.Addr() == a }) {
				return a
			}
		}
	}
	return f.local
}

// address settles under which address other nodes reach the joining one: that of its connection, or
// the one that it advertises.
func (f *facts) address() (netip.Addr, error) {
	address := f.from
	if f.req.AdvertiseAddress != "" && f.ours() {
		a, err := netip.ParseAddr(f.req.AdvertiseAddress)
		if err != nil || a.Zone() != "" || !a.Unmap().IsGlobalUnicast() {
			return address, fail(http.StatusBadRequest, api.CodeRequest, "the advertised address %q is not one that other nodes can reach", shorten(f.req.AdvertiseAddress))
		}
		address = a.Unmap()
	}
	same := address == f.local || slices.ContainsFunc(f.own, func(p Interface) bool { return p.Addr() == address })
	if same || address.IsLoopback() {
		return address, fail(http.StatusServiceUnavailable, api.CodeSameAddress, "The joining node has the same IP (%s) as the node we contact", address)
	}
	return address, nil
}

// hostnameProblem is upstream's check, which our default address types make unnecessary.
func (f *facts) hostnameProblem(address netip.Addr) error {
	if f.byHostname() && !slices.Contains(f.resolved, address) {
		return fail(http.StatusBadRequest, api.CodeHostname, "The hostname (%s) of the joining node does not resolve to the IP %q. Refusing join", f.req.Hostname, address)
	}
	return nil
}

// clientProblem is about what a control-plane node must be able to do.
func (f *facts) clientProblem() error {
	yes := func(p *bool) bool { return p != nil && *p || f.ours() }
	if f.external() {
		if !yes(f.req.CanHandleCustomEtcd) {
			return fail(http.StatusInternalServerError, api.CodeOldClient,
				"This MicroK8s cluster uses a custom etcd endpoint. update MicroK8s to version 1.28 or newer and retry the join operation")
		}
	} else if f.req.DatastoreProtocol != api.DatastoreProtocol {
		return fail(http.StatusNotImplemented, api.CodeDatastore,
			"This cluster's datastore is not one that the joining node's can be a member of: it speaks %q, and %q was offered. Upstream's MicroK8s can join it with --worker only",
			api.DatastoreProtocol, shorten(f.req.DatastoreProtocol))
	}
	if !yes(f.req.CanHandleX509Auth) {
		return fail(http.StatusInternalServerError, api.CodeOldClient,
			"Joining this MicroK8s cluster requires x509 authentication. update MicroK8s to version 1.28 or newer and retry the join operation")
	}
	return nil
}

// argumentsProblem is about the API server's arguments in which control-plane nodes must agree: all of
// them are carried by the join, or it is refused with the list. Without its keys a joining
// node could not read what the others have encrypted.
func (f *facts) argumentsProblem() error {
	switch {
	case f.argumentsErr != nil:
		return internal("Failed to read arguments of the API server", f.argumentsErr)
	case f.req.ServerArguments == nil && f.arguments.Encryption() != nil: // without encryption an older node differs as it always did
		return fail(http.StatusNotImplemented, api.CodeOldClient,
			"This cluster encrypts Secrets at rest (--%s), and the joining node's MicroK8s cannot receive the key. Update it, or join it with --worker", encryption.Flag)
	case len(f.differences) > 0:
		var list []string
		for _, p := range f.differences {
			list = append(list, p.String())
		}
		return fail(http.StatusConflict, api.CodeArguments, "The API server of %s has arguments that every control plane node must have and that a join cannot carry. "+
			"Set them on the joining node as they are here, in args/kube-apiserver with the same files, and join again: %s", f.local, strings.Join(list, "; "))
	}
	return nil
}

// nameProblem keeps a name for the machine that has it. A token that is bound to the name is
// its owner's word, once the old machine is silent.
func (f *facts) nameProblem() error {
	if f.record.Knows(f.req.Hostname) {
		return nil
	}
	for _, n := range f.nodes {
		if n.Name != f.req.Hostname {
			continue
		}
		if !kube.Ready(&n) && f.record.Name == n.Name {
			return nil
		}
		how := fmt.Sprintf("remove it with: microk8s remove-node %s, or make a token for it with: microk8s add-node --name %s", n.Name, n.Name)
		if kube.Ready(&n) {
			how = "give the joining machine another host name"
		}
		return fail(http.StatusBadRequest, api.CodeNameTaken, "A node called %s is in the cluster already. If this is another machine, or the same one reinstalled, %s", n.Name, how)
	}
	return nil
}

// joiningProblem keeps a name for the machine that joins under it just now. Its Node is not there yet,
// and its record would become that of the other: with a worker's token, somebody could get the
// identity of a control-plane node that joins. A token that is bound to the name is its owner's word.
func (f *facts) joiningProblem() error {
	if f.joining == nil {
		return silent(f.joiningErr)
	}
	return fail(http.StatusBadRequest, api.CodeNameTaken, "A node called %s is joining just now, with another token. If that is this machine, which was interrupted, end the other attempt with: "+
		"microk8s remove-node %[1]s; it also ends by itself within ten minutes. Else give the joining machine another host name", f.req.Hostname)
}

// ownerProblem refuses an address that another node has.
func (f *facts) ownerProblem(address netip.Addr) error {
	for _, n := range f.nodes {
		if n.Name != f.req.Hostname && slices.Contains(addresses(n), address) {
			return fail(http.StatusBadRequest, api.CodeMember, "The address %s is that of the node %s", address, n.Name)
		}
	}
	return nil
}
