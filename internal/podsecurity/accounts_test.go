package podsecurity

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
)

// everywhere are rights that an account may have in the whole cluster although its pods run on workers, whose root
// has its token. What changes something is held by a policy, which TestAdmission tries, or harms nobody.
var everywhere = []string{
	"create events", "patch events", "update events",
	"update ingresses/status",                            // the address that people see
	"create tokenreviews", "create subjectaccessreviews", // questions
	"create persistentvolumes", "delete persistentvolumes", // hostpath.microk8s.io
	"update persistentvolumeclaims",                     // hostpath-claims.microk8s.io
	"* servicel2statuses", "* servicel2statuses/status", // who announces what, for people
	"get nodes/metrics", // counters
}

const controlPlane = "node.kubernetes.io/microk8s-controlplane"

// TestAccountsOnWorkers: what an addon's account may change in the whole cluster, root on any worker may, if the account's
// pods can be there. Others run on control-plane nodes only.
func TestAccountsOnWorkers(t *testing.T) {
	manifests, err := filepath.Glob("../../addons/core/addons/*/*.yaml")
	if err != nil || len(manifests) < 5 {
		t.Fatal(manifests, err)
	}
	roles := map[string][]rbacv1.PolicyRule{} // by name
	granted := map[string][]string{}          // roles, by account
	workers := map[string]string{}            // accounts whose pods may be on a worker, with one of them
	for _, path := range manifests {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		data = inline.ReplaceAll(wholeLine.ReplaceAll(data, nil), []byte("x"))
		for d := utilyaml.NewYAMLOrJSONDecoder(bytes.NewReader(data), 4096); ; {
			var o struct {
				Kind     string              `json:"kind"`
				Metadata metav1.ObjectMeta   `json:"metadata"`
				Rules    []rbacv1.PolicyRule `json:"rules"`
				RoleRef  rbacv1.RoleRef      `json:"roleRef"`
				Subjects []rbacv1.Subject    `json:"subjects"`
				Spec     struct {
					Template corev1.PodTemplateSpec `json:"template"`
				} `json:"spec"`
			}
			if err := d.Decode(&o); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				continue // an object of another shape
			}
			switch o.Kind {
			case "ClusterRole":
				roles[o.Metadata.Name] = o.Rules
			case "ClusterRoleBinding":
				for _, s := range o.Subjects {
					account := s.Namespace + "/" + s.Name
					granted[account] = append(granted[account], o.RoleRef.Name)
				}
			case "Deployment", "DaemonSet", "StatefulSet", "Job":
				pod := o.Spec.Template.Spec
				if pod.NodeSelector[controlPlane] == "" {
					workers[o.Metadata.Namespace+"/"+pod.ServiceAccountName] = o.Metadata.Name
				}
			}
		}
	}
	looked := 0
	for account, pod := range workers {
		for _, role := range granted[account] {
			rules, ok := roles[role]
			if !ok && !strings.HasPrefix(role, "system:") {
				t.Errorf("%s has the role %s, which is not there", account, role)
			}
			for _, rule := range rules {
				for _, resource := range rule.Resources {
					for _, verb := range rule.Verbs {
						looked++
						reads := slices.Contains([]string{"get", "list", "watch"}, verb) && !slices.Contains([]string{"secrets", "configmaps", "*"}, resource) && !strings.Contains(resource, "/")
						if right := verb + " " + resource; !reads && !slices.Contains(everywhere, right) {
							t.Errorf("%s may %s in the whole cluster, and its pod %s may be on a worker", account, right, pod)
						}
					}
				}
			}
		}
	}
	if looked < 20 {
		t.Errorf("%d rights were looked at: the manifests are not understood", looked)
	}
}
