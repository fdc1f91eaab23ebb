package daemons

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/utils/ptr"

	"microk8s/internal/addon"
	"microk8s/internal/bootstrap"
	"microk8s/internal/ingressrights"
	"microk8s/internal/ingresssecrets"
	"microk8s/internal/kube"
	"microk8s/internal/noderegistry"
)

// Here the shipped policies, and the rights of the addons' accounts, are evaluated by a real API
// server: what must be refused, what must pass, and, with each policy taken away, that nothing
// else refuses what it is there for.

const repository = "../../.."

// as is a client of another user, by impersonation.
func (s *storage) as(t *testing.T, who rest.ImpersonationConfig) *kubernetes.Clientset {
	t.Helper()
	cfg := rest.CopyConfig(s.cfg)
	cfg.Impersonate = who
	c, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func kubelet(node, join string) rest.ImpersonationConfig {
	return rest.ImpersonationConfig{UserName: "system:node:" + node, UID: join, Groups: []string{"system:nodes", "system:authenticated"}}
}

// account is a pod's ServiceAccount, with a token of a pod on a node ("" for another token).
func account(namespace, name, node string) rest.ImpersonationConfig {
	who := rest.ImpersonationConfig{
		UserName: "system:serviceaccount:" + namespace + ":" + name,
		Groups:   []string{"system:serviceaccounts", "system:serviceaccounts:" + namespace, "system:authenticated"},
	}
	if node != "" {
		who.Extra = map[string][]string{"authentication.kubernetes.io/node-name": {node}}
	}
	return who
}

func (s *storage) applyManifests(t *testing.T) {
	t.Helper()
	if err := bootstrap.Apply(t.Context(), s.cfg, filepath.Join(repository, "snap/manifests"), slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
}

func (s *storage) enable(t *testing.T, name string, args ...string) {
	t.Helper()
	env := s.env
	env.Snap = t.TempDir()
	target, err := filepath.Abs(filepath.Join(repository, "addons"))
	if err == nil {
		err = os.Symlink(target, filepath.Join(env.Snap, "addons"))
	}
	if err != nil {
		t.Fatal(err)
	}
	set, err := addon.Open(env, s.cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	a, err := set.Find(name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := set.Enable(t.Context(), a, args); err != nil {
		t.Fatal(err)
	}
}

func (s *storage) registry() noderegistry.Registry {
	return noderegistry.Registry{Core: func() (*kube.Core, error) { return kube.New(s.cfg) }}
}

// register makes the records of nodes; NAME is a worker, NAME! a control-plane node. A worker's
// join is named "join-NAME".
func (s *storage) register(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		r := noderegistry.Record{Name: name, Role: noderegistry.Worker, Join: "join-" + name, Since: time.Now(), Secrets: 2}
		if n, ok := strings.CutSuffix(name, "!"); ok {
			r.Name, r.Role, r.Join = n, noderegistry.ControlPlane, ""
		}
		if err := s.registry().Put(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
}

func (s *storage) complete(t *testing.T) {
	t.Helper()
	if done, err := s.registry().Adopt(t.Context(), nil); err != nil || !done {
		t.Fatalf("the records are not complete: %v", err)
	}
}

// testNode is a Node as a kubelet makes it.
func testNode(name, address string, change ...func(*corev1.Node)) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{
		"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "microk8s.io/cluster": "true",
	}}}
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: address}, {Type: corev1.NodeHostName, Address: name}}
	for _, c := range change {
		c(n)
	}
	return n
}

var dryRun = []string{metav1.DryRunAll}

// attempt is one request of a table; all of them are dry runs, so that they can be made again.
type attempt struct {
	name    string
	who     rest.ImpersonationConfig
	do      func(ctx context.Context, c kubernetes.Interface) error
	policy  string // that refuses it, "" for a request that must pass
	message string // in the refusal
}

func (s *storage) try(t *testing.T, r attempt) error { return r.do(t.Context(), s.as(t, r.who)) }

