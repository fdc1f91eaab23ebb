// Package noderegistry keeps the cluster's list of the nodes that may be in it: one record for
// each node that has joined, or is joining just now. A node without a record may not register,
// and its certificates are refused (ADR 14). A Node object is no such record, since a
// kubelet makes it itself.
//
// A record is a ClusterRoleBinding, so that the API server's own authorizer can be asked for it
// (verb register, group microk8s.io, resource nodes, name NAME), and so that only who may grant
// anything can write it. The rest of a record is in its annotations. Nothing in it is secret.
package noderegistry

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"microk8s/internal/kube"
)

// Names of the objects.
const (
	// Role is the ClusterRole that the records bind.
	Role = "microk8s:registered-node"
	// Prefix is in front of the node's name in the name of its ClusterRoleBinding.
	Prefix = "microk8s:node:"
	// Label marks the records, with the value "true".
	Label = "microk8s.io/node-record"
	// ControlPlaneLabel marks those of control-plane nodes besides, with the value "true".
	ControlPlaneLabel = "microk8s.io/control-plane-record"
	// UserPrefix is in front of the node's name in the user that its kubelet is.
	UserPrefix = "system:node:"
)

// Annotations of a record, and of the ClusterRole.
const (
	annotationJoin     = "microk8s.io/join"
	annotationRole     = "microk8s.io/role"
	annotationSince    = "microk8s.io/since"
	annotationUntil    = "microk8s.io/until"
	annotationSecrets  = "microk8s.io/secrets"
	annotationServer   = "microk8s.io/server-arguments"
	annotationAgent    = "microk8s.io/agent-port"
	annotationMember   = "microk8s.io/datastore-member"
	annotationComplete = "microk8s.io/complete" // of the ClusterRole
)

// ControlPlanePath lists the bindings that are records of control-plane nodes, for clients that
// decode them with [Decode].
const ControlPlanePath = bindings + "?labelSelector=" + ControlPlaneLabel + "%3Dtrue"

// NodeRole is what a node does in the cluster.
type NodeRole string

// The roles.
const (
	Worker       NodeRole = "worker"
	ControlPlane NodeRole = "control-plane"
)

// Record is one node that may be in the cluster.
type Record struct {
	Name string
	// Join names the join by which the node came: 32 hex digits, also in its certificates. It is
	// "" for nodes that were in the cluster before there were records, and for the first one.
	Join string
	Role NodeRole
	// Since is when the node asked to join, or when its record was made.
	Since time.Time
	// Until is the end of a join that is not confirmed yet; zero when it is.
	Until time.Time
	// Secrets is the form of callback secrets that the node's agent is known to speak: 2, or 0
	// for upstream's and for earlier builds.
	Secrets int
	// ServerArguments is what a control-plane node says of its API server's arguments, as
	// serverargs.Summary.String writes it; "" of workers, and before the node's agent has said it.
	ServerArguments string
	// Member is the ID of the datastore's member on the node, as its own agent says; 0 where it has
	// none, or has not said yet.
	Member uint64
	// AgentPort is that of a control-plane node's agent; 0 where it is not known.
	AgentPort int
	// UID is that of the object, and tells a record from a later one of the same name.
	UID types.UID
}

// Pending reports whether the join is not confirmed yet.
func (r *Record) Pending() bool { return !r.Until.IsZero() }

// ErrNone is wrapped where a node has no record.
var ErrNone = errors.New("the node is not registered in this cluster")

// callTimeout bounds one call of the API server.
const callTimeout = 10 * time.Second

const (
	bindings = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"
	roles    = "/apis/rbac.authorization.k8s.io/v1/clusterroles"
)

// Registry reads and writes the records. It needs the administrator's rights.
type Registry struct {
	Core func() (*kube.Core, error) // asked for each call, so that new credentials are used
}

// Get reads the record of a node; ErrNone is wrapped where there is none.
func (g Registry) Get(ctx context.Context, name string) (*Record, error) {
	b, err := g.binding(ctx, name)
	if err != nil {
		return nil, err
	}
	return decode(b), nil
}

