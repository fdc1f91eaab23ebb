// Package podsecurity enforces one of Kubernetes' Pod Security Standards in a cluster, and undoes
// that.
//
// What is enforced is written where Kubernetes looks for it: the label
// pod-security.kubernetes.io/enforce of each namespace, and a mutating admission policy that adds it
// to new ones. So it is in the datastore, holds on all API servers at once, those of nodes that
// join later too, and needs no restart (docs/adr/0024). Labels that somebody else has set are
// left alone; those of this package have a mark.
package podsecurity

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"

	"microk8s/internal/kube"
)

// Levels that can be enforced, the weaker first.
const (
	Baseline   = "baseline"
	Restricted = "restricted"
)

// Levels lists them.
var Levels = []string{Baseline, Restricted}

const (
	// EnforceLabel is Kubernetes' label of a namespace.
	EnforceLabel = "pod-security.kubernetes.io/enforce"
	// MarkLabel is on namespaces whose EnforceLabel this package has set: to the enforced level, or
	// to privileged for those that are exempt.
	MarkLabel = "microk8s.io/pod-security"

	markEnforced = "enforced"
	markExempt   = "exempt"
	privileged   = "privileged"

	// policyName is the name of the admission policy for new namespaces, and of its binding.
	policyName = "pod-security.microk8s.io"
	levelKey   = "microk8s.io/pod-security-level"
)

// Ours are the namespaces whose pods need the host, with what for. They are exempt.
var Ours = map[string]string{
	"kube-system":        "hostpath-storage has the folders of volumes, host-access an address of the host",
	"ingress":            "the ports 80 and 443 of the host",
	"metallb-system":     "the speakers answer for addresses on the host's network",
	"container-registry": "the port of the registry on each node is in the host's network",
}

// Namespace is how one stands.
type Namespace struct {
	Name string `json:"name"`
	// Enforce is the level that is enforced; "" means what the API server's configuration says for
	// namespaces without a label, which is nothing by default.
	Enforce string `json:"enforce"`
	// By is who set it: microk8s, or somebody else ("user"); "" where nothing is set.
	By string `json:"by,omitempty"`
}

// Status is how a cluster stands.
type Status struct {
	// Level is what is enforced, in new namespaces too; "" means nothing.
	Level      string      `json:"level"`
	Namespaces []Namespace `json:"namespaces"`
}

// Violation is what the API server says of a namespace whose pods would not be admitted.
type Violation struct {
	Namespace string   `json:"namespace"`
	Warnings  []string `json:"warnings"`
}

// Plan is what Enforce would do.
type Plan struct {
	Level      string      `json:"level"`
	Enforce    []string    `json:"enforce"`    // namespaces that get the level
	Exempt     []string    `json:"exempt"`     // namespaces that get privileged
	Others     []Namespace `json:"others"`     // namespaces with a label of somebody else's, left alone
	Violations []Violation `json:"violations"` // by pods that run now: they run on, and could not start again
}

// Client works on a cluster. Make it with [New]. Its methods may not be called concurrently.
type Client struct {
	core     *kube.Core
	warnings *warnings
}

// New makes a client of the API server of a configuration, which is copied.
func New(cfg *rest.Config) (*Client, error) {
	w := &warnings{}
	cfg = rest.CopyConfig(cfg)
	cfg.WarningHandler = w
	core, err := kube.New(cfg)
	if err != nil {
		return nil, err
	}
	return &Client{core: core, warnings: w}, nil
}

// warnings collects what the API server warns of.
type warnings struct {
	mu   sync.Mutex
	list []string
}

// HandleWarningHeader implements rest.WarningHandler.
func (w *warnings) HandleWarningHeader(_ int, _, text string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if text != "" && !slices.Contains(w.list, text) {
		w.list = append(w.list, text)
	}
}

// take returns what has come, and forgets it.
func (w *warnings) take() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := w.list
	w.list = nil
	return out
}

const admission = "/apis/admissionregistration.k8s.io/v1/"

// level returns what is enforced in new namespaces, "" for nothing.
func (c *Client) level(ctx context.Context) (string, error) {
	var p admissionv1.MutatingAdmissionPolicy
	data, err := c.core.Get().AbsPath(admission + "mutatingadmissionpolicies/" + policyName).DoRaw(ctx)
	if apierrors.IsNotFound(err) {
		return "", nil
	}
	if err == nil {
		err = json.Unmarshal(data, &p)
	}
	if err != nil {
		return "", fmt.Errorf("cannot read the policy %s: %w", policyName, err)
	}
	return p.Annotations[levelKey], nil
}

