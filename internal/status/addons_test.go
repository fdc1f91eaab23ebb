package status

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/addon"
	"microk8s/internal/snapenv"
)

// TestMissingPack: after an upgrade an addon whose new pack is missing is named, with what to do.
func TestMissingPack(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	env.Snap = "../.."
	all, _, err := addon.Catalogue(env)
	if err != nil {
		t.Fatal(err)
	}
	for record, want := range map[string]string{
		`{"version":"0.0.1","arguments":["10.0.0.1"]}`:               "addon metallb stays at version 0.0.1",
		`{"version":"0.0.1","arguments":["10.0.0.1"],"online":true}`: "",
		`{"version":"0.15.2","arguments":["10.0.0.1"]}`:              "", // its images may have come in another way
		`{`: "",
	} {
		r := &Report{}
		r.packs(env, all, []corev1.ConfigMap{{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{addon.RecordLabel: "metallb"}}, Data: map[string]string{"record": record}}})
		switch {
		case want == "" && len(r.Problems) > 0, want != "" && len(r.Problems) != 1:
			t.Errorf("%s: %v", record, r.Problems)
		case want != "" && (!strings.Contains(r.Problems[0].What, want) || !strings.Contains(r.Problems[0].Do, "microk8s addons import FILE; microk8s enable metallb") || Looks[r.Problems[0].ID] == ""):
			t.Errorf("%s: %+v", record, r.Problems[0])
		}
	}
}
