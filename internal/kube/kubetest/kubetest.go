// Package kubetest is the far side of clients of an API server in tests: it stores any object of
// the built-in kinds in version v1, and addons, with resource versions, UIDs, label and field selectors, preconditions,
// watches, merge patches and server-side apply. Objects are in client-go's object tracker, and
// fields are managed as the API server does it. It is no API server: it knows no authorization, no
// validation, no defaults and no controllers. Real ones are in tests/node.
package kubetest

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/managedfields"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/applyconfigurations"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	clienttesting "k8s.io/client-go/testing"
	apiregistrationv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"
	"sigs.k8s.io/structured-merge-diff/v6/typed"
	"sigs.k8s.io/yaml"

	"microk8s/internal/addon/object"
	"microk8s/internal/kube"
)

// catalogue is what the server knows: the built-in kinds of version v1, the API's extensions, and addons.
type catalogue struct {
	scheme    *runtime.Scheme
	codecs    serializer.CodecFactory
	mapper    *meta.DefaultRESTMapper
	resources map[string][]metav1.APIResource // by group and version
	groups    metav1.APIGroupList
}

// ofCluster has the kinds that no namespace has.
var ofCluster = sets.New("Addon", "APIService", "CertificateSigningRequest", "ClusterRole", "ClusterRoleBinding", "CSIDriver", "CSINode",
	"CustomResourceDefinition", "DeviceClass",
	"FlowSchema", "IngressClass", "IPAddress", "MutatingWebhookConfiguration", "Namespace", "Node", "PersistentVolume", "PriorityClass",
	"PriorityLevelConfiguration", "ResourceSlice", "RuntimeClass", "ServiceCIDR", "StorageClass", "ValidatingAdmissionPolicy",
	"ValidatingAdmissionPolicyBinding", "ValidatingWebhookConfiguration", "VolumeAttachment")

var known = sync.OnceValue(func() catalogue {
	c := catalogue{scheme: runtime.NewScheme(), mapper: meta.NewDefaultRESTMapper(nil), resources: map[string][]metav1.APIResource{}}
	for _, add := range []func(*runtime.Scheme) error{scheme.AddToScheme, apiregistrationv1.AddToScheme, apiextensionsv1.AddToScheme, object.AddToScheme} {
		if err := add(c.scheme); err != nil {
			panic(err)
		}
	}
	c.codecs = serializer.NewCodecFactory(c.scheme)
	for gvk, kind := range c.scheme.AllKnownTypes() {
		list := gvk.GroupVersion().WithKind(gvk.Kind + "List")
		if gvk.Version != "v1" || !c.scheme.Recognizes(list) || !reflect.PointerTo(kind).Implements(reflect.TypeFor[metav1.Object]()) {
			continue
		}
		scope := meta.RESTScopeNamespace
		if ofCluster.Has(gvk.Kind) {
			scope = meta.RESTScopeRoot
		}
		plural, singular := meta.UnsafeGuessKindToResource(gvk)
		c.mapper.AddSpecific(gvk, plural, singular, scope)
		of := gvk.GroupVersion().String()
		if c.resources[of] == nil && gvk.Group != "" {
			v := metav1.GroupVersionForDiscovery{GroupVersion: of, Version: gvk.Version}
			c.groups.Groups = append(c.groups.Groups, metav1.APIGroup{Name: gvk.Group, Versions: []metav1.GroupVersionForDiscovery{v}, PreferredVersion: v})
		}
		c.resources[of] = append(c.resources[of], metav1.APIResource{
			Name: plural.Resource, Kind: gvk.Kind, Namespaced: scope == meta.RESTScopeNamespace, Verbs: metav1.Verbs{"get", "list", "delete", "patch"},
		})
	}
	return c
})

var converter = sync.OnceValue(func() managedfields.TypeConverter {
	return extensible{applyconfigurations.NewTypeConverter(known().scheme), managedfields.NewDeducedTypeConverter()}
})

