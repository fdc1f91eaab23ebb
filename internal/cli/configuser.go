package cli

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/duration"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"microk8s/internal/kube"
)

// Kubeconfigs for people with fewer rights are tokens of a service account that stands for the person,
// with a binding to one of Kubernetes' roles (docs/adr/0023): they end by themselves, and when the
// account is deleted.
const (
	usersNamespace = "microk8s-users"
	userLabel      = "microk8s.io/user"
	userWait       = 20 * time.Second
	// defaultUserTTL is a working day; the API server makes no token for less than minUserTTL.
	defaultUserTTL = 8 * time.Hour
	minUserTTL     = 10 * time.Minute
)

type configUserFlags struct {
	user, role, namespace, revoke string
	ttl                           time.Duration
	list                          bool
	out                           *output
}

// userRoles are the roles of Kubernetes that may be given.
var userRoles = []string{"view", "edit", "admin", "cluster-admin"}

func (f *configUserFlags) add(cmd *cobra.Command) {
	set := cmd.Flags()
	set.StringVar(&f.user, "user", "", "make a kubeconfig for this user instead, with fewer rights and an end")
	set.StringVar(&f.role, "role", "view", "what the user may do: view, edit, admin or cluster-admin")
	set.StringVarP(&f.namespace, "namespace", "n", "", "only in this namespace (default: in all)")
	set.DurationVar(&f.ttl, "ttl", defaultUserTTL, "how long the kubeconfig is good, such as 30m or 72h")
	set.BoolVar(&f.list, "list", false, "list the users instead")
	set.StringVar(&f.revoke, "revoke", "", "end all kubeconfigs of this user, and take its rights away")
}

// asked reports whether any of the flags is set.
func (f *configUserFlags) asked(cmd *cobra.Command) bool {
	return slices.ContainsFunc([]string{"user", "role", "namespace", "ttl", "list", "revoke"}, cmd.Flags().Changed)
}

func (a *App) configUser(cmd *cobra.Command, f *configUserFlags, servers kubeconfigServers) error {
	wrong := func(format string, v ...any) error { return &usageError{cmd, fmt.Errorf(format, v...)} }
	if err := a.stopped(); err != nil {
		return err
	}
	if asked := slices.DeleteFunc([]string{f.user, f.revoke}, func(s string) bool { return s == "" }); f.list && len(asked) > 0 || len(asked) > 1 {
		return wrong("--user, --list and --revoke do not go together")
	}
	core, err := kube.FromFile(a.Env.AdminKubeconfig())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), userWait)
	defer cancel()
	u := users{core}
	failed := func(err error) error {
		if err == nil {
			return nil
		}
		return failf("see what is wrong with: microk8s status", "%w", err)
	}
	if f.out.document() && !f.list {
		return wrong("-o is for --list")
	}
	switch {
	case f.list:
		return failed(a.listUsers(ctx, u, f.out))
	case f.revoke != "":
		found, err := u.remove(ctx, f.revoke)
		if err == nil && !found {
			return failf("see microk8s config --list", "there is no user %s", f.revoke)
		}
		if err == nil {
			fmt.Fprintf(a.Err, "The kubeconfigs of %s are worth nothing from now on.\n", f.revoke)
		}
		return failed(err)
	case f.user == "":
		return wrong("--role, --namespace and --ttl are for --user NAME")
	}
	if problems := validation.IsDNS1123Label(f.user); len(problems) > 0 {
		return failf("use a name of lower case letters, digits and dashes, such as ann", "cannot use --user %s: %s", f.user, problems[0])
	}
	if !slices.Contains(userRoles, f.role) {
		return wrong("invalid value of --role: %s (choose from view, edit, admin, cluster-admin)", f.role)
	}
	if f.ttl < minUserTTL {
		return failf("use a duration of at least 10m, such as 8h", "cannot use --ttl %s", f.ttl)
	}
	token, end, err := u.add(ctx, f)
	if err != nil {
		return failed(err)
	}
	text, err := a.userKubeconfig(ctx, f, token, servers)
	if err != nil {
		return err
	}
	if _, err := a.Out.Write(text); err != nil {
		return err
	}
	where := "all namespaces"
	if f.namespace != "" {
		where = "the namespace " + f.namespace
	}
	fmt.Fprintf(a.Err, "%s has the role %s in %s, until %s. To end it before: microk8s config --revoke %[1]s\n", f.user, f.role, where, end.UTC().Format(time.RFC3339))
	return nil
}

