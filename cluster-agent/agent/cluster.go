package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/cluster-agent/broker"
	"microk8s/cluster-agent/callback"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/kube"
	"microk8s/internal/noderegistry"
	"microk8s/internal/snapenv"
)

// apiServer is the broker's view of the cluster.
type apiServer struct {
	env  snapenv.Env
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
	data, err := core.Get().AbsPath("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices").
		Param("labelSelector", discoveryv1.LabelServiceName+"=kubernetes").SetHeader("Accept", "application/json").Do(ctx).Raw()
	if err != nil {
		return nil, fmt.Errorf("cannot list the API servers: %w", err)
	}
	var list discoveryv1.EndpointSliceList
	if err := json.Unmarshal(data, &list); err != nil {
		return nil, fmt.Errorf("cannot list the API servers: %w", err)
	}
	var out []netip.Addr
	for _, slice := range list.Items {
		for _, e := range slice.Endpoints {
			for _, text := range e.Addresses {
				if addr, err := netip.ParseAddr(text); err == nil {
					out = append(out, addr)
				}
			}
		}
	}
	return out, nil
}

func (a apiServer) CallbackKey(ctx context.Context) (callback.Key, error) {
	return callback.Keys{Env: a.env, Core: a.core}.Get(ctx)
}

// DeleteNode deletes that very object, not a later one of its name.
func (a apiServer) DeleteNode(ctx context.Context, n *corev1.Node) error {
	core, err := a.core()
	if err != nil {
		return err
	}
	err = core.Delete().Resource("nodes").Name(n.Name).Body(&metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &n.UID}}).Do(ctx).Error()
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return fmt.Errorf("cannot delete the node %s: %w", n.Name, err)
	}
	return nil
}

func (a apiServer) Namespace(ctx context.Context, name string) (bool, error) {
	core, err := a.core()
	if err != nil {
		return false, err
	}
	err = core.Get().Resource("namespaces").Name(name).Do(ctx).Error()
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}

// adopt makes the records of nodes that are in the cluster without one, and ends the secrets of the
// build before when all control-plane nodes are of this one.
func (a apiServer) adopt(ctx context.Context, members func() ([]storedir.Member, error), now time.Time) error {
	registry := noderegistry.Registry{Core: a.core}
	keys := callback.Keys{Env: a.env, Core: a.core}
	complete, err := registry.Complete(ctx)
	if err != nil {
		return err
	}
	if complete {
		return keys.Seal(ctx)
	}
	nodes, err := a.Nodes(ctx)
	if err != nil {
		return err
	}
	servers, err := a.APIServers(ctx)
	if err != nil {
		return err
	}
	if list, err := members(); err == nil { // with an external etcd there are none
		for _, m := range list {
			if ap, err := netip.ParseAddrPort(m.Address); err == nil {
				servers = append(servers, ap.Addr().Unmap())
			}
		}
	}
	var present []noderegistry.Record
	for _, n := range nodes {
		r := noderegistry.Record{Name: n.Name, Role: noderegistry.Worker, Since: now}
		for _, addr := range n.Status.Addresses {
			if ip, err := netip.ParseAddr(addr.Address); err == nil && slices.Contains(servers, ip.Unmap()) {
				r.Role = noderegistry.ControlPlane
			}
		}
		present = append(present, r)
	}
	if complete, err = registry.Adopt(ctx, present); err != nil || !complete {
		return err
	}
	return keys.Seal(ctx)
}
