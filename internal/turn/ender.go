package turn

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	corev1 "k8s.io/api/core/v1"

	"microk8s/internal/kube"
)

// look is the pause between two looks whether the node is back.
const look = 3 * time.Second

// Ender ends the turn that this node took before its refresh, when the node is back. It belongs into the
// agent, which the next revision starts, or the one before where the refresh failed.
type Ender struct {
	Lease Lease
	Node  string
	Log   *slog.Logger

	began time.Time
	pause time.Duration // look; shorter in tests
}

// Run goes on until this node has not got the turn of a refresh, or ctx ends.
func (e *Ender) Run(ctx context.Context) error {
	e.began = e.Lease.now()
	if e.pause == 0 {
		e.pause = look
	}
	for ctx.Err() == nil {
		done, err := e.once(ctx)
		if done {
			return nil
		}
		if err != nil {
			e.Log.Debug("the turn of this node's refresh is not ended yet", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(e.pause):
		}
	}
	return nil
}

// once ends the turn if the node is back. done says that there is nothing to end any more.
func (e *Ender) once(ctx context.Context) (done bool, err error) {
	has, err := e.Lease.Get(ctx)
	if err != nil {
		return false, err
	}
	if has == nil || has.Node != e.Node || has.Why != ForRefresh || !has.Since.Before(e.began) {
		return true, nil
	}
	if err := e.back(ctx); err != nil {
		return false, err
	}
	if err := e.Lease.End(ctx, e.Node); err != nil {
		return false, err
	}
	e.Log.Info("the turn of this node's refresh has ended")
	return true, nil
}

// back says why the node is not back: its API server answers, and its kubelet has said since the agent
// began that it is ready.
func (e *Ender) back(ctx context.Context) error {
	core, err := e.Lease.Core()
	if err != nil {
		return err
	}
	if err := core.Get().AbsPath("/readyz").Timeout(callTimeout).Do(ctx).Error(); err != nil {
		return fmt.Errorf("the API server is not ready: %w", err)
	}
	var n corev1.Node
	if err := core.Get().Resource("nodes").Name(e.Node).Timeout(callTimeout).Do(ctx).Into(&n); err != nil {
		return err
	}
	if !kube.Ready(&n) {
		return errors.New("the node is not Ready")
	}
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady && c.LastHeartbeatTime.Time.Before(e.began.Truncate(time.Second)) {
			return errors.New("the kubelet has not said anything yet")
		}
	}
	return nil
}
