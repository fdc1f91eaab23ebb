package node

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"microk8s/tests/lab"
)

// testFrozen stops each daemon with SIGSTOP, as a hung disk or a debugger does: commands end, and
// say who did not answer. What every other command says is in tests/cli (TestFrozen).
func (n *node) testFrozen(t *testing.T) {
	for _, frozen := range []struct{ program, command, says string }{
		{"kubelite", "microk8s status", `the API server did not answer within`},
		{"k8s-dqlite", "microk8s status", `the datastore does not answer`},
		{"k8s-dqlite", "microk8s dbctl disarm", `the datastore at \S+ does not answer`},
		{"cluster-agent", "microk8s inspect", `cluster-agent runs and does not answer on port 25000(.|\n)*Report tarball is at`},
		{"containerd", "microk8s status", `containerd does not answer`},
		{"containerd", "microk8s ctr version", `containerd did not answer within .*microk8s logs containerd`},
	} {
		t.Run(frozen.program+" "+frozen.command, func(t *testing.T) {
			pid := strings.Fields(n.run(t, "pidof", frozen.program))[0]
			n.run(t, "kill", "-STOP", pid)
			defer n.run(t, "kill", "-CONT", pid)
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
			defer cancel()
			var out strings.Builder
			_ = n.lab.Exec(ctx, n.name, lab.Command{Args: strings.Fields(frozen.command), Stdout: &out, Stderr: &out}) // most fail
			if ctx.Err() != nil || !regexp.MustCompile(frozen.says).MatchString(out.String()) {
				t.Errorf("%s with %s frozen: %v, and nothing of %q\n%s", frozen.command, frozen.program, ctx.Err(), frozen.says, out.String())
			}
		})
	}
	n.waitReady(t)
	// A node whose daemons are frozen is stopped all the same, and comes back.
	t.Run("stop", func(t *testing.T) {
		for _, program := range []string{"kubelite", "k8s-dqlite", "containerd", "cluster-agent"} {
			n.run(t, "kill", "-STOP", strings.Fields(n.run(t, "pidof", program))[0])
		}
		n.run(t, "microk8s", "stop")
		if err := n.nothingRuns(t); err != nil {
			t.Error(err)
		}
		n.run(t, "microk8s", "start")
		n.waitReady(t)
	})
}

// testPodSecurity enforces a standard: a pod beyond it is refused in a new namespace, our addons'
// namespaces are exempt, and nothing is left when it is undone.
func (n *node) testPodSecurity(t *testing.T) {
	n.run(t, "microk8s", "pod-security", "enforce", "--force") // whatever earlier steps run in default
	defer n.run(t, "microk8s", "pod-security", "relax")
	defer n.run(t, "microk8s", "kubectl", "delete", "namespace", "fresh", "ingress", "--wait=false")
	n.run(t, "microk8s", "kubectl", "create", "namespace", "fresh")
	n.run(t, "microk8s", "kubectl", "create", "namespace", "ingress")
	refused := []string{"microk8s", "kubectl", "run", "bad", "--image=x", "--privileged", "--dry-run=server", "--namespace"}
	eventually(t, time.Minute, func() error { // a new namespace gets its account a moment later
		out, err := n.tryAll(t, "", slices.Concat(refused, []string{"fresh"})...)
		if err == nil || !strings.Contains(out, `violates PodSecurity "baseline:latest"`) {
			return fmt.Errorf("a privileged pod: %s\n%s", fmt.Sprint(err), out)
		}
		out, err = n.tryAll(t, "", slices.Concat(refused, []string{"ingress"})...)
		if err != nil {
			return fmt.Errorf("in the namespace of an addon: %w\n%s", err, out)
		}
		return nil
	})
	if out := n.run(t, "microk8s", "kubectl", "get", "namespace", "ingress", "-o", "jsonpath={.metadata.labels}"); !strings.Contains(out, `"pod-security.kubernetes.io/enforce":"privileged"`) {
		t.Errorf("the namespace of an addon has the labels %s", out)
	}
}
