package callback

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/kube/kubetest"
	"microk8s/internal/noderegistry"
	"microk8s/internal/pki"
	"microk8s/internal/snapenv"
	"microk8s/internal/token"
)

// controlPlane makes the files of a control-plane node.
func controlPlane(t *testing.T) snapenv.Env {
	t.Helper()
	env := snapenv.Under(t.TempDir())
	for _, dir := range []string{env.CertsDir(), env.CredentialsDir()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	maker := pki.Maker{} // no two have the same key
	key, err := maker.Key(2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := maker.Issue(pki.Request{Subject: pkix.Name{CommonName: "10.152.183.1"}, Days: 3650, CA: true}, key.Public(), nil, key)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{"ca.crt": pki.EncodeCert(der), "ca.key": pki.EncodeKey(key)} {
		if err := os.WriteFile(env.Cert(name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return env
}

var worker1 = noderegistry.Record{Name: "w1", Role: noderegistry.Worker, Join: "00"}

func TestSaltIsMadeOnce(t *testing.T) {
	api := kubetest.New(t)
	k := Keys{Env: controlPlane(t), Core: api.Core}
	var mu sync.Mutex
	seen := map[string]bool{}
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			key, err := k.Get(t.Context())
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			seen[key.Secret(worker1)] = true
		})
	}
	group.Wait()
	if len(seen) != 1 {
		t.Errorf("%d keys", len(seen))
	}
	if err := k.Rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	now, err := k.Get(t.Context())
	if err != nil || seen[now.Secret(worker1)] {
		t.Errorf("the secret is the same after Rotate: %v", err)
	}
	if now.Legacy("w1") != "" {
		t.Error("a new cluster takes secrets of the build before")
	}
	// Who reads everything in the API has no node's secret.
	for name, value := range kubetest.As[corev1.Secret](api, secretPath).Data {
		if token.Callback(value, "worker", "w1", "00") == now.Secret(worker1) || token.LegacyCallback(value, "w1") == now.Secret(worker1) {
			t.Errorf("the secret follows from %s alone", name)
		}
	}
}

const secretPath = "v1/namespaces/kube-system/secrets/" + SecretName

// TestRefreshOfACluster: the cluster has the key of the build before. While control-plane nodes of it
// are there both kinds of secrets count, and the key stays for them; afterwards it counts nowhere, also
// when a node goes back to its earlier build and writes one again.
func TestRefreshOfACluster(t *testing.T) {
	api := kubetest.New(t)
	before := token.NewCallbackKey()
	api.Set(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: SecretName, Namespace: "kube-system"}, Data: map[string][]byte{legacyName: before}})
	k := Keys{Env: controlPlane(t), Core: api.Core}
	key, err := k.Get(t.Context())
	if err != nil || key.Legacy("w1") != token.LegacyCallback(before, "w1") || string(kubetest.As[corev1.Secret](api, secretPath).Data[legacyName]) != string(before) {
		t.Fatalf("%v, %v", key, err)
	}
	if err := k.Rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	rotated, err := k.Get(t.Context())
	if err != nil || rotated.Legacy("w1") == "" || rotated.Legacy("w1") == key.Legacy("w1") || rotated.Secret(worker1) == key.Secret(worker1) {
		t.Fatalf("a removal changes both: %v", err)
	}
	for range 2 {
		if err := k.Seal(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	sealed, err := k.Get(t.Context())
	if err != nil || sealed.Legacy("w1") != "" || sealed.Secret(worker1) == rotated.Secret(worker1) {
		t.Fatalf("%v", err)
	}
	secret := kubetest.As[corev1.Secret](api, secretPath)
	secret.Data[legacyName] = before
	api.Set(secret)
	if again, err := k.Get(t.Context()); err != nil || again.Legacy("w1") != "" {
		t.Errorf("a key of the build before counts again: %v", err)
	}
}

// TestKeeper follows the salt into the file, and keeps the node's record.
func TestKeeper(t *testing.T) {
	api := kubetest.New(t)
	env := controlPlane(t)
	connected := make(chan struct{}, 10)
	keys, nodes := Keys{Env: env, Core: api.Core}, noderegistry.Registry{Core: api.Core}
	k := &Controller{Env: env, Keys: keys, Nodes: nodes, Node: "n1", Log: slog.New(slog.DiscardHandler), Connected: func(context.Context) error {
		connected <- struct{}{}
		return nil
	}}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- k.Run(ctx) }()
	<-connected
	own, err := nodes.Get(t.Context(), "n1")
	if err != nil || own.Role != noderegistry.ControlPlane || own.Secrets != 2 || own.Join != "" {
		t.Fatalf("its record: %+v, %v", own, err)
	}
	for range 2 {
		if err := keys.Rotate(t.Context()); err != nil {
			t.Fatal(err)
		}
		key, err := keys.Get(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		want := key.Secret(*own)
		tick := time.NewTicker(5 * time.Millisecond)
		for limit := time.After(20 * time.Second); ; {
			got, err := Load(env)
			if err != nil {
				t.Fatal(err)
			}
			if got == want {
				break
			}
			select {
			case <-tick.C:
			case <-limit:
				t.Fatal("the file does not follow the salt")
			}
		}
		tick.Stop()
	}
	if st, err := os.Stat(env.Credential(FileName)); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestKeeperAfterAJoin: the record of the join stays, its nonce too. Where the node could not confirm
// in time that it is in, it does so now; a join that nobody confirms ends.
func TestKeeperAfterAJoin(t *testing.T) {
	api := kubetest.New(t)
	env, nodes := controlPlane(t), noderegistry.Registry{Core: api.Core}
	now := time.Now().UTC().Truncate(time.Second)
	k := &Controller{Env: env, Nodes: nodes, Node: "n2", Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return now }}
	for _, r := range []noderegistry.Record{
		{Name: "n2", Role: noderegistry.ControlPlane, Join: "22", Until: now.Add(10 * time.Minute)},
		{Name: "w9", Role: noderegistry.Worker, Join: "99", Until: now.Add(10 * time.Minute)},
	} {
		if err := nodes.Put(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	if own, err := k.self(t.Context()); err != nil || own.Join != "22" || !own.Pending() {
		t.Errorf("while it joins: %+v, %v", own, err)
	}
	now = now.Add(11 * time.Minute)
	if err := k.sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if own, err := nodes.Get(t.Context(), "n2"); err != nil || own.Pending() || own.Join != "22" {
		t.Errorf("%+v, %v", own, err)
	}
	if _, err := nodes.Get(t.Context(), "w9"); err != nil {
		t.Errorf("a worker has an hour to say that it is in: %v", err)
	}
	now = now.Add(Grace)
	if err := k.sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := nodes.Get(t.Context(), "w9"); !errors.Is(err, noderegistry.ErrNone) {
		t.Errorf("the record of a join that was given up: %v", err)
	}
}

// TestKeeperOfATakenName: a record that somebody else has got as a worker, under the name of this
// control-plane node, becomes its own, and what was signed for that join counts no more.
func TestKeeperOfATakenName(t *testing.T) {
	api := kubetest.New(t)
	nodes := noderegistry.Registry{Core: api.Core}
	k := &Controller{Env: controlPlane(t), Nodes: nodes, Node: "n2", Log: slog.New(slog.DiscardHandler)}
	if err := nodes.Put(t.Context(), noderegistry.Record{Name: "n2", Role: noderegistry.Worker, Join: "99"}); err != nil {
		t.Fatal(err)
	}
	own, err := k.self(t.Context())
	if err != nil || own.Role != noderegistry.ControlPlane || own.Join != "" {
		t.Errorf("%+v, %v", own, err)
	}
}

// TestCaller: control-plane nodes show a certificate that others can check, and nobody else has one.
func TestCaller(t *testing.T) {
	env, foreign := controlPlane(t), controlPlane(t)
	ca, err := os.ReadFile(env.Cert("ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	check := func(pair tls.Certificate, at time.Time) error {
		t.Helper()
		cert, err := x509.ParseCertificate(pair.Certificate[0])
		if err != nil {
			t.Fatal(err)
		}
		_, err = CheckCaller(&tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}}, ca, at)
		return err
	}
	pair, err := Caller(env, "n1")
	if err != nil || check(pair, now) != nil {
		t.Fatalf("%v, %v", err, check(pair, now))
	}
	if check(pair, now.AddDate(0, 0, 3)) == nil {
		t.Error("it is good for longer than two days")
	}
	other, err := Caller(foreign, "n1")
	if err != nil || check(other, now) == nil {
		t.Errorf("one of another cluster is taken: %v", err)
	}
	for _, state := range []*tls.ConnectionState{nil, {}} {
		if _, err := CheckCaller(state, ca, now); !errors.Is(err, ErrCaller) {
			t.Errorf("%v", err)
		}
	}
	// A member of the group cannot read the CA's key.
	if err := WriteCaller(env, "n1", now); err != nil {
		t.Fatal(err)
	}
	base, pair, err := readCaller(env)
	if err != nil || check(pair, now) != nil {
		t.Fatalf("%v", err)
	}
	if own, err := loadBase(env); err != nil || string(own) != string(base) {
		t.Errorf("the group's base is another: %v", err)
	}
	text, err := os.ReadFile(env.Credential(callerFile))
	if err != nil || strings.Contains(string(text), "RSA") {
		t.Errorf("the file holds the CA's key: %v", err)
	}
	if err := WriteCaller(env, "n1", now.Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if same, err := os.ReadFile(env.Credential(callerFile)); err != nil || string(same) != string(text) {
		t.Errorf("it was written again: %v", err)
	}
	for what, change := range map[string]func(){
		"it is a day old": func() { now = now.AddDate(0, 0, 2) },
		"it is broken":    func() { _ = os.WriteFile(env.Credential(callerFile), []byte("x"), 0o600) },
		"it is not there": func() { _ = os.Remove(env.Credential(callerFile)) },
		"it is of another": func() {
			text, _ := os.ReadFile(foreign.Credential(callerFile))
			_ = os.WriteFile(env.Credential(callerFile), text, 0o600)
		},
	} {
		if err := WriteCaller(foreign, "n1", now); err != nil {
			t.Fatal(err)
		}
		change()
		if err := WriteCaller(env, "n1", now); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if _, pair, err := readCaller(env); err != nil || check(pair, now) != nil {
			t.Errorf("%s: %v, %v", what, err, check(pair, now))
		}
	}
	if err := os.Remove(env.Cert("ca.key")); err != nil {
		t.Fatal(err)
	}
	if _, err := Caller(env, "n1"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a worker calls: %v", err)
	}
}

func TestUnavailable(t *testing.T) {
	api := kubetest.New(t)
	api.Down(true)
	if _, err := (Keys{Env: controlPlane(t), Core: api.Core}).Get(t.Context()); err == nil {
		t.Error("a key from nowhere")
	}
}
