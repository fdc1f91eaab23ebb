package agent

import (
	"context"
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"

	"microk8s/cluster-agent/broker"
	"microk8s/cluster-agent/callback"
	"microk8s/internal/kube"
)

// apiServer is the broker's view of the cluster.
type apiServer struct {
	core func() (*kube.Core, error)
}

var _ broker.Cluster = apiServer{}

func (a apiServer) Nodes(ctx context.Context) ([]corev1.Node, error) {
	core, err := a.core()
	if err != nil {
		return nil, err
	}
	return core.Nodes(ctx)
}

// APIServers reads the endpoints of the Service kubernetes, which API servers write.
func (a apiServer) APIServers(ctx context.Context) ([]netip.Addr, error) {
	core, err := a.core()
	if err != nil {
		return nil, err
	}
	var e corev1.Endpoints //nolint:staticcheck // the API servers keep it, and it is in the core group
	if err := core.Get().Namespace("default").Resource("endpoints").Name("kubernetes").Do(ctx).Into(&e); err != nil {
		return nil, fmt.Errorf("cannot list the API servers: %w", err)
	}
	var out []netip.Addr
	for _, s := range e.Subsets {
		for _, ip := range s.Addresses {
			if addr, err := netip.ParseAddr(ip.IP); err == nil {
				out = append(out, addr)
			}
		}
	}
	return out, nil
}

func (a apiServer) CallbackKey(ctx context.Context) ([]byte, error) {
	return callback.Keys{Core: a.core}.Get(ctx)
}
