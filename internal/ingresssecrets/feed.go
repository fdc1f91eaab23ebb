package ingresssecrets

import (
	"context"
	"encoding/json"
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

// feed serves list and watch of a set of Secrets as the API server would, with resource versions
// of its own. Its methods may be called from any goroutine.
type feed struct {
	mu      sync.Mutex
	version int64
	first   int64 // the version before the oldest event
	objects map[string]*corev1.Secret
	events  []event
	changed chan struct{} // closed by the next change
}

type event struct {
	version int64
	kind    watch.EventType
	object  *corev1.Secret // as it is after the event, or was before its deletion
}

// newFeed starts after start, which must grow from one run of the program to the next: a client
// that watches on from a version of the run before then has to list again.
func newFeed(start int64) *feed {
	return &feed{version: start, first: start, objects: map[string]*corev1.Secret{}, changed: make(chan struct{})}
}

// set stores a Secret, unless it is there as it is.
func (f *feed) set(s *corev1.Secret) {
	f.mu.Lock()
	defer f.mu.Unlock()
	key := s.Namespace + "/" + s.Name
	kind := watch.Modified
	if f.objects[key] == nil {
		kind = watch.Added
	}
	out := &corev1.Secret{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
		ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: s.Name, UID: s.UID, Labels: s.Labels},
		Type:       s.Type, Data: s.Data,
	}
	f.record(kind, out)
	f.objects[key] = out
}

// remove forgets a Secret.
func (f *feed) remove(key string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	old := f.objects[key]
	if old == nil {
		return
	}
	delete(f.objects, key)
	gone := *old
	f.record(watch.Deleted, &gone)
}

// record numbers an event and wakes the watches; f.mu is held.
func (f *feed) record(kind watch.EventType, s *corev1.Secret) {
	f.version++
	s.ResourceVersion = strconv.FormatInt(f.version, 10)
	f.events = append(f.events, event{f.version, kind, s})
	if over := len(f.events) - keptEvents; over > 0 {
		f.first = f.events[over-1].version
		f.events = slices.Delete(f.events, 0, over)
	}
	close(f.changed)
	f.changed = make(chan struct{})
}

// ServeHTTP answers list and watch of Secrets in all namespaces.
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
	list := corev1.SecretList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "SecretList"}, Items: []corev1.Secret{}}
	list.ResourceVersion = strconv.FormatInt(version, 10)
	for _, s := range objects {
		if selector.Matches(labels.Set(s.Labels)) {
			list.Items = append(list.Items, *s)
		}
	}
	w.Header().Set("Content-Type", runtime.ContentTypeJSON)
	_ = json.NewEncoder(w).Encode(list) // the client may have gone
}

func (f *feed) list() ([]*corev1.Secret, int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]*corev1.Secret, 0, len(f.objects))
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
		var objects []*corev1.Secret
		objects, version = f.list()
		for _, s := range objects {
			if selector.Matches(labels.Set(s.Labels)) && !send(watch.Added, s) {
				return
			}
		}
		if initial {
			mark := &corev1.Secret{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"}}
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
			if !selector.Matches(labels.Set(e.object.Labels)) {
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