// extensible is a converter for the built-in kinds, and for definitions of kinds and our own, whose fields are as they look.
type extensible struct {
	managedfields.TypeConverter
	deduced managedfields.TypeConverter
}

func (e extensible) ObjectToTyped(o runtime.Object, options ...typed.ValidationOptions) (*typed.TypedValue, error) {
	switch o.GetObjectKind().GroupVersionKind().Group {
	case object.Group.Group, apiextensionsv1.GroupName:
		return e.deduced.ObjectToTyped(o, options...)
	}
	return e.TypeConverter.ObjectToTyped(o, options...)
}

// Server is the API server. Its fields are set before the first call, or with Lock held, which
// calls wait for.
//
// Paths of objects are those of the API without /api or /apis, such as
// "v1/namespaces/kube-system/secrets/s" or "rbac.authorization.k8s.io/v1/clusterroles/r".
type Server struct {
	sync.Mutex
	// Refuse, if set, is asked first of every call: a status other than 0 is the answer.
	Refuse func(r *http.Request) int
	// Check, if set, is asked before an object is stored in place of another, or of nil. Its
	// error is the answer.
	Check func(old, new metav1.Object) error

	t       testing.TB
	objects clienttesting.ObjectTracker
	next    int // number for the UID of the next object
	changes int
	watches map[string]int // open ones, by resource
	http    *httptest.Server
}

// New starts a server that ends with the test.
func New(t testing.TB) *Server {
	t.Helper()
	s := &Server{t: t, watches: map[string]int{}, objects: clienttesting.NewObjectTracker(known().scheme, known().codecs.UniversalDecoder())}
	s.http = httptest.NewServer(s)
	t.Cleanup(func() {
		s.http.CloseClientConnections()
		s.http.Close()
	})
	return s
}

// Config is that of a client without limits of its own.
func (s *Server) Config() *rest.Config { return &rest.Config{Host: s.http.URL, QPS: -1} }

// Core makes a client.
func (s *Server) Core() (*kube.Core, error) { return kube.New(s.Config()) }

// Down makes every call fail with 503, or lets them through again.
func (s *Server) Down(down bool) {
	s.Lock()
	defer s.Unlock()
	s.Refuse = nil
	if down {
		s.Refuse = func(*http.Request) int { return http.StatusServiceUnavailable }
	}
}

// target is what a path leads to.
type target struct {
	gvr             schema.GroupVersionResource
	gvk             schema.GroupVersionKind
	namespace, name string // "" for lists; the namespace also for what has none
}

// parse reads the path of an object or a list, without /api or /apis.
func parse(path string) (target, error) {
	var at target
	words := strings.Split(path, "/")
	if words[0] != "v1" {
		at.gvr.Group, words = words[0], words[1:]
	}
	if len(words) < 2 {
		return at, fmt.Errorf("%s is no path of objects", path)
	}
	at.gvr.Version, words = words[0], words[1:]
	if words[0] == "namespaces" && len(words) > 2 {
		at.namespace, words = words[1], words[2:]
	}
	at.gvr.Resource = words[0]
	if len(words) > 1 { // a subresource is of the object itself
		at.name = words[1]
	}
	var err error
	at.gvk, err = known().mapper.KindFor(at.gvr)
	return at, err
}

// must is for paths of tests.
func (s *Server) must(path string) target {
	s.t.Helper()
	at, err := parse(path)
	if err != nil {
		s.t.Fatal(err)
	}
	return at
}

// Get returns the object at path, or nil. Its fields are as in JSON.
func (s *Server) Get(path string) *unstructured.Unstructured {
	s.t.Helper()
	at := s.must(path)
	s.Lock()
	defer s.Unlock()
	object, err := s.objects.Get(at.gvr, at.namespace, at.name)
	if err != nil {
		return nil
	}
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(object)
	if err != nil {
		s.t.Fatal(err)
	}
	return &unstructured.Unstructured{Object: content}
}

