// Package nodegate refuses every request with the credentials of a node that has no record in the
// cluster (ADR 16). It is an authorizer, which kubelite puts in front of its API server's own.
package nodegate

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"

	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apiserver/pkg/authentication/serviceaccount"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/features"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/client-go/informers"
	rbaclisters "k8s.io/client-go/listers/rbac/v1"
	"k8s.io/client-go/tools/cache"

	"microk8s/internal/noderegistry"
)

// NotRegistered is in the API server's answers to a node that is not registered in the cluster.
const NotRegistered = "is not registered in this cluster"

// Gate refuses every request with a node's credentials when the node has no record in the
// cluster (package noderegistry): with the certificates of its kubelet and its kube-proxy, and
// with the tokens of the pods on it. So a removed node is shut out from the moment in which its
// record is deleted, with whatever it holds. A request that is still being served then, a watch,
// is ended.
//
// It is an authorizer in front of those of --authorization-mode: it denies, or has no opinion.
// As long as the records are not complete (noderegistry.Registry.Adopt) it has none.
type Gate struct {
	roles    rbaclisters.ClusterRoleLister
	bindings rbaclisters.ClusterRoleBindingLister
	synced   []cache.InformerSynced

	mu     sync.Mutex
	serves map[*serving]struct{}
}

// serving is one request of a node that is being served.
type serving struct {
	who    user.Info
	cancel context.CancelFunc
}

// New makes a gate that reads the records from informers, which its caller starts. It may be asked
// before: until they are complete every node is refused.
func New(factory informers.SharedInformerFactory) (*Gate, error) {
	roles, bindings := factory.Rbac().V1().ClusterRoles(), factory.Rbac().V1().ClusterRoleBindings()
	g := &Gate{
		roles: roles.Lister(), bindings: bindings.Lister(),
		synced: []cache.InformerSynced{roles.Informer().HasSynced, bindings.Informer().HasSynced},
		serves: map[*serving]struct{}{},
	}
	look := func(o any) {
		if gone, ok := o.(cache.DeletedFinalStateUnknown); ok {
			o = gone.Obj
		}
		if b, ok := o.(*rbacv1.ClusterRoleBinding); !ok || strings.HasPrefix(b.Name, noderegistry.Prefix) {
			g.endRefused()
		}
	}
	_, err := bindings.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		UpdateFunc: func(_, o any) { look(o) }, DeleteFunc: look,
	})
	return g, err
}

// nodeOf returns the name of the node whose credentials a user has, "" for anybody else, and
// whether they are a certificate, whose UID is the join that it was signed for.
func nodeOf(u user.Info) (name string, certificate bool) {
	for _, group := range u.GetGroups() {
		if group == user.NodesGroup {
			if name, ok := strings.CutPrefix(u.GetName(), noderegistry.UserPrefix); ok {
				return name, true
			}
		}
		if name, ok := strings.CutPrefix(group, noderegistry.Prefix); ok {
			return name, true
		}
	}
	if _, _, err := serviceaccount.SplitUsername(u.GetName()); err == nil {
		if names := u.GetExtra()[serviceaccount.NodeNameKey]; len(names) > 0 {
			return names[0], false
		}
	}
	return "", false
}

// refuses returns why a user is refused, "" if it is not.
func (g *Gate) refuses(u user.Info) string {
	name, certificate := nodeOf(u)
	if name == "" {
		return ""
	}
	for _, synced := range g.synced {
		if !synced() {
			return "the API server is starting and does not know the cluster's nodes yet"
		}
	}
	role, err := g.roles.Get(noderegistry.Role)
	if err != nil || !noderegistry.IsComplete(role) {
		return ""
	}
	binding, err := g.bindings.Get(noderegistry.Prefix + name)
	if err != nil {
		return fmt.Sprintf("node %s %s: it was removed, or never joined", name, NotRegistered)
	}
	record := noderegistry.Decode(binding)
	// The broker writes the join into certificates of workers. Control-plane nodes make their own,
	// without one: there a certificate that has one is of the worker that had the name before.
	earlier := u.GetUID() != record.Join && (u.GetUID() != "" || record.Role == noderegistry.Worker)
	if certificate && earlier &&
		utilfeature.DefaultFeatureGate.Enabled(features.AllowParsingUserUIDFromCertAuth) {
		return fmt.Sprintf("node %s %s with this certificate: it has joined again since", name, NotRegistered)
	}
	return ""
}

// Authorize implements authorizer.Authorizer.
func (g *Gate) Authorize(_ context.Context, a authorizer.Attributes) (authorizer.Decision, string, error) {
	if u := a.GetUser(); u != nil {
		if why := g.refuses(u); why != "" {
			return authorizer.DecisionDeny, why, nil
		}
	}
	return authorizer.DecisionNoOpinion, "", nil
}

// ConditionsAwareAuthorize implements authorizer.Authorizer.
func (g *Gate) ConditionsAwareAuthorize(ctx context.Context, a authorizer.Attributes) authorizer.ConditionsAwareDecision {
	return authorizer.ConditionsAwareDecisionFromParts(g.Authorize(ctx, a))
}

// EvaluateConditions implements authorizer.Authorizer; the gate makes no conditions.
func (g *Gate) EvaluateConditions(context.Context, authorizer.ConditionsAwareDecision, authorizer.ConditionsData) (authorizer.Decision, string, error) {
	return authorizer.DecisionDeny, "", authorizer.ErrorConditionEvaluationNotSupported
}

var errRemoved = errors.New("the node was removed from the cluster")

// Handler ends requests of nodes that are removed while they are served. It is for requests that are
// authenticated: their context has the user.
func (g *Gate) Handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		u, ok := request.UserFrom(r.Context())
		if !ok {
			next.ServeHTTP(w, r)
			return
		}
		if name, _ := nodeOf(u); name == "" {
			next.ServeHTTP(w, r)
			return
		}
		ctx, cancel := context.WithCancelCause(r.Context())
		defer cancel(nil)
		s := &serving{who: u, cancel: func() { cancel(errRemoved) }}
		g.mu.Lock()
		g.serves[s] = struct{}{}
		g.mu.Unlock()
		defer func() {
			g.mu.Lock()
			delete(g.serves, s)
			g.mu.Unlock()
		}()
		if g.refuses(u) != "" { // between the decision and now
			cancel(errRemoved)
		}
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

// endRefused ends the requests of nodes that are refused now.
func (g *Gate) endRefused() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for s := range g.serves {
		if g.refuses(s.who) != "" {
			s.cancel()
		}
	}
}