// userKubeconfig is the administrator's with the user's token in the place of its certificate.
func (a *App) userKubeconfig(ctx context.Context, f *configUserFlags, token string, servers kubeconfigServers) ([]byte, error) {
	data, err := os.ReadFile(a.Env.AdminKubeconfig())
	if err != nil {
		return nil, fmt.Errorf("cannot read the administrator's kubeconfig: %w", err)
	}
	cfg, err := clientcmd.Load(data)
	if err != nil {
		return nil, fmt.Errorf("cannot read the administrator's kubeconfig: %w", err)
	}
	c := cfg.Contexts[cfg.CurrentContext]
	if c == nil {
		return nil, errors.New("the administrator's kubeconfig has no current context")
	}
	cluster := cfg.Clusters[c.Cluster]
	out := clientcmdapi.NewConfig()
	out.Clusters[c.Cluster] = cluster
	out.AuthInfos[f.user] = &clientcmdapi.AuthInfo{Token: token}
	out.Contexts[f.user] = &clientcmdapi.Context{Cluster: c.Cluster, AuthInfo: f.user, Namespace: f.namespace}
	out.CurrentContext = f.user
	if servers.all {
		if err := a.addServers(ctx, out); err != nil {
			return nil, err
		}
	}
	text, err := clientcmd.Write(*out)
	if err != nil {
		return nil, err
	}
	return []byte(servers.local(string(text))), nil
}

// listedUser is one item of the kind UserList.
type listedUser struct {
	User      string    `json:"user"`
	Role      string    `json:"role"`
	Namespace string    `json:"namespace,omitempty"` // "" for all
	Since     time.Time `json:"since"`
}

func (a *App) listUsers(ctx context.Context, u users, out *output) error {
	list, err := u.bindings(ctx, "")
	if err != nil {
		return err
	}
	if out.document() {
		var items []listedUser
		for _, b := range list {
			items = append(items, listedUser{b.Labels[userLabel], b.RoleRef.Name, b.Namespace, b.CreationTimestamp.UTC()})
		}
		return a.print(out, listOf("UserList", items))
	}
	if len(list) == 0 {
		fmt.Fprintln(a.Err, "There are no users. Make a kubeconfig with: microk8s config --user NAME --role view")
		return nil
	}
	w := tabwriter.NewWriter(a.Out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "USER\tROLE\tNAMESPACE\tAGE")
	for _, b := range list {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", b.Labels[userLabel], b.RoleRef.Name, cmp.Or(b.Namespace, "(all)"), duration.HumanDuration(a.Now().Sub(b.CreationTimestamp.Time)))
	}
	return w.Flush()
}

// users keeps the service accounts and bindings that stand for people.
type users struct{ core *kube.Core }

const rbac = "/apis/rbac.authorization.k8s.io/v1"

// create posts an object; one that is there already is left as it is.
func (u users) create(ctx context.Context, path string, o any) ([]byte, error) {
	body, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	data, err := u.core.Post().AbsPath(path).SetHeader("Content-Type", "application/json").Body(bytes.NewReader(body)).DoRaw(ctx)
	if apierrors.IsAlreadyExists(err) {
		return nil, nil
	}
	return data, err
}

