package cluster

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"log/slog"
	"net"
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
	"k8s.io/client-go/rest"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/client"
	"microk8s/cluster-agent/server"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/encryption"
	"microk8s/internal/journal"
	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/pki"
	"microk8s/internal/pki/pkitest"
	"microk8s/internal/serverargs"
	"microk8s/internal/service"
	"microk8s/internal/setup"
	"microk8s/internal/snapenv"
	"microk8s/internal/token"
)

const (
	ownIP  = "10.9.0.2"
	ownKey = "the single node's data"
)

// fakeServices stands in for the service manager. A started datastore becomes a member, as far
// as its files and its socket say.
type fakeServices struct {
	t   *testing.T
	env snapenv.Env

	mu      sync.Mutex
	running map[string]bool
	stop    func() // the datastore's sockets
	refuse  string // a service that cannot be started
	dies    func() // instead of the datastore becoming a member
}

func (f *fakeServices) Start(_ context.Context, names ...string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(names) == 0 {
		names = service.Names()
	}
	for _, n := range names {
		if n == f.refuse {
			return fmt.Errorf("%s does not start", n)
		}
		f.running[n] = true
		if n == service.Datastore && f.stop == nil && nodeconfig.Load(f.env).Datastore.Own() {
			f.startStore()
		}
	}
	return nil
}

func (f *fakeServices) startStore() {
	dir := f.env.BackendLive()
	if _, err := os.Stat(filepath.Join(dir, "data")); err == nil { // the single node's
		f.stop = func() {}
		return
	}
	check := func(err error) {
		if err != nil {
			f.t.Error(err)
		}
	}
	ini, err := os.ReadFile(filepath.Join(dir, "init.yaml"))
	if err == nil && strings.Contains(string(ini), "Cluster") {
		check(os.Rename(filepath.Join(dir, "init.yaml"), filepath.Join(dir, "join")))
	}
	if f.dies != nil {
		f.dies()
		return
	}
	own := net.JoinHostPort(ownIP, "19001")
	check(os.WriteFile(filepath.Join(dir, "info.yaml"), []byte("Address: "+own+"\nID: 7\nRole: 2\n"), 0o600))
	if _, err := os.Stat(filepath.Join(dir, "join")); err != nil { // a node of its own
		f.stop = func() {}
		return
	}
	check(os.WriteFile(filepath.Join(dir, "cluster.yaml"), []byte("- {Address: 127.0.0.1:1, ID: 1, Role: 0}\n- {Address: \""+own+"\", ID: 7, Role: 2}\n"), 0o600))
	ctx, cancel := context.WithCancel(context.Background())
	wait, err := peers.Serve(ctx, dir, slog.New(slog.DiscardHandler), func() []peers.Member {
		return []peers.Member{{ID: 1, Address: "127.0.0.1:1", Online: true, Leader: true}, {ID: 7, Address: own, Role: storedir.Spare, Online: true, Self: true}}
	})
	check(err)
	l, err := net.Listen("unix", filepath.Join(dir, "kine.sock:12379"))
	check(err)
	f.stop = func() { cancel(); wait(); l.Close() }
}

func (f *fakeServices) Stop(_ context.Context, names ...string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(names) == 0 {
		names = service.Names()
	}
	for _, n := range names {
		f.running[n] = false
		if n == service.Datastore && f.stop != nil {
			f.stop()
			f.stop = nil
		}
	}
	return nil
}

func (f *fakeServices) Restart(context.Context, ...string) error { return nil }

func (f *fakeServices) Status(context.Context) ([]service.State, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []service.State
	for _, n := range service.Names() {
		s := service.State{Name: n, Phase: service.Stopped}
		if f.running[n] {
			s.Phase = service.Running
		}
		out = append(out, s)
	}
	return out, nil
}

