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

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/hostinfo"
	"microk8s/internal/kube/kubetest"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/service"
	"microk8s/internal/service/servicetest"
	"microk8s/internal/snapenv"
)

// fakeAPI stands in for an API server with one node that is Ready.
func fakeAPI(t *testing.T) (kubeconfig string) {
	t.Helper()
	return fakeAPIWith(t, `{"metadata":{"name":"n1"},"status":{"conditions":[{"type":"Ready","status":"True"}]}}`)
}

// fakeAPIWith is one with this Node.
func fakeAPIWith(t *testing.T, node string) (kubeconfig string) {
	t.Helper()
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if r.URL.Path == "/api/v1/nodes" {
			fmt.Fprintf(w, `{"kind":"NodeList","apiVersion":"v1","metadata":{"resourceVersion":"1"},"items":[%s]}`, node)
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

// TestForgetNode: the Node of the old name goes, and what an interrupted start left, and no other one.
func TestForgetNode(t *testing.T) {
	own, err := hostinfo.Addresses()
	if err != nil || len(own) == 0 {
		t.Fatalf("addresses %v, %v", own, err)
	}
	api := kubetest.New(t)
	for name, address := range map[string]string{"old": "198.51.100.1", "older": own[0].String(), "virtual": "198.51.100.2"} {
		api.Set(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: address}}}})
	}
	a := newApp(t)
	a.write(t, a.Env.AdminKubeconfig(), fmt.Sprintf("apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{name: c, cluster: {server: %q}}]\ncontexts: [{name: c, context: {cluster: c, user: u}}]\nusers: [{name: u, user: {token: x}}]\n", api.Config().Host))
	a.forgetNode(t.Context(), "old", a.progress())
	for name, stays := range map[string]bool{"old": false, "older": false, "virtual": true} {
		if (api.Get("v1/nodes/"+name) != nil) != stays {
			t.Errorf("node %s: want it to stay: %v", name, stays)
		}
	}
}

// TestStartOfAWorker: it ends when the cluster calls the worker Ready, by a report of this boot, and says
// why where it does not.
func TestStartOfAWorker(t *testing.T) {
	for _, tc := range []struct {
		what, node, says string
		code             int
	}{
		{"Ready", `{"metadata":{"name":"w1"},"status":{"nodeInfo":{"bootID":"b1"},"conditions":[{"type":"Ready","status":"True","lastHeartbeatTime":"2100-01-01T00:00:00Z"}]}}`, "This worker is Ready", ExitOK},
		{"not Ready", `{"metadata":{"name":"w1"},"status":{"nodeInfo":{"bootID":"b1"},"conditions":[{"type":"Ready","status":"False","message":"no network","lastHeartbeatTime":"2100-01-01T00:00:00Z"}]}}`, "this worker is not Ready: the node is not Ready: no network", ExitError},
		{"Ready before a reboot", `{"metadata":{"name":"w1"},"status":{"nodeInfo":{"bootID":"b0"},"conditions":[{"type":"Ready","status":"True","lastHeartbeatTime":"2100-01-01T00:00:00Z"}]}}`, "the kubelet has not reported since it was started", ExitError},
		{"not there", "", "the kubelet has not registered the node yet", ExitError},
	} {
		t.Run(tc.what, func(t *testing.T) {
			a := newApp(t)
			a.ReadyWait = time.Second
			a.write(t, a.Env.Lock(snapenv.LockWorker), "")
			a.write(t, a.Env.HostPath("proc/sys/kernel/random/boot_id"), "b1\n")
			a.write(t, a.Env.Credential("kubelet.config"), fakeAPIWith(t, tc.node))
			if code := a.run(t.Context(), "start"); code != tc.code || !strings.Contains(a.err.String(), tc.says) {
				t.Errorf("code %d: %s", code, a.err.String())
			}
		})
	}
}

// TestWorkerThatHasACopy: another machine runs under its name.
func TestWorkerThatHasACopy(t *testing.T) {
	a := newApp(t)
	a.write(t, a.Env.Lock(snapenv.LockWorker), "")
	a.write(t, a.Env.AdminKubeconfig(), "")
	a.write(t, a.Env.RunDir()+"/copies.json", fmt.Sprintf(`{"machines":["10.0.0.5","10.0.0.6"],"seen":%q}`, a.Now().Format(time.RFC3339)))
	if code := a.run(t.Context(), "status"); code != ExitOK || !strings.Contains(a.out.String(), "2 machines run as node ") || !strings.Contains(a.out.String(), "on the copy run: microk8s leave") {
		t.Errorf("code %d: %s", code, a.out.String())
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
