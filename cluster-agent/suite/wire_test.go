package suite

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
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
	k8sasn1 "k8s.io/apimachinery/pkg/apis/asn1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/callback"
	"microk8s/cluster-agent/client"
	"microk8s/internal/args"
	"microk8s/internal/encryption"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/noderegistry"
	"microk8s/internal/pki"
	"microk8s/internal/snapenv"
	"microk8s/internal/token"
	"microk8s/internal/tokenstore"
)

// keysOf lists the keys of a JSON object.
func keysOf(t *testing.T, text []byte) (keys []string, values map[string]any) {
	t.Helper()
	if err := json.Unmarshal(text, &values); err != nil {
		t.Fatal(err)
	}
	for k := range values {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys, values
}

// TestControlPlaneAnswer compares an answer with cluster-agent.md 3.6, key by key.
func TestControlPlaneAnswer(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.members(here+":19001", 0, "10.0.0.2:19001", 0, "10.0.0.3:19001", 2)
	status, body, _ := s.call(from{}, api.PathJoin, request(s.add(tokenstore.Options{}).Reveal(), "n2", false))
	if status != http.StatusOK {
		t.Fatalf("%d %s", status, body)
	}
	keys, v := keysOf(t, body)
	want := []string{
		"api_authz_mode", "api_servers", "apiport", "ca", "ca_key", "callback_token", "cluster_cert", "cluster_cidr", "cluster_key",
		"control_plane_nodes", "hostname_override", "kubelet_args", "node_masks", "product", "service_account_key", "service_cidr", "voters",
	}
	if !slices.Equal(keys, want) {
		t.Errorf("keys %v\nwant %v", keys, want)
	}
	file := func(path string) string {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	for key, want := range map[string]any{
		"ca": file(s.env.Cert("ca.crt")), "ca_key": file(s.env.Cert("ca.key")), "service_account_key": file(s.env.Cert("serviceaccount.key")),
		"cluster_cert": "the datastore's certificate", "cluster_key": "the datastore's key", "apiport": "16443", "api_authz_mode": "Node,RBAC",
		"kubelet_args": file(s.env.Args("kubelet")), "hostname_override": there, "cluster_cidr": "10.1.0.0/16", "service_cidr": "10.152.183.0/24",
		"control_plane_nodes": nil, "callback_token": "", "product": api.Product,
	} {
		if v[key] != want {
			t.Errorf("%s is %v, want %v", key, v[key], want)
		}
	}
	if fmt.Sprint(v["voters"]) != "[10.0.0.1:19001 10.0.0.2:19001]" || fmt.Sprint(v["api_servers"]) != "[10.0.0.1:16443 10.0.0.2:16443 10.0.0.3:16443]" {
		t.Errorf("voters %v, API servers %v", v["voters"], v["api_servers"])
	}
	if len(s.services.restarts) > 0 {
		t.Errorf("restarted %v", s.services.restarts)
	}
	if nodeconfig.ReadState(s.env).Clustered {
		t.Error("the node counts as clustered before the join is confirmed")
	}
}

// TestUpstreamWorker goes through the three requests of upstream's client.
func TestUpstreamWorker(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.members(here+":19001", 0, "10.0.0.2:19001", 0)
	tok := s.add(tokenstore.Options{}).Reveal()
	status, body, _ := s.call(from{}, api.PathJoin, `{"token": "`+tok+`", "hostname": "w2", "port": "25000", "worker": "as-worker", "can_handle_x509_auth": true, "can_handle_custom_etcd": true}`)
	if status != http.StatusOK {
		t.Fatalf("%d %s", status, body)
	}
	keys, v := keysOf(t, body)
	for _, absent := range []string{"voters", "admin_token", "cluster_cert", "cluster_key", "etcd_servers", "etcd_ca", "etcd_cert", "etcd_key"} {
		if slices.Contains(keys, absent) {
			t.Errorf("%s is there", absent)
		}
	}
	if key, there := v["ca_key"]; !there || key != nil || v["service_account_key"] != "" || fmt.Sprint(v["control_plane_nodes"]) != "[10.0.0.1 10.0.0.2]" {
		t.Errorf("ca_key %v (there: %v), service_account_key %v, control_plane_nodes %v", key, there, v["service_account_key"], v["control_plane_nodes"])
	}
	proxy, status, e := s.sign(tok+api.SuffixProxy, csr(t, pkix.Name{CommonName: "system:kube-proxy"}, nil))
	if status != http.StatusOK {
		t.Fatalf("%d %s", status, e.Message)
	}
	kubelet, status, e := s.sign(" "+tok+api.SuffixKubelet+"\n", csr(t, kubeletName("w2"), []string{"w2"}, there, "172.17.0.1"))
	if status != http.StatusOK {
		t.Fatalf("%d %s", status, e.Message)
	}
	if proxy.Subject.CommonName != "system:kube-proxy" || !slices.Equal(proxy.Subject.Organization, []string{"microk8s:node:w2"}) || len(proxy.DNSNames)+len(proxy.IPAddresses) > 0 || len(proxy.ExtKeyUsage) != 1 {
		t.Errorf("the proxy's: %s", proxy.Subject)
	}
	// It does not renew: ten years, client and server, with its names.
	if kubelet.NotAfter.Before(time.Now().AddDate(9, 11, 0)) || len(kubelet.ExtKeyUsage) != 2 || len(kubelet.IPAddresses) != 2 || kubelet.DNSNames[0] != "w2" {
		t.Errorf("the kubelet's: until %s, %v %v", kubelet.NotAfter, kubelet.DNSNames, kubelet.IPAddresses)
	}
	if !nodeconfig.ReadState(s.env).Clustered {
		t.Error("the node does not count as clustered")
	}
	if strings.Contains(s.log.String(), tok) {
		t.Error("the token is in the log")
	}
}

// TestRefusals compares statuses and texts with cluster-agent.md 3.3, and that none of them
// uses a token up or changes anything.
func TestRefusals(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		make   func(s *site, r *api.JoinRequest) from
		status int
		text   string
	}{
		{"not in HA mode", func(s *site, _ *api.JoinRequest) from {
			_ = os.Remove(s.env.Lock(snapenv.LockHA))
			return from{}
		}, 501, "Not possible to join. This is not an HA MicroK8s cluster"},
		{"another port", func(_ *site, r *api.JoinRequest) from {
			r.Port = "25001"
			return from{}
		}, 502, "The port of the cluster agent port has to be set to 25000"},
		{"the same machine", func(*site, *api.JoinRequest) from { return from{address: here} }, 503, "The joining node has the same IP (10.0.0.1) as the node we contact"},
		{"over the loopback", func(*site, *api.JoinRequest) from { return from{address: "127.0.0.1", local: "127.0.0.1"} }, 503, "The joining node has the same IP (127.0.0.1) as the node we contact"},
		{"a name that does not resolve", func(s *site, _ *api.JoinRequest) from {
			s.write(s.env.Args("kube-apiserver"), "--kubelet-preferred-address-types=Hostname,InternalIP\n--etcd-servers=unix:///var/kubernetes/backend/kine.sock:12379\n")
			return from{}
		}, 400, `The hostname (n2) of the joining node does not resolve to the IP "10.0.0.9". Refusing join`},
		{"a member already", func(s *site, _ *api.JoinRequest) from {
			s.members(here+":19001", 0, there+":19001", 0)
			return from{}
		}, 500, "Failed to retrieve dqlite cluster nodes: the joining node (10.0.0.9) is already known to dqlite"},
		{"an old client", func(_ *site, r *api.JoinRequest) from {
			r.CanHandleX509Auth, r.Product = nil, ""
			return from{}
		}, 500, "Joining this MicroK8s cluster requires x509 authentication. update MicroK8s to version 1.28 or newer and retry the join operation"},
		{"external etcd, an old client", func(s *site, r *api.JoinRequest) from {
			s.write(s.env.Args("kube-apiserver"), "--etcd-servers=https://10.0.0.20:2379\n--kubelet-preferred-address-types=InternalIP\n")
			r.CanHandleCustomEtcd, r.Product = nil, ""
			return from{}
		}, 500, "This MicroK8s cluster uses a custom etcd endpoint. update MicroK8s to version 1.28 or newer and retry the join operation"},
		{"the API server is down", func(s *site, _ *api.JoinRequest) from {
			s.cluster.err = errors.New("connection refused")
			return from{}
		}, 503, "The API server of this node does not answer now, try again: connection refused"},
		{"no CA", func(s *site, _ *api.JoinRequest) from {
			_ = os.Remove(s.env.Cert("ca.crt"))
			return from{}
		}, 500, "Failed reading cluster CA: "},
		{"no CA key", func(s *site, _ *api.JoinRequest) from {
			_ = os.Remove(s.env.Cert("ca.key"))
			return from{}
		}, 500, "Failed to retrieve cluster CA key: "},
		{"no datastore key", func(s *site, _ *api.JoinRequest) from {
			_ = os.Remove(filepath.Join(s.env.Backend(), "cluster.key"))
			return from{}
		}, 500, "Failed to retrieve dqlite cluster key: "},
		{"no members", func(s *site, _ *api.JoinRequest) from {
			_ = os.Remove(filepath.Join(s.env.Backend(), "cluster.yaml"))
			return from{}
		}, 500, "Failed to retrieve dqlite cluster nodes: "},
		{"a worker is contacted", func(s *site, _ *api.JoinRequest) from {
			s.write(s.env.Lock(snapenv.LockWorker), "")
			return from{}
		}, 501, "This node is a worker of a cluster. Contact a control plane node"},
	} {
		s := newSite(t)
		tok := s.add(tokenstore.Options{})
		r := request(tok.Reveal(), "n2", false)
		f := tc.make(s, &r)
		_, status, e := s.join(f, r)
		if status != tc.status || !strings.HasPrefix(e.Message, tc.text) || e.Code == "" {
			t.Errorf("%s: %d %q (%s)\nwant %d %q", tc.name, status, e.Message, e.Code, tc.status, tc.text)
		}
		if list, err := s.tokens.List(t.Context()); err != nil || list[0].Uses != 1 || len(list[0].Holds) > 0 {
			t.Errorf("%s: the token is %+v, %v", tc.name, list, err)
		}
		s.nothingDone()
	}
}

// TestInstalledAnew lets a control-plane node back in whose old member of the datastore is dead. Whose a
// member is, is said by the records of the nodes, not by an address.
func TestInstalledAnew(t *testing.T) {
	t.Parallel()
	const (
		known   = "Failed to retrieve dqlite cluster nodes: the joining node (10.0.0.9) is already known to dqlite"
		taken   = "A node called n2 is in the cluster already, with the datastore's member at 10.0.0.8:19001. "
		renewed = "If it was reinstalled, make a token for it with: microk8s add-node --name n2"
		moved   = "10.0.0.8:19001"
	)
	for _, tc := range []struct {
		name, token string
		address     string // of the old member
		owner       string // whose record names it
		online      bool
		text        string
		removed     []string
	}{
		{"a token for anybody", "", there + ":19001", "", false, known + ". " + renewed, nil},
		{"the old member lives", "n2", there + ":19001", "n2", true, known, nil},
		{"a token for it", "n2", there + ":19001", "n2", false, "", []string{there + ":19001"}},
		{"a token for it, and no record says whose the member is", "n2", there + ":19001", "", false, "", []string{there + ":19001"}},
		{"another node's member", "n2", there + ":19001", "n7", false, known + ", as the node n7. If that node is gone for good, remove it with: microk8s remove-node n7 --force", nil},
		{"reinstalled with another address", "n2", moved, "n2", false, "", []string{moved}},
		{"another address, a token for anybody", "", moved, "n2", false, taken + renewed, nil},
		{"another address, and the old one lives", "n2", moved, "n2", true, taken + "Give the joining machine another host name", nil},
		{"a member somewhere else", "n2", moved, "n7", false, "", nil},
	} {
		s := newSite(t)
		s.members(here+":19001", 0, tc.address, 0)
		s.store[1].Online = tc.online
		if tc.owner != "" {
			if _, err := s.nodes.Add(t.Context(), noderegistry.Record{Name: tc.owner, Role: noderegistry.ControlPlane, Secrets: 2, Member: s.store[1].ID}); err != nil {
				t.Fatal(err)
			}
		}
		r := request(s.add(tokenstore.Options{Name: tc.token}).Reveal(), "n2", false)
		answer, status, e := s.join(from{}, r)
		if e.Message != tc.text || (status == http.StatusOK) != (tc.text == "") || !slices.Equal(s.removed, tc.removed) {
			t.Errorf("%s: %d %q, removed %v", tc.name, status, e.Message, s.removed)
		}
		voters := []string{here + ":19001"}
		if tc.removed == nil {
			voters = append(voters, tc.address)
		}
		if status == http.StatusOK && !slices.Equal(answer.Voters, voters) {
			t.Errorf("%s: it is to join %v", tc.name, answer.Voters)
		}
	}
	// It was removed a moment ago, and the file does not say so yet.
	s := newSite(t)
	s.members(here+":19001", 0, there+":19001", 0)
	s.store = s.store[:1]
	s.joined(from{}, request(s.add(tokenstore.Options{}).Reveal(), "n2", false))
}

// TestFirstJoinMovesTheDatastore has several nodes join a lone one at the same time.
func TestFirstJoinMovesTheDatastore(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.members("127.0.0.1:19001", 0)
	s.services.do = func(string) error {
		s.members(here+":19001", 0)
		return nil
	}
	var group sync.WaitGroup
	for i := range 6 {
		tok := s.add(tokenstore.Options{}).Reveal()
		group.Go(func() {
			answer, status, e := s.join(from{address: fmt.Sprintf("10.0.0.%d", 20+i)}, request(tok, fmt.Sprintf("n%d", 20+i), false))
			if status != http.StatusOK {
				t.Errorf("%d %s", status, e.Message)
			} else if !slices.Equal(answer.Voters, []string{here + ":19001"}) {
				t.Errorf("voters %v", answer.Voters)
			}
		})
	}
	group.Wait()
	if !slices.Equal(s.services.restarts, []string{"k8s-dqlite"}) {
		t.Errorf("restarted %v", s.services.restarts)
	}
	// A worker needs no move.
	s = newSite(t)
	s.members("127.0.0.1:19001", 0)
	answer := s.joined(from{}, request(s.add(tokenstore.Options{Worker: true}).Reveal(), "w2", true))
	if len(s.services.restarts) > 0 || !slices.Equal(answer.ControlPlaneNodes, []string{here}) {
		t.Errorf("restarted %v; control plane %v", s.services.restarts, answer.ControlPlaneNodes)
	}
}

// TestMoveFails wants the token to be free again.
func TestMoveFails(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.members("127.0.0.1:19001", 0)
	s.services.do = func(string) error { return errors.New("no") }
	tok := s.add(tokenstore.Options{}).Reveal()
	if _, status, e := s.join(from{}, request(tok, "n2", false)); status != http.StatusInternalServerError || !strings.Contains(e.Message, "cannot restart the datastore") {
		t.Errorf("%d %s", status, e.Message)
	}
	s.services.do = func(string) error {
		s.members(here+":19001", 0)
		return nil
	}
	s.joined(from{address: "10.0.0.8"}, request(tok, "n3", false))
}

// TestOneTokenManyNodes lets nodes ask with one token at the same time: one gets in.
func TestOneTokenManyNodes(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	tok := s.add(tokenstore.Options{}).Reveal()
	var mu sync.Mutex
	won := 0
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			_, status, e := s.join(from{address: fmt.Sprintf("10.0.0.%d", 20+i)}, request(tok, fmt.Sprintf("n%d", 20+i), true))
			mu.Lock()
			defer mu.Unlock()
			if status == http.StatusOK {
				won++
			} else if e.Code != api.CodeTokenHeld {
				t.Errorf("%d %s", status, e.Message)
			}
		})
	}
	group.Wait()
	if won != 1 {
		t.Errorf("%d nodes got in", won)
	}
}