// Exists reports whether a node has a record.
func (g Registry) Exists(ctx context.Context, name string) (bool, error) {
	_, err := g.binding(ctx, name)
	if errors.Is(err, ErrNone) {
		return false, nil
	}
	return err == nil, err
}

func (g Registry) binding(ctx context.Context, name string) (*rbacv1.ClusterRoleBinding, error) {
	var b rbacv1.ClusterRoleBinding
	err := g.get(ctx, bindings+"/"+Prefix+name, nil, &b)
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("%w: %s", ErrNone, name)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the record of the node %s: %w", name, err)
	}
	return &b, nil
}

// List reads all records, in the order of their names.
func (g Registry) List(ctx context.Context) ([]Record, error) {
	var list rbacv1.ClusterRoleBindingList
	if err := g.get(ctx, bindings, map[string]string{"labelSelector": Label + "=true"}, &list); err != nil {
		return nil, fmt.Errorf("cannot list the records of nodes: %w", err)
	}
	var out []Record
	for i := range list.Items {
		if strings.HasPrefix(list.Items[i].Name, Prefix) {
			out = append(out, *decode(&list.Items[i]))
		}
	}
	slices.SortFunc(out, func(a, b Record) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// Put writes a record, over the one that the node may have.
func (g Registry) Put(ctx context.Context, r Record) error {
	if err := g.role(ctx, false); err != nil {
		return err
	}
	// Where the node has a record of an earlier join it is deleted, so that the new one is another
	// object: who decides by its UID does not take one for the other.
	err := kube.RetryConflict(ctx, func() error {
		err := g.write(ctx, "POST", bindings, encode(r))
		if !apierrors.IsAlreadyExists(err) {
			return err
		}
		old, getErr := g.binding(ctx, r.Name)
		if getErr != nil {
			if errors.Is(getErr, ErrNone) {
				return err
			}
			return getErr
		}
		if was := decode(old); was.Join == r.Join && was.Role == r.Role {
			kept := r
			kept.ServerArguments = cmp.Or(r.ServerArguments, was.ServerArguments) // the node itself says these
			kept.AgentPort = cmp.Or(r.AgentPort, was.AgentPort)
			b := encode(kept)
			b.ResourceVersion = old.ResourceVersion
			return g.write(ctx, "PUT", bindings+"/"+b.Name, b)
		}
		if delErr := g.Delete(ctx, r.Name); delErr != nil {
			return delErr
		}
		return err
	})
	return wrote(r.Name, err)
}

// Add writes a record for a node that has none, and reports whether it did.
func (g Registry) Add(ctx context.Context, r Record) (bool, error) {
	if err := g.role(ctx, false); err != nil {
		return false, err
	}
	err := g.write(ctx, "POST", bindings, encode(r))
	if apierrors.IsAlreadyExists(err) {
		return false, nil
	}
	return err == nil, wrote(r.Name, err)
}

// Change replaces a record by what change makes of it; ErrNone is wrapped where there is none.
// change may be called more than once; an error of it ends the call and is returned.
func (g Registry) Change(ctx context.Context, name string, change func(*Record) error) error {
	var refused error
	err := kube.RetryConflict(ctx, func() error {
		old, err := g.binding(ctx, name)
		if err != nil {
			return err
		}
		r := decode(old)
		before := *r
		if refused = change(r); refused != nil || *r == before {
			return nil
		}
		b := encode(*r)
		b.ResourceVersion = old.ResourceVersion
		return g.write(ctx, "PUT", bindings+"/"+b.Name, b)
	})
	if refused != nil || errors.Is(err, ErrNone) {
		return errors.Join(refused, err)
	}
	return wrote(name, err)
}

// Delete removes the record of a node; a missing one is in order. From then on the node is
// refused everywhere.
func (g Registry) Delete(ctx context.Context, name string) error { return g.delete(ctx, name, "") }

// DeleteOf removes a record unless it was replaced since it was read.
func (g Registry) DeleteOf(ctx context.Context, r *Record) error { return g.delete(ctx, r.Name, r.UID) }

func (g Registry) delete(ctx context.Context, name string, uid types.UID) error {
	core, err := g.Core()
	if err != nil {
		return err
	}
	req := core.Delete().AbsPath(bindings + "/" + Prefix + name).Timeout(callTimeout)
	if uid != "" {
		body, err := json.Marshal(metav1.DeleteOptions{
			TypeMeta: metav1.TypeMeta{Kind: "DeleteOptions", APIVersion: "v1"}, Preconditions: &metav1.Preconditions{UID: &uid},
		})
		if err != nil {
			return err
		}
		req = req.SetHeader("Content-Type", "application/json").Body(body)
	}
	err = req.Do(ctx).Error()
	if err != nil && !apierrors.IsNotFound(err) && (uid == "" || !apierrors.IsConflict(err)) {
		return fmt.Errorf("cannot delete the record of the node %s: %w", name, err)
	}
	return nil
}

// Prune deletes the records of joins that were not confirmed in their time, and returns their names.
func (g Registry) Prune(ctx context.Context, now time.Time) (gone []string, err error) {
	list, err := g.List(ctx)
	if err != nil {
		return nil, err
	}
	for i := range list {
		if r := &list[i]; r.Pending() && now.After(r.Until) {
			if err := g.DeleteOf(ctx, r); err != nil {
				return gone, err
			}
			gone = append(gone, r.Name)
		}
	}
	return gone, nil
}

// Complete reports whether every node of the cluster has a record, so that one without is none of
// the cluster's. It is false while control-plane nodes of an earlier build let others join.
func (g Registry) Complete(ctx context.Context) (bool, error) {
	var r rbacv1.ClusterRole
	err := g.get(ctx, roles+"/"+Role, nil, &r)
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("cannot read the ClusterRole %s: %w", Role, err)
	}
	return r.Annotations[annotationComplete] == "true", nil
}

// Adopt makes records for nodes that were in the cluster before there were records. It does so
// until all control-plane nodes write records themselves, and reports whether that is so now.
func (g Registry) Adopt(ctx context.Context, present []Record) (complete bool, err error) {
	if complete, err = g.Complete(ctx); complete || err != nil {
		return complete, err
	}
	for _, r := range present {
		if _, err := g.Add(ctx, r); err != nil {
			return false, err
		}
	}
	list, err := g.List(ctx)
	if err != nil {
		return false, err
	}
	for _, p := range present {
		if p.Role != ControlPlane {
			continue
		}
		i := slices.IndexFunc(list, func(r Record) bool { return r.Name == p.Name })
		if i < 0 || list[i].Secrets < 2 {
			return false, nil
		}
	}
	return true, g.role(ctx, true)
}

// role makes the ClusterRole, and notes on it that the records are complete.
func (g Registry) role(ctx context.Context, complete bool) error {
	want := &rbacv1.ClusterRole{
		TypeMeta:   metav1.TypeMeta{Kind: "ClusterRole", APIVersion: rbacv1.SchemeGroupVersion.String()},
		ObjectMeta: metav1.ObjectMeta{Name: Role, Annotations: map[string]string{}},
		Rules:      []rbacv1.PolicyRule{{APIGroups: []string{"microk8s.io"}, Resources: []string{"nodes"}, Verbs: []string{"register"}}},
	}
	err := kube.RetryConflict(ctx, func() error {
		var have rbacv1.ClusterRole
		err := g.get(ctx, roles+"/"+Role, nil, &have)
		switch {
		case apierrors.IsNotFound(err):
			if complete {
				want.Annotations[annotationComplete] = "true"
			}
			return g.write(ctx, "POST", roles, want)
		case err != nil || !complete || have.Annotations[annotationComplete] == "true":
			return err
		}
		want.ResourceVersion = have.ResourceVersion
		want.Annotations[annotationComplete] = "true"
		return g.write(ctx, "PUT", roles+"/"+Role, want)
	})
	if err != nil {
		return fmt.Errorf("cannot write the ClusterRole %s: %w", Role, err)
	}
	return nil
}

func wrote(name string, err error) error {
	if err != nil {
		return fmt.Errorf("cannot write the record of the node %s: %w", name, err)
	}
	return nil
}

func (g Registry) get(ctx context.Context, path string, params map[string]string, into any) error {
	core, err := g.Core()
	if err != nil {
		return err
	}
	req := core.Get().AbsPath(path).Timeout(callTimeout).SetHeader("Accept", "application/json")
	for k, v := range params {
		req = req.Param(k, v)
	}
	data, err := req.Do(ctx).Raw()
	if err != nil {
		return err
	}
	return json.Unmarshal(data, into)
}

func (g Registry) write(ctx context.Context, verb, path string, object any) error {
	core, err := g.Core()
	if err != nil {
		return err
	}
	data, err := json.Marshal(object)
	if err != nil {
		return err
	}
	return core.Verb(verb).AbsPath(path).Timeout(callTimeout).
		SetHeader("Content-Type", "application/json").SetHeader("Accept", "application/json").Body(data).Do(ctx).Error()
}

func encode(r Record) *rbacv1.ClusterRoleBinding {
	notes := map[string]string{annotationRole: string(r.Role), annotationSince: r.Since.UTC().Format(time.RFC3339)}
	if r.Join != "" {
		notes[annotationJoin] = r.Join
	}
	if r.Pending() {
		notes[annotationUntil] = r.Until.UTC().Format(time.RFC3339)
	}
	if r.Secrets > 0 {
		notes[annotationSecrets] = fmt.Sprint(r.Secrets)
	}
	if r.ServerArguments != "" {
		notes[annotationServer] = r.ServerArguments
	}
	if r.Member != 0 {
		notes[annotationMember] = strconv.FormatUint(r.Member, 10)
	}
	if r.AgentPort > 0 {
		notes[annotationAgent] = strconv.Itoa(r.AgentPort)
	}
	labels := map[string]string{Label: "true"}
	if r.Role == ControlPlane {
		labels[ControlPlaneLabel] = "true"
	}
	return &rbacv1.ClusterRoleBinding{
		TypeMeta:   metav1.TypeMeta{Kind: "ClusterRoleBinding", APIVersion: rbacv1.SchemeGroupVersion.String()},
		ObjectMeta: metav1.ObjectMeta{Name: Prefix + r.Name, Labels: labels, Annotations: notes},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: Role},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: UserPrefix + r.Name}},
	}
}

