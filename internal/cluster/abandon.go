package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/addon"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/kube"
	"microk8s/internal/snapenv"
)

// AbandonError says what a join would end: the nodes of this node's own cluster, and what runs in it.
// Nothing was changed.
type AbandonError struct {
	Nodes []string // other nodes, by name; their control plane would be gone
	// Members are other members of the datastore, by address, where no nodes are known.
	Members []string
	Data    []string // namespaces, workloads and volume claims that people made, "" for none
	// Unknown is why the nodes could not be listed, although others have joined this node.
	Unknown error
}

func (e *AbandonError) Error() string {
	var out []string
	if len(e.Nodes) > 0 {
		out = append(out, "this node is the control plane of other nodes: "+strings.Join(e.Nodes, ", "))
	}
	if len(e.Members) > 0 {
		out = append(out, "the datastore has other members: "+strings.Join(e.Members, ", "))
	}
	if e.Unknown != nil {
		out = append(out, fmt.Sprintf("other nodes have joined this one, and its API server does not say whether they still do (%v)", e.Unknown))
	}
	if len(e.Data) > 0 {
		out = append(out, "this node's cluster is in use: "+strings.Join(e.Data, ", "))
	}
	return strings.Join(out, "; ")
}

// abandonWait bounds the questions to this node's own API server.
const abandonWait = 10 * time.Second

// abandons returns an *AbandonError where a join would end a cluster that others are part of, or that
// somebody uses.
func (n *Node) abandons(ctx context.Context, self string) error {
	ctx, cancel := context.WithTimeout(ctx, abandonWait)
	defer cancel()
	var e AbandonError
	c, err := n.Kube("client.config", "")
	if err == nil {
		e.Nodes, err = n.otherNodes(ctx, c, self)
	}
	if err != nil {
		if !n.state().Clustered {
			n.Log.Debug("this node's own API server does not answer; it is not known what the join ends", "err", err)
			return nil
		}
		e.Unknown = err
		return &e
	}
	e.Data = inUse(ctx, c)
	if len(e.Nodes) == 0 && len(e.Data) == 0 {
		return nil
	}
	return &e
}

// Others returns an error that names the other nodes of this node's cluster, workers and members of the
// datastore; nil where this node is the only one. Where that cannot be found out and others have joined,
// the error says so.
func Others(ctx context.Context, env snapenv.Env, log *slog.Logger) error {
	n := &Node{Env: env, Log: log}
	n.defaults()
	ctx, cancel := context.WithTimeout(ctx, abandonWait)
	defer cancel()
	self, err := n.Hostname()
	if err != nil {
		return err
	}
	e := AbandonError{}
	c, err := n.Kube("client.config", "")
	if err == nil {
		e.Nodes, err = n.otherNodes(ctx, c, self)
	}
	own := ownMember(env.BackendLive())
	stored, _ := storedir.Dir(env.BackendLive()).Members() // none on a node that was never started
	for _, m := range stored {
		if m.ID != own.ID && len(e.Nodes) == 0 {
			e.Members = append(e.Members, m.Address)
		}
	}
	if err != nil && n.state().Clustered && len(e.Members) == 0 {
		e.Unknown = err
	}
	if len(e.Nodes) == 0 && len(e.Members) == 0 && e.Unknown == nil {
		return nil
	}
	return &e
}

// otherNodes lists the nodes of this node's own cluster that are other machines.
func (n *Node) otherNodes(ctx context.Context, c *kube.Core, self string) (out []string, err error) {
	list, err := c.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	if len(list) == 1 && list[0].Labels[workerLabel] == "" {
		return nil, nil // this node, whatever the host is called and where it is by now
	}
	for _, node := range list {
		if node.Name != self && !n.isOwn(internalIP(&node)) {
			out = append(out, node.Name)
		}
	}
	slices.Sort(out)
	return out, nil
}

// inUse lists what people have made in a cluster, as far as it would be missed: namespaces, volume
// claims, and the workloads of the namespace default. What belongs to addons is left out.
func inUse(ctx context.Context, c *kube.Core) (out []string) {
	const most = 8
	for _, x := range []struct{ path, what string }{
		{"/api/v1/namespaces", "namespace "},
		{"/api/v1/persistentvolumeclaims", "volume claim "},
		{"/apis/apps/v1/namespaces/default/deployments", "deployment "},
		{"/apis/apps/v1/namespaces/default/statefulsets", "stateful set "},
		{"/apis/apps/v1/namespaces/default/daemonsets", "daemon set "},
		{"/apis/batch/v1/namespaces/default/jobs", "job "},
		{"/apis/batch/v1/namespaces/default/cronjobs", "cron job "},
		{"/api/v1/namespaces/default/pods", "pod "},
	} {
		list, err := metadata(ctx, c, x.path)
		if err != nil {
			continue // what is not known cannot be missed
		}
		for _, o := range list.Items {
			switch {
			case o.Labels[addon.Label] != "", len(o.OwnerReferences) > 0 && x.what != "volume claim ",
				x.what == "namespace " && (o.Name == metav1.NamespaceDefault || strings.HasPrefix(o.Name, "kube-")):
			case len(out) == most:
				return append(out, "and more")
			case o.Namespace == "":
				out = append(out, x.what+o.Name)
			default:
				out = append(out, x.what+o.Namespace+"/"+o.Name)
			}
		}
	}
	return out
}

// metadata lists the objects at a path of the API, without what is in them.
func metadata(ctx context.Context, c *kube.Core, path string) (*metav1.PartialObjectMetadataList, error) {
	const limit = "500" // more than are ever named
	data, err := c.Get().AbsPath(path).Param("limit", limit).SetHeader("Accept", addon.MetadataOnly).Do(ctx).Raw()
	if err != nil {
		return nil, err
	}
	var list metav1.PartialObjectMetadataList
	if err := json.Unmarshal(data, &list); err != nil {
		return nil, err
	}
	if !strings.HasSuffix(list.Kind, "List") {
		return nil, errors.New("the answer is no list")
	}
	return &list, nil
}
