package cli

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"microk8s/internal/nodeconfig"
	"microk8s/internal/service"
	"microk8s/internal/service/servicetest"
	"microk8s/internal/snapenv"
)

// fakeAPI stands in for an API server with one node that is Ready.
func fakeAPI(t *testing.T) (kubeconfig string) {
	t.Helper()
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/api/v1/nodes" {
			fmt.Fprint(w, `{"metadata":{"resourceVersion":"1"},"items":[{"metadata":{"name":"n1"},"status":{"conditions":[{"type":"Ready","status":"True"}]}}]}`)
			return
		}
		fmt.Fprint(w, `{}`)
	}))
	t.Cleanup(s.Close)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	config, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "c",
		"clusters": []any{map[string]any{"name": "c", "cluster": map[string]any{"server": s.URL, "certificate-authority-data": ca}}},
		"contexts": []any{map[string]any{"name": "c", "context": map[string]any{"cluster": "c", "user": "u"}}},
		"users":    []any{map[string]any{"name": "u", "user": map[string]any{"token": "a-fake-token"}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(config)
}

func TestStart(t *testing.T) {
	a := newApp(t)
	a.write(t, a.Env.AdminKubeconfig(), fakeAPI(t))
	a.write(t, a.Env.Lock(snapenv.LockStopped), "")
	a.write(t, a.Env.Lock(snapenv.LockLowMemory), "")
	if code := a.run(t.Context(), "start"); code != ExitError || len(a.parts) > 0 {
		t.Fatalf("the low memory guard let it pass: code %d", code)
	}
	if code := a.run(t.Context(), "start", "--disable-low-memory-guard"); code != ExitOK {
		t.Fatalf("code %d: %s", code, a.err.String())
	}
	if !slices.Equal(a.parts, []string{"install"}) || !slices.Equal(a.services.Calls(), []string{"start"}) {
		t.Errorf("parts %q, services %q", a.parts, a.services.Calls())
	}
	if s := a.state(); s.Stopped || s.LowMemory {
		t.Errorf("locks are still there: %+v", s)
	}
	want := "Setting up the node\nStarting the services\nWaiting for the node to be Ready\nThe node is Ready. Try: microk8s kubectl get pods -A\n"
	if a.err.String() != want || a.out.Len() > 0 {
		t.Errorf("stdout %q, stderr %q, want %q", a.out.String(), a.err.String(), want)
	}
}

func TestStartUnderSnapd(t *testing.T) {
	a := newApp(t)
	a.Env.Snapd = true
	a.write(t, a.Env.AdminKubeconfig(), fakeAPI(t))
	if code := a.run(t.Context(), "start"); code != ExitOK || len(a.parts) > 0 {
		t.Errorf("code %d, parts %q: %s", code, a.parts, a.err.String())
	}
	a.services.Answer = servicetest.Failing("start", fmt.Errorf("cannot run snapctl: exit status 1"))
	code := a.run(t.Context(), "start")
	if code != ExitError || !strings.Contains(a.err.String(), `Failed to start microk8s services. Check snapd logs with "journalctl -u snapd.service"`) {
		t.Errorf("code %d: %s", code, a.err.String())
	}
}

// TestStartGivesUp has services that fail again and again: no minute is waited for them.
func TestStartGivesUp(t *testing.T) {
	a := newApp(t)
	a.services.Phase, a.services.Restarts = service.Backoff, 10
	a.write(t, a.Env.Lock(snapenv.LockNoDqlite), "") // tests of the datastore may have its port
	a.write(t, a.Env.ServiceLog(service.Containerd), "microk8s: cannot read args/containerd\n")
	code := a.run(t.Context(), "start")
	want := "microk8s: service containerd does not start: cannot read args/containerd\n  fix this and run microk8s start again; see also: microk8s logs containerd\n"
	if code != ExitError || !strings.HasSuffix(a.err.String(), want) {
		t.Errorf("code %d: %s, want %s", code, a.err.String(), want)
	}
}

// TestStartOfARenamedHost has a host that got another name after its node was in use.
func TestStartOfARenamedHost(t *testing.T) {
	a := newApp(t)
	a.write(t, a.Env.AdminKubeconfig(), fakeAPI(t))
	if err := nodeconfig.KeepName(a.Env, "a-name-of-no-host"); err != nil {
		t.Fatal(err)
	}
	if code := a.run(t.Context(), "start"); code != ExitError || !strings.Contains(a.err.String(), "microk8s: cannot start: this node is a-name-of-no-host in its cluster") {
		t.Errorf("code %d: %s", code, a.err.String())
	}
	if len(a.services.Calls()) > 0 || len(a.parts) > 0 {
		t.Errorf("services %q, parts %q", a.services.Calls(), a.parts)
	}
	a.write(t, a.Env.Lock(snapenv.LockNoReissue), "")
	if code := a.run(t.Context(), "start", "--new-name"); code != ExitError || !strings.Contains(a.err.String(), "microk8s leave") {
		t.Errorf("in a cluster: code %d: %s", code, a.err.String())
	}
	if err := os.Remove(a.Env.Lock(snapenv.LockNoReissue)); err != nil {
		t.Fatal(err)
	}
	if code := a.run(t.Context(), "start", "--new-name"); code != ExitOK {
		t.Errorf("--new-name: code %d: %s", code, a.err.String())
	}
}

// TestStartFailsUnlessReady has services that run and an API server that does not answer.
func TestStartFailsUnlessReady(t *testing.T) {
	a := newApp(t)
	a.ReadyWait = time.Millisecond
	code := a.run(t.Context(), "start")
	if code != ExitError || !strings.Contains(a.err.String(), "the services run, but the node was not Ready within 1ms\n") ||
		!strings.HasSuffix(a.err.String(), "\n  keep waiting with: microk8s status --wait-ready\n") {
		t.Errorf("code %d: %s", code, a.err.String())
	}
}

func TestStartRefusesAPortInUse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a := newApp(t)
	a.services.Phase = service.Stopped
	port := l.Addr().(*net.TCPAddr).Port
	a.write(t, a.Env.Args("cluster-agent"), fmt.Sprintf("--bind 127.0.0.1:%d\n", port))
	code := a.run(t.Context(), "start")
	// The machine of the test may have other ports of ours in use as well: one is named.
	if code != ExitError || !strings.Contains(a.err.String(), "microk8s: cannot start: port ") ||
		!strings.Contains(a.err.String(), "  stop that program and run microk8s start\n") {
		t.Errorf("code %d: %s", code, a.err.String())
	}
	if len(a.services.Calls()) > 0 {
		t.Errorf("services were started: %v", a.services.Calls())
	}
}
