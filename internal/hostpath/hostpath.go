// Package hostpath makes and removes the directories behind PersistentVolumes of the addon
// hostpath-storage. One instance runs on each node and looks after the volumes of that node
// only: the scheduler chooses a node for a pod's claim, the instance there makes a directory
// and a volume that is bound to the node, and the same instance deletes the directory when
// the volume is released and its class says so.
//
// A volume's directory is open to every user of its pod, so that the directory above it must be
// closed to the users of the host. An allowed directory that is closed holds volumes itself; in
// any other they are in its subdirectory [closedName], which is made with mode 0700. Volumes that
// an earlier version made directly in it stay where they are.
//
// A volume's directory is always a direct child of one of these. Nothing else is ever made or
// deleted, whatever the names in claims, classes and volumes say.
//
// Watching claims and volumes, retries, events and reclaim policies are the business of
// sig-storage-lib-external-provisioner; sizes are not enforced by anyone.
package hostpath

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/sig-storage-lib-external-provisioner/v13/controller"
)

const (
	// Name is the provisioner that StorageClasses name.
	Name = "microk8s.io/hostpath"

	// dirParameter of a class is the directory in which its volumes are, instead of the first
	// allowed one.
	dirParameter = "pvDir"

	selectedNodeAnnotation = "volume.kubernetes.io/selected-node"

	// volumeMode lets every user of a pod write. Directories of the host have no fsGroup, and
	// the mode of the directory above keeps the users of the host out.
	volumeMode = 0o777

	// closedName is the subdirectory of an allowed directory that users of the host may enter.
	closedName = "microk8s"

	maxName = 255 // bytes of a file name on Linux's file systems
)

// Provisioner implements controller.Provisioner for one node.
type Provisioner struct {
	Node string   // name of the node
	Dirs []string // allowed directories, absolute and clean; the first is the default
	Log  *slog.Logger
}

var (
	_ controller.Provisioner   = (*Provisioner)(nil)
	_ controller.Qualifier     = (*Provisioner)(nil)
	_ controller.DeletionGuard = (*Provisioner)(nil)
)

// ShouldProvision reports whether the scheduler has chosen this node for the claim. Claims of a
// class that binds at once have no node; every instance takes these up and refuses them, so
// that their events say why they stay pending.
func (p *Provisioner) ShouldProvision(_ context.Context, claim *corev1.PersistentVolumeClaim) bool {
	node := claim.Annotations[selectedNodeAnnotation]
	return node == "" || node == p.Node
}

// Provision makes the directory and describes its volume. It may be called again for the same
// volume.
func (p *Provisioner) Provision(_ context.Context, o controller.ProvisionOptions) (*corev1.PersistentVolume, controller.ProvisioningState, error) {
	refuse := func(format string, a ...any) (*corev1.PersistentVolume, controller.ProvisioningState, error) {
		return nil, controller.ProvisioningFinished, fmt.Errorf(format, a...)
	}
	class := o.StorageClass
	if o.SelectedNodeName == "" {
		return refuse("class %s must have volumeBindingMode %s: a volume is on the node of its pod", class.Name, storagev1.VolumeBindingWaitForFirstConsumer)
	}
	if o.PVC.Spec.Selector != nil {
		return refuse("claims with a selector get no volume made: leave it out, or make the volume by hand")
	}
	if from := source(o.PVC); from != "" {
		return refuse("a volume of class %s is made empty, and not from a %s: there are no snapshots and no clones of it. Leave dataSource out and copy the files with a pod that mounts both claims, on node %s", class.Name, from, p.Node)
	}
	dir, err := p.dir(class)
	if err != nil {
		return refuse("%w", err)
	}
	name := dirName(o.PVC.Namespace, o.PVC.Name, o.PVName)
	dir, err = closed(dir)
	if err == nil {
		err = makeDir(dir, name)
	}
	if err != nil {
		// Another node may do better: the scheduler is asked again.
		return nil, controller.ProvisioningReschedule, fmt.Errorf("node %s cannot make the volume: %w", p.Node, err)
	}
	p.Log.Info("made the directory of a volume", "claim", o.PVC.Namespace+"/"+o.PVC.Name, "path", filepath.Join(dir, name))
	kind := corev1.HostPathDirectory // a lost directory must not come back empty
	return &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: o.PVName},
		Spec: corev1.PersistentVolumeSpec{
			PersistentVolumeReclaimPolicy: reclaimPolicy(class),
			AccessModes:                   o.PVC.Spec.AccessModes,
			MountOptions:                  class.MountOptions,
			VolumeMode:                    o.PVC.Spec.VolumeMode,
			Capacity:                      corev1.ResourceList{corev1.ResourceStorage: o.PVC.Spec.Resources.Requests[corev1.ResourceStorage]},
			PersistentVolumeSource: corev1.PersistentVolumeSource{
				HostPath: &corev1.HostPathVolumeSource{Path: filepath.Join(dir, name), Type: &kind},
			},
			NodeAffinity: &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
				MatchFields: nil,
				MatchExpressions: []corev1.NodeSelectorRequirement{{
					Key: corev1.LabelHostname, Operator: corev1.NodeSelectorOpIn, Values: []string{p.Node},
				}},
			}}}},
		},
	}, controller.ProvisioningFinished, nil
}

