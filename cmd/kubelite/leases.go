package main

import (
	"context"
	"log/slog"
	"os"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"microk8s/cmd/kubelite/daemons"
)

// releaseOwnLeases gives up the leader leases that an earlier kubelite of this node still
// holds, so that its controllers go on at once and not after the lease has run out: after a
// power loss, or a stop, during which nobody released them. It must be called when the local
// API server runs and before the daemons that take part in the election: the process whose
// port that server has taken is gone, and its controllers with it. A lease of another node is
// left alone. Failures are logged only; the lease then runs out.
func releaseOwnLeases(ctx context.Context, admin *rest.Config, log *slog.Logger) {
	client, err := kubernetes.NewForConfig(admin)
	if err != nil {
		log.Warn("cannot look at leases", "err", err)
		return
	}
	host, err := os.Hostname()
	if err != nil {
		log.Warn("cannot look at leases", "err", err)
		return
	}
	leases := client.CoordinationV1().Leases(metav1.NamespaceSystem)
	for _, name := range []string{daemons.ControllerManager, daemons.Scheduler} {
		lease, err := leases.Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			continue // there is none before the first start
		}
		if !heldBy(lease.Spec.HolderIdentity, host) {
			continue
		}
		// What client-go writes when a leader steps down; the object's version makes the
		// write fail if anybody else has written meanwhile.
		nobody, second := "", int32(1)
		lease.Spec.HolderIdentity = &nobody
		lease.Spec.LeaseDurationSeconds = &second
		if _, err := leases.Update(ctx, lease, metav1.UpdateOptions{}); err != nil {
			log.Warn("cannot release the lease of this node's earlier process", "lease", name, "err", err)
			continue
		}
		log.Info("released the lease of this node's earlier process", "lease", name)
	}
}

// heldBy reports whether a lease's holder is a daemon on the host: they call themselves by the
// host's name, an underscore and a random UUID.
func heldBy(holder *string, host string) bool {
	if holder == nil {
		return false
	}
	name, uuid, ok := cutLast(*holder, "_")
	return ok && uuid != "" && name == host
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}
