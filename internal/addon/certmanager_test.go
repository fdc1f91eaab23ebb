package addon

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
)

// TestIssuerWebhook: cert-manager is on when its webhook has refused something, and not as long as nobody is asked or it cannot be.
func TestIssuerWebhook(t *testing.T) {
	status := func(code int, reason, message string) string {
		return fmt.Sprintf(`{"apiVersion":"v1","kind":"Status","status":"Failure","code":%d,"reason":%q,"message":%q}`, code, reason, message)
	}
	for name, tc := range map[string]struct {
		code       int
		body, want string
	}{
		"refused by it":     {http.StatusForbidden, status(http.StatusForbidden, "Forbidden", `admission webhook "webhook.cert-manager.io" denied the request: no configured Issuer type`), ""},
		"without a CA":      {http.StatusInternalServerError, status(http.StatusInternalServerError, "InternalError", `failed calling webhook: certificate signed by unknown authority`), "unknown authority"},
		"nobody was asked":  {http.StatusCreated, `{"apiVersion":"cert-manager.io/v1","kind":"Issuer","metadata":{"name":"x"}}`, "does not ask it"},
		"another's refusal": {http.StatusForbidden, status(http.StatusForbidden, "Forbidden", `issuers is forbidden`), "is forbidden"},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method != http.MethodPost || r.URL.Query().Get("dryRun") != "All" {
					t.Errorf("%s %s", r.Method, r.URL)
				}
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(tc.code)
				fmt.Fprint(w, tc.body)
			}))
			defer server.Close()
			client, err := dynamic.NewForConfig(&rest.Config{Host: server.URL})
			if err != nil {
				t.Fatal(err)
			}
			s := &Set{client: client}
			limit := time.Minute
			if tc.want != "" {
				limit = 600 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			err = await(ctx, s.issuerWebhook(), func(string) {})
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

// TestCertManager: enable asks the webhook; with --online every image is the registry's, that of the solver too; that its kinds are to go
// is written down.
func TestCertManager(t *testing.T) {
	s, _ := open(t)
	a, err := s.Find("cert-manager")
	if err != nil {
		t.Fatal(err)
	}
	if !a.Keeps() {
		t.Error("it brings no kinds")
	}
	objects, err := render(a.dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := pull(a, objects); err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for _, o := range objects {
		if _, ok := workloads[o.GetKind()]; ok {
			data, _ := o.MarshalJSON()
			text.Write(data)
		}
	}
	for name, image := range a.Online {
		if !strings.Contains(text.String(), image+`"`) {
			t.Errorf("with --online no %s is %s", name, image)
		}
	}
	if strings.Contains(text.String(), "microk8s.io/cert-manager:") {
		t.Error("with --online an image is of the pack")
	}
	if p := a.part(); p.asks == nil || p.asks(s).name != "the webhook of cert-manager" {
		t.Error("its webhook is not asked")
	}
	record := Record{Name: "cert-manager", removing: true, everything: true}
	if err := s.write(t.Context(), record); err != nil {
		t.Fatal(err)
	}
	o, err := s.records().Get(t.Context(), recordName("cert-manager"), metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if r, err := readRecord(o); err != nil || !r.everything || !r.removing {
		t.Errorf("the record is %+v, %v", r, err)
	}
}
