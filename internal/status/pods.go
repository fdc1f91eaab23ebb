package status

import (
	"context"
	"fmt"
	"net/url"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"microk8s/internal/addon"
)

// workload is a Deployment or DaemonSet of an addon with fewer pods available than it should have.
type workload struct {
	addon, kind, namespace, name string
	have, want                   int32
	since                        time.Time // it was made, or changed
	selector                     string
	why                          string // what its pods say, "" for nothing
}

// starting is how long pods of a workload may take to start before that is a problem by itself.
const starting = 2 * time.Minute

// fewPods is how many pods of a workload are looked at for the reason.
const fewPods = 20

// weak lists the workloads of addons that lack pods, with what those say.
func (c *apiClient) weak(ctx context.Context) (out []workload, err error) {
	query := "?labelSelector=" + url.QueryEscape(addon.Label)
	var deployments appsv1.DeploymentList
	if err := c.decode(ctx, "/apis/apps/v1/deployments"+query, &deployments); err != nil {
		return nil, err
	}
	var daemons appsv1.DaemonSetList
	if err := c.decode(ctx, "/apis/apps/v1/daemonsets"+query, &daemons); err != nil {
		return nil, err
	}
	for _, d := range deployments.Items {
		want := int32(1)
		if d.Spec.Replicas != nil {
			want = *d.Spec.Replicas
		}
		if d.Status.AvailableReplicas < want {
			out = append(out, workload{addon: d.Labels[addon.Label], kind: "deployment", namespace: d.Namespace, name: d.Name, have: d.Status.AvailableReplicas, want: want,
				since: d.CreationTimestamp.Time, selector: metav1.FormatLabelSelector(d.Spec.Selector)})
			for _, cond := range d.Status.Conditions {
				if cond.Type == appsv1.DeploymentAvailable && cond.LastTransitionTime.After(out[len(out)-1].since) {
					out[len(out)-1].since = cond.LastTransitionTime.Time
				}
			}
		}
	}
	for _, d := range daemons.Items {
		if d.Status.NumberAvailable < d.Status.DesiredNumberScheduled {
			out = append(out, workload{addon: d.Labels[addon.Label], kind: "daemonset", namespace: d.Namespace, name: d.Name, have: d.Status.NumberAvailable,
				want: d.Status.DesiredNumberScheduled, since: d.CreationTimestamp.Time, selector: metav1.FormatLabelSelector(d.Spec.Selector)})
		}
	}
	for i := range out {
		w := &out[i]
		var pods unstructured.UnstructuredList
		path := fmt.Sprintf("/api/v1/namespaces/%s/pods?limit=%d&labelSelector=%s", url.PathEscape(w.namespace), fewPods, url.QueryEscape(w.selector))
		if err := c.decode(ctx, path, &pods); err != nil {
			return out, err
		}
		for j := range pods.Items {
			if why, _ := addon.PodObstacle(&pods.Items[j]); why != "" && pods.Items[j].GetDeletionTimestamp() == nil {
				w.why = "pod " + pods.Items[j].GetName() + ": " + why
				break
			}
		}
	}
	return out, nil
}

// weakProblems names the addons whose pods do not run, with what the pods say.
func (r *Report) weakProblems(s apiState, now time.Time) {
	if s.weakErr != nil {
		r.Unseen = append(r.Unseen, Unseen{ID: "addons.pods", Why: s.weakErr.Error()})
	}
	for _, w := range s.weak {
		// Pods on nodes that are down are the nodes' problem, which is named.
		if w.why == "" && (now.Sub(w.since) < starting || w.kind == "daemonset") {
			continue
		}
		why := w.why
		if why == "" {
			why = "its pods do not get ready"
		}
		r.add("addons.pods", "addon %s: %s/%s has %d of %d pods, %s", w.addon, w.kind, w.name, w.have, w.want, shorten(why))(
			fmt.Sprintf("see microk8s kubectl describe %s -n %s %s, and microk8s kubectl logs -n %s %s/%s", w.kind, w.namespace, w.name, w.namespace, w.kind, w.name))
	}
}
