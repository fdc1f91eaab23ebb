package ingressrights

import (
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	metafake "k8s.io/client-go/metadata/fake"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/yaml"
)

// The API server here is client-go's fake; that these rights are enough, and no more than they
// say, is shown with a real one in cmd/kubelite/daemons.

func ingress(ns, name, class string, secrets ...string) *networkingv1.Ingress {
	ing := &networkingv1.Ingress{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}}
	switch {
	case strings.HasPrefix(class, "annotation:"):
		ing.Annotations = map[string]string{classAnnotation: strings.TrimPrefix(class, "annotation:")}
	case class != "":
		ing.Spec.IngressClassName = ptr.To(class)
	}
	for _, s := range secrets {
		ing.Spec.TLS = append(ing.Spec.TLS, networkingv1.IngressTLS{SecretName: s})
	}
	return ing
}

func secret(ns, name string, kind corev1.SecretType, keys ...string) *corev1.Secret {
	s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, ResourceVersion: "1"}, Type: kind, Data: map[string][]byte{}}
	for _, key := range keys {
		s.Data[key] = []byte("x")
	}
	return s
}

func class(name, controller string) *networkingv1.IngressClass {
	return &networkingv1.IngressClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: networkingv1.IngressClassSpec{Controller: controller}}
}

type cluster struct {
	t      *testing.T
	client *fake.Clientset
	meta   *metafake.FakeMetadataClient
}

func newCluster(t *testing.T, objects ...runtime.Object) *cluster {
	scheme := metafake.NewTestScheme()
	if err := metav1.AddMetaToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	var partial, core, own []runtime.Object
	for _, o := range objects {
		if u, ok := o.(*unstructured.Unstructured); ok {
			own = append(own, u)
			continue
		}
		core = append(core, o)
		if s, ok := o.(*corev1.Secret); ok {
			partial = append(partial, partialOf(s))
		}
	}
	c := &cluster{t: t, client: fake.NewClientset(core...), meta: metafake.NewSimpleMetadataClient(scheme, partial...)}
	listKinds := map[schema.GroupVersionResource]string{}
	for _, kind := range Kinds() {
		listKinds[kind] = "List"
	}
	dynamic := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), listKinds, own...)
	done := make(chan struct{})
	go func() {
		defer close(done)
		Keep(t.Context(), c.client, c.meta, dynamic, slog.New(slog.DiscardHandler))
	}()
	t.Cleanup(func() { <-done }) // the context of a test ends before this
	return c
}

func partialOf(s *corev1.Secret) *metav1.PartialObjectMetadata {
	return &metav1.PartialObjectMetadata{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"}, ObjectMeta: *s.ObjectMeta.DeepCopy(),
	}
}

