package cluster

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/journal"
	"microk8s/internal/noderegistry"
)

// member makes a node the member of a cluster with two others of which nobody answers, or, with
// answers, one at 127.0.0.1. own is its address.
func (s *site) member(t *testing.T, own string, answers bool) {
	t.Helper()
	live := s.env.BackendLive()
	cert, key, _ := s.pair()
	other := "127.0.0.1:1"
	if answers {
		other = listenMember(t, cert, key)
	}
	for name, text := range map[string]string{
		"info.yaml":         "Address: " + own + "\nID: 7\nRole: 0\n",
		"cluster.yaml":      fmt.Sprintf("- {Address: %q, ID: 1, Role: 0}\n- {Address: %q, ID: 7, Role: 0}\n- {Address: \"127.0.0.1:2\", ID: 3, Role: 0}\n", other, own),
		storedir.CertFile:   cert,
		storedir.KeyFile:    key,
		"snapshot-1-900-12": "", // how far it has come
	} {
		if err := os.WriteFile(filepath.Join(live, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// listenMember answers as a member of the datastore does to who asks whether it lives: with an
// empty answer to each request of dqlite's protocol. It is a fake, since dqlite needs cgo.
func listenMember(t *testing.T, cert, key string) string {
	t.Helper()
	pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{pair}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				buf := make([]byte, 4096)
				for first := true; ; first = false {
					n, err := conn.Read(buf)
					if err != nil {
						return
					}
					if first && n == 8 { // the protocol's version, then the request
						continue
					}
					// Metadata: failure domain and weight.
					answer := make([]byte, 24)
					answer[0], answer[4] = 2, 10 // two words, of type metadata
					if _, err := conn.Write(answer); err != nil {
						return
					}
				}
			}()
		}
	}()
	return l.Addr().String()
}

func left(t *testing.T, s *site) []string {
	t.Helper()
	out, err := filepath.Glob(s.env.BackendLive() + ".left-*")
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestLeaveWithTheLastCopy: nobody answers, so this node's copy of the data may be the only one left. By
// force it leaves only when a person has said so, and keeps the copy, with the keys that belong to
// it.
func TestLeaveWithTheLastCopy(t *testing.T) {
	s := newSite(t)
	s.member(t, ownIP+":2380", false)
	ca := read(t, s.env.Cert("ca.key"))
	before := s.tree(t)
	j := s.journal(t)
	if err := s.node().Leave(t.Context(), j, LeaveOptions{Force: true}); !errors.Is(err, ErrUnconfirmed) {
		t.Fatalf("without an answer: %v", err)
	}
	var asked string
	no := errors.New("no")
	if err := s.node().Leave(t.Context(), j, LeaveOptions{Force: true, Confirm: func(q string) error { asked = q; return no }}); !errors.Is(err, no) {
		t.Fatalf("answered with no: %v", err)
	}
	for _, want := range []string{"127.0.0.1:1, 127.0.0.1:2", "the last copy", "entry 900 or later", "last written "} {
		if !strings.Contains(asked, want) {
			t.Errorf("the question does not have %q: %s", want, asked)
		}
	}
	compare(t, before, s.tree(t))
	if err := s.node().Leave(t.Context(), j, LeaveOptions{Force: true, Confirm: func(string) error { return nil }}); err != nil {
		t.Fatal(err)
	}
	kept := left(t, s)
	if len(kept) != 1 {
		t.Fatalf("kept: %q", kept)
	}
	if got := read(t, filepath.Join(kept[0], "data")); got != ownKey {
		t.Errorf("the copy has %q", got)
	}
	if got := read(t, filepath.Join(kept[0], leftNode, "certs", "ca.key")); got != ca {
		t.Error("the CA's key is not kept")
	}
	if st, err := os.Stat(kept[0]); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("its mode: %v, %v", st.Mode(), err)
	}
	if read(t, s.env.Cert("ca.key")) == ca || IsMember(s.env) {
		t.Error("the node has not left")
	}
	if ini := read(t, filepath.Join(s.env.BackendLive(), "init.yaml")); !strings.Contains(ini, "127.0.0.1:2380") {
		t.Errorf("the new member does not have the old one's port: %s", ini)
	}
	if !slices.ContainsFunc(s.said, func(l string) bool { return strings.Contains(l, kept[0]) }) {
		t.Errorf("said: %q", s.said)
	}
}

// TestLeaveKeepsTheNewestCopies: how many copies are kept is bounded, and the newest is never the one that is lost.
func TestLeaveKeepsTheNewestCopies(t *testing.T) {
	s := newSite(t)
	n := s.node()
	n.defaults()
	day := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for i := range keptCopies + 3 {
		dir := filepath.Join(t.TempDir(), "x")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		// The clock goes back before the last one.
		date := day.AddDate(0, 0, i)
		if i == keptCopies+2 {
			date = day.AddDate(-1, 0, 0)
		}
		path, err := n.keepDated(dir, kindLeft, date)
		if err != nil {
			t.Fatal(err)
		}
		kept := left(t, s)
		if len(kept) > keptCopies || !slices.Contains(kept, path) {
			t.Errorf("after %s: %q", path, kept)
		}
	}
}

// TestJoinKeepsEarlierBackups joins and leaves twice: the data from before the first join is still
// there.
func TestJoinKeepsEarlierBackups(t *testing.T) {
	s := newSite(t)
	for i := range 2 {
		if err := os.WriteFile(filepath.Join(s.env.BackendLive(), "data"), fmt.Appendf(nil, "data %d", i), 0o600); err != nil {
			t.Fatal(err)
		}
		j := s.journal(t)
		if err := s.node().Join(t.Context(), j, s.options(t, true)); err != nil {
			t.Fatal(err)
		}
		if err := s.node().Leave(t.Context(), j, LeaveOptions{}); err != nil {
			t.Fatal(err)
		}
		j.Close()
	}
	dated, err := filepath.Glob(s.env.BackendLive() + ".backup-*")
	if err != nil || len(dated) != 1 {
		t.Fatalf("earlier backups: %q, %v", dated, err)
	}
	if got := read(t, filepath.Join(dated[0], "data")); got != "data 0" {
		t.Errorf("the earlier one has %q", got)
	}
	if got := read(t, filepath.Join(s.env.BackendLive()+".backup", "data")); got != "data 1" {
		t.Errorf("the last one has %q", got)
	}
}

// TestLeaveOnACopyOfAMember: the disk of a member runs on another machine, with another address. The
// member is another machine now, and is never removed from here, whether it answers or not.
func TestLeaveOnACopyOfAMember(t *testing.T) {
	for _, answers := range []bool{true, false} {
		t.Run(fmt.Sprint(answers), func(t *testing.T) {
			s := newSite(t)
			s.member(t, "10.9.0.77:19001", answers)
			if Elsewhere(s.env) != "10.9.0.77" { // with this machine's real addresses
				t.Error("it is not recognised")
			}
			n := s.node()
			n.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
				if address == "10.9.0.77:19001" {
					return nil, errors.New("nobody there")
				}
				return (&net.Dialer{}).DialContext(ctx, network, address)
			}
			n.removeWait = time.Nanosecond // no removal can succeed
			if !answers {
				if err := n.Leave(t.Context(), s.journal(t), LeaveOptions{}); !errors.Is(err, ErrContact) {
					t.Errorf("without force: %v", err)
				}
			}
			j := s.journal2(t)
			err := n.Leave(t.Context(), j, LeaveOptions{Force: !answers, Confirm: func(string) error { return nil }})
			if err != nil {
				t.Fatal(err)
			}
			if kept := left(t, s); len(kept) != 1 { // nobody said that the data is elsewhere
				t.Errorf("kept: %q", kept)
			}
			if !slices.ContainsFunc(s.said, func(l string) bool {
				return strings.Contains(l, "is not an address of this host; that member was left as it is")
			}) {
				t.Errorf("said: %q", s.said)
			}
			if IsMember(s.env) {
				t.Error("the node has not left")
			}
		})
	}
}

