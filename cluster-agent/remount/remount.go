// Package remount restarts pods of this node whose mounts lead to an older revision of the
// snap: after a refresh, /var/snap/microk8s/current is another directory for new containers than
// for those that live on, and the old one goes with its revision. Networks that users bring
// (args/cni-network/cni.yaml) mount such paths; nothing of the product's own does.
//
// That there was a refresh is known from a lock, which the hook post-refresh writes and this
// package removes when it is done. Whether a pod comes back is its owner's affair: pods without
// one are left alone.
package remount

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/backoff"
	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
)

// The pauses while the API server does not answer.
const (
	firstPause = 2 * time.Second
	lastPause  = time.Minute
)

// Controller does it for one node, once.
type Controller struct {
	Env  snapenv.Env
	Node string                     // its name in the cluster
	Core func() (*kube.Core, error) // with the rights of the node's kubelet
	Log  *slog.Logger
}

// Run returns when nothing is left to be done, or ctx ends.
func (k *Controller) Run(ctx context.Context) error {
	pauses := backoff.New(firstPause, lastPause)
	for {
		err := k.once(ctx)
		if err == nil || ctx.Err() != nil {
			return nil
		}
		pause := pauses.Step()
		k.Log.Warn("cannot restart pods that mount an older revision yet", "err", err, "retry_in", pause)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

func (k *Controller) once(ctx context.Context) error {
	lock, err := os.Stat(k.Env.Lock(snapenv.LockRemount))
	if errors.Is(err, fs.ErrNotExist) || nodeconfig.ReadState(k.Env).KeepPods {
		return nil
	}
	if err != nil {
		return err
	}
	core, err := k.Core()
	if err != nil {
		return err
	}
	var pods corev1.PodList
	if err := core.Get().Resource("pods").Param("fieldSelector", "spec.nodeName="+k.Node).Do(ctx).Into(&pods); err != nil {
		return fmt.Errorf("cannot list the pods of this node: %w", err)
	}
	var errs []error
	for _, pod := range pods.Items {
		if !k.stale(&pod, lock.ModTime()) {
			continue
		}
		err := core.Delete().Namespace(pod.Namespace).Resource("pods").Name(pod.Name).
			Body(&metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(pod.UID))}).Do(ctx).Error()
		if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
			errs = append(errs, fmt.Errorf("cannot restart the pod %s/%s: %w", pod.Namespace, pod.Name, err))
			continue
		}
		k.Log.Info("a pod that mounts an older revision of the snap is restarted", "namespace", pod.Namespace, "pod", pod.Name)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return os.Remove(k.Env.Lock(snapenv.LockRemount))
}

// stale reports whether a pod that something will recreate was started before the refresh and
// mounts a directory that belongs to a revision.
func (k *Controller) stale(pod *corev1.Pod, refreshed time.Time) bool {
	owner := metav1.GetControllerOf(pod)
	if owner == nil || owner.Kind == "Node" || pod.Status.StartTime == nil || pod.Status.StartTime.After(refreshed) {
		return false
	}
	data := filepath.Dir(k.Env.Data) + "/"
	for _, v := range pod.Spec.Volumes {
		if v.HostPath == nil {
			continue
		}
		path := filepath.Clean(v.HostPath.Path)
		if strings.HasPrefix(path, data) && path != k.Env.Common && !strings.HasPrefix(path, k.Env.Common+"/") {
			return true
		}
	}
	return false
}
