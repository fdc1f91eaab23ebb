package cli

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"sigs.k8s.io/yaml"

	"microk8s/internal/addon"
	"microk8s/internal/argsdigest"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/noderegistry"
	"microk8s/internal/service"
	"microk8s/internal/snapenv"
)

// fakeNode stands in for a whole node, on the far side of the command line's connections:
//
//	fakenode ready      services run, the API server answers, the node is Ready
//	fakenode notready   the same, the node is not Ready
//	fakenode dnskey     the same as ready, with a key of coredns-custom that is left out
//	fakenode nodes N    the same as ready, with N nodes
//	fakenode failing    kubelite fails again and again, nothing answers
//	fakenode silent     services run and take connections, nobody answers
//	fakenode becomes    the node is not Ready until a watch of the nodes is opened
func fakeNode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: fakenode ready|notready|dnskey|nodes N|failing|silent|mute|becomes")
	}
	env := snapenv.FromEnviron(ts.Getenv)
	f := &node{kind: args[0], count: 1, watched: make(chan struct{})}
	if f.kind == "nodes" {
		_, err := fmt.Sscan(args[1], &f.count)
		ts.Check(err)
	}
	for _, path := range []string{env.SupervisorSocket(), env.DatastoreSocket(), env.ContainerdSocket()} {
		ts.Check(os.MkdirAll(filepath.Dir(path), 0o755))
	}
	f.listen(ts, env.SupervisorSocket(), http.HandlerFunc(f.services))
	if f.kind != "failing" {
		f.listen(ts, env.DatastoreSocket(), http.NotFoundHandler())
		f.listen(ts, env.ContainerdSocket(), http.NotFoundHandler())
	}
	if f.kind != "failing" && f.kind != "silent" {
		ts.Check(os.MkdirAll(env.BackendLive(), 0o755))
		ctx, cancel := context.WithCancel(context.Background())
		wait, err := peers.Serve(ctx, env.BackendLive(), slog.New(slog.DiscardHandler), func() []peers.Member { return members(env) })
		ts.Check(err)
		ts.Defer(func() { cancel(); wait() })
	}
	if f.kind != "failing" && f.kind != "mute" {
		f.agent(ts, env)
	}
	for _, name := range service.Names() {
		ts.Check(argsdigest.Record(env, name))
	}
	api := httptest.NewUnstartedServer(http.HandlerFunc(f.api))
	api.EnableHTTP2 = true
	api.Config.ErrorLog = log.New(io.Discard, "", 0) // clients that hang up early are part of the tests
	api.StartTLS()
	ts.Defer(func() {
		api.CloseClientConnections()
		api.Close()
	})
	if f.kind == "failing" {
		api.Close()
	}
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: api.Certificate().Raw})
	config, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "c",
		"clusters": []any{map[string]any{"name": "c", "cluster": map[string]any{"server": api.URL, "certificate-authority-data": ca}}},
		"contexts": []any{map[string]any{"name": "c", "context": map[string]any{"cluster": "c", "user": "u"}}},
		"users":    []any{map[string]any{"name": "u", "user": map[string]any{"token": "a-fake-token"}}},
	})
	ts.Check(err)
	ts.Check(os.MkdirAll(env.CredentialsDir(), 0o755))
	ts.Check(os.WriteFile(env.AdminKubeconfig(), config, 0o644))
}

// agents counts the agents of all scripts, each of which has an address of the loopback of its own.
var agents atomic.Int32

// agent is a cluster agent that says that it lives, unless the script has arguments of its own for it.
func (f *node) agent(ts *testscript.TestScript, env snapenv.Env) {
	if _, err := os.Stat(env.Args("cluster-agent")); err == nil {
		return
	}
	n := agents.Add(1)
	address := fmt.Sprintf("127.%d.%d.%d:25000", 100+os.Getpid()%100, n/250, n%250+1)
	ts.Check(os.MkdirAll(env.ArgsDir(), 0o755))
	ts.Check(os.WriteFile(env.Args("cluster-agent"), []byte("--bind="+address+"\n"), 0o644))
	l, err := net.Listen("tcp", address)
	ts.Check(err)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "{}") }))
	server.Listener.Close()
	server.Listener = l
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	ts.Defer(server.Close)
}

// members are those of the script's cluster.yaml, all of them alive.
func members(env snapenv.Env) (list []peers.Member) {
	data, err := os.ReadFile(filepath.Join(env.Backend(), "cluster.yaml"))
	if err != nil || yaml.Unmarshal(data, &list) != nil {
		return nil
	}
	for i := range list {
		list[i].Online, list[i].LastSeen = true, time.Now()
	}
	return list
}

type node struct {
	kind    string
	count   int
	watched chan struct{} // closed when the nodes are watched
	once    sync.Once

	mu      sync.Mutex
	secrets map[string]map[string]any // of kube-system, by name
	version int

	keptMu sync.Mutex
	kept   map[string]json.RawMessage // of users, by path
}

