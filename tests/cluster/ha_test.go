package cluster

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"microk8s/internal/datastore/peers"
	"microk8s/internal/longtest"
)

// TestHA joins three control-plane nodes and a worker, and takes each of them away in turn.
func TestHA(t *testing.T) {
	controlPlane := []string{"n1", "n2", "n3"}
	c := newCluster(t, append(slices.Clone(controlPlane), "w1")...)
	step := steps(t)
	step("join", func(t *testing.T) {
		c.start(t, "n1")
		c.wantHA(t, "n1", "no", 1)
		c.join(t, "n1", "n2")
		if out := c.status(t, "n2").out; !strings.Contains(out, "two nodes do not tolerate a loss") {
			t.Errorf("status of two nodes:\n%s", out)
		}
		c.join(t, "n2", "n3")
		c.join(t, "n3", "w1", "--worker")
		for _, n := range append(slices.Clone(controlPlane), "w1") {
			c.waitReady(t, "n1", n)
		}
	})
	step("high availability", func(t *testing.T) {
		var want []string
		for _, n := range controlPlane {
			want = append(want, c.ip(t, n)+":19001")
		}
		for _, n := range controlPlane {
			c.wantHA(t, n, "yes", 3)
			out := c.status(t, n).out
			if line := "  datastore master nodes: " + strings.Join(want, " ") + "\n  datastore standby nodes: none\n"; !strings.Contains(out, line) {
				t.Errorf("status of %s does not say %q:\n%s", n, line, out)
			}
			if _, err := os.Stat(c.path(n, "var/lock/no-cert-reissue")); err != nil {
				t.Error(err)
			}
		}
	})
	step("pods across hosts", func(t *testing.T) { c.testPods(t, append(slices.Clone(controlPlane), "w1")) })
	step("two joins at once are refused on members", func(t *testing.T) {
		for _, n := range []string{"n2", "w1"} {
			if r := c.try(t, n, c.line(t, "n1")...); r.code != 1 || !strings.Contains(r.err, "microk8s leave") {
				t.Errorf("a join of %s: %s", n, r)
			}
		}
		if r := c.try(t, "n1", "microk8s", "remove-node", "n3"); r.code != 1 || !strings.Contains(r.out, "is registered with dqlite") {
			t.Errorf("removing a member: %s", r)
		}
		if r := c.try(t, "n1", "microk8s", "remove-node", "nobody"); r.code != 1 || !strings.Contains(r.out, "Node nobody does not exist in Kubernetes.") {
			t.Errorf("removing nobody: %s", r)
		}
	})
	step("arguments edited on one node only", func(t *testing.T) { c.testArguments(t, controlPlane) })
	step("an address for the API", func(t *testing.T) { c.testAPIAddress(t, "w1") })
	step("the leader is killed", func(t *testing.T) {
		leader := c.leader(t, controlPlane)
		c.testFault(t, controlPlane, leader, "killed",
			func() error { return c.lab.Kill(t.Context(), leader) }, func() error { return c.lab.Start(t.Context(), leader) })
		c.wantOneHolder(t, "w1", controlPlane...)
		if longtest.Enabled() {
			c.testAPIAddressMoves(t, "w1", controlPlane...)
		}
		c.run(t, "n1", "microk8s", "network", "api-address", "none")
	})
	faults := []func(){}
	for _, n := range controlPlane {
		faults = append(faults,
			func() {
				step(n+" is frozen", func(t *testing.T) {
					c.testFault(t, controlPlane, n, "frozen",
						func() error { return c.lab.Pause(t.Context(), n) }, func() error { return c.lab.Resume(t.Context(), n) })
				})
			},
			func() {
				step(n+" is cut off", func(t *testing.T) {
					c.testFault(t, controlPlane, n, "cut off",
						func() error { return c.lab.Cut(t.Context(), n, "") }, func() error { return c.lab.Heal(t.Context()) })
				})
			})
	}
	if !longtest.Enabled() { // one of each kind
		i := 2 * c.rand.IntN(len(controlPlane))
		j := 2 * c.rand.IntN(len(controlPlane))
		faults = []func(){faults[i], faults[j+1]}
	}
	for _, f := range faults {
		f()
	}
	step("a node that is gone for good", func(t *testing.T) {
		if err := c.lab.Kill(t.Context(), "n3"); err != nil {
			t.Fatal(err)
		}
		eventually(t, time.Minute, func() error {
			out := c.status(t, "n1").out
			if !strings.Contains(out, c.ip(t, "n3")+":19001 does not answer") || !strings.Contains(out, "high-availability: no") {
				return fmt.Errorf("status: %s", out)
			}
			return nil
		})
		c.run(t, "n1", "microk8s", "remove-node", "n3", "--force")
		c.wantNodes(t, "n1", "n1", "n2", "w1")
		// The machine comes back, without having left, and is made to.
		if err := c.lab.Start(t.Context(), "n3"); err != nil {
			t.Fatal(err)
		}
		c.run(t, "n3", "microk8s", "leave", "--force")
		c.waitReady(t, "n3", "n3")
		c.wantNodes(t, "n3", "n3")
		c.wantNodes(t, "n1", "n1", "n2", "w1")
		c.noSecrets(t, "n3", "n1")
	})
	step("interrupted join", func(t *testing.T) {
		c.mark(t, "n3", "single")
		c.testInterrupted(t, "join", "n1", "n3")
	})
	step("it joins again", func(t *testing.T) {
		c.join(t, "n2", "n3")
		c.wantHA(t, "n3", "yes", 3)
	})
	step("the first node leaves", func(t *testing.T) {
		c.testInterruptedLeave(t, "n1")
		c.wantNodes(t, "n1", "n1")
		c.noSecrets(t, "n1", "n2")
		c.testInterruptedRemove(t, "n2", c.ip(t, "n1"))
		c.wantNodes(t, "n2", "n2", "n3", "w1")
		c.wantHA(t, "n2", "no", 2)
		c.waitReady(t, "n2", "w1")
	})
	step("and so on to the last one", func(t *testing.T) {
		leaving, last := "n2", "n3"
		if c.rand.IntN(2) == 0 {
			leaving, last = last, leaving
		}
		c.run(t, leaving, "microk8s", "leave")
		c.run(t, last, "microk8s", "remove-node", leaving)
		c.wantNodes(t, last, last, "w1")
		c.run(t, "w1", "microk8s", "leave")
		c.run(t, last, "microk8s", "remove-node", "w1")
		c.wantNodes(t, last, last)
		if r := c.try(t, last, "microk8s", "leave"); r.code != 0 || !strings.Contains(r.err, "only node of its cluster") {
			t.Errorf("the last node leaves: %s", r)
		}
		c.wantWrites(t, last) // and keeps all that was ever acknowledged
	})
}