func (c *Client) namespaces(ctx context.Context) ([]corev1.Namespace, error) {
	var list corev1.NamespaceList
	if err := c.core.Get().Resource("namespaces").Do(ctx).Into(&list); err != nil {
		return nil, fmt.Errorf("cannot list the namespaces: %w", err)
	}
	return list.Items, nil
}

// Status returns how the cluster stands.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	level, err := c.level(ctx)
	if err != nil {
		return nil, err
	}
	list, err := c.namespaces(ctx)
	if err != nil {
		return nil, err
	}
	s := &Status{Level: level, Namespaces: []Namespace{}}
	for i := range list {
		s.Namespaces = append(s.Namespaces, standing(&list[i]))
	}
	return s, nil
}

func standing(ns *corev1.Namespace) Namespace {
	n := Namespace{Name: ns.Name, Enforce: ns.Labels[EnforceLabel]}
	switch {
	case n.Enforce == "":
	case ns.Labels[MarkLabel] != "":
		n.By = "microk8s"
	default:
		n.By = "user"
	}
	return n
}

// Plan finds out what Enforce of a level would do, and asks the API server, without a change, which
// pods violate it. exempt are further namespaces that are to be exempt.
func (c *Client) Plan(ctx context.Context, level string, exempt []string) (*Plan, error) {
	list, err := c.namespaces(ctx)
	if err != nil {
		return nil, err
	}
	for _, name := range exempt {
		if !slices.ContainsFunc(list, func(n corev1.Namespace) bool { return n.Name == name }) {
			return nil, fmt.Errorf("there is no namespace %s", name)
		}
	}
	p := &Plan{Level: level, Enforce: []string{}, Exempt: []string{}, Others: []Namespace{}, Violations: []Violation{}}
	for i := range list {
		ns := &list[i]
		_, ours := Ours[ns.Name]
		switch now := standing(ns); {
		case slices.Contains(exempt, ns.Name), ours && now.By != "user", ns.Labels[MarkLabel] == markExempt:
			p.Exempt = append(p.Exempt, ns.Name)
		case now.By == "user":
			p.Others = append(p.Others, now)
		default:
			p.Enforce = append(p.Enforce, ns.Name)
			c.warnings.take()
			if err := c.label(ctx, ns.Name, level, markEnforced, true); err != nil {
				return nil, err
			}
			if said := c.warnings.take(); len(said) > 0 {
				p.Violations = append(p.Violations, Violation{ns.Name, said})
			}
		}
	}
	return p, nil
}

// label sets both labels of a namespace, or removes them where they are "".
func (c *Client) label(ctx context.Context, name, level, mark string, dry bool) error {
	value := func(s string) any {
		if s == "" {
			return nil
		}
		return s
	}
	body, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": map[string]any{EnforceLabel: value(level), MarkLabel: value(mark)}}})
	if err != nil {
		return err
	}
	req := c.core.Patch(types.MergePatchType).Resource("namespaces").Name(name).Body(body)
	if dry {
		req = req.Param("dryRun", metav1.DryRunAll)
	}
	if err := req.Do(ctx).Error(); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("cannot label the namespace %s: %w", name, err)
	}
	return nil
}

// Enforce carries a plan out. It can be run again after an interruption.
func (c *Client) Enforce(ctx context.Context, p *Plan) error {
	defer c.warnings.take()
	for _, name := range p.Exempt {
		if err := c.label(ctx, name, privileged, markExempt, false); err != nil {
			return err
		}
	}
	// New namespaces first: none is made between the two that has no label.
	if err := c.put(ctx, "mutatingadmissionpolicies", policy(p.Level)); err != nil {
		return err
	}
	if err := c.put(ctx, "mutatingadmissionpolicybindings", binding()); err != nil {
		return err
	}
	if err := c.inForce(ctx, p.Level); err != nil {
		return err
	}
	for _, name := range p.Enforce {
		if err := c.label(ctx, name, p.Level, markEnforced, false); err != nil {
			return err
		}
	}
	return nil
}

// forceWait bounds the wait for a policy, which an API server learns of by a watch of its own.
const forceWait = 30 * time.Second

// inForce waits until a new namespace would get the level. Nothing says so but the answer to a call.
func (c *Client) inForce(ctx context.Context, level string) error {
	err := wait.PollUntilContextTimeout(ctx, 100*time.Millisecond, forceWait, true, func(ctx context.Context) (bool, error) {
		var made corev1.Namespace
		err := c.core.Post().Resource("namespaces").Param("dryRun", metav1.DryRunAll).
			Body(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "microk8s-pod-security-check"}}).Do(ctx).Into(&made)
		return made.Labels[EnforceLabel] == level, err
	})
	if err != nil {
		return fmt.Errorf("the policy %s for new namespaces is not in force: %w", policyName, err)
	}
	return nil
}

