package kube

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"k8s.io/client-go/rest"
)

// TestSilentServers asks servers that take connections and say nothing, or stop in the middle of
// their answer, and one that is slow and goes on.
func TestSilentServers(t *testing.T) {
	mute, err := net.Listen("tcp", "127.0.0.1:0") // the kernel accepts for it, as for a frozen process
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	over := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "{")
		w.(http.Flusher).Flush()
		switch r.URL.Path {
		case "/half", "/watch":
			select {
			case <-over:
			case <-r.Context().Done():
			}
		default:
			for range 6 {
				time.Sleep(50 * time.Millisecond)
				_, _ = io.WriteString(w, " ")
				w.(http.Flusher).Flush()
			}
		}
	}))
	defer srv.Close()
	defer close(over)
	cfg := &rest.Config{}
	const wait = 200 * time.Millisecond
	bound(cfg, wait, wait)
	client := &http.Client{Transport: cfg.WrapTransport(http.DefaultTransport)}
	for _, tc := range []struct {
		name, method, url string
		silent            bool
	}{
		{"a read", http.MethodGet, "http://" + mute.Addr().String() + "/", true},
		{"a change", http.MethodPost, "http://" + mute.Addr().String() + "/", true},
		{"a watch that does not begin", http.MethodGet, "http://" + mute.Addr().String() + "/?watch=true", true},
		{"half an answer", http.MethodGet, srv.URL + "/half", true},
		{"a slow answer", http.MethodGet, srv.URL + "/slow", false},
	} {
		req, err := http.NewRequestWithContext(t.Context(), tc.method, tc.url, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err == nil {
			_, err = io.ReadAll(resp.Body)
			resp.Body.Close()
		}
		var silent *SilentError
		if errors.As(err, &silent) != tc.silent || !tc.silent && err != nil {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	// A watch that has begun is silent until something happens; its caller ends it.
	ctx, cancel := context.WithTimeout(t.Context(), 3*wait)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, srv.URL+"/watch?watch=true", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var silent *SilentError
	if _, err := io.ReadAll(resp.Body); errors.As(err, &silent) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a watch that has begun: %v", err)
	}
}
