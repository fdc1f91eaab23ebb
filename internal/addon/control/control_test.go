package control

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/addon"
	"microk8s/internal/addon/object"
	"microk8s/internal/kube/kubetest"
	"microk8s/internal/snapenv"
)

// silent answers no questions.
type silent struct{}

func (silent) Step(_ string, do func() error) error { return do() }
func (silent) Say(string)                           {}
func (silent) Note(string)                          {}
func (silent) Ask(string) (string, error)           { return "", nil }

const (
	objects    = "microk8s.io/v1/addons/"
	record     = "v1/namespaces/kube-system/configmaps/microk8s-addon-hostpath-storage"
	daemonset  = "apps/v1/namespaces/kube-system/daemonsets/hostpath-provisioner"
	definition = "apiextensions.k8s.io/v1/customresourcedefinitions/addons.microk8s.io"
)

func newController(t *testing.T) (*Controller, *kubetest.Server) {
	t.Helper()
	f := kubetest.New(t)
	f.Set(map[string]any{"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": map[string]any{"name": "addons.microk8s.io"}})
	env := snapenv.Under(t.TempDir())
	env.Snap = "../../.."
	for _, dir := range []string{filepath.Dir(env.Lock(snapenv.LockAddons)), env.AddonRepositories()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return reopen(t, f, env), f
}

// reopen is a controller of another process.
func reopen(t *testing.T, f *kubetest.Server, env snapenv.Env) *Controller {
	t.Helper()
	set, err := addon.Open(env, f.Config(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return &Controller{Env: env, Set: set, Report: silent{}, Version: "v9", Hook: func(c *exec.Cmd) { c.Env = os.Environ() }}
}

func ask(f *kubetest.Server, name string, spec map[string]any) {
	f.Edit(objects+name, func(o map[string]any) { o["spec"] = spec })
}

// carryOut does what the object asks for; the DaemonSet that appears is ready at once.
func carryOut(t *testing.T, c *Controller, f *kubetest.Server, name string) error {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			if o := f.Get(daemonset); o != nil && o.Object["status"].(map[string]any)["numberAvailable"] != int64(1) {
				f.Edit(daemonset, func(o map[string]any) {
					o["status"] = map[string]any{"desiredNumberScheduled": int64(1), "updatedNumberScheduled": int64(1), "numberAvailable": int64(1)}
				})
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	defer func() { cancel(); <-done }()
	return reopen(t, f, c.Env).CarryOut(t.Context(), name, time.Minute)
}

// want compares what an object says.
func want(t *testing.T, f *kubetest.Server, name, phase, ready, reason, message string) {
	t.Helper()
	o := kubetest.As[object.Addon](f, objects+name)
	if o == nil || len(o.Status.Conditions) != 1 {
		t.Fatalf("%s: %+v", name, o)
	}
	c := o.Status.Conditions[0]
	if o.Status.Phase != phase || string(c.Status) != ready || c.Reason != reason || !strings.Contains(c.Message, message) || c.Message != o.Status.Message {
		t.Errorf("%s: %s, ready %s, %s, %q; want %s, %s, %s, %q", name, o.Status.Phase, c.Status, c.Reason, c.Message, phase, ready, reason, message)
	}
}

// What an object asks for is done, and what a command does is what its object asks for then.
func TestObjectsAndCommandsAreTheSame(t *testing.T) {
	c, f := newController(t)
	c.Set.Publish(t.Context())
	for _, name := range []string{"dns", "hostpath-storage", "metallb"} {
		want(t, f, name, object.Disabled, "True", object.Disabled, "")
	}
	want(t, f, "helm", object.Enabled, "True", object.Enabled, "")
	if f.Get(objects+"storage") != nil || f.Get(objects+"community") != nil {
		t.Error("other names of addons have objects")
	}

	ask(f, "hostpath-storage", map[string]any{"enabled": true, "arguments": []any{"--reclaim-policy=Retain"}})
	if err := carryOut(t, c, f, "hostpath-storage"); err != nil {
		t.Fatal(err)
	}
	want(t, f, "hostpath-storage", object.Enabled, "True", object.Enabled, "")
	if r, on, err := c.Set.Enabled(t.Context(), "hostpath-storage"); err != nil || !on || !r.Complete() || !slices.Equal(r.Args, []string{"--reclaim-policy=Retain"}) {
		t.Errorf("recorded: %+v, %v, %v", r, on, err)
	}
	// A new start of a node changes nothing.
	before := f.Changes()
	reopen(t, f, c.Env).Set.Publish(t.Context())
	if n := f.Changes() - before; n != 0 {
		t.Errorf("writing the objects again made %d changes", n)
	}

	// A mistake is in the condition, and what is on stays on.
	ask(f, "hostpath-storage", map[string]any{"enabled": true, "arguments": []any{"--reclaim-policy=Keep"}})
	if err := carryOut(t, c, f, "hostpath-storage"); err == nil {
		t.Error("a wrong argument was taken")
	}
	want(t, f, "hostpath-storage", object.Enabled, "False", object.Invalid, `--reclaim-policy is Delete or Retain, and not "Keep"`)
	// Neither a start of a node nor an upgrade takes the mistake for carried out.
	if err := reopen(t, f, c.Env).Set.Reconcile(t.Context()); err != nil {
		t.Error(err)
	}
	if o := kubetest.As[object.Addon](f, objects+"hostpath-storage"); o.Done() || o.Spec.Arguments[0] != "--reclaim-policy=Keep" {
		t.Errorf("after a start: %+v", o)
	}

	// The command counts from then on.
	command := reopen(t, f, c.Env)
	command.Set.Declare = true
	if err := command.Enable(t.Context(), Request{Addon: find(t, c, "core/hostpath-storage"), Args: []string{"--reclaim-policy=Delete"}}); err != nil {
		t.Fatal(err)
	}
	if o := kubetest.As[object.Addon](f, objects+"hostpath-storage"); !o.Done() || !slices.Equal(o.Spec.Arguments, []string{"--reclaim-policy=Delete"}) {
		t.Errorf("after the command: %+v", o)
	}
	want(t, f, "hostpath-storage", object.Enabled, "False", object.Starting, "")
	if err := carryOut(t, c, f, "hostpath-storage"); err != nil { // nobody has waited for the pods yet
		t.Fatal(err)
	}
	want(t, f, "hostpath-storage", object.Enabled, "True", object.Enabled, "")
	// An object that was written by something older than the record follows it; nothing is disabled.
	f.Edit(objects+"hostpath-storage", func(o map[string]any) {
		o["spec"] = map[string]any{"enabled": false}
		o["metadata"].(map[string]any)["annotations"] = map[string]any{object.DoneAnnotation: object.Spec{}.Digest()}
	})
	if err := carryOut(t, c, f, "hostpath-storage"); err != nil {
		t.Fatal(err)
	}
	if o := kubetest.As[object.Addon](f, objects+"hostpath-storage"); f.Get(daemonset) == nil || !o.Spec.Enabled || !o.Done() {
		t.Errorf("behind its record: %+v", o)
	}
	if err := command.Disable(t.Context(), Request{Addon: find(t, c, "core/hostpath-storage")}); err != nil {
		t.Fatal(err)
	}
	want(t, f, "hostpath-storage", object.Disabled, "True", object.Disabled, "")
	if o := kubetest.As[object.Addon](f, objects+"hostpath-storage"); o.Spec.Enabled || !o.Done() {
		t.Errorf("disabled by the command: %+v", o)
	}
}

func find(t *testing.T, c *Controller, name string) addon.Addon {
	t.Helper()
	a, err := c.Set.FindFull(name)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// An object that is deleted turns its addon off; the end of the kind itself turns nothing off.
func TestDeletion(t *testing.T) {
	for _, all := range []bool{false, true} {
		c, f := newController(t)
		c.Set.Publish(t.Context())
		ask(f, "hostpath-storage", map[string]any{"enabled": true})
		if err := carryOut(t, c, f, "hostpath-storage"); err != nil {
			t.Fatal(err)
		}
		gone := func(o map[string]any) { o["metadata"].(map[string]any)["deletionTimestamp"] = "2026-01-01T00:00:00Z" }
		if all {
			f.Edit(definition, gone)
		}
		f.Edit(objects+"hostpath-storage", gone)
		if err := carryOut(t, c, f, "hostpath-storage"); err != nil {
			t.Fatal(err)
		}
		if o := f.Get(objects + "hostpath-storage"); len(o.GetFinalizers()) != 0 {
			t.Errorf("the object stays: %v", o.GetFinalizers())
		}
		if on := f.Get(record) != nil && f.Get(daemonset) != nil; on != all {
			t.Errorf("the kind goes, too: %v; the addon is on: %v", all, on)
		}
	}
}

func TestRefusals(t *testing.T) {
	c, f := newController(t)
	c.Set.Publish(t.Context())
	f.Set(map[string]any{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": map[string]any{"name": "microk8s-hostpath", "namespace": "kube-system", "uid": "theirs",
		"managedFields": []any{map[string]any{"manager": "helm", "operation": "Update"}}}})
	for _, name := range []string{"nope", "storage"} {
		f.Set(&object.Addon{TypeMeta: metav1.TypeMeta{APIVersion: object.Group.String(), Kind: "Addon"}, ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: object.Spec{Enabled: true}})
	}
	for _, tc := range []struct {
		name   string
		spec   map[string]any
		phase  string
		reason string
		text   string
	}{
		{"nope", map[string]any{"enabled": true}, object.Disabled, object.Unknown, "Addon core/nope was not found in any repository"},
		{"storage", map[string]any{"enabled": true}, object.Disabled, object.Failed, "stands for hostpath-storage"},
		{"helm", map[string]any{"enabled": false}, object.Enabled, object.Failed, "Helm comes pre-installed"},
		{"metallb", map[string]any{"enabled": true}, object.Disabled, object.Invalid, "it needs arguments: metallb:RANGE"},
		{"metallb", map[string]any{"enabled": true, "arguments": []any{"192.0.2.1-192.0.2.9"}}, object.Disabled, object.Failed, "microk8s-addons-metallb_v9_"},
		{"hostpath-storage", map[string]any{"enabled": true}, object.Disabled, object.Conflict, "ServiceAccount/kube-system/microk8s-hostpath"},
	} {
		ask(f, tc.name, tc.spec)
		if err := carryOut(t, c, f, tc.name); err == nil {
			t.Errorf("%s: no error", tc.name)
		}
		want(t, f, tc.name, tc.phase, "False", tc.reason, tc.text)
	}
	ask(f, "hostpath-storage", map[string]any{"enabled": true, "adopt": true})
	if err := carryOut(t, c, f, "hostpath-storage"); err != nil {
		t.Error(err)
	}
	want(t, f, "hostpath-storage", object.Enabled, "True", object.Enabled, "")
}

// Hooks of repositories that were added to this node run, with the arguments of the object.
func TestHooks(t *testing.T) {
	c, f := newController(t)
	dir := filepath.Join(c.Env.AddonRepository("site"))
	for file, text := range map[string]string{
		"addons.yaml":          "microk8s-addons:\n  addons:\n  - {name: thing, description: A thing, version: '1', check_status: '${SNAP_COMMON}/on', supported_architectures: [amd64, arm64, s390x, ppc64le]}\n",
		"addons/thing/enable":  "#!/bin/sh\n[ \"$1\" = good ] && echo \"$1\" >" + c.Env.Common + "/on\n",
		"addons/thing/disable": "#!/bin/sh\nrm " + c.Env.Common + "/on\n",
	} {
		path := filepath.Join(dir, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(c.Env.Common, 0o755); err != nil {
		t.Fatal(err)
	}
	c = reopen(t, f, c.Env)
	c.Set.Publish(t.Context())
	want(t, f, "site.thing", object.Disabled, "True", object.Disabled, "")
	spec := func(on bool, word string) map[string]any {
		return map[string]any{"enabled": on, "repository": "site", "arguments": []any{word}}
	}
	ask(f, "site.thing", spec(true, "bad"))
	if err := carryOut(t, c, f, "site.thing"); err == nil {
		t.Error("the hook's failure was lost")
	}
	want(t, f, "site.thing", object.Disabled, "False", object.Failed, "its hook ended with exit code 1")
	ask(f, "site.thing", spec(true, "good"))
	if err := carryOut(t, c, f, "site.thing"); err != nil {
		t.Error(err)
	}
	want(t, f, "site.thing", object.Enabled, "True", object.Enabled, "")
	ask(f, "site.thing", spec(false, "good"))
	if err := carryOut(t, c, f, "site.thing"); err != nil {
		t.Error(err)
	}
	want(t, f, "site.thing", object.Disabled, "True", object.Disabled, "")
	if _, err := os.Stat(filepath.Join(c.Env.Common, "on")); err == nil {
		t.Error("the addon is on")
	}
}