func (u users) add(ctx context.Context, f *configUserFlags) (token string, end time.Time, err error) {
	meta := func(name, namespace string) metav1.ObjectMeta {
		return metav1.ObjectMeta{Name: name, Namespace: namespace, Labels: map[string]string{userLabel: f.user}}
	}
	ns := corev1.Namespace{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"}, ObjectMeta: metav1.ObjectMeta{Name: usersNamespace}}
	if _, err := u.create(ctx, "/api/v1/namespaces", ns); err != nil {
		return "", end, err
	}
	automount := false
	sa := corev1.ServiceAccount{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "ServiceAccount"}, ObjectMeta: meta(f.user, usersNamespace), AutomountServiceAccountToken: &automount}
	if _, err := u.create(ctx, "/api/v1/namespaces/"+usersNamespace+"/serviceaccounts", sa); err != nil {
		return "", end, err
	}
	ref := rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: f.role}
	subjects := []rbacv1.Subject{{Kind: "ServiceAccount", Name: f.user, Namespace: usersNamespace}}
	name := "microk8s-user:" + f.user + ":" + f.role
	if f.namespace == "" {
		_, err = u.create(ctx, rbac+"/clusterrolebindings", rbacv1.ClusterRoleBinding{
			TypeMeta: metav1.TypeMeta{APIVersion: rbac[len("/apis/"):], Kind: "ClusterRoleBinding"}, ObjectMeta: meta(name, ""), RoleRef: ref, Subjects: subjects})
	} else {
		_, err = u.create(ctx, rbac+"/namespaces/"+f.namespace+"/rolebindings", rbacv1.RoleBinding{
			TypeMeta: metav1.TypeMeta{APIVersion: rbac[len("/apis/"):], Kind: "RoleBinding"}, ObjectMeta: meta(name, f.namespace), RoleRef: ref, Subjects: subjects})
	}
	if err != nil {
		return "", end, err
	}
	seconds := int64(f.ttl / time.Second)
	data, err := u.create(ctx, "/api/v1/namespaces/"+usersNamespace+"/serviceaccounts/"+f.user+"/token", authenticationv1.TokenRequest{
		TypeMeta: metav1.TypeMeta{APIVersion: "authentication.k8s.io/v1", Kind: "TokenRequest"}, Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &seconds}})
	if err != nil {
		return "", end, err
	}
	var made authenticationv1.TokenRequest
	if err := json.Unmarshal(data, &made); err != nil || made.Status.Token == "" {
		return "", end, fmt.Errorf("the API server returned no token: %w", err)
	}
	return made.Status.Token, made.Status.ExpirationTimestamp.Time, nil
}

// bindings lists those of a user, or of all where the name is "", by user.
func (u users) bindings(ctx context.Context, user string) ([]rbacv1.RoleBinding, error) {
	selector := userLabel
	if user != "" {
		selector += "=" + user
	}
	var out []rbacv1.RoleBinding
	for _, resource := range []string{"/clusterrolebindings", "/rolebindings"} {
		var list rbacv1.RoleBindingList // has the fields of both
		data, err := u.core.Get().AbsPath(rbac+resource).Param("labelSelector", selector).DoRaw(ctx)
		if err == nil {
			err = json.Unmarshal(data, &list)
		}
		if err != nil {
			return nil, err
		}
		out = append(out, list.Items...)
	}
	slices.SortFunc(out, func(a, b rbacv1.RoleBinding) int { return cmp.Compare(a.Labels[userLabel], b.Labels[userLabel]) })
	return out, nil
}

// remove deletes a user's account, which ends its tokens, and its bindings.
func (u users) remove(ctx context.Context, user string) (found bool, err error) {
	if problems := validation.IsDNS1123Label(user); len(problems) > 0 {
		return false, nil
	}
	drop := func(path string) error {
		_, err := u.core.Delete().AbsPath(path).DoRaw(ctx)
		if apierrors.IsNotFound(err) {
			return nil
		}
		found = found || err == nil
		return err
	}
	if err := drop("/api/v1/namespaces/" + usersNamespace + "/serviceaccounts/" + user); err != nil {
		return found, err
	}
	list, err := u.bindings(ctx, user)
	if err != nil {
		return found, err
	}
	for _, b := range list {
		path := rbac + "/clusterrolebindings/" + b.Name
		if b.Namespace != "" {
			path = rbac + "/namespaces/" + b.Namespace + "/rolebindings/" + b.Name
		}
		if err := drop(path); err != nil {
			return found, err
		}
	}
	return found, nil
}
