package hostpath

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/sig-storage-lib-external-provisioner/v13/controller"
)

func provisioner(t *testing.T) *Provisioner {
	t.Helper()
	dirs := []string{filepath.Join(t.TempDir(), "default"), filepath.Join(t.TempDir(), "other")}
	for _, d := range dirs {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return &Provisioner{Node: "n1", Dirs: dirs, Log: slog.New(slog.DiscardHandler)}
}

func options(claim string) controller.ProvisionOptions {
	return controller.ProvisionOptions{
		StorageClass: &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "class"}},
		PVName:       "pvc-1",
		PVC: &corev1.PersistentVolumeClaim{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: claim},
			Spec: corev1.PersistentVolumeClaimSpec{
				AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
				Resources:   corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}},
			},
		},
		SelectedNodeName: "n1",
	}
}

func TestLifeOfAVolume(t *testing.T) {
	p := provisioner(t)
	for _, dir := range []string{"", p.Dirs[1], p.Dirs[1] + "/"} {
		o := options("data")
		want := p.Dirs[0]
		if dir != "" {
			o.StorageClass.Parameters = map[string]string{"pvDir": dir}
			want = p.Dirs[1]
		}
		pv, _, err := p.Provision(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := p.Provision(t.Context(), o); err != nil {
			t.Errorf("the second time: %v", err)
		}
		path := pv.Spec.HostPath.Path
		if path != filepath.Join(want, "ns-data-pvc-1") || *pv.Spec.HostPath.Type != corev1.HostPathDirectory {
			t.Errorf("the volume is at %s", path)
		}
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o777 {
			t.Errorf("%v, %v", fi, err)
		}
		if got := pv.Spec.Capacity[corev1.ResourceStorage]; got.String() != "1Gi" {
			t.Errorf("capacity %s", got.String())
		}
		if nodes, ok := boundTo(pv); !ok || len(nodes) != 1 || nodes[0] != "n1" {
			t.Errorf("bound to %v", nodes)
		}
		if err := os.WriteFile(filepath.Join(path, "file"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := p.Delete(t.Context(), pv); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Lstat(path); !os.IsNotExist(err) {
				t.Errorf("%s is left: %v", path, err)
			}
		}
	}
}

func TestRefusals(t *testing.T) {
	p := provisioner(t)
	outside := t.TempDir()
	if err := os.Symlink(outside, filepath.Join(p.Dirs[0], "ns-link-pvc-1")); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		change func(o *controller.ProvisionOptions)
		want   string
	}{
		{"no node", func(o *controller.ProvisionOptions) { o.SelectedNodeName = "" }, "volumeBindingMode"},
		{"selector", func(o *controller.ProvisionOptions) { o.PVC.Spec.Selector = &metav1.LabelSelector{} }, "selector"},
		{"directory", func(o *controller.ProvisionOptions) {
			o.StorageClass.Parameters = map[string]string{"pvDir": "/etc"}
		}, "--pv-dir=/etc"},
		{"way out", func(o *controller.ProvisionOptions) {
			o.StorageClass.Parameters = map[string]string{"pvDir": p.Dirs[0] + "/../../x"}
		}, "not allowed"},
		{"parameter", func(o *controller.ProvisionOptions) {
			o.StorageClass.Parameters = map[string]string{"size": "1"}
		}, "parameter size"},
		{"snapshot", func(o *controller.ProvisionOptions) {
			o.PVC.Spec.DataSource = &corev1.TypedLocalObjectReference{Kind: "VolumeSnapshot", Name: "s"}
		}, "not from a VolumeSnapshot: there are no snapshots"},
		{"clone", func(o *controller.ProvisionOptions) {
			o.PVC.Spec.DataSourceRef = &corev1.TypedObjectReference{Kind: "PersistentVolumeClaim", Name: "c"}
		}, "not from a PersistentVolumeClaim"},
		{"link", func(o *controller.ProvisionOptions) { o.PVC.Name = "link" }, "no directory"},
		{"name with a way out", func(o *controller.ProvisionOptions) { o.PVName = "../../x" }, ""},
		{"no directory", func(o *controller.ProvisionOptions) { p.Dirs[0] += "-gone" }, "no such file"},
	} {
		o := options("data")
		tc.change(&o)
		_, state, err := p.Provision(t.Context(), o)
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", tc.name, err, tc.want)
		}
		if tc.name == "no directory" && state != controller.ProvisioningReschedule {
			t.Errorf("%s: %s", tc.name, state)
		}
	}
	if entries, err := os.ReadDir(outside); err != nil || len(entries) > 0 {
		t.Errorf("outside: %v, %v", entries, err)
	}
}

