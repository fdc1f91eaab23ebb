package addon

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/dynamic"

	"microk8s/internal/addon/object"
	"microk8s/internal/bootstrap"
	"microk8s/internal/kube"
)

// What is on is in the records. The object of an addon (package object) says the same to people, and what they ask for
// in it is carried out by package control; whoever changes a record writes the object, too. A spec that was changed
// and is not carried out yet is left alone, unless Declare is set. Errors are logged only: the objects of the
// next start of a control-plane node are right again.

// establishing bounds the wait for the kind, which is defined just before the objects are written for the first time.
const establishing = 20 * time.Second

// Publish writes the objects of all addons that this node knows.
func (s *Set) Publish(ctx context.Context) {
	err := wait.PollUntilContextTimeout(ctx, 200*time.Millisecond, establishing, true, func(ctx context.Context) (bool, error) {
		_, err := s.objects().List(ctx, metav1.ListOptions{Limit: 1})
		return err == nil, nil
	})
	if err != nil {
		s.warn(ctx, "all", fmt.Errorf("the API server does not serve %s: %w", object.Resource.GroupResource(), err))
		return
	}
	for _, a := range s.catalog {
		switch {
		case a.Alias != "" || a.Source != "":
		case a.Repository != CoreRepository:
			if on, err := s.ForeignOn(ctx, a); err != nil {
				s.warn(ctx, a.FullName(), err)
			} else {
				s.ShowHook(ctx, a, on, nil)
			}
		default:
			s.Show(ctx, a.Name)
		}
	}
}

// Show writes the object of a core addon by its record.
func (s *Set) Show(ctx context.Context, name string) {
	a, err := s.Find(name)
	if err != nil {
		return // not part of this version
	}
	s.warn(ctx, name, s.show(ctx, a, func(o *object.Addon) (object.Spec, func(), error) {
		// Whoever changes a record writes the object after that: with a record that is read after the object nothing is taken back.
		r, _, err := s.Enabled(ctx, name)
		spec, phase := object.Spec{}, object.Disabled
		switch {
		case a.Builtin != "":
			spec.Enabled, phase = true, object.Enabled
		case r.removing:
			phase = object.Disabling
		case r.Complete():
			spec, phase = object.Spec{Enabled: true, Arguments: r.Args, Online: r.Online}, object.Enabled
		case r.Name != "":
			spec, phase = object.Spec{Enabled: true, Arguments: r.Args, Online: r.Online}, object.Enabling
		}
		return spec, func() {
			reason, message, version := phase, "", cmp.Or(r.Version, a.Version)
			if phase == object.Enabled && a.Builtin == "" {
				reason = object.Starting
				// Who has waited for the pods of this version and these arguments has said how that ended.
				if c := meta.FindStatusCondition(o.Status.Conditions, object.Ready); c != nil && o.Status.Phase == phase && o.Status.Version == version && o.Status.ObservedGeneration == o.Generation {
					reason, message = c.Reason, c.Message
				}
			}
			o.Set(phase, version, reason, message)
		}, err
	}))
}

// ShowHook writes the object of an addon with hooks. Its arguments are not known where nil is given.
func (s *Set) ShowHook(ctx context.Context, a Addon, on bool, args []string) {
	phase := object.Disabled
	if on {
		phase = object.Enabled
	}
	s.warn(ctx, a.FullName(), s.show(ctx, a, func(o *object.Addon) (object.Spec, func(), error) {
		return object.Spec{Enabled: on, Arguments: args}, func() { o.Set(phase, a.Version, phase, "") }, nil
	}))
}

// ShowReady says in the object of an addon that is on whether what it serves answers; err is nil, or why not.
func (s *Set) ShowReady(ctx context.Context, name string, err error) {
	s.warn(ctx, name, s.editStatus(ctx, name, func(o *object.Addon) bool {
		if !o.Done() || o.Status.Phase != object.Enabled {
			return false
		}
		reason, message := object.Enabled, ""
		if err != nil {
			reason, message = object.NotReady, err.Error()
		}
		o.Set(object.Enabled, o.Status.Version, reason, message)
		return true
	}))
}

