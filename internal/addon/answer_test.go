package addon

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

func anObject(text map[string]any) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: text}
}

func serviceAt(port int, protocol string) map[string]any {
	return map[string]any{"apiVersion": "v1", "kind": "Service", "metadata": map[string]any{"name": "it", "namespace": "ns"},
		"spec": map[string]any{"clusterIP": "127.0.0.1", "ports": []any{map[string]any{"port": int64(port), "protocol": protocol}}}}
}

func portOf(t *testing.T, address string) int {
	t.Helper()
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestAnswers holds what is waited for before an addon is called enabled, and what is said of what does
// not answer.
func TestAnswers(t *testing.T) {
	open1, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer open1.Close()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	var calls atomic.Int32
	registry := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v2/" || calls.Add(1) < 3 {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	defer registry.Close()
	broken := httptest.NewServer(http.NotFoundHandler())
	defer broken.Close()
	hosting := func(server string) map[string]any {
		return map[string]any{"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]any{"name": "local-registry-hosting", "namespace": "kube-public"},
			"data": map[string]any{"localRegistryHosting.v1": "host: \"" + strings.TrimPrefix(server, "http://") + "\"\n"}}
	}
	apiService := func(status, reason string) map[string]any {
		return map[string]any{"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": map[string]any{"name": "v1.x"},
			"status": map[string]any{"conditions": []any{map[string]any{"type": "Available", "status": status, "reason": reason, "message": "no endpoints"}}}}
	}
	for _, tc := range []struct {
		name   string
		path   string // of the object as the API server has it
		object map[string]any
		want   string // of the error, "" is none
	}{
		{"a Service", "v1/namespaces/ns/services/it", serviceAt(portOf(t, open1.Addr().String()), "TCP"), ""},
		{"a Service that refuses", "v1/namespaces/ns/services/it", serviceAt(portOf(t, closed.Addr().String()), "TCP"), closed.Addr().String() + " does not answer: connect: connection refused"},
		{"a registry that starts", "", hosting(registry.URL), ""},
		{"a registry that is none", "", hosting(broken.URL), "does not answer: GET /v2/: 404 Not Found"},
		{"an extension of the API", "apiregistration.k8s.io/v1/apiservices/v1.x", apiService("True", "Passed"), ""},
		{"one that is not available", "apiregistration.k8s.io/v1/apiservices/v1.x", apiService("False", "MissingEndpoints"), "the API v1.x does not answer: MissingEndpoints: no endpoints"},
		{"a name server that is silent", "v1/namespaces/ns/services/it", serviceAt(53, "UDP"), "the name server 127.0.0.1:53 does not answer"},
		{"another kind", "", map[string]any{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": map[string]any{"name": "x"}}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, f := open(t)
			if tc.path != "" {
				f.Set(tc.object)
			}
			limit := time.Minute
			if tc.want != "" {
				limit = 600 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			err := s.Answers(ctx, Applied{Objects: []*unstructured.Unstructured{anObject(tc.object)}}, "n1", func(string) {})
			var mute *NoAnswerError
			switch {
			case tc.want == "" && err != nil:
				t.Error(err)
			case tc.want != "" && (!errors.As(err, &mute) || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
}

// TestLeftover holds that a disable says what still ends.
func TestLeftover(t *testing.T) {
	s, f := open(t)
	f.Set(map[string]any{"apiVersion": "apps/v1", "kind": "Deployment",
		"metadata": map[string]any{"name": "web", "namespace": "ns", "labels": map[string]any{Label: "x"}},
		"spec":     map[string]any{"selector": map[string]any{"matchLabels": map[string]any{"app": "web"}}}})
	f.Set(map[string]any{"apiVersion": "v1", "kind": "Namespace",
		"metadata": map[string]any{"name": "ns", "labels": map[string]any{Label: "x"}}})
	const pod = "v1/namespaces/ns/pods/web-1"
	f.Set(map[string]any{"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": "web-1", "namespace": "ns", "labels": map[string]any{"app": "web"}}})
	left, err := s.Leftover(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	f.Remove("apps/v1/namespaces/ns/deployments/web")
	f.Edit("v1/namespaces/ns", func(o map[string]any) { o["metadata"].(map[string]any)["deletionTimestamp"] = "2026-11-28T00:00:00Z" })
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if got := left.Gone(ctx); !slices.Equal(got, []string{"pod ns/web-1", "namespace ns"}) {
		t.Errorf("still there: %q", got)
	}
	f.Remove(pod)
	f.Remove("v1/namespaces/ns")
	if got := left.Gone(t.Context()); got != nil {
		t.Errorf("still there: %q", got)
	}
}

// A Service of one family has its node port at the node's addresses of that family only.
func TestNodePortsOfAFamily(t *testing.T) {
	for _, tc := range []struct {
		families []any
		want     string
	}{
		{[]any{"IPv4"}, "10.152.183.5:5000 10.0.0.1:32000"},
		{[]any{"IPv6"}, "10.152.183.5:5000 [fd00::1]:32000"},
		{[]any{"IPv4", "IPv6"}, "10.152.183.5:5000 10.0.0.1:32000 [fd00::1]:32000"},
		{nil, "10.152.183.5:5000 10.0.0.1:32000 [fd00::1]:32000"},
	} {
		spec := map[string]any{"clusterIP": "10.152.183.5", "ports": []any{map[string]any{"port": int64(5000), "nodePort": int64(32000)}}}
		if tc.families != nil {
			spec["ipFamilies"] = tc.families
		}
		var got []string
		for _, q := range serviceQuestions(&unstructured.Unstructured{Object: map[string]any{"spec": spec}}, []string{"10.0.0.1", "fd00::1"}, Applied{}) {
			got = append(got, q.name)
		}
		if strings.Join(got, " ") != tc.want {
			t.Errorf("%v: %q, want %q", tc.families, got, tc.want)
		}
	}
}
