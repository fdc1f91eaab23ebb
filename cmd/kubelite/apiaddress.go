package main

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"

	"microk8s/internal/apiaddress"
	"microk8s/internal/hostwatch"
	"microk8s/internal/snapenv"
)

// Times of the election of who holds the API's address. Each node renews through its own API server, so the holder's
// death is noticed when its lease has run out. A datastore that elects a leader, for some three seconds, is outlasted.
const (
	addressLease = 8 * time.Second
	addressRenew = 6 * time.Second
	addressRetry = time.Second
)

// dropAPIAddress takes the API's address off the host, where an earlier process that was killed has left it: another node
// may have it by now. A worker, which may have been a control-plane node, forgets it.
func dropAPIAddress(env snapenv.Env, worker bool, log *slog.Logger) {
	old := apiaddress.Read(env)
	if !old.IsValid() {
		return
	}
	err := apiaddress.Remove(old)
	if err == nil && worker {
		err = apiaddress.Keep(env, netip.Addr{})
	}
	if err != nil {
		log.Warn("cannot take the API's address off this host", "address", old, "err", err)
	}
}

// keepAPIAddress takes part in holding the virtual address of the API, as the cluster's ConfigMap says it, until ctx ends.
func keepAPIAddress(ctx context.Context, env snapenv.Env, admin *rest.Config, node string, watch *hostwatch.Watcher, log *slog.Logger) error {
	cfg := rest.CopyConfig(admin)
	cfg.Timeout = addressRenew / 2
	elect, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(admin)
	if err != nil {
		return err
	}
	wanted := make(chan netip.Addr, 1)
	say := func(addr netip.Addr) {
		select {
		case <-wanted:
		default:
		}
		wanted <- addr
	}
	factory := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithNamespace(metav1.NamespaceSystem),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, apiaddress.ConfigMap).String()
		}))
	informer := factory.Core().V1().ConfigMaps().Informer()
	look := func() {
		addr := netip.Addr{}
		for _, o := range informer.GetStore().List() {
			if cm, ok := o.(*corev1.ConfigMap); ok {
				var err error
				if addr, err = apiaddress.Parse(cm.Data[apiaddress.Key]); err != nil {
					log.Warn("the ConfigMap of the API's address has none", "err", err)
				}
			}
		}
		say(addr)
	}
	if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { look() }, UpdateFunc: func(any, any) { look() }, DeleteFunc: func(any) { look() },
	}); err != nil {
		return err
	}
	factory.Start(ctx.Done())
	defer factory.Shutdown()
	if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		return nil
	}
	look() // also where there is none
	var running sync.WaitGroup
	stop := func() {}
	defer func() { stop(); running.Wait() }()
	now := netip.Addr{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case addr := <-wanted:
			if err := apiaddress.Keep(env, addr); err != nil {
				log.Warn("cannot write down the API's address", "err", err)
			}
			if addr == now {
				continue
			}
			stop()
			running.Wait()
			now, stop = addr, func() {}
			if !addr.IsValid() {
				continue
			}
			one, cancel := context.WithCancel(ctx)
			stop = cancel
			running.Go(func() {
				defer cancel()
				holdAPIAddress(one, elect, node, addr, watch, log)
			})
		}
	}
}

// holdAPIAddress takes part in the election and has the address on the host while it has won, until ctx ends.
func holdAPIAddress(ctx context.Context, client kubernetes.Interface, node string, addr netip.Addr, watch *hostwatch.Watcher, log *slog.Logger) {
	for said := false; ctx.Err() == nil; {
		if err := apiaddress.Network(addr); err != nil && !said {
			said = true
			log.Warn("this node does not hold the API's address", "address", addr, "err", err)
		} else if err == nil {
			said = false
			electAPIAddress(ctx, client, node, addr, watch, log)
		}
		select {
		case <-ctx.Done():
		case <-time.After(addressRetry):
		}
	}
}

func electAPIAddress(ctx context.Context, client kubernetes.Interface, node string, addr netip.Addr, watch *hostwatch.Watcher, log *slog.Logger) {
	var (
		mu      sync.Mutex
		keep    *hostwatch.Registration
		stopped bool
	)
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: &resourcelock.LeaseLock{
			LeaseMeta:  metav1.ObjectMeta{Namespace: metav1.NamespaceSystem, Name: apiaddress.Lease},
			Client:     client.CoordinationV1(),
			LockConfig: resourcelock.ResourceLockConfig{Identity: node},
		},
		LeaseDuration: addressLease, RenewDeadline: addressRenew, RetryPeriod: addressRetry,
		ReleaseOnCancel: true, Name: apiaddress.Lease,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(ctx context.Context) {
				mu.Lock()
				defer mu.Unlock()
				if stopped { // this is called from a goroutine of its own
					return
				}
				log.Info("this node answers for the API's address", "address", addr)
				keep = watch.Register(ctx, apiAddressOwner(addr))
			},
			OnStoppedLeading: func() {
				mu.Lock()
				defer mu.Unlock()
				stopped = true
				if keep == nil {
					return
				}
				keep.Close()
				log.Info("this node does not answer for the API's address any more", "address", addr)
				if err := apiaddress.Remove(addr); err != nil {
					log.Error("cannot take the API's address off this host", "address", addr, "err", err)
				}
			},
		},
	})
	if err != nil {
		log.Error("cannot take part in holding the API's address", "err", err)
		return
	}
	elector.Run(ctx)
}

// apiAddressOwner puts the address on the host, tells its network, and puts it back where somebody takes it away.
func apiAddressOwner(addr netip.Addr) hostwatch.Owner {
	return hostwatch.Owner{
		Name: "address of the API",
		Concerns: func(c hostwatch.Change) bool {
			return c.Kind == hostwatch.Address && c.Deleted || c.Kind == hostwatch.Link
		},
		Sync: func(ctx context.Context) ([]string, error) {
			added, err := apiaddress.Add(addr)
			if err != nil || !added {
				return nil, err
			}
			if err := apiaddress.Announce(ctx, addr); err != nil {
				return nil, err
			}
			return []string{"address " + addr.String()}, nil
		},
	}
}