// As returns the object at path as its Go type, or nil.
func As[T any](s *Server, path string) *T {
	s.t.Helper()
	u := s.Get(path)
	if u == nil {
		return nil
	}
	object := new(T)
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, object); err != nil {
		s.t.Fatal(err)
	}
	return object
}

// Set stores objects, as they are, in place of what is at their paths: typed ones, maps or
// unstructured ones. An entry of managedFields that names no fields has all of the object's.
// Watches see it.
func (s *Server) Set(objects ...any) {
	s.t.Helper()
	s.Lock()
	defer s.Unlock()
	for _, o := range objects {
		object, ok := o.(runtime.Object)
		if u, is := o.(*unstructured.Unstructured); is {
			o, ok = u.Object, false
		}
		if !ok {
			text, err := json.Marshal(o)
			if err != nil {
				s.t.Fatal(err)
			}
			if object, _, err = known().codecs.UniversalDeserializer().Decode(text, nil, nil); err != nil {
				s.t.Fatal(err)
			}
		}
		object = object.DeepCopyObject()
		kinds, _, err := known().scheme.ObjectKinds(object)
		if err != nil {
			s.t.Fatal(err)
		}
		m, err := known().mapper.RESTMapping(kinds[0].GroupKind(), kinds[0].Version)
		if err != nil {
			s.t.Fatal(err)
		}
		at := target{gvr: m.Resource, gvk: kinds[0], name: object.(metav1.Object).GetName(), namespace: object.(metav1.Object).GetNamespace()}
		if err := manage(object.(metav1.Object), object, at.gvk); err != nil {
			s.t.Fatal(err)
		}
		old, _ := s.objects.Get(at.gvr, at.namespace, at.name)
		if err := s.store(at, old, object); err != nil {
			s.t.Fatal(err)
		}
	}
}

// unmanaged are the fields that nobody manages, as the API server has it.
var unmanaged = fieldpath.NewSet(
	fieldpath.MakePathOrDie("apiVersion"), fieldpath.MakePathOrDie("kind"), fieldpath.MakePathOrDie("metadata"), fieldpath.MakePathOrDie("metadata", "name"),
	fieldpath.MakePathOrDie("metadata", "namespace"), fieldpath.MakePathOrDie("metadata", "uid"), fieldpath.MakePathOrDie("metadata", "resourceVersion"),
)

// manage fills in the fields of managers that have none.
func manage(m metav1.Object, object runtime.Object, gvk schema.GroupVersionKind) error {
	entries := m.GetManagedFields()
	m.SetManagedFields(nil)
	for i, e := range entries {
		if e.FieldsV1 != nil {
			continue
		}
		object.GetObjectKind().SetGroupVersionKind(gvk)
		typed, err := converter().ObjectToTyped(object)
		if err != nil {
			return err
		}
		all, err := typed.ToFieldSet()
		if err != nil {
			return err
		}
		text, err := all.Difference(unmanaged).ToJSON()
		if err != nil {
			return err
		}
		entries[i].APIVersion, entries[i].FieldsType, entries[i].FieldsV1 = gvk.GroupVersion().String(), "FieldsV1", metav1.NewFieldsV1(string(text))
	}
	m.SetManagedFields(entries)
	return nil
}

// Edit changes the object at path in JSON's form, and stores it.
func (s *Server) Edit(path string, change func(object map[string]any)) {
	s.t.Helper()
	o := s.Get(path)
	if o == nil {
		s.t.Fatalf("%s does not exist", path)
	}
	change(o.Object)
	s.Set(o)
}

// Remove deletes the object at path.
func (s *Server) Remove(path string) {
	s.t.Helper()
	at := s.must(path)
	s.Lock()
	defer s.Unlock()
	if err := s.objects.Delete(at.gvr, at.namespace, at.name); err != nil {
		s.t.Fatal(err)
	}
}

