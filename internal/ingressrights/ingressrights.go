// Package ingressrights keeps the rights of the addon ingress to read Secrets and ConfigMaps: they follow the
// Ingresses and the objects of Traefik's own kinds. In each namespace that has one that names a Secret or
// ConfigMap it makes a Role and a RoleBinding for
// the controller's ServiceAccount, limited to the names of the Secrets that are what they are named for
// (certificates, CAs, users) and of the ConfigMaps; nothing in kube-system. When the last of them goes, so do the rights. What
// may be read is listed in the ConfigMap [ListName], so that the controller's pods (internal/ingresssecrets)
// ask for nothing else.
//
// It runs on control-plane nodes, in kubelite, with the administrator's rights, and on all of them
// at the same time: each writes only what differs from what it sees, and all would write the same.
package ingressrights

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	k8sfields "k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/metadata/metadatainformer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

const (
	// Namespace and Account are the controller's.
	Namespace = "ingress"
	Account   = "traefik"

	// RoleName is the name of the Role, and of the RoleBinding, in each namespace.
	RoleName = "microk8s:ingress-tls"

	// ListName is the ConfigMap in Namespace whose key ListKey has one NAMESPACE/NAME on each line,
	// sorted: the Secrets that may be read. MapsKey has the ConfigMaps.
	ListName = "microk8s-tls-secrets"
	ListKey  = "secrets"
	MapsKey  = "configmaps"

	// label marks what this package made, with the value "true".
	label = "microk8s.io/ingress-rights"

	// controllerName is the one that the addon's IngressClasses name.
	controllerName = "traefik.io/ingress-controller"
	// classAnnotation names a class without an object, and annotated is the one that is served.
	classAnnotation = "kubernetes.io/ingress.class"
	annotated       = "traefik"
)

// kindsWait is how long the objects of Traefik's kinds are waited for before rights follow without them.
const kindsWait = 15 * time.Second

// notCertificates leaves out the Secrets of which there are many and which hold no certificate.
const notCertificates = "type!=kubernetes.io/service-account-token,type!=helm.sh/release.v1,type!=kubernetes.io/dockerconfigjson"

// Run keeps the rights until ctx ends. What fails is logged and tried again.
//
//	err := ingressrights.Run(ctx, admin, log)
func Run(ctx context.Context, cfg *rest.Config, log *slog.Logger) error {
	cfg = rest.CopyConfig(cfg)
	cfg.QPS, cfg.Burst = 50, 100
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return fmt.Errorf("cannot reach the cluster: %w", err)
	}
	meta, err := metadata.NewForConfig(cfg)
	if err != nil {
		return fmt.Errorf("cannot reach the cluster: %w", err)
	}
	objects, err := dynamic.NewForConfig(cfg)
	if err != nil {
		return fmt.Errorf("cannot reach the cluster: %w", err)
	}
	Keep(ctx, client, meta, objects, log)
	return nil
}

// Keep is Run with clients, whose rights are the administrator's.
func Keep(ctx context.Context, client kubernetes.Interface, meta metadata.Interface, objects dynamic.Interface, log *slog.Logger) {
	(&keeper{client: client, meta: meta, objects: objects, log: log, changed: make(chan struct{}, 1)}).run(ctx)
}

type keeper struct {
	client  kubernetes.Interface
	meta    metadata.Interface
	objects dynamic.Interface // of Traefik's kinds
	log     *slog.Logger

	changed chan struct{} // holds at most one
	checked map[reference]verdict
}

// verdict is what was found out about a Secret, for one version of it.
type verdict struct {
	version string
	ok      bool
}

func (k *keeper) notify() {
	select {
	case k.changed <- struct{}{}:
	default:
	}
}

func (k *keeper) onChange() cache.ResourceEventHandlerFuncs {
	return cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { k.notify() }, UpdateFunc: func(any, any) { k.notify() }, DeleteFunc: func(any) { k.notify() },
	}
}

// run looks at the addon's account only while it is off, and at everything while it is on.
func (k *keeper) run(ctx context.Context) {
	accounts := informers.NewSharedInformerFactoryWithOptions(k.client, 0, informers.WithNamespace(Namespace),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = k8sfields.OneTermEqualSelector(metav1.ObjectNameField, Account).String()
		}))
	lister := accounts.Core().V1().ServiceAccounts().Lister()
	_, _ = accounts.Core().V1().ServiceAccounts().Informer().AddEventHandler(k.onChange()) // fails on a stopped informer only
	accounts.Start(ctx.Done())
	defer accounts.Shutdown()
	accounts.WaitForCacheSync(ctx.Done())

	on := func() bool {
		_, err := lister.ServiceAccounts(Namespace).Get(Account)
		return err == nil
	}
	for ctx.Err() == nil {
		if !on() {
			k.untilDone(ctx, k.withdraw)
			for ctx.Err() == nil && !on() {
				k.wait(ctx)
			}
			continue
		}
		k.serve(ctx, on)
	}
}

