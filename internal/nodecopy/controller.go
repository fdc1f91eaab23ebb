package nodecopy

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"

	"microk8s/internal/backoff"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/hostinfo"
	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
)

// sweep is how often a control-plane node looks whether its member of the datastore has another machine's address.
const sweep = 20 * time.Second

// The pauses while the API server does not answer.
const (
	firstPause = 2 * time.Second
	lastPause  = time.Minute
)

// kubeletPort is where a kubelet serves that does not say otherwise in its Node.
const kubeletPort = 10250

// Controller looks for copies of one node. Env, Node and Log are required.
type Controller struct {
	Env  snapenv.Env
	Node string // its name in the cluster
	Log  *slog.Logger

	// The rest is for tests; nil is the real thing.

	Core      func() (*kube.Core, error)                                                                        // with the rights of the node's kubelet
	At        func(host netip.Addr) (*kube.Core, error)                                                         // the same, of the API server on another machine
	Boot      func() string                                                                                     // of this boot of this machine
	Addresses func() ([]net.IP, error)                                                                          // of this machine
	Prove     func(ctx context.Context, host netip.Addr, port int, name string) (local netip.Addr, proved bool) // see prove
	Now       func() time.Time

	mu     sync.Mutex
	looked map[netip.Addr]time.Time // when at a machine
	said   string
}

func (k *Controller) complete() {
	config := func() (*rest.Config, error) {
		return clientcmd.BuildConfigFromFlags("", k.Env.Credential("kubelet.config"))
	}
	if k.Core == nil {
		k.Core = (&kube.File{Path: k.Env.Credential("kubelet.config")}).Core
	}
	if k.At == nil {
		k.At = func(host netip.Addr) (*kube.Core, error) {
			cfg, err := config()
			if err != nil {
				return nil, err
			}
			cfg.Host = fmt.Sprintf("https://%s", netip.AddrPortFrom(host, uint16(nodeconfig.Load(k.Env).APIServer.Port)))
			return kube.New(cfg)
		}
	}
	if k.Boot == nil {
		k.Boot = func() string { return Boot(k.Env) }
	}
	if k.Addresses == nil {
		k.Addresses = hostinfo.Addresses
	}
	if k.Prove == nil {
		k.Prove = func(ctx context.Context, host netip.Addr, port int, name string) (netip.Addr, bool) {
			cfg, err := config()
			if err != nil || rest.LoadTLSFiles(cfg) != nil {
				return netip.Addr{}, false
			}
			roots := x509.NewCertPool()
			if !roots.AppendCertsFromPEM(cfg.CAData) {
				return netip.Addr{}, false
			}
			return prove(ctx, host, port, name, roots)
		}
	}
	if k.Now == nil {
		k.Now = time.Now
	}
	k.looked = map[netip.Addr]time.Time{}
}

// Boot returns the ID of this boot of the machine, which a kubelet writes into its Node; "" where there is none.
func Boot(env snapenv.Env) string {
	id, err := os.ReadFile(env.HostPath("proc/sys/kernel/random/boot_id"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(id))
}

// Run looks until ctx ends.
func (k *Controller) Run(ctx context.Context) error {
	k.complete()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { k.follow(ctx) })
	tick := time.NewTicker(sweep)
	defer tick.Stop()
	for {
		k.member(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// follow watches this node's object.
func (k *Controller) follow(ctx context.Context) {
	own := func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, k.Node).String()
	}
	see := func(o any) {
		if n, ok := o.(*corev1.Node); ok {
			k.see(ctx, n)
		}
	}
	_, controller := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: &cache.ListWatch{
			ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				own(&o)
				pauses := backoff.New(firstPause, lastPause)
				for {
					list := &corev1.NodeList{}
					core, err := k.Core()
					if err == nil {
						err = core.Get().Resource("nodes").VersionedParams(&o, metav1.ParameterCodec).Do(ctx).Into(list)
					}
					if err == nil || ctx.Err() != nil {
						return list, err
					}
					k.Log.Debug("cannot look for copies of this node in its object yet", "err", err)
					select {
					case <-ctx.Done():
					case <-time.After(pauses.Step()):
					}
				}
			},
			WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
				core, err := k.Core()
				if err != nil {
					return nil, err
				}
				own(&o)
				o.Watch = true
				return core.Get().Resource("nodes").VersionedParams(&o, metav1.ParameterCodec).Watch(ctx)
			},
		},
		ObjectType: &corev1.Node{},
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    see,
			UpdateFunc: func(_, o any) { see(o) },
		},
	})
	controller.RunWithContext(ctx)
}

