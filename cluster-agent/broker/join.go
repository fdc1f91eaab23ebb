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
	"time"

	corev1 "k8s.io/api/core/v1"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/server"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/fileaccess"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/pki"
	"microk8s/internal/ranges"
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

// authenticate finds out who asks. Until then the answer says nothing about the cluster.
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

// problems lists everything that speaks against a join, the most telling first, and notes in j what was
// settled on the way.
func (c *call) problems(j *joining) []error {
	f := c.b.gather(c.r.Context(), j)
	v := decide(f)
	j.members, j.nodes = f.members, f.nodes
	if j.req.ServerArguments != nil {
		j.arguments = f.arguments
	}
	j.address, j.local, j.replaces = v.address, v.local, v.replaces
	j.joiner.Address = v.address.String()
	return v.problems
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
	if now, err := ranges.Current(b.Env); err == nil {
		answer.NodeMasks = now.Masks
	}
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

// reachable makes the datastore listen where other nodes reach it, and returns its members. A
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

// ownAddress returns the address of this host for the datastore: the one where the request came
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
