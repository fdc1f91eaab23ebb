// Package addons has the objects of addons carried out: it watches them, and runs the command line for one that asks for
// something else than is the case (internal/addon/control). The work is in a process of its own, which
// takes far more memory than the agent has, and goes on when a change of DNS restarts the API server.
package addons

import (
	"context"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"

	"microk8s/internal/addon/object"
	"microk8s/internal/kube"
	"microk8s/internal/snapenv"
)

const (
	// pause is between two tries while the API server does not answer, or has no such kind yet.
	pause = 2 * time.Second
	// first and longest are the pauses between two tries of an object.
	first, longest = 5 * time.Second, 5 * time.Minute
	// patience is how long one who enabled an addon in another way, a start for instance, has for seeing its pods ready.
	patience = 30 * time.Second
	// standby is how long a node that does not lead leaves an object to the one that does.
	standby = time.Minute
	// atOnce is how many objects are carried out at the same time; most of that is waiting for pods.
	atOnce = 4
	// limit bounds one try.
	limit = 30 * time.Minute
)

// lease is that of the node that leads: where Kubernetes' own controllers run (ADR 44).
const lease = "kube-controller-manager"

// Controller follows the objects on one control-plane node. Set all fields.
type Controller struct {
	Env  snapenv.Env
	Host string // that controllers of this node have in their names
	// Config is the administrator's.
	Config func() (*rest.Config, error)
	// Exec runs a program of the product.
	Exec func(ctx context.Context, stdin io.Reader, argv ...string) error
	// Command carries out the object whose name is added to it.
	Command []string
	Log     *slog.Logger

	standby, patience time.Duration // 0 are the constants
}

// Run goes on until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		if err := c.follow(ctx); ctx.Err() == nil {
			c.Log.Debug("the objects of addons cannot be followed now", "err", err, "retry_in", pause)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
	return nil
}

// view is what one round of following knows.
type view struct {
	*Controller
	leases rest.Interface
	store  cache.Store
	queue  workqueue.TypedRateLimitingInterface[string]

	mu    sync.Mutex
	since map[string]time.Time // from when an object was left to the node that leads
}

// follow carries out objects until ctx ends; it returns early while there is no such kind.
func (c *Controller) follow(ctx context.Context) error {
	config, err := c.Config()
	if err != nil {
		return err
	}
	client, err := kube.For(config, "/apis", object.Group, object.AddToScheme)
	if err != nil {
		return err
	}
	leases, err := kube.For(config, "/apis", coordinationv1.SchemeGroupVersion, coordinationv1.AddToScheme)
	if err != nil {
		return err
	}
	if err := client.Get().Resource("addons").Param("limit", "1").Do(ctx).Error(); err != nil {
		return err
	}
	v := &view{Controller: c, leases: leases, since: map[string]time.Time{}}
	v.queue = workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](first, longest))
	ctx, cancel := context.WithCancel(ctx)
	store, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: cache.NewListWatchFromClient(client, object.Resource.Resource, metav1.NamespaceAll, fields.Everything()),
		ObjectType:    &object.Addon{},
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    func(o any) { v.changed(nil, o.(*object.Addon)) },
			UpdateFunc: func(was, is any) { v.changed(was.(*object.Addon), is.(*object.Addon)) },
			DeleteFunc: func(o any) {
				if name, err := cache.DeletionHandlingMetaNamespaceKeyFunc(o); err == nil {
					v.queue.Add(name)
				}
			},
		},
	})
	v.store = store
	var all sync.WaitGroup
	all.Go(func() { informer.RunWithContext(ctx) })
	for range atOnce {
		all.Go(func() {
			for v.next(ctx) {
			}
		})
	}
	<-ctx.Done()
	v.queue.ShutDown()
	cancel()
	all.Wait()
	return ctx.Err()
}

// changed queues an object about which there is something to do.
func (v *view) changed(was, is *object.Addon) {
	switch {
	case is.Settled():
		v.queue.Forget(is.Name)
	case was == nil && !is.Done() || was != nil && (was.Generation != is.Generation || (was.DeletionTimestamp == nil) != (is.DeletionTimestamp == nil) || was.Done() && !is.Done()):
		v.queue.Forget(is.Name) // something new is asked for: at once
		v.queue.Add(is.Name)
	case was == nil || was.Settled():
		v.queue.AddAfter(is.Name, orElse(v.patience, patience))
	}
}

func orElse(d, def time.Duration) time.Duration {
	if d == 0 {
		return def
	}
	return d
}

// next takes one object from the queue. It returns false at the end.
func (v *view) next(ctx context.Context) bool {
	name, over := v.queue.Get()
	if over {
		return false
	}
	defer v.queue.Done(name)
	o, there, _ := v.store.GetByKey(name)
	if there && o.(*object.Addon).Settled() {
		v.left(name, false)
		v.queue.Forget(name)
		return true
	}
	_, err := os.Stat(v.Env.Lock(snapenv.LockResetting)) // then all objects go
	if err == nil || !v.mine(ctx, name) {
		v.queue.AddAfter(name, first)
		return true
	}
	v.left(name, false)
	try, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := v.Exec(try, nil, append(v.Command[:len(v.Command):len(v.Command)], name)...); err != nil && ctx.Err() == nil {
		v.Log.Warn("an addon is not as its object asks", "addon", name, "err", err)
	}
	if there {
		v.queue.AddRateLimited(name) // and nothing is to be done then, as a rule
	}
	return true
}

// mine reports whether this node carries out an object: it leads, nobody does, or who does has left it for a while.
func (v *view) mine(ctx context.Context, name string) bool {
	var l coordinationv1.Lease
	err := v.leases.Get().Namespace(kube.SystemNamespace).Resource("leases").Name(lease).Do(ctx).Into(&l)
	if err != nil && !apierrors.IsNotFound(err) {
		return false
	}
	holder := ""
	if l.Spec.HolderIdentity != nil {
		holder = *l.Spec.HolderIdentity
	}
	host := holder[:max(strings.LastIndexByte(holder, '_'), 0)]
	return host == "" || strings.EqualFold(host, v.Host) || v.left(name, true) > orElse(v.standby, standby)
}

// left notes that an object is left to another node, or is not any more, and returns for how long it was.
func (v *view) left(name string, is bool) time.Duration {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !is {
		delete(v.since, name)
		return 0
	}
	if v.since[name].IsZero() {
		v.since[name] = time.Now()
	}
	return time.Since(v.since[name])
}
