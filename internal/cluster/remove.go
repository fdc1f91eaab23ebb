package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"

	"microk8s/cluster-agent/fanout"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/journal"
	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/noderegistry"
)

// RemoveOptions say which node to remove.
type RemoveOptions struct {
	Node  string // name or InternalIP
	Force bool   // also one that is a member of the datastore
	// Confirm asks a person whether a member that answers is to be removed; an error stops the
	// operation. nil refuses with ErrUnconfirmed.
	Confirm func(question string) error
}

type removeParams struct {
	Asked  string `json:"asked"`            // name or address, as it was given
	Name   string `json:"name"`             // of the Node object
	Member string `json:"member,omitempty"` // address of its member of the datastore, "" for none
	Record string `json:"record,omitempty"` // UID of its record, "" for none
	// Identified: UID and ID are those of what was to be removed, and where they are empty there
	// was none. Journals of earlier versions have names and addresses only.
	Identified bool      `json:"identified,omitempty"`
	UID        types.UID `json:"uid,omitempty"` // of the Node object
	ID         uint64    `json:"id,omitempty"`  // of the member

	replaced []string // what has another identity now, found by the steps
}

// Reasons not to remove a node.
var (
	// ErrRegistered: the node is a member of the datastore and should leave by itself.
	ErrRegistered = errors.New("the node is registered with the datastore")
	// ErrNoNode: Kubernetes does not know it.
	ErrNoNode = errors.New("the node does not exist in Kubernetes")
	// ErrNoAddress: its object has no address.
	ErrNoAddress = errors.New("the node has no address")
	// ErrReplaced: what was to be removed is gone, and another node or member of that name or
	// address is there now, which was left alone.
	ErrReplaced = errors.New("it has been replaced meanwhile")
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
		n.Say("The removal of %s was interrupted; resuming it", p.Name)
		if !p.Identified {
			began := n.Now()
			if st, err := os.Stat(n.Env.Journal()); err == nil {
				began = st.ModTime()
			}
			if err := n.identify(ctx, &p, began); err != nil {
				return err
			}
		}
		if err := j.Resume(ctx, n.removePlan(&p)); err != nil {
			return err
		}
		same := p.Asked == o.Node || p.Name == o.Node
		switch {
		case len(p.replaced) > 0 && same:
			return fmt.Errorf("%w: %s", ErrReplaced, strings.Join(p.replaced, ", "))
		case len(p.replaced) > 0:
			n.Say("WARNING: %s: %v (%s); the new one was left alone", p.Name, ErrReplaced, strings.Join(p.replaced, ", "))
		case same:
			return nil
		}
	}
	p, err := n.mayRemove(ctx, o)
	if err != nil {
		return err
	}
	if err := j.Run(ctx, n.removePlan(p), p); err != nil {
		return err
	}
	if len(p.replaced) > 0 {
		return fmt.Errorf("%w: %s", ErrReplaced, strings.Join(p.replaced, ", "))
	}
	return nil
}

// identify finds out what a journal without identities means. A Node that was made after the
// removal had begun, and a member that answers, are others.
func (n *Node) identify(ctx context.Context, p *removeParams, began time.Time) error {
	c, err := n.Kube("client.config", "")
	if err != nil {
		return err
	}
	node, err := getNode(ctx, c, p.Name)
	switch {
	case err == nil && node.CreationTimestamp.After(began):
		p.replaced = append(p.replaced, "the node "+p.Name+" was made later")
	case err == nil:
		p.UID = node.UID
	case !apierrors.IsNotFound(err):
		return fmt.Errorf("cannot ask for the node %s: %w", p.Name, err)
	}
	p.Identified = true
	if p.Member == "" {
		return nil
	}
	all, err := peers.Members(ctx, n.Env.BackendLive())
	if err != nil {
		return fmt.Errorf("cannot go on with the removal: %w", err)
	}
	member := p.Member
	p.Member = ""
	for _, m := range all {
		switch {
		case m.Address != member:
		case m.Online || len(p.replaced) > 0:
			p.replaced = append(p.replaced, "the datastore's member "+member+" answers")
		default:
			p.Member, p.ID = member, m.ID
		}
	}
	return nil
}

func host(address string) string {
	h, _, err := net.SplitHostPort(address)
	if err != nil {
		return address
	}
	return h
}