// ShowFailure says in an object why its spec of a generation was not carried out.
func (s *Set) ShowFailure(ctx context.Context, name string, generation int64, reason, message string) {
	s.warn(ctx, name, s.editStatus(ctx, name, func(o *object.Addon) bool {
		if o.Generation != generation {
			return false // another is next
		}
		phase, version := s.phase(ctx, o), o.Status.Version
		o.Set(phase, version, reason, message)
		return true
	}))
}

// phase is that of the addon of an object, whatever the object asks for.
func (s *Set) phase(ctx context.Context, o *object.Addon) string {
	a, err := s.FindFull(o.FullName())
	if err != nil {
		return object.Disabled
	}
	r, on, err := Record{}, a.Builtin != "", error(nil)
	switch {
	case a.Repository != CoreRepository:
		on, err = s.ForeignOn(ctx, a)
	case a.Builtin == "":
		r, on, err = s.Enabled(ctx, a.Name)
	}
	switch {
	case err != nil:
		return cmp.Or(o.Status.Phase, object.Disabled)
	case r.removing:
		return object.Disabling
	case r.Name != "" && !r.Complete():
		return object.Enabling
	case on:
		return object.Enabled
	}
	return object.Disabled
}

// ShowPhase says in an object that its spec is being carried out.
func (s *Set) ShowPhase(ctx context.Context, name, phase string) {
	s.warn(ctx, name, s.editStatus(ctx, name, func(o *object.Addon) bool {
		o.Set(phase, o.Status.Version, phase, "")
		return true
	}))
}

// WhileAt calls ended when an object has another generation than this one, or is deleted. It returns then, and when ctx ends.
func (s *Set) WhileAt(ctx context.Context, name string, generation int64, ended func()) {
	w, err := s.objects().Watch(ctx, metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", name).String()})
	if err != nil {
		return
	}
	defer w.Stop()
	for {
		select {
		case e, ok := <-w.ResultChan():
			if !ok {
				return
			}
			u, ok := e.Object.(*unstructured.Unstructured)
			if ok && (u.GetGeneration() != generation || u.GetDeletionTimestamp() != nil) {
				ended()
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// Rendered returns what an addon that is on brought into the cluster.
func (s *Set) Rendered(ctx context.Context, a Addon, r Record) (Applied, error) {
	values, err := parts[a.Name].values(ctx, s, r.Args)
	if err != nil {
		return Applied{}, err
	}
	objects, err := render(a.dir, values)
	return Applied{objects, values, parts[a.Name].asks}, err
}

// MarkDone notes in an object that a spec was carried out.
func (s *Set) MarkDone(ctx context.Context, name string, spec object.Spec) error {
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]string{object.DoneAnnotation: spec.Digest()}}})
	if err != nil {
		return err
	}
	_, err = s.objects().Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: bootstrap.FieldManager})
	return err
}

// Object returns the object of that name.
func (s *Set) Object(ctx context.Context, name string) (*object.Addon, error) {
	u, err := s.objects().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	return fromUnstructured(u)
}

// Release lets an object that is deleted go.
func (s *Set) Release(ctx context.Context, name string) error {
	return kube.RetryConflict(ctx, func() error {
		o, err := s.Object(ctx, name)
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		o.Finalizers = slices.DeleteFunc(o.Finalizers, func(f string) bool { return f == object.Finalizer })
		_, err = s.put(ctx, o, "")
		if apierrors.IsNotFound(err) {
			return nil
		}
		return err
	})
}

// KindGoes reports whether the kind itself is being deleted, and all objects with it: what is on stays on then.
func (s *Set) KindGoes(ctx context.Context) (bool, error) {
	gvr := object.Resource
	gvr.Group, gvr.Resource = "apiextensions.k8s.io", "customresourcedefinitions"
	o, err := s.client.Resource(gvr).Get(ctx, object.Resource.GroupResource().String(), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return true, nil
	}
	return err == nil && o.GetDeletionTimestamp() != nil, err
}