// apiNodes is an API server with Nodes and their records only, which can be deleted, with a UID if one
// is asked for. It is a fake of the far side.
type apiNodes struct {
	nodes   map[string]*corev1.Node
	records []noderegistry.Record // not deleted
	deleted []string
}

func (f *apiNodes) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	name, one := strings.CutPrefix(r.URL.Path, "/api/v1/nodes/")
	node := f.nodes[name]
	status := func(code int, reason metav1.StatusReason) {
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Reason: reason, Code: int32(code)})
	}
	switch {
	case strings.Contains(r.URL.Path, "/secrets") && r.Method != http.MethodGet: // of callbacks
		_, _ = io.Copy(w, r.Body)
	case strings.HasSuffix(r.URL.Path, "/clusterrolebindings"): // records of nodes
		list := rbacv1.ClusterRoleBindingList{TypeMeta: metav1.TypeMeta{Kind: "ClusterRoleBindingList", APIVersion: "rbac.authorization.k8s.io/v1"}}
		for _, r := range f.records {
			list.Items = append(list.Items, rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{
				Name: noderegistry.Prefix + r.Name, UID: r.UID,
				Annotations: map[string]string{"microk8s.io/role": string(r.Role), "microk8s.io/datastore-member": strconv.FormatUint(r.Member, 10)},
			}})
		}
		_ = json.NewEncoder(w).Encode(list)
	case r.URL.Path == "/api/v1/nodes":
		list := corev1.NodeList{TypeMeta: metav1.TypeMeta{Kind: "NodeList", APIVersion: "v1"}}
		for _, n := range f.nodes {
			list.Items = append(list.Items, *n)
		}
		_ = json.NewEncoder(w).Encode(list)
	case !one || node == nil:
		status(http.StatusNotFound, metav1.StatusReasonNotFound)
	case r.Method == http.MethodDelete:
		var o metav1.DeleteOptions
		if err := json.NewDecoder(r.Body).Decode(&o); err == nil && o.Preconditions != nil && *o.Preconditions.UID != node.UID {
			status(http.StatusConflict, metav1.StatusReasonConflict)
			return
		}
		delete(f.nodes, name)
		f.deleted = append(f.deleted, name)
		_ = json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Success"})
	default:
		_ = json.NewEncoder(w).Encode(node)
	}
}