func (k *keeper) wait(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-k.changed:
	}
}

// untilDone repeats a step that fails, with growing pauses.
func (k *keeper) untilDone(ctx context.Context, step func(context.Context) error) {
	pause := wait.Backoff{Duration: time.Second, Factor: 2, Jitter: 0.2, Steps: 6, Cap: time.Minute}
	for ctx.Err() == nil {
		err := step(ctx)
		if err == nil || ctx.Err() != nil {
			return
		}
		next := pause.Step()
		k.log.Warn("the rights of the ingress controller do not follow the Ingresses yet", "err", err, "retry_in", next)
		select {
		case <-ctx.Done():
		case <-time.After(next):
		}
	}
}

// serve keeps the rights as long as the addon is on.
func (k *keeper) serve(ctx context.Context, on func() bool) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	k.checked = map[reference]verdict{}
	all := informers.NewSharedInformerFactoryWithOptions(k.client, 0, informers.WithTransform(slim))
	ours := informers.NewSharedInformerFactoryWithOptions(k.client, 0, informers.WithTweakListOptions(func(o *metav1.ListOptions) {
		o.LabelSelector = label + "=true"
	}))
	secrets := metadatainformer.NewFilteredSharedInformerFactory(k.meta, 0, metav1.NamespaceAll, func(o *metav1.ListOptions) {
		o.FieldSelector = notCertificates
	})
	v := view{
		ingresses: all.Networking().V1().Ingresses().Lister(),
		classes:   all.Networking().V1().IngressClasses().Lister(),
		secrets:   secrets.ForResource(corev1.SchemeGroupVersion.WithResource("secrets")).Lister(),
		roles:     ours.Rbac().V1().Roles().Lister(),
		bindings:  ours.Rbac().V1().RoleBindings().Lister(),
		lists:     ours.Core().V1().ConfigMaps().Lister(),
	}
	for _, i := range []cache.SharedIndexInformer{
		all.Networking().V1().Ingresses().Informer(), all.Networking().V1().IngressClasses().Informer(),
		secrets.ForResource(corev1.SchemeGroupVersion.WithResource("secrets")).Informer(),
		ours.Rbac().V1().Roles().Informer(), ours.Rbac().V1().RoleBindings().Informer(), ours.Core().V1().ConfigMaps().Informer(),
	} {
		_, _ = i.AddEventHandler(k.onChange()) // fails on a stopped informer only
	}
	traefik := dynamicinformer.NewFilteredDynamicSharedInformerFactory(k.objects, 0, metav1.NamespaceAll, nil)
	for _, kind := range Kinds() {
		i := traefik.ForResource(kind)
		_ = i.Informer().SetTransform(slim)               // fails on a started informer only
		_, _ = i.Informer().AddEventHandler(k.onChange()) // fails on a stopped informer only
		v.kinds = append(v.kinds, i.Lister())
	}
	all.Start(ctx.Done())
	ours.Start(ctx.Done())
	secrets.Start(ctx.Done())
	traefik.Start(ctx.Done())
	defer func() {
		cancel()
		all.Shutdown()
		ours.Shutdown()
		secrets.Shutdown()
		traefik.Shutdown()
	}()
	all.WaitForCacheSync(ctx.Done())
	ours.WaitForCacheSync(ctx.Done())
	secrets.WaitForCacheSync(ctx.Done())
	// A kind that the cluster does not have, or not yet, holds up nothing; its objects are seen once there are any.
	soon, enough := context.WithTimeout(ctx, kindsWait)
	traefik.WaitForCacheSync(soon.Done())
	enough()
	for ctx.Err() == nil && on() {
		k.untilDone(ctx, func(ctx context.Context) error {
			if !on() {
				return nil
			}
			return k.reconcile(ctx, v)
		})
		k.wait(ctx)
	}
}

// slim drops the largest part of an object that nobody here reads.
func slim(obj any) (any, error) {
	if o, ok := obj.(metav1.Object); ok {
		o.SetManagedFields(nil)
	}
	return obj, nil
}