// see looks at what was written into this node's object: by this machine's kubelet, or by another one's.
func (k *Controller) see(ctx context.Context, n *corev1.Node) {
	own, err := k.own()
	if err != nil {
		return
	}
	if n.Status.NodeInfo.BootID == k.Boot() || n.Status.NodeInfo.BootID == "" {
		k.clear(ctx, n)
		return
	}
	port := int(n.Status.DaemonEndpoints.KubeletEndpoint.Port)
	if port == 0 {
		port = kubeletPort
	}
	for _, a := range n.Status.Addresses {
		host, err := netip.ParseAddr(a.Address)
		if a.Type != corev1.NodeInternalIP || err != nil || slices.Contains(own, host) || !k.due(host) {
			continue
		}
		if local, ok := k.Prove(ctx, host, port, k.Node); ok {
			core, err := k.Core()
			known, _ := Of(n, k.Now())
			k.found(ctx, known.with(k.Now(), local, host), core, err)
		}
	}
}

// member looks at the machine that has the address of this node's member of the datastore, where this one does not.
func (k *Controller) member(ctx context.Context) {
	if !nodeconfig.Load(k.Env).Datastore.Own() {
		return
	}
	self, err := storedir.Dir(k.Env.BackendLive()).Self()
	if err != nil {
		return
	}
	host, err := netip.ParseAddr(self.Host())
	if err != nil || host.IsLoopback() {
		return
	}
	own, err := k.own()
	if err != nil || slices.Contains(own, host) || !k.due(host) {
		return
	}
	if local, ok := k.Prove(ctx, host, kubeletPort, k.Node); ok {
		core, err := k.At(host)
		known, _ := Here(k.Env, k.Now())
		k.found(ctx, known.with(k.Now(), local, host), core, err)
	}
}

func (k *Controller) own() ([]netip.Addr, error) {
	list, err := k.Addresses()
	var out []netip.Addr
	for _, ip := range list {
		if a, ok := netip.AddrFromSlice(ip); ok {
			out = append(out, a.Unmap())
		}
	}
	return out, err
}

// due reports whether a machine is to be looked at, and takes it as done.
func (k *Controller) due(host netip.Addr) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := k.Now()
	if last, ok := k.looked[host]; ok && now.Sub(last).Abs() < again/4 {
		return false
	}
	if len(k.looked) > most { // whoever writes the Node cannot make this grow
		clear(k.looked)
	}
	k.looked[host] = now
	return true
}

// found notes a copy here and in the cluster, whose API server core leads to.
func (k *Controller) found(ctx context.Context, s Sighting, core *kube.Core, err error) {
	if what := s.What(k.Node); k.once(what) {
		k.Log.Error(what + "; " + Do)
	}
	if err := s.write(k.Env); err != nil {
		k.Log.Warn("cannot note that a copy of this machine runs", "err", err)
	}
	text, _ := json.Marshal(s) // addresses and a time
	if err == nil {
		err = annotate(ctx, core, k.Node, string(text))
	}
	if err != nil && ctx.Err() == nil {
		k.Log.Warn("cannot tell the cluster that a copy of this machine runs", "err", err)
	}
}

func (k *Controller) once(what string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	news := k.said != what
	k.said = what
	return news
}

// clear takes away what was said and is not true any more.
func (k *Controller) clear(ctx context.Context, n *corev1.Node) {
	if _, there := n.Annotations[Annotation]; !there {
		return
	}
	if _, ok := Of(n, k.Now()); ok {
		return
	}
	core, err := k.Core()
	if err == nil {
		err = annotate(ctx, core, k.Node, nil)
	}
	if err == nil {
		err = Forget(k.Env)
	}
	if err != nil && ctx.Err() == nil && !errors.Is(err, context.Canceled) {
		k.Log.Warn("cannot take back that a copy of this machine runs", "err", err)
	}
}

// annotate sets the annotation of a node, or removes it with nil. What a kubelet may patch is the status;
// annotations come along.
func annotate(ctx context.Context, core *kube.Core, node string, value any) error {
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]any{Annotation: value}}})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*dialTimeout)
	defer cancel()
	return core.Patch(types.MergePatchType).Resource("nodes").Name(node).SubResource("status").Body(patch).Do(ctx).Error()
}