func aNode(name, ip string, uid types.UID, made time.Time) *corev1.Node {
	return &corev1.Node{
		TypeMeta:   metav1.TypeMeta{Kind: "Node", APIVersion: "v1"},
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: uid, CreationTimestamp: metav1.NewTime(made)},
		Status:     corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: ip}}},
	}
}

// serveMembers has a daemon on the node's directory that lists members.
func (s *site) serveMembers(t *testing.T, list ...peers.Member) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	wait, err := peers.Serve(ctx, s.env.BackendLive(), slog.New(slog.DiscardHandler), func() []peers.Member { return list })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); wait() })
}

// TestRemovalFinishedLater finishes a removal that was interrupted long ago. Meanwhile n3 was
// removed elsewhere, reinstalled, and is back under its name and address.
func TestRemovalFinishedLater(t *testing.T) {
	began := time.Now().Add(-time.Hour).Truncate(time.Second)
	for _, tc := range []struct {
		name, params string
		node         *corev1.Node
		online       bool // the member at the address
		asked        string
		deleted      []string
		err          error
		said         string
	}{
		{name: "the same node", params: `{"asked":"n3","name":"n3","identified":true,"uid":"old"}`, node: aNode("n3", "10.9.0.3", "old", began.Add(-time.Hour)), asked: "n3", deleted: []string{"n3"}},
		{name: "another node", params: `{"asked":"n3","name":"n3","identified":true,"uid":"old"}`, node: aNode("n3", "10.9.0.3", "new", began), asked: "n3", err: ErrReplaced},
		{name: "there was none", params: `{"asked":"n3","name":"n3","identified":true}`, node: aNode("n3", "10.9.0.3", "new", began), asked: "n3"},
		{name: "another one is asked for", params: `{"asked":"n3","name":"n3","identified":true,"uid":"old"}`, node: aNode("n3", "10.9.0.5", "new", began), asked: "w1", deleted: []string{"w1"}, said: "the new one was left alone"},
		{name: "old journal, the same node", params: `{"asked":"n3","name":"n3"}`, node: aNode("n3", "10.9.0.3", "old", began.Add(-time.Hour)), asked: "n3", deleted: []string{"n3"}},
		{name: "old journal, a new node", params: `{"asked":"n3","name":"n3"}`, node: aNode("n3", "10.9.0.3", "new", began.Add(time.Minute)), asked: "n3", err: ErrReplaced},
		{name: "old journal, a new member", params: `{"asked":"n3","name":"n3","member":"10.9.0.3:19001"}`, node: aNode("n3", "10.9.0.3", "new", began.Add(time.Minute)), online: true, asked: "n3", err: ErrReplaced},
		{name: "old journal, a member that lives", params: `{"asked":"n3","name":"n3","member":"10.9.0.3:19001"}`, online: true, asked: "n3", err: ErrReplaced},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newSite(t)
			s.serveMembers(t, peers.Member{ID: 1, Address: ownIP + ":19001", Online: true, Self: true}, peers.Member{ID: 9, Address: "10.9.0.3:19001", Online: tc.online})
			f := &apiNodes{nodes: map[string]*corev1.Node{"w1": aNode("w1", "10.9.0.4", "w", began)}}
			if tc.node != nil {
				f.nodes["n3"] = tc.node
			}
			apis := httptest.NewServer(f)
			t.Cleanup(apis.Close)
			s.apis.Close()
			s.apis = apis
			for _, step := range []string{StepDelete, StepUnregister} {
				if step == StepUnregister && !strings.Contains(tc.params, "member") {
					continue
				}
				if err := os.MkdirAll(filepath.Dir(s.env.Journal()), 0o700); err != nil {
					t.Fatal(err)
				}
				record, err := json.Marshal(journal.Record{Operation: opRemove, Step: step, Params: json.RawMessage(tc.params)})
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(s.env.Journal(), record, 0o600); err != nil {
					t.Fatal(err)
				}
				if err := os.Chtimes(s.env.Journal(), began, began); err != nil {
					t.Fatal(err)
				}
				f.deleted = nil
				n := s.node()
				j := s.journal2(t)
				err = n.Remove(t.Context(), j, RemoveOptions{Node: tc.asked})
				j.Close()
				if !errors.Is(err, tc.err) {
					t.Errorf("%s: error: %v, want %v", step, err, tc.err)
				}
				if !slices.Equal(f.deleted, tc.deleted) {
					t.Errorf("%s: deleted: %q, want %q", step, f.deleted, tc.deleted)
				}
				if r, err := Pending(s.env); r != nil || err != nil {
					t.Errorf("pending: %v, %v", r, err)
				}
				if text := strings.Join(s.said, "\n"); !strings.Contains(text, tc.said) {
					t.Errorf("said: %s", text)
				}
			}
		})
	}
}

