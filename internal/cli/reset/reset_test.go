package reset

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	fakediscovery "k8s.io/client-go/discovery/fake"
	fakedynamic "k8s.io/client-go/dynamic/fake"
	clientgotesting "k8s.io/client-go/testing"
)

// kinds of the fake cluster: resource, kind, group/version, namespaced.
var kinds = []struct {
	resource, kind, gv string
	namespaced         bool
}{
	{"namespaces", "Namespace", "v1", false},
	{"nodes", "Node", "v1", false},
	{"pods", "Pod", "v1", true},
	{"services", "Service", "v1", true},
	{"configmaps", "ConfigMap", "v1", true},
	{"secrets", "Secret", "v1", true},
	{"serviceaccounts", "ServiceAccount", "v1", true},
	{"persistentvolumes", "PersistentVolume", "v1", false},
	{"persistentvolumeclaims", "PersistentVolumeClaim", "v1", true},
	{"deployments", "Deployment", "apps/v1", true},
	{"clusterroles", "ClusterRole", "rbac.authorization.k8s.io/v1", false},
	{"clusterrolebindings", "ClusterRoleBinding", "rbac.authorization.k8s.io/v1", false},
	{"rolebindings", "RoleBinding", "rbac.authorization.k8s.io/v1", true},
	{"priorityclasses", "PriorityClass", "scheduling.k8s.io/v1", false},
	{"storageclasses", "StorageClass", "storage.k8s.io/v1", false},
	{"leases", "Lease", "coordination.k8s.io/v1", true},
	{"validatingwebhookconfigurations", "ValidatingWebhookConfiguration", "admissionregistration.k8s.io/v1", false},
	{"customresourcedefinitions", "CustomResourceDefinition", "apiextensions.k8s.io/v1", false},
	{"widgets", "Widget", "example.org/v1", true},
	{"flowschemas", "FlowSchema", "flowcontrol.apiserver.k8s.io/v1", false},
	{"apiservices", "APIService", "apiregistration.k8s.io/v1", false},
}

func object(resource, ns, name string) *unstructured.Unstructured {
	for _, k := range kinds {
		if k.resource == resource {
			o := &unstructured.Unstructured{Object: map[string]any{"apiVersion": k.gv, "kind": k.kind}}
			o.SetName(name)
			o.SetNamespace(ns)
			return o
		}
	}
	panic("no kind " + resource)
}

func labelled(o *unstructured.Unstructured, key, value string) *unstructured.Unstructured {
	o.SetLabels(map[string]string{key: value})
	return o
}

// newCluster is a fake cluster: client-go's object tracker, which deletes at once and runs no
// controllers.
func newCluster(objects ...*unstructured.Unstructured) (*Cleaner, *fakedynamic.FakeDynamicClient) {
	lists := map[schema.GroupVersionResource]string{}
	byGV := map[string]*metav1.APIResourceList{}
	for _, k := range kinds {
		gv, _ := schema.ParseGroupVersion(k.gv)
		lists[gv.WithResource(k.resource)] = k.kind + "List"
		if byGV[k.gv] == nil {
			byGV[k.gv] = &metav1.APIResourceList{GroupVersion: k.gv}
		}
		byGV[k.gv].APIResources = append(byGV[k.gv].APIResources,
			metav1.APIResource{Name: k.resource, Kind: k.kind, Namespaced: k.namespaced, Verbs: metav1.Verbs{"list", "delete", "patch"}},
			metav1.APIResource{Name: k.resource + "/status", Kind: k.kind, Namespaced: k.namespaced, Verbs: metav1.Verbs{"get"}})
	}
	var all []runtime.Object
	for _, o := range objects {
		all = append(all, o)
	}
	dyn := fakedynamic.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), lists, all...)
	disco := &fakediscovery.FakeDiscovery{Fake: &clientgotesting.Fake{}}
	for _, l := range byGV {
		disco.Resources = append(disco.Resources, l)
	}
	return &Cleaner{Discovery: disco, Dynamic: dyn, Round: time.Millisecond}, dyn
}

func remaining(t *testing.T, dyn *fakedynamic.FakeDynamicClient) []string {
	t.Helper()
	var out []string
	for _, k := range kinds {
		gv, _ := schema.ParseGroupVersion(k.gv)
		list, err := dyn.Resource(gv.WithResource(k.resource)).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range list.Items {
			out = append(out, strings.TrimPrefix(o.GetNamespace()+"/", "/")+k.resource+"/"+o.GetName())
		}
	}
	slices.Sort(out)
	return out
}

