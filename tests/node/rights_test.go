package node

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"flag"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"
	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

var rewrite = flag.Bool("rewrite", false, "rewrite the golden file of rights; commit the difference only when you understand it")

// verbs that the API server knows for resources.
var verbs = []string{"get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"}

// testRights tries every verb on every resource with the certificates that a worker's kubelet
// and kube-proxy have. What is allowed must be exactly the golden file: a right more is a hole,
// a right less breaks nodes.
func (n *node) testRights(t *testing.T) {
	// A node without a record has no rights at all.
	n.run(t, "microk8s", "kubectl", "create", "clusterrolebinding", "microk8s:node:worker-1", "--clusterrole=microk8s:registered-node", "--user=system:node:worker-1")
	defer n.run(t, "microk8s", "kubectl", "delete", "clusterrolebinding", "microk8s:node:worker-1")
	for _, who := range []struct{ file, cn, group string }{
		{"kubelet", "system:node:worker-1", "system:nodes"},
		{"kube-proxy", "system:kube-proxy", ""},
	} {
		t.Run(who.file, func(t *testing.T) {
			golden := filepath.Join("testdata", "rights-"+who.file+".txt")
			got := n.rights(t, n.clientAs(t, who.cn, who.group))
			if *rewrite {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatalf("%v (run with -rewrite to make it)", err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("rights differ from %s (-want +got):\n%s", golden, diff)
			}
		})
	}
}

// rights asks the API server about every verb on every resource, cluster-wide and in two
// namespaces, and lists what is allowed.
func (n *node) rights(t *testing.T, client kubernetes.Interface) string {
	t.Helper()
	_, lists, err := n.client.Discovery().ServerGroupsAndResources()
	if err != nil {
		t.Fatal(err)
	}
	var (
		mu      sync.Mutex
		allowed []string
		asked   int
	)
	group, ctx := errgroup.WithContext(t.Context())
	group.SetLimit(16)
	for _, list := range lists {
		gv := strings.Split(list.GroupVersion, "/")
		apiGroup := ""
		if len(gv) == 2 {
			apiGroup = gv[0]
		}
		for _, r := range list.APIResources {
			resource, sub, _ := strings.Cut(r.Name, "/")
			namespaces := []string{""}
			if r.Namespaced {
				namespaces = []string{"", "default", "kube-system"}
			}
			for _, ns := range namespaces {
				for _, verb := range verbs {
					asked++
					group.Go(func() error {
						review, err := client.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx, &authorizationv1.SelfSubjectAccessReview{
							Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &authorizationv1.ResourceAttributes{
								Namespace: ns, Verb: verb, Group: apiGroup, Resource: resource, Subresource: sub,
							}},
						}, metav1.CreateOptions{})
						if err != nil {
							return err
						}
						if review.Status.Allowed {
							where := "in all namespaces"
							if !r.Namespaced {
								where = "of the cluster"
							} else if ns != "" {
								where = "in " + ns
							}
							name := r.Name
							if apiGroup != "" {
								name += "." + apiGroup
							}
							mu.Lock()
							defer mu.Unlock()
							allowed = append(allowed, fmt.Sprintf("%s %s: %s", name, where, verb))
						}
						return nil
					})
				}
			}
		}
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	if asked < 500 {
		t.Fatalf("asked only %d questions: discovery gave too little", asked)
	}
	slices.Sort(allowed)
	return strings.Join(slices.Compact(allowed), "\n") + "\n"
}

// clientAs makes a client certificate signed by the node's CA, as a joining node would get.
func (n *node) clientAs(t *testing.T, cn, organization string) kubernetes.Interface {
	t.Helper()
	ca, err := x509.ParseCertificate(n.pem(t, "certs/ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	caKey, err := parseKey(n.pem(t, "certs/ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{CommonName: cn},
		NotBefore:    time.Now().Add(-time.Minute),
		NotAfter:     time.Now().Add(time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if organization != "" {
		template.Subject.Organization = []string{organization}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca, &key.PublicKey, caKey)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cfg := rest.AnonymousClientConfig(n.config)
	cfg.QPS, cfg.Burst = -1, 0
	cfg.Dial = n.config.Dial
	cfg.CertData = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	cfg.KeyData = pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER})
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func (n *node) pem(t *testing.T, file string) []byte {
	t.Helper()
	data, err := os.ReadFile(n.path(file))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(data)
	if block == nil {
		t.Fatalf("%s holds no PEM block", file)
	}
	return block.Bytes
}

func parseKey(der []byte) (any, error) {
	if key, err := x509.ParsePKCS1PrivateKey(der); err == nil {
		return key, nil
	}
	return x509.ParsePKCS8PrivateKey(der)
}
