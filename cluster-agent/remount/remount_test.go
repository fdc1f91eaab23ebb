package remount

import (
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/kube/kubetest"
	"microk8s/internal/snapenv"
)

func TestPodsOfAnOlderRevisionAreRestarted(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	if err := os.MkdirAll(env.LocksDir(), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(env.Lock(snapenv.LockRemount), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	refreshed := time.Now().Add(-time.Minute)
	if err := os.Chtimes(env.Lock(snapenv.LockRemount), refreshed, refreshed); err != nil {
		t.Fatal(err)
	}
	pod := func(name, owner string, started time.Time, path string) corev1.Pod {
		p := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: "u"}}
		yes := true
		if owner != "" {
			p.OwnerReferences = []metav1.OwnerReference{{Kind: owner, Controller: &yes}}
		}
		p.Spec.NodeName = "n1"
		p.Status.StartTime = &metav1.Time{Time: started}
		p.Spec.Volumes = []corev1.Volume{{Name: "none"}, {VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: path}}}}
		return p
	}
	before, after := refreshed.Add(-time.Hour), refreshed.Add(time.Second)
	elsewhere := pod("other-node", "DaemonSet", before, env.Data)
	elsewhere.Spec.NodeName = "n2"
	api := kubetest.New(t)
	for _, p := range []corev1.Pod{
		pod("calico", "DaemonSet", before, env.Data+"/args/cni-network"),
		pod("by-revision", "ReplicaSet", before, strings.Replace(env.Data, "current", "x1", 1)),
		pod("restarted", "DaemonSet", after, env.Data+"/args"),
		pod("common", "DaemonSet", before, env.Common+"/var/lib/kubelet"),
		pod("elsewhere", "DaemonSet", before, "/etc"),
		pod("alone", "", before, env.Data),
		pod("static", "Node", before, env.Data),
		elsewhere,
	} {
		api.Set(&p)
	}
	down := true
	api.Refuse = func(*http.Request) int {
		if down {
			down = false
			return http.StatusServiceUnavailable
		}
		return 0
	}
	k := &Controller{Env: env, Node: "n1", Core: api.Core, Log: slog.New(slog.DiscardHandler)}
	for range 2 { // the second time there is nothing to do
		if err := k.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	var left []string
	for _, name := range []string{"alone", "common", "elsewhere", "other-node", "restarted", "static"} {
		left = append(left, "v1/namespaces/ns/pods/"+name)
	}
	if got := api.Paths("pods"); !slices.Equal(got, left) {
		t.Errorf("left are %q, want %q", got, left)
	}
	if _, err := os.Lstat(env.Lock(snapenv.LockRemount)); err == nil {
		t.Error("the lock stays")
	}
}