// Paths returns those of all objects of these resources, or of all there are, sorted.
func (s *Server) Paths(resources ...string) []string {
	s.Lock()
	defer s.Unlock()
	out := []string{}
	for of, kinds := range known().resources {
		for _, kind := range kinds {
			if len(resources) > 0 && !slices.Contains(resources, kind.Name) {
				continue
			}
			gv, _ := schema.ParseGroupVersion(of)
			list, err := s.objects.List(gv.WithResource(kind.Name), gv.WithKind(kind.Kind), "")
			if err != nil {
				s.t.Fatal(err)
			}
			_ = meta.EachListItem(list, func(o runtime.Object) error {
				object := o.(metav1.Object)
				path := of
				if object.GetNamespace() != "" {
					path += "/namespaces/" + object.GetNamespace()
				}
				out = append(out, path+"/"+kind.Name+"/"+object.GetName())
				return nil
			})
		}
	}
	slices.Sort(out)
	return out
}

// Watches returns how many watches of a resource are open. What is deleted before one is open is seen by its
// client with its next list only, seconds later.
func (s *Server) Watches(resource string) int {
	s.Lock()
	defer s.Unlock()
	return s.watches[resource]
}

// Changes counts the calls that changed something, or tried to, so far.
func (s *Server) Changes() int {
	s.Lock()
	defer s.Unlock()
	return s.changes
}

// SetReady makes a node ready or not.
func (s *Server) SetReady(name string, ready bool) {
	s.t.Helper()
	s.Edit("v1/nodes/"+name, func(node map[string]any) {
		status := map[bool]any{true: "True", false: "False"}[ready]
		node["status"].(map[string]any)["conditions"] = []any{map[string]any{"type": string(corev1.NodeReady), "status": status}}
	})
}

// version is that of a list of a resource: the tracker counts the changes of each. It is called with the
// lock held.
func (s *Server) version(at target) string {
	list, err := s.objects.List(at.gvr, at.gvk, "")
	if err != nil {
		return ""
	}
	version, _ := meta.NewAccessor().ResourceVersion(list)
	return version
}

// store puts an object in place of old, which is nil for a new one. It is called with the lock held.
func (s *Server) store(at target, old, object runtime.Object) error {
	fresh := object.(metav1.Object)
	object.GetObjectKind().SetGroupVersionKind(at.gvk)
	number, _ := strconv.Atoi(s.version(at))
	fresh.SetResourceVersion(strconv.Itoa(number + 1))
	if old == nil {
		if s.next++; fresh.GetUID() == "" {
			fresh.SetUID(types.UID("uid-" + strconv.Itoa(s.next)))
		}
		return s.objects.Create(at.gvr, object, at.namespace)
	}
	if fresh.GetUID() == "" {
		fresh.SetUID(old.(metav1.Object).GetUID())
	}
	return s.objects.Update(at.gvr, object, at.namespace)
}

func answer(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v)
}

