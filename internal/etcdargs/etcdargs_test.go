package etcdargs

import (
	"os"
	"slices"
	"testing"

	"microk8s/internal/snapenv"
)

func TestExternal(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		want       []string
	}{
		{"no file", "", nil},
		{"own", "--etcd-servers=\"unix://${SNAP_DATA}/var/kubernetes/backend/kine.sock:12379\"\n", nil},
		{"no flag", "--secure-port=16443\n", nil},
		{"another flag", "--etcd-servers-overrides=/events#https://10.0.0.9:2379\n", nil},
		{"one", "--etcd-servers=https://10.0.0.1:2379\n", []string{"10.0.0.1:2379"}},
		{"three", "--etcd-servers \"https://a:2379,https://b:2379/,http://[fd00::1]:2379\"\n", []string{"a:2379", "b:2379", "[fd00::1]:2379"}},
		{"nothing", "--etcd-servers=\n", nil},
	} {
		env := snapenv.Under(t.TempDir())
		if tc.text != "" {
			if err := os.MkdirAll(env.ArgsDir(), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(env.Args("kube-apiserver"), []byte(tc.text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		got, external := External(env)
		if !slices.Equal(got, tc.want) || external != (tc.want != nil) {
			t.Errorf("%s: %q, %v; want %q", tc.name, got, external, tc.want)
		}
	}
}
