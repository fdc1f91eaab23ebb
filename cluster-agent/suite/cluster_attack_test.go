package suite

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/authentication/serviceaccount"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/client-go/dynamic/dynamicinformer"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	metafake "k8s.io/client-go/metadata/fake"

	"microk8s/cluster-agent/api"
	"microk8s/internal/encryption"
	"microk8s/internal/ingressrights"
	"microk8s/internal/netpolicy"
	"microk8s/internal/netpolicy/feed"
	"microk8s/internal/nodegate"
	"microk8s/internal/noderegistry"
	"microk8s/internal/serverargs"
	"microk8s/internal/tokenstore"
)

// What the cluster has beside the agent: the API server's gate for nodes (ADR 16) and its feed of network
// policies, the rights of the ingress controller, and the arguments that a join carries.

// gate is that of an API server with the site's records, which it follows.
func (s *site) gate() *nodegate.Gate {
	s.t.Helper()
	factory := informers.NewSharedInformerFactory(s.clientset(), 0)
	g, err := nodegate.New(factory)
	if err != nil {
		s.t.Fatal(err)
	}
	watches := s.api.Watches("clusterrolebindings")
	ctx, stop := context.WithCancel(s.t.Context())
	factory.StartWithContext(ctx)
	s.t.Cleanup(func() { stop(); factory.Shutdown() })
	factory.WaitForCacheSync(ctx.Done())
	for end := time.Now().Add(30 * time.Second); s.api.Watches("clusterrolebindings") <= watches; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatal("the gate does not follow the records")
		}
	}
	return g
}

func (s *site) clientset() *kubernetes.Clientset {
	s.t.Helper()
	cfg := s.api.Config()
	cfg.ContentType, cfg.AcceptContentTypes = "application/json", "application/json" // all that kubetest speaks
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	return client
}

// The credentials that are on a worker's disk and in its pods.
func kubeletOf(node, join string) user.Info {
	return &user.DefaultInfo{Name: noderegistry.UserPrefix + node, UID: join, Groups: []string{user.NodesGroup, user.AllAuthenticated}}
}

func proxyOf(node, join string) user.Info {
	return &user.DefaultInfo{Name: user.KubeProxy, UID: join, Groups: []string{noderegistry.Prefix + node, user.AllAuthenticated}}
}

func podOn(node string) user.Info {
	return &user.DefaultInfo{
		Name: serviceaccount.MakeUsername("shop", "default"), Groups: []string{user.AllAuthenticated},
		Extra: map[string][]string{serviceaccount.NodeNameKey: {node}},
	}
}

// passes reports whether the gate leaves a request to the authorizers behind it.
func passes(t *testing.T, g *nodegate.Gate, who user.Info) bool {
	t.Helper()
	d, _, err := g.Authorize(t.Context(), authorizer.AttributesRecord{User: who, Verb: "list", Resource: "services", ResourceRequest: true})
	if err != nil || d == authorizer.DecisionAllow {
		t.Errorf("%s: %v, %v", who.GetName(), d, err)
	}
	return d != authorizer.DecisionDeny
}

// shut waits until a credential is refused.
func shut(t *testing.T, g *nodegate.Gate, what string, who user.Info) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); passes(t, g, who); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("%s reaches the API", what)
			return
		}
	}
}

// removedAtTheGate removes a worker, which keeps everything that it had.
func removedAtTheGate(t *testing.T, s *site) {
	g := s.gate()
	for what, who := range map[string]user.Info{"its kubelet": kubeletOf("w1", joinOfW1), "its kube-proxy": proxyOf("w1", joinOfW1)} {
		if !passes(t, g, who) {
			t.Errorf("%s is refused before it is removed", what)
		}
	}
	if err := s.nodes.Delete(t.Context(), "w1"); err != nil {
		t.Fatal(err)
	}
	shut(t, g, "the kubelet of a removed node", kubeletOf("w1", joinOfW1))
	shut(t, g, "the kube-proxy of a removed node", proxyOf("w1", joinOfW1))
	shut(t, g, "a kubelet that never joined", kubeletOf("w9", ""))
	if !passes(t, g, kubeletOf("n1", "")) {
		t.Error("a control plane node is refused")
	}
}

// tokensAtTheGate has the tokens of the pods that ran on a node which was removed.
func tokensAtTheGate(t *testing.T, s *site) {
	g := s.gate()
	if !passes(t, g, podOn("w1")) {
		t.Error("a pod is refused before its node is removed")
	}
	if err := s.nodes.Delete(t.Context(), "w1"); err != nil {
		t.Fatal(err)
	}
	shut(t, g, "a token of a pod on a removed node", podOn("w1"))
	if !passes(t, g, podOn("n1")) {
		t.Error("a pod of another node is refused")
	}
}

