package addon

import (
	"context"
	"fmt"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// look is the time between two looks at workloads that are not ready.
const look = 250 * time.Millisecond

// workloads are the kinds that are waited for.
var workloads = map[string]schema.GroupVersionResource{
	"Deployment":  {Group: "apps", Version: "v1", Resource: "deployments"},
	"DaemonSet":   {Group: "apps", Version: "v1", Resource: "daemonsets"},
	"StatefulSet": {Group: "apps", Version: "v1", Resource: "statefulsets"},
}

// final are states of a container that do not end by themselves.
var final = map[string]bool{
	"CrashLoopBackOff": true, "ImagePullBackOff": true, "InvalidImageName": true,
	"CreateContainerConfigError": true,
}

// Wait returns when the workloads among the applied objects are ready; with what they wait for
// when that will not end by itself, or when ctx ends. It calls say with each new reason.
func (s *Set) Wait(ctx context.Context, applied Applied, say func(reason string)) error {
	for _, o := range applied.Objects {
		gvr, ok := workloads[o.GetKind()]
		if !ok {
			continue
		}
		if err := s.waitOne(ctx, gvr, o, say); err != nil {
			return err
		}
	}
	return nil
}

func (s *Set) waitOne(ctx context.Context, gvr schema.GroupVersionResource, o *unstructured.Unstructured, say func(string)) error {
	tick := time.NewTicker(look)
	defer tick.Stop()
	why, workload := "", strings.ToLower(o.GetKind())+"/"+o.GetName()
	for {
		now, err := s.client.Resource(gvr).Namespace(o.GetNamespace()).Get(ctx, o.GetName(), metav1.GetOptions{})
		switch {
		case err == nil && ready(now):
			return nil
		case apierrors.IsNotFound(err):
			return fmt.Errorf("%s was deleted by someone else", workload)
		case err == nil && now.GetKind() == "DaemonSet" && s.restIsDown(ctx, now, say):
			return nil
		case err == nil:
			reason, over := s.obstacle(ctx, now)
			if over {
				return &NotReadyError{Workload: workload, Why: reason}
			}
			if reason != "" && reason != why {
				why = reason
				say(reason)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			if why == "" {
				why = "its pods are not ready"
			}
			return &NotReadyError{Workload: workload, Why: why, cause: ctx.Err()}
		}
	}
}

// NotReadyError is a workload that was not ready when the waiting ended.
type NotReadyError struct {
	Workload, Why string
	cause         error
}

func (e *NotReadyError) Error() string { return e.Workload + " is not ready: " + e.Why }
func (e *NotReadyError) Unwrap() error { return e.cause }

// ready reports whether a workload runs as its specification asks.
func ready(o *unstructured.Unstructured) bool {
	number := func(path ...string) int64 {
		n, _, _ := unstructured.NestedInt64(o.Object, path...)
		return n
	}
	if number("status", "observedGeneration") < o.GetGeneration() {
		return false
	}
	if o.GetKind() == "DaemonSet" {
		want := number("status", "desiredNumberScheduled")
		return want > 0 && number("status", "updatedNumberScheduled") == want && number("status", "numberAvailable") == want
	}
	want := number("spec", "replicas")
	return number("status", "updatedReplicas") == want && number("status", "replicas") == want && number("status", "availableReplicas") == want
}

// restIsDown reports whether a DaemonSet is ready but for its pods on nodes that are down: those
// are started when the nodes are back, by themselves. It says which nodes they are.
func (s *Set) restIsDown(ctx context.Context, o *unstructured.Unstructured, say func(string)) bool {
	number := func(field string) int64 {
		n, _, _ := unstructured.NestedInt64(o.Object, "status", field)
		return n
	}
	observed, want := number("observedGeneration"), number("desiredNumberScheduled")
	if observed < o.GetGeneration() || want == 0 {
		return false
	}
	list, err := s.client.Resource(nodes).List(ctx, metav1.ListOptions{})
	if err != nil {
		return false
	}
	var down []string
	for i := range list.Items {
		if !nodeReady(&list.Items[i]) {
			down = append(down, list.Items[i].GetName())
		}
	}
	if len(down) == 0 || number("numberAvailable")+int64(len(down)) < want || number("updatedNumberScheduled")+int64(len(down)) < want {
		return false
	}
	say(fmt.Sprintf("nodes that are not ready get it once they are: %s", strings.Join(down, " ")))
	return true
}

// Disks returns the nodes that are ready by whether they have disk for pods.
func (s *Set) Disks(ctx context.Context) (pressed, roomy []string, err error) {
	list, err := s.client.Resource(nodes).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, nil, fmt.Errorf("cannot list the nodes: %w", err)
	}
	for i := range list.Items {
		switch node := &list.Items[i]; {
		case !nodeReady(node):
		case conditionTrue(node, "DiskPressure"):
			pressed = append(pressed, node.GetName())
		default:
			roomy = append(roomy, node.GetName())
		}
	}
	return pressed, roomy, nil
}

// nodeReady reports whether a node's kubelet reports that it is ready.
func nodeReady(node *unstructured.Unstructured) bool { return conditionTrue(node, "Ready") }

func conditionTrue(o *unstructured.Unstructured, name string) bool {
	conditions, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
	for _, c := range conditions {
		if m, ok := c.(map[string]any); ok && m["type"] == name {
			return m["status"] == "True"
		}
	}
	return false
}

// obstacle says in a few words what keeps the pods of a workload from being ready, "" where
// there is nothing to tell but that they are starting; over: it will not end by itself.
func (s *Set) obstacle(ctx context.Context, o *unstructured.Unstructured) (why string, over bool) {
	match, _, _ := unstructured.NestedStringMap(o.Object, "spec", "selector", "matchLabels")
	pods, err := s.client.Resource(schema.GroupVersionResource{Version: "v1", Resource: "pods"}).Namespace(o.GetNamespace()).
		List(ctx, metav1.ListOptions{LabelSelector: metav1.FormatLabelSelector(&metav1.LabelSelector{MatchLabels: match})})
	if err != nil {
		return "", false
	}
	newest := configurationOf(o.Object, "spec", "template", "metadata", "annotations")
	for _, p := range pods.Items {
		if p.GetDeletionTimestamp() != nil || configurationOf(p.Object, "metadata", "annotations") != newest {
			continue // it goes, with what it was configured for
		}
		if reason, over := PodObstacle(&p); reason != "" {
			return fmt.Sprintf("pod %s: %s", p.GetName(), reason), over
		}
	}
	conditions, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
	for _, c := range conditions {
		m, _ := c.(map[string]any)
		if m["type"] == "ReplicaFailure" && m["status"] == "True" {
			return fmt.Sprint(m["message"]), false
		}
	}
	return "", false
}

func configurationOf(object map[string]any, annotations ...string) string {
	all, _, _ := unstructured.NestedStringMap(object, annotations...)
	return all[configurationAnnotation]
}

// PodObstacle returns what a pod's status says about why it does not run, "" where it says nothing; over:
// it will not end by itself.
func PodObstacle(p *unstructured.Unstructured) (why string, over bool) {
	for _, list := range []string{"initContainerStatuses", "containerStatuses"} {
		statuses, _, _ := unstructured.NestedSlice(p.Object, "status", list)
		for _, c := range statuses {
			m, _ := c.(map[string]any)
			reason, _, _ := unstructured.NestedString(m, "state", "waiting", "reason")
			if reason == "" || reason == "ContainerCreating" || reason == "PodInitializing" {
				continue
			}
			message, _, _ := unstructured.NestedString(m, "state", "waiting", "message")
			if words, _, _ := unstructured.NestedString(m, "lastState", "terminated", "message"); words != "" {
				lines := strings.Split(strings.TrimSpace(words), "\n")
				message = "its last words: " + lines[len(lines)-1]
			}
			return strings.TrimSuffix(reason+": "+message, ": "), final[reason]
		}
	}
	// One that was evicted, or that the kubelet did not take.
	if phase, _, _ := unstructured.NestedString(p.Object, "status", "phase"); phase == "Failed" {
		reason, _, _ := unstructured.NestedString(p.Object, "status", "reason")
		message, _, _ := unstructured.NestedString(p.Object, "status", "message")
		return strings.TrimSuffix(strings.TrimSpace(reason+": "+message), ":"), false
	}
	conditions, _, _ := unstructured.NestedSlice(p.Object, "status", "conditions")
	for _, c := range conditions {
		m, _ := c.(map[string]any)
		if m["type"] == "PodScheduled" && m["status"] == "False" {
			return fmt.Sprintf("no node can take it: %v", m["message"]), false
		}
	}
	return "", false
}
