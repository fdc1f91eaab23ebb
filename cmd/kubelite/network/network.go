// Package network is the pod network, as a library inside kubelite: flannel's VXLAN (or
// host-gw) backend between nodes, a bridge with the standard CNI plugins on each, and
// nftables for masquerading. Pod subnets are those that the controller manager writes into
// node.spec.podCIDRs; what nodes must know of each other is in annotations of their Node
// objects, in flannel's own format.
//
// What is put on the host, and taken away again, is in package hostnet. Services are
// kube-proxy's. Network policies are enforced as long as this network runs (Options.Policies).
//
// Where the file args/cni-network/cni.yaml exists, the user brings another network and this
// one stands aside completely.
package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"

	"microk8s/internal/backoff"
	"microk8s/internal/hostnet"
	"microk8s/internal/hostwatch"
	"microk8s/internal/netpolicy/enforcer"
	"microk8s/internal/snapenv"
)

// Backends that Options.Backend may name.
const (
	BackendVXLAN  = "vxlan"   // works between any two nodes that reach each other; port 4789/udp
	BackendHostGW = "host-gw" // plain routes; all nodes must be on one network segment
)

// Options says what network to run. Env, NodeName, ClusterCIDR and Log are required, and
// either Kubeconfig or Client.
type Options struct {
	Env snapenv.Env

	// Kubeconfig is the file with the kubelet's credentials. They need to list and watch
	// nodes and to patch the status of their own.
	Kubeconfig string
	Client     kubernetes.Interface // used instead of Kubeconfig when not nil

	NodeName    string
	ClusterCIDR string // as for kube-proxy: "10.1.0.0/16", or one of each family with a comma

	// NodeIPs are the addresses other nodes reach this one at, usually --node-ip of the kubelet: one, or one of
	// each family. A family without one takes the InternalIP of the Node object.
	NodeIPs []netip.Addr
	// Interface is the name of the interface to use; "" takes the one that has the node's
	// address, or the one of the default route, or the only one with a global address.
	Interface string
	Backend   string // BackendVXLAN (also "") or BackendHostGW
	MTU       int    // of pods; 0 takes that of the interface less the encapsulation

	// EndSandbox stops a pod's sandbox in containerd, which makes the kubelet start the pod in another one; nil
	// leaves pods alone whose addresses are of an earlier subnet.
	EndSandbox func(ctx context.Context, id string) error

	// Watch reports changes of the host's network; nil starts one.
	Watch *hostwatch.Watcher

	// Policies enforces NetworkPolicies on this node; nil leaves them alone.
	Policies *enforcer.Enforcer

	Ready func() // called once, when pods can be started; may be nil
	Log   *slog.Logger
}