// TestJoinBehindABalancer takes the address that our client says it has.
func TestJoinBehindABalancer(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	r := request(s.add(tokenstore.Options{}).Reveal(), "n2", false)
	r.AdvertiseAddress = "10.0.0.7"
	if got := s.joined(from{address: "10.0.0.100"}, r).HostnameOverride; got != "10.0.0.7" {
		t.Errorf("its address is %s", got)
	}
	up := upstream(s.add(tokenstore.Options{}).Reveal(), "n3", true) // upstream's cannot say
	up.AdvertiseAddress = "10.0.0.8"
	if got := s.joined(from{address: "10.0.0.100"}, up).HostnameOverride; got != "10.0.0.100" {
		t.Errorf("its address is %s", got)
	}
}

func TestResume(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	tok := s.add(tokenstore.Options{}).Reveal()
	s.joined(from{}, request(tok, "n2", false))
	// It got as far as being a member and a node, and begins again.
	s.members(here+":19001", 0, there+":19001", 2)
	s.cluster.nodes = append(s.cluster.nodes, aNode("n2", there, true))
	s.joined(from{}, request(tok, "n2", false))
	if status, e := s.finish(api.PathConfirm, tok, "n2"); status != http.StatusOK {
		t.Fatalf("%d %s", status, e.Message)
	}
	if status, e := s.finish(api.PathConfirm, tok, "n2"); status != http.StatusOK {
		t.Errorf("confirmed again: %d %s", status, e.Message)
	}
	if !nodeconfig.ReadState(s.env).Clustered {
		t.Error("the node does not count as clustered")
	}
}