// site is a node in a temporary folder and, on its far side, an agent and an API server.
type site struct {
	env      snapenv.Env
	services *fakeServices
	maker    pki.Maker
	token    token.Token
	agent    *httptest.Server
	apis     *httptest.Server
	said     []string

	mu         sync.Mutex
	upstream   bool           // the agent is one of upstream's
	foreignCNI bool           // the cluster has a pod network of its own
	request    map[string]any // the last for a join
	problems   []api.Problem
	events     []string // of the agent: join, confirm, release
	ca         *x509.Certificate
	caPEM      string
	caKeyPEM   string
}

func newSite(t *testing.T) *site {
	t.Helper()
	root, err := os.MkdirTemp("", "cl") // short: unix sockets below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	s := &site{env: snapenv.Under(root), maker: pkitest.Maker(nil), token: token.New()}
	shipped, err := filepath.Abs("../../snap/local/default-args")
	if err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string]string{
		"proc/meminfo": "MemTotal: 4000000 kB\n", "etc/group": "root:x:0:\n", "etc/gshadow": "root:*::\n", "proc/1/environ": "",
	} {
		p := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(s.env.Snap, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(s.env.DefaultArgs(), os.DirFS(shipped)); err != nil {
		t.Fatal(err)
	}
	if err := s.install(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.env.BackendLive(), "data"), []byte(ownKey), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range append([]string{callbackToken}, joinTokens...) { // of the single node
		if err := os.WriteFile(s.env.Credential(name), []byte("{}"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.services = &fakeServices{t: t, env: s.env, running: map[string]bool{}}
	if err := s.services.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.services.Stop(context.Background()) })
	key, err := s.maker.Key(2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := s.maker.Issue(pki.Request{Days: 100, CA: true}, key.Public(), nil, key)
	if err != nil {
		t.Fatal(err)
	}
	if s.ca, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	s.caPEM, s.caKeyPEM = string(pki.EncodeCert(der)), string(pki.EncodeKey(key))

	s.agent = httptest.NewUnstartedServer(http.HandlerFunc(s.serveAgent))
	s.agent.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.agent.StartTLS()
	t.Cleanup(s.agent.Close)
	s.apis = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		node := corev1.Node{TypeMeta: metav1.TypeMeta{Kind: "Node", APIVersion: "v1"}, ObjectMeta: metav1.ObjectMeta{Name: "n2"}}
		node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
		_ = json.NewEncoder(w).Encode(node)
	}))
	t.Cleanup(s.apis.Close)
	return s
}

func addresses() ([]net.IP, error) { return []net.IP{net.ParseIP(ownIP)}, nil }
func hostname() (string, error)    { return "n2", nil }

func (s *site) install(ctx context.Context) error {
	return (&setup.Installer{Env: s.env, Maker: s.maker, Hostname: hostname, Addresses: addresses}).Install(ctx)
}

func (s *site) note(event string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, event)
}