// wantHA waits until a node's status says so, with so many members.
func (c *cluster) wantHA(t *testing.T, host, yes string, members int) {
	t.Helper()
	eventually(t, time.Minute, func() error {
		r := c.status(t, host)
		if !strings.Contains(r.out, "high-availability: "+yes+"\n") {
			return fmt.Errorf("status of %s: %s", host, r)
		}
		list, err := c.members(t, host)
		if err != nil {
			return err
		}
		if len(list) != members {
			return fmt.Errorf("%s has the members %v", host, list)
		}
		return nil
	})
}

// members asks a node's datastore.
func (c *cluster) members(t *testing.T, host string) ([]peers.Member, error) {
	info, err := c.lab.Info(t.Context(), host)
	if err != nil {
		return nil, err
	}
	// Through the process: the path of a socket must be short.
	return peers.Members(t.Context(), fmt.Sprintf("/proc/%d/root/var/snap/microk8s/common/var/kubernetes/backend", info.PID))
}

// leader returns the host that leads the datastore.
func (c *cluster) leader(t *testing.T, hosts []string) string {
	t.Helper()
	found := ""
	eventually(t, time.Minute, func() error {
		list, err := c.members(t, hosts[0])
		if err != nil {
			return err
		}
		for _, m := range list {
			for _, h := range hosts {
				if m.Leader && m.Address == net.JoinHostPort(c.ip(t, h), "19001") {
					found = h
					return nil
				}
			}
		}
		return fmt.Errorf("nobody leads: %v", list)
	})
	return found
}