func TestCleanLeavesWhatKubernetesMakes(t *testing.T) {
	const bootstrapping, defaults = "kubernetes.io/bootstrapping", "rbac-defaults"
	binding := labelled(object("clusterrolebindings", "", "system:controller:job-controller"), bootstrapping, defaults)
	binding.Object["subjects"] = []any{map[string]any{"kind": "ServiceAccount", "namespace": "kube-system", "name": "job-controller"}}
	flow := object("flowschemas", "", "exempt")
	flow.SetAnnotations(map[string]string{"apf.kubernetes.io/autoupdate-spec": "true"})
	keep := []*unstructured.Unstructured{
		object("namespaces", "", "default"), object("namespaces", "", "kube-system"), object("namespaces", "", "kube-public"), object("namespaces", "", "kube-node-lease"),
		object("nodes", "", "n1"),
		object("services", "default", "kubernetes"),
		object("configmaps", "default", "kube-root-ca.crt"), object("configmaps", "kube-system", "extension-apiserver-authentication"),
		object("serviceaccounts", "default", "default"), object("serviceaccounts", "kube-system", "job-controller"),
		labelled(object("clusterroles", "", "cluster-admin"), bootstrapping, defaults), binding,
		object("priorityclasses", "", "system-node-critical"),
		object("leases", "kube-node-lease", "n1"), object("leases", "kube-system", "kube-scheduler"),
		flow, labelled(object("apiservices", "", "v1."), "kube-aggregator.kubernetes.io/automanaged", "onstart"),
	}
	remove := []*unstructured.Unstructured{
		object("namespaces", "", "mine"), object("pods", "mine", "p"), object("deployments", "mine", "d"), object("deployments", "kube-system", "coredns"),
		object("services", "kube-system", "kube-dns"), object("services", "mine", "kubernetes"),
		object("configmaps", "mine", "kube-root-ca.crt"), object("configmaps", "kube-system", "coredns"), object("secrets", "default", "s"),
		object("serviceaccounts", "kube-system", "coredns"), object("serviceaccounts", "mine", "default"),
		object("persistentvolumes", "", "pv"), object("persistentvolumeclaims", "default", "pvc"),
		object("clusterroles", "", "mine"), object("clusterrolebindings", "", "mine"), object("rolebindings", "default", "mine"),
		object("priorityclasses", "", "high"), object("storageclasses", "", "microk8s-hostpath"), object("leases", "default", "l"),
		object("validatingwebhookconfigurations", "", "w"), object("customresourcedefinitions", "", "widgets.example.org"),
		object("widgets", "default", "w"), object("flowschemas", "", "mine"), object("apiservices", "", "v1beta1.metrics.k8s.io"),
	}
	cleaner, dyn := newCluster(slices.Concat(keep, remove)...)
	var said []string
	cleaner.Say = func(format string, a ...any) { said = append(said, fmt.Sprintf(format, a...)) }
	if err := cleaner.Clean(t.Context()); err != nil {
		t.Fatal(err)
	}
	kept, _ := newCluster(keep...)
	want := remaining(t, kept.Dynamic.(*fakedynamic.FakeDynamicClient))
	if got := remaining(t, dyn); !slices.Equal(got, want) {
		t.Errorf("left\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if len(said) == 0 || said[0] != "Removing 1 validatingwebhookconfigurations" && said[0] != "Removing 1 apiservices" {
		t.Errorf("what may refuse deletions does not go first: %q", said)
	}
	if err := cleaner.Clean(t.Context()); err != nil {
		t.Errorf("the second time: %v", err)
	}
}

func TestVolumesAreKept(t *testing.T) {
	for _, keep := range []bool{true, false} {
		cleaner, dyn := newCluster(object("persistentvolumes", "", "pv"))
		cleaner.KeepVolumes = keep
		if err := cleaner.Clean(t.Context()); err != nil {
			t.Fatal(err)
		}
		var verbs []string
		for _, a := range dyn.Actions() {
			if a.GetResource().Resource == "persistentvolumes" && a.GetVerb() != "list" {
				verbs = append(verbs, a.GetVerb())
			}
		}
		want := []string{"delete"}
		if keep {
			want = []string{"patch", "delete"} // the policy first
		}
		if !slices.Equal(verbs, want) {
			t.Errorf("keep %t: %v, want %v", keep, verbs, want)
		}
	}
}

// TestStuckObject has an object that stays until its finalizer is taken away.
func TestStuckObject(t *testing.T) {
	stuck := object("widgets", "default", "stuck")
	stuck.SetFinalizers([]string{"example.org/gone"})
	cleaner, dyn := newCluster(stuck)
	dyn.PrependReactor("delete", "widgets", func(clientgotesting.Action) (bool, runtime.Object, error) {
		gvr := schema.GroupVersionResource{Group: "example.org", Version: "v1", Resource: "widgets"}
		o, err := dyn.Tracker().Get(gvr, "default", "stuck")
		if err == nil && len(o.(*unstructured.Unstructured).GetFinalizers()) > 0 {
			return true, nil, nil // accepted, and nothing happens
		}
		return false, nil, nil
	})
	cleaner.Patience, cleaner.Force = time.Nanosecond, time.Minute
	if err := cleaner.Clean(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := remaining(t, dyn); len(got) > 0 {
		t.Errorf("left: %v", got)
	}
}

func TestBoundedTime(t *testing.T) {
	cleaner, dyn := newCluster(object("pods", "mine", "immortal"))
	dyn.PrependReactor("delete", "pods", func(clientgotesting.Action) (bool, runtime.Object, error) { return true, nil, nil })
	cleaner.Patience, cleaner.Force = time.Nanosecond, time.Nanosecond
	err := cleaner.Clean(t.Context())
	if err == nil || !strings.Contains(err.Error(), "mine/pods/immortal are left") {
		t.Errorf("error: %v", err)
	}
}

// TestRemadeObject has an object that something makes again each time.
func TestRemadeObject(t *testing.T) {
	phoenix := object("configmaps", "kube-system", "phoenix")
	phoenix.SetUID("0")
	cleaner, dyn := newCluster(phoenix, object("configmaps", "default", "mine"))
	deleted := 0
	dyn.PrependReactor("delete", "configmaps", func(a clientgotesting.Action) (bool, runtime.Object, error) {
		if a.(clientgotesting.DeleteAction).GetName() != "phoenix" {
			return false, nil, nil
		}
		deleted++
		again := phoenix.DeepCopy()
		again.SetUID(types.UID(fmt.Sprint(deleted)))
		return true, nil, dyn.Tracker().Update(a.GetResource(), again, "kube-system")
	})
	if err := cleaner.Clean(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := remaining(t, dyn); !slices.Equal(got, []string{"kube-system/configmaps/phoenix"}) {
		t.Errorf("left: %v", got)
	}
}
