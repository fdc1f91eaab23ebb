package kubeconfig

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"
)

func TestRoundTrip(t *testing.T) {
	want := Config{CA: []byte("ca"), Cert: []byte("cert"), Key: []byte("key"), Server: LocalServer(16443), User: "admin"}
	data, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode(data)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	var raw map[string]any
	if err := yaml.Unmarshal(data, &raw); err != nil {
		t.Fatal(err)
	}
	if raw["current-context"] != "microk8s" || want.Server != "https://127.0.0.1:16443" {
		t.Errorf("context %v, server %s", raw["current-context"], want.Server)
	}
}

func TestDecodeDamaged(t *testing.T) {
	for _, text := range []string{"\x00", "a: [", "clusters: 5"} {
		if _, err := Decode([]byte(text)); err == nil {
			t.Errorf("Decode(%q) succeeded", text)
		}
	}
	if c, err := Decode(nil); err != nil || c.User != "" {
		t.Errorf("an empty file: %+v, %v", c, err)
	}
}