func fail(w http.ResponseWriter, err error) {
	status, ok := err.(apierrors.APIStatus)
	if !ok {
		status = apierrors.NewBadRequest(err.Error())
	}
	of := status.Status()
	of.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
	answer(w, int(of.Code), of)
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.Lock()
	defer s.Unlock()
	changes := r.Method != http.MethodGet
	if s.Refuse != nil {
		if code := s.Refuse(r); code != 0 {
			fail(w, apierrors.NewGenericServerResponse(code, r.Method, schema.GroupResource{}, r.URL.Path, "refused by the test", 0, true))
			return
		}
	}
	if changes {
		s.changes++
	}
	root, path, _ := strings.Cut(r.URL.Path[1:], "/")
	if path == "" || path == "v1" || root == "apis" && strings.Count(path, "/") == 1 {
		discover(w, root, path)
		return
	}
	at, err := parse(path)
	if err != nil {
		fail(w, apierrors.NewNotFound(schema.GroupResource{}, r.URL.Path))
		return
	}
	q := r.URL.Query()
	if at.name == "" && !changes {
		s.list(w, r, at)
		return
	}
	old, err := s.objects.Get(at.gvr, at.namespace, at.name)
	if at.name != "" && err != nil && !(r.Method == http.MethodPatch && r.Header.Get("Content-Type") == string(types.ApplyYAMLPatchType)) {
		fail(w, err)
		return
	}
	if err != nil {
		old = nil
	}
	var object runtime.Object
	switch r.Method {
	case http.MethodGet:
		answer(w, http.StatusOK, old)
		return
	case http.MethodDelete:
		var o metav1.DeleteOptions
		_ = json.NewDecoder(r.Body).Decode(&o) // an empty body is none
		if p := o.Preconditions; p != nil && p.UID != nil && *p.UID != old.(metav1.Object).GetUID() {
			fail(w, apierrors.NewConflict(at.gvr.GroupResource(), at.name, fmt.Errorf("the UID is another")))
			return
		}
		if err := s.objects.Delete(at.gvr, at.namespace, at.name); err != nil {
			fail(w, err)
			return
		}
		answer(w, http.StatusOK, metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusSuccess})
		return
	default:
		object, err = s.changed(r, at, old)
	}
	if err == nil && s.Check != nil {
		before, _ := old.(metav1.Object)
		err = s.Check(before, object.(metav1.Object))
	}
	if err == nil && q.Get("dryRun") == "" {
		at.name = object.(metav1.Object).GetName()
		err = s.store(at, old, object)
	}
	if err != nil {
		fail(w, err)
		return
	}
	answer(w, http.StatusOK, object)
}

// changed returns what becomes of old, nil for none, by a call.
func (s *Server) changed(r *http.Request, at target, old runtime.Object) (runtime.Object, error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	owners, err := managedfields.NewDefaultFieldManager(converter(), known().scheme, noDefaults{}, known().scheme, at.gvk, at.gvk.GroupVersion(), "", nil)
	if err != nil {
		return nil, err
	}
	live := old
	if live == nil {
		if live, err = known().scheme.New(at.gvk); err != nil {
			return nil, err
		}
		live.GetObjectKind().SetGroupVersionKind(at.gvk)
	}
	manager := r.URL.Query().Get("fieldManager")
	kind := types.PatchType(r.Header.Get("Content-Type"))
	if r.Method == http.MethodPatch && kind == types.ApplyYAMLPatchType {
		u := &unstructured.Unstructured{}
		if err := yaml.Unmarshal(body, &u.Object); err != nil {
			return nil, err
		}
		return owners.Apply(live, u, manager, r.URL.Query().Get("force") == "true")
	}
	if r.Method == http.MethodPatch {
		text, err := json.Marshal(old)
		if err != nil {
			return nil, err
		}
		if kind != types.MergePatchType && kind != types.StrategicMergePatchType {
			return nil, fmt.Errorf("patches of type %s are not known here", kind)
		}
		if body, err = jsonpatch.MergePatch(text, body); err != nil {
			return nil, err
		}
	}
	object := reflect.New(reflect.TypeOf(live).Elem()).Interface().(runtime.Object)
	if err := json.Unmarshal(body, object); err != nil {
		return nil, err
	}
	fresh := object.(metav1.Object)
	switch {
	case r.Method == http.MethodPost && fresh.GetName() == "":
		return nil, fmt.Errorf("the object has no name")
	case r.Method == http.MethodPost:
		if _, err := s.objects.Get(at.gvr, at.namespace, fresh.GetName()); err == nil {
			return nil, apierrors.NewAlreadyExists(at.gvr.GroupResource(), fresh.GetName())
		}
	case r.Method == http.MethodPut && fresh.GetResourceVersion() != "" && fresh.GetResourceVersion() != old.(metav1.Object).GetResourceVersion():
		return nil, apierrors.NewConflict(at.gvr.GroupResource(), at.name, fmt.Errorf("the object has been modified"))
	}
	return owners.Update(live, object, manager)
}

