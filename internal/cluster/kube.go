package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"microk8s/internal/kube"
)

const kubeTimeout = 10 * time.Second // of one request

// kube makes a client of a kubeconfig's API server, or of another at server ("" for the one named
// in the file), whose certificate need not name that address: it is the cluster's CA that counts.
func (n *Node) kube(file, server string) (*kube.Core, error) {
	cfg, err := clientcmd.BuildConfigFromFlags("", n.Env.Credential(file))
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", n.Env.Credential(file), err)
	}
	cfg.WarningHandler = rest.NoWarnings{}
	if server != "" {
		cfg.Host = "https://" + server
		cfg.TLSClientConfig.ServerName = "kubernetes.default.svc"
		cfg.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			return n.Dial(ctx, network, address)
		}
	}
	return kube.New(cfg)
}

func getNode(ctx context.Context, c *kube.Core, name string) (*corev1.Node, error) {
	var node corev1.Node
	err := c.Get().Resource("nodes").Name(name).Timeout(kubeTimeout).Do(ctx).Into(&node)
	return &node, err
}

// deleteNode deletes a Node; a missing one is in order. With a uid, one of another UID is left
// alone: the error is then the API's Conflict.
func deleteNode(ctx context.Context, c *kube.Core, name string, uid types.UID) error {
	o := metav1.DeleteOptions{}
	if uid != "" {
		o.Preconditions = &metav1.Preconditions{UID: &uid}
	}
	err := c.Delete().Resource("nodes").Name(name).Timeout(kubeTimeout).Body(&o).Do(ctx).Error()
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("cannot delete the node %s: %w", name, err)
	}
	return nil
}

// internalIP is the first address under which the cluster knows a node.
func internalIP(node *corev1.Node) string {
	for _, a := range node.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			return a.Address
		}
	}
	return ""
}

// Limits of waiting for this node in the cluster. It must be registered; that it is Ready too is
// waited for, and reported.
const (
	registerWait = 3 * time.Minute
	readyWait    = time.Minute
)

// waitForNode waits until the cluster knows this node.
func (s *joinRun) waitForNode(ctx context.Context) error {
	return s.whileAnswering(ctx, s.registered)
}

func (s *joinRun) registered(ctx context.Context) error {
	file := "client.config"
	if s.Worker {
		file = "kubelet.config"
	}
	var last *corev1.Node
	get := func(ctx context.Context) error {
		c, err := s.Kube(file, "")
		if err != nil {
			return &finalError{err}
		}
		last, err = getNode(ctx, c, s.Self)
		return err
	}
	if err := waitFor(ctx, registerWait, get); err != nil {
		return fmt.Errorf("this node did not appear in the cluster: %w", err)
	}
	err := waitFor(ctx, readyWait, func(ctx context.Context) error {
		if err := get(ctx); err != nil {
			return err
		}
		if !kube.Ready(last) {
			return errors.New("not Ready")
		}
		return nil
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		s.Say("WARNING: the node is in the cluster, but was not Ready within %s; see microk8s inspect", readyWait)
	}
	return nil
}

// deleteNodeObject deletes a Node through one of the cluster's other API servers.
func (s *joinRun) deleteNodeObject(ctx context.Context, a *answer, name string) error {
	var errs []error
	for _, server := range a.apiServers() {
		c, err := s.Kube("client.config", server)
		if err == nil {
			err = deleteNode(ctx, c, name, "")
		}
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
