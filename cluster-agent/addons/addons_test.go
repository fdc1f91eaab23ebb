package addons

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"microk8s/internal/addon/object"
	"microk8s/internal/kube/kubetest"
	"microk8s/internal/snapenv"
)

const dns = "microk8s.io/v1/addons/dns"

// start follows the objects of f, and returns the names that are carried out.
func start(t *testing.T, f *kubetest.Server, c *Controller) <-chan string {
	t.Helper()
	ran := make(chan string, 100)
	inner := c.Exec
	c.Env, c.Host, c.Log, c.Command = snapenv.Under(t.TempDir()), "here", slog.New(slog.DiscardHandler), []string{"carry-out"}
	c.Config = func() (*rest.Config, error) { return f.Config(), nil }
	c.Exec = func(ctx context.Context, in io.Reader, argv ...string) error {
		ran <- argv[1]
		return inner(ctx, in, argv...)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = c.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
	for f.Watches("addons") == 0 {
		time.Sleep(5 * time.Millisecond)
	}
	return ran
}

func leader(f *kubetest.Server, holder string) {
	f.Set(map[string]any{"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": map[string]any{"name": lease, "namespace": "kube-system"},
		"spec": map[string]any{"holderIdentity": holder}})
}

func settled(spec object.Spec) *object.Addon {
	o := &object.Addon{TypeMeta: metav1.TypeMeta{APIVersion: object.Group.String(), Kind: "Addon"}, ObjectMeta: metav1.ObjectMeta{Name: "dns"}, Spec: spec}
	o.Annotations = map[string]string{object.DoneAnnotation: spec.Digest()}
	o.Set(object.Disabled, "1", object.Disabled, "")
	return o
}

// TestChanges holds that what is asked for is carried out at once, on the node that leads, once.
func TestChanges(t *testing.T) {
	f := kubetest.New(t)
	leader(f, "HERE_uuid")
	f.Set(settled(object.Spec{}))
	ran := start(t, f, &Controller{patience: time.Millisecond, Exec: func(context.Context, io.Reader, ...string) error {
		if o := kubetest.As[object.Addon](f, dns); o != nil {
			f.Set(settled(o.Spec))
		}
		return nil
	}})
	for i := range 3 {
		f.Edit(dns, func(o map[string]any) { o["spec"] = map[string]any{"enabled": i%2 == 0} })
		if name := <-ran; name != "dns" {
			t.Errorf("%s was carried out", name)
		}
		for !kubetest.As[object.Addon](f, dns).Settled() {
			time.Sleep(5 * time.Millisecond)
		}
	}
	// Another one has enabled it, and its pods are not ready: that is followed.
	f.Edit(dns, func(o map[string]any) {
		o["status"].(map[string]any)["conditions"].([]any)[0].(map[string]any)["status"] = "False"
	})
	<-ran
	// One that was deleted is written again.
	for !kubetest.As[object.Addon](f, dns).Settled() {
		time.Sleep(5 * time.Millisecond)
	}
	f.Remove(dns)
	<-ran
	if n := len(ran); n != 0 {
		t.Errorf("%d more were carried out", n)
	}
}

// TestOthersLead holds that a node leaves objects to the one that leads, as long as that one does it.
func TestOthersLead(t *testing.T) {
	f := kubetest.New(t)
	leader(f, "there_uuid")
	o := settled(object.Spec{})
	o.Spec.Enabled = true
	f.Set(o)
	fail := func(context.Context, io.Reader, ...string) error { return errors.New("no") }
	v := start(t, f, &Controller{Exec: fail})
	late := start(t, f, &Controller{Exec: fail, standby: time.Nanosecond})
	<-late // asks a second time, after a pause
	if len(v) != 0 {
		t.Error("a node that does not lead has carried out an object")
	}
}
