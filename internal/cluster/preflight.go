package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/client"
	"microk8s/internal/hostnet"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/service"
	"microk8s/internal/status"
)

// Problem is one thing in the way of a join.
type Problem struct {
	What, Do string // a sentence each; Do may be ""
	Fatal    bool   // otherwise it is a warning
}

// PreflightError says everything that is in the way of a join. Nothing was changed.
type PreflightError struct {
	Problems []Problem // the fatal ones
	// Err is why the cluster could not be asked, or what it refused with; nil when it was asked
	// and had nothing against the join.
	Err error
}

func (e *PreflightError) Error() string {
	var out []string
	for _, p := range e.Problems {
		out = append(out, p.What)
	}
	if e.Err != nil {
		out = append(out, e.Err.Error())
	}
	return strings.Join(out, "; ")
}

func (e *PreflightError) Unwrap() error { return e.Err }

// Differences between this clock and the cluster's.
const (
	// maxClock is beyond what certificates and leases can bear: theirs begin a minute early.
	maxClock  = time.Minute
	warnClock = 2 * time.Second
)

const portTimeout = 3 * time.Second // of trying one port of another node

// preflight looks for everything that would make the join fail, here and there. Warnings are
// said; it fails on anything else.
func (n *Node) preflight(ctx context.Context, p *joinParams) error {
	problems := n.localProblems(ctx, p)
	s := &joinRun{Node: n, joinParams: p}
	remote, err := s.remoteProblems(ctx)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	problems = append(problems, remote...)
	for _, pr := range problems {
		if !pr.Fatal {
			n.Say("WARNING: %s", strings.TrimSuffix(pr.What+"; "+pr.Do, "; "))
		}
	}
	problems = slices.DeleteFunc(problems, func(p Problem) bool { return !p.Fatal })
	if len(problems) == 0 && err == nil {
		return nil
	}
	return &PreflightError{Problems: problems, Err: err}
}

// localProblems are those that can be seen on this machine.
func (n *Node) localProblems(ctx context.Context, p *joinParams) []Problem {
	var out []Problem
	if n.state().LowMemory && !p.Worker {
		out = append(out, Problem{Fatal: true, What: "this machine has too little memory for a control-plane node",
			Do: "join it as a worker, with --worker, or override this with --disable-low-memory-guard"})
	}
	if p.NodeIP != "" && !n.isOwn(p.NodeIP) {
		out = append(out, Problem{Fatal: true, What: "no interface of this host has the address " + p.NodeIP,
			Do: "choose one of the host's with --node-ip, or take --node-ip out of " + n.Env.Args(nodeconfig.Kubelet)})
	}
	states, err := n.Services.Status(ctx)
	if err != nil {
		return append(out, Problem{Fatal: true, What: err.Error()})
	}
	var running []string
	for _, s := range states {
		if s.Phase == service.Running || s.Phase == service.Stopping {
			running = append(running, s.Name)
		}
	}
	store := nodeconfig.Load(n.Env).Datastore.Port
	for _, busy := range status.PortsInUse(n.Env, running) {
		if p.Worker && (busy.Port == store || busy.Port == 10257 || busy.Port == 10259) {
			continue // of services that a worker does not run
		}
		out = append(out, Problem{Fatal: true, What: busy.What, Do: "stop that program and run the same command again"})
	}
	return out
}

// remoteProblems are those that the cluster sees, and what cannot be reached of it.
func (s *joinRun) remoteProblems(ctx context.Context) ([]Problem, error) {
	c, err := s.connection()
	if err != nil {
		return nil, err
	}
	// The join connects again, and has the server prove itself again.
	asked := s.Now()
	resp, err := s.askPreflight(ctx, c)
	if err != nil {
		c.Close()
		var refused *client.ServerError
		if errors.As(err, &refused) && refused.Status == http.StatusNotFound {
			s.Say("WARNING: this is an agent of upstream's MicroK8s, which has no preflight check; its token is spent even if the join fails")
			return nil, nil
		}
		return nil, err
	}
	defer c.Close()
	took := s.Now().Sub(asked)
	if resp, err = s.settleAddress(ctx, c, resp); err != nil {
		return nil, err
	}
	var out []Problem
	agent := s.agentRuns(ctx)
	for _, p := range resp.Problems {
		if p.Code == api.CodeAgent && !agent {
			continue // not before the join has started it
		}
		out = append(out, Problem{Fatal: p.Fatal, What: p.Message, Do: s.advice(p)})
	}
	theirs := time.UnixMilli(resp.Time)
	if d := asked.Add(took / 2).Sub(theirs).Abs(); resp.Time != 0 && d > took/2+warnClock {
		out = append(out, Problem{Fatal: d > maxClock, What: fmt.Sprintf("the clocks differ: here it is %s, on %s %s",
			asked.Format(time.RFC3339), c.Target().Host, theirs.Format(time.RFC3339)), Do: "synchronize them, for example with systemd-timesyncd or chrony"})
	}
	return slices.Concat(out, overlapping(resp.CIDR), s.unreachable(ctx, resp)), nil
}

// overlapping finds networks of this host that lie in the range of the cluster's pods.
func overlapping(networks string) []Problem {
	ranges, err := hostnet.ParseCIDRs(networks)
	if err != nil {
		return nil // of an agent that does not say
	}
	overlaps, err := hostnet.Overlaps(ranges)
	if err != nil {
		return nil
	}
	var out []Problem
	for _, o := range overlaps {
		out = append(out, Problem{Fatal: true, What: o.String() + " of the cluster's pods",
			Do: "this node would lose its way there: join a cluster that was started with other ranges, or move the host to another network"})
	}
	return out
}