// Nothing is deleted but directories directly in the allowed ones.
func TestDeleteStaysInside(t *testing.T) {
	p := provisioner(t)
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(p.Dirs[0], "link")
	if err := os.Symlink(outside, link); err != nil {
		t.Fatal(err)
	}
	deep := filepath.Join(p.Dirs[0], "a", "b")
	if err := os.MkdirAll(deep, 0o755); err != nil {
		t.Fatal(err)
	}
	volume := func(path string) *corev1.PersistentVolume {
		return &corev1.PersistentVolume{Spec: corev1.PersistentVolumeSpec{PersistentVolumeSource: corev1.PersistentVolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: path}}}}
	}
	for _, path := range []string{outside, deep, p.Dirs[0], p.Dirs[0] + "/", "/", "", p.Dirs[0] + "/../" + filepath.Base(p.Dirs[0]) + "/a", p.Dirs[0] + "/..", link + "/file"} {
		if err := p.Delete(t.Context(), volume(path)); err == nil {
			t.Errorf("%q was deleted", path)
		}
	}
	if err := p.Delete(t.Context(), &corev1.PersistentVolume{}); err == nil {
		t.Error("a volume that is no directory was deleted")
	}
	if err := p.Delete(t.Context(), volume(link)); err != nil { // the link itself
		t.Error(err)
	}
	for _, path := range []string{filepath.Join(outside, "file"), deep} {
		if _, err := os.Lstat(path); err != nil {
			t.Error(err)
		}
	}
}

func TestWhoseVolume(t *testing.T) {
	p := provisioner(t)
	pv, _, err := p.Provision(t.Context(), options("data"))
	if err != nil {
		t.Fatal(err)
	}
	other := *p
	other.Node = "n2"
	if !p.ShouldDelete(t.Context(), pv) || other.ShouldDelete(t.Context(), pv) {
		t.Error("a volume belongs to the node it is bound to")
	}
	pv.Spec.NodeAffinity = nil // as older provisioners made them
	if !p.ShouldDelete(t.Context(), pv) {
		t.Error("a volume without a node belongs to the node that has the directory")
	}
	if err := os.Remove(pv.Spec.HostPath.Path); err != nil {
		t.Fatal(err)
	}
	if p.ShouldDelete(t.Context(), pv) {
		t.Error("and to no other")
	}
	claim := options("data").PVC
	for node, want := range map[string]bool{"": true, "n1": true, "n2": false} {
		claim.Annotations = map[string]string{selectedNodeAnnotation: node}
		if p.ShouldProvision(t.Context(), claim) != want {
			t.Errorf("a claim for node %q", node)
		}
	}
}

func TestNames(t *testing.T) {
	long := strings.Repeat("c", 253)
	for _, ns := range []string{"ns", strings.Repeat("n", 63)} {
		name := dirName(ns, long, "pvc-0f9a8b7c-0000-0000-0000-000000000000")
		if len(name) > 255 || !strings.HasSuffix(name, "-pvc-0f9a8b7c-0000-0000-0000-000000000000") || !strings.HasPrefix(name, ns+"-ccc") {
			t.Errorf("%d bytes: %s", len(name), name)
		}
	}
}

