package broker

import (
	"errors"
	"fmt"
	"net"
	"net/http"

	"k8s.io/apimachinery/pkg/util/version"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/server"
	"microk8s/internal/nodeconfig"
)

// preflight says all that would be in the way of a join, and changes nothing.
func (b *Broker) preflight(w http.ResponseWriter, r *http.Request) {
	var req api.PreflightRequest
	if !server.ReadJSON(w, r, &req) {
		return
	}
	c := b.begin(w, r, "preflight")
	c.note("node", shorten(req.Hostname), "worker", bool(req.Worker))
	answer, err := c.preflight(req)
	c.end(answer, err)
}

func (c *call) preflight(req api.PreflightRequest) (*api.PreflightResponse, error) {
	j, err := c.authenticate(req.JoinRequest)
	if err != nil {
		return nil, err
	}
	b, ctx := c.b, c.r.Context()
	answer := &api.PreflightResponse{
		Product: api.Product, Version: b.Version, Problems: []api.Problem{}, External: b.external(), CIDR: nodeconfig.JoinPrefixes(b.config().ClusterCIDRs),
	}
	for _, err := range c.problems(j) {
		var f *failure
		if errors.As(err, &f) {
			answer.Problems = append(answer.Problems, api.Problem{Code: f.code, Message: f.text, Fatal: true})
		}
	}
	warn := func(code api.Code, fatal bool, format string, a ...any) {
		answer.Problems = append(answer.Problems, api.Problem{Code: code, Message: fmt.Sprintf(format, a...), Fatal: fatal})
	}
	for _, n := range j.nodes {
		info := n.Status.NodeInfo
		if n.Name != req.Hostname && (same(info.MachineID, req.MachineID) || same(info.SystemUUID, req.SystemUUID)) {
			warn(api.CodeCloned, false, "The machine has the same machine-id or product_uuid as the node %s; it looks like a clone. Make a new one with: systemd-machine-id-setup", n.Name)
		}
	}
	if text, fatal := skew(b.Version, req.Version, bool(req.Worker)); text != "" {
		warn(api.CodeVersion, fatal, "%s", text)
	}
	if j.address.IsValid() && req.Port == b.agentPort() {
		to := net.JoinHostPort(j.address.String(), req.Port)
		if err := b.Reach(ctx, to); err != nil {
			warn(api.CodeAgent, false, "The cluster agent of the joining node cannot be reached at %s from here: %v", to, err)
		}
	}
	servers, err := b.controlPlane(ctx, j)
	if err != nil {
		warn(api.CodeUnavailable, true, "Failed to retrieve list of control plane nodes: %v", err)
	}
	for _, a := range servers {
		answer.Servers = append(answer.Servers, net.JoinHostPort(a.String(), b.apiPort()))
	}
	for _, m := range j.members {
		if !m.OnLoopback() {
			answer.Members = append(answer.Members, m.Address)
		}
	}
	answer.Address = j.address.String()
	answer.Time = b.Now().UnixMilli()
	return answer, nil
}

func same(a, b string) bool { return a != "" && a == b }

// skew compares versions by Kubernetes' rules: a kubelet is never newer than the API server and
// at most three minor versions older; API servers differ by one.
func skew(cluster, node string, worker bool) (text string, fatal bool) {
	if cluster == "" || node == "" {
		return "", false
	}
	c, err := version.ParseGeneric(cluster)
	if err != nil {
		return "", false
	}
	n, err := version.ParseGeneric(node)
	if err != nil {
		return fmt.Sprintf("The version %q of the joining node cannot be compared with %s", shorten(node), cluster), false
	}
	older := int(c.Minor()) - int(n.Minor())
	switch {
	case c.Major() != n.Major(), worker && (older < 0 || older > 3), !worker && (older < -1 || older > 1):
		return fmt.Sprintf("The joining node has %s, the cluster %s: that is too far apart", node, cluster), true
	case older != 0:
		return fmt.Sprintf("The joining node has %s, the cluster %s", node, cluster), false
	}
	return "", false
}