func TestExternalEtcd(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.write(s.env.Cert("etcd-ca"), "CA")
	s.write(s.env.Cert("etcd-key"), "KEY")
	s.write(s.env.Args("kube-apiserver"), "--secure-port=16443\n--etcd-servers=https://10.0.0.20:2379,https://10.0.0.21:2379\n--etcd-cafile=\"${SNAP_DATA}/certs/etcd-ca\"\n--etcd-keyfile=${SNAP_DATA}/certs/etcd-key\n--kubelet-preferred-address-types=InternalIP\n")
	a := s.joined(from{}, request(s.add(tokenstore.Options{}).Reveal(), "n2", false))
	if a.EtcdServers != "https://10.0.0.20:2379,https://10.0.0.21:2379" || a.EtcdCA != "CA" || a.EtcdKey != "KEY" || a.EtcdCert != "" || a.ClusterCert != "" || a.Voters != nil || a.CAKey == nil {
		t.Errorf("%+v", a)
	}
}

// TestOurClient is the real client against the real server, over TLS: proof, preflight, join.
func TestOurClient(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	address, _ := s.live()
	for name, tok := range map[string]token.Token{"known": s.add(tokenstore.Options{}), "foreign": token.New()} {
		target, err := client.Parse(address + "/" + tok.Reveal() + "/000000000000")
		if err != nil {
			t.Fatal(err)
		}
		c := client.New(target)
		defer c.Close()
		r := request("", "n2", false)
		r.AdvertiseAddress = "10.0.0.7"
		r.Version = "v1.30.0"
		found, err := c.Preflight(t.Context(), api.PreflightRequest{JoinRequest: r, MachineID: "m"})
		if name == "foreign" {
			var verify *client.VerifyError
			if !errors.As(err, &verify) {
				t.Errorf("a token that this cluster did not make: %v", err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(found.Problems) != 1 || found.Problems[0].Code != api.CodeVersion || !found.Problems[0].Fatal || found.Address != "10.0.0.7" || found.Time == 0 || found.Version != "v1.37.1" {
			t.Errorf("%+v", found)
		}
		if _, err := c.Join(t.Context(), r); err != nil {
			t.Error(err)
		}
		if err := c.Release(t.Context(), "n2"); err != nil {
			t.Error(err)
		}
	}
}

// TestServerArguments shows that the API server's arguments in which nodes must agree are carried to
// control-plane nodes and to nobody else, or the join is refused with the list.
func TestServerArguments(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	const common = "--secure-port=16443\n--kubelet-preferred-address-types=InternalIP\n--etcd-servers=unix:///var/kubernetes/backend/kine.sock:12379\n"
	s.write(s.env.Args("kube-apiserver"), common+"--encryption-provider-config=${SNAP_DATA}/args/encryption.yaml\n--feature-gates=A=true\n")
	s.write(s.env.Args("encryption.yaml"), "the key")
	tok := s.add(tokenstore.Options{}).Reveal()
	if _, status, refusal := s.join(from{}, request(tok, "n2", false)); refusal.Code != api.CodeOldClient || status != http.StatusNotImplemented || !strings.Contains(refusal.Message, "encrypts Secrets") {
		t.Errorf("a node that cannot take over the key: %d %+v", status, refusal)
	}
	w, status, why := s.join(from{address: "10.0.0.40"}, request(s.add(tokenstore.Options{Worker: true}).Reveal(), "w9", true))
	if status != http.StatusOK || w.ServerArguments != nil {
		t.Errorf("a worker got %+v (%d %+v)", w, status, why)
	}
	r := request(tok, "n2", false)
	r.ServerArguments = map[string]string{"carries": "1"}
	a := s.joined(from{}, r)
	if a.ServerArguments == nil || a.ServerArguments.Encryption() == nil || a.ServerArguments.Encryption().Content != "the key" || fmt.Sprint(a.ServerArguments.Flags["feature-gates"]) != "[A=true]" {
		t.Errorf("carried: %+v", a.ServerArguments)
	}

	s.write(s.env.Args("kube-apiserver"), common+"--audit-webhook-config-file=${SNAP_DATA}/args/hook.conf\n--oidc-ca-file=/nowhere\n")
	s.write(s.env.Args("hook.conf"), "clusters: [{cluster: {certificate-authority: /etc/ca.pem}}]")
	r = request(s.add(tokenstore.Options{}).Reveal(), "n3", false)
	r.ServerArguments = map[string]string{"carries": "1"}
	if _, _, refusal := s.join(from{address: "10.0.0.30"}, r); refusal.Code != api.CodeArguments || !strings.Contains(refusal.Message, "--audit-webhook-config-file: ") || !strings.Contains(refusal.Message, "--oidc-ca-file: ") {
		t.Errorf("what cannot be carried: %+v", refusal)
	}
}

// TestEncryptionKeys is about the keys of encryption at rest that another control-plane node sends:
// they are taken only where nothing that was encrypted gets lost.
func TestEncryptionKeys(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := encryption.NewKey(), encryption.NewKey()
	path := encryption.Path(s.env)
	send := func(text string) (int, string) { return s.configure(api.ConfigureRequest{Encryption: text}) }
	if status, _ := send(string(encryption.New())); status == http.StatusOK {
		t.Error("a node that does not encrypt took a key")
	}
	s.write(path, string(encryption.Keys{a}.Encode()))
	for name, text := range map[string]string{"no configuration": "hello", "without the key that data has": string(encryption.Keys{b}.Encode())} {
		if status, _ := send(text); status == http.StatusOK {
			t.Errorf("%s was taken", name)
		}
	}
	for _, keys := range []encryption.Keys{{a, b}, {b, a}, {b}} { // a rotation
		if status, answer := send(string(keys.Encode())); status != http.StatusOK {
			t.Fatalf("%v: %d %s", keys.Names(), status, answer)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := encryption.Parse(data); err != nil || !slices.Equal(got, keys) {
			t.Errorf("%v, %v, want %v", got.Names(), err, keys.Names())
		}
	}
	s.write(s.env.Lock(snapenv.LockWorker), "")
	if status, _ := send(string(encryption.Keys{b}.Encode())); status == http.StatusOK {
		t.Error("a worker took keys")
	}
}

// TestPreflight says everything at once, and changes nothing.
func TestPreflight(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.cluster.nodes[1].Status.NodeInfo.MachineID = "the-same"
	tok := s.add(tokenstore.Options{}).Reveal()
	r := api.PreflightRequest{JoinRequest: upstream(tok, "w1", false), MachineID: "the-same"}
	r.Hostname, r.Port = "n1", "25001"
	status, body, _ := s.call(from{address: here}, api.PathPreflight, r)
	var found api.PreflightResponse
	if err := json.Unmarshal(body, &found); err != nil || status != http.StatusOK {
		t.Fatalf("%d %s: %v", status, body, err)
	}
	var codes []api.Code
	for _, p := range found.Problems {
		codes = append(codes, p.Code)
	}
	if want := []api.Code{api.CodePort, api.CodeSameAddress, api.CodeDatastore, api.CodeMember, api.CodeNameTaken, api.CodeCloned}; !slices.Equal(codes, want) {
		t.Errorf("%v, want %v", codes, want)
	}
	if list, err := s.tokens.List(t.Context()); err != nil || len(list[0].Holds) > 0 {
		t.Errorf("the token is reserved: %v, %v", list, err)
	}
}

func TestMethodsAndPaths(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for _, tc := range []struct {
		method, path string
		status       int
		body         string
	}{
		{"GET", "/health", 200, `{"status":"OK"}`},
		{"HEAD", "/health", 404, ""},
		{"GET", api.PathJoin, 404, ""},
		{"GET", api.PathDqliteRemove, 405, ""},
		{"PUT", api.PathDqliteRemove, 405, ""},
		{"POST", api.PathJoin + "/", 404, `{"error":"Not found"}`},
		{"POST", "/cluster/api/v1.0/join", 404, `{"error":"Not found"}`}, // only non-HA clusters had it
		{"POST", api.PathJoin, 400, `{"error":"Unexpected end of JSON input","code":"bad-request"}`},
	} {
		rec := httptest.NewRecorder()
		s.srv.Handler().ServeHTTP(rec, httptest.NewRequestWithContext(t.Context(), tc.method, "https://"+here+tc.path, nil))
		if rec.Code != tc.status || rec.Body.String() != tc.body {
			t.Errorf("%s %s: %d %q, want %d %q", tc.method, tc.path, rec.Code, rec.Body, tc.status, tc.body)
		}
	}
}

// TestRequestForms has what upstream's programs may send, and bodies that are no request.
func TestRequestForms(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for body, status := range map[string]int{
		``: 400, `{`: 400, `[]`: 400, `{"token": 5}`: 400, `{"port": 25000}`: 400, `{} x`: 400, `null`: 500, `{}`: 500, `{"extra": [1]}`: 500,
		"token=x&port=y": 400, strings.Repeat("[", 100_000): 400,
	} {
		got, answer, _ := s.call(from{}, api.PathJoin, body)
		if got != status {
			t.Errorf("%.30q: %d %s", body, got, answer)
		}
	}
	for worker, want := range map[string]bool{"true": true, `"as-worker"`: true, "false": false, "null": false, `"as-controlplane"`: false, "1": false, "{}": false} {
		var r api.JoinRequest
		if err := json.Unmarshal([]byte(`{"WORKER": `+worker+`}`), &r); err != nil || bool(r.Worker) != want {
			t.Errorf("worker %s: %v, %v", worker, r.Worker, err)
		}
	}
}

func TestConfigure(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	own, err := callback.Load(s.env)
	if err != nil {
		t.Fatal(err)
	}
	status, body, _ := s.call(from{cert: s.caller()}, api.PathConfigure, `{"callback": "`+own+`", "action_str": "x", "service": [
		{"name": "kube-apiserver", "arguments_update": [{"--key": "a=b"}, {"--key": "new", "--other": "${SNAP_DATA}/x"}], "arguments_remove": ["--secure-port", "--key"]},
		{"name": "kube-proxy", "restart": "yes"}, {"name": "kubelet", "restart": "no"}, {"name": "kubelet", "restart": null}, {"name": "kubelet", "restart": true}],
		"addon": [{"name": "dns", "enable": "true"}, {"name": "ingress", "disable": true}, {"name": "other"}, {"name": "both", "enable": true, "disable": true}]}`)
	if status != http.StatusOK || string(body) != `{"result":"ok"}` {
		t.Fatalf("%d %s", status, body)
	}
	f, err := args.Load(s.env.Args("kube-apiserver"), args.GrammarA)
	if err != nil {
		t.Fatal(err)
	}
	if v, _ := f.Get("key"); v != "new" {
		t.Errorf("--key=%s", v)
	}
	if v, _ := f.Get("other"); v != "${SNAP_DATA}/x" {
		t.Errorf("--other=%s", v)
	}
	if _, there := f.Get("secure-port"); there {
		t.Error("--secure-port is still there")
	}
	if !slices.Equal(s.services.restarts, []string{"kubelite", "kubelite"}) {
		t.Errorf("restarted %v", s.services.restarts)
	}
	var ran []string
	for _, argv := range s.ran {
		ran = append(ran, strings.Join(argv[1:], " "))
	}
	if !slices.Equal(ran, []string{"enable dns", "disable ingress", "enable both"}) {
		t.Errorf("ran %v", ran)
	}
	// The agent itself goes last, after the answer.
	status, body, _ = s.call(from{cert: s.caller()}, api.PathConfigure, `{"callback": "`+own+`", "service": [{"name": "cluster-agent", "restart": true}, {"name": "containerd", "restart": true}]}`)
	if status != http.StatusOK {
		t.Fatalf("%d %s", status, body)
	}
	s.waitFor(func() bool {
		s.services.mu.Lock()
		defer s.services.mu.Unlock()
		return slices.Equal(s.services.restarts[2:], []string{"containerd", "cluster-agent"})
	})
	s.services.do = func(string) error { return errors.New("no") }
	status, body, _ = s.call(from{cert: s.caller()}, api.PathConfigure, `{"callback": "`+own+`", "service": [{"name": "kubelet", "restart": true}]}`)
	if status != http.StatusInternalServerError || !strings.Contains(string(body), `Failed to restart service \"kubelet\": no`) {
		t.Errorf("%d %s", status, body)
	}
}

func (s *site) waitFor(done func() bool) {
	s.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for limit := time.After(20 * time.Second); !done(); {
		select {
		case <-tick.C:
		case <-limit:
			s.t.Fatal("it does not happen")
		}
	}
}

func TestImageImport(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	own, err := callback.Load(s.env)
	if err != nil {
		t.Fatal(err)
	}
	status, body, _ := s.call(from{cert: s.caller(), header: map[string]string{"x-microk8s-callback-token": own}}, api.PathImageImport, "an archive")
	// Upstream's clients look at the status; ours say what was imported.
	if status != http.StatusOK || string(body) != `{"status":"OK","images":["docker.io/library/x:1"],"skipped":["y has no name"]}` {
		t.Fatalf("%d %s", status, body)
	}
	if !slices.Equal(s.ran[0], []string{"import", "an archive"}) {
		t.Errorf("ran %q", s.ran)
	}
	status, body, _ = s.call(from{cert: s.caller(), header: map[string]string{"x-microk8s-callback-token": own}}, api.PathImageImport, "nothing")
	if status != http.StatusInternalServerError || !strings.Contains(string(body), "Failed to import the image: no image in it can be used: x is for linux/s390x") {
		t.Errorf("an archive of no use: %d %s", status, body)
	}
	status, body, _ = s.call(from{header: map[string]string{"x-microk8s-callback-token": "wrong"}}, api.PathImageImport, "an archive")
	if status != http.StatusUnauthorized || !strings.Contains(string(body), `"error":"Invalid token"`) {
		t.Errorf("%d %s", status, body)
	}
}

func TestDqliteRemove(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	right := from{header: map[string]string{"capi-auth-token": "right"}}
	status, body, _ := s.call(right, api.PathDqliteRemove, api.RemoveRequest{Endpoint: "1.1.1.1:1234"})
	if status != http.StatusInternalServerError || !strings.Contains(string(body), "Failed to remove from dqlite: failed to validate CAPI auth token: failed to read token file: ") {
		t.Errorf("without a file: %d %s", status, body)
	}
	s.write(s.env.HostPath("capi/etc/token"), "  right\n")
	status, body, _ = s.call(right, api.PathDqliteRemove, api.RemoveRequest{Endpoint: "1.1.1.1:1234"})
	if status != http.StatusOK || string(body) != "null" || !slices.Equal(s.removed, []string{"1.1.1.1:1234"}) {
		t.Errorf("%d %s, removed %v", status, body, s.removed)
	}
	status, body, _ = s.call(from{}, api.PathDqliteRemove, api.RemoveRequest{Endpoint: "1.1.1.1:1234"})
	if status != http.StatusUnauthorized || !strings.Contains(string(body), "Failed to remove from dqlite: invalid CAPI auth token") {
		t.Errorf("%d %s", status, body)
	}
}

// TestAudit wants one line for each call, that says who and what and holds no secret.
func TestAudit(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	tok := s.add(tokenstore.Options{})
	s.joined(from{}, request(tok.Reveal(), "n2", false))
	s.finish(api.PathConfirm, tok.Reveal(), "n2")
	s.join(from{address: "10.0.0.66"}, request(token.New().Reveal(), "n3", true))
	text := s.log.String()
	id, _ := tok.Derive()
	for _, want := range []string{"call=join from=" + there + " node=n2 worker=false ours=true token=" + id.String(), "keys=true result=ok", "call=confirm", "from=10.0.0.66 node=n3", "result=refused status=500 code=token-invalid"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in the log:\n%s", want, text)
		}
	}
	for _, secret := range []string{tok.Reveal(), "PRIVATE KEY", "the datastore's key", s.secret("n2")} {
		if strings.Contains(text, secret) {
			t.Errorf("the log holds %.20q", secret)
		}
	}
}

// TestAuditOfChanges: the line says what was changed and by whom, and no value.
func TestAuditOfChanges(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	status, answer := s.configure(api.ConfigureRequest{
		Services: []api.ConfigureService{{Name: "kube-apiserver", Update: []map[string]string{{"--oidc-client-secret": "hunter2"}}, Remove: []string{"--v"}}, {Name: "kubelet", Restart: true}},
		Addons:   []api.ConfigureAddon{{Name: "dns", Enable: true}},
	})
	if status != http.StatusOK {
		t.Fatalf("%d %s", status, answer)
	}
	text := s.log.String()
	for _, want := range []string{"by=microk8s:agent:n2", "kube-apiserver: set --oidc-client-secret", "kube-apiserver: remove --v", "kubelet: restart", "addon dns: enable", "result=ok"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in the log:\n%s", want, text)
		}
	}
	if strings.Contains(text, "hunter2") {
		t.Error("a value is in the log")
	}
}

// renew asks with the certificate of w1's present join, as it is at a time.
func (s *site) renew(r api.RenewRequest) (*api.RenewResponse, int) {
	s.t.Helper()
	ca, caKey := s.ca()
	name := kubeletName("w1")
	name.ExtraNames = []pkix.AttributeTypeAndValue{{Type: k8sasn1.X509UID(), Value: joinOfW1}}
	_, key := csrKey(s.t, name, nil)
	der, err := issueWith(ca, caKey, name, &key.PublicKey)
	if err != nil {
		s.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		s.t.Fatal(err)
	}
	status, body, _ := s.call(from{address: workers, cert: cert}, api.PathRenew, r)
	var answer api.RenewResponse
	if err := json.Unmarshal(body, &answer); err != nil {
		s.t.Fatal(err)
	}
	return &answer, status
}

// TestRenewLeavesOut: names and addresses that are others' are left out of a renewed certificate,
// which is given all the same.
func TestRenewLeavesOut(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.write(s.env.Args("kube-proxy"), "--cluster-cidr=10.1.0.0/16\n")
	answer, status := s.renew(api.RenewRequest{Kubelet: csr(t, kubeletName("w1"), []string{"w1", "kubernetes", "n1"}, workers, "10.0.0.77", here, "10.152.183.1", "127.0.0.1", "10.1.3.1"), Secrets: 2})
	if status != http.StatusOK {
		t.Fatalf("%d", status)
	}
	cert, err := pki.ParseCert([]byte(answer.Kubelet))
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(cert.DNSNames, cert.IPAddresses) != "[w1] ["+workers+" 10.0.0.77]" || len(answer.Refused) != 5 {
		t.Errorf("%v %v, left out %q", cert.DNSNames, cert.IPAddresses, answer.Refused)
	}
	if life := cert.NotAfter.Sub(cert.NotBefore); life > 31*24*time.Hour || answer.Secrets != 2 || answer.CallbackToken != s.secret("w1") {
		t.Errorf("for %s; %+v", life, answer)
	}
}

// TestRenewAfterALongTime: a worker that was switched off while its certificate ended comes back.
func TestRenewAfterALongTime(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.now = s.now.AddDate(0, 6, 0)
	if _, status := s.renew(api.RenewRequest{Kubelet: csr(t, kubeletName("w1"), []string{"w1"})}); status != http.StatusOK {
		t.Errorf("after half a year: %d", status)
	}
	s.now = s.now.AddDate(1, 0, 0)
	if _, status := s.renew(api.RenewRequest{}); status != http.StatusUnauthorized {
		t.Errorf("after more than a year: %d", status)
	}
}

// TestRecordOfAJoin follows the record through a join: it is there before a certificate, counts when
// the node confirms, and says so again. A node that could not confirm does so with its certificate.
func TestRecordOfAJoin(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	tok := s.add(tokenstore.Options{}).Reveal()
	s.joined(from{}, request(tok, "w2", true))
	record, err := s.nodes.Get(t.Context(), "w2")
	if err != nil || !record.Pending() || record.Role != noderegistry.Worker || record.Secrets != 2 || len(record.Join) != 32 {
		t.Fatalf("%+v, %v", record, err)
	}
	cert, status, e := s.sign(tok+api.SuffixKubelet, csr(t, kubeletName("w2"), []string{"w2"}))
	if status != http.StatusOK {
		t.Fatalf("%d %s", status, e.Message)
	}
	ask := func() *api.RenewResponse {
		t.Helper()
		status, body, _ := s.call(from{cert: cert}, api.PathRenew, api.RenewRequest{Secrets: 2})
		var answer api.RenewResponse
		if err := json.Unmarshal(body, &answer); err != nil || status != http.StatusOK {
			t.Fatalf("%d %s", status, body)
		}
		return &answer
	}
	if answer := ask(); answer.CallbackToken != "" {
		t.Error("a secret before the join is confirmed")
	}
	s.now = s.now.Add(11 * time.Minute) // nobody heard the node confirm
	if answer := ask(); answer.CallbackToken != s.secret("w2") {
		t.Error("no secret for a node that is in")
	}
	if record, err := s.nodes.Get(t.Context(), "w2"); err != nil || record.Pending() {
		t.Errorf("%+v, %v", record, err)
	}
	s.refused(from{}, request(tok, "w3", true), http.StatusInternalServerError, api.CodeTokenUsed)
	if status, e := s.finish(api.PathConfirm, tok, "w2"); status != http.StatusOK {
		t.Errorf("%d %s", status, e.Message)
	}
}

// TestTakenBack: a join that is given up leaves no Node behind, and the token is as good as before,
// whatever kind it is. A Node that was there before stays.
func TestTakenBack(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]tokenstore.Options{"one use": {}, "unlimited": {Uses: tokenstore.Unlimited, TTL: time.Hour}} {
		s := newSite(t)
		tok := s.add(o).Reveal()
		s.joined(from{}, request(tok, "w2", true))
		ghost := aNode("w2", there, true) // its kubelet was there already, and said Ready
		ghost.CreationTimestamp = metav1.NewTime(s.now.Add(time.Second))
		s.cluster.nodes = append(s.cluster.nodes, ghost)
		s.joined(from{}, request(tok, "w2", true)) // interrupted, and begun again
		if status, e := s.finish(api.PathRelease, tok, "w2"); status != http.StatusOK {
			t.Fatalf("%s: %d %s", name, status, e.Message)
		}
		if slices.ContainsFunc(s.cluster.nodes, func(n corev1.Node) bool { return n.Name == "w2" }) {
			t.Errorf("%s: the Node is still there", name)
		}
		if _, err := s.nodes.Get(t.Context(), "w2"); !errors.Is(err, noderegistry.ErrNone) {
			t.Errorf("%s: the record is still there: %v", name, err)
		}
		s.joined(from{}, request(tok, "w2", true))
		if status, e := s.finish(api.PathConfirm, tok, "w2"); status != http.StatusOK {
			t.Fatalf("%s: %d %s", name, status, e.Message)
		}
		s.cluster.nodes = append(s.cluster.nodes, ghost)
		if status, _ := s.finish(api.PathRelease, tok, "w2"); status != http.StatusOK || len(s.cluster.nodes) != 3 {
			t.Errorf("%s: a release after the join was confirmed: %d, nodes %d", name, status, len(s.cluster.nodes))
		}
	}
	s := newSite(t)
	s.cluster.nodes[1] = aNode("w1", workers, false)
	tok := s.add(tokenstore.Options{Name: "w1"}).Reveal()
	s.joined(from{address: workers}, request(tok, "w1", true))
	if status, _ := s.finish(api.PathRelease, tok, "w1"); status != http.StatusOK || len(s.cluster.nodes) != 2 {
		t.Errorf("a Node from before the join: %d, nodes %d", status, len(s.cluster.nodes))
	}
}

// TestEarlierBuild: while control-plane nodes of the build before are in the cluster, workers of it
// are told what all callers know; afterwards none of its control-plane nodes joins any more.
func TestEarlierBuild(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	before := token.NewCallbackKey()
	s.api.Set(&corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: callback.SecretName, Namespace: "kube-system"}, Data: map[string][]byte{"callback-key": before},
	})
	const role = "rbac.authorization.k8s.io/v1/clusterroles/" + noderegistry.Role
	complete := s.api.Get(role)
	s.api.Remove(role)
	legacy := token.LegacyCallback(before, "w1")
	if answer, status := s.renew(api.RenewRequest{}); status != http.StatusOK || answer.CallbackToken != legacy || answer.LegacyCallback != "" {
		t.Errorf("a worker of the build before: %d %+v", status, answer)
	}
	if answer, status := s.renew(api.RenewRequest{Secrets: 2}); status != http.StatusOK || answer.CallbackToken != s.secret("w1") || answer.LegacyCallback != legacy {
		t.Errorf("a worker of this build: %d %+v", status, answer)
	}
	r := request(s.add(tokenstore.Options{}).Reveal(), "n2", false)
	r.Secrets = 0
	if s.joined(from{}, r).CallbackToken == "" {
		t.Error("a control plane node of the build before gets no secret")
	}
	s.api.Set(complete)
	if err := s.keys.Seal(t.Context()); err != nil {
		t.Fatal(err)
	}
	r = request(s.add(tokenstore.Options{}).Reveal(), "n4", false)
	r.Secrets = 0
	s.refused(from{}, r, http.StatusInternalServerError, api.CodeOldClient)
	if answer, status := s.renew(api.RenewRequest{}); status != http.StatusOK || answer.CallbackToken != s.secret("w1") {
		t.Errorf("a worker of the build before, later: %d %+v", status, answer)
	}
}

