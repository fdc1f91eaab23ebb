package cis

import (
	"testing"

	auditinternal "k8s.io/apiserver/pkg/apis/audit"
	"k8s.io/apiserver/pkg/audit/policy"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
)

// TestAuditPolicy asks Kubernetes' own evaluator what the shipped policy writes of a request.
func TestAuditPolicy(t *testing.T) {
	p, err := policy.LoadPolicyFromFile("../../snap/local/default-args/audit-policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	levels := policy.NewPolicyRuleEvaluator(p)
	person := &user.DefaultInfo{Name: "ann", Groups: []string{"people", user.AllAuthenticated}}
	account := func(name string) *user.DefaultInfo {
		return &user.DefaultInfo{Name: "system:serviceaccount:kube-system:" + name, Groups: []string{"system:serviceaccounts", "system:serviceaccounts:kube-system", user.AllAuthenticated}}
	}
	kubelet := &user.DefaultInfo{Name: "system:node:w1", Groups: []string{user.NodesGroup, user.AllAuthenticated}}
	none, metadata, request := auditinternal.LevelNone, auditinternal.LevelMetadata, auditinternal.LevelRequest
	for _, c := range []struct {
		who                        user.Info
		verb, group, resource, sub string
		want                       auditinternal.Level
	}{
		// Machinery that tells an auditor nothing.
		{kubelet, "update", "coordination.k8s.io", "leases", "", none},
		{kubelet, "patch", "", "nodes", "status", none},
		{kubelet, "patch", "", "pods", "status", none},
		{kubelet, "watch", "", "pods", "", none},
		{account("endpointslice-controller"), "update", "discovery.k8s.io", "endpointslices", "", none},
		{account("deployment-controller"), "update", "apps", "deployments", "status", none},
		{account("replicaset-controller"), "update", "apps", "replicasets", "status", none},
		{account("job-controller"), "patch", "batch", "jobs", "status", none},
		{&user.DefaultInfo{Name: user.KubeScheduler}, "patch", "", "pods", "status", none},
		{person, "create", "", "events", "", none},
		// What it does about them, it says.
		{account("deployment-controller"), "create", "apps", "replicasets", "", metadata},
		{account("replicaset-controller"), "create", "", "pods", "", metadata},
		{account("namespace-controller"), "deletecollection", "", "pods", "", metadata},
		{account("node-controller"), "patch", "", "nodes", "", metadata},
		{&user.DefaultInfo{Name: user.KubeScheduler}, "create", "", "pods", "binding", metadata},
		// Status is somebody's word elsewhere: the address of a Service, a node's by others than its kubelet.
		{account("x"), "update", "", "services", "status", metadata},
		{account("x"), "update", "", "nodes", "status", metadata},
		{person, "update", "apps", "deployments", "status", metadata},
		// Secrets: who read them, and never what is in them.
		{person, "get", "", "secrets", "", metadata},
		{kubelet, "get", "", "secrets", "", metadata},
		{account("x"), "list", "", "secrets", "", metadata},
		{account("x"), "create", "", "serviceaccounts", "token", metadata},
		{person, "update", "", "configmaps", "", metadata},
		{person, "create", "", "secrets", "", metadata},
		{kubelet, "create", "authentication.k8s.io", "tokenreviews", "", metadata},
		// Rights, with their content.
		{person, "create", "rbac.authorization.k8s.io", "clusterrolebindings", "", request},
		{account("x"), "create", "rbac.authorization.k8s.io", "clusterrolebindings", "", request},
		{account("x"), "update", "admissionregistration.k8s.io", "validatingwebhookconfigurations", "", request},
		// Commands in pods.
		{person, "get", "", "pods", "exec", metadata},
		{person, "create", "", "nodes", "proxy", metadata},
	} {
		got := levels.EvaluatePolicyRule(authorizer.AttributesRecord{
			User: c.who, Verb: c.verb, APIGroup: c.group, APIVersion: "v1", Resource: c.resource, Subresource: c.sub, ResourceRequest: true, Name: "x", Namespace: "default",
		})
		if got.Level != c.want {
			t.Errorf("%s %s %s.%s/%s: level %s, want %s", c.who.GetName(), c.verb, c.resource, c.group, c.sub, got.Level, c.want)
		}
	}
}
