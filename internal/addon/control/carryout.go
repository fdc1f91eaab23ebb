package control

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"microk8s/internal/addon"
	"microk8s/internal/addon/object"
	"microk8s/internal/bootstrap"
)

// CarryOut does what the object of an addon asks for, and says in it how that went; an error is in the object, too,
// except where there is none. Where nothing is to be done it waits for pods that were not ready.
func (c *Controller) CarryOut(ctx context.Context, name string, limit time.Duration) error {
	unlock, err := Lock(ctx, c.Env, limit, c.Report.Note)
	if err != nil {
		return err
	}
	a, generation, err := c.carryOut(ctx, name)
	unlock()
	if err != nil || a.Repository != addon.CoreRepository || a.Builtin != "" {
		return err
	}
	r, on, err := c.Set.Enabled(ctx, a.Name)
	if err != nil || !on || !r.Complete() {
		return err
	}
	applied, err := c.Set.Rendered(ctx, a, r)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go c.Set.WhileAt(ctx, name, generation, cancel) // what is asked for then does not wait for these pods
	return c.await(ctx, a, applied)
}

// carryOut is CarryOut with the lock held, without the wait.
func (c *Controller) carryOut(ctx context.Context, name string) (a addon.Addon, generation int64, err error) {
	o, err := c.Set.Object(ctx, name)
	if apierrors.IsNotFound(err) {
		c.Set.Publish(ctx) // it was deleted together with its finalizer
		return a, 0, nil
	}
	if err != nil {
		return a, 0, err
	}
	a, err = c.Set.FindFull(o.FullName())
	if err == nil && (a.Alias != "" || a.Source != "") {
		err = fmt.Errorf("%s is no addon of its own: it stands for %s", o.FullName(), a.Alias+a.Source)
	}
	if o.DeletionTimestamp != nil {
		return addon.Addon{}, 0, c.end(ctx, o, a, err == nil) // there are no pods to wait for
	}
	generation = o.Generation
	if err == nil {
		err = c.do(ctx, o, a)
	}
	if err == nil && !o.Done() {
		err = c.Set.MarkDone(ctx, name, o.Spec)
	}
	if ctx.Err() != nil {
		return a, generation, ctx.Err()
	}
	if err != nil {
		c.Set.ShowFailure(ctx, name, generation, reason(err), message(err))
		return a, generation, err
	}
	if a.Repository == addon.CoreRepository {
		c.Set.Show(ctx, a.Name)
	} else if !o.Done() {
		c.Set.ShowHook(ctx, a, o.Spec.Enabled, o.Spec.Arguments)
	}
	return a, generation, nil
}

// end turns off the addon of an object that is deleted, and lets the object go. There is a new one then, which
// asks for nothing.
func (c *Controller) end(ctx context.Context, o *object.Addon, a addon.Addon, known bool) error {
	all, err := c.Set.KindGoes(ctx)
	if err != nil {
		return err
	}
	if known && !all && a.Builtin == "" {
		if err := c.Disable(ctx, Request{Addon: a}); err != nil {
			c.Set.ShowFailure(ctx, o.Name, o.Generation, reason(err), message(err))
			return err
		}
	}
	if err := c.Set.Release(ctx, o.Name); err != nil || all {
		return err
	}
	c.Set.Publish(ctx)
	return nil
}

// do does what a spec asks for, or finishes what was interrupted.
func (c *Controller) do(ctx context.Context, o *object.Addon, a addon.Addon) error {
	enabled, args, online := o.Spec.Enabled, o.Spec.Arguments, o.Spec.Online
	if a.Builtin != "" {
		if !enabled {
			return fmt.Errorf("cannot disable %s: %s", a.FullName(), a.Builtin)
		}
		return nil
	}
	if a.Repository == addon.CoreRepository {
		r, on, err := c.Set.Enabled(ctx, a.Name)
		if err != nil {
			return err
		}
		if o.Done() { // the record counts, and only what was interrupted is left to do
			if r.Name == "" || r.Complete() {
				return nil
			}
			enabled, args, online = on, r.Args, r.Online
		}
	}
	if !enabled {
		c.Set.ShowPhase(ctx, o.Name, object.Disabling)
		return c.Disable(ctx, Request{Addon: a})
	}
	request := Request{Addon: a, Args: args}
	if a.Repository == addon.CoreRepository {
		if err := addon.Check(a, args); err != nil {
			return err
		}
		if a.Question() != "" && len(args) == 0 {
			return addon.Lacking(a)
		}
		if err := CheckPack(ctx, c.Env, c.Version, request, online); err != nil {
			return err
		}
	}
	c.Set.ShowPhase(ctx, o.Name, object.Enabling)
	c.Set.Adopt, c.Set.Online = o.Spec.Adopt, online
	return c.Enable(ctx, request)
}

// reason is that of an error in the condition of an object.
func reason(err error) string {
	var wrong *addon.ArgumentError
	var theirs *bootstrap.ForeignError
	var unknown *addon.UnknownError
	switch {
	case errors.As(err, &wrong):
		return object.Invalid
	case errors.As(err, &theirs):
		return object.Conflict
	case errors.As(err, &unknown):
		return object.Unknown
	}
	return object.Failed
}

// message is an error with what to do about it.
func message(err error) string {
	var refused *Refusal
	if errors.As(err, &refused) {
		return strings.Join(append([]string{err.Error()}, refused.Hints...), "; ")
	}
	return err.Error()
}
