package status

import (
	"os"
	"path/filepath"
	"strings"

	"sigs.k8s.io/yaml"

	"microk8s/internal/args"
	"microk8s/internal/snapenv"
)

// node is an entry of the datastore's info.yaml and cluster.yaml.
type node struct {
	Address string `json:"Address"`
	Role    int    `json:"Role"`
}

var roles = map[int]Role{0: Voter, 1: Standby, 2: Spare}

// readHA reads what the datastore's own files say of its members. Missing files give no
// members, never an error: the node may be about to start for the first time.
func readHA(env snapenv.Env) HA {
	if ep, external := externalEndpoints(env); external {
		return HA{Endpoints: ep}
	}
	if !env.Locked(snapenv.LockHA) {
		return HA{}
	}
	ha := HA{Datastore: true}
	var nodes []node
	if data, err := os.ReadFile(filepath.Join(env.Backend(), "cluster.yaml")); err == nil {
		_ = yaml.Unmarshal(data, &nodes)
	}
	if len(nodes) == 0 {
		for _, name := range []string{"info.yaml", "init.yaml"} {
			var n node
			data, err := os.ReadFile(filepath.Join(env.Backend(), name))
			if err == nil && yaml.Unmarshal(data, &n) == nil && n.Address != "" {
				nodes = []node{n}
				break
			}
		}
	}
	voters := 0
	for _, n := range nodes {
		m := Member{Address: n.Address, Role: roles[n.Role]}
		if m.Role == Voter {
			voters++
		}
		ha.Nodes = append(ha.Nodes, m)
	}
	const highlyAvailable = 3
	ha.Enabled = voters >= highlyAvailable
	return ha
}

// externalEndpoints gives the addresses of an etcd that is not ours, where the API server is
// configured for one.
func externalEndpoints(env snapenv.Env) ([]string, bool) {
	f, err := args.Load(env.Args("kube-apiserver"), args.GrammarFor("kube-apiserver"))
	if err != nil {
		return nil, false
	}
	value, ok := f.Value("etcd-servers", env.Lookup)
	if !ok || strings.Contains(value, "var/kubernetes/backend/kine.sock") {
		return nil, false
	}
	var out []string
	for ep := range strings.SplitSeq(value, ",") {
		if _, after, ok := strings.Cut(ep, "://"); ok {
			ep = after
		}
		out = append(out, strings.Trim(ep, `"' `))
	}
	return out, true
}