// joinAtTheGate has the certificate of a machine that had the name before.
func joinAtTheGate(t *testing.T, s *site) {
	g := s.gate()
	if !passes(t, g, kubeletOf("w1", joinOfW1)) {
		t.Error("the node itself is refused")
	}
	shut(t, g, "a certificate of an earlier join", kubeletOf("w1", "ffffffffffffffffffffffffffffffff"))
	shut(t, g, "a kube-proxy's certificate of an earlier join", proxyOf("w1", ""))
	shut(t, g, "a worker's certificate for what is a control plane node now", kubeletOf("n1", joinOfW1))
}

// watchAtTheGate has a request that is being served when its node is removed.
func watchAtTheGate(t *testing.T, s *site) {
	g := s.gate()
	began, ended := make(chan struct{}), make(chan struct{})
	h := g.Handler(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(began)
		<-r.Context().Done()
		close(ended)
	}))
	ctx, stop := context.WithCancel(apirequest.WithUser(t.Context(), kubeletOf("w1", joinOfW1)))
	served := make(chan struct{})
	go func() {
		defer close(served)
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(ctx, http.MethodGet, "/api/v1/nodes?watch=true", nil))
	}()
	t.Cleanup(func() { stop(); <-served })
	<-began
	if err := s.nodes.Delete(t.Context(), "w1"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		t.Error("a watch of a removed node goes on")
	}
}

// openFeeds is root on a worker who opens the feed of network policies again and again and reads nothing.
func openFeeds(t *testing.T, s *site) {
	factory := informers.NewSharedInformerFactory(s.clientset(), 0)
	policies := dynamicinformer.NewDynamicSharedInformerFactory(dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(),
		map[schema.GroupVersionResource]string{netpolicy.ClusterPolicies: "ClusterNetworkPolicyList"}), 0)
	server, err := feed.NewServer(factory, policies)
	if err != nil {
		t.Fatal(err)
	}
	server.Caller = func(r *http.Request) string { return r.Header.Get("User") } // the API server has authenticated it
	ctx, stop := context.WithCancel(t.Context())
	factory.StartWithContext(ctx)
	policies.Start(ctx.Done())
	front := httptest.NewServer(server)
	t.Cleanup(func() { stop(); server.Close(); front.Close(); factory.Shutdown(); policies.Shutdown() })
	factory.WaitForCacheSync(ctx.Done())
	policies.WaitForCacheSync(ctx.Done())
	open := func(who string) int {
		t.Helper()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, front.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("User", who)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { stop(); res.Body.Close() })
		return res.StatusCode
	}
	for end := time.Now().Add(30 * time.Second); open(noderegistry.UserPrefix+"n1") == http.StatusServiceUnavailable && time.Now().Before(end); {
		time.Sleep(5 * time.Millisecond) // it does not know the cluster yet
	}
	for n := 0; open(noderegistry.UserPrefix+"w1") == http.StatusOK; n++ {
		if n == 100 {
			t.Errorf("%d requests of one node are open", n)
			break
		}
	}
	if status := open(noderegistry.UserPrefix + "w2"); status != http.StatusOK {
		t.Errorf("another node: %d", status)
	}
}

// ingressCluster has the addon ingress, a certificate, a password and Ingresses that name Secrets.
func (s *site) ingressCluster(names map[string]string) (readable func() string) {
	t := s.t
	t.Helper()
	client := s.clientset()
	scheme := metafake.NewTestScheme()
	if err := metav1.AddMetaToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ctx := t.Context()
	_, err := client.CoreV1().ServiceAccounts(ingressrights.Namespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: ingressrights.Account}}, metav1.CreateOptions{})
	must(err)
	_, err = client.NetworkingV1().IngressClasses().Create(ctx, &networkingv1.IngressClass{ObjectMeta: metav1.ObjectMeta{Name: "public"}, Spec: networkingv1.IngressClassSpec{Controller: "traefik.io/ingress-controller"}}, metav1.CreateOptions{})
	must(err)
	meta := metafake.NewSimpleMetadataClient(scheme)
	secrets := meta.Resource(corev1.SchemeGroupVersion.WithResource("secrets"))
	for _, at := range []string{"shop/cert", "shop/password", "kube-system/cert"} {
		ns, name, _ := strings.Cut(at, "/")
		secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Type: corev1.SecretTypeTLS, Data: map[string][]byte{corev1.TLSCertKey: []byte("x"), corev1.TLSPrivateKeyKey: []byte("x")}}
		if name == "password" {
			secret.Type, secret.Data = corev1.SecretTypeOpaque, map[string][]byte{"password": []byte("x")}
		}
		made, err := client.CoreV1().Secrets(ns).Create(ctx, secret, metav1.CreateOptions{})
		must(err)
		_, err = secrets.Namespace(ns).(metafake.MetadataClient).CreateFake(&metav1.PartialObjectMetadata{
			TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"}, ObjectMeta: *made.ObjectMeta.DeepCopy(),
		}, metav1.CreateOptions{})
		must(err)
	}
	class := "public"
	for at, secret := range names {
		ns, name, _ := strings.Cut(at, "/")
		_, err := client.NetworkingV1().Ingresses(ns).Create(ctx, &networkingv1.Ingress{
			ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: networkingv1.IngressSpec{IngressClassName: &class, TLS: []networkingv1.IngressTLS{{SecretName: secret}}},
		}, metav1.CreateOptions{})
		must(err)
	}
	kinds := map[schema.GroupVersionResource]string{}
	for _, kind := range ingressrights.Kinds() {
		kinds[kind] = "List"
	}
	objects := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), kinds)
	running, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		ingressrights.Keep(running, client, meta, objects, slog.New(slog.DiscardHandler))
	}()
	t.Cleanup(func() { stop(); <-done })
	return func() string {
		t.Helper()
		bindings, err := client.RbacV1().RoleBindings("").List(ctx, metav1.ListOptions{})
		must(err)
		var out []string
		for _, b := range bindings.Items {
			role, err := client.RbacV1().Roles(b.Namespace).Get(ctx, b.RoleRef.Name, metav1.GetOptions{})
			if apierrors.IsNotFound(err) {
				return "it is being changed"
			}
			must(err)
			for _, rule := range role.Rules {
				out = append(out, fmt.Sprint(b.Namespace, rule.ResourceNames))
			}
		}
		return strings.Join(out, " ")
	}
}

