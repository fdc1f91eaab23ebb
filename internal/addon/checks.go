package addon

import (
	"context"
	"os"
	"strings"
	"sync"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/snapenv"
)

// Get asks the API server for a path, for metadata only, and decodes the answer.
type Get func(ctx context.Context, path string, into *metav1.PartialObjectMetadataList) error

// MetadataOnly is the Accept header with which lists hold no more than names and the like.
const MetadataOnly = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"

// rows are the kinds in which check_status looks, as kubectl prints them (cli.md 5.2), with
// the path of their list.
var rows = map[string]string{
	"pod":                                   "/api/v1/pods",
	"service":                               "/api/v1/services",
	"replicationcontroller":                 "/api/v1/replicationcontrollers",
	"daemonset.apps":                        "/apis/apps/v1/daemonsets",
	"deployment.apps":                       "/apis/apps/v1/deployments",
	"replicaset.apps":                       "/apis/apps/v1/replicasets",
	"statefulset.apps":                      "/apis/apps/v1/statefulsets",
	"horizontalpodautoscaler.autoscaling":   "/apis/autoscaling/v2/horizontalpodautoscalers",
	"cronjob.batch":                         "/apis/batch/v1/cronjobs",
	"job.batch":                             "/apis/batch/v1/jobs",
	"ingress.networking.k8s.io":             "/apis/networking.k8s.io/v1/ingresses",
	"ingressclass.networking.k8s.io":        "/apis/networking.k8s.io/v1/ingressclasses",
	"clusterrole.rbac.authorization.k8s.io": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
}

// Foreign picks those of the addons that have hooks, or stand for a repository, which tell by their check_status
// whether they are on: the records in the cluster do not know them.
func Foreign(all []Addon) []Addon {
	var out []Addon
	for _, a := range all {
		if a.Repository != CoreRepository || a.Source != "" {
			out = append(out, a)
		}
	}
	return out
}

// CheckForeign says which of the addons are on, by full name: those whose file exists, or
// whose text is part of the kind/name of an object with a blank behind it. It asks for the kinds that matter only.
func CheckForeign(ctx context.Context, env snapenv.Env, get Get, addons []Addon) (map[string]bool, error) {
	on := map[string]bool{}
	need := map[string]bool{}
	for _, a := range addons {
		if path, isFile := statusFile(env, a.CheckStatus); isFile {
			_, err := os.Stat(path)
			on[a.FullName()] = err == nil
			continue
		}
		for kind := range rows {
			need[kind] = need[kind] || mayBeIn(a.CheckStatus, kind)
		}
	}
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		names []string
		first error
	)
	for kind, path := range rows {
		if !need[kind] {
			continue
		}
		wg.Go(func() {
			var list metav1.PartialObjectMetadataList
			err := get(ctx, path, &list)
			mu.Lock()
			defer mu.Unlock()
			if err != nil && first == nil {
				first = err
			}
			for _, o := range list.Items {
				// As in kubectl's table, where a blank follows: a check_status that ends with one means the whole name.
				names = append(names, kind+"/"+o.Name+" ")
			}
		})
	}
	wg.Wait()
	for _, a := range addons {
		if _, isFile := statusFile(env, a.CheckStatus); isFile || a.CheckStatus == "" {
			continue
		}
		for _, n := range names {
			if strings.Contains(n, a.CheckStatus) {
				on[a.FullName()] = true
				break
			}
		}
	}
	return on, first
}

// statusFile returns the file that a check_status names.
func statusFile(env snapenv.Env, check string) (path string, ok bool) {
	if !strings.Contains(check, "${SNAP") {
		return "", false
	}
	return os.Expand(check, func(name string) string {
		v, _ := env.Lookup(name)
		return v
	}), true
}

// mayBeIn reports whether a text can be part of the row of an object of a kind.
func mayBeIn(check, kind string) bool {
	before, _, slash := strings.Cut(check, "/")
	return check != "" && (!slash || strings.HasSuffix(kind, before))
}