// source is the kind of what a claim is to be a copy of, "" for nothing.
func source(claim *corev1.PersistentVolumeClaim) string {
	switch {
	case claim.Spec.DataSource != nil:
		return claim.Spec.DataSource.Kind
	case claim.Spec.DataSourceRef != nil:
		return claim.Spec.DataSourceRef.Kind
	}
	return ""
}

// reclaimPolicy is the class's, or the one that Kubernetes gives a class without.
func reclaimPolicy(class *storagev1.StorageClass) corev1.PersistentVolumeReclaimPolicy {
	if class.ReclaimPolicy == nil {
		return corev1.PersistentVolumeReclaimDelete
	}
	return *class.ReclaimPolicy
}

// dir is where the volumes of a class are.
func (p *Provisioner) dir(class *storagev1.StorageClass) (string, error) {
	for key := range class.Parameters {
		if key != dirParameter {
			return "", fmt.Errorf("class %s has the parameter %s, which is not known; there is %s only", class.Name, key, dirParameter)
		}
	}
	want, given := class.Parameters[dirParameter]
	if !given {
		return p.Dirs[0], nil
	}
	if !slices.Contains(p.Dirs, filepath.Clean(want)) {
		return "", fmt.Errorf("class %s has volumes in %s, which is not allowed; allow it with: microk8s enable hostpath-storage --pv-dir=%s", class.Name, want, want)
	}
	return filepath.Clean(want), nil
}

// ShouldDelete reports whether the volume is on this node: by its node affinity, or, for volumes
// that have none, because their directory is here.
func (p *Provisioner) ShouldDelete(_ context.Context, pv *corev1.PersistentVolume) bool {
	if nodes, ok := boundTo(pv); ok {
		return slices.Contains(nodes, p.Node)
	}
	dir, name, err := p.split(pv)
	if err != nil {
		return false
	}
	_, err = os.Lstat(filepath.Join(dir, name))
	return err == nil
}

// boundTo returns the host names that a volume is bound to.
func boundTo(pv *corev1.PersistentVolume) (nodes []string, ok bool) {
	if pv.Spec.NodeAffinity == nil || pv.Spec.NodeAffinity.Required == nil {
		return nil, false
	}
	for _, term := range pv.Spec.NodeAffinity.Required.NodeSelectorTerms {
		for _, e := range term.MatchExpressions {
			if e.Key == corev1.LabelHostname && e.Operator == corev1.NodeSelectorOpIn {
				nodes = append(nodes, e.Values...)
			}
		}
	}
	return nodes, true
}