// listen serves HTTP/1 and unencrypted HTTP/2, as gRPC servers do, on a unix socket.
func (f *node) listen(ts *testscript.TestScript, path string, h http.Handler) {
	l, err := net.Listen("unix", path)
	ts.Check(err)
	if f.kind == "silent" {
		ts.Defer(func() { l.Close() })
		return
	}
	var p http.Protocols
	p.SetHTTP1(true)
	p.SetUnencryptedHTTP2(true)
	s := &http.Server{Handler: h, Protocols: &p, ReadHeaderTimeout: time.Minute}
	ts.Defer(func() { s.Close() })
	go func() { _ = s.Serve(l) }()
}

func (f *node) services(w http.ResponseWriter, _ *http.Request) {
	var states []service.State
	for i, n := range service.Names() {
		st := service.State{Name: n, Phase: service.Running, Enabled: true, PID: 100 + i}
		switch {
		case n == service.Proxy:
			st = service.State{Name: n, Phase: service.Idle, Enabled: true, LastExit: "exit status 0"}
		case n == service.Kubelite && f.kind == "failing":
			st = service.State{Name: n, Phase: service.Backoff, Enabled: true, LastExit: "exit status 1", Restarts: 3}
		}
		states = append(states, st)
	}
	_ = json.NewEncoder(w).Encode(map[string]any{"services": states})
}

func (f *node) api(w http.ResponseWriter, r *http.Request) {
	if f.kind == "silent" || f.kind == "mute" {
		<-r.Context().Done()
		return
	}
	w.Header().Set("Content-Type", "application/json")
	switch {
	case r.URL.Path == "/readyz":
		fmt.Fprint(w, "ok")
	case strings.HasPrefix(r.URL.Path, "/apis/apps/v1/"): // no workloads
		fmt.Fprint(w, `{"kind":"List","apiVersion":"v1","items":[]}`)
	case r.URL.Path == "/api/v1/namespaces/default/services/kubernetes":
		fmt.Fprint(w, `{"kind":"Service","metadata":{"name":"kubernetes"}}`)
	case r.URL.Path == addon.IgnoredDNSPath && f.kind == "dnskey":
		fmt.Fprint(w, `{"kind":"ConfigMap","apiVersion":"v1","data":{"corp.server":"plugin/forward: corp.server:2 - Wrong argument count"}}`)
	case r.URL.Path == "/api/v1/namespaces/kube-system/configmaps" && r.Method == http.MethodGet: // dns is on
		fmt.Fprint(w, `{"kind":"ConfigMapList","apiVersion":"v1","items":[{"metadata":{"name":"microk8s-addon-dns","labels":{"microk8s.io/addon-record":"dns"}}}]}`)
	case r.URL.Path == "/api/v1/nodes" && r.URL.Query().Get("watch") != "":
		f.once.Do(func() { close(f.watched) })
		if f.kind != "becomes" {
			w.(http.Flusher).Flush()
			<-r.Context().Done() // nothing ever happens
			return
		}
		fmt.Fprint(w, `{"type":"MODIFIED","object":{}}`)
	case r.URL.Path == "/api/v1/nodes":
		ready := f.kind != "notready"
		if f.kind == "becomes" {
			select {
			case <-f.watched:
			default:
				ready = false
			}
		}
		status, message := "True", "kubelet is posting ready status"
		if !ready {
			status, message = "False", "container runtime network not ready"
		}
		var items []string
		for i := range f.count {
			items = append(items, fmt.Sprintf(`{"metadata":{"name":"n%[1]d"},"status":{"addresses":[{"type":"InternalIP","address":"198.51.100.%[1]d"}],"conditions":[{"type":"Ready","status":%[2]q,"message":%[3]q}]}}`, i+1, status, message))
		}
		fmt.Fprintf(w, `{"kind":"NodeList","apiVersion":"v1","metadata":{"resourceVersion":"7"},"items":[%s]}`, strings.Join(items, ","))
	case f.kind == "differ" && r.URL.Query().Get("labelSelector") == noderegistry.ControlPlaneLabel+"=true":
		fmt.Fprint(w, records)
	case r.URL.Path == "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices" && r.URL.Query().Get("labelSelector") == "kubernetes.io/service-name=kubernetes":
		fmt.Fprint(w, `{"items":[{"metadata":{"name":"kubernetes"},"addressType":"IPv4","ports":[{"name":"https","port":16443,"protocol":"TCP"}],"endpoints":[{"addresses":["198.51.100.1"]},{"addresses":["198.51.100.2"]}]}]}`)
	case strings.HasPrefix(r.URL.Path, "/apis/rbac.authorization.k8s.io/v1/"), strings.HasPrefix(r.URL.Path, "/api/v1/namespaces/microk8s-users/"),
		r.URL.Path == "/api/v1/namespaces" && r.Method == http.MethodPost:
		f.objects(w, r)
	case strings.HasPrefix(r.URL.Path, systemSecrets):
		f.versioned(w, r, systemSecrets)
	case strings.HasPrefix(r.URL.Path, systemConfigMaps):
		f.versioned(w, r, systemConfigMaps)
	default:
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}`)
	}
}

// records are those of three control-plane nodes of which one has another issuer, no audit policy, and
// its agent on another port, and of one that is joining.
const records = `{"items":[
{"metadata":{"name":"microk8s:node:n1","annotations":{"microk8s.io/role":"control-plane","microk8s.io/agent-port":"25000","microk8s.io/server-arguments":"{\"key\":\"k\",\"digests\":{\"service-account-issuer\":\"01\",\"audit-policy-file\":\"02\",\"event-ttl\":\"03\"}}"}}},
{"metadata":{"name":"microk8s:node:n2","annotations":{"microk8s.io/role":"control-plane","microk8s.io/agent-port":"2379","microk8s.io/server-arguments":"{\"key\":\"k\",\"digests\":{\"service-account-issuer\":\"99\",\"event-ttl\":\"03\"}}"}}},
{"metadata":{"name":"microk8s:node:n3","annotations":{"microk8s.io/role":"control-plane","microk8s.io/agent-port":"25000","microk8s.io/server-arguments":"{\"key\":\"k\",\"digests\":{\"service-account-issuer\":\"01\",\"audit-policy-file\":\"02\",\"event-ttl\":\"03\"}}"}}},
{"metadata":{"name":"microk8s:node:n4","annotations":{"microk8s.io/role":"control-plane","microk8s.io/until":"2036-11-28T00:00:00Z","microk8s.io/server-arguments":"{\"key\":\"k\",\"digests\":{}}"}}}]}`

const (
	systemSecrets    = "/api/v1/namespaces/kube-system/secrets"
	systemConfigMaps = "/api/v1/namespaces/kube-system/configmaps"
)

// versioned keeps the objects of a collection with resource versions, as far as the command line uses them.
func (f *node) versioned(w http.ResponseWriter, r *http.Request, collection string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	refuse := func(code int, reason string) {
		w.WriteHeader(code)
		fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":%q,"code":%d}`, reason, code)
	}
	name := r.URL.Path
	if r.Method == http.MethodGet || r.Method == http.MethodDelete {
		if f.secrets[name] == nil {
			refuse(http.StatusNotFound, "NotFound")
			return
		}
		_ = json.NewEncoder(w).Encode(f.secrets[name])
		if r.Method == http.MethodDelete {
			delete(f.secrets, name)
		}
		return
	}
	var in map[string]any
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		refuse(http.StatusBadRequest, "BadRequest")
		return
	}
	meta := in["metadata"].(map[string]any)
	name = collection + "/" + meta["name"].(string)
	if old := f.secrets[name]; old != nil && old["metadata"].(map[string]any)["resourceVersion"] != meta["resourceVersion"] {
		refuse(http.StatusConflict, "Conflict")
		return
	}
	f.version++
	meta["resourceVersion"] = fmt.Sprint(f.version)
	if f.secrets == nil {
		f.secrets = map[string]map[string]any{}
	}
	f.secrets[name] = in
	_ = json.NewEncoder(w).Encode(in)
}