// TestNoTickets: a proof is tied to one full handshake.
func TestNoTickets(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	address, roots := s.live()
	config := &tls.Config{RootCAs: roots, ClientSessionCache: tls.NewLRUClientSessionCache(4), MaxVersion: tls.VersionTLS13}
	for range 3 {
		conn, err := tls.Dial("tcp", address, config)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		if _, err := conn.Read(make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		if conn.ConnectionState().DidResume {
			t.Error("a connection was resumed")
		}
		conn.Close()
	}
}

// FuzzRequests sends arbitrary bodies to every call. Nothing but the right secrets gets an
// answer, and nothing is ever done.
func FuzzRequests(f *testing.F) {
	for _, seed := range []string{`{}`, `null`, `{"token":"x","hostname":"n","port":"25000","worker":true}`, `{"callback":"","service":[{"name":"../x","arguments_update":[{"a":"b"}],"restart":"yes"}]}`, `{"id":"0011223344556677","nonce":"AAAA"}`, `{"remove_endpoint":"x"}`} {
		f.Add([]byte(seed))
	}
	s := newSite(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		s.t = t
		for _, path := range []string{api.PathProof, api.PathPreflight, api.PathJoin, api.PathSignCert, api.PathConfirm, api.PathRelease, api.PathRenew, api.PathConfigure, api.PathDqliteRemove} {
			if status, answer, _ := s.call(from{}, path, string(body)); status == http.StatusOK || !json.Valid(answer) {
				t.Errorf("%s: %d %s", path, status, answer)
			}
		}
		s.nothingDone()
		s.slept = nil
		s.log.Reset()
	})
}

// FuzzCertificateRequests has a worker with a good token ask for arbitrary certificates. What
// it gets is its own identity or nothing.
func FuzzCertificateRequests(f *testing.F) {
	f.Add([]byte(csr(f, kubeletName("n2"), []string{"n2"}, there)))
	f.Add([]byte(csr(f, pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}}, []string{"kubernetes"})))
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\nMAA=\n-----END CERTIFICATE REQUEST-----\n"))
	s := newSite(f)
	tok := s.add(tokenstore.Options{Persist: true}).Reveal()
	f.Fuzz(func(t *testing.T, request []byte) {
		s.t = t
		r := upstream(tok, "n2", true)
		r.Product = api.Product
		s.joined(from{}, r)
		cert, status, _ := s.sign(tok+api.SuffixKubelet, string(request))
		if status != http.StatusOK {
			return
		}
		if cert.IsCA || cert.Subject.CommonName != "system:node:n2" || !slices.Equal(cert.Subject.Organization, []string{"system:nodes"}) || slices.ContainsFunc(cert.DNSNames, func(n string) bool { return n != "n2" }) {
			t.Errorf("%s, %v", cert.Subject, cert.DNSNames)
		}
		s.log.Reset()
	})
}