// decode reads a record. What cannot be read counts as the least that it may be: a worker, a join
// that is over.
func decode(b *rbacv1.ClusterRoleBinding) *Record {
	r := &Record{
		Name: strings.TrimPrefix(b.Name, Prefix), Join: b.Annotations[annotationJoin], Role: Worker, UID: b.UID,
		ServerArguments: b.Annotations[annotationServer],
	}
	if b.Annotations[annotationRole] == string(ControlPlane) {
		r.Role = ControlPlane
	}
	if port, err := strconv.ParseUint(b.Annotations[annotationAgent], 10, 16); err == nil {
		r.AgentPort = int(port)
	}
	r.Since, _ = time.Parse(time.RFC3339, b.Annotations[annotationSince])
	if text, ok := b.Annotations[annotationUntil]; ok {
		var err error
		if r.Until, err = time.Parse(time.RFC3339, text); err != nil || r.Until.IsZero() {
			r.Until = time.Unix(1, 0).UTC()
		}
	}
	if b.Annotations[annotationSecrets] == "2" {
		r.Secrets = 2
	}
	r.Member, _ = strconv.ParseUint(b.Annotations[annotationMember], 10, 64)
	if r.Role != ControlPlane {
		r.Member = 0
	}
	return r
}

// OfMember returns the record of the node that a member of the datastore is on; nil where no record
// names it: its agent is of a build before, or has not said so yet. An id of 0 is no member's.
func OfMember(list []Record, id uint64) *Record {
	i := slices.IndexFunc(list, func(r Record) bool { return id != 0 && r.Member == id })
	if i < 0 {
		return nil
	}
	return &list[i]
}
