package broker

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/server"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/encryption"
	"microk8s/internal/fileaccess"
	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/noderegistry"
	"microk8s/internal/pki"
	"microk8s/internal/serverargs"
	"microk8s/internal/token"
	"microk8s/internal/tokenstore"
)

// checkName refuses what cannot be a node's name. It gets into files, subjects and objects.
func checkName(name string) error {
	if err := nodeconfig.CheckNodeName(name); err != nil {
		return fail(http.StatusBadRequest, api.CodeRequest, "the hostname %v", err)
	}
	return nil
}

// shorten bounds what a stranger's text takes of an answer.
func shorten(s string) string {
	if len(s) > 64 {
		return s[:64] + "…"
	}
	return s
}

// joining is a join request with what was found out about it.
type joining struct {
	req     api.JoinRequest
	token   token.Token
	joiner  tokenstore.Joiner
	record  tokenstore.Record
	address netip.Addr // of the joining node
	local   netip.Addr // of this node, where the request came in
	nodes   []corev1.Node
	members []storedir.Member // nil with an external etcd

	arguments *serverargs.Set // of the API server, for a control-plane node
	replaces  *peers.Member   // the datastore's member that this node was before it was reinstalled, or nil
}

func (b *Broker) join(w http.ResponseWriter, r *http.Request) {
	var req api.JoinRequest
	if !server.ReadJSON(w, r, &req) {
		return
	}
	c := b.begin(w, r, "join")
	c.note("node", shorten(req.Hostname), "worker", bool(req.Worker), "ours", req.Product == api.Product)
	answer, err := c.join(req)
	c.end(answer, err)
}

func (c *call) join(req api.JoinRequest) (*api.JoinResponse, error) {
	j, err := c.authenticate(req)
	if err != nil {
		return nil, err
	}
	if problems := c.problems(j); len(problems) > 0 {
		return nil, problems[0]
	}
	if err := c.settle(c.r.Context(), j); err != nil {
		return nil, err
	}
	answer, err := c.material(j)
	if err != nil {
		return nil, err
	}
	key, err := c.b.Cluster.CallbackKey(c.r.Context())
	if err != nil {
		return nil, internal("Could not retrieve self callback token", err)
	}
	j.joiner.Join = token.NewJoin()
	record := c.b.record(j.joiner)
	if req.Secrets < 2 {
		// Upstream's clients, and those of the build before, want it now. It is of this join: it opens
		// nothing before the join is confirmed, and nothing of any other node at any time.
		answer.CallbackToken = key.Secret(record)
	}

	// From here on there are changes.
	ctx := c.r.Context()
	if _, err := c.b.Tokens.Reserve(ctx, j.token, j.joiner); err != nil {
		return nil, c.tokenFailure(err)
	}
	failed := func(err error) error {
		undoing := context.WithoutCancel(ctx)
		if hold, ok, undo := c.b.Tokens.Hold(undoing, j.token, req.Hostname); undo == nil && ok {
			if undo := c.b.takeBack(undoing, hold); undo != nil {
				c.b.Log.Warn("the record of the join stays until its time is over", "err", undo)
			}
		}
		if undo := c.b.Tokens.Release(context.WithoutCancel(ctx), j.token, req.Hostname); undo != nil {
			c.b.Log.Warn("the token stays reserved for ten minutes", "err", undo)
		}
		return err
	}
	record.Secrets = req.Secrets
	if err := c.b.Nodes.Put(ctx, record); err != nil {
		return nil, failed(fail(http.StatusServiceUnavailable, api.CodeUnavailable, "the join cannot be recorded now, try again: %v", err))
	}
	gone := func(m storedir.Member) bool { return j.replaces != nil && m.Address == j.replaces.Address }
	if j.replaces != nil {
		c.note("replaces", j.replaces.Address, "member", fmt.Sprintf("%x", j.replaces.ID))
		if err := c.b.Remove(ctx, j.replaces.ID, j.replaces.Address); err != nil && !errors.Is(err, peers.ErrNotMember) {
			return nil, failed(internal(fmt.Sprintf("cannot remove the datastore's member that this node was before; run microk8s remove-node %s --force, and join again", req.Hostname), err))
		}
		j.members = slices.DeleteFunc(j.members, gone)
	}
	if !bool(req.Worker) && j.members != nil {
		members, err := c.b.reachable(ctx, j.members, j.local, c.r.Host)
		if err != nil {
			return nil, failed(err)
		}
		members = slices.DeleteFunc(members, gone) // the file may be older
		for _, m := range members {
			if m.Role == storedir.Voter {
				answer.Voters = append(answer.Voters, m.Address)
			}
		}
	}
	c.note("address", j.address.String(), "ca", fingerprint([]byte(answer.CA)), "keys", !bool(req.Worker))
	return answer, nil
}

