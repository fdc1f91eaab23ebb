package suite

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"

	"microk8s/cluster-agent/api"
	"microk8s/internal/token"
	"microk8s/internal/tokenstore"
)

// TestWorkerGolden plays root on a worker of the cluster: each credential on its disk with each call of
// a control-plane node's agent. What it may is in testdata/worker-calls.golden, one line for each
// pair; a call that is allowed and not in it is a hole, or needs a reason in docs/security.md.
func TestWorkerGolden(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.write(s.env.HostPath("capi/etc/token"), "a provider's\n")
	spent := s.add(tokenstore.Options{Worker: true}).Reveal()
	s.joined(from{}, request(spent, "w2", true))
	sign := func(suffix string, name pkix.Name, dns ...string) *x509.Certificate {
		t.Helper()
		cert, status, e := s.sign(spent+suffix, csr(t, name, dns))
		if status != http.StatusOK {
			t.Fatalf("%d %s", status, e.Message)
		}
		return cert
	}
	proxy := sign(api.SuffixProxy, pkix.Name{CommonName: "system:kube-proxy"})
	kubelet := sign(api.SuffixKubelet, kubeletName("w2"), "w2")
	if status, e := s.finish(api.PathConfirm, spent, "w2"); status != http.StatusOK {
		t.Fatalf("%d %s", status, e.Message)
	}
	own := s.secret("w2")
	known := append(s.secretValues(), []byte("x")) // a pod of an addon may read Secrets
	type credential struct {
		name, secret string
		cert         *x509.Certificate
	}
	credentials := []credential{
		{"nothing", "", nil}, {"the kubelet's certificate", "", kubelet}, {"the proxy's certificate", "", proxy},
		{"the callback secret", own, nil}, {"the callback secret and the kubelet's certificate", own, kubelet}, {"the join token", spent, kubelet},
	}
	for i, value := range known {
		credentials = append(credentials, credential{fmt.Sprintf("Secret %d of the API, for this node", i), token.Callback(value, "control-plane", "n1", ""), kubelet})
	}
	calls := []struct {
		name, path string
		body       func(secret string) any
	}{
		{"proof", api.PathProof, func(string) any {
			return api.ProofRequest{ID: strings.Repeat("00", token.IDSize), Nonce: token.Nonce()}
		}},
		{"preflight", api.PathPreflight, func(s string) any { return api.PreflightRequest{JoinRequest: request(s, "w3", true)} }},
		{"join as a worker", api.PathJoin, func(s string) any { return request(s, "w3", true) }},
		{"join as this worker again", api.PathJoin, func(s string) any { return request(s, "w2", true) }},
		{"join as a control plane node", api.PathJoin, func(s string) any { return request(s, "n3", false) }},
		{"sign-cert for itself", api.PathSignCert, func(s string) any {
			return api.SignRequest{Token: s + api.SuffixKubelet, Request: csr(t, kubeletName("w2"), nil)}
		}},
		{"sign-cert for another", api.PathSignCert, func(s string) any {
			return api.SignRequest{Token: s + api.SuffixKubelet, Request: csr(t, kubeletName("n1"), nil)}
		}},
		{"confirm itself", api.PathConfirm, func(s string) any { return api.ConfirmRequest{Token: s, Hostname: "w2"} }},
		{"confirm another", api.PathConfirm, func(s string) any { return api.ConfirmRequest{Token: s, Hostname: "w1"} }},
		{"release itself", api.PathRelease, func(s string) any { return api.ConfirmRequest{Token: s, Hostname: "w2"} }},
		{"release another", api.PathRelease, func(s string) any { return api.ConfirmRequest{Token: s, Hostname: "w1"} }},
		{"renew", api.PathRenew, func(string) any {
			return api.RenewRequest{Kubelet: csr(t, kubeletName("w2"), []string{"w2"}), Secrets: 2}
		}},
		{"renew another", api.PathRenew, func(string) any { return api.RenewRequest{Kubelet: csr(t, kubeletName("w1"), nil)} }},
		{"configure", api.PathConfigure, func(s string) any {
			return api.ConfigureRequest{Callback: s, Services: []api.ConfigureService{{Name: "kubelet", Restart: true}}}
		}},
		{"image/import", api.PathImageImport, func(string) any { return "an archive" }},
		{"certificates", api.PathCerts, func(string) any { return struct{}{} }},
		{"dqlite/remove", api.PathDqliteRemove, func(string) any { return api.RemoveRequest{Endpoint: here + ":19001"} }},
	}
	var lines []string
	for _, call := range calls {
		for _, c := range credentials {
			f := from{cert: c.cert, header: map[string]string{api.HeaderCallback: c.secret, api.HeaderCAPI: c.secret, "Authorization": "Bearer " + c.secret}}
			status, answer, _ := s.call(f, call.path, call.body(c.secret))
			if status != http.StatusOK {
				continue
			}
			lines = append(lines, fmt.Sprintf("%s | %s | %s", call.name, c.name, strings.Join(told(t, answer), " ")))
			if bytes.Contains(answer, []byte("PRIVATE KEY")) {
				t.Errorf("%s with %s tells a key", call.name, c.name)
			}
		}
	}
	s.nothingDone()
	slices.Sort(lines)
	got := strings.Join(lines, "\n") + "\n"
	want, err := os.ReadFile("testdata/worker-calls.golden")
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("a worker may:\n%s\nand testdata/worker-calls.golden has:\n%s", got, want)
	}
}

// told lists what an answer holds, without the values.
func told(t *testing.T, answer []byte) (keys []string) {
	t.Helper()
	var values map[string]any
	if err := json.Unmarshal(answer, &values); err != nil {
		t.Fatalf("%s: %v", answer, err)
	}
	for key, value := range values {
		if value != "" && value != nil {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}