// Delete removes the directory of a volume with everything in it. One that is not there is
// removed already.
func (p *Provisioner) Delete(_ context.Context, pv *corev1.PersistentVolume) error {
	dir, name, err := p.split(pv)
	if err != nil {
		return err
	}
	if err := removeDir(dir, name); err != nil {
		return fmt.Errorf("cannot delete the data of volume %s: %w", pv.Name, err)
	}
	p.Log.Info("deleted the directory of a volume", "volume", pv.Name, "path", filepath.Join(dir, name))
	return nil
}

// split returns the directory of a volume's directory, which is an allowed one or the closed
// subdirectory of one, and the name in it.
func (p *Provisioner) split(pv *corev1.PersistentVolume) (dir, name string, err error) {
	if pv.Spec.HostPath == nil {
		return "", "", fmt.Errorf("volume %s is no directory of a host", pv.Name)
	}
	path := pv.Spec.HostPath.Path
	dir, name = filepath.Split(path)
	dir = filepath.Clean(dir)
	allowed := slices.Contains(p.Dirs, dir) && name != closedName || filepath.Base(dir) == closedName && slices.Contains(p.Dirs, filepath.Dir(dir))
	if filepath.Clean(path) != path || !allowed || name == "" {
		return "", "", fmt.Errorf("volume %s is at %s, which is not directly in %s: delete it by hand", pv.Name, path, strings.Join(p.Dirs, " or "))
	}
	return dir, name, nil
}

// dirName names a volume's directory for people, and uniquely: the volume's name is last and
// complete, the claim's is cut where all would be too long.
func dirName(namespace, claim, volume string) string {
	if room := maxName - len(namespace) - len(volume) - 2; len(claim) > room {
		claim = claim[:max(room, 0)]
	}
	return namespace + "-" + claim + "-" + volume
}

// makeDir makes a directory for everyone, so that a power cut does not lose it.
func makeDir(dir, name string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := root.Mkdir(name, volumeMode); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if fi, err := root.Lstat(name); err != nil || !fi.IsDir() {
		return errors.Join(err, fmt.Errorf("%s is there and no directory", filepath.Join(dir, name)))
	}
	if err := root.Chmod(name, volumeMode); err != nil { // Mkdir is subject to the umask
		return err
	}
	return syncDir(dir)
}

func removeDir(dir, name string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := root.RemoveAll(name); err != nil {
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Prepare closes the default directory to the users of the host while it is empty; what
// somebody uses already is left as it is.
func (p *Provisioner) Prepare() error {
	entries, err := os.ReadDir(p.Dirs[0])
	if err != nil {
		return fmt.Errorf("cannot read the directory of the volumes: %w", err)
	}
	if len(entries) > 0 {
		return nil
	}
	return os.Chmod(p.Dirs[0], 0o700)
}

// closed returns where the volumes of an allowed directory are made: there, if no user of the
// host can enter it, or in its closed subdirectory, which it makes. It refuses a directory in
// which every user may put another one in that place.
func closed(dir string) (string, error) {
	fi, err := os.Stat(dir)
	if err != nil {
		return "", err
	}
	if private(fi) {
		return dir, nil
	}
	if fi.Mode().Perm()&0o002 != 0 && fi.Mode()&fs.ModeSticky == 0 {
		return "", fmt.Errorf("every user of the host may replace what is in %s; run there: chmod o-w %s", dir, dir)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", err
	}
	defer root.Close()
	path := filepath.Join(dir, closedName)
	if err := root.Mkdir(closedName, 0o700); err == nil {
		return path, syncDir(dir)
	} else if !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	fi, err = root.Lstat(closedName)
	switch {
	case err != nil:
		return "", err
	case !fi.IsDir() || !owned(fi):
		return "", fmt.Errorf("%s is there and no directory of root: move it away", path)
	case !private(fi):
		return path, root.Chmod(closedName, 0o700)
	}
	return path, nil
}

// private reports whether only this program's user, root on a node, can enter a directory.
func private(fi fs.FileInfo) bool { return fi.Mode().Perm()&0o077 == 0 && owned(fi) }

func owned(fi fs.FileInfo) bool {
	st, ok := fi.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}
