package status

import (
	"path/filepath"
	"slices"
	"testing"

	"microk8s/internal/snapenv"
)

// TestNeededPorts holds what is read about a node in each of its states.
func TestNeededPorts(t *testing.T) {
	const own = `--etcd-servers="unix://${SNAP_DATA}/var/kubernetes/backend/kine.sock:12379"` + "\n"
	for _, tc := range []struct {
		name  string
		args  map[string]string
		locks []string
		files map[string]string // of the datastore's folder
		want  []int
	}{
		{"before the first start", nil, []string{snapenv.LockHA}, nil, []int{10250, 25000, 16443, 10257, 10259, 19001}},
		{"one node", map[string]string{"kube-apiserver": own}, []string{snapenv.LockHA}, map[string]string{"info.yaml": "Address: 10.0.0.1:20001\nID: 7\nRole: 0\n"},
			[]int{10250, 25000, 16443, 10257, 10259, 20001}},
		{"other ports", map[string]string{"kube-apiserver": own + "--secure-port 6443\n", "cluster-agent": "--bind=[::]:26000 --min-tls-version=\"tls13\"\n"},
			[]string{snapenv.LockHA}, nil, []int{10250, 26000, 6443, 10257, 10259, 19001}},
		{"not ports", map[string]string{"kube-apiserver": "--secure-port=https\n", "cluster-agent": "--bind=here\n"}, nil, nil, []int{10250, 25000, 16443, 10257, 10259, 19001}},
		{"damaged files", map[string]string{"kube-apiserver": "\x00", "cluster-agent": "--bind=0.0.0.0:26000 \"\n"}, nil, nil, []int{10250, 25000, 16443, 10257, 10259, 19001}},
		{"an etcd", map[string]string{"kube-apiserver": "--etcd-servers=https://10.0.0.9:2379\n"}, []string{snapenv.LockHA}, nil, []int{10250, 25000, 16443, 10257, 10259}},
		{"no datastore", nil, []string{snapenv.LockHA, snapenv.LockNoDqlite}, nil, []int{10250, 25000, 16443, 10257, 10259}},
		{"worker", map[string]string{"kube-apiserver": "--secure-port=6443\n"}, []string{snapenv.LockWorker, snapenv.LockNoDqlite}, nil, []int{10250, 25000, 16443}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			env := snapenv.Under(t.TempDir())
			for name, text := range tc.args {
				write(t, env.Args(name), text)
			}
			for _, name := range tc.locks {
				write(t, env.Lock(name), "")
			}
			for name, text := range tc.files {
				write(t, filepath.Join(env.Backend(), name), text)
			}
			var got []int
			for _, p := range neededPorts(env) {
				got = append(got, p.number)
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
}