// authenticate finds out who asks. Nothing about the cluster is told before.
func (c *call) authenticate(req api.JoinRequest) (*joining, error) {
	t, err := c.token(req.Token)
	if err != nil {
		return nil, err
	}
	j := &joining{req: req, token: t, address: c.from}
	j.joiner = tokenstore.Joiner{Name: req.Hostname, Worker: bool(req.Worker), Ours: req.Product == api.Product}
	if j.record, err = c.b.Tokens.Check(c.r.Context(), t, j.joiner); err != nil {
		return nil, c.tokenFailure(err)
	}
	if err := checkName(req.Hostname); err != nil {
		return nil, err
	}
	if local, ok := c.r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
		if ap, err := netip.ParseAddrPort(local.String()); err == nil {
			j.local = ap.Addr().Unmap().WithZone("")
		}
	}
	return j, nil
}

// problems lists everything that speaks against a join, in upstream's order (cluster-agent.md
// 3.3), the most telling first. It changes nothing outside of j, in which it notes what it has found:
// members, nodes, the addresses of both sides and the member that the node replaces.
func (c *call) problems(j *joining) (out []error) {
	ctx, b, req := c.r.Context(), c.b, j.req
	add := func(err error) {
		if err != nil {
			out = append(out, err)
		}
	}
	config := b.config()
	if config.Worker {
		return []error{fail(http.StatusNotImplemented, api.CodeWorkerNode, "This node is a worker of a cluster. Contact a control plane node")}
	}
	if !config.HA {
		add(fail(http.StatusNotImplemented, api.CodeNotHA, "Not possible to join. This is not an HA MicroK8s cluster"))
	}
	if port := b.agentPort(); req.Port != port {
		add(fail(http.StatusBadGateway, api.CodePort, "The port of the cluster agent port has to be set to %s", port))
	}
	add(b.addressProblem(j))
	add(b.hostnameProblem(ctx, j))
	if !req.Worker {
		add(b.clientProblem(req))
		add(b.argumentsProblem(j))
	}
	var err error
	if !b.external() {
		if j.members, err = b.Members(); err != nil {
			add(internal("Failed to retrieve dqlite cluster nodes", err))
		}
		if !j.record.Knows(req.Hostname) {
			add(b.memberProblem(ctx, j))
		}
	}
	if j.nodes, err = b.Cluster.Nodes(ctx); err != nil {
		add(fail(http.StatusServiceUnavailable, api.CodeUnavailable, "the API server of this node does not answer now, try again: %v", err))
	}
	j.local = b.ofCluster(j.local, j.nodes)
	add(j.nameProblem())
	add(b.joiningProblem(ctx, j))
	add(b.reservedProblem(ctx, j))
	add(j.ownerProblem())
	if !req.Worker && req.Product == api.Product && req.Secrets < 2 {
		add(b.earlierProblem(ctx))
	}
	return out
}

