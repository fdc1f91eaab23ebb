package cluster

import (
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"microk8s/cluster-agent/api"
	membership "microk8s/internal/cluster"
	"microk8s/internal/longtest"
)

const killed = 128 + 9

// TestWorker joins a worker and takes it out again, the second with every refusal that there is.
func TestWorker(t *testing.T) {
	c := newCluster(t, "n1", "w1")
	step := steps(t)
	step("start", func(t *testing.T) {
		c.start(t, "n1")
		c.mark(t, "n1", "cluster")
		c.start(t, "w1") // the worker is a single node with data before
		c.mark(t, "w1", "single")
	})
	step("refused", func(t *testing.T) { c.testRefused(t, "n1", "w1") })
	step("somebody in the middle", func(t *testing.T) { c.testMiddle(t, "n1", "w1") })
	step("interrupted and taken back", func(t *testing.T) { c.testInterrupted(t, "join-worker", "n1", "w1", "--worker") })
	step("join", func(t *testing.T) {
		// As launch configurations do it, which are one text for all machines: a token that was chosen
		// before, and no fingerprint. The agent begins the join, which stops the agent.
		const token = "3fa90b71c2d84e65a7f018d9b36c52e4"
		c.run(t, "n1", "microk8s", "add-node", "--token", token, "--token-ttl", "7200")
		file := c.lab.Root("w1") + "/var/snap/microk8s/common/etc/launcher/join.yaml"
		text := fmt.Sprintf("version: 0.2.0\njoin: {url: %q, worker: true}\n", c.ip(t, "n1")+":"+c.port+"/"+token)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		eventually(t, 4*time.Minute, func() error {
			if _, err := os.Stat(file + ".applied"); err != nil {
				why, _ := os.ReadFile(file + ".error")
				return fmt.Errorf("%w: %s", err, why)
			}
			return nil
		})
		c.waitReady(t, "n1", "w1")
		n, err := c.node(t, "n1", "w1")
		if err != nil {
			t.Fatal(err)
		}
		if n.Labels["node.kubernetes.io/microk8s-worker"] == "" {
			t.Errorf("labels: %v", n.Labels)
		}
		for file, want := range map[string]string{
			"args/traefik/provider.yaml": c.ip(t, "n1") + ":16443", // the documented place
			"credentials/kubelet.config": "https://127.0.0.1:16443",
		} {
			if data, err := os.ReadFile(c.path("w1", file)); err != nil || !strings.Contains(string(data), want) {
				t.Errorf("%s does not contain %s: %v\n%s", file, want, err, data)
			}
		}
		if r := c.status(t, "w1"); !strings.Contains(r.out, "acting as a node in a cluster") {
			t.Errorf("status: %s", r)
		}
		c.wantWays(t, "n1")
		c.wantWays(t, "w1")
		if r := c.try(t, "w1", c.line(t, "n1")...); r.code != 1 || !strings.Contains(r.err, "microk8s leave") {
			t.Errorf("joining twice: %s", r)
		}
		if r := c.try(t, "w1", "microk8s", "remove-node", "n1"); r.code != 1 || !strings.Contains(r.out, "Please use microk8s leave.") {
			t.Errorf("remove-node on a worker: %s", r)
		}
	})
	step("no secrets of the control plane", func(t *testing.T) {
		for _, name := range []string{"ca.key", "serviceaccount.key"} {
			theirs, err := os.ReadFile(c.path("n1", "certs/"+name))
			if err != nil {
				t.Fatal(err)
			}
			if own, err := os.ReadFile(c.path("w1", "certs/"+name)); err == nil && string(own) == string(theirs) {
				t.Errorf("the worker has the cluster's %s", name)
			}
		}
		left, _ := os.ReadDir(c.lab.Root("w1") + "/var/snap/microk8s/common/var/cluster")
		for _, e := range left {
			if strings.HasPrefix(e.Name(), "answer") || e.Name() == "journal" {
				t.Errorf("%s was left behind", e.Name())
			}
		}
	})
	step("root on the worker", func(t *testing.T) { c.testWorkerRoot(t, "n1", "w1", false) })
	step("a pod in the worker's network", func(t *testing.T) { c.testWorkerGuest(t, "n1", "w1") })
	step("leave", func(t *testing.T) {
		c.testInterruptedLeave(t, "w1")
		c.run(t, "n1", "microk8s", "remove-node", "w1")
		c.wantNodes(t, "n1", "n1")
		c.wantNodes(t, "w1", "w1")
		c.wantMark(t, "w1", "")
		c.wantMark(t, "n1", "cluster")
		if out := c.run(t, "w1", "microk8s", "status", "--wait-ready", "--timeout", "120"); !strings.Contains(out, "microk8s is running") {
			t.Errorf("status: %s", out)
		}
		if data, err := os.ReadFile(c.path("w1", "args/kubelet")); err != nil || strings.Contains(string(data), "microk8s-worker") {
			t.Errorf("the worker's labels are still set: %v", err)
		}
		if r := c.try(t, "w1", "microk8s", "leave"); r.code != 1 || !strings.Contains(r.out, "not acting as a node in a cluster") {
			t.Errorf("leaving twice: %s", r)
		}
	})
	step("join again", func(t *testing.T) {
		c.testStrange(t, "n1", "w1", "--worker")
		c.waitReady(t, "n1", "w1")
	})
	step("removed, and still there", func(t *testing.T) {
		if status, body := c.askAgent(t, "w1", "n1", c.workerPair(t, "w1"), api.PathRenew, api.RenewRequest{}); status != http.StatusOK {
			t.Fatalf("renew: %d %s", status, body)
		}
		c.run(t, "n1", "microk8s", "remove-node", "w1", "--force")
		if status, body := c.askAgent(t, "w1", "n1", c.workerPair(t, "w1"), api.PathRenew, api.RenewRequest{}); status != http.StatusUnauthorized {
			t.Errorf("renew with the certificate of a node that was removed: %d %s", status, body)
		}
		removed := func(when string) {
			eventually(t, time.Minute, func() error {
				if r := c.status(t, "w1"); !strings.Contains(r.out, "the cluster has removed this node") || !strings.Contains(r.out, "microk8s leave") {
					return fmt.Errorf("status of w1 %s: %s", when, r)
				}
				return nil
			})
		}
		removed("at once")
		c.run(t, "w1", "microk8s", "stop")
		if r := c.try(t, "w1", "microk8s", "start"); r.code != 1 || !strings.Contains(r.err, "the cluster has removed this node") {
			t.Errorf("start: %s", r)
		}
		removed("after a restart")
		c.wantNodes(t, "n1", "n1")
	})
}

