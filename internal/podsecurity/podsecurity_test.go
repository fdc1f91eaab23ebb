package podsecurity

import (
	"net/http"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/kube/kubetest"
)

// warns stands in for the admission of Pod Security, which warns of a namespace's pods when its label
// is to be changed.
type warns struct{ next http.RoundTripper }

func (w warns) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := w.next.RoundTrip(r)
	if err == nil && r.Method == http.MethodPatch && strings.HasSuffix(r.URL.Path, "/namespaces/storage") && r.URL.Query().Get("dryRun") == "All" {
		resp.Header.Add("Warning", `299 - "existing pods in namespace \"storage\" violate the new PodSecurity enforce level \"baseline:latest\""`)
	}
	return resp, err
}

func namespace(name string, labels map[string]string) *corev1.Namespace {
	return &corev1.Namespace{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"}, ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
}

// TestEnforceAndRelax goes once there and back. What the policy for new namespaces does is shown on real nodes.
func TestEnforceAndRelax(t *testing.T) {
	s := kubetest.New(t)
	s.Set(namespace("default", nil), namespace("kube-system", nil), namespace("storage", nil), namespace("theirs", map[string]string{EnforceLabel: "privileged"}))
	early := 2 // namespaces that are made before the API server knows the policy
	s.Check = func(old, object metav1.Object) error {
		if ns, ok := object.(*corev1.Namespace); ok && old == nil {
			if early--; early < 0 {
				ns.Labels = map[string]string{EnforceLabel: Baseline}
			}
		}
		return nil
	}
	cfg := s.Config()
	cfg.Wrap(func(next http.RoundTripper) http.RoundTripper { return warns{next} })
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	labels := func(name string) string {
		l := kubetest.As[corev1.Namespace](s, "v1/namespaces/"+name).Labels
		return l[EnforceLabel] + " " + l[MarkLabel]
	}

	plan, err := c.Plan(ctx, Baseline, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(plan.Enforce, []string{"default", "storage"}) || !slices.Equal(plan.Exempt, []string{"kube-system"}) ||
		len(plan.Others) != 1 || plan.Others[0].Name != "theirs" || len(plan.Violations) != 1 || plan.Violations[0].Namespace != "storage" {
		t.Errorf("the plan is %+v", plan)
	}
	if got := labels("default"); got != " " {
		t.Errorf("making the plan has set %q", got)
	}

	if plan, err = c.Plan(ctx, Baseline, []string{"storage"}); err != nil || len(plan.Violations) != 0 {
		t.Fatalf("%+v, %v", plan, err)
	}
	for range 2 { // also again
		if err := c.Enforce(ctx, plan); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{"default": "baseline enforced", "kube-system": "privileged exempt", "storage": "privileged exempt", "theirs": "privileged "} {
		if got := labels(name); got != want {
			t.Errorf("%s has %q, want %q", name, got, want)
		}
	}
	status, err := c.Status(ctx)
	if err != nil || status.Level != Baseline || len(status.Namespaces) != 4 || status.Namespaces[0] != (Namespace{"default", "baseline", "microk8s"}) || status.Namespaces[3].By != "user" {
		t.Errorf("%+v, %v", status, err)
	}

	// Another level is ours to set again, and what was exempt stays so.
	if plan, err = c.Plan(ctx, Restricted, nil); err != nil || !slices.Equal(plan.Enforce, []string{"default"}) || !slices.Equal(plan.Exempt, []string{"kube-system", "storage"}) {
		t.Errorf("%+v, %v", plan, err)
	}
	if _, err = c.Plan(ctx, Restricted, []string{"nonesuch"}); err == nil {
		t.Error("a namespace that does not exist can be exempt")
	}

	changed, err := c.Relax(ctx)
	if err != nil || len(changed) != 3 {
		t.Errorf("%v, %v", changed, err)
	}
	for name, want := range map[string]string{"default": " ", "kube-system": " ", "storage": " ", "theirs": "privileged "} {
		if got := labels(name); got != want {
			t.Errorf("after the end %s has %q, want %q", name, got, want)
		}
	}
	if status, err = c.Status(ctx); err != nil || status.Level != "" {
		t.Errorf("%+v, %v", status, err)
	}
	if changed, err := c.Relax(ctx); err != nil || len(changed) != 0 {
		t.Errorf("a second end: %v, %v", changed, err)
	}
}
