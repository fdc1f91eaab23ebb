package node

import (
	"fmt"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// webImage is built from tests/images/web; the node could not pull it from anywhere.
const webImage = "microk8s.test/web:1"

// nodePort is where the service of the tests answers on every node's address.
const nodePort = 30080

// deployWeb makes a Deployment of two replicas and a Service in front of it.
func (n *node) deployWeb(t *testing.T) {
	t.Helper()
	n.loadWebImage(t)
	labels := map[string]string{"app": "web"}
	replicas := int32(2)
	_, err := n.client.AppsV1().Deployments("default").Create(t.Context(), &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas,
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec: corev1.PodSpec{
					TerminationGracePeriodSeconds: new(int64),
					Containers:                    []corev1.Container{{Name: "web", Image: webImage, ImagePullPolicy: corev1.PullNever}},
				},
			},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = n.client.CoreV1().Services("default").Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec: corev1.ServiceSpec{
			Type:     corev1.ServiceTypeNodePort,
			Selector: labels,
			Ports:    []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(8080), NodePort: nodePort}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	n.waitDeployment(t, "web")
}

func (n *node) waitDeployment(t *testing.T, name string) {
	t.Helper()
	eventually(t, 2*time.Minute, func() error {
		d, err := n.client.AppsV1().Deployments("default").Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if d.Status.AvailableReplicas != *d.Spec.Replicas || d.Status.ObservedGeneration != d.Generation {
			return fmt.Errorf("%s has %d of %d replicas", name, d.Status.AvailableReplicas, *d.Spec.Replicas)
		}
		return nil
	})
}

// webPods returns the names of the running pods of the Deployment web.
func (n *node) webPods(t *testing.T) []string {
	t.Helper()
	pods, err := n.client.CoreV1().Pods("default").List(t.Context(), metav1.ListOptions{LabelSelector: "app=web"})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, p := range pods.Items {
		if p.DeletionTimestamp == nil && p.Status.Phase == corev1.PodRunning {
			names = append(names, p.Name)
		}
	}
	return names
}

// testService asks through the cluster IP from the node and from a pod, and through the node
// port from another host, until each way was answered by both replicas.
func (n *node) testService(t *testing.T, otherHost string) {
	svc, err := n.client.CoreV1().Services("default").Get(t.Context(), "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	pods := n.webPods(t)
	if len(pods) != 2 {
		t.Fatalf("running pods %q, want 2", pods)
	}
	clusterIP := "http://" + svc.Spec.ClusterIP
	for _, way := range []struct {
		name string
		get  func() (string, error)
	}{
		{"cluster IP from the node", func() (string, error) { return n.httpGet(t, n.name, clusterIP) }},
		{"cluster IP from a pod", func() (string, error) {
			return n.try(t, "microk8s", "kubectl", "exec", pods[0], "--", "/web", "wget", clusterIP)
		}},
		{"node port from another host", func() (string, error) {
			return n.httpGet(t, otherHost, fmt.Sprintf("http://%s:%d", n.ip(t), nodePort))
		}},
	} {
		t.Run(way.name, func(t *testing.T) {
			seen := map[string]bool{}
			eventually(t, time.Minute, func() error {
				answer, err := way.get()
				if err != nil {
					return err
				}
				seen[strings.TrimSpace(answer)] = true
				if !seen[pods[0]] || !seen[pods[1]] {
					return fmt.Errorf("answers came from %v, want from each of %q", seen, pods)
				}
				return nil
			})
		})
	}
}

// testExecLogsForward goes the ways that lead from the API server to the kubelet.
func (n *node) testExecLogsForward(t *testing.T) {
	pod := n.webPods(t)[0]
	if got := n.run(t, "microk8s", "kubectl", "exec", pod, "--", "/web", "hostname"); strings.TrimSpace(got) != pod {
		t.Errorf("exec hostname printed %q, want %q", got, pod)
	}
	if got := n.runIn(t, "hello\n", "microk8s", "kubectl", "exec", "-i", pod, "--", "/web", "write", "/tmp-file"); got != "" {
		t.Errorf("exec with stdin printed %q", got)
	}
	if got := n.run(t, "microk8s", "kubectl", "exec", pod, "--", "/web", "cat", "/tmp-file"); got != "hello\n" {
		t.Errorf("what went in through stdin came back as %q", got)
	}
	if _, err := n.try(t, "microk8s", "kubectl", "exec", pod, "--", "/web", "exit", "7"); exitCode(err) != 7 {
		t.Errorf("exec of a failing command: %v, want exit code 7", err)
	}
	if got := n.run(t, "microk8s", "kubectl", "logs", pod); !strings.Contains(got, pod+" serves on") {
		t.Errorf("logs are %q", got)
	}

	stop := n.background(t, "microk8s", "kubectl", "port-forward", "--address", n.ip(t), "pod/"+pod, "18080:8080")
	defer stop()
	eventually(t, time.Minute, func() error {
		got, err := n.httpGet(t, n.name, "http://"+n.ip(t)+":18080/")
		if err == nil && strings.TrimSpace(got) != pod {
			err = fmt.Errorf("answered %q, want %q", got, pod)
		}
		return err
	})
}
