package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/callback"
	"microk8s/tests/lab/labtest"
)

// never are rights that would be a way from a worker to the cluster, asked for one by one: the API
// server cannot list what the Node authorizer allows.
var never = []authorizationv1.ResourceAttributes{
	{Verb: "get", Resource: "secrets", Namespace: "kube-system"},
	{Verb: "list", Resource: "secrets", Namespace: "kube-system"},
	{Verb: "get", Resource: "secrets", Namespace: "kube-system", Name: "microk8s-cluster-agent"},
	{Verb: "get", Resource: "secrets", Namespace: "kube-system", Name: "microk8s-join-tokens"},
	{Verb: "create", Resource: "pods", Subresource: "exec", Namespace: "kube-system"},
	{Verb: "create", Resource: "serviceaccounts", Subresource: "token", Namespace: "kube-system", Name: "generic-garbage-collector"},
	{Verb: "create", Resource: "serviceaccounts", Namespace: "kube-system"},
	{Verb: "get", Resource: "nodes", Subresource: "proxy", Name: "n1"},
	{Verb: "create", Resource: "deployments", Group: "apps", Namespace: "kube-system"},
	{Verb: "create", Resource: "clusterrolebindings", Group: "rbac.authorization.k8s.io"},
	{Verb: "update", Resource: "clusterrolebindings", Group: "rbac.authorization.k8s.io", Name: "microk8s:node:n1"},
	{Verb: "delete", Resource: "clusterrolebindings", Group: "rbac.authorization.k8s.io", Name: "microk8s:node:n1"},
	{Verb: "escalate", Resource: "clusterroles", Group: "rbac.authorization.k8s.io"},
	{Verb: "bind", Resource: "clusterroles", Group: "rbac.authorization.k8s.io"},
	{Verb: "impersonate", Resource: "users"},
	{Verb: "impersonate", Resource: "groups", Name: "system:masters"},
	{Verb: "update", Resource: "certificatesigningrequests", Subresource: "approval", Group: "certificates.k8s.io"},
	{Verb: "create", Resource: "validatingwebhookconfigurations", Group: "admissionregistration.k8s.io"},
	{Verb: "delete", Resource: "validatingadmissionpolicybindings", Group: "admissionregistration.k8s.io"},
}

// rewrite writes the golden file again instead of comparing with it.
var rewrite = flag.Bool("rewrite", false, "rewrite testdata/worker-root.txt; commit the difference only when you understand it")

const goldenRoot = "testdata/worker-root.txt"

// credential is something with which root on a worker can call others.
type credential struct {
	config *rest.Config
	pair   *tls.Certificate // nil for tokens
	token  string
}