// advice is the next step for what a cluster objects to; "" where its message says it, or nothing helps.
func (s *joinRun) advice(p api.Problem) string {
	if p.Code != api.CodePort {
		return ""
	}
	words := strings.Fields(p.Message)
	if len(words) == 0 {
		return ""
	}
	port, err := strconv.ParseUint(words[len(words)-1], 10, 16)
	if err != nil {
		return ""
	}
	return fmt.Sprintf("all nodes of a cluster have the same: sudo sed -i 's/:%d/:%d/' %s; microk8s stop; microk8s start; then run the same command again",
		nodeconfig.Load(s.Env).AgentPort, port, s.Env.Args("cluster-agent"))
}

func (s *joinRun) askPreflight(ctx context.Context, c *client.Client) (*api.PreflightResponse, error) {
	return c.Preflight(ctx, api.PreflightRequest{
		JoinRequest: s.request(), MachineID: s.readID("etc/machine-id"), SystemUUID: s.readID("sys/class/dmi/id/product_uuid"),
	})
}

// settleAddress finds the address of this node that the others are to use. It is where the cluster
// sees this node come from, unless that is somebody else's, as a balancer's in front of the agents,
// or of the other family than the pods' addresses. Then it is the one with which this node
// reaches the API servers, provided that the cluster reaches this node there.
func (s *joinRun) settleAddress(ctx context.Context, c *client.Client, seen *api.PreflightResponse) (*api.PreflightResponse, error) {
	if s.NodeIP != "" {
		return seen, nil
	}
	foreign := !s.isOwn(seen.Address)
	if seen.Address == "" || !foreign && sameFamily(seen.Address, seen.CIDR) {
		return seen, nil
	}
	for _, server := range seen.Servers {
		if !sameFamily(host(server), seen.CIDR) {
			continue
		}
		limit, cancel := context.WithTimeout(ctx, portTimeout)
		conn, err := s.Dial(limit, "tcp", server)
		cancel()
		if err != nil {
			continue // said below
		}
		own := host(conn.LocalAddr().String())
		conn.Close()
		if !s.isOwn(own) || net.ParseIP(own).IsLoopback() {
			continue
		}
		s.Advertise = own
		resp, err := s.askPreflight(ctx, c)
		if err != nil {
			return nil, err
		}
		unreached := slices.ContainsFunc(resp.Problems, func(p api.Problem) bool { return p.Code == api.CodeAgent })
		if !foreign || !unreached || !s.agentRuns(ctx) {
			return resp, nil
		}
		s.Advertise = "" // behind a translation of addresses
		break
	}
	return seen, nil
}

// sameFamily reports whether an address, of IPv4 or IPv6, is of the family of the first of a list of networks, which is
// that of the API servers' addresses. Where there is no list it is.
func sameFamily(address, networks string) bool {
	a, err := netip.ParseAddr(address)
	if err != nil || networks == "" {
		return true
	}
	first, _, _ := strings.Cut(networks, ",")
	p, err := netip.ParsePrefix(first)
	return err != nil || p.Addr().Is4() == a.Unmap().Is4()
}

// agentRuns reports whether this node's own agent could have been reached.
func (n *Node) agentRuns(ctx context.Context) bool {
	states, err := n.Services.Status(ctx)
	return err == nil && slices.ContainsFunc(states, func(s service.State) bool {
		return s.Name == service.ClusterAgent && s.Phase == service.Running
	})
}

// unreachable tries every port of the cluster that this node is going to need.
func (s *joinRun) unreachable(ctx context.Context, resp *api.PreflightResponse) []Problem {
	type need struct{ address, what, port string }
	var needs []need
	for _, server := range resp.Servers {
		needs = append(needs, need{server, "the API server", "API server port"})
	}
	if !s.Worker && !resp.External {
		for _, m := range resp.Members {
			if host, _, err := net.SplitHostPort(m); err == nil && !net.ParseIP(host).IsLoopback() {
				needs = append(needs, need{m, "the datastore", "datastore port"})
			}
		}
	}
	found := make([]*Problem, len(needs))
	reached := make([]bool, len(needs))
	var all errgroup.Group
	for i, x := range needs {
		all.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, portTimeout)
			defer cancel()
			conn, err := s.Dial(ctx, "tcp", x.address)
			if err != nil {
				_, port, _ := net.SplitHostPort(x.address)
				found[i] = &Problem{What: fmt.Sprintf("cannot reach %s at %s (%v)", x.what, x.address, err),
					Do: "open TCP port " + port + " between the nodes, or start that node"}
				return nil
			}
			reached[i] = true
			return conn.Close()
		})
	}
	_ = all.Wait() // failures are in found
	// A member that is down is no reason not to join; that none can be reached is.
	any := map[string]bool{}
	for i, x := range needs {
		any[x.what] = any[x.what] || reached[i]
	}
	var out []Problem
	for i, p := range found {
		if p != nil {
			p.Fatal = !any[needs[i].what]
			out = append(out, *p)
		}
	}
	return out
}

func (n *Node) readID(path string) string {
	data, err := os.ReadFile(n.Env.HostPath(filepath.FromSlash(path)))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}
