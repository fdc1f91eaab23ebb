package fanout

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/watch"

	"microk8s/cluster-agent/api"
	"microk8s/internal/kube"
)

// LaterName is the Secret of kube-system with what nodes that could not be reached are still to
// be told, by node. It is a Secret because arguments may be confidential.
const LaterName = "microk8s-configure-later"

// late holds the pending changes of one node.
type late struct {
	Request api.ConfigureRequest `json:"request"` // without a callback secret
	// NotBefore is when it may be called: until then an agent is at it, or has just failed.
	NotBefore time.Time `json:"not_before,omitzero"`
}

func (l late) empty() bool { return len(l.Request.Services) == 0 && len(l.Request.Addons) == 0 }

// decodeLate reads the Secret. What cannot be read counts as nothing.
func decodeLate(s *corev1.Secret) map[string]late {
	out := map[string]late{}
	for node, data := range s.Data {
		var l late
		if json.Unmarshal(data, &l) == nil && !l.empty() {
			out[node] = l
		}
	}
	return out
}

// late reads the pending changes of all nodes.
func (c *Cluster) late(ctx context.Context) (map[string]late, error) {
	core, err := c.core()
	if err != nil {
		return nil, err
	}
	secret, err := core.Secret(ctx, LaterName)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the queue of pending node changes: %w", err)
	}
	return decodeLate(secret), nil
}

// changeLate replaces the pending changes of one node by what change returns; an empty one is
// removed. change is called again when somebody else was faster. Nothing is written where it
// changes nothing.
func (c *Cluster) changeLate(ctx context.Context, node string, change func(late) late) error {
	core, err := c.core()
	if err != nil {
		return err
	}
	return kube.RetryConflict(ctx, func() error {
		secret, err := core.Secret(ctx, LaterName)
		create := apierrors.IsNotFound(err)
		if create {
			secret = &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: LaterName}, Type: "microk8s.io/cluster-agent"}
			err = nil
		}
		if err != nil {
			return fmt.Errorf("cannot read the queue of pending node changes: %w", err)
		}
		have := decodeLate(secret)[node]
		want := change(have)
		if reflect.DeepEqual(have, want) {
			return nil
		}
		if secret.Data == nil {
			secret.Data = map[string][]byte{}
		}
		if want.empty() {
			delete(secret.Data, node)
		} else if secret.Data[node], err = json.Marshal(want); err != nil {
			return err
		}
		if create {
			_, err = core.CreateSecret(ctx, secret)
		} else {
			_, err = core.UpdateSecret(ctx, secret)
		}
		if err != nil {
			return fmt.Errorf("cannot record the pending node changes: %w", err)
		}
		return nil
	})
}

// unreached is the error of a call that the node may not have seen.
type unreached struct{ error }

func (u unreached) Unwrap() error { return u.error }

func (r Result) away() bool { return errors.As(r.Err, new(unreached)) }

// told notes how a call to one node ended that was asked for req, with before in front of it.
// A node that was not reached is called later; the result says so.
func (c *Cluster) told(ctx context.Context, r *Result, before late, req api.ConfigureRequest) {
	switch {
	case r.Err == nil && before.empty(), r.Err != nil && !r.away(), ctx.Err() != nil:
		return
	case r.Err == nil:
		// What somebody added meanwhile stays.
		_ = c.changeLate(ctx, r.Name, func(now late) late {
			if reflect.DeepEqual(now.Request, before.Request) {
				return late{}
			}
			return now
		}) // told once more, the node does the same again
		return
	}
	if (late{Request: req}).empty() {
		return
	}
	err := c.changeLate(ctx, r.Name, func(now late) late {
		now.Request = merge(now.Request, req)
		return now
	})
	r.Later = err == nil
}

// merge makes one request of two, of which the second came later.
func merge(first, second api.ConfigureRequest) api.ConfigureRequest {
	out := api.ConfigureRequest{Services: slices.Clone(first.Services), Addons: slices.Clone(first.Addons)}
	for _, s := range second.Services {
		if i := slices.IndexFunc(out.Services, func(o api.ConfigureService) bool { return o.Name == s.Name }); i >= 0 {
			out.Services[i] = mergeService(out.Services[i], s)
		} else {
			out.Services = append(out.Services, s)
		}
	}
	for _, a := range second.Addons {
		out.Addons = slices.DeleteFunc(out.Addons, func(o api.ConfigureAddon) bool { return o.Name == a.Name })
		out.Addons = append(out.Addons, a)
	}
	return out
}

// mergeService gives each option what was said of it last.
func mergeService(first, second api.ConfigureService) api.ConfigureService {
	set, removed := map[string]string{}, map[string]bool{}
	for _, s := range []api.ConfigureService{first, second} {
		for _, key := range s.Remove { // in this order: a service's own updates count more
			key = "--" + strings.TrimLeft(key, "-")
			delete(set, key)
			removed[key] = true
		}
		for _, m := range s.Update {
			for key, value := range m {
				key = "--" + strings.TrimLeft(key, "-")
				set[key] = value
				delete(removed, key)
			}
		}
	}
	out := api.ConfigureService{Name: first.Name, Restart: first.Restart || second.Restart, Remove: slices.Sorted(maps.Keys(removed))}
	for _, key := range slices.Sorted(maps.Keys(set)) {
		out.Update = append(out.Update, map[string]string{key: set[key]})
	}
	return out
}

