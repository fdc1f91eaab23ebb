package cis

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"

	"microk8s/internal/kubelitestate"
	"microk8s/internal/podsecurity"
)

// The checks of section 5 ask the API server. What they find beside Kubernetes' own objects and the
// product's is for a person to judge: it is listed, and the control stays manual.

const rbacPath = "/apis/rbac.authorization.k8s.io/v1/"

// list reads a list of the API into v. Once the API server has not answered it is not asked again.
func (n *Node) list(path string, v any) error {
	if n.Get == nil {
		return errors.New("the API server was not asked")
	}
	if n.silent {
		return errors.New("the API server did not answer")
	}
	data, known := n.lists[path]
	if !known {
		var err error
		if data, err = n.Get(n.ctx, path); err != nil {
			n.silent = true
			return errors.New("the API server did not answer")
		}
		n.lists[path] = data
	}
	return json.Unmarshal(data, v)
}

// unknown is the finding of a check that could not ask.
func unknown(err error) finding { return finding{found: err.Error(), status: Manual} }

// listed is the finding of a check that has found these, which a person has to look at; none is in order.
func listed(found []string, what, do string) finding {
	if len(found) == 0 {
		return finding{found: "none", ok: true}
	}
	slices.Sort(found)
	found = slices.Compact(found)
	text := strings.Join(found[:min(len(found), 8)], ", ")
	if len(found) > 8 {
		text += fmt.Sprintf(" and %d more", len(found)-8)
	}
	return finding{found: what + text, status: Manual, accept: do}
}

// right is a right that few should have.
type right struct {
	group     string
	resources []string // of that group, with subresource; "*" as a resource is any of them
	verbs     []string
}

func (r right) in(rule rbacv1.PolicyRule) bool {
	any := func(list []string, want ...string) bool {
		return slices.ContainsFunc(list, func(s string) bool { return s == "*" || slices.Contains(want, s) })
	}
	// One object by its name is not all of them.
	return len(rule.ResourceNames) == 0 && any(rule.APIGroups, r.group) && any(rule.Resources, r.resources...) && any(rule.Verbs, r.verbs...)
}

// holders checks who has a right besides what Kubernetes and this product make: system: names, and
// service accounts of kube-system.
func holders(rights ...right) func(*Node) finding {
	return func(n *Node) finding {
		rules := map[string][]rbacv1.PolicyRule{} // by kind, namespace and name of the role
		var clusterRoles rbacv1.ClusterRoleList
		var roles rbacv1.RoleList
		var clusterBindings rbacv1.ClusterRoleBindingList
		var bindings rbacv1.RoleBindingList
		for path, v := range map[string]any{"clusterroles": &clusterRoles, "roles": &roles, "clusterrolebindings": &clusterBindings, "rolebindings": &bindings} {
			if err := n.list(rbacPath+path, v); err != nil {
				return unknown(err)
			}
		}
		for i := range clusterRoles.Items {
			rules["ClusterRole//"+clusterRoles.Items[i].Name] = clusterRoles.Items[i].Rules
		}
		for i := range roles.Items {
			rules["Role/"+roles.Items[i].Namespace+"/"+roles.Items[i].Name] = roles.Items[i].Rules
		}
		var found []string
		look := func(name, namespace string, ref rbacv1.RoleRef, subjects []rbacv1.Subject) {
			in := namespace
			if ref.Kind == "ClusterRole" {
				in = ""
			}
			has := slices.ContainsFunc(rules[ref.Kind+"/"+in+"/"+ref.Name], func(rule rbacv1.PolicyRule) bool {
				return slices.ContainsFunc(rights, func(r right) bool { return r.in(rule) })
			})
			if !has {
				return
			}
			for _, s := range subjects {
				if strings.HasPrefix(s.Name, "system:") && s.Kind != rbacv1.ServiceAccountKind || s.Kind == rbacv1.ServiceAccountKind && s.Namespace == "kube-system" {
					continue
				}
				found = append(found, s.Name+" ("+strings.TrimPrefix(namespace+"/"+name, "/")+")")
			}
		}
		for _, b := range clusterBindings.Items {
			look(b.Name, "", b.RoleRef, b.Subjects)
		}
		for _, b := range bindings.Items {
			look(b.Name, b.Namespace, b.RoleRef, b.Subjects)
		}
		return listed(found, "", "look at who has it, by these bindings, and whether a smaller role would do")
	}
}

// wildcards checks roles that are not Kubernetes' own.
func wildcards(n *Node) finding {
	var clusterRoles rbacv1.ClusterRoleList
	var roles rbacv1.RoleList
	if err := errors.Join(n.list(rbacPath+"clusterroles", &clusterRoles), n.list(rbacPath+"roles", &roles)); err != nil {
		return unknown(err)
	}
	wild := func(rules []rbacv1.PolicyRule) bool {
		return slices.ContainsFunc(rules, func(r rbacv1.PolicyRule) bool {
			return slices.Contains(r.Verbs, "*") || slices.Contains(r.Resources, "*") || slices.Contains(r.APIGroups, "*")
		})
	}
	var found []string
	for i := range clusterRoles.Items {
		if r := &clusterRoles.Items[i]; r.Labels["kubernetes.io/bootstrapping"] == "" && wild(r.Rules) {
			found = append(found, r.Name)
		}
	}
	for i := range roles.Items {
		if r := &roles.Items[i]; r.Labels["kubernetes.io/bootstrapping"] == "" && wild(r.Rules) {
			found = append(found, r.Namespace+"/"+r.Name)
		}
	}
	return listed(found, "", "name verbs and resources in these roles")
}

