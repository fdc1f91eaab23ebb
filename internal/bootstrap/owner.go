package bootstrap

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
)

// Foreign is an object that somebody else made.
type Foreign struct {
	Object string // kind, namespace and name
	Owner  string // who made it, as far as the object says
	// Fixed: it cannot be changed to what is wanted, so it cannot be taken over.
	Fixed bool
}

func (f Foreign) String() string { return f.Object + " (" + f.Owner + ")" }

// ForeignError lists objects of a set that exist in the cluster and were made by others. They were
// left alone.
type ForeignError struct{ Objects []Foreign }

func (e *ForeignError) Error() string {
	var out []string
	for _, o := range e.Objects {
		out = append(out, o.String())
	}
	return "made by others: " + strings.Join(out, ", ")
}

// standing is how an object in the cluster relates to a set.
type standing int

const (
	foreign standing = iota // made by others, and never applied
	shared                  // applied, but made by others or taken over: changed, never deleted
	mine                    // made by the product: changed, replaced and deleted
)

// standing says how an object stands to the set. Recorded UIDs decide. Without a record, as for
// objects of earlier versions, our label and our field manager show that it was applied, and marks of
// other tools that it was theirs before.
func (s Set) standing(o *unstructured.Unstructured) standing {
	switch {
	case slices.Contains(s.Adopted, o.GetUID()):
		return shared
	case slices.Contains(s.Owned, o.GetUID()):
		return mine
	case o.GetLabels()[s.Label] == "" || !applied(o):
		return foreign
	case otherTool(o) != "":
		return shared
	}
	return mine
}

// applied reports whether the product has applied an object.
func applied(o *unstructured.Unstructured) bool {
	return slices.ContainsFunc(o.GetManagedFields(), func(m metav1.ManagedFieldsEntry) bool {
		return m.Manager == FieldManager && m.Operation == metav1.ManagedFieldsOperationApply
	})
}

// Marks that other tools leave on the objects that they make.
const (
	helmRelease   = "meta.helm.sh/release-name"
	helmNamespace = "meta.helm.sh/release-namespace"
	lastApplied   = "kubectl.kubernetes.io/last-applied-configuration"
)

// otherTool names the tool or object that an object belongs to, "" where it has no such mark.
func otherTool(o *unstructured.Unstructured) string {
	notes := o.GetAnnotations()
	switch refs := o.GetOwnerReferences(); {
	case notes[helmRelease] != "":
		return strings.TrimSuffix(fmt.Sprintf("Helm release %s in %s", notes[helmRelease], notes[helmNamespace]), " in ")
	case len(refs) > 0:
		return "owned by " + refs[0].Kind + " " + refs[0].Name
	case notes[lastApplied] != "":
		return "applied with kubectl"
	}
	return ""
}

// owner says who made an object that is not the product's.
func owner(o *unstructured.Unstructured) string {
	if who := otherTool(o); who != "" {
		return who
	}
	var managers []string
	for _, m := range o.GetManagedFields() {
		if m.Manager != FieldManager && m.Subresource == "" && !slices.Contains(managers, m.Manager) {
			managers = append(managers, m.Manager)
		}
	}
	if len(managers) == 0 {
		return "its maker is not recorded"
	}
	return "made by " + strings.Join(managers, ", ")
}

// Check returns a *ForeignError where objects of the set exist that others made, unless the set
// adopts them and they can be changed. Then it returns the UIDs of those that stay the others' even so, which belong in the
// record before anything is applied. It changes nothing.
func Check(ctx context.Context, cfg *rest.Config, set Set, log *slog.Logger) (stay []types.UID, err error) {
	c, err := newCluster(cfg, log)
	if err != nil {
		return nil, err
	}
	var theirs []Foreign
	for _, o := range set.Objects {
		now, err := c.get(ctx, o)
		if err != nil {
			return nil, fmt.Errorf("cannot look for %s: %w", describe(o), err)
		}
		switch {
		case now == nil || set.standing(now) != foreign || serves(o):
		case !set.Adopt:
			theirs = append(theirs, Foreign{Object: describe(o), Owner: owner(now)})
		case replaceable[o.GetKind()]:
			fits, err := c.fits(ctx, o)
			if err != nil {
				return nil, fmt.Errorf("cannot look whether %s can be taken over: %w", describe(o), err)
			}
			if !fits {
				theirs = append(theirs, Foreign{Object: describe(o), Owner: owner(now), Fixed: true})
			}
			stay = append(stay, now.GetUID())
		}
	}
	if len(theirs) > 0 {
		return nil, &ForeignError{theirs}
	}
	return stay, nil
}

// fits reports whether the object of that kind and name can be changed to o. It changes nothing.
func (c *cluster) fits(ctx context.Context, o *unstructured.Unstructured) (bool, error) {
	mapping, err := c.mapping(o.GroupVersionKind())
	if err != nil {
		return false, err
	}
	dry := metav1.ApplyOptions{FieldManager: FieldManager, Force: true, DryRun: []string{metav1.DryRunAll}}
	_, err = c.resource(mapping, o).Apply(ctx, o.GetName(), o, dry)
	if apierrors.IsInvalid(err) {
		return false, nil
	}
	return err == nil, err
}

// get reads the object of that kind and name in the cluster, nil where there is none.
func (c *cluster) get(ctx context.Context, o *unstructured.Unstructured) (*unstructured.Unstructured, error) {
	mapping, err := c.mapping(o.GroupVersionKind())
	if meta.IsNoMatchError(err) {
		return nil, nil // a kind that the set brings itself
	}
	if err != nil {
		return nil, err
	}
	now, err := c.resource(mapping, o).Get(ctx, o.GetName(), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	return now, err
}

// Result is what became of the objects of a set.
type Result struct {
	// Owned and Adopted are the UIDs of the objects that are there: those that the product made, and
	// those that others made. They belong in the record that is the next Set's.
	Owned, Adopted []types.UID
	// Left are objects with the set's label that were not removed, because others made them.
	Left []Foreign
}

func (r *Result) add(s standing, uid types.UID) {
	if s == mine {
		r.Owned = append(r.Owned, uid)
	} else {
		r.Adopted = append(r.Adopted, uid)
	}
}
