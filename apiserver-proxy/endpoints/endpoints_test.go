package endpoints

import (
	"context"
	"encoding/json"
	"fmt"
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
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// fakeAPI stands for the two resources of an API server.
type fakeAPI struct {
	mu       sync.Mutex
	slices   []discoveryv1.EndpointSlice
	old      *corev1.Endpoints //nolint:staticcheck // what clusters before 1.34 have
	refuse   int               // status for EndpointSlices, 0 for none
	noWatch  bool              // watches are refused
	fail     bool              // everything is
	silent   bool              // watches say nothing
	lists    int
	watchers []chan metav1.WatchEvent
}

func (f *fakeAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	status := func(code int) {
		f.mu.Unlock()
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		reason := map[int]metav1.StatusReason{403: metav1.StatusReasonForbidden, 404: metav1.StatusReasonNotFound}[code]
		_ = json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Reason: reason, Code: int32(code)})
	}
	watching := r.URL.Query().Get("watch") == "true"
	switch {
	case f.fail:
		status(http.StatusInternalServerError)
	case r.URL.Path == "/api/v1/namespaces/default/endpoints/kubernetes":
		defer f.mu.Unlock()
		w.Header().Set("Content-Type", "application/json")
		f.old.TypeMeta = metav1.TypeMeta{Kind: "Endpoints", APIVersion: "v1"}
		_ = json.NewEncoder(w).Encode(f.old)
	case r.URL.Path != "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices",
		r.URL.Query().Get("labelSelector") != "kubernetes.io/service-name=kubernetes":
		status(http.StatusTeapot)
	case f.refuse != 0:
		status(f.refuse)
	case watching && f.noWatch:
		status(http.StatusForbidden)
	case watching:
		events := make(chan metav1.WatchEvent, 10)
		f.watchers = append(f.watchers, events)
		silent := f.silent
		f.mu.Unlock()
		w.Header().Set("Content-Type", "application/json")
		_ = http.NewResponseController(w).Flush()
		seconds := 0
		_, _ = fmt.Sscan(r.URL.Query().Get("timeoutSeconds"), &seconds)
		end := time.After(time.Duration(seconds) * time.Second)
		if silent {
			end = nil
		}
		for {
			select {
			case <-r.Context().Done():
				return
			case <-end:
				return
			case e := <-events:
				_ = json.NewEncoder(w).Encode(e)
				_ = http.NewResponseController(w).Flush()
			}
		}
	default:
		defer f.mu.Unlock()
		f.lists++
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(discoveryv1.EndpointSliceList{
			TypeMeta: metav1.TypeMeta{Kind: "EndpointSliceList", APIVersion: "discovery.k8s.io/v1"},
			ListMeta: metav1.ListMeta{ResourceVersion: "7"}, Items: f.slices,
		})
	}
}

// set changes the slices; watchers are told with event, unless that is "".
func (f *fakeAPI) set(t *testing.T, event string, s discoveryv1.EndpointSlice) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	s.TypeMeta = metav1.TypeMeta{Kind: "EndpointSlice", APIVersion: "discovery.k8s.io/v1"}
	f.slices = slices.DeleteFunc(f.slices, func(o discoveryv1.EndpointSlice) bool { return o.Name == s.Name })
	if event != "DELETED" {
		f.slices = append(f.slices, s)
	}
	if event == "" {
		return
	}
	e := metav1.WatchEvent{Type: event}
	var err error
	if e.Object.Raw, err = json.Marshal(s); err != nil {
		t.Fatal(err)
	}
	for _, w := range f.watchers {
		w <- e
	}
}

func named(name string, addresses ...string) discoveryv1.EndpointSlice {
	s := slice(discoveryv1.AddressTypeIPv4, 0, addresses...)
	s.Name = name
	return s
}

// follow runs a Source against f; want waits for a list.
func follow(t *testing.T, f *fakeAPI, interval time.Duration) (want func(addresses ...string)) {
	t.Helper()
	api := httptest.NewServer(f)
	path := filepath.Join(t.TempDir(), "kubelet.config")
	text := "apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: '" + api.URL + "'}}]\ncontexts: [{name: c, context: {cluster: c}}]\ncurrent-context: c\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s := &Source{Kubeconfig: path, Interval: interval, Pause: 10 * time.Millisecond, Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan []string, 1000)
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Run(ctx, func(a []string) { got <- a })
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		api.CloseClientConnections()
		api.Close()
	})
	return func(addresses ...string) {
		t.Helper()
		for i, a := range addresses {
			addresses[i] = a + ":16443"
		}
		limit := time.After(time.Minute)
		for {
			select {
			case a := <-got:
				if slices.Equal(a, addresses) {
					return
				}
			case <-limit:
				t.Fatalf("%q never came", addresses)
			}
		}
	}
}