func (s *site) serveAgent(w http.ResponseWriter, r *http.Request) {
	data, _ := io.ReadAll(r.Body)
	if s.upstream && !slices.Contains([]string{api.PathJoin, api.PathSignCert}, r.URL.Path) {
		server.WriteError(w, http.StatusNotFound, "not found")
		return
	}
	switch r.URL.Path {
	case api.PathProof:
		var q api.ProofRequest
		_ = json.Unmarshal(data, &q)
		id, key := s.token.Derive()
		exporter, _ := token.Exporter(r.TLS)
		server.WriteJSON(w, http.StatusOK, api.ProofResponse{Proof: token.Proof(key, exporter, id, q.Nonce)})
	case api.PathPreflight:
		server.WriteJSON(w, http.StatusOK, api.PreflightResponse{Product: api.Product, Time: time.Now().UnixMilli(), Problems: s.problems,
			Servers: []string{s.apis.Listener.Addr().String()}})
	case api.PathJoin:
		var q api.JoinRequest
		_ = json.Unmarshal(data, &q)
		s.request = nil
		_ = json.Unmarshal(data, &s.request)
		s.note("join")
		out := api.JoinResponse{
			CA: s.caPEM, CallbackToken: "the-callback-token", APIPort: "16443", AuthorizationMode: "Node,RBAC", HostnameOverride: ownIP,
			KubeletArgs: "--cluster-dns=10.152.183.99\n--node-ip=10.9.0.1\n--hostname-override=n1\n--kube-reserved=memory=32Gi\n--system-reserved=memory=8Gi\n--reserved-cpus=0-3\n--root-dir=${SNAP_COMMON}/var/lib/kubelet\n",
			CNI:         s.foreignCNI, Product: api.Product, ClusterCIDR: "10.1.0.0/16,fd01::/64", ServiceCIDR: "10.152.183.0/24,fd98::/108", NodeMasks: []int{25, 80}, APIServers: []string{s.apis.Listener.Addr().String()},
		}
		if q.Secrets == 2 && !s.upstream {
			out.CallbackToken = ""
		}
		if s.upstream {
			out.Product, out.ServiceCIDR, out.APIServers = "", "", nil
		}
		if !q.Worker {
			out.CAKey, out.ServiceAccountKey = &s.caKeyPEM, s.caKeyPEM
			out.ClusterCert, out.ClusterKey, out.Voters = s.pair()
			out.ServerArguments = &serverargs.Set{
				Flags: map[string][]string{encryption.Flag: {encryption.Argument}, "feature-gates": {"Cluster=true"}, "audit-policy-file": {"${SNAP_DATA}/args/audit-policy.yaml"}},
				Files: []serverargs.File{{Flag: encryption.Flag, Name: encryption.Argument, Content: "the cluster's key"}, {Flag: "audit-policy-file", Name: "${SNAP_DATA}/args/audit-policy.yaml", Content: "the cluster's policy"}},
			}
		}
		server.WriteJSON(w, http.StatusOK, out)
	case api.PathSignCert:
		var q api.SignRequest
		_ = json.Unmarshal(data, &q)
		server.WriteJSON(w, http.StatusOK, api.SignResponse{Certificate: s.sign(q.Request)})
	case api.PathConfirm:
		s.note("confirm")
		server.WriteJSON(w, http.StatusOK, api.Result{Result: "ok"})
	case api.PathRelease:
		s.note("release")
		server.WriteJSON(w, http.StatusOK, api.Result{Result: "ok"})
	}
}

// pair is the one that the datastore's members share.
func (s *site) pair() (cert, key string, voters []string) {
	k, _ := s.maker.Key(2048)
	der, _ := s.maker.Issue(pki.Request{DNSNames: []string{"k8s"}, Days: 100, ServerAuth: true, ClientAuth: true}, k.Public(), nil, k)
	return string(pki.EncodeCert(der)), string(pki.EncodeKey(k)), []string{"127.0.0.1:1"} // where nobody answers
}

func (s *site) sign(request string) string {
	block, _ := pem.Decode([]byte(request))
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return err.Error()
	}
	caKey, err := pki.ParseKey([]byte(s.caKeyPEM))
	if err != nil {
		return err.Error()
	}
	der, err := s.maker.Issue(pki.Request{Subject: csr.Subject, DNSNames: csr.DNSNames, IPs: csr.IPAddresses, Days: 90, ServerAuth: true, ClientAuth: true}, csr.PublicKey, s.ca, caKey)
	if err != nil {
		return err.Error()
	}
	return string(pki.EncodeCert(der))
}

func (s *site) node() *Node {
	return &Node{
		Env: s.env, Services: s.services, Maker: s.maker, Hostname: hostname, Addresses: addresses, Install: s.install,
		removeWait: time.Second, // nobody answers
		Say:        func(format string, a ...any) { s.said = append(s.said, fmt.Sprintf(format, a...)) },
		Kube:       func(string, string) (*kube.Core, error) { return kube.New(&rest.Config{Host: s.apis.URL}) },
	}
}

