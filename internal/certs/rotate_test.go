package certs

import (
	"bytes"
	"crypto/tls"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"microk8s/internal/kubeconfig"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
)

// Power that goes between two files of a replacement leaves no key beside another one's certificate.
func TestReplacedTogether(t *testing.T) {
	for after := range 6 { // the key, the certificate, the kubeconfig, and the end
		n := newNode(t)
		n.ensure(t)
		old := find(t, n.list(t), Kubelet)[0].ID
		left := after
		n.between = func() {
			if left--; left < 0 {
				panic("the power goes")
			}
		}
		func() {
			defer func() { _ = recover() }()
			if _, err := n.ReplaceLeaves(t.Context(), []string{old}); err != nil {
				t.Error(err)
			}
		}()
		n.between = nil
		if err := Check(n.env); err != nil { // as before each start of the services
			t.Errorf("after %d files: %v", after, err)
		}
		now := find(t, n.list(t), Kubelet)[0]
		if now.ID == old || now.Problem != "" {
			t.Errorf("after %d files: %+v", after, now)
		}
		if _, err := os.Lstat(n.env.Cert(replacing)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("after %d files: %v", after, err)
		}
		text, err := os.ReadFile(n.env.Credential("kubelet.config"))
		if err != nil {
			t.Fatal(err)
		}
		config, err := kubeconfig.Decode(text)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tls.X509KeyPair(config.Cert, config.Key); err != nil {
			t.Errorf("after %d files the kubeconfig: %v", after, err)
		}
		if crt, err := os.ReadFile(n.crt(Kubelet)); err != nil || !bytes.Equal(crt, config.Cert) {
			t.Errorf("after %d files the kubeconfig has another certificate: %v", after, err)
		}
	}
}

// What is to be replaced is named by its key, so asking again does nothing, and nothing else is touched.
func TestReplaceLeavesOnce(t *testing.T) {
	n := newNode(t)
	n.ensure(t)
	before := n.list(t)
	ids := Leaves(before)
	change, err := n.ReplaceLeaves(t.Context(), ids)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{Server, "apiserver-kubelet-client", Admin, "controller", "scheduler", "proxy", Kubelet}
	if !slices.Equal(change.Issued, want) {
		t.Errorf("issued %v, want %v", change.Issued, want)
	}
	after := n.list(t)
	for i, l := range after.Items {
		if replaced := l.ID != before.Items[i].ID; replaced != slices.Contains(want, l.Name) || l.Problem != "" {
			t.Errorf("%+v", l)
		}
	}
	if change, err := n.ReplaceLeaves(t.Context(), ids); err != nil || len(change.Issued) > 0 {
		t.Errorf("again: %v, %v", change.Issued, err)
	}
	if change, err := n.Renew(t.Context()); err != nil || len(change.Issued) > 0 {
		t.Errorf("the next look issues %v, %v", change.Issued, err)
	}
}

