package status

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"microk8s/internal/addon"
	"microk8s/internal/archive/schedule"
	"microk8s/internal/nodecopy"
	"microk8s/internal/noderegistry"
	"microk8s/internal/serverargs"
)

// apiClient asks the API server of this node with the administrator's certificate.
type apiClient struct {
	base string
	http *http.Client
}

// errStatus is an answer of the API server other than 200.
type errStatus struct {
	code int
	body string
}

func (e *errStatus) Error() string {
	return fmt.Sprintf("%d %s: %s", e.code, http.StatusText(e.code), shorten(strings.Join(strings.Fields(e.body), " ")))
}

func (p *Prober) client() (*apiClient, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.api != nil {
		return p.api, nil
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", p.Env.AdminKubeconfig())
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", p.Env.AdminKubeconfig(), err)
	}
	h, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("cannot use %s: %w", p.Env.AdminKubeconfig(), err)
	}
	p.api = &apiClient{base: strings.TrimSuffix(cfg.Host, "/"), http: h}
	return p.api, nil
}

// get asks for path; the caller closes the body.
func (c *apiClient) get(ctx context.Context, path, accept string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", accept)
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return nil, &errStatus{resp.StatusCode, string(body)}
	}
	return resp.Body, nil
}

func (c *apiClient) decode(ctx context.Context, path string, into any) error {
	return c.decodeAs(ctx, path, "application/json", into)
}

func (c *apiClient) decodeAs(ctx context.Context, path, accept string, into any) error {
	body, err := c.get(ctx, path, accept)
	if err != nil {
		return err
	}
	defer body.Close()
	if into == nil {
		_, err = io.Copy(io.Discard, body)
		return err
	}
	return json.NewDecoder(body).Decode(into)
}

// apiState is what the API server said.
type apiState struct {
	err     error // it cannot be reached or used
	late    bool  // it takes connections and did not answer in time
	healthy error // /readyz
	service error // the service `kubernetes`
	nodes   []corev1.Node
	version string // resource version of nodes
	nodeErr error

	records   []corev1.ConfigMap // of the addons that are on
	recordErr error
	ignored   map[string]string // keys of coredns-custom without effect, and why

	foreign    map[string]bool // addons of added repositories that are on, by full name
	foreignErr error

	differences []serverargs.Difference
	agentPorts  map[int][]string // nodes by their agents' ports

	weak    []workload // of addons, that lack pods
	weakErr error

	backups   *schedule.State // nil where there is none
	backupErr error

	// started is when this node's kubelet was started, zero where that is not known, and
	// local is this node's name. What the API server has of the time before says nothing.
	started time.Time
	local   string
}

// nodesPath lists some nodes, so that one that is not Ready is seen in a cluster of a few. The
// local one is asked for besides: what status costs does not grow with the cluster.
const nodesPath = "/api/v1/nodes?limit=50"

// probeAPI asks the API server of the node called local.
func (p *Prober) probeAPI(ctx context.Context, local string) apiState {
	s := apiState{}
	c, err := p.client()
	if err != nil {
		s.err = err
		return s
	}
	var list corev1.NodeList
	var own corev1.Node
	var records corev1.ConfigMapList
	var foreign map[string]bool
	var foreignErr error
	var bindings rbacv1.ClusterRoleBindingList
	var bindingsErr error
	var weak []workload
	var weakErr error
	var backups *schedule.State
	var backupErr error
	var ignored corev1.ConfigMap
	missed := gather(ctx, map[string]func(){
		"weak":    func() { weak, weakErr = c.weak(ctx) },
		"backup":  func() { backups, backupErr = c.backups(ctx) },
		"foreign": func() { foreign, foreignErr = c.foreign(ctx, p.Env) },
		"ignored": func() { _ = c.decode(ctx, addon.IgnoredDNSPath, &ignored) }, // it is there with dns only
		"readyz":  func() { s.healthy = c.decode(ctx, "/readyz", nil) },
		"service": func() { s.service = c.decode(ctx, "/api/v1/namespaces/default/services/kubernetes", nil) },
		"addons":  func() { s.recordErr = c.decode(ctx, recordsPath, &records) },
		"records": func() { bindingsErr = c.decode(ctx, noderegistry.ControlPlanePath, &bindings) },
		"nodes":   func() { s.nodeErr = c.decode(ctx, nodesPath, &list) },
		"own": func() { // where it is not registered the list says so
			if local == "" || c.decode(ctx, "/api/v1/nodes/"+url.PathEscape(local), &own) != nil {
				own = corev1.Node{}
			}
		},
	})
	if missed["backup"] {
		s.backupErr = errors.New("the API server does not answer in time")
		delete(missed, "backup")
	} else {
		s.backups, s.backupErr = backups, backupErr
	}
	if missed["weak"] {
		s.weakErr = errors.New("the API server does not answer in time")
		delete(missed, "weak")
	} else {
		s.weak, s.weakErr = weak, weakErr
	}
	if missed["foreign"] {
		s.foreignErr = errors.New("the API server does not answer in time")
		delete(missed, "foreign")
	} else {
		s.foreign, s.foreignErr = foreign, foreignErr
	}
	if !missed["ignored"] {
		s.ignored = ignored.Data
	}
	delete(missed, "ignored")
	if missed["records"] {
		delete(missed, "records") // one that answers says enough
	} else if bindingsErr == nil {
		s.differences, s.agentPorts = differences(bindings.Items)
	}
	if len(missed) > 0 || errors.Is(s.healthy, context.DeadlineExceeded) { // the same, told by the connection
		return apiState{late: true}
	}
	s.nodes, s.version = list.Items, list.ResourceVersion
	if own.Name != "" && !slices.ContainsFunc(s.nodes, func(n corev1.Node) bool { return n.Name == own.Name }) {
		s.nodes = append(s.nodes, own)
	}
	s.records = records.Items
	if s.healthy != nil {
		var status *errStatus
		if !errors.As(s.healthy, &status) {
			s.err = s.healthy
		}
	}
	return s
}

