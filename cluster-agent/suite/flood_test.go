package suite

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/callback"
	"microk8s/cluster-agent/limit"
	"microk8s/cluster-agent/suite/flood"
)

// TestFlood loads the real program from fifty sources. Its memory stays below 64 MB, and honest
// calls are answered. How fast is a figure of the bench.
func TestFlood(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "cluster-agent")
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-buildvcs=false", "-tags", "nosqlite3", "-o", program, "microk8s/cmd/cluster-agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // as it is shipped, and not with the race detector
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("cannot build the agent: %v\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	agent, err := flood.Start(ctx, program, filepath.Join(dir, "node"))
	if err != nil {
		t.Fatal(err)
	}
	defer agent.Stop()
	r, err := flood.Run(ctx, agent, 50, 8*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d tries of 50 sources; %d honest calls, %d failed, median %v (%v before), slowest %v; memory %d kB before, %d kB at the peak",
		r.Tries, r.Honest, len(r.Failed), r.Median, r.Before, r.Peak, r.Idle>>10, r.Most>>10)
	if len(r.Failed) > 0 {
		t.Errorf("%d of %d honest calls failed: %v", len(r.Failed), r.Honest, errors.Join(r.Failed...))
	}
	if r.Honest == 0 {
		t.Error("no honest call was made")
	}
	if r.Most >= 64<<20 {
		t.Errorf("the agent took %d kB", r.Most>>10)
	}
}

// secretFirst sends a list that cannot be decoded with a wrong secret: the answer tells what was
// looked at first.
func secretFirst(t *testing.T, s *site) {
	status, answer, _ := s.call(from{}, api.PathConfigure, `{"service":"not a list","callback":"wrong"}`)
	if status != http.StatusInternalServerError || !strings.Contains(string(answer), "Invalid token") {
		t.Errorf("%d %s", status, answer)
	}
	s.nothingDone()
}

// busyFirst fills its source's place for wrong secrets and then sends bodies.
func busyFirst(t *testing.T, s *site) {
	release := make(chan struct{})
	waits := make(chan struct{}, limit.Waiting)
	s.limit.Sleep = func(context.Context, time.Duration) {
		select {
		case waits <- struct{}{}:
			<-release
		default: // those of the attack itself, which should not come so far
		}
	}
	var group sync.WaitGroup
	for range limit.Waiting {
		group.Go(func() { s.limit.Failed(t.Context(), sourceOf(there)) })
	}
	for !s.limit.Busy(sourceOf(there)) {
		time.Sleep(time.Millisecond)
	}
	defer group.Wait()
	defer close(release)
	for _, path := range []string{api.PathProof, api.PathPreflight, api.PathJoin, api.PathSignCert, api.PathConfirm, api.PathRelease, api.PathConfigure, api.PathImageImport} {
		body := &countedBody{Reader: strings.NewReader("{}")}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+here+path, body)
		if err != nil {
			t.Fatal(err)
		}
		req.RemoteAddr = there + ":40000"
		rec := newRecorder()
		s.srv.Handler().ServeHTTP(rec, req)
		if rec.Code != http.StatusTooManyRequests || body.read > 0 {
			t.Errorf("%s: %d after %d bytes", path, rec.Code, body.read)
		}
	}
}

// sharedReads sends many wrong secrets at once and counts the questions to the control plane.
func sharedReads(t *testing.T, s *site) {
	var asked atomic.Int64
	s.node.Fresh = func(context.Context) ([]string, error) { asked.Add(1); return []string{"another"}, nil }
	var group sync.WaitGroup
	for i := range 40 {
		group.Go(func() {
			status, _, _ := s.call(from{address: fmt.Sprintf("10.0.1.%d", i+1)}, api.PathConfigure, api.ConfigureRequest{Callback: "wrong"})
			if status != http.StatusInternalServerError {
				t.Errorf("%d", status)
			}
		})
	}
	group.Wait()
	if n := asked.Load(); n > 20 {
		t.Errorf("40 wrong secrets caused %d questions", n)
	}
}

// manyConnections holds more connections than one source may have.
func manyConnections(t *testing.T, s *site) {
	address, _ := s.live()
	var open []net.Conn
	for range 40 {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			continue
		}
		defer conn.Close()
		open = append(open, conn)
	}
	held := 0
	for _, conn := range open {
		_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if _, err := conn.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
			held++
		}
	}
	if held > 20 {
		t.Errorf("one source holds %d connections", held)
	}
}

// manyCalls makes more calls than one source may make at once.
func manyCalls(t *testing.T, s *site) {
	address, roots := s.live()
	client := &http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}
	defer client.CloseIdleConnections()
	for range siteCalls + 5 {
		resp, err := client.Get("https://" + address + api.PathHealth)
		if err != nil {
			return // it waits for longer than the client does
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	t.Errorf("%d calls of one source at once", siteCalls+5)
}

// TestHTTP1 shows that one connection is one call at a time, whatever a client offers.
func TestHTTP1(t *testing.T) {
	t.Parallel()
	address, roots := newSite(t).live()
	conn, err := tls.Dial("tcp", address, &tls.Config{RootCAs: roots, NextProtos: []string{"h2", "http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if p := conn.ConnectionState().NegotiatedProtocol; p == "h2" {
		t.Error("HTTP/2 is spoken")
	}
}

// TestConfigureOfOthers has the secret in the forms in which programs send it: first or last,
// twice, and beside fields that are not known.
func TestConfigureOfOthers(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	own := strings.Repeat("5e", 32) // of a cluster of upstream's
	s.write(s.env.Credential(callback.FileName), own)
	for body, want := range map[string]int{
		`{"callback":"` + own + `"}`: http.StatusOK,
		`{"service":[{"name":"kubelet"}],"addon":[],"callback":"` + own + `"}`:         http.StatusOK,
		`{"Callback":"` + own + `","unknown":{"a":[1,2,{"b":null}]}}`:                  http.StatusOK,
		`{"callback":"wrong","callback":"` + own + `"}`:                                http.StatusOK,
		`{"callback":"` + own + `","callback":"wrong"}`:                                http.StatusInternalServerError,
		`{"callback":["` + own + `"]}`:                                                 http.StatusBadRequest,
		`{"callback":"` + own + `","service":{}}`:                                      http.StatusBadRequest,
		`{"callback":"` + own + `"} {}`:                                                http.StatusBadRequest,
		`[` + strings.Repeat(`[`, 20000) + strings.Repeat(`]`, 20000) + `]`:            http.StatusBadRequest,
		`{"callback":"` + own + `","service":[` + strings.Repeat(`{},`, 9000) + `{}]}`: http.StatusOK, // none changes anything
	} {
		if status, answer, _ := s.call(from{}, api.PathConfigure, body); status != want {
			t.Errorf("%.80s: %d %.200s, want %d", body, status, answer, want)
		}
	}
	var e api.Error
	_, answer, _ := s.call(from{}, api.PathConfigure, `{"callback":1}`)
	if json.Unmarshal(answer, &e) != nil || e.Code != api.CodeRequest {
		t.Errorf("%s", answer)
	}
}