// check makes the requests of a table, and then those that must be refused again, each time with
// their policy taken away. again brings the policies back.
func (s *storage) check(t *testing.T, table []attempt, again func(t *testing.T)) {
	// Policies take effect a moment after they were written.
	for _, r := range table {
		if r.policy != "" {
			eventually(t, r.policy+" holds", func() error {
				if err := s.try(t, r); err == nil {
					return fmt.Errorf("%s: passed", r.name)
				}
				return nil
			})
		}
	}
	byPolicy := map[string][]attempt{}
	for _, r := range table {
		t.Run(r.name, func(t *testing.T) {
			err := s.try(t, r)
			if r.policy == "" {
				if err != nil {
					t.Errorf("refused: %v", err)
				}
				return
			}
			if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "ValidatingAdmissionPolicy '"+r.policy+"'") || !strings.Contains(err.Error(), r.message) {
				t.Errorf("got %v, want a refusal by %s with %q", err, r.policy, r.message)
			}
		})
		if r.policy != "" {
			byPolicy[r.policy] = append(byPolicy[r.policy], r)
		}
	}
	for policy, refused := range byPolicy {
		t.Run("without "+policy, func(t *testing.T) {
			bindings := s.AdmissionregistrationV1().ValidatingAdmissionPolicyBindings()
			if err := bindings.Delete(t.Context(), policy, metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
			for _, r := range refused {
				eventually(t, r.name+" passes", func() error { return s.try(t, r) })
			}
			again(t)
			eventually(t, policy+" holds again", func() error {
				if err := s.try(t, refused[0]); err == nil {
					return fmt.Errorf("%s: passed", refused[0].name)
				}
				return nil
			})
		})
	}
	t.Run("every policy that refuses has a request here", func(t *testing.T) {
		all, err := s.AdmissionregistrationV1().ValidatingAdmissionPolicyBindings().List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range all.Items {
			if _, ok := byPolicy[b.Spec.PolicyName]; !ok && fmt.Sprint(b.Spec.ValidationActions) == "[Deny]" {
				t.Errorf("policy %s has none", b.Spec.PolicyName)
			}
		}
	})
}

