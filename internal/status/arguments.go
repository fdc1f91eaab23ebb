package status

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	rbacv1 "k8s.io/api/rbac/v1"

	"microk8s/internal/noderegistry"
	"microk8s/internal/serverargs"
)

// differences compares what control-plane nodes say of their API servers' arguments in their records,
// and sorts the nodes by their agents' ports. A node that is joining is not asked yet.
func differences(records []rbacv1.ClusterRoleBinding) ([]serverargs.Difference, map[int][]string) {
	nodes := map[string]*serverargs.Summary{}
	ports := map[int][]string{}
	for i := range records {
		r := noderegistry.Decode(&records[i])
		if r.Pending() || r.ServerArguments == "" || r.Role != noderegistry.ControlPlane {
			continue
		}
		if r.AgentPort > 0 {
			ports[r.AgentPort] = append(ports[r.AgentPort], r.Name)
		}
		if s, err := serverargs.ParseSummary(r.ServerArguments); err == nil {
			nodes[r.Name] = s
		}
	}
	return serverargs.Compare(nodes), ports
}

// portProblem says that agents listen on different ports: nodes call each other on that which they have
// themselves.
func (r *Report) portProblem(ports map[int][]string) {
	if len(ports) < 2 {
		return
	}
	var sides []string
	for _, port := range slices.Sorted(maps.Keys(ports)) {
		sides = append(sides, fmt.Sprintf("port %d on %s", port, enumerate(slices.Sorted(slices.Values(ports[port])))))
	}
	r.add("agent.calls", "the nodes cannot call each other: their cluster agents have %s", enumerate(sides))(
		"write the same port into --bind of args/cluster-agent on every node, workers too, and run microk8s stop; microk8s start there")
}

// argumentProblems names the arguments in which API servers differ, those of the same nodes together.
func (r *Report) argumentProblems() {
	var order []string
	arguments := map[string][]string{}
	for _, d := range r.Differences {
		text := sides(d.Groups)
		if arguments[text] == nil {
			order = append(order, text)
		}
		arguments[text] = append(arguments[text], "--"+d.Argument)
	}
	for _, text := range order {
		list := arguments[text]
		verb := "differs"
		if len(list) > 1 {
			verb = "differ"
		}
		r.add("api.arguments", "what a request may do depends on which API server it reaches: %s %s (%s)", enumerate(list), verb, text)(
			"edit args/kube-apiserver and the files that it names so that they agree on these nodes, and where you change them run microk8s stop; microk8s start")
	}
}

// sides says which nodes have the same.
func sides(groups []serverargs.Group) string {
	var out []string
	sets := 0
	for _, g := range groups {
		nodes := enumerate(slices.Clone(g.Nodes))
		one := len(g.Nodes) == 1
		verb := func(singular, plural string) string {
			if one {
				return singular
			}
			return plural
		}
		switch {
		case g.Unreadable:
			out = append(out, nodes+" cannot read "+verb("its", "their")+" file")
		case !g.Set:
			out = append(out, nodes+" "+verb("does", "do")+" not set it")
		case sets == 0:
			out = append(out, nodes+" "+verb("has", "have")+" one value")
			sets++
		default:
			out = append(out, nodes+" "+verb("has", "have")+" another")
			sets++
		}
	}
	return strings.Join(out, ", ")
}

// enumerate writes a list as people do: a, b and c.
func enumerate(list []string) string {
	if len(list) < 2 {
		return strings.Join(list, "")
	}
	return fmt.Sprintf("%s and %s", strings.Join(list[:len(list)-1], ", "), list[len(list)-1])
}