func TestWatch(t *testing.T) {
	f := &fakeAPI{slices: []discoveryv1.EndpointSlice{named("a", "10.0.0.1")}}
	want := follow(t, f, time.Hour)
	want("10.0.0.1")
	f.waitWatch(t, 1)
	f.set(t, "MODIFIED", named("a", "10.0.0.1", "10.0.0.2"))
	want("10.0.0.1", "10.0.0.2")
	f.set(t, "ADDED", named("b", "10.0.0.3"))
	want("10.0.0.1", "10.0.0.2", "10.0.0.3")
	f.set(t, "DELETED", named("a"))
	want("10.0.0.3")
	f.set(t, "DELETED", named("b")) // an empty list is no news
	f.set(t, "ADDED", named("b", "10.0.0.4"))
	want("10.0.0.4")
	if f.lists != 1 {
		t.Errorf("%d lists, want 1", f.lists)
	}
}

func (f *fakeAPI) waitWatch(t *testing.T, n int) {
	t.Helper()
	for limit := time.Now().Add(time.Minute); time.Now().Before(limit); time.Sleep(time.Millisecond) {
		f.mu.Lock()
		have := len(f.watchers)
		f.mu.Unlock()
		if have >= n {
			return
		}
	}
	t.Fatal("nobody watches")
}

func TestSilentWatchIsLateByTheInterval(t *testing.T) {
	f := &fakeAPI{silent: true, slices: []discoveryv1.EndpointSlice{named("a", "10.0.0.1")}}
	want := follow(t, f, 200*time.Millisecond)
	want("10.0.0.1")
	f.waitWatch(t, 1)
	f.set(t, "", named("a", "10.0.0.2"))
	want("10.0.0.2")
}

func TestWatchEndsInError(t *testing.T) {
	f := &fakeAPI{slices: []discoveryv1.EndpointSlice{named("a", "10.0.0.1")}}
	want := follow(t, f, time.Hour)
	want("10.0.0.1")
	f.waitWatch(t, 1)
	f.set(t, "", named("a", "10.0.0.2"))
	gone, err := json.Marshal(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Reason: metav1.StatusReasonExpired, Code: 410})
	if err != nil {
		t.Fatal(err)
	}
	e := metav1.WatchEvent{Type: "ERROR"}
	e.Object.Raw = gone
	f.watchers[0] <- e
	want("10.0.0.2")
}

func TestWithoutWatch(t *testing.T) {
	f := &fakeAPI{noWatch: true, slices: []discoveryv1.EndpointSlice{named("a", "10.0.0.1")}}
	want := follow(t, f, 20*time.Millisecond)
	want("10.0.0.1")
	f.set(t, "", named("a", "10.0.0.2"))
	want("10.0.0.2")
}

func TestFallback(t *testing.T) {
	for _, code := range []int{403, 404} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			old := &corev1.Endpoints{Subsets: []corev1.EndpointSubset{{Addresses: []corev1.EndpointAddress{{IP: "10.0.0.1"}}}}} //nolint:staticcheck // what clusters before 1.34 have
			f := &fakeAPI{refuse: code, old: old}
			want := follow(t, f, 20*time.Millisecond)
			want("10.0.0.1")
			// The cluster is upgraded: EndpointSlices may be read.
			f.mu.Lock()
			f.refuse = 0
			f.mu.Unlock()
			f.set(t, "", named("a", "10.0.0.2"))
			want("10.0.0.2")
		})
	}
}

func TestFailuresPass(t *testing.T) {
	f := &fakeAPI{fail: true}
	want := follow(t, f, 50*time.Millisecond)
	f.set(t, "", named("a", "10.0.0.1"))
	f.mu.Lock()
	f.fail = false
	f.mu.Unlock()
	want("10.0.0.1")
}

func TestKubeconfigIsReadAgain(t *testing.T) {
	f := &fakeAPI{noWatch: true, slices: []discoveryv1.EndpointSlice{named("a", "10.0.0.1")}}
	api := httptest.NewServer(f)
	defer api.Close()
	path := filepath.Join(t.TempDir(), "kubelet.config")
	s := &Source{Kubeconfig: path, Interval: 10 * time.Millisecond, Pause: time.Millisecond, Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan []string, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Run(ctx, func(a []string) {
			select {
			case got <- a:
			default:
			}
		})
	}()
	text := "apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: 'URL'}}]\ncontexts: [{name: c, context: {cluster: c}}]\ncurrent-context: c\n"
	for _, url := range []string{"http://127.0.0.1:1", api.URL} {
		if err := os.WriteFile(path, []byte(strings.Replace(text, "URL", url, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if a := <-got; !slices.Equal(a, []string{"10.0.0.1:16443"}) {
		t.Errorf("%q", a)
	}
	cancel()
	<-done
}