// TestAdmission holds the shipped policies against requests of kubelets and of the addons' accounts.
// The gate of the nodes' records is left out: what is refused is refused by the policies, as API
// servers without it do.
func TestAdmission(t *testing.T) {
	t.Parallel()
	s := newStorage(t, "TEST_WITHOUT_GATE=1")
	ctx := t.Context()
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	s.applyManifests(t)
	s.enable(t, "hostpath-storage", "--pv-dir=/mnt/ssd")
	again := func(t *testing.T) {
		s.applyManifests(t)
		s.enable(t, "hostpath-storage", "--pv-dir=/mnt/ssd")
	}
	s.register(t, "n1!", "w1", "w2", "new")

	const controlPlane = "node.kubernetes.io/microk8s-controlplane"
	must(s.CoreV1().Nodes().Create(ctx, testNode("n1", "10.0.0.1", func(n *corev1.Node) {
		n.Labels[controlPlane] = "microk8s-controlplane"
		n.Spec.PodCIDR, n.Spec.PodCIDRs = "10.1.0.0/24", []string{"10.1.0.0/24"}
		n.Spec.ProviderID = "cloud://one"
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: "fd00::1"})
	}), metav1.CreateOptions{}))
	must(s.CoreV1().Nodes().Create(ctx, testNode("w1", "10.0.0.11", func(n *corev1.Node) {
		n.Spec.PodCIDR, n.Spec.PodCIDRs = "10.1.1.0/24", []string{"10.1.1.0/24"}
	}), metav1.CreateOptions{}))
	must(s.CoreV1().Nodes().Create(ctx, testNode("w2", "10.0.0.12"), metav1.CreateOptions{}))
	// One from before there were policies, with what they refuse.
	s.register(t, "old")
	must(s.CoreV1().Nodes().Create(ctx, testNode("old", "10.0.0.1", func(n *corev1.Node) {
		n.Labels["kubernetes.io/hostname"] = "other"
		n.Labels[controlPlane] = ""
	}), metav1.CreateOptions{}))

	create := func(n *corev1.Node) func(context.Context, kubernetes.Interface) error {
		return func(ctx context.Context, c kubernetes.Interface) error {
			_, err := c.CoreV1().Nodes().Create(ctx, n, metav1.CreateOptions{DryRun: dryRun})
			return err
		}
	}
	patch := func(name, subresource, text string) func(context.Context, kubernetes.Interface) error {
		return func(ctx context.Context, c kubernetes.Interface) error {
			var sub []string
			if subresource != "" {
				sub = []string{subresource}
			}
			_, err := c.CoreV1().Nodes().Patch(ctx, name, types.StrategicMergePatchType, []byte(text), metav1.PatchOptions{DryRun: dryRun}, sub...)
			return err
		}
	}
	address := func(kind, text string) string {
		return fmt.Sprintf(`{"status":{"addresses":[{"type":%q,"address":%q}]}}`, kind, text)
	}

	t.Run("while the records are not complete", func(t *testing.T) {
		for _, name := range []string{"new", "stranger"} {
			if err := create(testNode(name, "10.0.0.99"))(ctx, s.as(t, kubelet(name, ""))); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
	s.complete(t)

	const (
		registration = "node-registration.microk8s.io"
		claims       = "node-claims.microk8s.io"
		addresses    = "node-addresses.microk8s.io"
		services     = "node-service-addresses.microk8s.io"
		role         = "node-role.microk8s.io"
		volumes      = "hostpath.microk8s.io"
		pvcs         = "hostpath-claims.microk8s.io"
		classes      = "hostpath-classes.microk8s.io"
	)
	w1, fresh := kubelet("w1", "join-w1"), kubelet("new", "join-new")
	table := []attempt{
		{"a node that has joined", fresh, create(testNode("new", "10.0.0.99")), "", ""},
		{"with labels, taints and addresses of its own", fresh, create(testNode("new", "10.0.0.99", func(n *corev1.Node) {
			n.Labels["topology.kubernetes.io/zone"] = "a"
			n.Labels["node.kubernetes.io/microk8s-worker"] = "microk8s-worker"
			n.Spec.Taints = []corev1.Taint{{Key: "a", Effect: corev1.TaintEffectNoSchedule}}
			n.Spec.ProviderID = "cloud://new"
			n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: "fd00::99"}, corev1.NodeAddress{Type: corev1.NodeExternalIP, Address: "192.0.2.9"})
		})), "", ""},
		{"without addresses", fresh, create(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "new"}}), "", ""},
		{"a node that never joined, or was removed", kubelet("stranger", "join-stranger"), create(testNode("stranger", "10.0.0.98")), registration, "node stranger is not registered in this cluster"},
		{"made by the administrator", rest.ImpersonationConfig{UserName: "admin", Groups: []string{"system:masters"}}, create(testNode("stranger", "10.0.0.1", func(n *corev1.Node) {
			n.Spec.PodCIDR, n.Spec.PodCIDRs = "10.1.0.0/24", []string{"10.1.0.0/24"}
		})), "", ""},

		{"a pod subnet of its choice", fresh, create(testNode("new", "10.0.0.99", func(n *corev1.Node) {
			n.Spec.PodCIDR, n.Spec.PodCIDRs = "192.168.77.0/24", []string{"192.168.77.0/24"}
		})), claims, "podCIDR"},
		{"another node's pod subnet", fresh, create(testNode("new", "10.0.0.99", func(n *corev1.Node) {
			n.Spec.PodCIDR, n.Spec.PodCIDRs = "10.1.0.0/24", []string{"10.1.0.0/24"}
		})), claims, "podCIDR"},
		{"a pod subnet later", kubelet("w2", "join-w2"), patch("w2", "", `{"spec":{"podCIDR":"10.1.0.0/24","podCIDRs":["10.1.0.0/24"]}}`), claims, "podCIDR"},
		{"an address of the loopback", w1, patch("w1", "status", address("InternalIP", "127.0.0.1")), claims, "no address of a machine"},
		{"no address", w1, patch("w1", "status", address("InternalIP", "0.0.0.0")), claims, "no address of a machine"},
		{"another node's in another spelling", w1, patch("w1", "status", address("InternalIP", "fd00:0::1")), claims, "unusual spelling"},
		{"another node's within IPv6", w1, patch("w1", "status", address("ExternalIP", "::ffff:10.0.0.1")), claims, "unusual spelling"},
		{"a name as an address", w1, patch("w1", "status", address("InternalIP", "n1.example")), claims, "no address of a machine"},
		{"another node's host name label", w1, patch("w1", "", `{"metadata":{"labels":{"kubernetes.io/hostname":"n1"}}}`), claims, "kubernetes.io/hostname"},
		{"another node's host name label by the status", w1, patch("w1", "status", `{"metadata":{"labels":{"kubernetes.io/hostname":"n1"}}}`), claims, "kubernetes.io/hostname"},
		{"a host name label without meaning", fresh, create(testNode("new", "10.0.0.99", func(n *corev1.Node) { n.Labels["kubernetes.io/hostname"] = "x" })), claims, "kubernetes.io/hostname"},

		{"a control-plane node's address", w1, patch("w1", "status", address("InternalIP", "10.0.0.1")), addresses, "the address 10.0.0.1 is that of node "},
		{"a worker's address, as an external one", w1, patch("w1", "status", address("ExternalIP", "10.0.0.12")), addresses, "is that of node w2"},
		{"another node's second family", fresh, create(testNode("new", "fd00::1")), addresses, "the address fd00::1 is that of node n1"},
		{"another node's host name", w1, patch("w1", "status", address("InternalDNS", "N1")), addresses, "the address n1 is that of node n1"},
		{"another node's provider ID", w1, patch("w1", "", `{"spec":{"providerID":"cloud://one"}}`), addresses, "provider ID"},
		{"a provider ID of its own", w1, patch("w1", "", `{"spec":{"providerID":"cloud://w1"}}`), "", ""},
		{"a new address of its own", w1, patch("w1", "status", address("InternalIP", "10.0.0.111")), "", ""},
		{"its own addresses again", w1, patch("w1", "status", address("InternalIP", "10.0.0.11")), "", ""},

		{"the API server's Service address", w1, patch("w1", "status", address("InternalIP", "10.152.183.1")), services, "Service range"},
		{"a Service's address, as an external one", w1, patch("w1", "status", address("ExternalIP", "10.152.183.77")), services, "Service range"},

		{"a worker as control plane", w1, patch("w1", "", `{"metadata":{"labels":{"`+controlPlane+`":""}}}`), role, "a worker may not have the label"},
		{"a new worker as control plane", fresh, create(testNode("new", "10.0.0.99", func(n *corev1.Node) { n.Labels[controlPlane] = "" })), role, "a worker may not have the label"},
		{"a control-plane node", kubelet("n1", ""), patch("n1", "", `{"metadata":{"labels":{"`+controlPlane+`":"yes"}}}`), "", ""},

		{"heartbeat", w1, patch("w1", "status", `{"status":{"conditions":[{"type":"Ready","status":"True"}]}}`), "", ""},
		{"the pod network's annotations", w1, patch("w1", "status", `{"metadata":{"annotations":{"flannel.alpha.coreos.com/public-ip":"10.0.0.11"}}}`), "", ""},
		{"labels", w1, patch("w1", "", `{"metadata":{"labels":{"topology.kubernetes.io/zone":"a"}}}`), "", ""},
		{"heartbeat of a node from before", kubelet("old", "join-old"), patch("old", "status", `{"status":{"conditions":[{"type":"Ready","status":"True"}]}}`), "", ""},
		{"labels of a node from before", kubelet("old", "join-old"), patch("old", "", `{"metadata":{"labels":{"x":"y"}}}`), "", ""},
	}

	// The provisioner.
	pv := func(name, path string, nodes []string, change ...func(*corev1.PersistentVolume)) *corev1.PersistentVolume {
		v := &corev1.PersistentVolume{
			ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{"pv.kubernetes.io/provisioned-by": "microk8s.io/hostpath"}},
			Spec: corev1.PersistentVolumeSpec{
				AccessModes:                   []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
				Capacity:                      corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")},
				StorageClassName:              "microk8s-hostpath",
				PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimDelete,
				PersistentVolumeSource:        corev1.PersistentVolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: path, Type: ptr.To(corev1.HostPathDirectory)}},
			},
		}
		if nodes != nil {
			v.Spec.NodeAffinity = &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
				MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "kubernetes.io/hostname", Operator: corev1.NodeSelectorOpIn, Values: nodes}},
			}}}}
		}
		for _, c := range change {
			c(v)
		}
		return v
	}
	root := s.env.DefaultStorage()
	for name, v := range map[string]struct {
		node  []string
		phase corev1.PersistentVolumePhase
	}{"released-w1": {[]string{"w1"}, corev1.VolumeReleased}, "bound-w1": {[]string{"w1"}, corev1.VolumeBound}, "released-n1": {[]string{"n1"}, corev1.VolumeReleased}, "released": {nil, corev1.VolumeReleased}} {
		made, err := s.CoreV1().PersistentVolumes().Create(ctx, pv(name, root+"/ns-c-"+name, v.node), metav1.CreateOptions{})
		must(made, err)
		made.Status.Phase = v.phase
		must(s.CoreV1().PersistentVolumes().UpdateStatus(ctx, made, metav1.UpdateOptions{}))
	}
	foreign, err := s.CoreV1().PersistentVolumes().Create(ctx, pv("foreign", root+"/ns-c-foreign", []string{"w1"}, func(v *corev1.PersistentVolume) { v.Annotations = nil }), metav1.CreateOptions{})
	must(foreign, err)
	foreign.Status.Phase = corev1.VolumeReleased
	must(s.CoreV1().PersistentVolumes().UpdateStatus(ctx, foreign, metav1.UpdateOptions{}))
	claim := &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Name: "c", Annotations: map[string]string{"volume.kubernetes.io/selected-node": "w1", "a": "b"}},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources:   corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}},
		},
	}
	claim, err = s.CoreV1().PersistentVolumeClaims("default").Create(ctx, claim, metav1.CreateOptions{})
	must(claim, err)

	provisioner := account("kube-system", "microk8s-hostpath", "w1")
	createPV := func(v *corev1.PersistentVolume) func(context.Context, kubernetes.Interface) error {
		return func(ctx context.Context, c kubernetes.Interface) error {
			_, err := c.CoreV1().PersistentVolumes().Create(ctx, v, metav1.CreateOptions{DryRun: dryRun})
			return err
		}
	}
	deletePV := func(name string) func(context.Context, kubernetes.Interface) error {
		return func(ctx context.Context, c kubernetes.Interface) error {
			return c.CoreV1().PersistentVolumes().Delete(ctx, name, metav1.DeleteOptions{DryRun: dryRun})
		}
	}
	updatePVC := func(change func(*corev1.PersistentVolumeClaim)) func(context.Context, kubernetes.Interface) error {
		return func(ctx context.Context, c kubernetes.Interface) error {
			changed := claim.DeepCopy()
			change(changed)
			_, err := c.CoreV1().PersistentVolumeClaims("default").Update(ctx, changed, metav1.UpdateOptions{DryRun: dryRun})
			return err
		}
	}
	here := []string{"w1"}
	for name, provisioner := range map[string]string{"ssd": "microk8s.io/hostpath", "other": "example.org/other"} {
		must(s.StorageV1().StorageClasses().Create(ctx, &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Provisioner: provisioner}, metav1.CreateOptions{}))
	}
	ofClass := func(name string) func(*corev1.PersistentVolume) {
		return func(v *corev1.PersistentVolume) { v.Spec.StorageClassName = name }
	}
	table = append(table, []attempt{
		{"a volume of its node", provisioner, createPV(pv("pvc-1", root+"/ns-c-pvc-1", here)), "", ""},
		{"a volume in the closed part of another directory", provisioner, createPV(pv("pvc-1", "/mnt/ssd/microk8s/ns-c-pvc-1", here)), "", ""},
		{"a volume directly in another directory", provisioner, createPV(pv("pvc-1", "/mnt/ssd/ns-c-pvc-1", here)), "", ""},
		{"a volume of another node", provisioner, createPV(pv("pvc-1", root+"/ns-c-pvc-1", []string{"n1"})), volumes, "volumes of that node only"},
		{"a volume of two nodes", provisioner, createPV(pv("pvc-1", root+"/ns-c-pvc-1", []string{"w1", "n1"})), volumes, "volumes of that node only"},
		{"a volume of any node", provisioner, createPV(pv("pvc-1", root+"/ns-c-pvc-1", nil)), volumes, "volumes of that node only"},
		{"a volume of this node or another", provisioner, createPV(pv("pvc-1", root+"/ns-c-pvc-1", here, func(v *corev1.PersistentVolume) {
			terms := &v.Spec.NodeAffinity.Required.NodeSelectorTerms
			*terms = append(*terms, corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "kubernetes.io/os", Operator: corev1.NodeSelectorOpExists}}})
		})), volumes, "volumes of that node only"},
		{"a volume with a token of no node", account("kube-system", "microk8s-hostpath", ""), createPV(pv("pvc-1", root+"/ns-c-pvc-1", []string{""})), volumes, "volumes of that node only"},
		{"the root file system", provisioner, createPV(pv("pvc-1", "/", here)), volumes, "directly below its directories"},
		{"an allowed directory itself", provisioner, createPV(pv("pvc-1", "/mnt/ssd", here)), volumes, "directly below its directories"},
		{"the closed part itself", provisioner, createPV(pv("microk8s", "/mnt/ssd/microk8s", here)), volumes, "directly below its directories"},
		{"deeper", provisioner, createPV(pv("pvc-1", "/mnt/ssd/a/b-pvc-1", here)), volumes, "directly below its directories"},
		{"beside", provisioner, createPV(pv("pvc-1", "/mnt/ssdx-pvc-1", here)), volumes, "directly below its directories"},
		{"another volume's directory", provisioner, createPV(pv("pvc-1", root+"/ns-c-pvc-2", here)), volumes, "ends with the name of the volume"},
		{"another kind of volume", provisioner, createPV(pv("pvc-1", "", here, func(v *corev1.PersistentVolume) {
			v.Spec.PersistentVolumeSource = corev1.PersistentVolumeSource{NFS: &corev1.NFSVolumeSource{Server: "x", Path: "/"}}
		})), volumes, "directly below its directories"},
		{"a volume of a class that somebody made for it", provisioner, createPV(pv("pvc-1", root+"/ns-c-pvc-1", here, ofClass("ssd"))), "", ""},
		{"a volume of another provisioner's class", provisioner, createPV(pv("pvc-1", root+"/ns-c-pvc-1", here, ofClass("other"))), classes, "of its own classes only, not of other"},
		{"a volume of no class", provisioner, createPV(pv("pvc-1", root+"/ns-c-pvc-1", here, ofClass(""))), classes, "not of no class"},
		{"a released volume is deleted", provisioner, deletePV("released-w1"), "", ""},
		{"a released volume of earlier provisioners is deleted", provisioner, deletePV("released"), "", ""},
		{"a volume in use is deleted", provisioner, deletePV("bound-w1"), volumes, "no volume that is in use"},
		{"another node's volume is deleted", provisioner, deletePV("released-n1"), volumes, "volumes of that node only"},
		{"a volume that it did not make is deleted", provisioner, deletePV("foreign"), volumes, "of its own only"},
		{"a volume by the administrator", rest.ImpersonationConfig{UserName: "admin", Groups: []string{"system:masters"}}, createPV(pv("pvc-1", "/", nil)), "", ""},

		{"the selected node is taken away", provisioner, updatePVC(func(c *corev1.PersistentVolumeClaim) {
			delete(c.Annotations, "volume.kubernetes.io/selected-node")
		}), "", ""},
		{"another node's selection is taken away", account("kube-system", "microk8s-hostpath", "n1"), updatePVC(func(c *corev1.PersistentVolumeClaim) {
			delete(c.Annotations, "volume.kubernetes.io/selected-node")
		}), pvcs, "its own node only"},
		{"the claim is bound to a volume of its choice", provisioner, updatePVC(func(c *corev1.PersistentVolumeClaim) { c.Spec.VolumeName = "evil" }), pvcs, "the selected node only"},
		{"another annotation of a claim", provisioner, updatePVC(func(c *corev1.PersistentVolumeClaim) { c.Annotations["a"] = "c" }), pvcs, "the selected node only"},
		{"another annotation of a claim goes", provisioner, updatePVC(func(c *corev1.PersistentVolumeClaim) { delete(c.Annotations, "a") }), pvcs, "the selected node only"},
		{"a new annotation of a claim", provisioner, updatePVC(func(c *corev1.PersistentVolumeClaim) { c.Annotations["pv.kubernetes.io/bind-completed"] = "yes" }), pvcs, "the selected node only"},
		{"labels of a claim", provisioner, updatePVC(func(c *corev1.PersistentVolumeClaim) { c.Labels = map[string]string{"a": "b"} }), pvcs, "the selected node only"},
		{"finalizers of a claim", provisioner, updatePVC(func(c *corev1.PersistentVolumeClaim) { c.Finalizers = nil }), pvcs, "the selected node only"},
	}...)
	s.check(t, table, again)

	t.Run("a volume is not changed at all", func(t *testing.T) {
		c := s.as(t, provisioner)
		for _, try := range []func() error{
			func() error {
				_, err := c.CoreV1().PersistentVolumes().Patch(ctx, "bound-w1", types.MergePatchType, []byte(`{"metadata":{"annotations":{"a":"b"}}}`), metav1.PatchOptions{DryRun: dryRun})
				return err
			},
			func() error {
				_, err := c.CoreV1().PersistentVolumeClaims("default").Patch(ctx, "c", types.MergePatchType, []byte(`{}`), metav1.PatchOptions{DryRun: dryRun})
				return err
			},
		} {
			if err := try(); !apierrors.IsForbidden(err) {
				t.Errorf("got %v", err)
			}
		}
	})
}