// Relax undoes what Enforce has done. Labels of others stay. It returns the namespaces that were
// changed.
func (c *Client) Relax(ctx context.Context) (changed []string, err error) {
	for _, resource := range []string{"mutatingadmissionpolicybindings", "mutatingadmissionpolicies"} {
		err := c.core.Delete().AbsPath(admission + resource + "/" + policyName).Do(ctx).Error()
		if err != nil && !apierrors.IsNotFound(err) {
			return nil, fmt.Errorf("cannot delete the policy %s: %w", policyName, err)
		}
	}
	list, err := c.namespaces(ctx)
	if err != nil {
		return nil, err
	}
	for i := range list {
		if list[i].Labels[MarkLabel] == "" {
			continue
		}
		if err := c.label(ctx, list[i].Name, "", "", false); err != nil {
			return changed, err
		}
		changed = append(changed, list[i].Name)
	}
	return changed, nil
}

// put makes an object of the admission API what it should be.
func (c *Client) put(ctx context.Context, resource string, object any) error {
	body, err := json.Marshal(object)
	if err != nil {
		return err
	}
	err = c.core.Patch(types.ApplyPatchType).AbsPath(admission+resource+"/"+policyName).
		Param("fieldManager", "microk8s").Param("force", "true").
		SetHeader("Content-Type", string(types.ApplyPatchType)).Body(bytes.NewReader(body)).Do(ctx).Error()
	if err != nil {
		return fmt.Errorf("cannot write the policy %s: %w", policyName, err)
	}
	return nil
}

// policy is the one that labels new namespaces. One whose maker has set the label is left alone.
func policy(level string) *admissionv1.MutatingAdmissionPolicy {
	fail := admissionv1.Fail
	path := func(label string) string { return `"/metadata/labels/" + jsonpatch.escapeKey("` + label + `")` }
	// The namespaces of our addons may be made later, too.
	ours := `object.metadata.name in ["` + strings.Join(slices.Sorted(maps.Keys(Ours)), `", "`) + `"]`
	either := func(exempt, other string) string { return `(` + ours + ` ? "` + exempt + `" : "` + other + `")` }
	expression := strings.Join([]string{
		`(has(object.metadata.labels) ? [] : [JSONPatch{op: "add", path: "/metadata/labels", value: {}}]) + [`,
		`JSONPatch{op: "add", path: ` + path(EnforceLabel) + `, value: ` + either(privileged, level) + `},`,
		`JSONPatch{op: "add", path: ` + path(MarkLabel) + `, value: ` + either(markExempt, markEnforced) + `}]`,
	}, "\n")
	return &admissionv1.MutatingAdmissionPolicy{
		TypeMeta:   metav1.TypeMeta{APIVersion: "admissionregistration.k8s.io/v1", Kind: "MutatingAdmissionPolicy"},
		ObjectMeta: metav1.ObjectMeta{Name: policyName, Annotations: map[string]string{levelKey: level}},
		Spec: admissionv1.MutatingAdmissionPolicySpec{
			FailurePolicy: &fail,
			MatchConstraints: &admissionv1.MatchResources{ResourceRules: []admissionv1.NamedRuleWithOperations{{
				RuleWithOperations: admissionv1.RuleWithOperations{
					Operations: []admissionv1.OperationType{admissionv1.Create},
					Rule:       admissionv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"namespaces"}},
				},
			}}},
			MatchConditions: []admissionv1.MatchCondition{{
				Name:       "without-label",
				Expression: `!has(object.metadata.labels) || !("` + EnforceLabel + `" in object.metadata.labels)`,
			}},
			ReinvocationPolicy: admissionv1.NeverReinvocationPolicy,
			Mutations: []admissionv1.Mutation{{
				PatchType: admissionv1.PatchTypeJSONPatch,
				JSONPatch: &admissionv1.JSONPatch{Expression: expression},
			}},
		},
	}
}

func binding() *admissionv1.MutatingAdmissionPolicyBinding {
	return &admissionv1.MutatingAdmissionPolicyBinding{
		TypeMeta:   metav1.TypeMeta{APIVersion: "admissionregistration.k8s.io/v1", Kind: "MutatingAdmissionPolicyBinding"},
		ObjectMeta: metav1.ObjectMeta{Name: policyName},
		Spec:       admissionv1.MutatingAdmissionPolicyBindingSpec{PolicyName: policyName},
	}
}