const (
	laterRetry   = 15 * time.Second                         // after a node that is ready was not reached
	refusedRetry = 5 * time.Minute                          // after it did not do what it was told
	watchRetry   = 5 * time.Second                          // after the API server did not answer
	laterClaim   = callTimeout + readyTimeout + time.Minute // that one agent has for telling one node
)

// Controller tells nodes that could not be reached, when they are ready again, what they missed.
// One runs in the agent of each control-plane node; a node that exists no more is forgotten.
type Controller struct {
	Cluster *Cluster
	Log     *slog.Logger
	Retry   time.Duration // after a node that is ready was not reached; 0 means 15 s
}

// Run goes on until ctx ends.
func (k *Controller) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		if err := k.follow(ctx); err != nil && ctx.Err() == nil {
			k.Log.Debug("cannot watch the queue of pending node changes now", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(watchRetry):
		}
	}
	return nil
}

// follow watches the Secret, and while it names a node the nodes, until the API server ends a
// watch.
func (k *Controller) follow(ctx context.Context) error {
	core, err := k.Cluster.core()
	if err != nil {
		return err
	}
	secrets, err := open(ctx, core, kube.SystemNamespace, "secrets", fields.OneTermEqualSelector("metadata.name", LaterName))
	if err != nil {
		return err
	}
	defer secrets.Stop()
	var (
		nodes watch.Interface
		moved <-chan watch.Event // of nodes
		again <-chan time.Time
		left  map[string]late
	)
	stop := func() {
		if nodes != nil {
			nodes.Stop()
		}
		nodes, moved, again = nil, nil, nil
	}
	defer func() { stop() }()
	for {
		select {
		case e, ok := <-secrets.ResultChan():
			if !ok {
				return nil
			}
			if s, ok := e.Object.(*corev1.Secret); ok {
				left = decodeLate(s)
			}
		case _, ok := <-moved:
			if !ok {
				return nil
			}
		case <-again:
		case <-ctx.Done():
			return nil
		}
		if len(left) == 0 {
			stop()
			continue
		}
		if nodes == nil {
			if nodes, err = open(ctx, core, "", "nodes", fields.Everything()); err != nil {
				return err
			}
			moved = nodes.ResultChan()
		}
		wait, err := k.tell(ctx, core, left)
		if err != nil {
			return err
		}
		again = nil
		if wait > 0 {
			again = time.After(wait)
		}
	}
}

// open watches objects from what there is on.
func open(ctx context.Context, core *kube.Core, namespace, resource string, which fields.Selector) (watch.Interface, error) {
	opts := metav1.ListOptions{FieldSelector: which.String(), Watch: true}
	return core.Get().Namespace(namespace).Resource(resource).VersionedParams(&opts, metav1.ParameterCodec).Timeout(0).Watch(ctx)
}

// tell tells every node that is ready what it missed, and says after what time to try again;
// 0 means when something changes.
func (k *Controller) tell(ctx context.Context, core *kube.Core, left map[string]late) (time.Duration, error) {
	list, err := core.Nodes(ctx)
	if err != nil {
		return 0, err
	}
	var wait time.Duration
	soon := func(d time.Duration) {
		if wait == 0 || d < wait {
			wait = max(d, time.Millisecond)
		}
	}
	// claim lets nobody else tell a node for a time; false where somebody else was faster.
	claim := func(name string, have late, d time.Duration) (mine bool, err error) {
		err = k.Cluster.changeLate(ctx, name, func(now late) late {
			if mine = !now.empty() && now.NotBefore.Equal(have.NotBefore); mine {
				now.NotBefore = time.Now().Add(d).UTC()
				have = now
			}
			return now
		})
		left[name] = have
		return mine, err
	}
	for _, name := range slices.Sorted(maps.Keys(left)) {
		i := slices.IndexFunc(list, func(n corev1.Node) bool { return n.Name == name })
		if i < 0 {
			if err := k.Cluster.changeLate(ctx, name, func(late) late { return late{} }); err != nil {
				return 0, err
			}
			delete(left, name)
			continue
		}
		if !kube.Ready(&list[i]) {
			continue // its next event comes
		}
		if d := time.Until(left[name].NotBefore); d > 0 {
			soon(d)
			continue
		}
		if mine, err := claim(name, left[name], laterClaim); err != nil {
			return 0, err
		} else if !mine {
			continue // the watch says what became of it
		}
		results, err := k.Cluster.Configure(ctx, api.ConfigureRequest{}, name)
		if err == nil {
			err = Failed(results)
		}
		if err == nil {
			k.Log.Info("applied pending changes to a node that is reachable again", "node", name)
			delete(left, name)
			continue
		}
		retry := cmp.Or(k.Retry, laterRetry)
		if len(results) == 1 && !results[0].away() {
			retry = refusedRetry
		}
		k.Log.Warn("cannot apply pending changes to a node", "node", name, "err", err, "retry_in", retry)
		if _, err := claim(name, left[name], retry); err != nil {
			return 0, err
		}
		soon(retry)
	}
	return wait, nil
}