// TestRemoveMemberThatAnswers: by force, a member that answers is removed only when a person has said
// so.
func TestRemoveMemberThatAnswers(t *testing.T) {
	s := newSite(t)
	s.member(t, ownIP+":19001", true)
	list, err := storedir.Dir(s.env.BackendLive()).Members()
	if err != nil {
		t.Fatal(err)
	}
	address := list[0].Address
	s.serveMembers(t, peers.Member{ID: 1, Address: address, Online: true}, peers.Member{ID: 7, Address: ownIP + ":19001", Online: true, Self: true})
	apis := httptest.NewServer(&apiNodes{nodes: map[string]*corev1.Node{"n1": aNode("n1", "127.0.0.1", "u", time.Now())}})
	t.Cleanup(apis.Close)
	s.apis = apis
	n := s.node()
	j := s.journal(t)
	if err := n.Remove(t.Context(), j, RemoveOptions{Node: "n1"}); !errors.Is(err, ErrRegistered) {
		t.Errorf("without force: %v", err)
	}
	asked := ""
	err = n.Remove(t.Context(), j, RemoveOptions{Node: "n1", Force: true, Confirm: func(q string) error { asked = q; return ErrUnconfirmed }})
	if !errors.Is(err, ErrUnconfirmed) || !strings.Contains(asked, "microk8s leave") {
		t.Errorf("by force: %v, asked %q", err, asked)
	}
	if r, err := Pending(s.env); r != nil || err != nil {
		t.Errorf("pending: %v, %v", r, err)
	}
}

