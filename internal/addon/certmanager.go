package addon

import (
	"context"
	"errors"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

var issuers = schema.GroupVersionResource{Group: "cert-manager.io", Version: "v1", Resource: "issuers"}

// issuerWebhook asks for an issuer of no kind, as a dry run. cert-manager's webhook refuses it, and nobody else does: its refusal
// is the answer that is waited for. Without it, the API server asks nobody yet, or an object of people's would fail.
func (s *Set) issuerWebhook() question {
	return question{name: "the webhook of cert-manager", ask: func(ctx context.Context) error {
		o := &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": "cert-manager.io/v1", "kind": "Issuer",
			"metadata": map[string]any{"generateName": "microk8s-question-"}, "spec": map[string]any{},
		}}
		_, err := s.client.Resource(issuers).Namespace("cert-manager").Create(ctx, o, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		switch {
		case err == nil:
			return errors.New("the API server does not ask it")
		case apierrors.IsForbidden(err) && strings.Contains(err.Error(), "denied the request"):
			return nil
		}
		return err
	}}
}
