package addon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"

	"microk8s/internal/filewatch"
	"microk8s/internal/kube"
)

// resolversAnnotation is on the pods of CoreDNS; it changes when they are to read the host's
// name servers again: a pod reads them only when it starts.
const resolversAnnotation = "microk8s.io/resolvers-changed"

// resolverPause is how long a resolver configuration must have stayed as it is: programs write it
// in several steps.
const resolverPause = time.Second

// resolverLimit bounds the calls for one change.
const resolverLimit = time.Minute

// FollowResolvers restarts the DNS servers when the name servers in one of the files change,
// until ctx ends. Where `enable dns` was given name servers, the host's do not matter.
func (s *Set) FollowResolvers(ctx context.Context, files ...string) error {
	return followResolvers(ctx, s.Log, files, s.restartDNS)
}

// FollowOwnResolvers has the DNS servers of one node replaced when the name servers in one of its files change, until ctx
// ends. It is for workers: core needs no more than the rights of the node's kubelet, which may delete the pods of its node.
func FollowOwnResolvers(ctx context.Context, core *kube.Core, node string, log *slog.Logger, files ...string) error {
	return followResolvers(ctx, log, files, func(ctx context.Context, servers []string) error {
		ctx, cancel := context.WithTimeout(ctx, resolverLimit)
		defer cancel()
		var pods corev1.PodList
		err := core.Get().Namespace(metav1.NamespaceSystem).Resource("pods").Param("labelSelector", "k8s-app=kube-dns").
			Param("fieldSelector", fields.OneTermEqualSelector("spec.nodeName", node).String()).Do(ctx).Into(&pods)
		if err != nil || len(pods.Items) == 0 {
			return err
		}
		// Where name servers were given, the host's do not matter.
		var config corev1.ConfigMap
		err = core.Get().Namespace(metav1.NamespaceSystem).Resource("configmaps").Name("coredns").Do(ctx).Into(&config)
		if err != nil || !strings.Contains(config.Data["Corefile"], "import upstream-") {
			return err
		}
		for _, p := range pods.Items {
			err := core.Delete().Namespace(p.Namespace).Resource("pods").Name(p.Name).
				Body(&metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(p.UID))}).Do(ctx).Error()
			if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
				return err
			}
			log.Info("this node has other name servers: its CoreDNS is replaced", "pod", p.Name, "servers", strings.Join(servers, " "))
		}
		return nil
	})
}

// followResolvers calls changed with the name servers whenever they differ, and again after a while where it fails.
func followResolvers(ctx context.Context, log *slog.Logger, files []string, changed func(context.Context, []string) error) error {
	var real []string
	for _, f := range files { // the folders: the files are replaced by others of their names
		real = append(real, f)
		if target, err := filepath.EvalSymlinks(f); err == nil && target != f {
			real = append(real, target)
		}
	}
	match, folders := filewatch.Files(real...)
	// A folder that is not there has no name servers either.
	events, err := filewatch.Watch(ctx, filewatch.Options{Settle: resolverPause, Match: match, Missing: true}, folders...)
	if err != nil {
		return fmt.Errorf("cannot watch the host's name servers: %w", err)
	}
	now := nameServers(files)
	var due <-chan time.Time
	for {
		select {
		case _, open := <-events:
			if !open {
				if ctx.Err() == nil {
					return errors.New("watching the host's name servers has ended")
				}
				return nil
			}
			due = time.After(0)
		case <-due:
			due = nil
			fresh := nameServers(files)
			if slices.Equal(fresh, now) {
				continue
			}
			if err := changed(ctx, fresh); err != nil {
				log.Warn("cannot pass the host's new name servers to CoreDNS", "err", err, "retry_in", spreadRetry)
				due = time.After(spreadRetry)
				continue
			}
			now = fresh
		case <-ctx.Done():
			return nil
		}
	}
}

// nameServers returns the lines with name servers of several files.
func nameServers(files []string) []string {
	var out []string
	for _, f := range files {
		data, _ := os.ReadFile(f)
		for line := range strings.Lines(string(data)) {
			if words := strings.Fields(line); len(words) > 1 && words[0] == "nameserver" {
				out = append(out, words[1])
			}
		}
		out = append(out, "") // the end of a file
	}
	return out
}

// restartDNS has the pods of CoreDNS replaced, one after the other, if they use the host's name
// servers.
func (s *Set) restartDNS(ctx context.Context, servers []string) error {
	r, on, err := s.Enabled(ctx, "dns")
	if err != nil || !on || len(r.Args) > 0 && r.Args[0] != "" {
		return err
	}
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{"template": map[string]any{"metadata": map[string]any{
		"annotations": map[string]string{resolversAnnotation: time.Now().UTC().Format(time.RFC3339)},
	}}}})
	if err != nil {
		return err
	}
	_, err = s.client.Resource(deployments).Namespace(metav1.NamespaceSystem).Patch(ctx, "coredns", types.MergePatchType, patch, metav1.PatchOptions{FieldManager: "microk8s-resolvers"})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err == nil {
		s.Log.Info("the host has other name servers: restarting CoreDNS", "servers", strings.Join(servers, " "))
	}
	return err
}