type noDefaults struct{}

func (noDefaults) Default(runtime.Object) {}

// list answers lists and watches. It is called with the lock held.
func (s *Server) list(w http.ResponseWriter, r *http.Request, at target) {
	q := r.URL.Query()
	byLabel, err := labels.Parse(q.Get("labelSelector"))
	if err != nil {
		fail(w, err)
		return
	}
	byField, err := fields.ParseSelector(q.Get("fieldSelector"))
	if err != nil {
		fail(w, err)
		return
	}
	matches := func(o runtime.Object) bool {
		object := o.(metav1.Object)
		values := fields.Set{"metadata.name": object.GetName(), "metadata.namespace": object.GetNamespace()}
		if pod, ok := o.(*corev1.Pod); ok {
			values["spec.nodeName"] = pod.Spec.NodeName
		}
		return byLabel.Matches(labels.Set(object.GetLabels())) && byField.Matches(values)
	}
	if q.Get("watch") != "" {
		if q.Get("sendInitialEvents") == "true" {
			fail(w, apierrors.NewInvalid(schema.GroupKind{}, "", nil)) // the client then lists
			return
		}
		// The tracker does not send what was deleted between a list and the watch from its version.
		if since := q.Get("resourceVersion"); since != "" && since != "0" && since != s.version(at) {
			fail(w, apierrors.NewResourceExpired("there were changes since"))
			return
		}
		events, err := s.objects.Watch(at.gvr, at.namespace, metav1.ListOptions{ResourceVersion: q.Get("resourceVersion")})
		if err != nil {
			fail(w, err)
			return
		}
		s.watches[at.gvr.Resource]++
		s.Unlock()
		defer func() {
			s.Lock()
			s.watches[at.gvr.Resource]--
		}()
		defer events.Stop()
		stream(w, r, events, matches)
		return
	}
	list, err := s.objects.List(at.gvr, at.gvk, at.namespace)
	if err != nil {
		fail(w, err)
		return
	}
	var items []runtime.Object
	_ = meta.EachListItem(list, func(o runtime.Object) error {
		if matches(o) {
			items = append(items, o)
		}
		return nil
	})
	slices.SortFunc(items, func(a, b runtime.Object) int {
		return strings.Compare(a.(metav1.Object).GetName(), b.(metav1.Object).GetName())
	})
	if err := meta.SetList(list, items); err != nil {
		fail(w, err)
		return
	}
	list.GetObjectKind().SetGroupVersionKind(at.gvk.GroupVersion().WithKind(at.gvk.Kind + "List"))
	answer(w, http.StatusOK, list)
}

// stream sends events as a watch does, until the client goes.
func stream(w http.ResponseWriter, r *http.Request, events watch.Interface, matches func(runtime.Object) bool) {
	w.Header().Set("Content-Type", "application/json")
	control := http.NewResponseController(w)
	_ = control.Flush()
	for {
		select {
		case <-r.Context().Done():
			return
		case e := <-events.ResultChan():
			if matches(e.Object) {
				_ = json.NewEncoder(w).Encode(map[string]any{"type": e.Type, "object": e.Object})
				_ = control.Flush()
			}
		}
	}
}

// discover answers which groups and resources there are.
func discover(w http.ResponseWriter, root, gv string) {
	switch resources := known().resources[gv]; {
	case root == "api" && gv == "":
		answer(w, http.StatusOK, metav1.APIVersions{Versions: []string{"v1"}})
	case gv == "":
		answer(w, http.StatusOK, known().groups)
	case resources == nil:
		fail(w, apierrors.NewNotFound(schema.GroupResource{}, gv))
	default:
		answer(w, http.StatusOK, metav1.APIResourceList{GroupVersion: gv, APIResources: resources})
	}
}