func (c *cluster) addSecret(s *corev1.Secret) {
	c.t.Helper()
	if _, err := c.client.CoreV1().Secrets(s.Namespace).Create(c.t.Context(), s, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
	in := c.meta.Resource(corev1.SchemeGroupVersion.WithResource("secrets")).Namespace(s.Namespace).(metafake.MetadataClient)
	if _, err := in.CreateFake(partialOf(s), metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

// rights returns what the account may read, as the Roles that are bound have it, and the list.
func (c *cluster) rights() (granted, listed string) {
	c.t.Helper()
	ctx := c.t.Context()
	bindings, err := c.client.RbacV1().RoleBindings("").List(ctx, metav1.ListOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	var out []string
	for _, b := range bindings.Items {
		role, err := c.client.RbacV1().Roles(b.Namespace).Get(ctx, b.RoleRef.Name, metav1.GetOptions{})
		if err != nil {
			c.t.Fatal(err)
		}
		for _, rule := range role.Rules {
			if len(rule.ResourceNames) == 0 {
				c.t.Errorf("role in %s holds for all names: %v", b.Namespace, rule)
			}
			for _, name := range rule.ResourceNames {
				out = append(out, b.Namespace+"/"+name)
			}
		}
	}
	slices.Sort(out)
	if list, err := c.client.CoreV1().ConfigMaps(Namespace).Get(ctx, ListName, metav1.GetOptions{}); err == nil {
		listed = strings.ReplaceAll(strings.TrimSpace(list.Data[ListKey]+"\n"+list.Data[MapsKey]), "\n", " ")
	}
	return strings.Join(out, " "), listed
}

func (c *cluster) await(want string) {
	c.t.Helper()
	c.awaitBoth(want, want)
}

// awaitBoth waits for the rights and for the lists; these have Secrets first.
func (c *cluster) awaitBoth(rights, lists string) {
	c.t.Helper()
	var granted, listed string
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if granted, listed = c.rights(); granted == rights && listed == lists {
			return
		}
	}
	c.t.Fatalf("granted %q, listed %q, want %q and %q", granted, listed, rights, lists)
}

var account = &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: Namespace, Name: Account}}

func TestWhichSecrets(t *testing.T) {
	tls := func(ns, name string) *corev1.Secret {
		return secret(ns, name, corev1.SecretTypeTLS, "tls.crt", "tls.key")
	}
	for _, tc := range []struct {
		name    string
		objects []runtime.Object
		want    string
	}{
		{"a certificate", []runtime.Object{ingress("a", "i", "public", "cert"), tls("a", "cert"), tls("a", "other"), tls("b", "cert")}, "a/cert"},
		{"several, of several Ingresses", []runtime.Object{
			ingress("a", "i", "public", "z", "b"), ingress("a", "j", "traefik", "b", "c"), ingress("b", "i", "public", "x"),
			tls("a", "z"), tls("a", "b"), tls("a", "c"), tls("b", "x"),
		}, "a/b a/c a/z b/x"},
		{"without a class", []runtime.Object{ingress("a", "i", "", "cert"), tls("a", "cert")}, "a/cert"},
		{"the class in an annotation", []runtime.Object{ingress("a", "i", "annotation:traefik", "cert"), tls("a", "cert")}, "a/cert"},
		{"another controller's class", []runtime.Object{ingress("a", "i", "haproxy", "cert"), tls("a", "cert")}, ""},
		{"another controller's annotation", []runtime.Object{ingress("a", "i", "annotation:haproxy", "cert"), tls("a", "cert")}, ""},
		{"a class that is not there", []runtime.Object{ingress("a", "i", "gone", "cert"), tls("a", "cert")}, ""},
		{"kube-system", []runtime.Object{ingress("kube-system", "i", "public", "cert"), tls("kube-system", "cert")}, ""},
		{"a certificate of no type", []runtime.Object{ingress("a", "i", "public", "cert"), secret("a", "cert", corev1.SecretTypeOpaque, "tls.crt", "tls.key")}, "a/cert"},
		{"a password", []runtime.Object{ingress("a", "i", "public", "db"), secret("a", "db", corev1.SecretTypeOpaque, "password")}, ""},
		{"a token", []runtime.Object{ingress("a", "i", "public", "t"), secret("a", "t", corev1.SecretTypeServiceAccountToken, "tls.crt", "tls.key")}, ""},
		{"a Secret that is not there", []runtime.Object{ingress("a", "i", "public", "cert")}, ""},
		{"no name", []runtime.Object{ingress("a", "i", "public", ""), tls("a", "cert")}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, append(tc.objects, account.DeepCopy(), class("public", controllerName), class("traefik", controllerName), class("haproxy", "haproxy.org/ingress"), ingress("last", "i", "public", "cert"), tls("last", "cert"))...)
			c.await(strings.TrimSpace(tc.want + " last/cert"))
		})
	}
}

// object is one of Traefik's kinds.
func object(ns, kind, spec string) *unstructured.Unstructured {
	o := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "traefik.io/v1alpha1", "kind": kind}}
	o.SetNamespace(ns)
	o.SetName("o")
	var fields map[string]any
	if err := yaml.Unmarshal([]byte(spec), &fields); err != nil {
		panic(err)
	}
	o.Object["spec"] = fields
	return o
}

