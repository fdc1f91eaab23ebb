package status

import (
	"context"
	"net"
	"slices"

	"microk8s/internal/datastore/storedir"
	"microk8s/internal/hostinfo"
	"microk8s/internal/nodecheck"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/service"
)

// Looks says by the name of each check what it looks at. The names are part of the machine-readable
// output and never change.
var Looks = func() map[string]string {
	looks := map[string]string{
		"services.manager":   "the answer of the service manager",
		"services.stopped":   "states of the services",
		"services.failing":   "states, exits and last log lines of the services",
		"kubelite.daemons":   "what kubelite writes about the daemons in it",
		"node.removed":       "what kubelite writes about this node's membership",
		"node.name":          "the node's name in args/ and of the host",
		"node.ready":         "conditions of Nodes in the API",
		"node.pressure":      "conditions of Nodes in the API",
		"node.machine-id":    "machine IDs of Nodes in the API",
		"node.copies":        "what cluster agents write into Nodes about other machines with the same identity",
		"node.checks":        "files, kernel settings and devices of this node",
		"manifests.failed":   "what kubelite writes about the files in args/manifests",
		"network.policies":   "what kubelite writes about network policies",
		"network.paths":      "what kubelite found on the ways to other nodes, a minute ago at most",
		"change.pending":     "the journal of joins and leaves",
		"ports.busy":         "ports that services need",
		"containerd.answers": "containerd's socket",
		"datastore.answers":  "the datastore's socket",
		"datastore.damage":   "what the datastore on this node says about damage to its files",
		"datastore.majority": "members of the datastore, as they see each other",
		"datastore.members":  "members of the datastore, as they see each other",
		"datastore.disk":     "disks of the datastore's members, as they report them",
		"datastore.limit":    "the datastore's size and limit, as its daemon reports them",
		"datastore.memory":   "memory of the datastore's control group",
		"agent.calls":        "versions of calls between agents, in the nodes' records",
		"datastore.address":  "addresses of this host, and of its member of the datastore",
		"api.answers":        "the API server's answers",
		"api.healthy":        "/readyz of the API server",
		"api.arguments":      "arguments of the API servers, in the nodes' records",
		"backup.age":         "the record of archives in the API",
		"backup.failed":      "the record of archives in the API",
		"addons.catalogue":   "the addons of the package",
		"addons.repository":  "addon repositories",
		"addons.state":       "records of addons in the API",
		"addons.pack":        "packs of addons on this node",
		"addons.pods":        "workloads of addons in the API, and their pods",
		"dns.custom":         "what CoreDNS writes about the ConfigMap coredns-custom",
		"disk.full":          "free space of the product's file systems",
		"clock.before":       "the clock, and the day on which the CA was made",
		"certs.valid":        "validity of the certificates in certs/",
	}
	for _, c := range nodecheck.Checks {
		looks[c.ID] = c.Looks
	}
	return looks
}()

// node is what is looked at on this node, whose services are in these states.
func (p *Prober) node(config nodeconfig.Config, services []service.State) *nodecheck.Node {
	n := &nodecheck.Node{Env: p.Env, Config: config, Now: p.Now, Services: services}
	own, err := hostinfo.Addresses()
	if config.Datastore.Own() && err == nil {
		for _, m := range storedir.Dir(p.Env.Backend()).Known() {
			host, _, err := net.SplitHostPort(m.Address)
			if ip := net.ParseIP(host); err == nil && ip != nil && !ip.IsLoopback() && !slices.ContainsFunc(own, ip.Equal) {
				n.Others = append(n.Others, host)
			}
		}
	}
	if p.Node != nil {
		p.Node(n)
	}
	return n
}

// Slow makes the checks that take longer, or whose findings harm only some, besides those of
// [Prober.Probe]: they are for `inspect`.
func (p *Prober) Slow(ctx context.Context, services []service.State) (problems []Problem, unseen []Unseen) {
	var r Report
	r.checked(nodecheck.RunSlow(ctx, p.node(nodeconfig.Load(p.Env), services)))
	return r.Problems, r.Unseen
}

// checked adds what checks of this node found.
func (r *Report) checked(results []nodecheck.Result) {
	for _, c := range results {
		for _, f := range c.Findings {
			r.Problems = append(r.Problems, Problem{ID: c.Check.ID, What: f.What, Do: f.Do})
		}
		if c.Unseen != nil {
			r.Unseen = append(r.Unseen, Unseen{ID: c.Check.ID, Why: c.Unseen.Error()})
		}
	}
}
