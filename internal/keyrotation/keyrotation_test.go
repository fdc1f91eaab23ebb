package keyrotation

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"microk8s/cluster-agent/api"
	"microk8s/internal/certs"
	"microk8s/internal/journal"
	"microk8s/internal/pki"
	"microk8s/internal/pki/pkitest"
	"microk8s/internal/service"
	"microk8s/internal/snapenv"
)

var errKilled = errors.New("killed")

// cluster is three control-plane nodes, whose files are real, and a worker, which has tokens alone. What API
// servers and kubelets do with the files is played: it is what must never go wrong in between.
type cluster struct {
	*Cluster
	t      *testing.T
	envs   map[string]snapenv.Env
	stores map[string]*certs.Store
	tokens map[string]string   // the key that signed the tokens of a node's pods
	told   map[string]bool     // CAs of front proxies in the ConfigMap
	loaded map[string][]string // keys of tokens that an API server has read at its start
	shown  map[string][]string // certificates that a datastore has read at its start: the first is shown, all are taken
	left   int                 // changes of nodes until the power goes; -1 for never
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{
		t: t, envs: map[string]snapenv.Env{}, stores: map[string]*certs.Store{}, tokens: map[string]string{}, told: map[string]bool{}, loaded: map[string][]string{}, shown: map[string][]string{}, left: -1,
	}
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(template(t))); err != nil {
		t.Fatal(err)
	}
	c.envs, c.stores = stores(dir)
	for _, env := range c.envs {
		for _, key := range must(filepath.Glob(env.CertsDir() + "/*.key")) {
			if err := os.Chmod(key, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name := range c.stores {
		c.restart(name, service.Kubelite)
		c.restart(name, service.Datastore)
		c.reload(name)
	}
	c.tokens["w1"] = c.loaded["n1"][0]
	c.Cluster = &Cluster{
		Self: "n2", List: c.list, Change: c.change, SigningKeys: c.stores["n2"].SigningKeys,
		NewKey: func() (certs.SigningKeys, error) {
			key, err := keys.Key(2048)
			return certs.SigningKeys{key}, err
		},
		Pair: c.stores["n2"].DatastorePair, NextPair: c.stores["n2"].NextDatastorePair, ForgetPair: c.stores["n2"].ForgetNextPair,
		TrustedProxies: func(context.Context) ([]string, error) { return slices.Collect(maps.Keys(c.told)), nil },
		KeepProxies: func(_ context.Context, ids []string) error {
			maps.DeleteFunc(c.told, func(id string, _ bool) bool { return !slices.Contains(ids, id) })
			c.sound("the ConfigMap")
			return nil
		},
		Resign: func(context.Context, []string) ([]string, error) { return []string{"shop/robot"}, nil },
		Pause:  func(context.Context, time.Duration) error { return nil },
		Say:    func(string, ...any) {}, Poll: time.Millisecond, Patience: time.Minute,
	}
	return c
}

// stores are those of three nodes below a folder.
func stores(dir string) (map[string]snapenv.Env, map[string]*certs.Store) {
	envs, out := map[string]snapenv.Env{}, map[string]*certs.Store{}
	for i, name := range []string{"n1", "n2", "n3"} {
		envs[name] = snapenv.Under(filepath.Join(dir, name))
		out[name] = certs.New(envs[name], certs.Options{
			Maker: keys, Hostname: func() (string, error) { return name, nil }, Addresses: func() ([]net.IP, error) { return []net.IP{net.IPv4(10, 0, 0, byte(i+1))}, nil },
		})
	}
	return envs, out
}

var (
	keys = pkitest.Maker(nil) // never the same key twice
	made = sync.OnceValues(func() (string, error) {
		dir, err := os.MkdirTemp("", "keyrotation")
		if err != nil {
			return "", err
		}
		envs, stores := stores(dir)
		for _, name := range []string{"n1", "n2", "n3"} {
			for _, folder := range []string{envs[name].ArgsDir(), envs[name].LocksDir(), envs[name].CertsDir(), envs[name].BackendLive()} {
				err = errors.Join(err, os.MkdirAll(folder, 0o755))
			}
			if name != "n1" { // as a join does it
				for _, path := range []func(snapenv.Env) string{
					func(e snapenv.Env) string { return e.Cert("ca.crt") }, func(e snapenv.Env) string { return e.Cert("ca.key") },
					func(e snapenv.Env) string { return e.Cert("serviceaccount.key") },
					func(e snapenv.Env) string { return filepath.Join(e.BackendLive(), "cluster.crt") },
					func(e snapenv.Env) string { return filepath.Join(e.BackendLive(), "cluster.key") },
				} {
					data, readErr := os.ReadFile(path(envs["n1"]))
					err = errors.Join(err, readErr, os.WriteFile(path(envs[name]), data, 0o600))
				}
			}
			_, ensureErr := stores[name].Ensure(context.Background())
			err = errors.Join(err, ensureErr)
		}
		return dir, err
	})
)

// template is the folder of three nodes of one cluster, made once: each test has a copy.
func template(t *testing.T) string {
	t.Helper()
	dir, err := made()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestMain(m *testing.M) {
	code := m.Run()
	if dir, err := made(); err == nil {
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func (c *cluster) list(context.Context) ([]certs.Inventory, error) {
	var out []certs.Inventory
	for _, name := range slices.Sorted(maps.Keys(c.stores)) {
		inv, err := c.stores[name].List()
		if err != nil {
			return nil, err
		}
		inv.Tokens = map[string]int{c.tokens[name]: 2}
		out = append(out, inv)
	}
	return append(out, certs.Inventory{
		Node: "w1", Role: "worker", Tokens: map[string]int{c.tokens["w1"]: 2},
		Items: []certs.Listed{{Name: certs.Kubelet, ID: "kubelet of w1"}, {Name: "proxy", ID: "proxy of w1"}},
	}), nil
}

// restart is that of a node's Kubernetes: its API server reads the keys of tokens, its kubelet asks for new tokens;
// or of its datastore, which reads its pair.
func (c *cluster) restart(name, what string) {
	if what == service.Datastore {
		pair, err := c.stores[name].DatastorePair()
		if err != nil {
			c.t.Fatal(err)
		}
		c.shown[name] = nil
		for _, cert := range pair.Certs {
			c.shown[name] = append(c.shown[name], certs.KeyID(cert.PublicKey))
		}
		return
	}
	if s := c.stores[name]; s != nil {
		keys, err := s.SigningKeys()
		if err != nil {
			c.t.Fatal(err)
		}
		c.loaded[name] = keys.IDs()
		c.tokens[name] = keys.IDs()[0]
		return
	}
	c.tokens[name] = c.loaded["n1"][0]
}

// reload is what an API server does by itself: it tells extension API servers of the CAs of its front proxy.
func (c *cluster) reload(name string) {
	inv, err := c.stores[name].List()
	if err != nil {
		c.t.Fatal(err)
	}
	for _, l := range inv.Items {
		if l.Name == certs.FrontProxyCA || l.Name == certs.NextFrontProxy {
			c.told[l.ID] = true
		}
	}
}

func (c *cluster) change(ctx context.Context, name string, change api.CertificateChange, restart string) error {
	if c.left == 0 {
		return errKilled
	}
	c.left--
	if s := c.stores[name]; s != nil {
		if _, err := s.ReplaceLeaves(ctx, change.Leaves); err != nil {
			return err
		}
		if change.FrontProxy != "" {
			if err := s.FrontProxy(change.FrontProxy, change.FrontProxyOld); err != nil {
				return err
			}
			c.reload(name)
		}
		if change.SigningKeys != "" {
			if err := s.SetSigningKeys([]byte(change.SigningKeys)); err != nil {
				return err
			}
		}
		if change.DatastoreCert != "" {
			if err := s.SetDatastorePair([]byte(change.DatastoreCert), []byte(change.DatastoreKey)); err != nil {
				return err
			}
		}
	}
	if restart != "" {
		c.restart(name, restart)
	}
	c.sound(name + " was changed")
	return nil
}

// sound checks that everybody takes what everybody shows.
func (c *cluster) sound(when string) {
	c.t.Helper()
	for name, shows := range c.shown {
		for other, takes := range c.shown {
			if !slices.Contains(takes, shows[0]) {
				c.t.Errorf("%s: the datastore of %s does not take the certificate of %s", when, other, name)
			}
		}
	}
	for name, env := range c.envs {
		if err := certs.Check(env); err != nil {
			c.t.Errorf("%s: %s: %v", when, name, err)
		}
		inv, err := c.stores[name].List()
		if err != nil {
			c.t.Fatal(err)
		}
		for _, l := range inv.Items {
			if l.Problem != "" {
				c.t.Errorf("%s: %s: %s: %s", when, name, l.Name, l.Problem)
			}
			if l.Name == certs.FrontProxyCA && !c.told[l.ID] {
				c.t.Errorf("%s: %s calls extension API servers with a certificate of a CA that they do not trust", when, name)
			}
		}
		for node, key := range c.tokens {
			if !slices.Contains(c.loaded[name], key) {
				c.t.Errorf("%s: the API server of %s refuses the tokens of %s", when, name, node)
			}
		}
	}
}

func (c *cluster) run(path, kind string, kill journal.Point) (done Done, err error) {
	c.t.Helper()
	j, err := journal.Open(path)
	if err != nil {
		c.t.Fatal(err)
	}
	defer j.Close()
	j.At = func(p journal.Point) {
		if p == kill {
			panic(errKilled)
		}
	}
	defer func() {
		if recover() != nil {
			err = errKilled
		}
	}()
	return c.Rotate(c.t.Context(), j, kind)
}

// finish goes on with a rotation and checks that nothing of before is left.
func (c *cluster) finish(path, kind string, old map[string][]string) {
	c.t.Helper()
	c.sound("interrupted")
	c.left = -1
	if _, err := c.run(path, kind, journal.Point{}); err != nil {
		c.t.Fatal(err)
	}
	c.sound("done")
	nodes, err := c.list(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	for node, ids := range olds(kind, nodes) {
		for _, id := range ids {
			if node != "w1" && slices.Contains(old[node], id) {
				c.t.Errorf("%s has a key of before: %s", node, id)
			}
		}
	}
	for _, n := range nodes {
		if ids := named(n, certs.NextFrontProxy); len(ids) > 0 {
			c.t.Errorf("%s trusts another front proxy's CA yet", n.Node)
		}
	}
	if kind == ServiceAccount {
		for name, ids := range c.loaded {
			if len(ids) != 1 || slices.Contains(old[name], ids[0]) {
				c.t.Errorf("the API server of %s takes tokens of %v", name, ids)
			}
		}
	}
	if kind == Datastore {
		for name, ids := range c.shown {
			if len(ids) != 1 || slices.Contains(old[name], ids[0]) || ids[0] != c.shown["n1"][0] {
				c.t.Errorf("the datastore of %s takes %v", name, ids)
			}
		}
		if _, err := os.Lstat(c.envs["n2"].Cert("cluster.next.pem")); !errors.Is(err, os.ErrNotExist) {
			c.t.Errorf("the pair that was to come is left: %v", err)
		}
	}
	if kind == FrontProxy && len(c.told) != 3 {
		c.t.Errorf("extension API servers trust %d CAs of three nodes", len(c.told))
	}
	if r, err := journal.Read(path); r != nil || err != nil {
		c.t.Errorf("the journal has %v, %v", r, err)
	}
}

// Each kind is interrupted at each point, and after each node, and finished.
func TestInterrupted(t *testing.T) {
	for _, kind := range Kinds() {
		start := func(t *testing.T) (*cluster, string, map[string][]string) {
			c := newCluster(t)
			nodes, err := c.list(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return c, filepath.Join(t.TempDir(), "journal"), olds(kind, nodes)
		}
		for _, step := range IDs(kind) {
			for _, end := range []bool{false, true} {
				p := journal.Point{Operation: operation + kind, Step: step, End: end}
				t.Run(p.String(), func(t *testing.T) {
					c, path, old := start(t)
					if _, err := c.run(path, kind, p); !errors.Is(err, errKilled) {
						t.Fatalf("it went on: %v", err)
					}
					c.finish(path, kind, old)
				})
			}
		}
		for after := 0; ; after++ {
			c, path, old := start(t)
			c.left = after
			_, err := c.run(path, kind, journal.Point{})
			if err == nil {
				if after < len(old) {
					t.Errorf("%s is done after %d changes", kind, after)
				}
				break
			}
			if !errors.Is(err, errKilled) {
				t.Fatal(err)
			}
			t.Run(fmt.Sprintf("%s after %d nodes", kind, after), func(t *testing.T) {
				c.t = t
				c.finish(path, kind, old)
			})
		}
	}
}

func TestOneKindAtATime(t *testing.T) {
	c := newCluster(t)
	path := filepath.Join(t.TempDir(), "journal")
	c.left = 1
	if _, err := c.run(path, ServiceAccount, journal.Point{}); !errors.Is(err, errKilled) {
		t.Fatal(err)
	}
	c.left = -1
	if _, err := c.run(path, Leaves, journal.Point{}); err == nil || !strings.Contains(err.Error(), "has not ended") {
		t.Errorf("another rotation meanwhile: %v", err)
	}
	if r, err := journal.Read(path); err != nil || KindOf(r) != ServiceAccount {
		t.Errorf("%v, %v", r, err)
	}
	data, err := os.ReadFile(path)
	if err != nil || strings.Contains(string(data), "PRIVATE") {
		t.Errorf("a key is in the journal: %v", err)
	}
}

// A node that does not answer stops a rotation before anything is changed.
func TestSilentNode(t *testing.T) {
	c := newCluster(t)
	silent := errors.New("n3 does not answer")
	c.List = func(context.Context) ([]certs.Inventory, error) { return nil, silent }
	c.left = 0 // a change would be an error of its own
	for _, kind := range Kinds() {
		path := filepath.Join(t.TempDir(), "journal")
		if _, err := c.run(path, kind, journal.Point{}); !errors.Is(err, silent) {
			t.Errorf("%s: %v", kind, err)
		}
		if r, err := journal.Read(path); r != nil || err != nil {
			t.Errorf("%s has begun: %v, %v", kind, r, err)
		}
	}
}

// Pods that keep a token of the old key hold up its end.
func TestOldTokensAreWaitedFor(t *testing.T) {
	c := newCluster(t)
	old := c.loaded["n1"][0]
	change := c.Change
	c.Change = func(ctx context.Context, node string, ch api.CertificateChange, restart string) error {
		if node == "w1" {
			restart = ""
		}
		return change(ctx, node, ch, restart)
	}
	c.Patience = 50 * time.Millisecond
	path := filepath.Join(t.TempDir(), "journal")
	if _, err := c.run(path, ServiceAccount, journal.Point{}); err == nil || !strings.Contains(err.Error(), "2 pods of w1 have a token of the old key") {
		t.Fatalf("%v", err)
	}
	for name, ids := range c.loaded {
		if !slices.Contains(ids, old) {
			t.Errorf("%s takes no tokens of the old key any more", name)
		}
	}
	c.Change, c.Patience = change, time.Minute
	done, err := c.run(path, ServiceAccount, journal.Point{})
	if err != nil {
		t.Fatal(err)
	}
	if len(done.Fetch) != 1 || !strings.Contains(done.Fetch[0], "shop/robot") {
		t.Errorf("who must fetch a token: %v", done.Fetch)
	}
}

func TestNewSigningKey(t *testing.T) {
	keys, err := NewSigningKey()
	if err != nil || len(keys) != 1 || keys[0].N.BitLen() != 2048 {
		t.Errorf("%v, %v", keys, err)
	}
	if _, err := pki.ParseKey(keys.Encode()); err != nil {
		t.Error(err)
	}
}