// Run brings the pod network up and keeps it up until ctx ends; then it returns nil and
// leaves everything in place, so that pods keep their network while kubelite is restarted
// ([Cleanup] removes it). Only options that can never work are an error; whatever may go
// away by itself (no API server yet, no address, an interface that vanished) is waited for
// and logged.
func Run(ctx context.Context, o Options) error {
	cidrs, err := o.check()
	if err != nil {
		return err
	}
	if _, err := os.Stat(o.Env.CNIManifest()); err == nil {
		return o.standAside(ctx)
	}
	n := &node{Options: o, cidrs: cidrs}
	if o.Client == nil {
		cfg, err := clientcmd.BuildConfigFromFlags("", o.Kubeconfig)
		if err != nil {
			return fmt.Errorf("cannot start the pod network: %w", err)
		}
		if n.Client, err = kubernetes.NewForConfig(cfg); err != nil {
			return fmt.Errorf("cannot start the pod network: %w", err)
		}
	}

	// What does not depend on the cluster comes first: after a reboot it is there before the
	// first pod.
	if _, err := hostnet.Forwarding(cidrs); err != nil {
		o.Log.Warn("pods will not reach other machines", "err", err)
	}
	n.hairpin = !hostnet.BridgeFiltered()
	if n.hairpin {
		o.Log.Info("this kernel does not filter bridged packets (no br_netfilter): pods of one node that talk through a Service see each other as the node")
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	if n.Watch == nil {
		n.Watch = hostwatch.New(o.Log)
		wg.Go(func() { n.Watch.Run(ctx) })
	}
	firewall := n.Watch.Register(ctx, (&hostnet.Firewall{Cluster: cidrs}).Owner())
	defer firewall.Close()
	wg.Go(func() {
		if err := hostnet.WatchLegacy(ctx, firewall.Trigger); err != nil {
			o.Log.Warn("what others do with iptables-legacy is noticed once a minute", "err", err)
		}
	})
	if err := n.enforcePolicies(ctx, &wg); err != nil {
		return err
	}

	if err := n.watchNodes(ctx, &wg); err != nil {
		return nil // ctx ended
	}
	waits := backoff.New(time.Second, 30*time.Second)
	for ctx.Err() == nil {
		began := time.Now()
		err := n.serve(ctx)
		if ctx.Err() != nil {
			break
		}
		// What it stands on changed, which is no failure.
		if time.Since(began) > time.Minute || errors.Is(err, errRestart) && time.Since(began) > time.Second {
			waits = backoff.New(time.Second, 30*time.Second)
		}
		wait := waits.Step()
		o.Log.Warn("the pod network starts again", "err", err, "retry_in", wait)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
	return nil
}

// Cleanup removes every trace of networking from the host; see [hostnet.Cleanup].
func Cleanup(ctx context.Context, env snapenv.Env) error { return hostnet.Cleanup(ctx, env) }

func (o *Options) check() ([]netip.Prefix, error) {
	if o.NodeName == "" {
		return nil, errors.New("cannot start the pod network: no node name")
	}
	switch o.Backend {
	case "":
		o.Backend = BackendVXLAN
	case BackendVXLAN, BackendHostGW:
	default:
		return nil, fmt.Errorf("cannot start the pod network: unknown backend %q, want %s or %s", o.Backend, BackendVXLAN, BackendHostGW)
	}
	if o.MTU != 0 && (o.MTU < 576 || o.MTU > 65535) {
		return nil, fmt.Errorf("cannot start the pod network: MTU %d is not between 576 and 65535", o.MTU)
	}
	return hostnet.ParseCIDRs(o.ClusterCIDR)
}

// standAside leaves the host to the user's own CNI, and takes away what an earlier run of
// ours has left.
func (o *Options) standAside(ctx context.Context) error {
	o.Log.Info("the built-in pod network is off because there is a CNI manifest", "file", o.Env.CNIManifest())
	if _, err := os.Stat(hostnet.Conflist(o.Env)); err == nil {
		if err := hostnet.Remove(ctx, o.Env); err != nil {
			o.Log.Warn("the built-in pod network has left something behind", "err", err)
		}
	}
	<-ctx.Done()
	return nil
}

// node is the running network of this node.
type node struct {
	Options
	cidrs   []netip.Prefix
	hairpin bool

	store   cache.Store
	mu      sync.Mutex
	changed []chan struct{} // each holds at most one pending "look again"
}

// enforcePolicies starts what enforces network policies, as far as there is one.
func (n *node) enforcePolicies(ctx context.Context, wg *sync.WaitGroup) error {
	if n.Policies == nil {
		return nil
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", n.Kubeconfig)
	if err != nil {
		return fmt.Errorf("cannot enforce network policies: %w", err)
	}
	if n.hairpin {
		n.Policies.Partial("this kernel does not filter bridged packets (no br_netfilter), so what pods of this node send each other is not judged; load that module: modprobe br_netfilter")
	}
	owner := n.Watch.Register(ctx, n.Policies.Owner())
	wg.Go(func() {
		defer owner.Close()
		if err := n.Policies.Run(ctx, cfg); err != nil {
			n.Log.Error("network policies are not enforced", "err", err)
		}
	})
	return nil
}

// watchNodes starts the one watch of all nodes and waits until it has seen them. Errors are
// those of ctx.
func (n *node) watchNodes(ctx context.Context, wg *sync.WaitGroup) error {
	if err := n.awaitAPI(ctx); err != nil {
		return err
	}
	nodes := n.Client.CoreV1().Nodes()
	store, controller := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
			ListWithContextFunc:  listNodes(nodes),
			WatchFuncWithContext: watchNodes(nodes),
		}, n.Client),
		ObjectType: &corev1.Node{},
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    func(any) { n.notify() },
			UpdateFunc: func(any, any) { n.notify() },
			DeleteFunc: func(any) { n.notify() },
		},
		Transform: slim,
	})
	n.store = store
	wg.Go(func() { controller.RunWithContext(ctx) })
	if !cache.WaitForNamedCacheSyncWithContext(ctx, controller.HasSynced) {
		return ctx.Err()
	}
	return nil
}

// awaitAPI waits until nodes can be listed. A starting API server first refuses connections
// and then, until its roles exist, permission; the watch below would wait up to half a minute
// between attempts.
func (n *node) awaitAPI(ctx context.Context) error {
	const pause = 500 * time.Millisecond
	for first := time.Now(); ; {
		_, err := n.Client.CoreV1().Nodes().List(ctx, metav1.ListOptions{Limit: 1})
		if err == nil {
			return nil
		}
		if time.Since(first) > 30*time.Second {
			n.Log.Warn("the pod network waits for the API server", "err", err)
			first = time.Now()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
	}
}

// slim drops what is not needed of a Node, which is most of it.
func slim(obj any) (any, error) {
	full, ok := obj.(*corev1.Node)
	if !ok {
		return obj, nil
	}
	out := &corev1.Node{}
	out.Name, out.UID, out.ResourceVersion, out.Annotations = full.Name, full.UID, full.ResourceVersion, full.Annotations
	if v, ok := full.Labels[labelControlPlane]; ok {
		out.Labels = map[string]string{labelControlPlane: v}
	}
	out.CreationTimestamp = full.CreationTimestamp
	out.Spec.PodCIDR, out.Spec.PodCIDRs = full.Spec.PodCIDR, full.Spec.PodCIDRs
	out.Status.Addresses = full.Status.Addresses
	return out, nil
}

// notify wakes everybody that waits for a change of a node.
func (n *node) notify() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.changed {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// changes returns a channel that has a value after every change of any node, and one at once;
// stop ends it.
func (n *node) changes() (c chan struct{}, stop func()) {
	c = make(chan struct{}, 1)
	c <- struct{}{}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.changed = append(n.changed, c)
	return c, func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		for i := range n.changed {
			if n.changed[i] == c {
				n.changed = append(n.changed[:i], n.changed[i+1:]...)
				return
			}
		}
	}
}

// all returns all nodes as last seen.
func (n *node) all() []*corev1.Node {
	list := n.store.List()
	out := make([]*corev1.Node, 0, len(list))
	for _, obj := range list {
		out = append(out, obj.(*corev1.Node))
	}
	return out
}

// own is this node's object as last seen, nil if there is none.
func (n *node) own() *corev1.Node {
	obj, ok, err := n.store.GetByKey(n.NodeName)
	if err != nil || !ok {
		return nil
	}
	return obj.(*corev1.Node)
}