// testPods runs a pod on every host and has each ask all others, and the Service.
func (c *cluster) testPods(t *testing.T, hosts []string) {
	for _, h := range hosts {
		c.loadWebImage(t, h)
	}
	k := c.client(t, hosts[0])
	labels := map[string]string{"app": "web"}
	_, err := k.AppsV1().DaemonSets("default").Create(t.Context(), &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec: appsv1.DaemonSetSpec{
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
	svc, err := k.CoreV1().Services("default").Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec:       corev1.ServiceSpec{Selector: labels, Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(8080)}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var pods []corev1.Pod
	eventually(t, 2*time.Minute, func() error {
		list, err := k.CoreV1().Pods("default").List(t.Context(), metav1.ListOptions{LabelSelector: "app=web"})
		if err != nil {
			return err
		}
		pods = nil
		for _, p := range list.Items {
			if p.Status.Phase == corev1.PodRunning && p.Status.PodIP != "" {
				pods = append(pods, p)
			}
		}
		if len(pods) != len(hosts) {
			return fmt.Errorf("%d of %d pods run", len(pods), len(hosts))
		}
		return nil
	})
	for _, from := range pods {
		ask := func(url string) (string, error) {
			r := c.try(t, hosts[0], "microk8s", "kubectl", "exec", from.Name, "--", "/web", "wget", url)
			if r.code != 0 {
				return "", fmt.Errorf("from the pod on %s: %s: %s", from.Spec.NodeName, url, r)
			}
			return strings.TrimSpace(r.out), nil
		}
		for _, to := range pods {
			eventually(t, time.Minute, func() error {
				_, err := ask("http://" + to.Status.PodIP + ":8080")
				return err
			})
		}
		seen := map[string]bool{}
		eventually(t, time.Minute, func() error {
			answer, err := ask("http://" + svc.Spec.ClusterIP)
			if err != nil {
				return err
			}
			if seen[answer] = true; len(seen) < 2 {
				return fmt.Errorf("the Service always answers %q", answer)
			}
			return nil
		})
	}
	for _, h := range hosts {
		eventually(t, time.Minute, func() error {
			_, err := c.httpGet(h, "http://"+svc.Spec.ClusterIP)
			return err
		})
	}
}

// testFault writes through all control-plane nodes while something is done to one of them. What
// was acknowledged is there afterwards, on each of them; the worker and who goes through its
// proxy carry on.
func (c *cluster) testFault(t *testing.T, hosts []string, victim, what string, begin, end func() error) {
	others := slices.DeleteFunc(slices.Clone(hosts), func(h string) bool { return h == victim })
	clients := map[string]*kubernetes.Clientset{"proxy": c.throughProxy(t, hosts[0], "w1")}
	for _, h := range hosts {
		clients[h] = c.client(t, h)
	}
	w := c.write(t, victim+" "+what, clients)
	w.goOn(t, 50, "")
	w.fault()
	if err := begin(); err != nil {
		t.Fatal(err)
	}
	// The first may have been under way.
	w.goOn(t, 100, "")
	w.goOn(t, 50, "proxy")
	lease := func() time.Time {
		l, err := c.client(t, others[0]).CoordinationV1().Leases("kube-node-lease").Get(t.Context(), "w1", metav1.GetOptions{})
		if err != nil || l.Spec.RenewTime == nil {
			return time.Time{}
		}
		return l.Spec.RenewTime.Time
	}
	renewed := lease()
	eventually(t, 2*time.Minute, func() error { // the worker's kubelet goes on
		if !lease().After(renewed) {
			return fmt.Errorf("the worker's lease was renewed at %s last", renewed)
		}
		return nil
	})
	if err := end(); err != nil {
		t.Fatal(err)
	}
	for _, h := range hosts {
		c.wantHA(t, h, "yes", len(hosts))
		c.waitReady(t, h, victim)
	}
	w.goOn(t, 50, "")
	c.end(t, w)
	for _, h := range hosts {
		c.wantWrites(t, h)
	}
}

// throughProxy makes the administrator of one node a way through the proxy of a worker.
func (c *cluster) throughProxy(t *testing.T, admin, worker string) *kubernetes.Clientset {
	t.Helper()
	data, err := os.ReadFile(c.path(admin, "credentials/client.config"))
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := clientcmd.RESTConfigFromKubeConfig(data)
	if err != nil {
		t.Fatal(err)
	}
	cfg.QPS, cfg.Timeout, cfg.Dial = -1, 15*time.Second, c.dialer(worker)
	k, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// noSecrets checks that a node that left has nothing of the cluster that it was in.
func (c *cluster) noSecrets(t *testing.T, left, member string) {
	t.Helper()
	for _, name := range []string{"certs/ca.key", "certs/serviceaccount.key", "var/kubernetes/backend/cluster.key", "credentials/callback-token.txt"} {
		theirs, err := os.ReadFile(c.real(member, name))
		if err != nil {
			t.Errorf("%s: %v", member, err)
			continue
		}
		if own, err := os.ReadFile(c.real(left, name)); err == nil && string(own) == string(theirs) {
			t.Errorf("%s still has the cluster's %s", left, name)
		}
	}
}

// testInterruptedRemove kills a removal at one of its points, and runs it again.
func (c *cluster) testInterruptedRemove(t *testing.T, host, node string) {
	p := c.points(t, "remove-node", 1)[0]
	t.Run(p, func(t *testing.T) {
		c.wantKilled(t, host, p, "microk8s", "remove-node", node)
		c.run(t, host, "microk8s", "remove-node", node)
	})
}

// testArguments edits an argument of the API server on one node, and the content of a file on another;
// every member's status names both until they are as before.
func (c *cluster) testArguments(t *testing.T, members []string) {
	says := func(want ...string) {
		t.Helper()
		for _, n := range members {
			eventually(t, time.Minute, func() error {
				var problems []string
				for line := range strings.Lines(c.status(t, n).out) {
					if _, rest, ok := strings.Cut(line, "depends on which API server it reaches: "); ok {
						problems = append(problems, strings.TrimSpace(rest))
					}
				}
				if !slices.Equal(problems, want) {
					return fmt.Errorf("status of %s names %q, want %q", n, problems, want)
				}
				return nil
			})
		}
	}
	edit := func(n, file string, change func(string) string) (undo func()) {
		t.Helper()
		path := c.path(n, "args/"+file)
		old, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		write := func(text string) {
			if err := os.WriteFile(path, []byte(text), 0o660); err != nil {
				t.Fatal(err)
			}
		}
		write(change(string(old)))
		return func() { write(string(old)) }
	}
	says()
	undo := []func(){
		edit("n2", "kube-apiserver", func(s string) string { return s + "\n--feature-gates=AllAlpha=false\n" }),
		edit("n1", "kube-apiserver", func(s string) string { return s + "\n# a comment is no difference\n" }),
		edit("n3", "audit-policy.yaml", func(s string) string { return strings.Replace(s, "level: Metadata", "level: None", 1) }),
	}
	says("--audit-policy-file differs (n1 and n2 have one value, n3 has another)", "--feature-gates differs (n1 and n3 do not set it, n2 has one value)")
	for _, u := range undo {
		u()
	}
	says()
}
