package remount

import (
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"microk8s/internal/kube"
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
		p.Status.StartTime = &metav1.Time{Time: started}
		p.Spec.Volumes = []corev1.Volume{{Name: "none"}, {VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: path}}}}
		return p
	}
	before, after := refreshed.Add(-time.Hour), refreshed.Add(time.Second)
	list := corev1.PodList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PodList"}, Items: []corev1.Pod{
		pod("calico", "DaemonSet", before, env.Data+"/args/cni-network"),
		pod("by-revision", "ReplicaSet", before, strings.Replace(env.Data, "current", "x1", 1)),
		pod("restarted", "DaemonSet", after, env.Data+"/args"),
		pod("common", "DaemonSet", before, env.Common+"/var/lib/kubelet"),
		pod("elsewhere", "DaemonSet", before, "/etc"),
		pod("alone", "", before, env.Data),
		pod("static", "Node", before, env.Data),
	}}
	var deleted []string
	down := true
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		switch {
		case down:
			down = false
			w.WriteHeader(http.StatusServiceUnavailable)
		case r.Method == http.MethodGet && r.URL.Path == "/api/v1/pods" && r.URL.Query().Get("fieldSelector") == "spec.nodeName=n1":
			_ = json.NewEncoder(w).Encode(list)
		case r.Method == http.MethodDelete:
			deleted = append(deleted, r.URL.Path)
			_ = json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: "Success"})
		default:
			t.Errorf("unexpected %s %s", r.Method, r.URL)
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	defer api.Close()
	core, err := kube.New(&rest.Config{Host: api.URL})
	if err != nil {
		t.Fatal(err)
	}
	k := &Controller{Env: env, Node: "n1", Core: func() (*kube.Core, error) { return core, nil }, Log: slog.New(slog.DiscardHandler)}
	for range 2 { // the second time there is nothing to do
		if err := k.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if want := []string{"/api/v1/namespaces/ns/pods/calico", "/api/v1/namespaces/ns/pods/by-revision"}; !slices.Equal(deleted, want) {
		t.Errorf("restarted %q, want %q", deleted, want)
	}
	if _, err := os.Lstat(env.Lock(snapenv.LockRemount)); err == nil {
		t.Error("the lock stays")
	}
}
