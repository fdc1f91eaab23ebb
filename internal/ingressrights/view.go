package ingressrights

import (
	corelisters "k8s.io/client-go/listers/core/v1"
	networkinglisters "k8s.io/client-go/listers/networking/v1"
	rbaclisters "k8s.io/client-go/listers/rbac/v1"
	"k8s.io/client-go/tools/cache"
)

// view is the cluster as the informers have it.
type view struct {
	ingresses networkinglisters.IngressLister
	classes   networkinglisters.IngressClassLister
	secrets   cache.GenericLister // metadata only
	roles     rbaclisters.RoleLister
	bindings  rbaclisters.RoleBindingLister
	lists     corelisters.ConfigMapLister
	kinds     []cache.GenericLister // of Traefik's
}
