package ingresssecrets

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// The API server behind the program is a fake that records what it is asked. With a real one, and
// the rights of the addon, the program runs in cmd/kubelite/daemons.
type apiServer struct {
	mu    sync.Mutex
	asked []string
}

func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	a.asked = append(a.asked, fmt.Sprintf("%s %s %s", r.Method, r.URL.RequestURI(), r.Header.Get("Authorization")))
	a.mu.Unlock()
	if r.URL.Query().Get("watch") == "true" {
		_, _ = io.WriteString(w, "first\n")
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
		return
	}
	w.WriteHeader(http.StatusTeapot)
	_, _ = io.Copy(w, r.Body)
}

// site is the program with its fake API server.
func site(t *testing.T, file string) (*Server, *apiServer, string) {
	t.Helper()
	api := &apiServer{}
	upstream := httptest.NewServer(api)
	t.Cleanup(upstream.Close)
	s, err := New(&rest.Config{Host: upstream.URL, BearerTokenFile: file}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	front := httptest.NewServer(s)
	t.Cleanup(func() {
		front.CloseClientConnections()
		front.Close()
	})
	return s, api, front.URL
}

func tokenFile(t *testing.T, token string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func ask(t *testing.T, method, url, token, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(data)
}

func tlsSecret(ns, name, data string) *corev1.Secret {
	return &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, ResourceVersion: "77", ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "x"}}},
		Type:       corev1.SecretTypeTLS, Data: map[string][]byte{"tls.crt": []byte(data)},
	}
}

// Traefik's informer, which is client-go's, sees what the feed has, and what changes.
func TestInformer(t *testing.T) {
	s, _, url := site(t, tokenFile(t, "own"))
	s.feed.set(tlsSecret("a", "first", "1"))
	client, err := kubernetes.NewForConfig(&rest.Config{Host: url, BearerToken: "own"})
	if err != nil {
		t.Fatal(err)
	}
	factory := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTweakListOptions(func(o *metav1.ListOptions) {
		o.LabelSelector = "owner!=helm" // Traefik's
	}))
	lister := factory.Core().V1().Secrets().Lister()
	informer := factory.Core().V1().Secrets().Informer()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	factory.StartWithContext(ctx)
	if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		t.Fatal("no sync")
	}
	await := func(want string) {
		t.Helper()
		got := ""
		for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
			var all []string
			for _, o := range informer.GetStore().List() {
				s := o.(*corev1.Secret)
				all = append(all, s.Namespace+"/"+s.Name+"="+string(s.Data["tls.crt"]))
			}
			slices.Sort(all)
			if got = strings.Join(all, " "); got == want {
				return
			}
		}
		t.Fatalf("the informer has %q, want %q", got, want)
	}
	await("a/first=1")
	s.feed.set(tlsSecret("b", "second", "1"))
	await("a/first=1 b/second=1")
	s.feed.set(tlsSecret("a", "first", "2"))
	await("a/first=2 b/second=1")
	helm := tlsSecret("b", "second", "1")
	helm.Labels = map[string]string{"owner": "helm"}
	s.feed.set(helm)
	await("a/first=2")
	s.feed.set(tlsSecret("b", "second", "3"))
	await("a/first=2 b/second=3")
	s.feed.remove("a/first")
	s.feed.remove("a/never")
	await("b/second=3")
	if _, err := lister.Secrets("b").Get("second"); err != nil {
		t.Error(err)
	}
}

// A watch that lags too far behind, or is of an earlier run, is told to list again.
func TestWatchThatIsTooOld(t *testing.T) {
	s, _, url := site(t, tokenFile(t, "own"))
	start := s.feed.version
	for i := range keptEvents + 10 {
		s.feed.set(tlsSecret("a", "s", fmt.Sprint(i)))
	}
	for _, version := range []int64{1, start, start + 9, s.feed.version + 1} {
		status, body := ask(t, "GET", fmt.Sprintf("%s/api/v1/secrets?watch=1&resourceVersion=%d", url, version), "own", "")
		if status != http.StatusOK || !strings.Contains(body, `"reason":"Expired"`) {
			t.Errorf("version %d: %d, %s", version-start, status, body)
		}
	}
	_, body := ask(t, "GET", fmt.Sprintf("%s/api/v1/secrets?watch=1&timeoutSeconds=1&resourceVersion=%d", url, start+10), "own", "")
	if n := strings.Count(body, `"type":"MODIFIED"`); n != keptEvents {
		t.Errorf("%d events, want %d", n, keptEvents)
	}
}

func TestListNamesNothingElse(t *testing.T) {
	s, _, url := site(t, tokenFile(t, "own"))
	s.feed.set(tlsSecret("a", "s", "1"))
	_, body := ask(t, "GET", url+"/api/v1/secrets", "own", "")
	var list corev1.SecretList
	if err := json.Unmarshal([]byte(body), &list); err != nil {
		t.Fatal(err)
	}
	if list.Kind != "SecretList" || len(list.Items) != 1 || list.Items[0].ResourceVersion == "77" || len(list.Items[0].ManagedFields) > 0 {
		t.Errorf("%s", body)
	}
	if status, _ := ask(t, "GET", url+"/api/v1/secrets?labelSelector=,,", "own", ""); status != http.StatusBadRequest {
		t.Errorf("a bad selector: %d", status)
	}
}

func TestOnlyWithThePodsToken(t *testing.T) {
	file := tokenFile(t, "first\n")
	_, api, url := site(t, file)
	for _, path := range []string{"/api/v1/secrets", "/api/v1/services", "/"} {
		for _, token := range []string{"", "other", "firs", "firstx"} {
			if status, _ := ask(t, "GET", url+path, token, ""); status != http.StatusUnauthorized {
				t.Errorf("%s with %q: %d", path, token, status)
			}
		}
	}
	if len(api.asked) > 0 {
		t.Errorf("the API server was asked: %q", api.asked)
	}
	if status, _ := ask(t, "GET", url+"/api/v1/secrets", "first", ""); status != http.StatusOK {
		t.Errorf("the pod's own: %d", status)
	}
	if err := os.WriteFile(file, []byte("second"), 0o600); err != nil {
		t.Fatal(err)
	}
	for token, want := range map[string]int{"second": http.StatusOK, "first": http.StatusOK, "third": http.StatusUnauthorized} {
		if status, _ := ask(t, "GET", url+"/api/v1/secrets", token, ""); status != want {
			t.Errorf("after the token was replaced, %s: %d, want %d", token, status, want)
		}
	}
}

func TestOtherRequestsAreHandedOn(t *testing.T) {
	_, api, url := site(t, tokenFile(t, "own"))
	const path = "/apis/networking.k8s.io/v1/namespaces/a/ingresses/i/status?fieldManager=x&a=b%2Fc"
	if status, body := ask(t, "PUT", url+path, "own", "hello"); status != http.StatusTeapot || body != "hello" {
		t.Errorf("%d, %q", status, body)
	}
	if status, _ := ask(t, "POST", url+"/api/v1/secrets", "own", ""); status != http.StatusTeapot {
		t.Errorf("a creation: %d", status)
	}
	want := []string{"PUT " + path + " Bearer own", "POST /api/v1/secrets Bearer own"}
	if !slices.Equal(api.asked, want) {
		t.Errorf("the API server was asked %q, want %q", api.asked, want)
	}

	req, err := http.NewRequestWithContext(t.Context(), "GET", url+"/api/v1/services?watch=true", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer own")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if line, err := bufio.NewReader(resp.Body).ReadString('\n'); err != nil || line != "first\n" {
		t.Errorf("the first event of a watch: %q, %v", line, err)
	}
}