// testRefused gives lines that must not join a node, and wants it to be as before.
func (c *cluster) testRefused(t *testing.T, from, host string) {
	ip := c.ip(t, from)
	line := func(flags ...string) string { return c.line(t, from, flags...)[2] }
	id := func(join string) string { // of the newest token
		out := c.run(t, from, "microk8s", "add-node", "--list", "--format", "short")
		lines := strings.Split(strings.TrimSpace(out), "\n")
		return strings.Fields(lines[len(lines)-1])[0]
	}
	const chosen, guessable = "7c1f0e5b93a84d26b0e9f3127ad5c846", "a-token-that-somebody-has-chosen-1"
	for _, tc := range []struct {
		name string
		args func() []string
		code int
		want string
	}{
		{"not a line", func() []string { return []string{ip} }, 1, "Expected format"},
		{"a made-up token", func() []string {
			return []string{ip + ":25000/" + strings.Repeat("0", 32) + "/" + strings.Repeat("0", 64)}
		}, 4, "Could not verify the identity"},
		{"a changed token", func() []string { return []string{strings.Replace(line(), ":25000/", ":25000/0", 1)} }, 1, ""},
		{"nobody there", func() []string { return []string{strings.Replace(line(), ":25000/", ":25009/", 1)} }, 5, "Connecting to cluster failed"},
		{"a revoked token", func() []string {
			l := line()
			c.run(t, from, "microk8s", "add-node", "--revoke", id(l))
			return []string{l}
		}, 6, "revoked"},
		{"a worker's token for a control-plane node", func() []string { return []string{line("--worker")} }, 6, "worker"},
		{"a token for another name", func() []string { return []string{line("--name", "other"), "--worker"} }, 6, "other"},
		{"a wrong fingerprint", func() []string {
			c.run(t, from, "microk8s", "add-node", "--token", chosen, "--token-ttl", "600")
			return []string{ip + ":25000/" + chosen + "/" + strings.Repeat("0", 64), "--worker"}
		}, 4, "Could not verify the identity"},
		{"a guessable token without a fingerprint", func() []string { return []string{ip + ":25000/" + guessable, "--worker"} }, 4, "could be guessed"},
		{"a random token that the cluster does not know", func() []string {
			return []string{ip + ":25000/" + strings.Replace(chosen, "7c", "8d", 1), "--worker"}
		}, 4, "does not know this token"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := c.try(t, host, append([]string{"microk8s", "join"}, tc.args()...)...)
			if r.code != tc.code && (tc.name != "a changed token" || r.code == 0) || !strings.Contains(r.out+r.err, tc.want) {
				t.Errorf("want code %d and %q: %s", tc.code, tc.want, r)
			}
		})
	}
	c.wantMark(t, host, "single")
	c.wantNodes(t, from, from)
}