func (s *site) options(t *testing.T, worker bool) JoinOptions {
	t.Helper()
	target, err := client.Parse(s.agent.Listener.Addr().String() + "/" + s.token.Reveal())
	if err != nil {
		t.Fatal(err)
	}
	return JoinOptions{Target: target, Worker: worker, Version: "v1.37.1"}
}

func (s *site) journal(t *testing.T) *journal.Journal {
	t.Helper()
	j, err := journal.Open(s.env.Journal())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return j
}

// tree is everything that a node is: its files with modes and contents.
func (s *site) tree(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, root := range []string{s.env.Data, s.env.Common} {
		root, err := filepath.EvalSymlinks(root)
		if err != nil {
			t.Fatal(err)
		}
		err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if path == s.env.ClusterDir() {
				return filepath.SkipDir
			}
			st, err := d.Info()
			if err != nil {
				return err
			}
			text := st.Mode().String()
			if d.Type().IsRegular() {
				data, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				text += " " + string(data)
			}
			out[path] = text
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func compare(t *testing.T, before, after map[string]string) {
	t.Helper()
	for path, text := range before {
		if after[path] != text {
			t.Errorf("%s was %.120q and is %.120q", path, text, after[path])
		}
	}
	for path := range after {
		if _, ok := before[path]; !ok {
			t.Errorf("%s is new", path)
		}
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
	}
	return string(data)
}

// wantJoined checks what a node holds after a join.
func (s *site) wantJoined(t *testing.T, worker bool) {
	t.Helper()
	if r, err := Pending(s.env); r != nil || err != nil {
		t.Errorf("pending: %+v, %v", r, err)
	}
	for file, want := range map[string]string{"cni-env": "IPv6_CLUSTER_CIDR=fd01::/64\nIPv6_SERVICE_CIDR=fd98::/108\n", "kube-proxy": "--cluster-cidr=10.1.0.0/16,fd01::/64\n",
		"kube-controller-manager": "--node-cidr-mask-size-ipv4=25\n--node-cidr-mask-size-ipv6=80\n"} {
		if got := read(t, s.env.Args(file)); !worker && !strings.Contains(got, want) {
			t.Errorf("args/%s has no %q:\n%s", file, want, got)
		}
	}
	kubelet := read(t, s.env.Args("kubelet"))
	for _, want := range []string{"--cluster-dns=10.152.183.99", "--node-ip=" + ownIP, "--tls-cert-file="} {
		if !strings.Contains(kubelet, want) {
			t.Errorf("the kubelet's arguments have no %s:\n%s", want, kubelet)
		}
	}
	for _, other := range []string{"memory=32Gi", "memory=8Gi", "reserved-cpus"} {
		if strings.Contains(kubelet, other) {
			t.Errorf("the kubelet reserves what the other machine's size asks for: %s", other)
		}
	}
	if !strings.Contains(kubelet, "--kube-reserved=cpu=") {
		t.Error("the kubelet lost the reservation for this machine")
	}
	if strings.Contains(kubelet, "hostname-override") {
		t.Error("the kubelet has the other node's name")
	}
	switch got, err := os.ReadFile(s.env.Credential(callbackToken)); {
	case s.upstream && string(got) != "the-callback-token":
		t.Errorf("callback token %q, %v", got, err)
	case !s.upstream && !errors.Is(err, fs.ErrNotExist): // the agent gets it
		t.Errorf("the callback token of before, %q, is still there: %v", got, err)
	}
	if !worker { // what was written down for this node's own cluster opens no other
		for _, name := range joinTokens {
			if _, err := os.Stat(s.env.Credential(name)); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s was carried into the cluster: %v", name, err)
			}
		}
	}
	if worker != nodeconfig.ReadState(s.env).Worker || !nodeconfig.ReadState(s.env).Clustered || nodeconfig.ReadState(s.env).Changing {
		t.Error("the locks are wrong")
	}
	ca := s.env.Cert("ca.crt")
	if worker {
		ca = s.env.Cert(remoteCA)
		if own := read(t, s.env.Cert("ca.crt")); own == s.caPEM {
			t.Error("the worker's own CA was replaced")
		}
		if !strings.Contains(read(t, s.env.Args("traefik/provider.yaml")), "address:") {
			t.Error("the proxy has no server")
		}
	} else if !strings.Contains(read(t, filepath.Join(s.env.BackendLive(), "join")), "127.0.0.1:1") {
		t.Error("the datastore was not told whom to join")
	}
	if !worker {
		apiServer := read(t, s.env.Args("kube-apiserver"))
		if !strings.Contains(apiServer, "--feature-gates=Cluster=true\n") || strings.Contains(apiServer, "--audit-log-path") {
			t.Errorf("the API server's arguments are not the cluster's:\n%s", apiServer)
		}
		if read(t, encryption.Path(s.env)) != "the cluster's key" || read(t, s.env.Args("audit-policy.yaml")) != "the cluster's policy" {
			t.Error("the files of the API server's arguments are not the cluster's")
		}
		if carried, _ := s.request["server_arguments"].(map[string]any); carried["carries"] == nil || carried[encryption.Flag] == nil {
			t.Errorf("the cluster was not told what the API server has: %v", carried)
		}
	}
	if read(t, ca) != s.caPEM {
		t.Error("the cluster's CA is not there")
	}
	for _, name := range []string{"kubelet", "proxy"} {
		cert, err := pki.ParseCert([]byte(read(t, s.env.Cert(name+".crt"))))
		if err != nil {
			t.Fatal(err)
		}
		if err := pki.IssuedBy(cert, s.ca); err != nil {
			t.Errorf("%s.crt: %v", name, err)
		}
		if config := read(t, s.env.Credential(name+".config")); !strings.Contains(config, "127.0.0.1:16443") {
			t.Errorf("%s.config does not point to this node", name)
		}
	}
	for _, left := range []string{s.env.ClusterDir() + "/" + answerFile, s.env.ClusterDir() + "/" + saved + "/certs"} {
		if _, err := os.Lstat(left); err == nil {
			t.Errorf("%s was left behind", left)
		}
	}
	if got := read(t, filepath.Join(s.env.BackendLive()+".backup", "data")); got != ownKey {
		t.Errorf("the backup of the single node's data has %q", got)
	}
	if s.events[len(s.events)-1] != "confirm" {
		t.Errorf("the agent saw %q", s.events)
	}
}

type died struct{ at journal.Point }

// dying runs f until the journal comes to the point, as kill -9 would end it.
func dying(j *journal.Journal, at string, f func() error) (dead bool, err error) {
	j.At = func(p journal.Point) {
		if p.String() == at {
			panic(died{p})
		}
	}
	defer func() {
		if r := recover(); r != nil {
			if _, ok := r.(died); !ok {
				panic(r)
			}
			dead = true
		}
		j.At = nil
		j.Close()
	}()
	return false, f()
}

// TestJoinKilledAnywhere kills both kinds of join before and after each step. Run again they end
// joined; taken back, every file is as it was.
func TestJoinKilledAnywhere(t *testing.T) {
	for operation, worker := range map[string]bool{opJoin: false, opJoinWorker: true} {
		for _, name := range Steps()[operation] {
			for _, when := range []string{"begin", "end"} {
				for _, undo := range []bool{false, true} {
					point := operation + "/" + name + "/" + when
					t.Run(fmt.Sprintf("%s/undo=%t", point, undo), func(t *testing.T) {
						t.Parallel()
						s := newSite(t)
						before := s.tree(t)
						j := s.journal(t)
						if dead, err := dying(j, point, func() error { return s.node().Join(t.Context(), j, s.options(t, worker)) }); !dead {
							t.Fatalf("it did not come there: %v", err)
						}
						if undo && name != StepConfirm && name != StepCleanUp {
							if found, err := s.node().UndoJoin(t.Context(), s.journal(t)); !found || err != nil {
								t.Fatalf("%v, %v", found, err)
							}
							compare(t, before, s.tree(t))
							if entries, _ := os.ReadDir(s.env.ClusterDir()); len(entries) > 1 { // the lock of the journal
								t.Errorf("left behind: %v", entries)
							}
							if s.events != nil && s.events[len(s.events)-1] != "release" {
								t.Errorf("the agent saw %q", s.events)
							}
							if !s.services.running[service.Kubelite] {
								t.Error("the node was not started again")
							}
							return
						}
						j = s.journal(t)
						if err := s.node().Join(t.Context(), j, s.options(t, worker)); err != nil {
							t.Fatal(err)
						}
						s.wantJoined(t, worker)
						if n := strings.Count(strings.Join(s.events, " "), "join"); n > 2 {
							t.Errorf("the agent saw %q", s.events)
						}
					})
				}
			}
		}
	}
}

// TestJoinFails has a service that does not start: the node is what it was, without anybody
// doing anything.
func TestJoinFails(t *testing.T) {
	for _, tc := range []struct {
		worker bool
		refuse string
	}{{true, service.Proxy}, {false, service.Datastore}, {false, service.Kubelite}} {
		t.Run(fmt.Sprint(tc), func(t *testing.T) {
			s := newSite(t)
			before := s.tree(t)
			s.services.refuse = tc.refuse
			n := s.node()
			n.ResetNetwork = func(context.Context) error { // the undo may start it again
				return nil
			}
			j := s.journal(t)
			j.Show = func(st journal.Step, undo bool, run func() error) error {
				if undo && st.ID == StepStop {
					s.services.refuse = ""
				}
				return run()
			}
			err := n.Join(t.Context(), j, s.options(t, tc.worker))
			var failed *journal.Failed
			if !errors.As(err, &failed) || !failed.Undone || !strings.Contains(err.Error(), tc.refuse+" does not start") {
				t.Errorf("error: %v", err)
			}
			compare(t, before, s.tree(t))
			if s.events[len(s.events)-1] != "release" {
				t.Errorf("the agent saw %q", s.events)
			}
		})
	}
}

// TestClusterDiesDuringJoin: nobody waits for a cluster that is gone until the time of a step is
// over. The node is what it was.
func TestClusterDiesDuringJoin(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	before := s.tree(t)
	s.services.dies = func() { go s.agent.Close() } // it waits for connections
	n := s.node()
	n.silence = 100 * time.Millisecond
	err := n.Join(t.Context(), s.journal(t), s.options(t, false))
	var failed *journal.Failed
	if !errors.As(err, &failed) || !failed.Undone || !errors.Is(err, errSilent) {
		t.Errorf("error: %v", err)
	}
	compare(t, before, s.tree(t))
	if !slices.ContainsFunc(s.said, func(l string) bool { return strings.Contains(l, "the token is free for others in ten minutes") }) {
		t.Errorf("said: %q", s.said)
	}
}

func TestPreflight(t *testing.T) {
	s := newSite(t)
	before := s.tree(t)
	s.problems = []api.Problem{{Message: "The name is taken", Fatal: true, Code: api.CodeNameTaken}, {Message: "It looks like a clone", Code: api.CodeCloned}, {Message: "Too old", Fatal: true}}
	err := s.node().Join(t.Context(), s.journal(t), s.options(t, true))
	var pre *PreflightError
	if !errors.As(err, &pre) || len(pre.Problems) != 2 || !strings.Contains(err.Error(), "The name is taken; Too old") {
		t.Errorf("error: %v", err)
	}
	if !slices.ContainsFunc(s.said, func(l string) bool { return l == "WARNING: It looks like a clone" }) {
		t.Errorf("said: %q", s.said)
	}
	compare(t, before, s.tree(t))
	if s.events != nil {
		t.Errorf("the agent saw %q", s.events)
	}
	// Another port is named as the line to type.
	s.problems = []api.Problem{{Message: "The port of the cluster agent port has to be set to 2379", Fatal: true, Code: api.CodePort}}
	err = s.node().Join(t.Context(), s.journal2(t), s.options(t, true))
	if !errors.As(err, &pre) || len(pre.Problems) != 1 || !strings.Contains(pre.Problems[0].Do, "sudo sed -i 's/:25000/:2379/' "+s.env.Args("cluster-agent")) {
		t.Errorf("the next step: %+v", pre)
	}
}

// TestUpstreamAgent has a worker join a cluster of upstream's: the pod network stands aside, and
// nothing is confirmed. A control-plane node is refused. The far side is made after
// cluster-agent.md: upstream's agent is not available as a Go module.
func TestUpstreamAgent(t *testing.T) {
	s := newSite(t)
	s.upstream = true
	// As upstream's add-node prints it.
	sum := sha256.Sum256(s.agent.Certificate().Raw)
	target, err := client.Parse(s.agent.Listener.Addr().String() + "/3a1f5c2e9b7d48061c3e5a7f9b2d4c6e/" + hex.EncodeToString(sum[:])[:12])
	if err != nil {
		t.Fatal(err)
	}
	options := JoinOptions{Target: target, Version: "v1.37.1"}
	before := s.tree(t)
	err = s.node().Join(t.Context(), s.journal(t), options)
	if err == nil || !strings.Contains(err.Error(), "--worker") {
		t.Errorf("a control-plane join: %v", err)
	}
	compare(t, before, s.tree(t))
	s.events = nil
	j := s.journal2(t)
	options.Worker = true
	if err := s.node().Join(t.Context(), j, options); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(s.events, []string{"join"}) {
		t.Errorf("the agent saw %q", s.events)
	}
	if !strings.HasPrefix(read(t, s.env.CNIManifest()), "#") {
		t.Error("the built-in pod network does not stand aside")
	}
	for key, want := range map[string]any{
		"token": "3a1f5c2e9b7d48061c3e5a7f9b2d4c6e", "hostname": "n2", "port": "25000", "worker": "as-worker",
		"can_handle_x509_auth": true, "can_handle_custom_etcd": true,
	} {
		if s.request[key] != want {
			t.Errorf("the request says %s: %v, want %v", key, s.request[key], want)
		}
	}
}

// journal2 is a journal for a second operation in one test.
func (s *site) journal2(t *testing.T) *journal.Journal {
	t.Helper()
	path := s.env.Journal()
	for i := range 3 {
		if j, err := journal.Open(path); err == nil {
			t.Cleanup(func() { j.Close() })
			return j
		}
		path = s.env.Journal() + fmt.Sprint(i)
	}
	t.Fatal("no journal can be opened")
	return nil
}

// TestLeaveKilledAnywhere joins, then kills a leave before and after each step. Run again it ends
// with a single node that has nothing of the cluster's.
func TestLeaveKilledAnywhere(t *testing.T) {
	for _, name := range Steps()[opLeave] {
		for _, when := range []string{"begin", "end"} {
			t.Run(name+"/"+when, func(t *testing.T) {
				t.Parallel()
				s := newSite(t)
				kubelet := read(t, s.env.Args("kubelet"))
				write(t, filepath.Join(s.env.BackendLive(), "info.yaml"), "Address: 127.0.0.1:2380\nID: 1\nRole: 0\n")
				j := s.journal(t)
				if err := s.node().Join(t.Context(), j, s.options(t, true)); err != nil {
					t.Fatal(err)
				}
				j.Close()
				j = s.journal(t)
				if dead, err := dying(j, "leave/"+name+"/"+when, func() error { return s.node().Leave(t.Context(), j, LeaveOptions{}) }); !dead {
					t.Fatalf("it did not come there: %v", err)
				}
				if err := s.node().Leave(t.Context(), s.journal(t), LeaveOptions{}); err != nil {
					t.Fatal(err)
				}
				if r, err := Pending(s.env); r != nil || err != nil {
					t.Errorf("pending: %+v, %v", r, err)
				}
				if IsMember(s.env) || !nodeconfig.Load(s.env).Datastore.Own() || nodeconfig.ReadState(s.env).Changing || !nodeconfig.ReadState(s.env).Installed {
					t.Error("the locks are wrong")
				}
				if got := read(t, s.env.Args("kubelet")); got != kubelet {
					t.Errorf("the kubelet's arguments are not put back:\n%s", got)
				}
				for path, text := range s.tree(t) {
					if strings.Contains(text, s.caPEM) || strings.Contains(text, "the-callback-token") {
						t.Errorf("%s has something of the cluster's", path)
					}
				}
				if ini := read(t, filepath.Join(s.env.BackendLive(), "init.yaml")); !strings.Contains(ini, "127.0.0.1:2380") {
					t.Errorf("the datastore begins with %q", ini)
				}
			})
		}
	}
}

func TestLeaveOfASingleNode(t *testing.T) {
	s := newSite(t)
	if err := s.node().Leave(t.Context(), s.journal(t), LeaveOptions{}); !errors.Is(err, ErrNotMember) {
		t.Errorf("error: %v", err)
	}
}

// TestOlderCluster is about a cluster whose nodes do not say what their API servers have: its data is
// not encrypted with this node's key.
func TestOlderCluster(t *testing.T) {
	s := newSite(t)
	run := &joinRun{Node: &Node{Env: s.env, Say: func(string, ...any) {}}, joinParams: &joinParams{}}
	if err := run.serverArguments(&answer{}); err != nil {
		t.Fatal(err)
	}
	if got := read(t, s.env.Args("kube-apiserver")); strings.Contains(got, "encryption") || !strings.Contains(got, "--audit-log-path") {
		t.Errorf("%s", got)
	}
}

func TestKubeletArgs(t *testing.T) {
	for _, text := range []string{"--a=$(reboot)\n", "--a=`reboot`\n", "--a=\x00\n"} {
		if _, err := parseKubeletArgs(text); err == nil {
			t.Errorf("%q was accepted", text)
		}
	}
	f, err := parseKubeletArgs("# of another node\n--root-dir=${SNAP_COMMON}/x\n--v 2\n")
	if err != nil {
		t.Fatal(err)
	}
	if v, _ := f.Get("root-dir"); v != "${SNAP_COMMON}/x" {
		t.Errorf("variables are expanded: %q", v)
	}
}

// TestOwnNodeName holds that a node joins under the name that its arguments give it, and keeps it:
// the arguments of the contacted node's kubelet do not change it.
func TestOwnNodeName(t *testing.T) {
	for _, tc := range []struct{ name, own, theirs, want string }{
		{"none", "", "", "node-a"},
		{"its own", "--hostname-override=blue\n", "", "blue"},
		{"the other's", "", "--hostname-override=red\n", "node-a"},
		{"both", "--hostname-override=blue\n", "--hostname-override=red\n", "blue"},
	} {
		env := snapenv.Under(t.TempDir())
		for path, text := range map[string]string{env.Args("kubelet"): "--v=2\n" + tc.own} {
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		n := &Node{Env: env, Hostname: func() (string, error) { return "Node-A", nil }}
		n.defaults()
		s := &joinRun{Node: n, joinParams: &joinParams{}}
		for range 2 { // a step may run again
			err := s.kubeletArgs(&answer{JoinResponse: api.JoinResponse{KubeletArgs: "--v=3\n" + tc.theirs, Product: api.Product}}, map[string]string{})
			if err != nil {
				t.Fatal(err)
			}
			if got, err := n.nodeName(); got != tc.want || err != nil {
				t.Errorf("%s: the node is %q, %v; want %q", tc.name, got, err, tc.want)
			}
		}
	}
}
