package broker

import (
	"errors"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/cluster-agent/api"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/encryption"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/noderegistry"
	"microk8s/internal/serverargs"
	"microk8s/internal/tokenstore"
)

// good is a join of n2 at 10.0.0.2 that nothing speaks against, at n1 with 10.0.0.1.
func good(worker bool) *facts {
	f := &facts{
		req: api.JoinRequest{Hostname: "n2", Port: "25000", Product: api.Product, Secrets: 2, DatastoreProtocol: api.DatastoreProtocol},
		config: nodeconfig.Config{
			State: nodeconfig.State{HA: true}, AgentPort: 25000, ClusterDomain: "cluster.local",
			APIServer: nodeconfig.APIServerConfig{PreferredAddressTypes: []string{"InternalIP"}},
		},
		from: netip.MustParseAddr("10.0.0.2"), local: netip.MustParseAddr("10.0.0.1"), own: []Interface{netip.MustParsePrefix("10.0.0.1/24")},
		arguments: &serverargs.Set{}, members: []storedir.Member{{ID: 1, Address: "10.0.0.1:19001"}},
		nodes: []corev1.Node{nodeAt("n1", "10.0.0.1", true)}, serving: []string{"api.example"},
	}
	f.req.Worker = api.Worker(worker)
	return f
}

func nodeAt(name, address string, ready bool) corev1.Node {
	status := corev1.ConditionFalse
	if ready {
		status = corev1.ConditionTrue
	}
	return corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{
		Addresses:  []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: address}, {Type: corev1.NodeHostName, Address: name}},
		Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: status}},
	}}
}

