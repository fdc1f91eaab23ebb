package ingresssecrets

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
)

const (
	// keptEvents is how many changes a watch may lag behind before it has to list again.
	keptEvents = 1000
	// longestWatch ends a watch that names no time itself; clients then watch again.
	longestWatch = 10 * time.Minute
)

// item is an object of a feed.
type item interface {
	metav1.Object
	runtime.Object
}

// feed serves list and watch of a set of objects of one kind as the API server would, with resource versions
// of its own. Its methods may be called from any goroutine.
type feed struct {
	kind string // as in v1

	mu      sync.Mutex
	version int64
	first   int64 // the version before the oldest event
	objects map[string]item
	events  []event
	changed chan struct{} // closed by the next change
}

type event struct {
	version int64
	kind    watch.EventType
	object  item // as it is after the event, or was before its deletion
}

// newFeed starts after start, which must grow from one run of the program to the next: a client
// that watches on from a version of the run before then has to list again.
func newFeed(kind string, start int64) *feed {
	return &feed{kind: kind, version: start, first: start, objects: map[string]item{}, changed: make(chan struct{})}
}

// set stores an object, with no more of its metadata than is needed.
func (f *feed) set(o item) {
	f.mu.Lock()
	defer f.mu.Unlock()
	key := o.GetNamespace() + "/" + o.GetName()
	kind := watch.Modified
	if f.objects[key] == nil {
		kind = watch.Added
	}
	meta := metav1.ObjectMeta{Namespace: o.GetNamespace(), Name: o.GetName(), UID: o.GetUID(), Labels: o.GetLabels()}
	var out item
	switch o := o.(type) {
	case *corev1.Secret:
		out = &corev1.Secret{TypeMeta: f.typeMeta(f.kind), ObjectMeta: meta, Type: o.Type, Data: o.Data}
	case *corev1.ConfigMap:
		out = &corev1.ConfigMap{TypeMeta: f.typeMeta(f.kind), ObjectMeta: meta, Data: o.Data, BinaryData: o.BinaryData}
	default:
		panic(fmt.Sprintf("a feed of %s gets a %T", f.kind, o))
	}
	f.record(kind, out)
	f.objects[key] = out
}

func (f *feed) typeMeta(kind string) metav1.TypeMeta {
	return metav1.TypeMeta{APIVersion: "v1", Kind: kind}
}

// remove forgets an object.
func (f *feed) remove(key string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	old := f.objects[key]
	if old == nil {
		return
	}
	delete(f.objects, key)
	f.record(watch.Deleted, old.DeepCopyObject().(item))
}

// record numbers an event and wakes the watches; f.mu is held.
func (f *feed) record(kind watch.EventType, o item) {
	f.version++
	o.SetResourceVersion(strconv.FormatInt(f.version, 10))
	f.events = append(f.events, event{f.version, kind, o})
	if over := len(f.events) - keptEvents; over > 0 {
		f.first = f.events[over-1].version
		f.events = slices.Delete(f.events, 0, over)
	}
	close(f.changed)
	f.changed = make(chan struct{})
}

// ServeHTTP answers list and watch of the objects in all namespaces.
func (f *feed) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	selector, err := labels.Parse(query.Get("labelSelector"))
	if err != nil {
		refuse(w, http.StatusBadRequest, metav1.StatusReasonBadRequest, err.Error())
		return
	}
	if on, _ := strconv.ParseBool(query.Get("watch")); on {
		f.watch(w, r, selector)
		return
	}
	objects, version := f.list()
	list := struct {
		metav1.TypeMeta `json:",inline"`
		metav1.ListMeta `json:"metadata"`
		Items           []item `json:"items"`
	}{f.typeMeta(f.kind + "List"), metav1.ListMeta{ResourceVersion: strconv.FormatInt(version, 10)}, []item{}}
	for _, o := range objects {
		if selector.Matches(labels.Set(o.GetLabels())) {
			list.Items = append(list.Items, o)
		}
	}
	w.Header().Set("Content-Type", runtime.ContentTypeJSON)
	_ = json.NewEncoder(w).Encode(list) // the client may have gone
}

func (f *feed) list() ([]item, int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]item, 0, len(f.objects))
	for _, s := range f.objects {
		out = append(out, s)
	}
	return out, f.version
}

// since returns the events after a version, and what is closed by the next one; ok is false if
// some are not kept any more, or are yet to come.
func (f *feed) since(version int64) (events []event, changed <-chan struct{}, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if version < f.first || version > f.version {
		return nil, nil, false
	}
	i, _ := slices.BinarySearchFunc(f.events, version+1, func(e event, v int64) int { return int(e.version - v) })
	return slices.Clone(f.events[i:]), f.changed, true
}

func (f *feed) watch(w http.ResponseWriter, r *http.Request, selector labels.Selector) {
	query := r.URL.Query()
	limit := longestWatch
	if s, err := strconv.Atoi(query.Get("timeoutSeconds")); err == nil && s > 0 {
		limit = min(limit, time.Duration(s)*time.Second)
	}
	ctx, cancel := context.WithTimeout(r.Context(), limit)
	defer cancel()

	w.Header().Set("Content-Type", runtime.ContentTypeJSON)
	send := func(kind watch.EventType, object any) bool {
		raw, err := json.Marshal(object)
		if err == nil {
			err = json.NewEncoder(w).Encode(metav1.WatchEvent{Type: string(kind), Object: runtime.RawExtension{Raw: raw}})
		}
		return err == nil
	}
	flush := http.NewResponseController(w).Flush
	version, err := strconv.ParseInt(query.Get("resourceVersion"), 10, 64)
	initial, _ := strconv.ParseBool(query.Get("sendInitialEvents"))
	if initial || err != nil || version == 0 {
		var objects []item
		objects, version = f.list()
		for _, s := range objects {
			if selector.Matches(labels.Set(s.GetLabels())) && !send(watch.Added, s) {
				return
			}
		}
		if initial {
			mark := &metav1.PartialObjectMetadata{TypeMeta: f.typeMeta(f.kind)}
			mark.ResourceVersion = strconv.FormatInt(version, 10)
			mark.Annotations = map[string]string{metav1.InitialEventsAnnotationKey: "true"}
			if !send(watch.Bookmark, mark) {
				return
			}
		}
	}
	for {
		events, changed, ok := f.since(version)
		if !ok {
			send(watch.Error, &metav1.Status{
				TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure,
				Reason: metav1.StatusReasonExpired, Code: http.StatusGone, Message: "this version is not kept any more",
			})
			return
		}
		for _, e := range events {
			kind := e.kind
			if !selector.Matches(labels.Set(e.object.GetLabels())) {
				kind = watch.Deleted // it may have been seen before
			}
			if !send(kind, e.object) {
				return
			}
			version = e.version
		}
		if flush() != nil {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}

func refuse(w http.ResponseWriter, code int, reason metav1.StatusReason, message string) {
	w.Header().Set("Content-Type", runtime.ContentTypeJSON)
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(metav1.Status{ // the client may have gone
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure,
		Reason: reason, Code: int32(code), Message: message,
	})
}