// pods lists all pods.
func (n *Node) pods() ([]corev1.Pod, error) {
	var list corev1.PodList
	err := n.list("/api/v1/pods", &list)
	return list.Items, err
}

// defaultAccounts checks bindings of accounts called default, and pods with a token of one.
func defaultAccounts(n *Node) finding {
	var clusterBindings rbacv1.ClusterRoleBindingList
	var bindings rbacv1.RoleBindingList
	pods, err := n.pods()
	if err = errors.Join(err, n.list(rbacPath+"clusterrolebindings", &clusterBindings), n.list(rbacPath+"rolebindings", &bindings)); err != nil {
		return unknown(err)
	}
	isDefault := func(s rbacv1.Subject) bool { return s.Kind == rbacv1.ServiceAccountKind && s.Name == "default" }
	var found []string
	for _, b := range clusterBindings.Items {
		if slices.ContainsFunc(b.Subjects, isDefault) {
			found = append(found, "binding "+b.Name)
		}
	}
	for _, b := range bindings.Items {
		if slices.ContainsFunc(b.Subjects, isDefault) {
			found = append(found, "binding "+b.Namespace+"/"+b.Name)
		}
	}
	for i := range pods {
		p := &pods[i]
		mounted := slices.ContainsFunc(p.Spec.Volumes, func(v corev1.Volume) bool {
			return v.Projected != nil && slices.ContainsFunc(v.Projected.Sources, func(s corev1.VolumeProjection) bool { return s.ServiceAccountToken != nil })
		})
		if p.Spec.ServiceAccountName == "default" && mounted {
			found = append(found, "pod "+p.Namespace+"/"+p.Name)
		}
	}
	return listed(found, "", "use accounts of their own, and automountServiceAccountToken: false for default")
}

// enforced checks that every namespace that is not exempt (docs/security.md) enforces a level that has
// the control in it.
func enforced(levels ...string) func(*Node) finding {
	return func(n *Node) finding {
		var list corev1.NamespaceList
		if err := n.list("/api/v1/namespaces", &list); err != nil {
			return unknown(err)
		}
		var open []string
		for i := range list.Items {
			ns := &list.Items[i]
			if _, exempt := podsecurity.Ours[ns.Name]; !exempt && !slices.Contains(levels, ns.Labels[podsecurity.EnforceLabel]) {
				open = append(open, ns.Name)
			}
		}
		f := listed(open, "not refused in ", "microk8s pod-security enforce "+levels[0]+" refuses them; until then 5.2.1 warns")
		if f.ok {
			f.found = "refused in all namespaces but those that need the host"
		}
		return f
	}
}

// policies checks that namespaces with pods have a NetworkPolicy.
func policies(n *Node) finding {
	var list networkingv1.NetworkPolicyList
	pods, err := n.pods()
	if err = errors.Join(err, n.list("/apis/networking.k8s.io/v1/networkpolicies", &list)); err != nil {
		return unknown(err)
	}
	has := map[string]bool{"kube-system": true} // the product's own
	for i := range list.Items {
		has[list.Items[i].Namespace] = true
	}
	var found []string
	for i := range pods {
		if !has[pods[i].Namespace] {
			found = append(found, pods[i].Namespace)
		}
	}
	return listed(found, "none in ", "write NetworkPolicies for them")
}

// variables checks pods that get Secrets as variables.
func variables(n *Node) finding {
	pods, err := n.pods()
	if err != nil {
		return unknown(err)
	}
	var found []string
	for i := range pods {
		p := &pods[i]
		for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
			if slices.ContainsFunc(c.EnvFrom, func(e corev1.EnvFromSource) bool { return e.SecretRef != nil }) ||
				slices.ContainsFunc(c.Env, func(e corev1.EnvVar) bool { return e.ValueFrom != nil && e.ValueFrom.SecretKeyRef != nil }) {
				found = append(found, p.Namespace+"/"+p.Name)
			}
		}
	}
	return listed(found, "", "mount these Secrets as files")
}

// defaultNamespace checks what runs in the namespace default.
func defaultNamespace(n *Node) finding {
	pods, err := n.pods()
	if err != nil {
		return unknown(err)
	}
	var found []string
	for i := range pods {
		if pods[i].Namespace == "default" {
			found = append(found, pods[i].Name)
		}
	}
	return listed(found, "", "make namespaces for what belongs together")
}

// enforcer checks that this node enforces NetworkPolicies (docs/network-policy.md).
func enforcer(n *Node) finding {
	if exists(n.Env.CNIManifest()) {
		return finding{found: "left to the pod network of " + n.Env.CNIManifest(), status: Manual, accept: "see the documentation of that network"}
	}
	state, err := kubelitestate.Read(n.Env)
	if err != nil {
		return finding{found: err.Error(), do: "microk8s stop && microk8s start"}
	}
	if state.Policies != "" {
		return finding{found: state.Policies, do: "see microk8s logs kubelite"}
	}
	return finding{found: "enforced by the built-in network", ok: true}
}