// testWorkerRoot plays root on a worker: every credential on its disk and in its pods' mounts is tried
// with the API, the agent and the kubelet of a control-plane node, and the datastore. What each allows
// must be exactly what is in the golden file: a line more is a hole. all says that every addon is
// enabled, so that nothing of the file may be missing.
//
// What the Node authorizer allows a kubelet cannot be listed by the API server; tests/node, testRights,
// has that verb by verb.
func (c *cluster) testWorkerRoot(t *testing.T, server, worker string, all bool) {
	found := map[string][]string{} // section and its lines
	note := func(section, format string, a ...any) {
		line := fmt.Sprintf(format, a...)
		line = strings.NewReplacer(c.ip(t, server), "SERVER", c.ip(t, worker), "WORKER").Replace(line)
		found[section] = append(found[section], line)
	}
	const disk, mounts, nothing = "files on the disk that the API server takes", "secrets in the mounts of pods", "no credentials"
	base := rest.Config{
		Host: "https://" + net.JoinHostPort(c.ip(t, server), "16443"), Dial: c.dialer(worker), QPS: -1, Timeout: 15 * time.Second,
		TLSClientConfig: rest.TLSClientConfig{Insecure: true},
	}
	// whoami adds a credential, and returns whose it is; "" where the API server does not take it, as those
	// of the cluster that the machine was before.
	credentials := map[string]credential{nothing: {config: &base}}
	whoami := func(what string, one credential) string {
		k, err := kubernetes.NewForConfig(one.config)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		review, err := k.AuthenticationV1().SelfSubjectReviews().Create(t.Context(), &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
		if apierrors.IsUnauthorized(err) || apierrors.IsForbidden(err) {
			return ""
		}
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		who := review.Status.UserInfo.Username
		if credentials[who].pair == nil {
			credentials[who] = one
		}
		return who
	}

	keys, err := filepath.Glob(c.path(worker, "certs/*.key"))
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range keys {
		name := "certs/" + filepath.Base(key)
		cfg := rest.CopyConfig(&base)
		cfg.CertFile, cfg.KeyFile = strings.TrimSuffix(key, ".key")+".crt", key
		pair, err := tls.LoadX509KeyPair(cfg.CertFile, key)
		if err != nil {
			continue // it has no certificate
		}
		if who := whoami(name, credential{config: cfg, pair: &pair}); who != "" {
			note(disk, "%s: %s", name, who)
		}
	}
	files, err := filepath.Glob(c.path(worker, "credentials/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		name := "credentials/" + filepath.Base(file)
		one := credential{}
		if pair, err := tls.LoadX509KeyPair(file, file); err == nil {
			one.config, one.pair = rest.CopyConfig(&base), &pair
			one.config.CertFile, one.config.KeyFile = file, file
		} else if cfg, err := clientcmd.BuildConfigFromFlags("", file); err == nil {
			cfg.Host, cfg.Dial, cfg.QPS, cfg.Timeout = base.Host, base.Dial, base.QPS, base.Timeout
			cfg.Insecure, cfg.CAFile, cfg.CAData = true, "", nil
			one.config, one.token = cfg, cfg.BearerToken
		} else {
			continue // the callback secret, which agentCalls has
		}
		if who := whoami(name, one); who != "" {
			note(disk, "%s: %s", name, who)
		}
	}

	const volumes = "var/snap/microk8s/common/var/lib/kubelet/pods/*/volumes/"
	paths, err := filepath.Glob(filepath.Join(c.lab.Root(worker), volumes+"*/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		kind, name := filepath.Base(filepath.Dir(path)), filepath.Base(path)
		switch {
		case kind == "kubernetes.io~secret":
			note(mounts, "%s", name)
		case kind == "kubernetes.io~projected" && !strings.HasPrefix(name, "kube-api-access-"):
			note(mounts, "projected %s", name)
		}
		token, err := os.ReadFile(filepath.Join(path, "token"))
		if err != nil {
			continue // it has none, or the pod has just ended
		}
		cfg := rest.CopyConfig(&base)
		cfg.BearerToken = string(token)
		whoami(path, credential{config: cfg, token: string(token)})
	}
	// Any pod may be placed on a worker, so the accounts of those that are elsewhere now count as well.
	for _, account := range c.accountsOfPods(t, server, worker) {
		cfg := rest.CopyConfig(&base)
		cfg.BearerToken = c.tokenOf(t, server, account)
		whoami(account, credential{config: cfg, token: cfg.BearerToken})
	}

	everybody := map[string]bool{}
	const strange = "system:serviceaccount:kube-public:default"
	cfg := rest.CopyConfig(&base)
	cfg.BearerToken = c.tokenOf(t, server, strange)
	for _, line := range rules(t, cfg) {
		everybody[line] = true
		note("everybody who is known", "api: %s", line)
	}
	for who, one := range credentials {
		section := who
		for _, line := range rules(t, one.config) {
			if !everybody[line] {
				note(section, "api: %s", line)
			}
		}
		c.neverAllowed(t, who, one.config)
		if one.pair != nil || who == nothing {
			for _, line := range c.agentCalls(t, worker, server, one.pair) {
				note(section, "agent: %s", line)
			}
			if err := c.greetDatastore(t, worker, server, one.pair); err != nil {
				note(section, "datastore: %v", err)
			}
		}
		for _, path := range []string{"/pods", "/runningpods/", "/metrics", "/metrics/resource", "/stats/summary", "/configz", "/logs/", "/debug/pprof/", "/healthz",
			"/exec/default/x/c?command=id", "/run/default/x/c?cmd=id", "/containerLogs/default/x/c", "/checkpoint/default/x/c"} {
			if status := c.askKubelet(t, worker, server, path, one); status != http.StatusUnauthorized && status != http.StatusForbidden {
				note(section, "kubelet: %s: %d", path, status)
			}
		}
	}
	c.foreignTokens(t, server, worker, &base)

	want := map[string][]string{}
	section := ""
	if text, err := os.ReadFile(goldenRoot); err == nil {
		for line := range strings.Lines(string(text)) {
			line = strings.TrimSuffix(line, "\n")
			if name, ok := strings.CutPrefix(line, "# "); ok {
				section = name
				want[section] = nil
			} else if line != "" {
				want[section] = append(want[section], line)
			}
		}
	} else if !*rewrite {
		t.Fatal(err)
	}
	for name, lines := range found {
		slices.Sort(lines)
		found[name] = slices.Compact(lines)
		if !*rewrite {
			if diff := cmp.Diff(want[name], found[name]); diff != "" {
				t.Errorf("%s: what it allows is not what is in %s (-want +got):\n%s", name, goldenRoot, diff)
			}
		}
	}
	if *rewrite && all {
		var out strings.Builder
		for _, name := range slices.Sorted(maps.Keys(found)) {
			fmt.Fprintf(&out, "# %s\n%s\n\n", name, strings.Join(found[name], "\n"))
		}
		if err := os.WriteFile(goldenRoot, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	for name := range want {
		if _, ok := found[name]; !ok && all && !*rewrite {
			t.Errorf("%s is in %s, and was not found", name, goldenRoot)
		}
	}
}

const goldenGuest = "testdata/worker-guest.txt"

// testWorkerGuest runs a pod in the network of a worker, and has it look around: which sockets there are, and what each answers
// it without credentials. A line more than in the golden file is a hole until somebody has looked at it.
func (c *cluster) testWorkerGuest(t *testing.T, server, worker string) {
	c.loadWebImage(t, worker)
	k := c.client(t, server)
	guest := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "guest"},
		Spec: corev1.PodSpec{
			NodeName: worker, HostNetwork: true, AutomountServiceAccountToken: new(bool),
			Containers: []corev1.Container{{Name: "c", Image: webImage, Command: []string{"/web", "sleep", "forever"}, ImagePullPolicy: corev1.PullNever}},
		},
	}
	if _, err := k.CoreV1().Pods("default").Create(t.Context(), guest, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		now := int64(0)
		_ = k.CoreV1().Pods("default").Delete(context.WithoutCancel(t.Context()), "guest", metav1.DeleteOptions{GracePeriodSeconds: &now})
	}()
	cat := func(files ...string) (out string) {
		t.Helper()
		eventually(t, 2*time.Minute, func() error {
			r := c.try(t, server, slices.Concat([]string{"microk8s", "kubectl", "exec", "guest", "--", "/web", "cat"}, files)...)
			if out = r.out; r.code != 0 {
				return errors.New(r.String())
			}
			return nil
		})
		return out
	}
	var got []string
	for _, l := range labtest.Listeners(t, cat("/proc/net/tcp", "/proc/net/tcp6"), "0A") {
		got = append(got, labtest.Asked(t, c.dialer(worker), l)...) // the network is the same: these sockets are those of the host
	}
	for _, l := range labtest.Listeners(t, cat("/proc/net/udp", "/proc/net/udp6"), "07") {
		got = append(got, fmt.Sprintf("udp %s", l))
	}
	slices.Sort(got)
	text := strings.Join(slices.Compact(got), "\n") + "\n"
	text = regexp.MustCompile(`10\.1\.\d+\.`).ReplaceAllString(text, "10.1.N.") // the subnet of the node
	if *rewrite {
		if err := os.WriteFile(goldenGuest, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(goldenGuest)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), text); diff != "" {
		t.Errorf("what a pod in a worker's network is answered is not what is in %s (-want +got):\n%s", goldenGuest, diff)
	}
}

// tokenOf returns a token of an account, given as a user.
func (c *cluster) tokenOf(t *testing.T, host, account string) string {
	t.Helper()
	namespace, name, _ := strings.Cut(strings.TrimPrefix(account, "system:serviceaccount:"), ":")
	r, err := c.client(t, host).CoreV1().ServiceAccounts(namespace).CreateToken(t.Context(), name, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return r.Status.Token
}

// controlPlaneLabel keeps pods away from workers, which cannot take it (TestAdmission).
const controlPlaneLabel = "node.kubernetes.io/microk8s-controlplane"

// accountsOfPods lists the accounts of the product's pods that may be on a worker, as users.
func (c *cluster) accountsOfPods(t *testing.T, host, worker string) (out []string) {
	t.Helper()
	pods, err := c.client(t, host).CoreV1().Pods("").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		if p.Spec.NodeSelector[controlPlaneLabel] != "" {
			if p.Spec.NodeName == worker {
				t.Errorf("%s/%s runs on the worker %s, and is for control-plane nodes", p.Namespace, p.Name, worker)
			}
			continue
		}
		if p.Namespace != "default" && (p.Spec.AutomountServiceAccountToken == nil || *p.Spec.AutomountServiceAccountToken) {
			out = append(out, "system:serviceaccount:"+p.Namespace+":"+p.Spec.ServiceAccountName)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// rules lists what a credential may do, as the API server says: in each kind of namespace, and of the
// cluster. A rule with a wildcard is a line with it.
func rules(t *testing.T, cfg *rest.Config) (out []string) {
	t.Helper()
	k, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	namespaces := []string{"default", "kube-system", "kube-public", "kube-node-lease", "ingress", "somebodys"}
	where := map[string][]string{}
	for _, ns := range namespaces {
		review, err := k.AuthorizationV1().SelfSubjectRulesReviews().Create(t.Context(), &authorizationv1.SelfSubjectRulesReview{
			Spec: authorizationv1.SelfSubjectRulesReviewSpec{Namespace: ns},
		}, metav1.CreateOptions{})
		if apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) {
			return nil
		}
		if err != nil {
			t.Fatal(err)
		}
		verbs := map[string][]string{}
		for _, r := range review.Status.ResourceRules {
			for _, group := range r.APIGroups {
				for _, resource := range r.Resources {
					what := resource
					if group != "" {
						what += "." + group
					}
					if len(r.ResourceNames) > 0 {
						what += " " + strings.Join(slices.Sorted(slices.Values(r.ResourceNames)), ",")
					}
					verbs[what] = append(verbs[what], r.Verbs...)
				}
			}
		}
		for _, r := range review.Status.NonResourceRules {
			for _, url := range r.NonResourceURLs {
				verbs[url] = append(verbs[url], r.Verbs...)
			}
		}
		if review.Status.Incomplete {
			verbs["and what the Node authorizer allows"] = nil
		}
		for what, list := range verbs {
			slices.Sort(list)
			line := strings.TrimSpace(strings.Join(slices.Compact(list), ",") + " " + what)
			where[line] = append(where[line], ns)
		}
	}
	for line, in := range where {
		if len(in) < len(namespaces) {
			line += " in " + strings.Join(in, ", ")
		}
		out = append(out, line)
	}
	slices.Sort(out)
	return out
}

// neverAllowed asks for what must not be allowed by any authorizer.
func (c *cluster) neverAllowed(t *testing.T, who string, cfg *rest.Config) {
	t.Helper()
	k, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, right := range never {
		review, err := k.AuthorizationV1().SelfSubjectAccessReviews().Create(t.Context(), &authorizationv1.SelfSubjectAccessReview{
			Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &right},
		}, metav1.CreateOptions{})
		switch {
		case apierrors.IsUnauthorized(err), apierrors.IsForbidden(err): // without credentials, or its pod has ended
		case err != nil:
			t.Errorf("%s: %v", who, err)
		case review.Status.Allowed:
			t.Errorf("%s allows %s %s/%s of %q in %q", who, right.Verb, right.Resource, right.Subresource, right.Name, right.Namespace)
		}
	}
}

// agentCalls tries each call of an agent, but health, which is open, with a certificate and what else the
// worker has, and lists those that are not refused.
func (c *cluster) agentCalls(t *testing.T, worker, server string, pair *tls.Certificate) (allowed []string) {
	t.Helper()
	text, err := os.ReadFile(c.path(worker, "credentials/"+callback.FileName))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	secret := strings.TrimSpace(string(text))
	var shown tls.Certificate
	if pair != nil {
		shown = *pair
	}
	at := c.ip(t, server)
	var mu sync.Mutex
	var group errgroup.Group
	for path, request := range map[string]any{
		api.PathJoin:         api.JoinRequest{Token: secret, Hostname: worker, Port: c.port, Worker: true, Product: api.Product},
		api.PathSignCert:     api.SignRequest{Token: secret + api.SuffixKubelet},
		api.PathConfigure:    api.ConfigureRequest{Callback: secret},
		api.PathImageImport:  struct{}{},
		api.PathDqliteRemove: api.RemoveRequest{Endpoint: c.ip(t, server) + ":19001"},
		api.PathProof:        api.ProofRequest{},
		api.PathPreflight:    api.PreflightRequest{JoinRequest: api.JoinRequest{Token: secret, Hostname: worker, Port: c.port}},
		api.PathConfirm:      api.ConfirmRequest{Token: secret, Hostname: worker},
		api.PathRelease:      api.ConfirmRequest{Token: secret, Hostname: worker},
		api.PathRenew:        api.RenewRequest{},
		api.PathExamine:      struct{}{},
		"/metrics":           struct{}{},
		"/debug/pprof/":      struct{}{},
	} {
		group.Go(func() error { // wrong tokens are answered late
			status, _, err := c.postAgent(t.Context(), worker, at, shown, path, request)
			if err == nil && status == http.StatusOK {
				mu.Lock()
				defer mu.Unlock()
				allowed = append(allowed, path)
			}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	return allowed
}

// askKubelet asks the kubelet of another node, and returns the status.
func (c *cluster) askKubelet(t *testing.T, worker, server, path string, one credential) int {
	t.Helper()
	config := &tls.Config{InsecureSkipVerify: true} //nolint:gosec // what it allows is asked, not who it is
	if one.pair != nil {
		config.Certificates = []tls.Certificate{*one.pair}
	}
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DialContext: c.dialer(worker), TLSClientConfig: config}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+net.JoinHostPort(c.ip(t, server), "10250")+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if one.token != "" {
		req.Header.Set("Authorization", "Bearer "+one.token)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatalf("the kubelet of %s: %v", server, err)
	}
	defer resp.Body.Close()
	return resp.StatusCode
}

// greetDatastore tries a certificate at the datastore's port, which takes the members' pair only; nil
// when it is refused, or cannot be reached at all.
func (c *cluster) greetDatastore(t *testing.T, worker, server string, pair *tls.Certificate) error {
	conn, err := c.dialer(worker)(t.Context(), "tcp", net.JoinHostPort(c.ip(t, server), "19001"))
	if err != nil {
		return nil //nolint:nilerr // it listens on the loopback only
	}
	defer conn.Close()
	config := &tls.Config{InsecureSkipVerify: true} //nolint:gosec // whoever it is
	if pair != nil {
		config.Certificates = []tls.Certificate{*pair}
	}
	talk := tls.Client(conn, config)
	_ = talk.SetDeadline(time.Now().Add(15 * time.Second))
	if err := talk.HandshakeContext(t.Context()); err != nil {
		return nil //nolint:nilerr // refused
	}
	// With TLS 1.3 the refusal comes afterwards.
	if _, err := talk.Write([]byte("GET /dqlite HTTP/1.1\r\nHost: x\r\nUpgrade: dqlite\r\n\r\n")); err != nil {
		return nil //nolint:nilerr // refused
	}
	if n, err := talk.Read(make([]byte, 1)); n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		return errors.New("it takes the certificate")
	}
	return nil
}

// foreignTokens asks with the kubelet's certificate for tokens of pods that are not on the worker, and
// of accounts without a pod.
func (c *cluster) foreignTokens(t *testing.T, server, worker string, base *rest.Config) {
	t.Helper()
	cfg := rest.CopyConfig(base)
	cfg.CertFile, cfg.KeyFile = c.path(worker, "certs/kubelet.crt"), c.path(worker, "certs/kubelet.key")
	k, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	pods, err := c.client(t, server).CoreV1().Pods("").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	asked := 0
	for _, p := range pods.Items {
		bound := &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: p.Name, UID: p.UID}
		if p.Spec.NodeName == worker {
			bound = nil // its own pods' accounts, for no pod
		}
		asked++
		_, err := k.CoreV1().ServiceAccounts(p.Namespace).CreateToken(t.Context(), p.Spec.ServiceAccountName,
			&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{BoundObjectRef: bound}}, metav1.CreateOptions{})
		if !apierrors.IsForbidden(err) {
			t.Errorf("a token of %s/%s for the pod %s on %s, bound %v: %v, want a refusal", p.Namespace, p.Spec.ServiceAccountName, p.Name, p.Spec.NodeName, bound != nil, err)
		}
	}
	if asked == 0 {
		t.Error("there are no pods")
	}
}

// workerPair is the certificate of a worker's kubelet.
func (c *cluster) workerPair(t *testing.T, worker string) tls.Certificate {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(c.path(worker, "certs/kubelet.crt"), c.path(worker, "certs/kubelet.key"))
	if err != nil {
		t.Fatal(err)
	}
	return pair
}

// askAgent calls an agent from a host, with a certificate.
func (c *cluster) askAgent(t *testing.T, from, host string, pair tls.Certificate, path string, request any) (status int, body string) {
	t.Helper()
	status, body, err := c.postAgent(t.Context(), from, c.ip(t, host), pair, path, request)
	if err != nil {
		t.Fatal(err)
	}
	return status, body
}

func (c *cluster) postAgent(ctx context.Context, from, ip string, pair tls.Certificate, path string, request any) (status int, body string, err error) {
	data, err := json.Marshal(request)
	if err != nil {
		return 0, "", err
	}
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		DialContext:     c.dialer(from),
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{pair}}, //nolint:gosec // what it allows is asked, not who it is
	}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+net.JoinHostPort(ip, c.port)+path, bytes.NewReader(data))
	if err != nil {
		return 0, "", err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(text), err
}