// TestDecide has every refusal, what is next to it, and what is admitted.
func TestDecide(t *testing.T) {
	t.Parallel()
	const both, worker, controlPlane = 0, 1, 2
	silence := errors.New("silence")
	external := func(f *facts) { f.config.Datastore.Owner = nodeconfig.ExternalEtcd }
	// member adds a second member to the datastore, at n2's address.
	member := func(f *facts, online bool, records ...noderegistry.Record) {
		f.members = append(f.members, storedir.Member{ID: 2, Address: "10.0.0.2:19001"})
		f.live = []peers.Member{{ID: 1, Address: "10.0.0.1:19001", Online: true}, {ID: 2, Address: "10.0.0.2:19001", Online: online}}
		f.records = records
	}
	for _, tc := range []struct {
		name   string
		of     int // roles that it is tried with
		change func(f *facts)
		code   api.Code // "" is admitted
		text   string   // part of the message
	}{
		{"nothing against it", both, func(*facts) {}, "", ""},
		{"this node is a worker", both, func(f *facts) { f.config.Worker = true }, api.CodeWorkerNode, "Contact a control plane node"},
		{"no HA", both, func(f *facts) { f.config.HA = false }, api.CodeNotHA, "not an HA"},
		{"another port", both, func(f *facts) { f.req.Port = "25001" }, api.CodePort, "25000"},
		{"the other agents' port", both, func(f *facts) { f.req.Port, f.config.AgentPort = "25001", 25001 }, "", ""},

		{"the same address", both, func(f *facts) { f.from = f.local }, api.CodeSameAddress, "same IP"},
		{"another address of this node", both, func(f *facts) {
			f.from, f.own = netip.MustParseAddr("10.9.0.1"), append(f.own, netip.MustParsePrefix("10.9.0.1/24"))
		}, api.CodeSameAddress, "10.9.0.1"},
		{"the loopback", both, func(f *facts) { f.from = netip.MustParseAddr("127.0.0.1") }, api.CodeSameAddress, "127.0.0.1"},
		{"an advertised address", both, func(f *facts) { f.req.AdvertiseAddress = "10.0.0.7" }, "", ""},
		{"an advertised address that is none", both, func(f *facts) { f.req.AdvertiseAddress = "10.0.0.300" }, api.CodeRequest, "10.0.0.300"},
		{"an advertised loopback", both, func(f *facts) { f.req.AdvertiseAddress = "127.0.0.1" }, api.CodeRequest, "127.0.0.1"},
		{"an advertised address with a zone", both, func(f *facts) { f.req.AdvertiseAddress = "fe80::1%eth0" }, api.CodeRequest, "fe80"},
		{"an advertised address of another node", both, func(f *facts) {
			f.req.AdvertiseAddress = "10.0.0.5"
			f.nodes = append(f.nodes, nodeAt("w1", "10.0.0.5", true))
		}, api.CodeMember, "that of the node w1"},
		{"upstream's advertised address is not its own to choose", worker, func(f *facts) { f.req.Product, f.req.AdvertiseAddress = "", "nonsense" }, "", ""},

		{"host names that do not resolve", both, func(f *facts) { f.config.APIServer.PreferredAddressTypes = []string{"Hostname", "InternalIP"} }, api.CodeHostname, "does not resolve"},
		{"no address types", both, func(f *facts) { f.config.APIServer.PreferredAddressTypes = nil }, api.CodeHostname, "does not resolve"},
		{"host names that resolve", both, func(f *facts) {
			f.config.APIServer.PreferredAddressTypes, f.resolved = []string{"Hostname"}, []netip.Addr{f.from}
		}, "", ""},

		{"another datastore", controlPlane, func(f *facts) { f.req.DatastoreProtocol = "" }, api.CodeDatastore, "--worker"},
		{"a worker has no datastore", worker, func(f *facts) { f.req.DatastoreProtocol = "" }, "", ""},
		{"an external etcd", both, external, "", ""},
		{"an old client and an external etcd", controlPlane, func(f *facts) { external(f); f.req.Product = "" }, api.CodeOldClient, "custom etcd"},
		{"an old client without x509", controlPlane, func(f *facts) { f.req.Product = "" }, api.CodeOldClient, "x509"},

		{"arguments that cannot be read", controlPlane, func(f *facts) { f.argumentsErr = silence }, api.CodeInternal, "arguments of the API server: silence"},
		{"encryption and an older node", controlPlane, func(f *facts) { f.arguments.Files = []serverargs.File{{Flag: encryption.Flag}} }, api.CodeOldClient, "encrypts Secrets"},
		{"arguments that differ", controlPlane, func(f *facts) {
			f.req.ServerArguments, f.differences = map[string]string{}, []serverargs.Problem{{Flag: "oidc-ca-file", Why: "it differs"}}
		}, api.CodeArguments, "--oidc-ca-file: it differs"},
		{"an earlier build where no other is", controlPlane, func(f *facts) { f.req.Secrets, f.complete = 0, true }, api.CodeOldClient, "earlier build"},
		{"an earlier build among others", controlPlane, func(f *facts) { f.req.Secrets = 0 }, "", ""},
		{"an earlier build, and silence", controlPlane, func(f *facts) { f.req.Secrets, f.completeErr = 0, silence }, api.CodeUnavailable, "silence"},

		{"members that cannot be read", both, func(f *facts) { f.membersErr = silence }, api.CodeInternal, "silence"},
		{"records that cannot be read", both, func(f *facts) { f.recordsErr = silence }, api.CodeUnavailable, "silence"},
		{"a datastore that does not answer", both, func(f *facts) { member(f, true); f.liveErr = silence }, api.CodeInternal, "silence"},
		{"a member that lives", both, func(f *facts) { member(f, true) }, api.CodeMember, "already known to dqlite"},
		{"a member that lives, and a token for it", both, func(f *facts) { member(f, true); f.record.Name = "n2" }, api.CodeMember, "already known"},
		{"a silent member", both, func(f *facts) { member(f, false) }, api.CodeMember, "add-node --name n2"},
		{"a silent member, and a token for it", both, func(f *facts) { member(f, false); f.record.Name = "n2" }, "", ""},
		{"a silent member of another node", both, func(f *facts) {
			member(f, false, noderegistry.Record{Name: "n3", Member: 2})
			f.record.Name = "n2"
		}, api.CodeMember, "remove-node n3 --force"},
		{"its member is elsewhere", both, func(f *facts) {
			member(f, false, noderegistry.Record{Name: "n2", Member: 2})
			f.members[1].Address, f.live[1].Address = "10.0.0.9:19001", "10.0.0.9:19001"
		}, api.CodeNameTaken, "at 10.0.0.9:19001. If it was reinstalled"},
		{"its member is elsewhere, and lives", both, func(f *facts) {
			member(f, true, noderegistry.Record{Name: "n2", Member: 2})
			f.members[1].Address, f.live[1].Address = "10.0.0.9:19001", "10.0.0.9:19001"
		}, api.CodeNameTaken, "another host name"},
		{"a join that goes on", both, func(f *facts) { member(f, true); f.record.Names = []string{"n2"} }, "", ""},

		{"an API server that does not answer", both, func(f *facts) { f.nodes, f.nodesErr = nil, silence }, api.CodeUnavailable, "silence"},
		{"the name of a node", both, func(f *facts) { f.nodes = append(f.nodes, nodeAt("n2", "10.0.0.8", true)) }, api.CodeNameTaken, "another host name"},
		{"the name of a silent node", both, func(f *facts) { f.nodes = append(f.nodes, nodeAt("n2", "10.0.0.8", false)) }, api.CodeNameTaken, "remove-node n2"},
		{"the name of a silent node, and a token for it", both, func(f *facts) {
			f.nodes, f.record.Name = append(f.nodes, nodeAt("n2", "10.0.0.8", false)), "n2"
		}, "", ""},
		{"the name of a node, and a token for it", both, func(f *facts) {
			f.nodes, f.record.Name = append(f.nodes, nodeAt("n2", "10.0.0.8", true)), "n2"
		}, api.CodeNameTaken, "another host name"},
		{"a name that joins just now", both, func(f *facts) { f.joining = &noderegistry.Record{Name: "n2"} }, api.CodeNameTaken, "joining just now"},
		{"whether it joins cannot be read", both, func(f *facts) { f.joiningErr = silence }, api.CodeUnavailable, "silence"},
		{"the address of a node", both, func(f *facts) { f.nodes = append(f.nodes, nodeAt("n3", "10.0.0.2", true)) }, api.CodeMember, "that of the node n3"},

		{"named as an address", both, func(f *facts) { f.req.Hostname = "10.0.0.9" }, api.CodeNameTaken, "an address"},
		{"named as the API server", both, func(f *facts) { f.req.Hostname = "kubernetes.default" }, api.CodeNameTaken, "the API server"},
		{"named as a Service", both, func(f *facts) { f.req.Hostname = "kube-dns.kube-system.svc" }, api.CodeNameTaken, "Services of the cluster"},
		{"named in the cluster's domain", both, func(f *facts) { f.req.Hostname = "x.cluster.local" }, api.CodeNameTaken, "Services of the cluster"},
		{"named as every machine", both, func(f *facts) { f.req.Hostname = "localhost" }, api.CodeNameTaken, "every machine"},
		{"named in the API server's certificate", worker, func(f *facts) { f.req.Hostname = "API.example" }, api.CodeNameTaken, "the API server"},
		{"a control-plane node serves under that name", controlPlane, func(f *facts) { f.req.Hostname = "api.example" }, "", ""},
		{"named as a Service of a namespace", both, func(f *facts) { f.req.Hostname, f.namespace = "web.shop", true }, api.CodeNameTaken, "namespace shop"},
		{"no such namespace", both, func(f *facts) { f.req.Hostname = "web.shop" }, "", ""},
		{"namespaces that cannot be read", both, func(f *facts) { f.req.Hostname, f.namespaceErr = "web.shop", silence }, api.CodeUnavailable, "silence"},
		{"named as another node's host", both, func(f *facts) {
			f.nodes[0].Status.Addresses = append(f.nodes[0].Status.Addresses, corev1.NodeAddress{Type: corev1.NodeHostName, Address: "N2"})
		}, api.CodeNameTaken, "the node n1"},
	} {
		for role, isWorker := range map[int]bool{worker: true, controlPlane: false} {
			if tc.of != both && tc.of != role {
				continue
			}
			f := good(isWorker)
			tc.change(f)
			v := decide(f)
			if tc.code == "" {
				if len(v.problems) > 0 {
					t.Errorf("%s, worker %t: %v", tc.name, isWorker, v.problems)
				}
				continue
			}
			if !slices.ContainsFunc(v.problems, func(err error) bool {
				var p *failure
				return errors.As(err, &p) && p.code == tc.code && strings.Contains(p.text, tc.text) && p.status >= http.StatusBadRequest
			}) {
				t.Errorf("%s, worker %t: %v, want %s with %q", tc.name, isWorker, v.problems, tc.code, tc.text)
			}
		}
	}
}

// TestVerdict is about what else is settled: both addresses, and the member that is replaced.
func TestVerdict(t *testing.T) {
	t.Parallel()
	f := good(false)
	f.req.AdvertiseAddress = "10.0.0.7"
	f.config.ClusterCIDRs, f.local = []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}, netip.MustParseAddr("fd00::1")
	f.own = append(f.own, netip.MustParsePrefix("fd00::1/64"))
	f.members = append(f.members, storedir.Member{ID: 2, Address: "10.0.0.7:19001"})
	f.live, f.record = []peers.Member{{ID: 2, Address: "10.0.0.7:19001"}}, tokenstore.Record{Name: "n2"}
	v := decide(f)
	if len(v.problems) > 0 || v.address.String() != "10.0.0.7" || v.local.String() != "10.0.0.1" || v.replaces == nil || v.replaces.ID != 2 {
		t.Errorf("%+v", v)
	}
	f = good(true)
	f.local, f.config.HA, f.req.Port = f.from, false, ""
	if v := decide(f); len(v.problems) != 3 {
		t.Errorf("the first problem hides others: %v", v.problems)
	}
}
