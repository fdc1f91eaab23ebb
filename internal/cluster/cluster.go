// Package cluster makes this node a part of a cluster and takes it out again: joining, leaving,
// and removing another node, each as a journal of steps (internal/journal), so that they can be
// interrupted anywhere and run again. A join that does not succeed leaves the single node as it
// was, with its data, and the token unused.
//
// It decides what happens in which order. The wire is in cluster-agent/client, what a member of
// the datastore is in internal/datastore/peers, certificates in internal/certs, services in
// internal/service. Printing and exit codes are the command line's.
package cluster

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"time"

	"microk8s/internal/certs"
	"microk8s/internal/hostinfo"
	"microk8s/internal/journal"
	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/pki"
	"microk8s/internal/service"
	"microk8s/internal/snapenv"
)

// Node is this machine, as the operations of this package need it. The zero values of the
// optional fields mean the real machine.
type Node struct {
	Env      snapenv.Env
	Services service.Manager
	Log      *slog.Logger
	// Say tells a person something, in a line; nil is silence. Warnings begin with "WARNING: ".
	Say func(format string, a ...any)

	// Install sets the node up, or brings one that is in line with the package.
	Install func(ctx context.Context) error
	// StopContainers ends every container; the kubelet has been stopped before.
	StopContainers func(ctx context.Context) error
	// Datastore runs k8s-dqlite with a sub-command and returns what it printed.
	Datastore func(ctx context.Context, args ...string) ([]byte, error)
	// Fill waits until this node's datastore, which was started just now, answers, and restores the
	// directory of a backup into it. It may be called again.
	Fill func(ctx context.Context, keys string) error
	// ResetNetwork takes the pod network off the host, when no pod is left.
	ResetNetwork func(ctx context.Context) error

	Maker     pki.Maker
	Hostname  func() (string, error)
	Addresses func() ([]net.IP, error)
	Now       func() time.Time
	// Kube makes a client of the API server that a kubeconfig names, or of another at server.
	Kube func(file, server string) (*kube.Core, error)
	// Dial makes connections to other nodes.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)

	removeWait time.Duration // of the removal of a member, during which leadership may move
	silence    time.Duration // of the whole cluster, after which a join gives up
}

func (n *Node) defaults() {
	if n.Log == nil {
		n.Log = slog.New(slog.DiscardHandler)
	}
	if n.Say == nil {
		n.Say = func(string, ...any) {}
	}
	if n.Hostname == nil {
		n.Hostname = hostinfo.Hostname
	}
	if n.Addresses == nil {
		n.Addresses = hostinfo.Addresses
	}
	if n.Now == nil {
		n.Now = time.Now
	}
	if n.Kube == nil {
		n.Kube = n.kube
	}
	if n.removeWait == 0 {
		n.removeWait = 30 * time.Second
	}
	if n.silence == 0 {
		n.silence = silence
	}
	if n.Dial == nil {
		n.Dial = (&net.Dialer{Timeout: dialTimeout}).DialContext
	}
	if n.ResetNetwork == nil {
		n.ResetNetwork = func(context.Context) error { return nil }
	}
	if n.StopContainers == nil {
		n.StopContainers = func(context.Context) error { return nil }
	}
}

// dialTimeout bounds a connection to another node.
const dialTimeout = 5 * time.Second

// Pending tells what was begun on this node and has not ended; nil where that is nothing.
func Pending(env snapenv.Env) (*journal.Record, error) { return journal.Read(env.Journal()) }

// file is one of the files beside the journal.
func (n *Node) file(name string) string { return filepath.Join(n.Env.ClusterDir(), name) }

// nodeName is the name under which the cluster knows this node.
func (n *Node) nodeName() (string, error) { return nodeconfig.NodeName(n.Env, n.Hostname) }

func (n *Node) state() nodeconfig.State { return nodeconfig.ReadState(n.Env) }

func (n *Node) lock(names ...string) error { return nodeconfig.Lock(n.Env, names...) }

func (n *Node) unlock(names ...string) error { return nodeconfig.Unlock(n.Env, names...) }

func (n *Node) store() *certs.Store {
	return certs.New(n.Env, certs.Options{Maker: n.Maker, Hostname: n.Hostname, Addresses: n.Addresses, Log: n.Log})
}

// editArgs changes an argument file: a value of "" removes the flag.
func (n *Node) editArgs(name string, change map[string]string) error {
	_, err := nodeconfig.SetFlags(n.Env, name, change)
	return err
}

// isOwn reports whether an address is one of this host's.
func (n *Node) isOwn(ip string) bool {
	want, err := netip.ParseAddr(ip)
	if err != nil {
		return false
	}
	all, err := n.Addresses()
	if err != nil {
		return false
	}
	for _, have := range all {
		if a, ok := netip.AddrFromSlice(have); ok && a.Unmap() == want.Unmap() {
			return true
		}
	}
	return false
}

// Steps returns the IDs of the steps of every operation, by operation and in order. A control-plane
// join and a worker's have their own.
func Steps() map[string][]string {
	out := map[string][]string{}
	for _, p := range plans() {
		out[p.Operation] = p.IDs()
	}
	return out
}

// Undos returns the IDs of the steps of every operation that can be undone, by operation and in
// order.
func Undos() map[string][]string {
	out := map[string][]string{}
	for _, p := range plans() {
		out[p.Operation] = p.Undos()
	}
	return out
}

func plans() []journal.Plan {
	n := &Node{}
	n.defaults()
	return []journal.Plan{
		n.joinPlan(&joinParams{}), n.joinPlan(&joinParams{Worker: true}), n.leavePlan(&leaveParams{}), n.removePlan(&removeParams{}), n.restorePlan(&restoreParams{}),
		n.recoverPlan(&recoverParams{}),
	}
}

// Names of the operations in the journal.
const (
	opJoin       = "join"
	opJoinWorker = "join-worker"
	opLeave      = "leave"
	opRemove     = "remove-node"
	opRestore    = "restore"
	opRecover    = "recover"
)

func join(host string, port int) string { return net.JoinHostPort(host, strconv.Itoa(port)) }

// awaitReady waits until this node, called self, is Ready. Where it is not within leaveReady, a person is told, with
// what is done and which command says more; the change has ended then all the same.
func (n *Node) awaitReady(ctx context.Context, self, done, see string) error {
	err := waitFor(ctx, leaveReady, func(ctx context.Context) error {
		c, err := n.Kube("client.config", "")
		if err != nil {
			return err
		}
		node, err := getNode(ctx, c, self)
		if err == nil && !kube.Ready(node) {
			err = errors.New("not Ready")
		}
		return err
	})
	if err != nil && ctx.Err() == nil {
		n.Say("WARNING: %s, but this node was not Ready within %s; see %s (%v)", done, leaveReady, see, err)
		return nil
	}
	return ctx.Err()
}

// waitFor asks until it succeeds, ctx ends or the limit is over, and then returns the last error.
// It is for far sides that have nothing to wait on.
func waitFor(ctx context.Context, limit time.Duration, ask func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ask(ctx)
		if err == nil {
			return nil
		}
		var final *finalError
		if errors.As(err, &final) {
			return final.error
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return err
		}
	}
}

// finalError ends waitFor at once.
type finalError struct{ error }

func (f *finalError) Unwrap() error { return f.error }