// earlierProblem refuses a control-plane node of the build before where no other is: it could call
// no node, and would let machines join that are refused afterwards.
func (b *Broker) earlierProblem(ctx context.Context) error {
	complete, err := b.Nodes.Complete(ctx)
	switch {
	case err != nil:
		return fail(http.StatusServiceUnavailable, api.CodeUnavailable, "the API server of this node does not answer now, try again: %v", err)
	case complete:
		return fail(http.StatusInternalServerError, api.CodeOldClient,
			"The joining node has an earlier build than all control plane nodes of this cluster. Refresh it first: snap refresh microk8s")
	}
	return nil
}

// serving is the certificate of this node's API server, with the names and virtual addresses that the
// administrator has added; nil where it cannot be read.
func (b *Broker) serving() *x509.Certificate {
	text, err := os.ReadFile(b.Env.Cert("server.crt"))
	if err != nil {
		return nil
	}
	cert, err := pki.ParseCert(text)
	if err != nil {
		return nil
	}
	return cert
}

// reservedProblem refuses names under which something else is known in the cluster: the API server,
// a Service, another node, an address. A node's certificate serves under its name.
func (b *Broker) reservedProblem(ctx context.Context, j *joining) error {
	name := j.req.Hostname
	whose, err := b.nameOf(ctx, name, bool(j.req.Worker))
	if err != nil {
		return err
	}
	for _, n := range j.nodes {
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

// nameOf says what a name stands for that a node must not have; "" if nothing.
// A control-plane node serves the API itself, under all of its names.
func (b *Broker) nameOf(ctx context.Context, name string, worker bool) (string, error) {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	domain := strings.ToLower(strings.Trim(b.config().ClusterDomain, "."))
	under := func(suffix string) bool { return name == suffix || strings.HasSuffix(name, "."+suffix) }
	if _, err := netip.ParseAddr(name); err == nil {
		return "an address", nil
	}
	switch {
	case name == "kubernetes" || name == "kubernetes.default":
		return "the API server", nil
	case under("svc"), under(domain):
		return "Services of the cluster", nil
	case under("localhost"):
		return "every machine itself", nil
	}
	if cert := b.serving(); worker && cert != nil && slices.ContainsFunc(cert.DNSNames, func(n string) bool { return strings.EqualFold(n, name) }) {
		return "the API server", nil
	}
	service, namespace, two := strings.Cut(name, ".")
	if !two || service == "" || strings.Contains(namespace, ".") {
		return "", nil
	}
	there, err := b.Cluster.Namespace(ctx, namespace)
	if err != nil {
		return "", fail(http.StatusServiceUnavailable, api.CodeUnavailable, "the API server of this node does not answer now, try again: %v", err)
	}
	if there {
		return "a Service in the namespace " + namespace, nil
	}
	return "", nil
}

// memberProblem refuses an address or a name that a member of the datastore has. The file that lists
// the members may be a moment old, so the daemon is asked. A token for this node's name says that it
// was reinstalled: then its old member goes, if it does not live. The address is not enough for that:
// a member is the one of this node where the node's record says so, or where no record says whose it is.
func (b *Broker) memberProblem(ctx context.Context, j *joining) error {
	name := j.req.Hostname
	records, err := b.Nodes.List(ctx)
	if err != nil {
		return fail(http.StatusServiceUnavailable, api.CodeUnavailable, "the API server of this node does not answer now, try again: %v", err)
	}
	named := slices.ContainsFunc(records, func(r noderegistry.Record) bool { return r.Name == name && r.Member != 0 })
	if !named && !hasAddress(j.members, j.address) {
		return nil
	}
	live, err := b.Live(ctx)
	if err != nil {
		return internal("Failed to retrieve dqlite cluster nodes", err)
	}
	bound := j.record.Name == name
	for _, m := range live {
		ap, err := netip.ParseAddrPort(m.Address)
		there := err == nil && ap.Addr().Unmap() == j.address
		owner := noderegistry.OfMember(records, m.ID)
		mine := owner != nil && owner.Name == name
		known := fmt.Sprintf("Failed to retrieve dqlite cluster nodes: the joining node (%s) is already known to dqlite", j.address)
		switch {
		case !there && !mine:
		case !m.Online && bound && (owner == nil || mine):
			j.replaces = &m
		case !there:
			how := fmt.Sprintf("If it was reinstalled, make a token for it with: microk8s add-node --name %s", name)
			if m.Online {
				how = "Give the joining machine another host name"
			}
			return fail(http.StatusBadRequest, api.CodeNameTaken, "A node called %s is in the cluster already, with the datastore's member at %s. %s", name, m.Address, how)
		case m.Online || !j.joiner.Ours:
			return fail(http.StatusInternalServerError, api.CodeMember, "%s", known)
		case owner != nil && !mine:
			return fail(http.StatusInternalServerError, api.CodeMember, "%s, as the node %s. If that node is gone for good, remove it with: microk8s remove-node %[2]s --force", known, owner.Name)
		default:
			return fail(http.StatusInternalServerError, api.CodeMember, "%s. If it was reinstalled, make a token for it with: microk8s add-node --name %s", known, name)
		}
	}
	return nil
}

// ofCluster gives the address under which the cluster knows this node, where the request came in at
// one of the other family than the pods': an API server cannot be announced there.
func (b *Broker) ofCluster(local netip.Addr, nodes []corev1.Node) netip.Addr {
	cidrs := b.config().ClusterCIDRs
	if len(cidrs) == 0 || cidrs[0].Addr().Is4() == local.Is4() {
		return local
	}
	pods := cidrs[0]
	own, _ := b.Interfaces()
	for _, n := range nodes {
		for _, a := range addresses(n) {
			if a.Is4() == pods.Addr().Is4() && slices.ContainsFunc(own, func(p Interface) bool { return p.Addr() == a }) {
				return a
			}
		}
	}
	return local
}

// addressProblem settles under which address other nodes reach the joining one.
func (b *Broker) addressProblem(j *joining) error {
	if j.req.AdvertiseAddress != "" && j.joiner.Ours {
		a, err := netip.ParseAddr(j.req.AdvertiseAddress)
		if err != nil || a.Zone() != "" || !a.Unmap().IsGlobalUnicast() {
			return fail(http.StatusBadRequest, api.CodeRequest, "the advertised address %q is not one that other nodes can reach", shorten(j.req.AdvertiseAddress))
		}
		j.address = a.Unmap()
	}
	j.joiner.Address = j.address.String()
	own, _ := b.Interfaces() // where they cannot be listed, the address of the connection is compared
	same := j.address == j.local
	for _, p := range own {
		same = same || p.Addr() == j.address
	}
	if same || j.address.IsLoopback() {
		return fail(http.StatusServiceUnavailable, api.CodeSameAddress, "The joining node has the same IP (%s) as the node we contact", j.address)
	}
	return nil
}

// hostnameProblem is upstream's check, which our default address types make unnecessary.
func (b *Broker) hostnameProblem(ctx context.Context, j *joining) error {
	for _, kind := range b.config().APIServer.PreferredAddressTypes {
		if kind == "InternalIP" {
			return nil
		}
		if kind == "Hostname" {
			break
		}
	}
	addrs, err := b.Resolve(ctx, j.req.Hostname)
	if err != nil || !slices.Contains(addrs, j.address) {
		return fail(http.StatusBadRequest, api.CodeHostname, "The hostname (%s) of the joining node does not resolve to the IP %q. Refusing join", j.req.Hostname, j.address)
	}
	return nil
}

// clientProblem is about what a control-plane node must be able to do.
func (b *Broker) clientProblem(req api.JoinRequest) error {
	yes := func(p *bool) bool { return p != nil && *p || req.Product == api.Product }
	if b.external() {
		if !yes(req.CanHandleCustomEtcd) {
			return fail(http.StatusInternalServerError, api.CodeOldClient,
				"This MicroK8s cluster uses a custom etcd endpoint. update MicroK8s to version 1.28 or newer and retry the join operation")
		}
	} else if req.DatastoreProtocol != api.DatastoreProtocol {
		return fail(http.StatusNotImplemented, api.CodeDatastore,
			"This cluster's datastore is not one that the joining node's can be a member of: it speaks %q, and %q was offered. Upstream's MicroK8s can join it with --worker only",
			api.DatastoreProtocol, shorten(req.DatastoreProtocol))
	}
	if !yes(req.CanHandleX509Auth) {
		return fail(http.StatusInternalServerError, api.CodeOldClient,
			"Joining this MicroK8s cluster requires x509 authentication. update MicroK8s to version 1.28 or newer and retry the join operation")
	}
	return nil
}

// argumentsProblem is about the API server's arguments in which control-plane nodes must agree: all of
// them are carried by the join, or it is refused with the list. Without its keys a joining
// node could not read what the others have encrypted.
func (b *Broker) argumentsProblem(j *joining) error {
	set, problems, err := serverargs.Read(b.Env)
	if err != nil {
		return internal("Failed to read arguments of the API server", err)
	}
	if j.req.ServerArguments == nil {
		if set.Encryption() == nil {
			return nil // an older node, which differs as it always did
		}
		return fail(http.StatusNotImplemented, api.CodeOldClient,
			"This cluster encrypts Secrets at rest (--%s), and the joining node's MicroK8s cannot receive the key. Update it, or join it with --worker", encryption.Flag)
	}
	if problems = set.Reconcile(problems, j.req.ServerArguments); len(problems) > 0 {
		var list []string
		for _, p := range problems {
			list = append(list, p.String())
		}
		return fail(http.StatusConflict, api.CodeArguments, "The API server of %s has arguments that every control plane node must have and that a join cannot carry. "+
			"Set them on the joining node as they are here, in args/kube-apiserver with the same files, and join again: %s", j.local, strings.Join(list, "; "))
	}
	j.arguments = set
	return nil
}

// nameProblem keeps a name for the machine that has it. A token that is bound to the name is
// its owner's word, once the old machine is silent.
func (j *joining) nameProblem() error {
	if j.record.Knows(j.req.Hostname) {
		return nil
	}
	for _, n := range j.nodes {
		if n.Name != j.req.Hostname {
			continue
		}
		if !kube.Ready(&n) && j.record.Name == n.Name {
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
func (b *Broker) joiningProblem(ctx context.Context, j *joining) error {
	name := j.req.Hostname
	if j.record.Knows(name) || j.record.Name == name {
		return nil
	}
	r, err := b.Nodes.Get(ctx, name)
	switch {
	case errors.Is(err, noderegistry.ErrNone):
		return nil
	case err != nil:
		return fail(http.StatusServiceUnavailable, api.CodeUnavailable, "the API server of this node does not answer now, try again: %v", err)
	case !r.Pending() || b.Now().After(r.Until):
		return nil
	}
	return fail(http.StatusBadRequest, api.CodeNameTaken, "A node called %s is joining just now, with another token. If that is this machine, which was interrupted, end the other attempt with: "+
		"microk8s remove-node %[1]s; it also ends by itself within ten minutes. Else give the joining machine another host name", name)
}

// ownerProblem refuses an address that another node has.
func (j *joining) ownerProblem() error {
	for _, n := range j.nodes {
		if n.Name != j.req.Hostname && slices.Contains(addresses(n), j.address) {
			return fail(http.StatusBadRequest, api.CodeMember, "The address %s is that of the node %s", j.address, n.Name)
		}
	}
	return nil
}

// addresses are those of a node, its names left out.
func addresses(n corev1.Node) (out []netip.Addr) {
	for _, a := range n.Status.Addresses {
		if ip, err := netip.ParseAddr(a.Address); err == nil {
			out = append(out, ip.Unmap())
		}
	}
	return out
}

// material reads what a joining node is given.
func (c *call) material(j *joining) (*api.JoinResponse, error) {
	b := c.b
	read := func(what, path string) (string, error) {
		data, err := os.ReadFile(path)
		if err != nil {
			return "", internal(what, err)
		}
		return string(data), nil
	}
	ca, err := read("Failed reading cluster CA", b.Env.Cert("ca.crt"))
	if err != nil {
		return nil, err
	}
	kubelet, err := read("Failed to read arguments of kubelet service", b.Env.Args("kubelet"))
	if err != nil {
		return nil, err
	}
	config := b.config()
	answer := &api.JoinResponse{
		CA: ca, KubeletArgs: kubelet, HostnameOverride: j.address.String(),
		APIPort:           strconv.Itoa(config.APIServer.Port),
		AuthorizationMode: config.APIServer.AuthorizationMode,
		ClusterCIDR:       nodeconfig.JoinPrefixes(config.ClusterCIDRs),
		ServiceCIDR:       nodeconfig.JoinPrefixes(config.APIServer.ServiceCIDRs),
		Product:           api.Product,
	}
	if _, err := os.Stat(b.Env.CNIManifest()); err == nil {
		answer.CNI = true
	}
	servers, err := b.controlPlane(c.r.Context(), j)
	if err != nil {
		return nil, internal("Failed to retrieve list of control plane nodes", err)
	}
	for _, a := range servers {
		answer.APIServers = append(answer.APIServers, net.JoinHostPort(a.String(), answer.APIPort))
	}
	if j.req.Worker {
		for _, a := range servers {
			answer.ControlPlaneNodes = append(answer.ControlPlaneNodes, a.String())
		}
		return answer, nil
	}

	caKey, err := read("Failed to retrieve cluster CA key", b.Env.Cert("ca.key"))
	if err != nil {
		return nil, err
	}
	answer.CAKey = &caKey
	answer.ServerArguments = j.arguments
	if answer.ServiceAccountKey, err = read("Failed to retrieve service account key", b.Env.Cert("serviceaccount.key")); err != nil {
		return nil, err
	}
	if etcd := config.Datastore; etcd.Owner == nodeconfig.ExternalEtcd {
		answer.EtcdServers = etcd.Servers
		for to, path := range map[*string]string{&answer.EtcdCA: etcd.CAFile, &answer.EtcdCert: etcd.CertFile, &answer.EtcdKey: etcd.KeyFile} {
			if path != "" {
				if *to, err = read("Failed to read etcd certificates", path); err != nil {
					return nil, err
				}
			}
		}
		return answer, nil
	}
	if answer.ClusterCert, err = read("Failed to retrieve dqlite cluster certificate", b.store().File(storedir.CertFile)); err != nil {
		return nil, err
	}
	answer.ClusterKey, err = read("Failed to retrieve dqlite cluster key", b.store().File(storedir.KeyFile))
	return answer, err
}

// controlPlane lists the addresses of the control-plane nodes, this one first. Datastore
// members are control-plane nodes; with an external etcd the API servers say who they are.
// Labels do not count: a kubelet may give them to itself.
func (b *Broker) controlPlane(ctx context.Context, j *joining) ([]netip.Addr, error) {
	var out []netip.Addr
	add := func(a netip.Addr) {
		if a = a.Unmap(); a.IsGlobalUnicast() && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	if own, err := b.ownAddress(j.local, ""); err == nil {
		add(own)
	}
	if b.external() {
		servers, err := b.Cluster.APIServers(ctx)
		for _, a := range servers {
			add(a)
		}
		return out, err
	}
	members, err := b.Members()
	for _, m := range members {
		if ap, err := netip.ParseAddrPort(m.Address); err == nil && ap.Addr().Unmap() != j.address {
			add(ap.Addr())
		}
	}
	return out, err
}

func (b *Broker) store() storedir.Dir { return storedir.Dir(b.Env.Backend()) }

// Members reads the datastore's members from the file that its daemon keeps.
func (b *Broker) Members() ([]storedir.Member, error) { return b.store().Members() }

func hasAddress(members []storedir.Member, a netip.Addr) bool {
	return slices.ContainsFunc(members, func(m storedir.Member) bool {
		ap, err := netip.ParseAddrPort(m.Address)
		return err == nil && ap.Addr().Unmap() == a
	})
}

// moveTimeout bounds the restart of the datastore on its new address.
const moveTimeout = 60 * time.Second

// reachable makes the datastore listen where other nodes reach it, and gives its members. A
// single member that was never joined listens on the loopback.
func (b *Broker) reachable(ctx context.Context, members []storedir.Member, local netip.Addr, host string) ([]storedir.Member, error) {
	b.moving.Lock() // one join moves it, the others wait and find it moved
	defer b.moving.Unlock()
	if now, err := b.Members(); err == nil {
		members = now
	}
	if len(members) != 1 || !members[0].OnLoopback() {
		return members, nil
	}
	to, err := b.ownAddress(local, host)
	if err != nil {
		return nil, err
	}
	_, port, err := net.SplitHostPort(members[0].Address)
	if err != nil {
		return nil, internal("Failed to retrieve dqlite cluster nodes", err)
	}
	address := net.JoinHostPort(to.String(), port)
	if err := b.store().Move(address, fileaccess.For(b.Env).WriteShared); err != nil {
		return nil, internal("Failed to retrieve dqlite cluster nodes", err)
	}
	b.Log.Info("the datastore moves to an address that other nodes reach", "from", members[0].Address, "to", address)
	ctx, cancel := context.WithTimeout(ctx, moveTimeout)
	defer cancel()
	if err := b.Services.Restart(ctx, "k8s-dqlite"); err != nil {
		return nil, internal("Failed to retrieve dqlite cluster nodes: cannot restart the datastore", err)
	}
	return b.moved(ctx)
}

// moved waits until the datastore's file says that it moved and the datastore answers there.
func (b *Broker) moved(ctx context.Context) ([]storedir.Member, error) {
	for tick := time.NewTicker(50 * time.Millisecond); ; {
		members, err := b.Members()
		if err == nil && !members[0].OnLoopback() && b.Reach(ctx, members[0].Address) == nil {
			return members, nil
		}
		select {
		case <-ctx.Done():
			return nil, internal("Failed to retrieve dqlite cluster nodes",
				errors.New("failed waiting for dqlite cluster to come up: timed out waiting for cluster condition: context deadline exceeded"))
		case <-tick.C:
		}
	}
}

// ownAddress gives the address of this host for the datastore: the one where the request came
// in. A virtual one (with a full-length mask) gives way to one of the interface's network.
// The Host header, which the client chooses, counts only where the connection came over the
// loopback, and then names one of this host's own addresses.
func (b *Broker) ownAddress(local netip.Addr, host string) (netip.Addr, error) {
	own, err := b.Interfaces()
	if err != nil {
		return netip.Addr{}, internal("Failed to retrieve dqlite cluster nodes", err)
	}
	candidate := local
	if h, _, err := net.SplitHostPort(host); err == nil {
		if a, err := netip.ParseAddr(h); err == nil && !local.IsGlobalUnicast() {
			candidate = a.Unmap()
		}
	}
	refuse := func(a netip.Addr) error {
		return fail(http.StatusInternalServerError, api.CodeAddress,
			"Failed to retrieve dqlite cluster nodes: failed to find matching dqlite bind address for %s: address %s was not found in any host interface. refuse to update dqlite bind address to %s as it would break the cluster",
			shorten(host), a, a)
	}
	if !candidate.IsGlobalUnicast() {
		return netip.Addr{}, refuse(candidate)
	}
	var virtual bool
	for _, p := range own {
		if p.Addr() == candidate {
			if p.Bits() < p.Addr().BitLen() {
				return candidate, nil
			}
			virtual = true
		}
	}
	if !virtual {
		return netip.Addr{}, refuse(candidate)
	}
	for _, p := range own {
		if p.Bits() < p.Addr().BitLen() && p.Masked().Contains(candidate) {
			return p.Addr(), nil
		}
	}
	return candidate, nil
}
