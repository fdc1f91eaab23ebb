package encryption

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apiserver/pkg/apis/apiserver"
	apiserverv1 "k8s.io/apiserver/pkg/apis/apiserver/v1"
	"k8s.io/apiserver/pkg/apis/apiserver/validation"
)

// TestTheAPIServerTakesIt reads a new configuration as the API server does.
func TestTheAPIServerTakesIt(t *testing.T) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{apiserver.AddToScheme, apiserverv1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	keys, err := Keys{NewKey()}.Merge(Keys{NewKey()})
	if err != nil {
		t.Fatal(err)
	}
	for _, data := range [][]byte{New(), keys.Encode()} {
		var c apiserver.EncryptionConfiguration
		if err := runtime.DecodeInto(serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDecoder(), data, &c); err != nil {
			t.Fatal(err)
		}
		if errs := validation.ValidateEncryptionConfiguration(&c, true); len(errs) > 0 {
			t.Error(errs.ToAggregate())
		}
		if c.Resources[0].Providers[0].Secretbox == nil || !slices.Equal(c.Resources[0].Resources, []string{"secrets", "configmaps"}) {
			t.Errorf("%+v", c.Resources)
		}
	}
}

func TestKeys(t *testing.T) {
	a, b := NewKey(), NewKey()
	if a.Name == b.Name || a.Secret == b.Secret {
		t.Fatal("two new keys are the same")
	}
	keys, err := Keys{a}.Merge(Keys{b, a})
	if err != nil || !slices.Equal(keys, Keys{a, b}) {
		t.Errorf("merged: %v, %v", keys.Names(), err)
	}
	if _, err := keys.Merge(Keys{{Name: a.Name, Secret: b.Secret}}); err == nil || strings.Contains(err.Error(), a.Secret) {
		t.Errorf("another key of the same name: %v", err)
	}
	if first, err := keys.First(b.Name); err != nil || !slices.Equal(first, Keys{b, a}) {
		t.Errorf("%v, %v", first.Names(), err)
	}
	if _, err := keys.First("none"); err == nil {
		t.Error("a key that is not there came first")
	}
	back, err := Parse(keys.Encode())
	if err != nil || !slices.Equal(back, keys) {
		t.Errorf("%v, %v", back.Names(), err)
	}
}

func TestForeign(t *testing.T) {
	good := string(New())
	for name, text := range map[string]string{
		"empty": "", "text": "hello", "another provider": strings.Replace(good, "secretbox", "aescbc", 1),
		"more resources": strings.Replace(good, "- configmaps", "- configmaps\n  - events", 1), "no identity": strings.Replace(good, "- identity: {}", "", 1),
		"a short key": strings.Replace(good, "secret: ", "secret: AAAA # ", 1),
	} {
		if text == good {
			t.Fatalf("%s: nothing was changed in\n%s", name, good)
		}
		if _, err := Parse([]byte(text)); !errors.Is(err, ErrForeign) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestArgument keeps the default argument and the place of the file together.
func TestArgument(t *testing.T) {
	data, err := os.ReadFile("../../snap/local/default-args/kube-apiserver")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(data), "--"+Flag+"="+Argument+"\n") || !strings.HasSuffix(Argument, filepath.Join("backend", FileName)) {
		t.Error("the default argument names another file")
	}
}

func FuzzParse(f *testing.F) {
	f.Add(New())
	f.Add([]byte("resources: [{providers: [{secretbox: {keys: [{}]}}, {identity: {}}]}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		keys, err := Parse(data)
		if err != nil {
			return
		}
		again, err := Parse(keys.Encode())
		if err != nil || !slices.Equal(again, keys) {
			t.Errorf("%v became %v, %v", keys.Names(), again.Names(), err)
		}
	})
}