// mayRemove finds out what the node is, and whether it may be removed. What belongs together, the Node
// object, the record and the datastore's member, is found by any of them: where the Node was deleted,
// the record has the name and the member's ID.
func (n *Node) mayRemove(ctx context.Context, o RemoveOptions) (*removeParams, error) {
	hostname, err := n.nodeName()
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
	p := &removeParams{Asked: o.Node, Name: o.Node, Identified: true}
	var found *corev1.Node
	for _, node := range list {
		if node.Name == o.Node || sameIP(internalIP(&node), o.Node) {
			found, p.Name, p.UID = &node, node.Name, node.UID
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
	records, err := n.registry().List(ctx)
	if err != nil {
		return nil, err
	}
	var all []peers.Member
	if nodeconfig.Load(n.Env).Datastore.Own() {
		if all, err = peers.Members(ctx, n.Env.BackendLive()); err != nil {
			return nil, fmt.Errorf("cannot remove the node: %w", err)
		}
	}
	member, record := memberOf(all, records, p.Name, address, found == nil)
	if record != nil {
		p.Name, p.Record = record.Name, string(record.UID)
	}
	if member != nil {
		p.Member, p.ID = member.Address, member.ID
	}
	if p.Name == hostname || member != nil && member.Self {
		return nil, ErrSelf
	}
	// Of a control-plane node without a Node and of a build before, the record does not say which
	// member is its.
	if found == nil && p.Member == "" && len(all) > 0 {
		unclear := record != nil && record.Role == noderegistry.ControlPlane && record.Member == 0
		if left := withoutNode(all, list); record == nil || unclear && len(left) > 0 {
			return p, &NoNodeError{Members: left}
		}
	}
	switch {
	case p.Member != "" && !o.Force:
		return p, ErrRegistered
	case found == nil && p.Member == "" && p.Record == "":
		return p, ErrNoNode // with an external etcd
	case p.Member == "":
		return p, nil
	}
	dial, err := n.memberDial(n.Env.BackendLive())
	if err == nil && peers.Answers(ctx, p.Member, dial) {
		return p, confirm(o.Confirm, "The datastore's member at %s (node %s) answers, so that machine runs. It loses its part in the cluster without having left; to take it out in order run there: microk8s leave", p.Member, p.Name)
	}
	return p, nil
}

// memberOf returns the datastore's member of the node of a name or address, and the node's record; nil
// where there is none. A record that names a member decides; a member that another node's record names
// is never taken for its address. byAddress says that the name may be no more than an address.
func memberOf(all []peers.Member, records []noderegistry.Record, name, address string, byAddress bool) (member *peers.Member, record *noderegistry.Record) {
	if i := slices.IndexFunc(records, func(r noderegistry.Record) bool { return r.Name == name }); i >= 0 {
		record = &records[i]
	}
	if record != nil && record.Member != 0 {
		if i := slices.IndexFunc(all, func(m peers.Member) bool { return m.ID == record.Member }); i >= 0 {
			return &all[i], record
		}
	}
	for i, m := range all {
		if !sameIP(host(m.Address), address) && host(m.Address) != address {
			continue
		}
		switch owner := noderegistry.OfMember(records, m.ID); {
		case owner == nil:
			member = &all[i]
		case record == nil && byAddress:
			member, record = &all[i], owner
		}
	}
	return member, record
}

// NoNodeError wraps ErrNoNode. It lists the members of the datastore that no Node object belongs to,
// one of which may be meant.
type NoNodeError struct{ Members []peers.Member }

func (e *NoNodeError) Error() string { return ErrNoNode.Error() }
func (e *NoNodeError) Unwrap() error { return ErrNoNode }

// withoutNode lists the members at whose address no node is.
func withoutNode(all []peers.Member, nodes []corev1.Node) []peers.Member {
	return slices.DeleteFunc(slices.Clone(all), func(m peers.Member) bool {
		return m.Self || slices.ContainsFunc(nodes, func(node corev1.Node) bool { return sameIP(internalIP(&node), host(m.Address)) })
	})
}

func sameIP(x, y string) bool {
	a, err1 := netip.ParseAddr(x)
	b, err2 := netip.ParseAddr(y)
	return err1 == nil && err2 == nil && a.Unmap() == b.Unmap()
}

func (n *Node) removePlan(p *removeParams) journal.Plan {
	return journal.Plan{Operation: opRemove, Commit: StepUnregister, Renamed: renamed, Steps: []journal.Step{
		step(StepUnregister, func(ctx context.Context) error { return n.unregister(ctx, p) }, nil),
		step(StepRevoke, func(ctx context.Context) error { return n.revoke(ctx, p) }, nil),
		step(StepDelete, func(ctx context.Context) error { return n.deleteNode(ctx, p) }, nil),
	}}
}

func (n *Node) unregister(ctx context.Context, p *removeParams) error {
	if p.Member == "" {
		return nil
	}
	live := n.Env.BackendLive()
	others := slices.DeleteFunc(storedir.Dir(live).Addresses(), func(m string) bool { return m == p.Member || m == "" })
	err := n.removeMember(ctx, n.removeWait, live, p.ID, p.Member, others)
	if errors.Is(err, peers.ErrReplaced) {
		p.replaced = append(p.replaced, err.Error())
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrContact, err)
	}
	return nil
}

func (n *Node) deleteNode(ctx context.Context, p *removeParams) error {
	if p.Identified && p.UID == "" {
		return nil // there was none
	}
	c, err := n.Kube("client.config", "")
	if err != nil {
		return err
	}
	err = deleteNode(ctx, c, p.Name, p.UID)
	if apierrors.IsConflict(err) { // the UID
		p.replaced = append(p.replaced, "there is a new node called "+p.Name)
		return nil
	}
	return err
}

// registry reads and writes the records of the cluster's nodes.
func (n *Node) registry() noderegistry.Registry {
	return noderegistry.Registry{Core: func() (*kube.Core, error) { return n.Kube("client.config", "") }}
}

// revoke deletes the node's record, so that its certificates count no more, and changes the salt of
// the nodes' callback secrets, of which a control-plane node can make all. Whether it was one cannot
// be told of a node that has left, so it is done for every node. Nodes that are not reached now take
// up their new secret by themselves later.
func (n *Node) revoke(ctx context.Context, p *removeParams) error {
	if p.Record != "" {
		if err := n.registry().DeleteOf(ctx, &noderegistry.Record{Name: p.Name, UID: types.UID(p.Record)}); err != nil {
			return err
		}
	}
	all := &fanout.Cluster{Env: n.Env, Core: func() (*kube.Core, error) { return n.Kube("client.config", "") }}
	results, err := all.RenewSecrets(ctx)
	for _, r := range results {
		if r.Err != nil && r.Name != p.Name {
			n.Say("WARNING: the node %s still takes the secret of before, which the removed node may know: %v", r.Name, r.Err)
		}
	}
	return err
}
