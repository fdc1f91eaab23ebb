package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"microk8s/cluster-agent/api"
)

// never are the rights that would be a way from a worker to the cluster. What a kubelet may in full is
// in tests/node, testRights.
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

// testWorkerRoot plays root on a worker: every credential on its disk and in its pods' mounts is tried
// with the API, the agent of a control-plane node, and the datastore.
func (c *cluster) testWorkerRoot(t *testing.T, server, worker string) {
	base := rest.Config{
		Host: "https://" + net.JoinHostPort(c.ip(t, server), "16443"), Dial: c.dialer(worker), QPS: -1, Timeout: 15 * time.Second,
		TLSClientConfig: rest.TLSClientConfig{Insecure: true},
	}
	clients := map[string]*rest.Config{}
	for _, name := range []string{"kubelet", "proxy"} {
		cfg := rest.CopyConfig(&base)
		cfg.CertFile, cfg.KeyFile = c.path(worker, "certs/"+name+".crt"), c.path(worker, "certs/"+name+".key")
		clients["the certificate "+name] = cfg
	}
	tokens, err := filepath.Glob(filepath.Join(c.lab.Root(worker), "var/snap/microk8s/common/var/lib/kubelet/pods/*/volumes/kubernetes.io~projected/*/token"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range tokens {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // the pod has just ended
		}
		cfg := rest.CopyConfig(&base)
		cfg.BearerToken = string(text)
		clients["the token "+path] = cfg
	}
	for name, cfg := range clients {
		k, err := kubernetes.NewForConfig(cfg)
		if err != nil {
			t.Fatal(err)
		}
		for _, right := range never {
			review, err := k.AuthorizationV1().SelfSubjectAccessReviews().Create(t.Context(), &authorizationv1.SelfSubjectAccessReview{
				Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &right},
			}, metav1.CreateOptions{})
			switch {
			case apierrors.IsUnauthorized(err) && cfg.BearerToken != "": // its pod has ended
			case err != nil:
				t.Errorf("%s: %v", name, err)
			case review.Status.Allowed:
				t.Errorf("%s allows %s %s/%s of %q in %q", name, right.Verb, right.Resource, right.Subresource, right.Name, right.Namespace)
			}
		}
	}
	pair := c.workerPair(t, worker)
	secret, err := os.ReadFile(c.path(worker, "credentials/callback-token.txt"))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	for _, host := range []string{server, worker} {
		status, body := c.askAgent(t, worker, host, pair, api.PathConfigure, api.ConfigureRequest{Callback: strings.TrimSpace(string(secret))})
		if status == http.StatusOK {
			t.Errorf("configure on %s: %s", host, body)
		}
	}
	// The datastore takes members' certificates only.
	conn, err := c.dialer(worker)(t.Context(), "tcp", net.JoinHostPort(c.ip(t, server), "19001"))
	if err != nil {
		return // it is not reachable at all
	}
	defer conn.Close()
	talk := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{pair}}) //nolint:gosec // whoever it is
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	if err = talk.HandshakeContext(ctx); err == nil { // with TLS 1.3 the refusal comes afterwards
		_ = talk.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err = talk.Write([]byte("GET /dqlite HTTP/1.1\r\nHost: x\r\nUpgrade: dqlite\r\n\r\n")); err == nil {
			var n int
			if n, err = talk.Read(make([]byte, 1)); n > 0 {
				t.Error("the datastore answers a worker")
			}
		}
	}
	if err == nil {
		t.Error("the datastore lets a worker in")
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
	data, err := json.Marshal(request)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		DialContext:     c.dialer(from),
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{pair}}, //nolint:gosec // what it allows is asked, not who it is
	}}
	defer client.CloseIdleConnections()
	resp, err := client.Post("https://"+net.JoinHostPort(c.ip(t, host), c.port)+path, "application/json", bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}