// TestNodeGate shuts a node out by deleting its record: every certificate and token from it, every
// right, and the watches that it has.
func TestNodeGate(t *testing.T) {
	t.Parallel()
	s := newStorage(t)
	ctx := t.Context()
	s.applyManifests(t)
	s.register(t, "n1!", "w1", "w2")
	proxy := func(node, join string) rest.ImpersonationConfig {
		return rest.ImpersonationConfig{UserName: "system:kube-proxy", UID: join, Groups: []string{noderegistry.Prefix + node, "system:authenticated"}}
	}
	get := func(who rest.ImpersonationConfig) error {
		_, err := s.as(t, who).CoreV1().Services("").List(ctx, metav1.ListOptions{Limit: 1})
		return err
	}
	refused := func(what string, who rest.ImpersonationConfig, message string) {
		t.Helper()
		eventually(t, what+" is refused", func() error {
			if err := get(who); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), message) {
				return fmt.Errorf("got %v, want a refusal with %q", fmt.Sprint(err), message)
			}
			return nil
		})
	}
	allowed := func(what string, who rest.ImpersonationConfig) {
		t.Helper()
		if err := get(who); err != nil {
			t.Errorf("%s is refused: %v", what, err)
		}
	}
	allowed("a stranger, while the records are not complete", kubelet("stranger", ""))
	s.complete(t)
	refused("a stranger", kubelet("stranger", ""), "node stranger is not registered in this cluster")

	allowed("a worker", kubelet("w1", "join-w1"))
	allowed("its kube-proxy", proxy("w1", "join-w1"))
	allowed("another worker", kubelet("w2", "join-w2"))
	allowed("a control-plane node", kubelet("n1", ""))
	allowed("a control-plane node's kube-proxy", rest.ImpersonationConfig{UserName: "system:kube-proxy", Groups: []string{"system:authenticated"}})
	refused("a certificate of an earlier join", kubelet("w1", "earlier"), "it has joined again since")
	refused("a certificate of the build before", kubelet("w1", ""), "it has joined again since")
	refused("a kube-proxy of an earlier join", proxy("w1", "earlier"), "it has joined again since")
	refused("the worker that a control-plane node was before", kubelet("n1", "earlier"), "it has joined again since")
	refused("the kube-proxy of the worker that it was", proxy("n1", "earlier"), "it has joined again since")

	t.Run("a removed node", func(t *testing.T) {
		if _, err := s.CoreV1().Nodes().Create(ctx, testNode("w1", "10.0.0.11"), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		w, err := s.as(t, kubelet("w1", "join-w1")).CoreV1().Nodes().Watch(ctx, metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer w.Stop()
		<-w.ResultChan() // it runs
		other, err := s.as(t, kubelet("w2", "join-w2")).CoreV1().Nodes().Watch(ctx, metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer other.Stop()
		if err := s.registry().Delete(ctx, "w1"); err != nil {
			t.Fatal(err)
		}
		for deadline := time.After(time.Minute); ; {
			select {
			case _, open := <-w.ResultChan():
				if open {
					continue
				}
			case <-deadline:
				t.Error("a watch of the removed node goes on")
			}
			break
		}
		refused("its kubelet", kubelet("w1", "join-w1"), "node w1 is not registered in this cluster")
		refused("its kube-proxy", proxy("w1", "join-w1"), "node w1 is not registered in this cluster")
		refused("a token of a pod on it", account("default", "default", "w1"), "node w1 is not registered in this cluster")
		allowed("another node", kubelet("w2", "join-w2"))
		if err := get(account("default", "default", "w2")); !apierrors.IsForbidden(err) || strings.Contains(err.Error(), "registered") {
			t.Errorf("a token of a pod on another node: %v, want the usual refusal", err)
		}
		if got := s.rightsOf(t, kubelet("w1", "join-w1")); len(got) > 0 {
			t.Errorf("rights that are left: %v", got)
		}
		if got := s.rightsOf(t, kubelet("w2", "join-w2")); len(got) < 20 {
			t.Errorf("another node has %d rights: %v", len(got), got)
		}
		_, err = s.CoreV1().Nodes().Patch(ctx, "w1", types.MergePatchType, []byte(`{"metadata":{"labels":{"x":"y"}}}`), metav1.PatchOptions{})
		if err != nil {
			t.Fatal(err)
		}
		select {
		case _, open := <-other.ResultChan():
			if !open {
				t.Error("a watch of another node was ended")
			}
		case <-time.After(time.Minute):
			t.Error("a watch of another node has stopped")
		}
	})
	t.Run("comes back by a join", func(t *testing.T) {
		s.register(t, "w1")
		eventually(t, "it is taken again", func() error { return get(kubelet("w1", "join-w1")) })
	})
	t.Run("keeps its record when its Node is deleted", func(t *testing.T) {
		if err := s.CoreV1().Nodes().Delete(ctx, "w1", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.as(t, kubelet("w1", "join-w1")).CoreV1().Nodes().Create(ctx, testNode("w1", "10.0.0.11"), metav1.CreateOptions{}); err != nil {
			t.Errorf("it does not come back: %v", err)
		}
	})
}

// rightsOf asks for every verb on every resource, in all namespaces and in two.
func (s *storage) rightsOf(t *testing.T, who rest.ImpersonationConfig) (rights []string) {
	t.Helper()
	_, lists, err := s.Discovery().ServerGroupsAndResources()
	if err != nil {
		t.Fatal(err)
	}
	extra := map[string]authorizationv1.ExtraValue{}
	for k, v := range who.Extra {
		extra[k] = v
	}
	for _, list := range lists {
		group, _, found := strings.Cut(list.GroupVersion, "/")
		if !found {
			group = ""
		}
		for _, r := range list.APIResources {
			name, sub, _ := strings.Cut(r.Name, "/")
			for _, verb := range []string{"get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"} {
				for _, ns := range []string{"", "kube-system"} {
					review, err := s.AuthorizationV1().SubjectAccessReviews().Create(t.Context(), &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
						User: who.UserName, UID: who.UID, Groups: who.Groups, Extra: extra,
						ResourceAttributes: &authorizationv1.ResourceAttributes{Namespace: ns, Verb: verb, Group: group, Resource: name, Subresource: sub},
					}}, metav1.CreateOptions{})
					if err != nil {
						t.Fatal(err)
					}
					if review.Status.Allowed {
						rights = append(rights, fmt.Sprintf("%s %s.%s in %q", verb, r.Name, group, ns))
					}
				}
			}
		}
	}
	slices.Sort(rights)
	return slices.Compact(rights)
}

// TestIngressAccount runs what keeps the rights of the ingress controller, and the program beside it,
// with the account's own token: certificates of Ingresses are served, and no other Secret is read.
func TestIngressAccount(t *testing.T) {
	t.Parallel()
	s := newStorage(t)
	ctx := t.Context()
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, ns := range []string{"shop", "other"} {
		must(s.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}}, metav1.CreateOptions{}))
	}
	for _, name := range []string{"shop/cert", "shop/second", "shop/password", "other/cert", "kube-system/cert"} {
		ns, name, _ := strings.Cut(name, "/")
		secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}, Type: corev1.SecretTypeTLS, Data: map[string][]byte{"tls.crt": []byte(ns), "tls.key": []byte("key")}}
		if name == "password" {
			secret.Type, secret.Data = corev1.SecretTypeOpaque, map[string][]byte{"password": []byte("x")}
		}
		must(s.CoreV1().Secrets(ns).Create(ctx, secret, metav1.CreateOptions{}))
	}
	ingress := func(ns string, secrets ...string) *networkingv1.Ingress {
		i := &networkingv1.Ingress{ObjectMeta: metav1.ObjectMeta{Name: "i"}, Spec: networkingv1.IngressSpec{
			IngressClassName: ptr.To("public"),
			DefaultBackend:   &networkingv1.IngressBackend{Service: &networkingv1.IngressServiceBackend{Name: "s", Port: networkingv1.ServiceBackendPort{Number: 80}}},
		}}
		for _, name := range secrets {
			i.Spec.TLS = append(i.Spec.TLS, networkingv1.IngressTLS{SecretName: name})
		}
		created, err := s.NetworkingV1().Ingresses(ns).Create(ctx, i, metav1.CreateOptions{})
		must(created, err)
		return created
	}
	shop := ingress("shop", "cert", "password")
	ingress("kube-system", "cert")
	s.enable(t, "ingress")

	done := make(chan error)
	running, stop := context.WithCancel(ctx)
	go func() { done <- ingressrights.Run(running, s.cfg, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})

	token, err := s.CoreV1().ServiceAccounts("ingress").CreateToken(ctx, "traefik", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	must(token, err)
	own := rest.AnonymousClientConfig(s.cfg)
	own.BearerToken = token.Status.Token
	server, err := ingresssecrets.New(own, slog.New(slog.DiscardHandler))
	must(server, err)
	front := httptest.NewServer(server)
	t.Cleanup(front.Close)
	var wg sync.WaitGroup
	wg.Go(func() { server.Follow(running) })
	t.Cleanup(func() { stop(); front.CloseClientConnections(); wg.Wait() })

	// As Traefik does: client-go's informers of everything, through the program.
	client, err := kubernetes.NewForConfig(&rest.Config{Host: front.URL, BearerToken: token.Status.Token})
	must(client, err)
	factory := informers.NewSharedInformerFactory(client, 0)
	secrets := factory.Core().V1().Secrets().Informer()
	for _, i := range []cache.SharedIndexInformer{
		factory.Core().V1().Services().Informer(), factory.Core().V1().Nodes().Informer(), factory.Discovery().V1().EndpointSlices().Informer(),
		factory.Networking().V1().Ingresses().Informer(), factory.Networking().V1().IngressClasses().Informer(),
	} {
		_ = i.HasSynced() // asked for, and so started
	}
	factory.Start(running.Done())
	t.Cleanup(func() { stop(); factory.Shutdown() })
	for kind, ok := range factory.WaitForCacheSync(running.Done()) {
		if !ok {
			t.Errorf("%s is not listed", kind)
		}
	}
	await := func(want string) {
		t.Helper()
		eventually(t, "the certificates are "+want, func() error {
			var got []string
			for _, o := range secrets.GetStore().List() {
				got = append(got, o.(*corev1.Secret).Namespace+"/"+o.(*corev1.Secret).Name)
			}
			slices.Sort(got)
			if fmt.Sprint(got) != want {
				return fmt.Errorf("served: %v", got)
			}
			return nil
		})
	}
	await("[shop/cert]")
	direct, err := kubernetes.NewForConfig(own)
	must(direct, err)
	reads := func(ns, name string) bool {
		_, err := direct.CoreV1().Secrets(ns).Get(ctx, name, metav1.GetOptions{})
		if err != nil && !apierrors.IsForbidden(err) {
			t.Errorf("%s/%s: %v", ns, name, err)
		}
		return err == nil
	}
	for name, want := range map[string]bool{"shop/cert": true, "shop/second": false, "shop/password": false, "other/cert": false, "kube-system/cert": false, "kube-system/absent": false} {
		ns, name, _ := strings.Cut(name, "/")
		if got := reads(ns, name); got != want {
			t.Errorf("the account reads %s/%s: %v, want %v", ns, name, got, want)
		}
	}
	for _, ns := range []string{"", "shop", "kube-system", "ingress"} {
		if _, err := direct.CoreV1().Secrets(ns).List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("the account lists the Secrets of %q: %v", ns, err)
		}
	}

	shop.Spec.TLS = []networkingv1.IngressTLS{{SecretName: "second"}}
	must(s.NetworkingV1().Ingresses("shop").Update(ctx, shop, metav1.UpdateOptions{}))
	await("[shop/second]")
	eventually(t, "the right to the first certificate is gone", func() error {
		if reads("shop", "cert") {
			return errors.New("it is read")
		}
		return nil
	})
	if err := s.NetworkingV1().Ingresses("shop").Delete(ctx, "i", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	await("[]")
	if reads("shop", "second") {
		t.Error("the right is left when the last Ingress is gone")
	}
}
