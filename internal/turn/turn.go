// Package turn has the nodes of a cluster take turns: one node at a time is refreshed, or changes the
// cluster's keys. Who has the turn is a Lease in the cluster, with an end that its holder moves on;
// a node that dies with it loses it then.
//
// The datastore's quorum does not depend on it: internal/hook asks for that besides.
package turn

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/kube"
)

// Name is that of the Lease, in kube-system.
const Name = "microk8s-turn"

const (
	leases      = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases"
	annotation  = "microk8s.io/why"
	callTimeout = 10 * time.Second
)

// What a turn is taken for. The words follow "NODE has the turn, ".
const (
	ForRefresh = "to be refreshed"
	ForKeys    = "to change the cluster's keys"
)

// RefreshLimit is how long a refresh has the turn at most: the next revision's agent ends it as soon as the
// node is Ready again.
const RefreshLimit = 15 * time.Minute

// skew is by how much the clocks of nodes may differ: a turn is taken over that much after its end.
const skew = time.Minute

// Turn is who has it.
type Turn struct {
	Node  string
	Why   string
	Since time.Time
	Until time.Time // if the holder does not move it on
}

// HeldError says that another node has the turn.
type HeldError struct{ Turn Turn }

func (e *HeldError) Error() string {
	const clock = "15:04:05 MST"
	return fmt.Sprintf("%s has the turn %s since %s, until %s at most; wait for it, then run the same command again (if that node is gone for good, end its turn with: microk8s kubectl -n kube-system delete lease %s)",
		e.Turn.Node, e.Turn.Why, e.Turn.Since.UTC().Format(clock), e.Turn.Until.UTC().Format(clock), Name)
}

// Lease is the turn of a cluster. It needs the administrator's rights.
type Lease struct {
	Core func() (*kube.Core, error)
	Now  func() time.Time // nil means the clock
}

func (l Lease) now() time.Time {
	if l.Now != nil {
		return l.Now()
	}
	return time.Now()
}

// Take takes the turn for a node, or moves the end of the one that it has. The error is a *HeldError
// while another node has it.
func (l Lease) Take(ctx context.Context, node, why string, limit time.Duration) error {
	err := kube.RetryConflict(ctx, func() error {
		o, err := l.read(ctx)
		if err != nil {
			return err
		}
		now := l.now()
		if has := holder(o); has != nil && has.Node != node && now.Before(has.Until.Add(skew)) {
			return &HeldError{*has}
		}
		seconds, at := int32(limit/time.Second), metav1.NewMicroTime(now)
		if o.Spec.HolderIdentity == nil || *o.Spec.HolderIdentity != node || o.Annotations[annotation] != why {
			o.Spec.AcquireTime = &at
		}
		o.Spec.HolderIdentity, o.Spec.LeaseDurationSeconds, o.Spec.RenewTime = &node, &seconds, &at
		o.Annotations = map[string]string{annotation: why}
		return l.write(ctx, o)
	})
	var held *HeldError
	if err != nil && !errors.As(err, &held) {
		return fmt.Errorf("cannot take the turn among the nodes: %w", err)
	}
	return err
}

// Get returns who has the turn; nil where nobody has.
func (l Lease) Get(ctx context.Context) (*Turn, error) {
	o, err := l.read(ctx)
	if err != nil {
		return nil, fmt.Errorf("cannot find out which node has the turn: %w", err)
	}
	has := holder(o)
	if has == nil || !l.now().Before(has.Until.Add(skew)) {
		return nil, nil
	}
	return has, nil
}

// End ends the turn of a node; it is in order if the node has not got it.
func (l Lease) End(ctx context.Context, node string) error {
	err := kube.RetryConflict(ctx, func() error {
		o, err := l.read(ctx)
		if err != nil {
			return err
		}
		if has := holder(o); has == nil || has.Node != node {
			return nil
		}
		nobody := ""
		o.Spec.HolderIdentity, o.Annotations = &nobody, nil
		return l.write(ctx, o)
	})
	if err != nil {
		return fmt.Errorf("cannot end the turn of %s: %w", node, err)
	}
	return nil
}

// Hold takes the turn and keeps it until the function that it returns is called, or this process ends.
func (l Lease) Hold(ctx context.Context, node, why string, limit time.Duration, log *slog.Logger) (end func(), err error) {
	if err := l.Take(ctx, node, why, limit); err != nil {
		return nil, err
	}
	keep, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(limit / 4)
		defer tick.Stop()
		for {
			select {
			case <-keep.Done():
				return
			case <-tick.C:
			}
			if err := l.Take(keep, node, why, limit); err != nil && keep.Err() == nil {
				log.Warn("the turn among the nodes is not kept", "err", err)
			}
		}
	}()
	return func() {
		stop()
		<-done
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
		defer cancel()
		if err := l.End(ctx, node); err != nil {
			log.Warn("the turn among the nodes ends by itself", "err", err)
		}
	}, nil
}

func holder(o *coordinationv1.Lease) *Turn {
	s := o.Spec
	if s.HolderIdentity == nil || *s.HolderIdentity == "" || s.RenewTime == nil || s.LeaseDurationSeconds == nil {
		return nil
	}
	t := &Turn{Node: *s.HolderIdentity, Why: o.Annotations[annotation], Since: s.RenewTime.Time}
	if s.AcquireTime != nil {
		t.Since = s.AcquireTime.Time
	}
	t.Until = s.RenewTime.Add(time.Duration(*s.LeaseDurationSeconds) * time.Second)
	return t
}

// read returns the Lease, a new one where there is none.
func (l Lease) read(ctx context.Context) (*coordinationv1.Lease, error) {
	o := &coordinationv1.Lease{
		TypeMeta:   metav1.TypeMeta{APIVersion: "coordination.k8s.io/v1", Kind: "Lease"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: Name},
	}
	core, err := l.Core()
	if err != nil {
		return nil, err
	}
	data, err := core.Get().AbsPath(leases + "/" + Name).Timeout(callTimeout).Do(ctx).Raw()
	if apierrors.IsNotFound(err) {
		return o, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, o); err != nil {
		return nil, fmt.Errorf("cannot read the Lease %s: %w", Name, err)
	}
	return o, nil
}

func (l Lease) write(ctx context.Context, o *coordinationv1.Lease) error {
	core, err := l.Core()
	if err != nil {
		return err
	}
	body, err := json.Marshal(o)
	if err != nil {
		return err
	}
	req := core.Put().AbsPath(leases + "/" + Name)
	if o.ResourceVersion == "" {
		req = core.Post().AbsPath(leases)
	}
	return req.Timeout(callTimeout).SetHeader("Content-Type", "application/json").Body(body).Do(ctx).Error()
}
