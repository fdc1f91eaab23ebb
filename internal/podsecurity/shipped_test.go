package podsecurity

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/pod-security-admission/api"
	standards "k8s.io/pod-security-admission/policy"
)

// beyond are the pods of the core addons that are not as restricted wants them, with their level: those
// need the host, and their namespaces are exempt.
var beyond = map[string]api.Level{
	"kube-system/hostpath-provisioner":  api.LevelPrivileged,
	"kube-system/host-access":           api.LevelPrivileged,
	"ingress/traefik":                   api.LevelPrivileged,
	"metallb-system/speaker":            api.LevelPrivileged,
	"container-registry/registry-local": api.LevelPrivileged,
}

// Parameters of manifests: those alone on their lines, and others.
var (
	wholeLine = regexp.MustCompile(`(?m)^\s*\{\{.*\}\}\s*$`)
	inline    = regexp.MustCompile(`\{\{[^}]*\}\}`)
)

// TestPodsOfAddons compares every pod of the core addons with the standards, by Kubernetes' own checks.
func TestPodsOfAddons(t *testing.T) {
	checks, err := standards.NewEvaluator(standards.DefaultChecks(), nil)
	if err != nil {
		t.Fatal(err)
	}
	manifests, err := filepath.Glob("../../addons/core/addons/*/*.yaml")
	if err != nil || len(manifests) < 5 {
		t.Fatal(manifests, err)
	}
	seen := map[string]bool{}
	for _, path := range manifests {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		data = inline.ReplaceAll(wholeLine.ReplaceAll(data, nil), []byte("x"))
		for d := utilyaml.NewYAMLOrJSONDecoder(bytes.NewReader(data), 4096); ; {
			var o struct {
				Kind     string            `json:"kind"`
				Metadata metav1.ObjectMeta `json:"metadata"`
				Spec     struct {
					Template corev1.PodTemplateSpec `json:"template"`
				} `json:"spec"`
			}
			if err := d.Decode(&o); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				continue // an object of another shape
			}
			if !slices.Contains([]string{"Deployment", "DaemonSet", "StatefulSet", "Job"}, o.Kind) {
				continue
			}
			name := o.Metadata.Namespace + "/" + o.Metadata.Name
			seen[name] = true
			level := api.LevelPrivileged
			for _, l := range []api.Level{api.LevelBaseline, api.LevelRestricted} {
				results := checks.EvaluatePod(api.LevelVersion{Level: l, Version: api.LatestVersion()}, &o.Spec.Template.ObjectMeta, &o.Spec.Template.Spec)
				sum := standards.AggregateCheckResults(results)
				if !sum.Allowed {
					t.Logf("%s is beyond %s: %s", name, l, strings.Join(sum.ForbiddenDetails, "; "))
					break
				}
				level = l
			}
			want, ok := beyond[name]
			if !ok {
				want = api.LevelRestricted
			}
			if level != want {
				t.Errorf("%s (%s) is %s, want %s", name, path, level, want)
			}
			if _, exempt := Ours[o.Metadata.Namespace]; level == api.LevelPrivileged && !exempt {
				t.Errorf("%s needs the host, and its namespace is not exempt", name)
			}
		}
	}
	for name := range beyond {
		if !seen[name] {
			t.Errorf("there is no %s", name)
		}
	}
	for name, why := range Ours {
		if page, err := os.ReadFile("../../docs/security.md"); err != nil || !bytes.Contains(page, []byte("| `"+name+"` | "+why+" |")) {
			t.Errorf("docs/security.md does not say why %s is exempt: %v", name, err)
		}
	}
}