func TestFrontProxySteps(t *testing.T) {
	n := newNode(t)
	n.ensure(t)
	old := find(t, n.list(t), FrontProxyCA)[0].ID
	do := func(step string) {
		t.Helper()
		for range 2 { // each may be repeated
			if err := n.FrontProxy(step, old); err != nil {
				t.Fatal(err)
			}
		}
		if err := Check(n.env); err != nil {
			t.Errorf("%s: %v", step, err)
		}
		if change, err := n.Renew(t.Context()); err != nil || len(change.Issued) > 0 {
			t.Errorf("%s: the next look issues %v, %v", step, change.Issued, err)
		}
	}
	if err := n.FrontProxy(FrontProxyDrop, old); err == nil {
		t.Error("the CA that signs was dropped")
	}
	do(FrontProxyAdd)
	next := find(t, n.list(t), NextFrontProxy)[0].ID
	if now := find(t, n.list(t), FrontProxyCA)[0]; now.ID != old || next == old {
		t.Errorf("%s signs, %s is beside it", now.ID, next)
	}
	do(FrontProxyUse)
	if now := find(t, n.list(t), FrontProxyCA)[0]; now.ID != next || find(t, n.list(t), NextFrontProxy)[0].ID != old {
		t.Errorf("%s signs", now.ID)
	}
	do(FrontProxyAdd) // a node that is asked again from the beginning
	do(FrontProxyDrop)
	for _, l := range n.list(t).Items {
		if l.ID == old || l.Problem != "" {
			t.Errorf("%+v", l)
		}
	}
	if _, err := os.Lstat(n.env.Cert(nextFrontProxy)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

func TestSigningKeysKeepTheSigner(t *testing.T) {
	n := newNode(t)
	n.ensure(t)
	have, err := n.SigningKeys()
	if err != nil {
		t.Fatal(err)
	}
	fresh := SigningKeys{must(n.opts.Maker.Key(2048))}
	if err := n.SetSigningKeys(fresh.Encode()); err == nil || !strings.Contains(err.Error(), have.IDs()[0]) {
		t.Errorf("tokens that are signed now would be refused: %v", err)
	}
	for _, bad := range []string{"", "no key"} {
		if err := n.SetSigningKeys([]byte(bad)); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
	both := append(slices.Clone(have), fresh...)
	if err := n.SetSigningKeys(both.Encode()); err != nil {
		t.Fatal(err)
	}
	if got := find(t, n.list(t), ServiceAccount); len(got) != 2 || got[0].ID != have.IDs()[0] || got[1].ID != fresh.IDs()[0] {
		t.Errorf("%+v", got)
	}
	if err := n.SetSigningKeys(append(slices.Clone(fresh), have...).Encode()); err != nil {
		t.Fatal(err)
	}
	if err := n.SetSigningKeys(fresh.Encode()); err != nil {
		t.Fatal(err)
	}
	n.ensure(t) // and a start leaves it as it is
	if got := find(t, n.list(t), ServiceAccount); len(got) != 1 || got[0].ID != fresh.IDs()[0] {
		t.Errorf("%+v", got)
	}
}

func TestWorkersSignNothing(t *testing.T) {
	n := newNode(t)
	n.ensure(t)
	keys, err := n.SigningKeys()
	if err != nil {
		t.Fatal(err)
	}
	if err := nodeconfig.Lock(n.env, snapenv.LockWorker); err != nil {
		t.Fatal(err)
	}
	if err := n.SetSigningKeys(keys.Encode()); err == nil {
		t.Error("keys of tokens")
	}
	if err := n.FrontProxy(FrontProxyAdd, ""); err == nil {
		t.Error("a front proxy")
	}
	if _, err := n.ReplaceLeaves(t.Context(), nil); err == nil {
		t.Error("leaves of a CA that it has not got")
	}
}

// The datastore's pair is replaced only by one that others' members know, under the name that they look for.
func TestDatastorePairStaysKnown(t *testing.T) {
	n := newNode(t)
	n.ensure(t)
	have := must(n.DatastorePair())
	next := must(n.NextDatastorePair())
	if again := must(n.NextDatastorePair()); !again.Certs[0].Equal(next.Certs[0]) {
		t.Error("the pair that is to come is another one each time")
	}
	set := func(p Pair) error { return n.SetDatastorePair(p.Encode()) }
	if err := set(next); err == nil || !strings.Contains(err.Error(), "not among the new ones") {
		t.Errorf("others would refuse what this node shows: %v", err)
	}
	stranger := must(n.newPair([]string{"another"}, nil))
	if err := set(Pair{append(stranger.Certs, have.Certs...), stranger.Key}); err == nil || !strings.Contains(err.Error(), "look for") {
		t.Errorf("another name: %v", err)
	}
	if err := set(Pair{next.Certs, have.Key}); err == nil {
		t.Error("a certificate with the key of another one")
	}
	if err := set(Pair{append(slices.Clone(have.Certs), next.Certs...), have.Key}); err != nil {
		t.Fatal(err)
	}
	if err := set(Pair{append(slices.Clone(next.Certs), have.Certs...), next.Key}); err != nil {
		t.Fatal(err)
	}
	n.ensure(t)
	if got := find(t, n.list(t), OtherDatastore); len(got) != 1 || got[0].ID != KeyID(have.Key.Public()) {
		t.Errorf("%+v", got)
	}
	if err := set(next); err != nil {
		t.Fatal(err)
	}
	if err := n.ForgetNextPair(); err != nil {
		t.Fatal(err)
	}
	for _, l := range n.list(t).Items {
		if l.Name == OtherDatastore || l.Problem != "" {
			t.Errorf("%+v", l)
		}
	}
}
