package addon

import (
	"context"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

// spreadAnnotation is on the Deployment of CoreDNS once its pods were made two, so that a
// person who makes them fewer again is not overruled.
const spreadAnnotation = "microk8s.io/spread"

var deployments = schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "deployments"}

// Spread gives the cluster a second DNS server when it has a second node that is ready, once.
func (s *Set) Spread(ctx context.Context) error {
	client := s.client.Resource(deployments).Namespace(metav1.NamespaceSystem)
	dns, err := client.Get(ctx, "coredns", metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot get CoreDNS: %w", err)
	}
	replicas, _, _ := unstructured.NestedInt64(dns.Object, "spec", "replicas")
	if dns.GetLabels()[Label] != "dns" || dns.GetAnnotations()[spreadAnnotation] != "" || replicas != 1 {
		return nil
	}
	list, err := s.client.Resource(nodes).List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("cannot list the nodes: %w", err)
	}
	able := 0
	for i := range list.Items {
		cordoned, _, _ := unstructured.NestedBool(list.Items[i].Object, "spec", "unschedulable")
		if nodeReady(&list.Items[i]) && !cordoned {
			able++
		}
	}
	if able < 2 {
		return nil
	}
	patch := fmt.Sprintf(`{"metadata":{"annotations":{%q:"2"},"resourceVersion":%q},"spec":{"replicas":2}}`, spreadAnnotation, dns.GetResourceVersion())
	if _, err := client.Patch(ctx, "coredns", types.MergePatchType, []byte(patch), metav1.PatchOptions{FieldManager: "microk8s-spread"}); err != nil && !apierrors.IsConflict(err) {
		return fmt.Errorf("cannot start a second DNS server: %w", err)
	}
	return nil
}

// spreadRetry is the pause after a watch that ended, or an error.
const spreadRetry = 5 * time.Second

// KeepSpread calls Spread when nodes come or become ready, until ctx ends.
func (s *Set) KeepSpread(ctx context.Context) {
	for ctx.Err() == nil {
		if err := s.watchNodes(ctx); err != nil && ctx.Err() == nil {
			s.Log.Warn("cannot manage the DNS servers", "err", err, "retry_in", spreadRetry)
		}
		select {
		case <-time.After(spreadRetry):
		case <-ctx.Done():
		}
	}
}

func (s *Set) watchNodes(ctx context.Context) error {
	w, err := s.client.Resource(nodes).Watch(ctx, metav1.ListOptions{}) // begins with all there are
	if err != nil {
		return err
	}
	defer w.Stop()
	ready := map[string]bool{}
	for {
		select {
		case e, ok := <-w.ResultChan():
			if !ok {
				return nil
			}
			node, ok := e.Object.(*unstructured.Unstructured)
			if !ok {
				return nil // an error, such as a version that is too old
			}
			now := e.Type != "DELETED" && nodeReady(node)
			was := ready[node.GetName()]
			ready[node.GetName()] = now
			if now && !was {
				if err := s.Spread(ctx); err != nil {
					return err
				}
			}
		case <-ctx.Done():
			return nil
		}
	}
}
