package cluster

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"microk8s/internal/nodeconfig"
)

// stage puts an opened archive of another cluster where a restore looks for it.
func (s *site) stage(t *testing.T) {
	t.Helper()
	dir := StageDir(s.env)
	for name, text := range map[string]string{
		"certs/ca.crt": s.caPEM, "certs/ca.key": s.caKeyPEM, "certs/front-proxy-ca.crt": s.caPEM, "certs/front-proxy-ca.key": s.caKeyPEM,
		"certs/serviceaccount.key": s.caKeyPEM,
		"args/kubelet":             "--node-ip=10.9.0.77\n--hostname-override=old\n--max-pods=42\n",
		"args/extra/policy.yaml":   "policy",
		"encryption.yaml":          "keys",
		"addons/mine/addons.yaml":  "mine",
		"launcher/x.yaml.applied":  "applied",
	} {
		path := filepath.Join(dir, "node", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, path, text)
	}
	if err := os.MkdirAll(filepath.Join(dir, "datastore"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, "node/addons/mine/addons.yaml"), 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "datastore/0.key"), "/a")
}

// restored checks that this machine is the archive's cluster.
func (s *site) restored(t *testing.T, filled []string) {
	t.Helper()
	if r, err := Pending(s.env); r != nil || err != nil {
		t.Errorf("pending: %+v, %v", r, err)
	}
	if got := read(t, s.env.Cert("ca.crt")); got != s.caPEM {
		t.Error("the CA is not the archive's")
	}
	if _, err := os.Stat(s.env.AdminKubeconfig()); err != nil {
		t.Error(err)
	}
	kubelet := read(t, s.env.Args("kubelet"))
	if strings.Contains(kubelet, "10.9.0.77") || strings.Contains(kubelet, "old") || !strings.Contains(kubelet, "--max-pods=42") {
		t.Errorf("args/kubelet: %s", kubelet)
	}
	if got := read(t, s.env.Args("extra/policy.yaml")); got != "policy" {
		t.Error(got)
	}
	if st, err := os.Stat(filepath.Join(s.env.AddonRepository("mine"), "addons.yaml")); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", st, err)
	}
	if got := read(t, filepath.Join(s.env.BackendLive(), "encryption.yaml")); got != "keys" {
		t.Error(got)
	}
	if len(filled) == 0 || filled[len(filled)-1] != filepath.Join(StageDir(s.env), "datastore") {
		t.Errorf("filled: %q", filled)
	}
	if _, err := os.Stat(filepath.Join(s.env.BackendLive(), "data")); err == nil {
		t.Error("the old datastore is in use")
	}
	kept, err := filepath.Glob(s.env.BackendLive() + ".before-restore-*/data")
	if err != nil || len(kept) != 1 || read(t, kept[0]) != ownKey {
		t.Errorf("kept: %q, %v", kept, err)
	} else if _, err := os.Stat(filepath.Join(filepath.Dir(kept[0]), ".node/certs/ca.key")); err != nil {
		t.Error(err)
	}
	for _, gone := range []string{StageDir(s.env), filepath.Join(s.env.ClusterDir(), kindRestore)} {
		if _, err := os.Stat(gone); err == nil {
			t.Errorf("%s is left", gone)
		}
	}
	if state := nodeconfig.ReadState(s.env); state.Changing || !state.Installed || state.Clustered {
		t.Errorf("%+v", state)
	}
}

func (s *site) restorer(t *testing.T, filled *[]string) *Node {
	n := s.node()
	n.Fill = func(_ context.Context, keys string) error {
		if _, err := os.Stat(filepath.Join(keys, "0.key")); err != nil {
			t.Error(err)
		}
		*filled = append(*filled, keys)
		return nil
	}
	return n
}

// TestRestoreKilledAnywhere kills a restore before and after each step. Run again it ends with the
// archive's cluster on this machine.
func TestRestoreKilledAnywhere(t *testing.T) {
	for _, name := range Steps()[opRestore] {
		for _, when := range []string{"begin", "end"} {
			t.Run(name+"/"+when, func(t *testing.T) {
				t.Parallel()
				s := newSite(t)
				s.stage(t)
				// What the archive holds differs from what is here in the data of the fake store.
				var filled []string
				n := s.restorer(t, &filled)
				j := s.journal(t)
				if dead, err := dying(j, "restore/"+name+"/"+when, func() error { return n.Restore(t.Context(), j) }); !dead {
					t.Fatalf("it did not come there: %v", err)
				}
				if found, err := s.restorer(t, &filled).ResumeRestore(t.Context(), s.journal(t)); !found || err != nil {
					t.Fatalf("%v, %v", found, err)
				}
				s.restored(t, filled)
			})
		}
	}
}

// TestRestoreFails: where the datastore cannot be filled, the machine is what it was.
func TestRestoreFails(t *testing.T) {
	s := newSite(t)
	s.stage(t)
	before := s.tree(t)
	n := s.node()
	n.Fill = func(context.Context, string) error { return os.ErrPermission }
	if err := n.Restore(t.Context(), s.journal(t)); err == nil {
		t.Fatal("it did not fail")
	}
	after := s.tree(t)
	for path, text := range before {
		if after[path] != text && !strings.Contains(path, "var/cluster/") {
			t.Errorf("%s is not what it was", path)
		}
	}
	for path := range after {
		if _, was := before[path]; !was && !strings.Contains(path, "var/cluster/") {
			t.Errorf("%s is left", path)
		}
	}
	if r, err := Pending(s.env); r != nil || err != nil {
		t.Errorf("pending: %+v, %v", r, err)
	}
}