func TestPrepare(t *testing.T) {
	p := provisioner(t)
	mode := func() os.FileMode {
		fi, err := os.Stat(p.Dirs[0])
		if err != nil {
			t.Fatal(err)
		}
		return fi.Mode().Perm()
	}
	if err := p.Prepare(); err != nil || mode() != 0o700 {
		t.Errorf("%v, mode %o", err, mode())
	}
	if err := os.Chmod(p.Dirs[0], 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(p.Dirs[0], "x"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := p.Prepare(); err != nil || mode() != 0o755 {
		t.Errorf("what someone uses is left as it is: %v, mode %o", err, mode())
	}
}

// Nobody of the host reaches a volume, wherever it is: a directory that is not closed gets a
// closed one below it, and one that cannot be closed is refused.
func TestVolumesAreClosedToTheHost(t *testing.T) {
	for _, tc := range []struct {
		name    string
		prepare func(dir string) error
		want    string // path below the directory; "" for a refusal
		err     string
	}{
		{"closed", func(dir string) error { return os.Chmod(dir, 0o700) }, "ns-data-pvc-1", ""},
		{"open to readers", func(dir string) error { return os.Chmod(dir, 0o755) }, "microk8s/ns-data-pvc-1", ""},
		{"open to a group", func(dir string) error { return os.Chmod(dir, 0o770) }, "microk8s/ns-data-pvc-1", ""},
		{"like /tmp", func(dir string) error { return os.Chmod(dir, 0o777|os.ModeSticky) }, "microk8s/ns-data-pvc-1", ""},
		{"open to all", func(dir string) error { return os.Chmod(dir, 0o777) }, "", "chmod o-w"},
		{"the closed one was opened", func(dir string) error {
			return errors.Join(os.Chmod(dir, 0o755), os.Mkdir(filepath.Join(dir, "microk8s"), 0o755))
		}, "microk8s/ns-data-pvc-1", ""},
		{"a link in its place", func(dir string) error {
			return errors.Join(os.Chmod(dir, 0o755), os.Symlink("/", filepath.Join(dir, "microk8s")))
		}, "", "move it away"},
		{"another user's in its place", func(dir string) error {
			sub := filepath.Join(dir, "microk8s")
			return errors.Join(os.Chmod(dir, 0o777|os.ModeSticky), os.Mkdir(sub, 0o700), os.Chown(sub, 65534, 65534))
		}, "", "move it away"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if strings.HasPrefix(tc.name, "another user") && os.Geteuid() != 0 {
				t.Skip("only root can make another user's directory")
			}
			p := provisioner(t)
			if err := tc.prepare(p.Dirs[1]); err != nil {
				t.Fatal(err)
			}
			o := options("data")
			o.StorageClass.Parameters = map[string]string{"pvDir": p.Dirs[1]}
			pv, state, err := p.Provision(t.Context(), o)
			if tc.want == "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) || state != controller.ProvisioningReschedule {
					t.Fatalf("%v, %s; want %q", err, state, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			path := pv.Spec.HostPath.Path
			if path != filepath.Join(p.Dirs[1], tc.want) {
				t.Errorf("the volume is at %s, want %s below %s", path, tc.want, p.Dirs[1])
			}
			if fi, err := os.Stat(filepath.Dir(path)); err != nil || fi.Mode().Perm() != 0o700 {
				t.Errorf("the directory above it: %v, %v", fi, err)
			}
			if err := p.Delete(t.Context(), pv); err != nil {
				t.Error(err)
			}
			if _, err := os.Lstat(path); !os.IsNotExist(err) {
				t.Errorf("%s is left: %v", path, err)
			}
		})
	}
}

// A volume that an earlier version made directly in a directory of --pv-dir is deleted there.
func TestVolumesOfEarlierVersions(t *testing.T) {
	p := provisioner(t)
	old := filepath.Join(p.Dirs[1], "ns-data-pvc-0")
	sub := filepath.Join(p.Dirs[1], "microk8s")
	if err := errors.Join(os.Chmod(p.Dirs[1], 0o755), os.Mkdir(old, 0o777), os.Mkdir(sub, 0o700), os.WriteFile(filepath.Join(sub, "file"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	volume := func(path string) *corev1.PersistentVolume {
		return &corev1.PersistentVolume{Spec: corev1.PersistentVolumeSpec{PersistentVolumeSource: corev1.PersistentVolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: path}}}}
	}
	if err := p.Delete(t.Context(), volume(old)); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(old); !os.IsNotExist(err) {
		t.Errorf("%s is left: %v", old, err)
	}
	if err := p.Delete(t.Context(), volume(sub)); err == nil {
		t.Error("the directory of all volumes was deleted")
	}
	if _, err := os.Lstat(filepath.Join(sub, "file")); err != nil {
		t.Error(err)
	}
}