// objects keeps what is posted, by path, and makes tokens of service accounts.
func (f *node) objects(w http.ResponseWriter, r *http.Request) {
	f.keptMu.Lock()
	defer f.keptMu.Unlock()
	refuse := func(code int, reason string) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":%q,"code":%d}`, reason, code)
	}
	var o struct {
		Metadata struct {
			Name, Namespace string
			Labels          map[string]string
		}
		Spec struct{ ExpirationSeconds int64 }
	}
	switch r.Method {
	case http.MethodPost:
		body, err := io.ReadAll(r.Body)
		if err != nil || json.Unmarshal(body, &o) != nil {
			refuse(http.StatusBadRequest, "BadRequest")
			return
		}
		if account, ok := strings.CutSuffix(r.URL.Path, "/token"); ok {
			if _, there := f.kept[account]; !there {
				refuse(http.StatusNotFound, "NotFound")
				return
			}
			end := time.Date(2026, 11, 28, 0, 0, 0, 0, time.UTC).Add(time.Duration(o.Spec.ExpirationSeconds) * time.Second)
			fmt.Fprintf(w, `{"status":{"token":"the-token","expirationTimestamp":%q}}`, end.Format(time.RFC3339))
			return
		}
		path := r.URL.Path + "/" + o.Metadata.Name
		if _, there := f.kept[path]; there {
			refuse(http.StatusConflict, "AlreadyExists")
			return
		}
		if f.kept == nil {
			f.kept = map[string]json.RawMessage{}
		}
		f.kept[path] = body
		w.WriteHeader(http.StatusCreated)
		_, _ = w.Write(body)
	case http.MethodDelete:
		if _, there := f.kept[r.URL.Path]; !there {
			refuse(http.StatusNotFound, "NotFound")
			return
		}
		delete(f.kept, r.URL.Path)
		fmt.Fprint(w, "{}")
	default: // a list, over all namespaces
		resource := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/'):] + "/"
		key, value, one := strings.Cut(r.URL.Query().Get("labelSelector"), "=")
		items := []json.RawMessage{}
		for path, body := range f.kept {
			if o.Metadata.Labels = nil; strings.Contains(path, resource) && json.Unmarshal(body, &o) == nil && o.Metadata.Labels[key] != "" && (!one || o.Metadata.Labels[key] == value) {
				items = append(items, body)
			}
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"items": items})
	}
}