// points lists the moments at which an operation may be killed: all of them in a long run, some
// that the seed chooses otherwise.
func (c *cluster) points(t *testing.T, operation string, some int) []string {
	t.Helper()
	all := c.allPoints(t, operation)
	if longtest.Enabled() {
		return all
	}
	c.rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all[:min(some, len(all))]
}

// committed reports whether a join that died at a point can only go forward.
func committed(point string) bool {
	return strings.Contains(point, "/"+membership.StepConfirm+"/") || strings.Contains(point, "/"+membership.StepCleanUp+"/")
}

// testInterrupted kills a join at its steps. Run again with the same line it succeeds; taken back,
// the node is what it was, with its data, and the same line still joins it.
func (c *cluster) testInterrupted(t *testing.T, operation, from, host string, flags ...string) {
	for _, point := range c.points(t, operation, 2) {
		t.Run(point, func(t *testing.T) {
			line := append(c.line(t, from), flags...)
			c.wantKilled(t, host, point, line...)
			if !committed(point) {
				r := c.try(t, host, "microk8s", "leave") // which takes it back
				if r.code != 0 {
					t.Fatalf("taking it back: %s", r)
				}
				c.waitReady(t, host, host)
				c.wantMark(t, host, "single")
				c.wantKilled(t, host, point, line...) // with the same token
			}
			if r := c.try(t, host, line...); r.code != 0 {
				t.Fatalf("going on: %s", r)
			}
			c.waitReady(t, from, host)
			if r := c.try(t, host, line...); r.code != 1 {
				t.Errorf("joining once more: %s", r)
			}
			c.run(t, host, "microk8s", "leave")
			c.run(t, from, "microk8s", "remove-node", host)
			if r := c.try(t, host, line...); r.code != 6 || !strings.Contains(r.err, "used") {
				t.Errorf("the token can be used again: %s", r)
			}
			c.waitReady(t, host, host)
			c.mark(t, host, "single")
		})
	}
}

// testInterruptedLeave kills a leave at one of its points, and runs it again.
func (c *cluster) testInterruptedLeave(t *testing.T, host string) {
	p := c.points(t, "leave", 1)[0] // TestInterrupted has all
	t.Run(p, func(t *testing.T) {
		c.wantKilled(t, host, p, "microk8s", "leave")
		c.run(t, host, "microk8s", "leave")
	})
}