// withdraw removes everything that this package made.
func (k *keeper) withdraw(ctx context.Context) error {
	opt := metav1.ListOptions{LabelSelector: label + "=true"}
	bindings, err := k.client.RbacV1().RoleBindings(metav1.NamespaceAll).List(ctx, opt)
	if err != nil {
		return err
	}
	for _, b := range bindings.Items {
		if err := gone(k.client.RbacV1().RoleBindings(b.Namespace).Delete(ctx, b.Name, metav1.DeleteOptions{})); err != nil {
			return err
		}
	}
	roles, err := k.client.RbacV1().Roles(metav1.NamespaceAll).List(ctx, opt)
	if err != nil {
		return err
	}
	for _, r := range roles.Items {
		if err := gone(k.client.RbacV1().Roles(r.Namespace).Delete(ctx, r.Name, metav1.DeleteOptions{})); err != nil {
			return err
		}
	}
	lists, err := k.client.CoreV1().ConfigMaps(Namespace).List(ctx, opt)
	if err != nil {
		return err
	}
	for _, c := range lists.Items {
		if err := gone(k.client.CoreV1().ConfigMaps(Namespace).Delete(ctx, c.Name, metav1.DeleteOptions{})); err != nil {
			return err
		}
	}
	return nil
}

// gone is the error of a deletion, which is none where there was nothing to delete.
func gone(err error) error {
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// reconcile makes the rights those that the Ingresses need now. Rights are there before the list
// names them.
func (k *keeper) reconcile(ctx context.Context, v view) error {
	want, err := k.wanted(ctx, v)
	if err != nil {
		return err
	}
	var errs []error
	note := func(err error) {
		if err != nil {
			errs = append(errs, err)
		}
	}
	for ns, names := range want {
		note(k.grant(ctx, v, ns, names))
	}
	bindings, err := v.bindings.List(labels.Everything())
	note(err)
	for _, b := range bindings {
		if _, ok := want[b.Namespace]; !ok {
			note(gone(k.client.RbacV1().RoleBindings(b.Namespace).Delete(ctx, b.Name, metav1.DeleteOptions{})))
		}
	}
	roles, err := v.roles.List(labels.Everything())
	note(err)
	for _, r := range roles {
		if _, ok := want[r.Namespace]; !ok {
			note(gone(k.client.RbacV1().Roles(r.Namespace).Delete(ctx, r.Name, metav1.DeleteOptions{})))
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("%d objects could not be written, the first: %w", len(errs), errs[0])
	}
	return k.publish(ctx, v, want)
}

// readable is what may be read in one namespace: names, sorted.
type readable struct{ secrets, maps []string }

// wanted returns what is to be read, by namespace.
func (k *keeper) wanted(ctx context.Context, v view) (map[string]readable, error) {
	served := func(class string) bool {
		c, err := v.classes.Get(class)
		return err == nil && c.Spec.Controller == controllerName
	}
	ingresses, err := v.ingresses.List(labels.Everything())
	if err != nil {
		return nil, err
	}
	var all []reference
	for _, ing := range ingresses {
		all = append(all, named(ing, served)...)
	}
	for _, kind := range v.kinds {
		objects, err := kind.List(labels.Everything())
		if err != nil {
			return nil, err
		}
		for _, o := range objects {
			if o, ok := o.(*unstructured.Unstructured); ok {
				all = append(all, namedByKind(o)...)
			}
		}
	}
	want, checked := map[string]readable{}, map[reference]verdict{}
	for _, ref := range all {
		if _, seen := checked[ref]; seen {
			continue
		}
		ok, err := k.fit(ctx, v, ref, checked)
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		r := want[ref.ns]
		if ref.use == publicMap {
			r.maps = append(r.maps, ref.name)
		} else {
			r.secrets = append(r.secrets, ref.name)
		}
		want[ref.ns] = r
	}
	k.checked = checked
	for ns, r := range want {
		slices.Sort(r.secrets)
		slices.Sort(r.maps)
		want[ns] = readable{slices.Compact(r.secrets), slices.Compact(r.maps)}
	}
	return want, nil
}

// fit reports whether a Secret is what it is named for. ConfigMaps are not looked at.
func (k *keeper) fit(ctx context.Context, v view, ref reference, checked map[reference]verdict) (bool, error) {
	if ref.use == publicMap {
		checked[ref] = verdict{ok: true}
		return true, nil
	}
	o, err := v.secrets.ByNamespace(ref.ns).Get(ref.name)
	if err != nil {
		checked[ref] = verdict{}
		return false, nil // not there yet; its creation is seen
	}
	version := o.(metav1.Object).GetResourceVersion()
	if old, ok := k.checked[ref]; ok && old.version == version {
		checked[ref] = old
		return old.ok, nil
	}
	s, err := k.client.CoreV1().Secrets(ref.ns).Get(ctx, ref.name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		checked[ref] = verdict{}
		return false, nil
	}
	if err != nil {
		return false, err
	}
	ok := ref.use.fits(s)
	checked[ref] = verdict{version, ok}
	if !ok {
		k.log.Warn("a Secret is not what it is named for: the ingress controller may not read it", "secret", ref.ns+"/"+ref.name, "named_for", ref.use, "type", s.Type)
	}
	return ok, nil
}

func objectMeta(ns, name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: ns, Name: name, Labels: map[string]string{label: "true"}}
}

// grant makes the Role and the RoleBinding of one namespace.
func (k *keeper) grant(ctx context.Context, v view, ns string, names readable) error {
	role := &rbacv1.Role{ObjectMeta: objectMeta(ns, RoleName)}
	rule := func(resource string, names []string) {
		if len(names) > 0 { // no names would be all
			role.Rules = append(role.Rules, rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{resource}, ResourceNames: names, Verbs: []string{"get", "list", "watch"}})
		}
	}
	rule("secrets", names.secrets)
	rule("configmaps", names.maps)
	if old, err := v.roles.Roles(ns).Get(RoleName); err != nil {
		if err := k.createRole(ctx, role); err != nil {
			return err
		}
	} else if !equality.Semantic.DeepEqual(old.Rules, role.Rules) {
		role.ResourceVersion = old.ResourceVersion
		if _, err := k.client.RbacV1().Roles(ns).Update(ctx, role, metav1.UpdateOptions{}); err != nil {
			return err
		}
	}
	binding := &rbacv1.RoleBinding{
		ObjectMeta: objectMeta(ns, RoleName),
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: RoleName},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: Namespace, Name: Account}},
	}
	old, err := v.bindings.RoleBindings(ns).Get(RoleName)
	switch {
	case err != nil:
	case !equality.Semantic.DeepEqual(old.RoleRef, binding.RoleRef): // it cannot be changed
		if err := gone(k.client.RbacV1().RoleBindings(ns).Delete(ctx, RoleName, metav1.DeleteOptions{})); err != nil {
			return err
		}
	case !equality.Semantic.DeepEqual(old.Subjects, binding.Subjects):
		binding.ResourceVersion = old.ResourceVersion
		_, err := k.client.RbacV1().RoleBindings(ns).Update(ctx, binding, metav1.UpdateOptions{})
		return err
	default:
		return nil
	}
	_, err = k.client.RbacV1().RoleBindings(ns).Create(ctx, binding, metav1.CreateOptions{})
	return created(err)
}