// TestRemoveWithoutNode: after kubectl delete node, a node is found by its record, whose member the record
// names. A member is never taken for its address when it is another node's.
func TestRemoveWithoutNode(t *testing.T) {
	all := []peers.Member{
		{ID: 1, Address: ownIP + ":19001", Online: true, Self: true},
		{ID: 2, Address: "10.9.0.3:19001"}, {ID: 3, Address: "10.9.0.4:19001", Online: true}, {ID: 8, Address: "10.9.0.8:19001"},
	}
	cp := func(name string, member uint64) noderegistry.Record {
		return noderegistry.Record{Name: name, Role: noderegistry.ControlPlane, Member: member, UID: types.UID("record-" + name)}
	}
	w5 := noderegistry.Record{Name: "w5", Role: noderegistry.Worker, UID: "record-w5"}
	for _, tc := range []struct {
		name    string
		asked   string
		force   bool
		records []noderegistry.Record
		want    removeParams // without Asked and Identified
		err     error
		members []string // that are named
	}{
		{name: "by name", asked: "n3", force: true, records: []noderegistry.Record{cp("n2", 1), cp("n3", 2)},
			want: removeParams{Name: "n3", Record: "record-n3", Member: "10.9.0.3:19001", ID: 2}},
		{name: "by name, without force", asked: "n3", records: []noderegistry.Record{cp("n3", 2)}, err: ErrRegistered},
		{name: "by address", asked: "10.9.0.3", force: true, records: []noderegistry.Record{cp("n3", 2)},
			want: removeParams{Name: "n3", Record: "record-n3", Member: "10.9.0.3:19001", ID: 2}},
		{name: "its member has another address now", asked: "n3", force: true, records: []noderegistry.Record{cp("n3", 8)},
			want: removeParams{Name: "n3", Record: "record-n3", Member: "10.9.0.8:19001", ID: 8}},
		{name: "it has left", asked: "n3", records: []noderegistry.Record{cp("n3", 99)}, want: removeParams{Name: "n3", Record: "record-n3"}},
		{name: "a worker", asked: "w5", records: []noderegistry.Record{w5}, want: removeParams{Name: "w5", Record: "record-w5"}},
		{name: "a Node with the address of another node's member", asked: "n4", force: true, records: []noderegistry.Record{cp("n4", 0), cp("n3", 3)},
			want: removeParams{Name: "n4", Record: "record-n4", UID: "u"}},
		{name: "this node, by the ID of its member", asked: "old", force: true, records: []noderegistry.Record{cp("old", 1)}, err: ErrSelf},
		{name: "the record does not say which member", asked: "n3", force: true, records: []noderegistry.Record{cp("n3", 0)}, err: ErrNoNode,
			members: []string{"10.9.0.3:19001", "10.9.0.8:19001"}},
		{name: "no record", asked: "n3", force: true, err: ErrNoNode, members: []string{"10.9.0.3:19001", "10.9.0.8:19001"}},
		{name: "no record, by address", asked: "10.9.0.3", force: true, want: removeParams{Name: "10.9.0.3", Member: "10.9.0.3:19001", ID: 2}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newSite(t)
			s.serveMembers(t, all...)
			apis := httptest.NewServer(&apiNodes{nodes: map[string]*corev1.Node{"n4": aNode("n4", "10.9.0.4", "u", time.Now())}, records: tc.records})
			t.Cleanup(apis.Close)
			s.apis = apis
			n := s.node()
			n.defaults()
			got, err := n.mayRemove(t.Context(), RemoveOptions{Node: tc.asked, Force: tc.force, Confirm: func(string) error { return nil }})
			if !errors.Is(err, tc.err) {
				t.Fatalf("error: %v, want %v", err, tc.err)
			}
			var none *NoNodeError
			if errors.As(err, &none) {
				var members []string
				for _, m := range none.Members {
					members = append(members, m.Address)
				}
				if !slices.Equal(members, tc.members) {
					t.Errorf("members without a node: %q, want %q", members, tc.members)
				}
			}
			if tc.err != nil {
				return
			}
			tc.want.Asked, tc.want.Identified = tc.asked, true
			if !reflect.DeepEqual(*got, tc.want) {
				t.Errorf("%+v, want %+v", *got, tc.want)
			}
		})
	}
}