// ready reports whether the node can be used: see [Report.Ready].
func (s apiState) ready() bool {
	if s.err != nil || s.service != nil || s.nodeErr != nil {
		return false
	}
	for _, n := range s.nodes {
		if c := readyCondition(n); c != nil && c.Status == corev1.ConditionTrue && !s.stale(n, c) {
			return true
		}
	}
	return false
}

// stale reports whether a condition of this node is from before its kubelet was started. A
// kubelet reports at once when it starts. Its reports carry whole seconds, rounded down: one
// from the second of the start counts as old, because an API server, which the kubelet waits
// for, takes longer than that to be ready.
func (s apiState) stale(n corev1.Node, c *corev1.NodeCondition) bool {
	if s.started.IsZero() || n.Name != s.local && len(s.nodes) > 1 {
		return false
	}
	return c.LastHeartbeatTime.Time.Before(s.started)
}

func readyCondition(n corev1.Node) *corev1.NodeCondition {
	for i := range n.Status.Conditions {
		if n.Status.Conditions[i].Type == corev1.NodeReady {
			return &n.Status.Conditions[i]
		}
	}
	return nil
}

// why says in a few words what is missing to ready.
func (s apiState) why() string {
	switch {
	case errors.Is(s.err, syscall.ECONNREFUSED):
		return "the API server does not listen yet"
	case s.err != nil:
		return s.err.Error()
	case s.nodeErr != nil:
		return "the API server does not list the nodes: " + s.nodeErr.Error()
	case s.service != nil:
		return "the API server is still setting up the cluster"
	case len(s.nodes) == 0:
		return "the kubelet has not registered the node yet"
	}
	return "no node is Ready"
}

// apiProblems adds what the API server's answers show to be wrong.
func (r *Report) apiProblems(s apiState, now time.Time) {
	var status *errStatus
	switch {
	case s.err != nil:
		r.add("api.answers", "%s", s.why())("wait a moment, or see microk8s logs kubelite")
		return
	case errors.As(s.healthy, &status):
		r.add("api.healthy", "the API server is not healthy: %v", status)("see microk8s logs kubelite")
	}
	if s.nodeErr != nil || s.service != nil || len(s.nodes) == 0 {
		r.add("api.answers", "%s", s.why())("wait a moment, or see microk8s logs kubelite")
		return
	}
	r.machineProblems(s)
	for _, n := range s.nodes {
		if c, ok := nodecopy.Of(&n, now); ok {
			r.add("node.copies", "%s", c.What(n.Name))(nodecopy.Do)
		}
		c := readyCondition(n)
		switch {
		case c == nil:
			r.add("node.ready", "node %s has not reported its state yet", n.Name)("wait a moment, or see microk8s logs kubelite")
		case c.Status != corev1.ConditionTrue:
			r.add("node.ready", "node %s is not Ready: %s", n.Name, shorten(c.Message))("see microk8s kubectl describe node " + n.Name)
		case s.stale(n, c):
			r.add("node.ready", "the kubelet of node %s has not reported since it was started", n.Name)("wait a moment, or see microk8s logs kubelite")
		}
		for _, c := range n.Status.Conditions {
			if c.Type != corev1.NodeReady && c.Status == corev1.ConditionTrue && pressure[c.Type] {
				r.add("node.pressure", "node %s has %s: %s", n.Name, c.Type, shorten(c.Message))("pods may be evicted: free that resource")
			}
		}
	}
}

var pressure = map[corev1.NodeConditionType]bool{
	corev1.NodeDiskPressure: true, corev1.NodeMemoryPressure: true, corev1.NodePIDPressure: true,
	corev1.NodeNetworkUnavailable: true,
}

// machineProblems names a node that has this one's machine ID: its disk is a copy, and whoever tells
// machines apart by it, DHCP servers and journals among them, takes the two for one.
func (r *Report) machineProblems(s apiState) {
	id := ""
	for _, n := range s.nodes {
		if n.Name == s.local {
			id = n.Status.NodeInfo.MachineID
		}
	}
	for _, n := range s.nodes {
		if id != "" && n.Name != s.local && n.Status.NodeInfo.MachineID == id {
			r.add("node.machine-id", "node %s has the same machine ID as this one: one disk is a copy of the other", n.Name)(
				"make a new one on the copy with: rm /etc/machine-id; systemd-machine-id-setup; microk8s stop; microk8s start")
			return
		}
	}
}