func (k *keeper) createRole(ctx context.Context, role *rbacv1.Role) error {
	_, err := k.client.RbacV1().Roles(role.Namespace).Create(ctx, role, metav1.CreateOptions{})
	return created(err)
}

// created is the error of a creation. Another node may have been first, and its object is seen in
// a moment; a namespace that ends takes no more objects, and needs none.
func created(err error) error {
	if apierrors.IsAlreadyExists(err) || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
		return nil
	}
	return err
}

// publish writes the lists of what may be read.
func (k *keeper) publish(ctx context.Context, v view, want map[string]readable) error {
	var secrets, configMaps []string
	for _, ns := range slices.Sorted(maps.Keys(want)) {
		for _, name := range want[ns].secrets {
			secrets = append(secrets, ns+"/"+name)
		}
		for _, name := range want[ns].maps {
			configMaps = append(configMaps, ns+"/"+name)
		}
	}
	list := &corev1.ConfigMap{ObjectMeta: objectMeta(Namespace, ListName), Data: map[string]string{
		ListKey: strings.Join(secrets, "\n"), MapsKey: strings.Join(configMaps, "\n"),
	}}
	old, err := v.lists.ConfigMaps(Namespace).Get(ListName)
	if err != nil {
		_, err := k.client.CoreV1().ConfigMaps(Namespace).Create(ctx, list, metav1.CreateOptions{})
		return created(err)
	}
	if maps.Equal(old.Data, list.Data) {
		return nil
	}
	list.ResourceVersion = old.ResourceVersion
	_, err = k.client.CoreV1().ConfigMaps(Namespace).Update(ctx, list, metav1.UpdateOptions{})
	return err
}
