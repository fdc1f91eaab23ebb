package status

import (
	"context"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"

	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/nodecopy"
	"microk8s/internal/service"
	"microk8s/internal/snapenv"
)

// Local returns what is wrong with this node as a member of its cluster, each as one sentence with the next
// step: it was removed, or another machine runs under its name. It asks nobody, and is for workers, where
// the rest of a report cannot be had.
func Local(env snapenv.Env, now time.Time) (out []string) {
	if why := Removed(env); why != "" {
		out = append(out, why)
	}
	if c, ok := nodecopy.Here(env, now); ok {
		name := nodeconfig.Load(env).NodeName
		out = append(out, Problem{ID: "node.copies", What: c.What(name), Do: nodecopy.Do}.String())
	}
	return out
}

// WaitWorker waits until the API server calls this worker Ready by a report of the kubelet that runs now, or ctx ends,
// and returns why it is not Ready; "" where it is. It ends early where the cluster has removed the node. It asks
// with the kubelet's own credentials; changes are watched, and only an API server that does not answer is asked
// again every quarter of a second.
func (p *Prober) WaitWorker(ctx context.Context) (why string) {
	name := nodeconfig.Load(p.Env).NodeName
	file := &kube.File{Path: p.Env.Credential("kubelet.config")}
	last := "the cluster was not asked in time"
	// A client's rate limiter refuses what is past the deadline, whose timer may still have to fire.
	ended := func() bool {
		deadline, limited := ctx.Deadline()
		return ctx.Err() != nil || limited && !time.Now().Before(deadline)
	}
	for {
		if gone := Removed(p.Env); gone != "" {
			return gone
		}
		var version string
		core, err := file.Core()
		if err == nil {
			why, version, err = p.worker(ctx, core, name)
		}
		switch {
		case err == nil && why == "":
			return ""
		case err != nil && !ended():
			last = "no API server of the cluster answers: " + err.Error()
		case err == nil:
			last = why
		}
		if ended() {
			return last
		}
		p.awaitWorker(ctx, core, name, version)
	}
}

func ofNode(name string) *metav1.ListOptions {
	return &metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector(metav1.ObjectNameField, name).String()}
}

// worker asks for this worker's Node.
func (p *Prober) worker(ctx context.Context, core *kube.Core, name string) (why, version string, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var list corev1.NodeList
	if err := core.Get().Resource("nodes").VersionedParams(ofNode(name), metav1.ParameterCodec).Do(ctx).Into(&list); err != nil {
		return "", "", err
	}
	states, err := p.Manager.Status(ctx)
	if err != nil {
		return "", "", err
	}
	if len(list.Items) == 0 {
		return "the kubelet has not registered the node yet", list.ResourceVersion, nil
	}
	n := list.Items[0]
	// A worker's kubelet, which waits for nobody, may report within the second of its start.
	s := apiState{nodes: list.Items, started: startedAt(states, p.Now()).Truncate(time.Second), local: name}
	switch c := readyCondition(n); {
	case phaseOf(states, service.Kubelite) != service.Running:
		why = "the kubelet does not run"
	case c == nil || s.stale(n, c) || n.Status.NodeInfo.BootID != nodecopy.Boot(p.Env):
		why = "the kubelet has not reported since it was started"
	case c.Status != corev1.ConditionTrue:
		why = "the node is not Ready: " + shorten(c.Message)
	}
	return why, list.ResourceVersion, nil
}

// awaitWorker returns when this worker's Node changes, or after a while.
func (p *Prober) awaitWorker(ctx context.Context, core *kube.Core, name, version string) {
	pause := time.After(retry)
	if version != "" {
		watch, cancel := context.WithTimeout(ctx, watchLimit)
		defer cancel()
		o := ofNode(name)
		o.Watch, o.ResourceVersion = true, version
		if w, err := core.Get().Resource("nodes").VersionedParams(o, metav1.ParameterCodec).Watch(watch); err == nil {
			defer w.Stop()
			select {
			case <-w.ResultChan():
			case <-watch.Done():
			}
		}
	}
	select {
	case <-ctx.Done():
	case <-pause:
	}
}
