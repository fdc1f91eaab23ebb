package agent

import (
	"crypto/x509/pkix"
	"os"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/cluster-agent/callback"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/kube/kubetest"
	"microk8s/internal/noderegistry"
	"microk8s/internal/pki"
	"microk8s/internal/pki/pkitest"
	"microk8s/internal/snapenv"
	"microk8s/internal/token"
)

// TestRefreshNodeByNode: a cluster of two control-plane nodes and a worker, all of the build before, is
// refreshed one node after the other. What the build before knows counts until its last control-plane
// node is gone, and not for a moment longer.
func TestRefreshNodeByNode(t *testing.T) {
	api := kubetest.New(t)
	before := token.NewCallbackKey()
	api.Set(&corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: callback.SecretName, Namespace: "kube-system"}, Data: map[string][]byte{"callback-key": before},
	})
	for name, address := range map[string]string{"n1": "10.0.0.1", "n2": "10.0.0.2", "w1": "10.0.0.5"} {
		api.Set(&corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Status:     corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: address}}},
		})
	}
	env := snapenv.Under(t.TempDir())
	if err := os.MkdirAll(env.CertsDir(), 0o755); err != nil {
		t.Fatal(err)
	}
	maker := pkitest.Maker(nil)
	key, err := maker.Key(2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := maker.Issue(pki.Request{Subject: pkix.Name{CommonName: "ca"}, Days: 10, CA: true}, key.Public(), nil, key)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{"ca.crt": pki.EncodeCert(der), "ca.key": pki.EncodeKey(key)} {
		if err := os.WriteFile(env.Cert(name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	nodes, keys := noderegistry.Registry{Core: api.Core}, callback.Keys{Env: env, Core: api.Core}
	members := func() ([]storedir.Member, error) {
		return []storedir.Member{{Address: "10.0.0.1:19001"}, {Address: "10.0.0.2:19001"}}, nil
	}
	// refreshed is what the agent of a control-plane node does when it starts in this build.
	refreshed := func(name string) callback.Key {
		t.Helper()
		own := noderegistry.Record{Name: name, Role: noderegistry.ControlPlane, Secrets: 2}
		if added, err := nodes.Add(t.Context(), own); err != nil {
			t.Fatal(err)
		} else if !added {
			err = nodes.Change(t.Context(), name, func(r *noderegistry.Record) error { r.Secrets = 2; return nil })
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := (apiServer{env, api.Core}).adopt(t.Context(), members, time.Now()); err != nil {
			t.Fatal(err)
		}
		key, err := keys.Get(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	first := refreshed("n1")
	if first.Legacy("w1") != token.LegacyCallback(before, "w1") {
		t.Error("with n2 of the build before, its secrets do not count")
	}
	for name, role := range map[string]noderegistry.NodeRole{"n1": noderegistry.ControlPlane, "n2": noderegistry.ControlPlane, "w1": noderegistry.Worker} {
		if r, err := nodes.Get(t.Context(), name); err != nil || r.Role != role {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
	second := refreshed("n2")
	if complete, err := nodes.Complete(t.Context()); err != nil || !complete {
		t.Errorf("all are refreshed: %v, %v", complete, err)
	}
	r, err := nodes.Get(t.Context(), "w1")
	if err != nil || second.Legacy("w1") != "" || second.Secret(*r) == first.Secret(*r) {
		t.Errorf("the secrets of the build before count, or the salt is the same: %v", err)
	}
	// A thief's Node, made without a record, is not adopted any more.
	api.Set(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "thief"}})
	refreshed("n1")
	if there, err := nodes.Exists(t.Context(), "thief"); err != nil || there {
		t.Errorf("adopted: %v, %v", there, err)
	}
}