// TestWhatTraefiksKindsName has each field that names a Secret or ConfigMap, and Secrets that are something
// else than what they are named for.
func TestWhatTraefiksKindsName(t *testing.T) {
	tls := secret("a", "cert", corev1.SecretTypeTLS, "tls.crt", "tls.key")
	ca := secret("a", "ca", corev1.SecretTypeOpaque, "ca.crt")
	list := secret("a", "list", corev1.SecretTypeOpaque)
	list.Data["users"] = []byte("# people\nann:$apr1$x\nbob:$apr1$y\n")
	one := secret("a", "one", corev1.SecretTypeBasicAuth, "username", "password")
	word := secret("a", "word", corev1.SecretTypeOpaque, "token")
	nginx := func(annotation, value string) *networkingv1.Ingress {
		ing := ingress("a", "i", "public")
		ing.Annotations = map[string]string{nginxPrefix + annotation: value}
		return ing
	}
	for _, tc := range []struct {
		name   string
		object runtime.Object
		want   string
	}{
		{"a route's certificate", object("a", "IngressRoute", "{tls: {secretName: cert}}"), "a/cert"},
		{"a TCP route's", object("a", "IngressRouteTCP", "{tls: {secretName: cert}}"), "a/cert"},
		{"a store", object("a", "TLSStore", "{defaultCertificate: {secretName: cert}, certificates: [{secretName: word}]}"), "a/cert"},
		{"clients' CA", object("a", "TLSOption", "{clientAuth: {secretNames: [ca, word]}}"), "a/ca"},
		{"users", object("a", "Middleware", "{basicAuth: {secret: list}}"), "a/list"},
		{"one user", object("a", "Middleware", "{digestAuth: {secret: one}}"), "a/one"},
		{"a word is no user", object("a", "Middleware", "{basicAuth: {secret: word}}"), ""},
		{"forward", object("a", "Middleware", "{forwardAuth: {tls: {caSecret: ca, certSecret: cert}}}"), "a/ca a/cert"},
		{"transport", object("a", "ServersTransport", "{rootCAs: [{secret: ca}, {configMap: roots}], certificatesSecrets: [cert]}"), "a/ca a/cert a/roots"},
		{"transport as before", object("a", "ServersTransport", "{rootCAsSecrets: [ca]}"), "a/ca"},
		{"TCP transport", object("a", "ServersTransportTCP", "{tls: {rootCAs: [{secret: ca}], certificatesSecrets: [cert]}}"), "a/ca a/cert"},
		{"in kube-system", object("kube-system", "Middleware", "{basicAuth: {secret: list}}"), ""},
		{"of another namespace", object("b", "Middleware", "{basicAuth: {secret: list}}"), ""},
		{"ingress-nginx: users", nginx("auth-secret", "list"), "a/list"},
		{"with the namespace", nginx("auth-secret", "a/list"), "a/list"},
		{"of another", nginx("auth-secret", "b/list"), ""},
		{"no list", nginx("auth-secret", "word"), ""},
		{"backend's CA", nginx("proxy-ssl-secret", "a/ca"), "a/ca"},
		{"clients' CA of an Ingress", nginx("auth-tls-secret", "a/ca"), "a/ca"},
		{"headers", nginx("custom-headers", "a/headers"), "a/headers"},
		{"a class by annotation", func() runtime.Object {
			ing := ingress("a", "i", "annotation:public", "cert")
			return ing
		}(), "a/cert"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, account.DeepCopy(), class("public", controllerName), tls.DeepCopy(), ca.DeepCopy(), list.DeepCopy(), one.DeepCopy(), word.DeepCopy(), tc.object,
				ingress("last", "i", "public", "cert"), secret("last", "cert", corev1.SecretTypeTLS, "tls.crt", "tls.key"))
			var want []string
			secrets, configMaps := strings.Fields(tc.want), []string(nil)
			if n := len(secrets); n > 0 && (strings.HasSuffix(tc.want, "roots") || strings.HasSuffix(tc.want, "headers")) {
				secrets, configMaps = secrets[:n-1], secrets[n-1:]
			}
			want = append(append(append(want, secrets...), "last/cert"), configMaps...)
			c.awaitBoth(strings.Join(slices.Sorted(slices.Values(want)), " "), strings.Join(want, " "))
		})
	}
}

func TestRightsFollow(t *testing.T) {
	ctx := t.Context()
	c := newCluster(t, class("public", controllerName))
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ingresses := c.client.NetworkingV1().Ingresses("a")
	must(ingresses.Create(ctx, ingress("a", "i", "public", "cert", "later"), metav1.CreateOptions{}))
	c.addSecret(secret("a", "cert", corev1.SecretTypeTLS, "tls.crt", "tls.key"))

	t.Log("nothing while the addon is off")
	if granted, _ := c.rights(); granted != "" {
		t.Errorf("rights without the addon: %s", granted)
	}
	must(c.client.CoreV1().ServiceAccounts(Namespace).Create(ctx, account.DeepCopy(), metav1.CreateOptions{}))
	c.await("a/cert")

	t.Log("a Secret that comes later")
	c.addSecret(secret("a", "later", corev1.SecretTypeTLS, "tls.crt", "tls.key"))
	c.await("a/cert a/later")

	t.Log("an Ingress that needs less")
	must(ingresses.Update(ctx, ingress("a", "i", "public", "later"), metav1.UpdateOptions{}))
	c.await("a/later")

	t.Log("what somebody else has changed is put right")
	role, err := c.client.RbacV1().Roles("a").Get(ctx, RoleName, metav1.GetOptions{})
	must(role, err)
	role.Rules[0].ResourceNames = append(role.Rules[0].ResourceNames, "cert")
	must(c.client.RbacV1().Roles("a").Update(ctx, role, metav1.UpdateOptions{}))
	c.await("a/later")
	if err := c.client.RbacV1().RoleBindings("a").Delete(ctx, RoleName, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.await("a/later")

	t.Log("the last Ingress goes")
	if err := ingresses.Delete(ctx, "i", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.await("")
	if roles, err := c.client.RbacV1().Roles("a").List(ctx, metav1.ListOptions{}); err != nil || len(roles.Items) > 0 {
		t.Errorf("roles are left: %v, %v", roles, err)
	}

	t.Log("the addon is switched off")
	must(ingresses.Create(ctx, ingress("a", "i", "public", "cert"), metav1.CreateOptions{}))
	c.await("a/cert")
	if err := c.client.CoreV1().ServiceAccounts(Namespace).Delete(ctx, Account, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.await("")
}
