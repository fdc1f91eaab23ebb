package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"microk8s/cluster-agent/fanout"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/journal"
	"microk8s/internal/kube"
)

// RemoveOptions say which node to remove.
type RemoveOptions struct {
	Node  string // name or InternalIP
	Force bool   // also one that is a member of the datastore
}

type removeParams struct {
	Asked  string `json:"asked"`            // name or address, as it was given
	Name   string `json:"name"`             // of the Node object
	Member string `json:"member,omitempty"` // address of its member of the datastore, "" for none
}

// Reasons not to remove a node.
var (
	// ErrRegistered: the node is a member of the datastore and should leave by itself.
	ErrRegistered = errors.New("the node is registered with the datastore")
	// ErrNoNode: Kubernetes does not know it.
	ErrNoNode = errors.New("the node does not exist in Kubernetes")
	// ErrNoAddress: its object has no address.
	ErrNoAddress = errors.New("the node has no address")
	// ErrSelf: it is this node.
	ErrSelf = errors.New("it is this node")
)

// Remove takes another node out of this node's cluster for good. An interrupted one is finished
// first.
func (n *Node) Remove(ctx context.Context, j *journal.Journal, o RemoveOptions) error {
	n.defaults()
	r, err := j.Pending()
	if err != nil {
		return err
	}
	if r != nil && r.Operation != opRemove {
		return fmt.Errorf("%w: %s; run it again to finish it", ErrOther, r.Operation)
	}
	if r != nil {
		var p removeParams
		if err := json.Unmarshal(r.Params, &p); err != nil {
			return fmt.Errorf("cannot read the journal of the interrupted removal: %w", err)
		}
		n.Say("The removal of %s was interrupted: going on with it", p.Name)
		if err := j.Resume(ctx, n.removePlan(&p)); err != nil {
			return err
		}
		if p.Asked == o.Node || p.Name == o.Node {
			return nil
		}
	}
	p, err := n.mayRemove(ctx, o)
	if err != nil {
		return err
	}
	return j.Run(ctx, n.removePlan(p), p)
}

func host(address string) string {
	h, _, err := net.SplitHostPort(address)
	if err != nil {
		return address
	}
	return h
}

// mayRemove finds out what the node is, and whether it may be removed.
func (n *Node) mayRemove(ctx context.Context, o RemoveOptions) (*removeParams, error) {
	hostname, err := n.Hostname()
	if err != nil {
		return nil, err
	}
	c, err := n.Kube("client.config", "")
	if err != nil {
		return nil, err
	}
	list, err := c.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	p := &removeParams{Asked: o.Node, Name: o.Node}
	var found *corev1.Node
	for _, node := range list {
		if node.Name == o.Node || sameIP(internalIP(&node), o.Node) {
			found, p.Name = &node, node.Name
		}
	}
	if p.Name == hostname || n.isOwn(o.Node) {
		return nil, ErrSelf
	}
	address := o.Node
	if found != nil {
		if address = internalIP(found); address == "" && !o.Force {
			return nil, ErrNoAddress
		}
	}
	if !sharesEtcd(n.Env) {
		all, err := peers.Members(ctx, n.Env.BackendLive())
		if err != nil {
			return nil, fmt.Errorf("cannot remove the node: %w", err)
		}
		for _, m := range all {
			if sameIP(host(m.Address), address) || host(m.Address) == address {
				p.Member = m.Address
			}
		}
	}
	switch {
	case p.Member != "" && !o.Force:
		return p, ErrRegistered
	case found == nil && p.Member == "":
		return p, ErrNoNode
	}
	return p, nil
}

func sameIP(x, y string) bool {
	a, err1 := netip.ParseAddr(x)
	b, err2 := netip.ParseAddr(y)
	return err1 == nil && err2 == nil && a.Unmap() == b.Unmap()
}

func (n *Node) removePlan(p *removeParams) journal.Plan {
	return journal.Plan{Operation: opRemove, Commit: StepUnregister, Renamed: renamed, Steps: []journal.Step{
		step(StepUnregister, func(ctx context.Context) error { return n.unregister(ctx, p) }, nil),
		step(StepRevoke, n.revoke, nil),
		step(StepDelete, func(ctx context.Context) error { return n.deleteNode(ctx, p) }, nil),
	}}
}

func (n *Node) unregister(ctx context.Context, p *removeParams) error {
	if p.Member == "" {
		return nil
	}
	live := n.Env.BackendLive()
	others := slices.DeleteFunc(append(members(live), ownMember(live)), func(m string) bool { return m == p.Member || m == "" })
	err := n.removeMember(ctx, n.removeWait, live, p.Member, others)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrContact, err)
	}
	return nil
}

func (n *Node) deleteNode(ctx context.Context, p *removeParams) error {
	c, err := n.Kube("client.config", "")
	if err != nil {
		return err
	}
	return deleteNode(ctx, c, p.Name)
}

// revoke changes the key of the nodes' callback secrets, which a control-plane node could read.
// Whether it was one cannot be told of a node that has left, so it is done for every node. Nodes
// that are not reached now take up their new secret by themselves later.
func (n *Node) revoke(ctx context.Context) error {
	all := &fanout.Cluster{Env: n.Env, Core: func() (*kube.Core, error) { return n.Kube("client.config", "") }}
	_, err := all.RenewSecrets(ctx)
	return err
}
