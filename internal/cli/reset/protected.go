package reset

import (
	"context"
	"fmt"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"microk8s/internal/addon"
)

// systemNamespaces exist in every cluster; their content is cleaned, they stay.
var systemNamespaces = map[string]bool{
	metav1.NamespaceDefault: true, metav1.NamespaceSystem: true, metav1.NamespacePublic: true, "kube-node-lease": true,
}

// kept says which kinds are left alone altogether, because only components of Kubernetes make
// them or because they describe the node.
func kept(r resource) bool {
	switch r.gvr.Group + "/" + r.gvr.Resource {
	case "/nodes", "/componentstatuses", "storage.k8s.io/csinodes", "resource.k8s.io/resourceslices",
		"internal.apiserver.k8s.io/storageversions", "networking.k8s.io/ipaddresses",
		"/events", "events.k8s.io/events", // they end by themselves after minutes
		"coordination.k8s.io/leasecandidates", "metrics.k8s.io/pods", "metrics.k8s.io/nodes":
		return true
	}
	return false
}

// protected says which objects Kubernetes makes for itself and needs.
func protected(r resource, o *unstructured.Unstructured, accounts map[string]bool) bool {
	name, ns := o.GetName(), o.GetNamespace()
	labels := o.GetLabels()
	switch r.gvr.Resource {
	case "namespaces":
		return systemNamespaces[name]
	case "endpointslices":
		return ns == metav1.NamespaceDefault && labels["kubernetes.io/service-name"] == "kubernetes"
	case "services", "endpoints":
		return ns == metav1.NamespaceDefault && name == "kubernetes"
	case "servicecidrs":
		return name == "kubernetes"
	case "leases":
		return ns == "kube-node-lease" || ns == metav1.NamespaceSystem
	case "configmaps":
		return systemNamespaces[ns] && (name == "kube-root-ca.crt" ||
			ns == metav1.NamespaceSystem && (name == "extension-apiserver-authentication" || name == "kube-apiserver-legacy-service-account-token-tracking" || name == addon.DefaultsRecord))
	case "serviceaccounts":
		return systemNamespaces[ns] && (name == "default" || accounts[ns+"/"+name])
	case "clusterroles", "clusterrolebindings", "roles", "rolebindings":
		return bootstrapped(labels) || strings.HasPrefix(name, "system:")
	case "priorityclasses":
		return strings.HasPrefix(name, "system-")
	case "flowschemas", "prioritylevelconfigurations":
		return o.GetAnnotations()["apf.kubernetes.io/autoupdate-spec"] == "true"
	case "apiservices":
		return labels["kube-aggregator.kubernetes.io/automanaged"] != ""
	}
	return false
}

func bootstrapped(labels map[string]string) bool {
	return labels["kubernetes.io/bootstrapping"] == "rbac-defaults"
}

// systemAccounts returns the service accounts (namespace/name) that Kubernetes' own bindings
// name: the controllers run under them, and would be cut off without.
func (c *Cleaner) systemAccounts(ctx context.Context) (map[string]bool, error) {
	out := map[string]bool{}
	for _, kind := range []string{"clusterrolebindings", "rolebindings"} {
		gvr := schema.GroupVersionResource{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: kind}
		list, err := c.Dynamic.Resource(gvr).List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil, fmt.Errorf("cannot list %s: %w", kind, err)
		}
		for _, b := range list.Items {
			if !bootstrapped(b.GetLabels()) {
				continue
			}
			subjects, _, _ := unstructured.NestedSlice(b.Object, "subjects")
			for _, s := range subjects {
				m, _ := s.(map[string]any)
				if m["kind"] == "ServiceAccount" {
					out[fmt.Sprintf("%v/%v", m["namespace"], m["name"])] = true
				}
			}
		}
	}
	return out, nil
}