// becomes waits until what may be read is want, and stays so for a while, and reports what it was last.
func becomes(want string, read func() string) (got string, ok bool) {
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if got = read(); got != want {
			continue
		}
		time.Sleep(300 * time.Millisecond) // one namespace comes after the other
		if got = read(); got == want {
			return got, true
		}
	}
	return got, false
}

// ingressForPassword may make Ingresses in a namespace, and wants a Secret there that he may not read.
func ingressForPassword(t *testing.T, s *site) {
	read := s.ingressCluster(map[string]string{"shop/a": "cert", "shop/b": "password"})
	if got, ok := becomes("shop[cert]", read); !ok {
		t.Errorf("the controller may read %s", got)
	}
}

// ingressInSystem has an Ingress in kube-system.
func ingressInSystem(t *testing.T, s *site) {
	read := s.ingressCluster(map[string]string{"shop/a": "cert", "kube-system/b": "cert"})
	if got, ok := becomes("shop[cert]", read); !ok {
		t.Errorf("the controller may read %s", got)
	}
}

// ingressIsGone keeps the controller's token for the time when no Ingress needs the certificate.
func ingressIsGone(t *testing.T, s *site) {
	read := s.ingressCluster(map[string]string{"shop/a": "cert"})
	if got, ok := becomes("shop[cert]", read); !ok {
		t.Fatalf("the controller may read %s", got)
	}
	if err := s.clientset().NetworkingV1().Ingresses("shop").Delete(t.Context(), "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if got, ok := becomes("", read); !ok {
		t.Errorf("the controller may still read %s", got)
	}
}

// argumentsForWorkers wants the API server's arguments, with the key of encryption at rest, for a worker's token.
func argumentsForWorkers(t *testing.T, s *site) {
	s.write(encryption.Path(s.env), "the key of encryption at rest")
	data, err := os.ReadFile(s.env.Args("kube-apiserver"))
	if err != nil {
		t.Fatal(err)
	}
	s.write(s.env.Args("kube-apiserver"), string(data)+"--"+encryption.Flag+"="+encryption.Argument+"\n")
	r := request(s.add(tokenstore.Options{Worker: true}).Reveal(), "n2", true)
	r.ServerArguments = map[string]string{"carries": "1"}
	if _, answer, _ := s.call(from{}, api.PathJoin, r); strings.Contains(string(answer), "the key of encryption at rest") {
		t.Error("a worker is told the key of encryption at rest")
	}
}

// hostileArguments is a cluster that a node joins, and that sends what no cluster would: other arguments, other
// files, several lines.
func hostileArguments(t *testing.T, _ *site) {
	for name, set := range map[string]serverargs.Set{
		"the address of another datastore": {Flags: map[string][]string{"etcd-servers": {"https://evil.example"}}},
		"more than one line":               {Flags: map[string][]string{"feature-gates": {"A=true\n--etcd-servers=https://evil.example"}}},
	} {
		if set.Check() == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}

// hostileFiles is the same with files.
func hostileFiles(t *testing.T, _ *site) {
	for _, name := range []string{"/etc/cron.d/x", "${SNAP_DATA}/args/../../x.yaml", "${SNAP_DATA}/args/containerd-env", "${SNAP_DATA}/certs/ca.key", "${SNAP_DATA}/args/cni-network/cni.yaml"} {
		set := serverargs.Set{Files: []serverargs.File{{Flag: "oidc-ca-file", Name: name}}}
		if set.Check() == nil {
			t.Errorf("a file is written to %s", name)
		}
	}
}
