package main

import (
	"context"
	"errors"
	"log/slog"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"

	"microk8s/internal/kubelitestate"
	"microk8s/internal/nodegate"
)

// watchMembership watches the Node object of a worker, by its name, with the kubelet's credentials, and notes in
// the state when the API server refuses them because the node was removed from the cluster: the
// node cannot find out in any other way, and nothing on it works any more.
func watchMembership(ctx context.Context, name, kubeconfig string, state *kubelitestate.Writer, log *slog.Logger) error {
	cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return err
	}
	said := ""
	note := func(err error) {
		why := refusal(err)
		state.Refused(why)
		if why != "" && why != said {
			log.Error("the cluster has removed this node; to use it again: microk8s leave --force, and then join", "err", err)
		}
		said = why
	}
	nodes := client.CoreV1().Nodes()
	own := func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, name).String()
	}
	_, controller := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
			ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				own(&o)
				list, err := nodes.List(ctx, o)
				note(err)
				return list, err
			},
			WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
				own(&o)
				w, err := nodes.Watch(ctx, o)
				note(err)
				return w, err
			},
		}, client),
		ObjectType: &corev1.Node{},
		Handler:    cache.ResourceEventHandlerFuncs{},
	})
	controller.RunWithContext(ctx)
	return nil
}

// refusal returns what the API server says when it refuses the credentials of a node that was
// removed, "" for any other error and for none.
func refusal(err error) string {
	var status apierrors.APIStatus
	if !apierrors.IsForbidden(err) || !errors.As(err, &status) {
		return ""
	}
	message := status.Status().Message
	if !strings.Contains(message, nodegate.NotRegistered) {
		return ""
	}
	if i := strings.LastIndex(message[:strings.Index(message, nodegate.NotRegistered)], ": "); i >= 0 {
		message = message[i+2:]
	}
	return message
}