// show makes the object of an addon ask for the spec, and say in its status, what look returns for it.
func (s *Set) show(ctx context.Context, a Addon, look func(*object.Addon) (object.Spec, func(), error)) error {
	name := object.Name(a.Repository, a.Name)
	if !objectName.MatchString(name) {
		return nil
	}
	return kube.RetryConflict(ctx, func() error {
		o, err := s.Object(ctx, name)
		fresh := apierrors.IsNotFound(err)
		switch {
		case fresh:
			o = &object.Addon{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: object.Spec{Repository: a.Repository}}
		case err != nil:
			return err
		case o.DeletionTimestamp != nil, !o.Done() && !s.Declare:
			return nil
		}
		spec, status, err := look(o)
		if err != nil {
			return err
		}
		before := o.DeepCopyObject().(*object.Addon)
		if o.Spec.Enabled != spec.Enabled || spec.Enabled && (!slices.Equal(o.Spec.Arguments, spec.Arguments) || o.Spec.Online != spec.Online) {
			o.Spec.Enabled, o.Spec.Arguments, o.Spec.Online = spec.Enabled, spec.Arguments, spec.Online
		}
		metav1.SetMetaDataAnnotation(&o.ObjectMeta, object.DoneAnnotation, o.Spec.Digest())
		if !slices.Contains(o.Finalizers, object.Finalizer) {
			o.Finalizers = append(o.Finalizers, object.Finalizer)
		}
		switch {
		case fresh:
			u, err := toUnstructured(o)
			if err != nil {
				return err
			}
			u, err = s.objects().Create(ctx, u, metav1.CreateOptions{FieldManager: bootstrap.FieldManager})
			if apierrors.IsNotFound(err) {
				return nil // the kind is not defined
			}
			if err != nil {
				return err
			}
			written, err := fromUnstructured(u)
			if err != nil {
				return err
			}
			*o = *written
		case !same(before, o):
			written, err := s.put(ctx, o, "")
			if err != nil {
				return err
			}
			*o = *written
		}
		before = o.DeepCopyObject().(*object.Addon)
		if status(); same(before, o) {
			return nil
		}
		_, err = s.put(ctx, o, "status")
		return err
	})
}

// editStatus changes the status of an object, if edit says so; one that is not there has none.
func (s *Set) editStatus(ctx context.Context, name string, edit func(*object.Addon) bool) error {
	return kube.RetryConflict(ctx, func() error {
		o, err := s.Object(ctx, name)
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		before := o.DeepCopyObject().(*object.Addon)
		if !edit(o) || same(before, o) {
			return nil
		}
		_, err = s.put(ctx, o, "status")
		return err
	})
}

func (s *Set) put(ctx context.Context, o *object.Addon, sub string) (*object.Addon, error) {
	u, err := toUnstructured(o)
	if err != nil {
		return nil, err
	}
	if sub != "" {
		u, err = s.objects().UpdateStatus(ctx, u, metav1.UpdateOptions{FieldManager: bootstrap.FieldManager})
	} else {
		u, err = s.objects().Update(ctx, u, metav1.UpdateOptions{FieldManager: bootstrap.FieldManager})
	}
	if err != nil {
		return nil, err
	}
	return fromUnstructured(u)
}

func (s *Set) objects() dynamic.ResourceInterface { return s.client.Resource(object.Resource) }

func (s *Set) warn(ctx context.Context, name string, err error) {
	if err != nil && ctx.Err() == nil {
		s.Log.Warn("cannot write the object of an addon", "addon", name, "err", err)
	}
}

func same(a, b *object.Addon) bool {
	x, err := json.Marshal(a)
	y, err2 := json.Marshal(b)
	return err == nil && err2 == nil && string(x) == string(y)
}

func toUnstructured(o *object.Addon) (*unstructured.Unstructured, error) {
	o.APIVersion, o.Kind = object.Group.String(), "Addon"
	data, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	u := &unstructured.Unstructured{}
	return u, u.UnmarshalJSON(data)
}

func fromUnstructured(u *unstructured.Unstructured) (*object.Addon, error) {
	data, err := u.MarshalJSON()
	if err != nil {
		return nil, err
	}
	o := &object.Addon{}
	return o, json.Unmarshal(data, o)
}
